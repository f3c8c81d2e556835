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

# Without a GPU, kernels run in Triton's interpreter; it asks once, when transformers imports it.
os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"

from transformers import LlamaConfig, LlamaForCausalLM

LAYERS = 64
EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-llama-wikitext2"


@pytest.fixture(scope="session")
def tiny_llama() -> Path:
    """The trained example model: 4 layers, d 256, 8 heads of 32, bf16."""
    return EXAMPLE / "model"


@pytest.fixture(scope="session")
def wikitext() -> Path:
    """The WikiText-2 test text."""
    return EXAMPLE / "wikitext-2-test.txt"


@pytest.fixture(scope="session")
def many_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of so many layers that a run can be caught in the middle."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=320,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=10,
        num_key_value_heads=5,
        vocab_size=64,
        max_position_embeddings=64,
    )
    directory = tmp_path_factory.mktemp("many-layers")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory, max_shard_size="2MB")
    return directory


@pytest.fixture(autouse=True)
def _gpu(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu"):
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        # By default cuBLAS may add up in 16 bits, and is then no reference for anything.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
