"""Every adapter on three benches at about the trained numbers of a LoRA; three seeds."""

SEEDS = range(3)
HEAD = "classifier/(kernel|bias)"
# Which weights an adapter takes: queries and values (q), outputs of both sublayers (o), keys and
# values (k), the embedding (e).
PLACES = {
    "digits": {
        "q": "layers/attention/attention/(query|value)/kernel",
        "o": "layers/(attention/output/dense|mlp/fc2)/kernel",
    },
    "text": {
        "q": "layers/attention/self/(query|value)/kernel",
        "o": "layers/(attention/output|output)/dense/kernel",
        "k": "layers/attention/self/(key|value)/kernel",
    },
    "bytes": {
        "q": "layers/self_attn/(q|v)_proj/kernel",
        "o": "layers/(self_attn/o|mlp/down)_proj/kernel",
        "k": "layers/self_attn/(k|v)_proj/kernel",
        "e": "embed_tokens/embedding",
    },
}
TEXT = {
    "train.model": "@TextClassifier()",
    "TextClassifier.source": "minilm-l6",
    "TextClassifier.head_seed": "%seed",
    "train.data": "@ClassificationData()",
    "ClassificationData.source": "python-packages",
    "ClassificationData.seq_len": 24,
    "ClassificationData.split_seed": "%seed",
    "train.batch_size": 16,
    "steps": 40,
}
BYTES = {
    "train.model": "@SmallLanguageModel()",
    "SmallLanguageModel.config": "@LlamaConfig()",
    "SmallLanguageModel.pretraining": "@Pretraining()",
    "SmallLanguageModel.seed": "%seed",
    "LlamaConfig.hidden_size": 64,
    "LlamaConfig.intermediate_size": 176,
    "LlamaConfig.num_hidden_layers": 2,
    "LlamaConfig.num_attention_heads": 4,
    "LlamaConfig.tie_word_embeddings": True,
    "Pretraining.data": "@pretraining/TextData()",
    "Pretraining.steps": 400,
    "Pretraining.batch_size": 16,
    "pretraining/TextData.source": "python-docs",
    "TextData.seq_len": 64,
    "train.data": "@TextData()",
    "TextData.source": "python-stdlib",
    "TextData.max_documents": 120,
    "TextData.split_seed": "%seed",
    "train.batch_size": 16,
    "train.eval_batch_size": 64,
    "train.eval_batches": 16,
    "train.optimizer": "@AdamW()",
    "steps": 300,
}
BENCHES = {"digits": {}, "text": TEXT, "bytes": BYTES}
WIDE = {"digits": 1, "bytes": 1, "text": 2}


def lora_like(name, rank=2, **more):
    """A method of rank r on 64-wide matrices and 2r on 384-wide ones."""

    def bindings(bench):
        r = rank * WIDE[bench]
        extra = {f"{name}.{key}": value for key, value in more.items()}
        return {"adapter": f"@{name}()", f"{name}.rank": r, f"{name}.alpha": 2.0 * r, **extra}

    return bindings


def sized(name, **by_bench):
    """A method whose arguments are ``(64-wide value, 384-wide value)``."""

    def bindings(bench):
        wide = bench == "text"
        chosen = {f"{name}.{key}": values[wide] for key, values in by_bench.items()}
        return {"adapter": f"@{name}()", **chosen}

    return bindings


def lift(bench):
    """The whole matrices train, but of each only as many entries as a LoRA has numbers."""
    rank = 2 * WIDE[bench]
    chosen = {"LIFT.rank": rank, "LIFT.filter_rank": 4 * rank, "LIFT.refresh": 50}
    return {**chosen, **grouped(bench, "@LIFT()"), "LIFT.learning_rate": "@Cosine()"}


def grouped(bench, optimizer):
    """Adapters under an optimizer of their own, the head under its own."""
    if bench == "bytes":
        return {"train.optimizer": optimizer}
    return {"Groups.rules": {f"{HEAD}/.*": "@head/AdamW()", ".*": optimizer}}


def frozen_a(bench):
    """LoRA that trains b alone: what KORE is without its null space."""
    head = {} if bench == "bytes" else {f"{HEAD}/.*": "@head/AdamW()"}
    groups = {**head, ".*/a": None, ".*": "@AdamW()"}
    rank = {"LoRA.rank": 4 * WIDE[bench], "LoRA.alpha": 8.0 * WIDE[bench]}
    return {"adapter": "@LoRA()", **rank, "train.optimizer": "@Groups()", "Groups.rules": groups}


def nothing(bench):
    """A fresh head alone."""
    return {"Groups.rules": {".*": "@head/AdamW()"}}


# name -> (where, bindings of a bench, learning rates on digits, text, bytes)
METHODS = {
    "head alone": ("", nothing, (1e-2, 1e-2, 0.0)),
    "LoRA": ("q", lora_like("LoRA"), (3e-2, 1e-2, 3e-2)),
    "rsLoRA": ("q", lora_like("LoRA", rslora=True), (1e-2, 3e-3, 3e-2)),
    "LoRA, a frozen": ("q", frozen_a, (3e-2, 1e-2, 3e-2)),
    "DoRA": ("q", lora_like("DoRA"), (3e-2, 1e-2, 3e-2)),
    "PiSSA": ("q", lora_like("PiSSA"), (3e-2, 1e-2, 3e-2)),
    "OLoRA": ("q", lora_like("OLoRA"), (3e-2, 1e-2, 3e-2)),
    "EVA": ("q", lora_like("EVA"), (3e-2, 3e-3, 3e-2)),
    "KORE": ("q", sized("KORE", rank=(4, 8)), (3e-2, 1e-2, 3e-2)),
    "FLoRA": ("q", sized("FLoRA", ranks=(2, 4)), (3e-2, 3e-3, 3e-2)),
    "NOLA": ("q", sized("NOLA", rank=(4, 4), k=(128, 256), l=(128, 256)), (3e-2, 1e-2, 3e-2)),
    "Hydra": (
        "q",
        sized("Hydra", rank_parallel=(1, 2), rank_sequential=(1, 2)),
        (3e-2, 1e-2, 3e-2),
    ),
    "MiSS": ("q", sized("MiSS", rank=(4, 8)), (1e-2, 3e-3, 1e-2)),
    "Bone": ("q", sized("Bone", rank=(4, 8)), (1e-2, 3e-3, 1e-2)),
    "LoHa": ("q", lora_like("LoHa", rank=1), (1e-1, 3e-2, 1e-1)),
    "LoKr": ("q", sized("LoKr", rank=(4, 8), alpha=(8.0, 16.0)), (3e-2, 1e-2, 3e-2)),
    "SoKA": ("q", sized("SoKA", rank=(2, 4)), (3e-2, 1e-2, 3e-2)),
    "SVFit": ("q", sized("SVFit", rank=(0, 0)), (1e-1, 3e-2, 1e-1)),
    "OFT": ("q", sized("OFT", block_size=(8, 16)), (3e-2, 1e-2, 3e-2)),
    "VeRA": ("q", sized("VeRA", rank=(192, 256)), (1e-1, 3e-2, 1e-1)),
    "IA3": ("q", sized("IA3", scale=("output", "output")), (1e-1, 3e-2, 1e-1)),
    "Bottleneck": ("o", sized("Bottleneck", bottleneck=(2, 4)), (3e-2, 1e-2, 3e-2)),
    "Compacter": ("o", sized("Compacter", bottleneck=(16, 32)), (1e-1, 3e-2, 1e-1)),
    "PromptTuning": ("e", sized("PromptTuning", tokens=(16, 16)), (0.0, 0.0, 1e-1)),
    "PrefixTuning": ("k", sized("PrefixTuning", tokens=(4, 8)), (0.0, 1e-2, 3e-2)),
    "LIFT": ("q", lift, (5e-3, 1e-3, 5e-3)),
    "full q, v": ("q", lambda bench: {}, (3e-3, 1e-3, 3e-3)),
}
WHOLE = ("LIFT", "full q, v")


def rules(bench, place, method):
    """``train.rules`` of a bench: the adapter's weights, and a fresh head where there is one."""
    adapter = "@Replace()" if method in WHOLE else "%adapter"
    out = {PLACES[bench][place]: adapter} if place else {}
    return out if bench == "bytes" else {**out, HEAD: "@Replace()"}


def setting(bench, method):
    """The bindings of one method on one bench, without a seed."""
    place, bindings, rates = METHODS[method]
    rate = rates[list(BENCHES).index(bench)]
    chosen = {"train.rules": rules(bench, place, method), **bindings(bench)}
    return {**BENCHES[bench], **chosen, **({"rate": rate} if place else {})}


def has(bench, method):
    """Whether a method can be put on a bench's model."""
    place = METHODS[method][0]
    return place in PLACES[bench] or (not place and bench != "bytes")


def settings():
    for bench in BENCHES:
        for method in METHODS:
            if has(bench, method):
                yield setting(bench, method)


def sweep():
    for seed in SEEDS:
        for one in settings():
            yield {**one, "seed": seed}
