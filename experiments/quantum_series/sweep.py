"""Seven models of two series, three seeds each; a seed is another start of the parameters."""

SEEDS = range(3)
SOURCES = ("damped_pendulum", "bessel_j2")
READOUT = {"train.rules": {"readout/(kernel|bias)": "@Replace()"}}
MOMENTUM = {"RMSprop.momentum": 0.5}  # the published settings of the QRNN; QFWP has none
# Ridge solves the read-out before the run: nothing is left to train.
SOLVED = {"SmallSeriesModel.ridge": 1e-6, "steps": 1, "rate": 0.0}
WIDE = {"QRNNReservoir.hidden": 7}


def models():
    yield {"cell": "@QFWP()"}
    yield {"cell": "@StaticVQC()"}
    yield {"cell": "@StaticVQC()", "Series.as_features": True}
    yield {"cell": "@QRNN()", **MOMENTUM}
    reservoir = {"cell": "@QRNNReservoir()", **READOUT}
    yield {**reservoir, **MOMENTUM}
    yield {**reservoir, **SOLVED}
    yield {**reservoir, **WIDE, **SOLVED}


def sweep():
    for seed in SEEDS:
        for source in SOURCES:
            for model in models():
                yield {"Series.source": source, **model, "seed": seed}
