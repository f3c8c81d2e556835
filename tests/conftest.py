"""What all tests share. Ray is local and private here, whatever runs on this machine."""

import os
from pathlib import Path

os.environ["RAY_ADDRESS"] = "local"
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
# Ray's workers import the worker classes that tests define.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
)

import pytest
import torch

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-llama-wikitext2"


@pytest.fixture(scope="session")
def tiny_llama() -> Path:
    """The trained example model: 4 layers, d 256, 8 heads of 32, bf16."""
    return EXAMPLE / "model"


@pytest.fixture(scope="session")
def wikitext() -> Path:
    """The WikiText-2 test text."""
    return EXAMPLE / "wikitext-2-test.txt"


@pytest.fixture(autouse=True)
def _gpu(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
