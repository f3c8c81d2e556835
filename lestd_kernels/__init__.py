"""The mathematics, and what lives inside a loaded model.

Importing this package registers the format with Transformers, so that
``AutoModelForCausalLM.from_pretrained(directory)`` loads a compressed model.
"""

from lestd_kernels import transformers_plugin
from lestd_kernels.errors import LestdError
from lestd_kernels.linear import set_backend
from lestd_kernels.transformers_plugin import LestdConfig

__all__ = ["LestdConfig", "LestdError", "set_backend"]

transformers_plugin.register()
