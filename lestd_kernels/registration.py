"""Registers the format with Transformers as soon as that is imported, and does not import it.

The plug-in is imported while Transformers' quantizers are. Whoever needs the plug-in imports those
first (`plugin`), so that threads take the two locks in the same order.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# Holds the mappings that the plug-in adds to; every way to load a model imports it.
_MODULE = "transformers.quantizers.auto"


def register_when_imported() -> None:
    """Register the format now if Transformers' quantizers are imported, else when they are."""
    if _MODULE in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Finder())


def plugin() -> ModuleType:
    """The module `lestd_kernels.transformers_plugin`."""
    import_module(_MODULE)
    return _register()


def _register() -> ModuleType:
    return import_module("lestd_kernels.transformers_plugin")  # Registers at its end.


class _Finder(MetaPathFinder):
    """Finds that one module as the others do, with a loader that registers the format.

    It stays: an import that failed is tried again.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        if fullname != _MODULE:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Another loader, and the registration after it."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """See `importlib.abc.Loader`."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, then register the format with it."""
        self._loader.exec_module(module)
        _register()

    def __getattr__(self, name: str) -> object:
        if name == "_loader":  # Of a copy in the making.
            raise AttributeError(name)
        return getattr(self._loader, name)  # What tools ask loaders for: sources, names, files.
