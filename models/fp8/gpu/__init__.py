"""Operations on a GPU that are not all `kernels/`'s, a module for each mixture.

A module here has every name of `kernels/`, and then some of somebody else's in their place.
`operations.choose` says who takes which.
"""
