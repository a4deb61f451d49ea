"""What a run needs of a GPU, counted from its config alone, before anything starts.

    shapes.py    how much of the model, and how many rows, a rank has
    kept.py      activations that a layer keeps for its backward pass
    experts.py   what the experts hold while they compute, path by path
    memory.py    all of it by part, at the peak of a step
    warning.py   one line at the start of a run that is not planned to fit

`scripts/plan` adds time and traffic, and prints. A GPU's arithmetic is meant throughout: bfloat16,
TransformerEngine's attention, and gradients of experts in float32 where they have no replicas.
"""
