"""Operations on a GPU that mix `kernels/` with those of a library, a module for each mixture.

A module here has every name of `kernels/`, some of them replaced by a library's.
`operations.choose` says which path uses which.
"""
