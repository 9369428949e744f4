metrics = {"score": "Score"}
paper = {"slope 2.0": {"score": "19.5"}}


def label(bindings):
    return f"slope {bindings['toy.slope']}"
