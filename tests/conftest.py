"""What all tests share. Ray is local and private here, whatever runs on this machine."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

os.environ["RAY_ADDRESS"] = "local"
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
# Ray's workers import the worker classes of tests/support. The packages come first, for folders of
# tests have their names.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [*map(str, Path(__file__).parents[1::-1]), *filter(None, [os.environ.get("PYTHONPATH")])]
)

import pytest
import torch

# Without a GPU, kernels run in Triton's interpreter; it asks once, when transformers imports it.
os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"

from support.cli import STARTED, digest_tree, lestd
from transformers import LlamaConfig, LlamaForCausalLM

# A shell starts what it runs in the background deaf to SIGINT; tests interrupt what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

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
        hidden_size=192,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=6,
        num_key_value_heads=3,
        vocab_size=64,
        max_position_embeddings=64,
    )
    directory = tmp_path_factory.mktemp("many-layers")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory, max_shard_size="2MB")
    return directory


@pytest.fixture(scope="session")
def undisturbed(many_layers: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The bytes of `many_layers` at keep 0.5, of a run in one process that nobody disturbs."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    result = lestd("compress", many_layers, "--out", out, "--keep", 0.5, "--executor", "serial")
    assert result.code == 0, result.err
    return digest_tree(out)


@pytest.fixture(autouse=True)
def _no_process_outlives_its_test() -> Iterator[None]:
    """A test that fails in the middle would leave one that slows down all others."""
    yield
    while STARTED:
        process = STARTED.pop()
        process.kill()
        process.wait()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GPU, one case of each test that needs one says so for all of its cases."""
    if torch.cuda.is_available():
        return
    seen: set[object] = set()
    skipped, kept = [], []
    for item in items:
        function = getattr(item, "function", item)
        needs = item.get_closest_marker("gpu") is not None
        (skipped if needs and function in seen else kept).append(item)
        seen |= {function} if needs else set()
    config.hook.pytest_deselected(items=skipped)
    items[:] = kept


@pytest.fixture(autouse=True)
def _gpu(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu"):
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        # By default cuBLAS may add up in 16 bits, and is then no reference for anything.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
