"""Two parts: accuracy of the adapted CNN, and the error against a teacher of known ranks."""

metrics = {
    "accuracy": "Accuracy on 5-9, %",
    "retention": "Retention on 0-4, %",
    "mse": "Mean squared error",
    "mse_before": "at the start",
    "trained_adapters": "Adapter numbers",
    "trained": "All trained",
}
panels = 2


def core(bindings):
    return bindings.get("ConvTeacherStudent.core")


def part(bindings):
    if core(bindings) is None:
        return "Digits 5-9"
    return f"Teacher with an update of ranks (1, 1, 2, 2), {core(bindings)} core"


def label(bindings):
    if "LoRA.rank" in bindings:
        return f"LoRA r={bindings['LoRA.rank']}"
    if "FLoRA.ranks" in bindings:
        ranks = bindings["FLoRA.ranks"]
        return f"FLoRA {ranks if isinstance(ranks, tuple) else f'r={ranks}, window 2'}"
    return "head alone" if "Groups.rules" in bindings else "everything"


def plot(groups, axes):
    digits = [g for g in groups if core(g.bindings) is None]
    for method in ("LoRA", "FLoRA"):
        mine = [g for g in digits if g.bindings.get("adapter") == f"@{method}()"]
        counts = [g.mean("trained_adapters") for g in mine]
        means = [g.mean("accuracy") for g in mine]
        halves = [g.interval("accuracy") for g in mine]
        axes[0].errorbar(counts, means, yerr=halves, marker="o", capsize=3, label=method)
    for group in digits:
        if "adapter" not in group.bindings:
            name = label(dict(group.bindings))
            style = {"head alone": ":", "everything": "--"}[name]
            axes[0].axhline(group.mean("accuracy"), color="grey", linestyle=style, label=name)
    axes[0].set_xlabel("adapter numbers")
    axes[0].set_ylabel(metrics["accuracy"])
    axes[0].legend()
    for kind, marker in (("orthogonal", "o"), ("gaussian", "x")):
        for group in groups:
            if core(group.bindings) == kind:
                values = group.values("mse")
                name = f"{label(dict(group.bindings))}, {kind} core"
                axes[1].plot(
                    group.values("trained_adapters"), values, marker, label=name, alpha=0.7
                )
    axes[1].axhline(1e-4, color="grey", linestyle=":")
    axes[1].set_yscale("log")
    axes[1].set_xlabel("adapter numbers")
    axes[1].set_ylabel("mean squared error, one mark a seed")
    axes[1].legend(fontsize="x-small", loc="center", bbox_to_anchor=(0.62, 0.45))
