"""Accuracy on the new digits and retention of the old ones against trained numbers a matrix."""

metrics = {
    "accuracy": "Accuracy on 5-9, %",
    "retention": "Retention on 0-4, %",
    "trained_adapters": "Adapter numbers",
    "trained": "All trained",
    "examples_per_s": "Examples/s",
}
panels = 2
MATRICES = 4  # query and value in two blocks


def label(bindings):
    adapter = bindings.get("adapter")
    if adapter == "@NOLA()":
        return f"NOLA r=4, {bindings['NOLA.k'] + bindings['NOLA.l']} a matrix"
    if adapter == "@LoRA()":
        return f"LoRA r={bindings['LoRA.rank']}, {128 * bindings['LoRA.rank']} a matrix"
    if adapter == "@FLoRA()":
        rank = bindings["FLoRA.ranks"]
        return f"FLoRA r={rank}, {128 * rank + rank**2} a matrix"
    return "head alone" if "Groups.rules" in bindings else "everything"


def plot(groups, axes):
    for axis, metric in zip(axes, ("accuracy", "retention")):
        for method in ("NOLA", "LoRA", "FLoRA"):
            mine = [g for g in groups if g.bindings.get("adapter") == f"@{method}()"]
            counts = [g.mean("trained_adapters") / MATRICES for g in mine]
            means = [g.mean(metric) for g in mine]
            halves = [g.interval(metric) for g in mine]
            axis.errorbar(counts, means, yerr=halves, marker="o", capsize=3, label=method)
        for group in groups:
            if "adapter" not in group.bindings:
                name = label(dict(group.bindings))
                style = {"head alone": ":", "everything": "--"}[name]
                axis.axhline(group.mean(metric), color="grey", linestyle=style, label=name)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("trained numbers a matrix")
        axis.set_ylabel(metrics[metric])
    axes[0].legend()
