"""LeSTD for Python: the commands as functions, and the models that they make.

    import lestd

    lestd.compress("MODEL", "OUT", keep=0.4)
    model, tokenizer = lestd.load("OUT")

Importing it registers the format with Transformers, as `import lestd_kernels` does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import lestd_kernels as lestd_kernels

if TYPE_CHECKING:
    from lestd_kernels.errors import LestdError
    from lestd_kernels.modules.registry import set_backend
    from orchestrator.api import compress, evaluate, load, plan
    from orchestrator.manifest.manifest import Manifest

__all__ = ["LestdError", "Manifest", "compress", "evaluate", "load", "plan", "set_backend"]

_HOMES = {
    "LestdError": "lestd_kernels.errors",
    "set_backend": "lestd_kernels.modules.registry",
    "Manifest": "orchestrator.manifest.manifest",
} | dict.fromkeys(("compress", "evaluate", "load", "plan"), "orchestrator.api")


def __getattr__(name: str) -> Any:
    # Each when it is first used: loading a model needs neither Ray nor pyarrow.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
