"""Feed-forward blocks and experts, compressed, loaded, saved and exported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from support.cli import lestd
from support.compressing import compress
from support.families import FAMILIES, save_tiny
from support.scopes import dense_chain, groups_of, rotated_chain, write_model
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

import lestd_kernels  # noqa: F401 - registers the format
from lestd_kernels.tensorize import unfold_weights
from orchestrator.architectures import SliceGroup
from orchestrator.model.export import export_dense
from workers.checkpoint.tensors import read_tensor

EXPERT_FAMILIES = ("qwen3_moe", "mixtral", "gpt_oss")
# Every family, those that differ most first of all.
SOME_FAMILIES = [
    pytest.param(family, marks=() if family in ("opt", *EXPERT_FAMILIES) else pytest.mark.slow)
    for family in FAMILIES
]


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


@pytest.mark.parametrize("family", SOME_FAMILIES)
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


@pytest.mark.parametrize("family", SOME_FAMILIES)
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


COMMAND_CASES = [
    ("opt", "all", ("--method", "lestd", "--keep", 0.5)),
    ("qwen3_moe", "all", ("--method", "lestd", "--keep", 0.5)),
    ("mixtral", "experts", ("--method", "td_moe", "--keep", 0.7)),
    ("gpt_oss", "all", ("--method", "svd", "--keep-model", 0.7)),
]
SLOW_COMMAND_CASES = [
    *((family, "all", ("--method", "lestd", "--keep", 0.5)) for family in FAMILIES),
    *((family, "all", ("--method", "svd", "--keep", 0.7)) for family in ("gptj", "qwen3_moe")),
    *((family, "all", ("--method", "tucker", "--keep", 0.7)) for family in EXPERT_FAMILIES),
    *((family, "experts", ("--method", "td_moe", "--keep", 0.7)) for family in EXPERT_FAMILIES),
    *((family, "all", ("--method", "magnitude", "--keep", 0.4)) for family in EXPERT_FAMILIES),
    ("gpt_oss", "experts", ("--method", "rtn", "--keep", 0.4, "--value-bits", 4)),
    ("gptj", "ffn", ("--method", "tt", "--keep", 0.6)),
    ("qwen3_moe", "ffn", ("--method", "lestd", "--keep", 0.5, "--include", "1")),
    ("gpt_oss", "experts", ("--method", "lestd", "--keep", 0.5, "--include", "1")),
]


@pytest.mark.parametrize(
    ("family", "scope", "options"),
    [*COMMAND_CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_COMMAND_CASES)],
)
def test_a_compressed_model_is_its_reconstruction(
    family: str,
    scope: str,
    options: tuple[object, ...],
    tiny_models: dict[str, Path],
    tmp_path: Path,
) -> None:
    source = tiny_models[family]
    out = compress(source, tmp_path / "out", "--scope", scope, *options)
    assert lestd("verify", out).code == 0
    rows = pq.read_table(out / "manifest" / "groups.parquet").to_pylist()
    included = {int(options[-1])} if "--include" in options else None
    groups = [g for g in groups_of(source, scope) if included is None or g.layer in included]
    groups.sort(key=lambda group: (group.layer, group.block))
    assert [row["block"] for row in rows] == [group.block for group in groups]
    assert [row["scope"] for row in rows] == [group.scope for group in groups]

    for row, group in zip(rows, groups, strict=True):
        shard = next(p for p in (tmp_path / "out.run").rglob(row["payload"]))
        tensors = load_file(shard)
        assert all(name.startswith(f"{group.tensor_prefix}.") for name in tensors)
        assert sum(t.nbytes for t in tensors.values()) == row["stored_bytes"] <= row["byte_budget"]
    assert len(list(out.glob("lestd-*"))) == len(groups)

    exported = export_dense(out, tmp_path / "dense")
    original, dense = tensors_of(source), tensors_of(Path(exported.out))
    assert {name: shape for name, (_, shape, _) in dense.items()} == {
        name: shape for name, (_, shape, _) in original.items()
    }
    in_scope = {ref.name for group in groups for ref in group.tensors.values()}
    assert {name for name in original if dense[name] != original[name]} == in_scope
    _compare_slices(out, groups, exported.out, rows)

    expected, found = logits_of(load(Path(exported.out))), logits_of(load(out))
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


def _compare_slices(out: Path, groups: list[SliceGroup], dense: str, rows: list[dict]) -> None:
    """Every slice's error as the manifest states it is that of the exported weights."""
    exported = {group.block: group for group in groups_of(Path(dense), "all")}
    slices = pq.read_table(out / "manifest" / "slices.parquet").to_pylist()
    for group, row in zip(groups, rows, strict=True):
        stated = {
            (one["projection"], one["head"]): one["relative_error"]
            for one in slices
            if one["task_id"] == row["task_id"]
        }
        f = group.layout.head_dim
        W, W_hat = (
            unfold_weights({s: read_tensor(r) for s, r in g.tensors.items()}, g.layout)
            for g in (group, exported[group.block])
        )
        assert len(stated) == len(group.layout.slices)
        for i, key in enumerate(group.layout.slices):
            part = slice(i * f, (i + 1) * f)
            error = (W - W_hat)[:, part].norm() / W[:, part].norm()
            assert error == pytest.approx(stated[key], rel=1e-3, abs=1e-5)
            assert 0 < error < 1
