"""Feed-forward blocks and experts, compressed, loaded, saved and exported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES, save_tiny
from scopes import dense_chain, groups_of, rotated_chain, write_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

import lestd_kernels  # noqa: F401 - registers the format
from orchestrator.export import export_dense

EXPERT_FAMILIES = ("qwen3_moe", "mixtral", "gpt_oss")


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {family: save_tiny(family, root / family) for family in FAMILIES}


def logits_of(model: PreTrainedModel) -> Tensor:
    ids = torch.randint(3, 90, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids).logits


def load(directory: Path, **options: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, **options).eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("decompose", [dense_chain, rotated_chain])
def test_a_lossless_chain_gives_the_logits_of_the_original(
    family: str, decompose, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    source = tiny_models[family]
    out = write_model(source, groups_of(source, "all"), decompose, tmp_path / "out")
    expected, model = logits_of(load(source)), load(out)
    assert (logits_of(model) - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", ["all", "part"])
def test_saved_again_it_is_the_same_model(
    family: str, scope: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """Also where some layers are dense, whose experts Transformers takes apart when it saves."""
    groups = groups_of(tiny_models[family], "all")
    groups = groups if scope == "all" else groups[:2]
    out = write_model(tiny_models[family], groups, rotated_chain, tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model.save_pretrained(tmp_path / "saved")
    assert tensors_of(tmp_path / "saved") == tensors_of(out)
    assert torch.equal(logits_of(load(tmp_path / "saved")), logits_of(model.eval()))
    dense, saved = (
        export_dense(directory, tmp_path / f"dense-{directory.name}")
        for directory in (out, tmp_path / "saved")
    )
    assert tensors_of(Path(dense.out)) == tensors_of(Path(saved.out))


def tensors_of(directory: Path) -> dict[str, tuple[object, ...]]:
    """Every tensor's bytes by name."""
    return {
        name: (tensor.dtype, tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).tolist())
        for shard in sorted(directory.glob("*.safetensors"))
        for name, tensor in load_file(shard).items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_model_alone_and_from_a_checkpoint_without_its_prefix(
    family: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    full = load(tiny_models[family])
    base = full.base_model
    base.save_pretrained(tmp_path / "base")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected = base(ids).last_hidden_state
    for source in (tiny_models[family], tmp_path / "base"):
        out = tmp_path / f"out-{source.name}"
        write_model(source, groups_of(source, "all"), rotated_chain, out)
        model, info = AutoModel.from_pretrained(out, output_loading_info=True)
        assert not info["missing_keys"]
        with torch.no_grad():
            found = model.eval()(ids).last_hidden_state
        assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()
        model.save_pretrained(tmp_path / f"saved-{source.name}")
        exported = export_dense(
            tmp_path / f"saved-{source.name}", tmp_path / f"dense-{source.name}"
        )
        original = tensors_of(tmp_path / "base")
        assert tensors_of(Path(exported.out)).keys() == original.keys()


def test_without_the_plug_in_nothing_is_made_up(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """Transformers alone would initialize absent experts at random, and only warn."""
    code = (
        "import sys; from transformers import AutoModelForCausalLM as M\n"
        "for path in sys.argv[1:]:\n"
        "    try: M.from_pretrained(path); print('loaded')\n"
        "    except RuntimeError as error: print('refused', 'mismatched_sizes' in str(error))\n"
        "assert 'lestd_kernels' not in sys.modules"
    )
    directories = []
    for family in EXPERT_FAMILIES:
        groups = groups_of(tiny_models[family], "experts")
        for number, some in enumerate((groups, groups[:1])):
            out = tmp_path / f"{family}-{number}"
            directories.append(write_model(tiny_models[family], some, dense_chain, out))
    run = subprocess.run(
        [sys.executable, "-c", code, *map(str, directories)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.splitlines() == ["refused True"] * len(directories)
