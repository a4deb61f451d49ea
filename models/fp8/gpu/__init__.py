"""Operations of paths that do not take all of theirs from `kernels/` on a GPU, a module each.

A module here has every name of `kernels/`, and then some of somebody else's in their place.
"""
