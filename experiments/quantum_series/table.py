"""Held-out error of each model on each series."""

metrics = {
    "mse": "Mean squared error",
    "mse_before": "before training",
    "trained": "Trained",
    "parameters": "Parameters",
    "seconds": "Seconds",
}
panels = 2
NAMES = {"damped_pendulum": "Damped pendulum", "bessel_j2": "Bessel J2"}


def part(bindings):
    return NAMES[bindings["Series.source"]]


def label(bindings):
    cell = bindings["cell"].strip("@()")
    if cell == "StaticVQC":
        return "static VQC, " + ("window" if bindings.get("Series.as_features") else "last value")
    if cell == "QRNNReservoir":
        how = "ridge" if "SmallSeriesModel.ridge" in bindings else "RMSprop"
        return f"QRNN-RC, hidden {bindings.get('QRNNReservoir.hidden', 3)}, {how}"
    return {"QFWP": "QFWP", "QRNN": "QRNN, hidden 3"}[cell]


def plot(groups, axes):
    for axis, source in zip(axes, NAMES):
        mine = [g for g in groups if g.bindings["Series.source"] == source]
        for row, group in enumerate(mine):
            values = group.values("mse")
            axis.plot(values, [row] * len(values), "o", alpha=0.6)
        axis.set_yticks(range(len(mine)), [label(dict(g.bindings)) for g in mine])
        axis.set_xscale("log")
        axis.set_xlabel("mean squared error, one mark a seed")
        axis.set_title(NAMES[source])
