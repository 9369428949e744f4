"""Three tables, one a bench; a plot of the figure of merit against trained numbers."""

metrics = {
    "accuracy": "Accuracy, %",
    "perplexity": "Perplexity a byte",
    "retention": "First task, %",
    "forgetting": "Forgetting, nats",
    "trained_adapters": "Adapter numbers",
    "loss_at_20": "Loss at step 20",
    "seconds_per_step": "s/step",
    "peak_bytes": "Peak bytes",
}
panels = 3
NAMES = {
    "digits": "Digits: a ViT of 0-4 adapted to 5-9",
    "text": "Text: MiniLM, eight classes of docstrings",
    "bytes": "Bytes: a Llama of English prose adapted to Python source",
}
MODELS = {"@TextClassifier()": "text", "@SmallLanguageModel()": "bytes"}


def bench(bindings):
    return MODELS.get(bindings.get("train.model"), "digits")


def part(bindings):
    return NAMES[bench(bindings)]


def label(bindings):
    rules, groups = bindings["train.rules"], bindings.get("Groups.rules", {})
    if "LIFT.rank" in bindings:
        return "LIFT"
    if ".*/a" in groups:
        return "LoRA, a frozen"
    if "adapter" in bindings:
        return "rsLoRA" if "LoRA.rslora" in bindings else bindings["adapter"].strip("@()")
    return "full q, v" if len(rules) > (bench(bindings) != "bytes") else "head alone"


def plot(groups, axes):
    for axis, name in zip(axes, NAMES):
        mine = [g for g in groups if bench(g.bindings) == name]
        metric = "perplexity" if name == "bytes" else "accuracy"
        for group in mine:
            x, y = group.mean("trained_adapters"), group.mean(metric)
            axis.errorbar([x], [y], yerr=[group.interval(metric)], marker="o", color="C0")
            text = label(dict(group.bindings))
            axis.annotate(text, (x, y), (3, 2), fontsize=6, textcoords="offset points")
        axis.set_xscale("symlog", linthresh=64)
        axis.set_title(NAMES[name], fontsize=9)
        axis.set_xlabel("adapter numbers")
        axis.set_ylabel(metrics[metric])
