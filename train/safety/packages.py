"""A package that is broken fails to load as a missing one does: with a ModuleNotFoundError.

megatron-core loads TransformerEngine and DeepEP wherever it finds them, and does without them only
after that error. Built for another CUDA or NCCL they raise all kinds of others, which would end any
command with a traceback. The code that needs the package says why it does not load.

And DeepEP has what megatron-core looks for, which would take its version 2 for missing.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

NAMES = ("transformer_engine", "deep_ep")


class _Guarded(Loader):
    """A package's own loader, with its errors made ModuleNotFoundErrors."""

    def __init__(self, own: Any) -> None:
        self._own = own

    def __getattr__(self, name: str) -> Any:
        if name == "_own":  # of a copy under construction
            raise AttributeError(name)
        return getattr(self._own, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        try:
            self._own.exec_module(module)
            if module.__name__ == "transformer_engine":
                # It passes over most errors of this half, which megatron-core cannot do without.
                import_module("transformer_engine.pytorch")
        except ModuleNotFoundError:
            raise
        except Exception as error:
            raise ModuleNotFoundError(str(error) or type(error).__name__) from error
        if module.__name__ == "deep_ep":
            _complete(module)


class _Finder(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in NAMES:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            if find is not None and (spec := find(name, path, target)) is not None:
                if spec.loader is not None:
                    spec.loader = _Guarded(spec.loader)
                return spec
        return None


def _complete(deep_ep: ModuleType) -> None:
    """`EventOverlap` in `deep_ep.utils`, where v1.2.1 has it and megatron-core takes it from."""
    utils, overlap = getattr(deep_ep, "utils", None), getattr(deep_ep, "EventOverlap", None)
    if utils is not None and overlap is not None and not hasattr(utils, "EventOverlap"):
        utils.EventOverlap = overlap


def guard() -> None:
    """From now on, in this process."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
