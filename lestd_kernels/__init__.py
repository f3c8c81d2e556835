"""The mathematics, and what lives inside a loaded model.

Importing this package registers the format with Transformers, so that
``AutoModelForCausalLM.from_pretrained(directory)`` loads a compressed model. Where Transformers is
not imported yet, that happens when it is: the two together take seconds, and much of the command
line needs neither.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lestd_kernels import registration
from lestd_kernels.errors import LestdError

if TYPE_CHECKING:
    from lestd_kernels.modules.registry import set_backend
    from lestd_kernels.transformers_plugin import LestdConfig

__all__ = ["LestdConfig", "LestdError", "set_backend"]

registration.register_when_imported()


def __getattr__(name: str) -> Any:
    if name == "set_backend":
        from lestd_kernels.modules.registry import set_backend

        return set_backend
    if name == "LestdConfig":
        return registration.plugin().LestdConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
