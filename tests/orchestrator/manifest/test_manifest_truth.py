"""The manifest against the files: every figure recomputed in numpy from payloads and source.

Nothing of lestd decodes or measures here. safetensors files are read from their bytes, cores are
decoded by the format's description, errors and energies are summed in float64.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from support.cli import lestd
from support.families import attention_groups, save_tiny
from support.groups import gqa
from transformers import LlamaConfig, LlamaForCausalLM

from lestd_kernels.tensorize import GroupLayout, fold_weights
from orchestrator.manifest.manifest import Manifest

TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "u1", "U16": "<u2", "I32": "<i4"}


@dataclass(frozen=True)
class Stored:
    """A tensor of a safetensors file: its bytes, and its values with what is float as float64."""

    content: bytes
    values: np.ndarray


def read_safetensors(path: Path) -> dict[str, Stored]:
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    tensors = {}
    for name, entry in json.loads(whole[8:start]).items():
        if name == "__metadata__":
            continue
        first, last = entry["data_offsets"]
        content = whole[start + first : start + last]
        values = np.frombuffer(content, TYPES[entry["dtype"]])
        if entry["dtype"] == "BF16":  # The upper half of a float32.
            values = (values.astype(np.uint32) << 16).view(np.float32)
        if values.dtype.kind == "f":
            values = values.astype(np.float64)
        tensors[name] = Stored(content, values.reshape(entry["shape"]))
    return tensors


def read_all(directory: Path) -> dict[str, Stored]:
    files = sorted(directory.glob("*.safetensors"))
    return {name: one for file in files for name, one in read_safetensors(file).items()}


@dataclass(frozen=True)
class Core:
    """A core unfolding, how its payload stores it, and the bytes it takes there."""

    matrix: np.ndarray
    codec: str
    nbytes: int


def decode(payload: dict[str, Stored], path: str, rows: int, columns: int) -> Core:
    """The core below `path`; its codec is the one that has tensors of these names."""
    parts = {
        name: payload[f"{path}.{name}"]
        for name in ("weight", "mask", "columns", "row_pointers")
        if f"{path}.{name}" in payload
    }
    nbytes = sum(len(part.content) for part in parts.values())
    values, flat = parts["weight"].values, np.zeros(rows * columns)
    if "mask" in parts:
        codec, bits = "bitmask", np.unpackbits(parts["mask"].values, bitorder="little")
        flat[np.flatnonzero(bits)] = values  # Too short for a bit set in the filling at the end.
    elif "columns" in parts:
        codec, per_row = "csr", np.diff(parts["row_pointers"].values)
        assert len(per_row) == rows
        flat[np.repeat(np.arange(rows) * columns, per_row) + parts["columns"].values] = values
    else:
        codec, flat = "dense", values
    return Core(flat.reshape(rows, columns), codec, nbytes)


def squares(array: np.ndarray) -> float:
    return float(np.square(array).sum())


@dataclass(frozen=True)
class Truth:
    """What the rows of one group have to say."""

    group: dict[str, object]
    slices: list[dict[str, object]]


def measured(
    payload: dict[str, Stored], source: dict[str, Stored], group: str, layout: GroupLayout
) -> Truth:
    """Recompute a group and its slices from the tensors on both sides."""
    U1 = payload[f"{group}.lestd_u1.weight"].values
    U2 = payload[f"{group}.lestd_u2.weight"].values
    R1, R2, p = U1.shape[1], U2.shape[1], layout.head_dim
    learned = any(".lestd_core." in name for name in payload)

    weights, mixed, shares, cores = [], [], [], []
    U3 = np.zeros((0, 0))
    if learned:
        rows = {}
        for module in layout.modules:
            types = [kind for kind, head in module.slices if head == 0]
            values = payload[f"{group}.{module.name}.weight"].values.reshape(len(types), -1)
            rows |= dict(zip(types, values, strict=True))
        U3 = np.stack([rows[kind] for kind in "qkvo"])
        R3, heads = U3.shape[1], len(layout.slices) // 4
        core = decode(payload, f"{group}.lestd_core", R1, R3 * heads * R2)
        cores.append(core)
        G = core.matrix.reshape(R1, R3, heads, R2)
    for module in layout.modules:
        W = source[f"{group}.{module.name}.weight"].values
        W = W.T if module.basis_side == "input" else W
        if not learned:
            core = decode(payload, f"{group}.{module.name}", R1, len(module.slices) * R2)
            cores.append(core)
        for at, (kind, head) in enumerate(module.slices):
            weights.append(W[:, at * p : (at + 1) * p])
            if learned:
                mixed.append(np.einsum("r,arb->ab", rows[kind], G[:, :, head]))
                part, split = np.count_nonzero(G[:, :, head]), 4
            else:
                mixed.append(core.matrix[:, at * R2 : (at + 1) * R2])
                part, split = np.count_nonzero(mixed[-1]), 1
            shares.append(core.nbytes * part / np.count_nonzero(core.matrix) / split)

    slices, error = [], 0.0
    for (kind, head), W_s, M_s, share in zip(layout.slices, weights, mixed, shares, strict=True):
        residual = squares(W_s - U1 @ M_s @ U2.T)
        error += residual
        slices.append(
            {
                "projection": kind,
                "head": head,
                "nnz": int(np.count_nonzero(M_s)),
                "density": np.count_nonzero(M_s) / (R1 * R2),
                "core_bytes": share,
                "relative_error": (residual / squares(W_s)) ** 0.5,
                "squared_norm": squares(W_s),
                "squared_energy": squares(M_s),
            }
        )

    # The energy of W inside the factors' spans: rounding leaves spans as they are to first order.
    Q1, Q2 = np.linalg.qr(U1)[0], np.linalg.qr(U2)[0]
    inside = {s: Q1.T @ W_s @ Q2 for s, W_s in zip(layout.slices, weights, strict=True)}
    if learned:
        Q3 = np.linalg.qr(U3)[0]
        full = np.stack([[inside[kind, head] for head in range(heads)] for kind in "qkvo"])
        energy = squares(np.tensordot(Q3, full, (0, 0)))
    else:
        energy = sum(map(squares, inside.values()))
    norm = sum(map(squares, weights))
    stored = np.concatenate([core.matrix.ravel() for core in cores])
    row = {
        "R1": R1,
        "R2": R2,
        "R3": U3.shape[1] if learned else None,
        "nnz": np.count_nonzero(stored),
        "density": np.count_nonzero(stored) / stored.size,
        "codec": "+".join(sorted({core.codec for core in cores})),
        "stored_bytes": sum(len(one.content) for one in payload.values()),
        "relative_error": (error / norm) ** 0.5,
        "squared_norm": norm,
        "squared_error": error,
        "squared_energy_stage1": energy,
        "squared_energy_stage2": squares(stored),
        "threshold": np.abs(stored[stored != 0]).min(),
    }
    return Truth(row, slices)


@dataclass(frozen=True)
class Case:
    """A model, how it is compressed, and the codecs that its cores come to be stored in."""

    family: str
    options: tuple[str, ...]
    codecs: str
    dtype: torch.dtype = torch.float32


WEIGHT = ("--metric", "weight")
CASES = {
    "opt: MHA, biases": Case("opt", ("--keep", "0.5", *WEIGHT), "bitmask"),
    "llama: GQA, biases, bf16": Case(
        "llama-gqa", ("--keep", "0.4", *WEIGHT), "bitmask", torch.bfloat16
    ),
    "mistral: one key/value head": Case("mistral", ("--keep", "0.3", *WEIGHT), "bitmask"),
    "qwen3: heads wider than the model": Case("qwen3", ("--keep", "0.6", *WEIGHT), "bitmask"),
    "gpt_neox: fused": Case("gpt_neox", ("--keep", "0.4", *WEIGHT), "bitmask", torch.float16),
    "learned": Case("gptj", ("--keep", "0.5", "--type-mode", "learned"), "bitmask"),
    "learned, fused": Case("gpt_neox", ("--keep", "0.3", "--type-mode", "learned"), "bitmask"),
    "tucker": Case("llama-gqa", ("--keep", "0.5", "--method", "tucker"), "dense"),
    "tucker, learned": Case(
        "opt", ("--keep", "0.3", "--method", "tucker", "--type-mode", "learned"), "dense"
    ),
    "2:4": Case("qwen2", ("--keep", "0.7", "--pattern", "2:4"), "bitmask"),
    "2:4, bf16": Case("opt", ("--keep", "0.8", "--pattern", "2:4"), "bitmask", torch.bfloat16),
    "global": Case("opt", ("--keep", "0.4", *WEIGHT, "--allocation", "global"), "bitmask"),
    "sparse: 15 heads, 5 key/value heads": Case("sparse-gqa", ("--keep", "0.11", *WEIGHT), "csr"),
    "sparse, learned": Case("sparse-mha", ("--keep", "0.29", "--type-mode", "learned"), "csr"),
    "example": Case("example", ("--keep", "0.5", *WEIGHT), "bitmask", torch.bfloat16),
}


def save_sparse(directory: Path, heads: int, kv_heads: int) -> dict[str, GroupLayout]:
    """A Llama whose slices have low rank in directions of their own, so that cores are sparse."""
    d, p = 60, 12
    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=d,
        head_dim=p,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=64,
        max_position_embeddings=32,
    )
    model = LlamaForCausalLM(config)
    layout = gqa(d, p, heads, kv_heads)
    slices = len(layout.slices)
    for block in model.model.layers:
        left, right = (torch.linalg.qr(torch.randn(n, n))[0] for n in (d, p))
        W = 0.003 * torch.randn(d, slices, p)
        for s in range(slices):
            for term in range(d // slices):
                u, v = left[:, term * slices + s], right[:, (s + 4 * term) % p]
                W[:, s] += (1 + torch.rand(())) * torch.outer(u, v)
        for name, weight in fold_weights(W.flatten(1), layout).items():
            block.self_attn.get_submodule(name).weight.data.copy_(weight)
    model.save_pretrained(directory, max_shard_size="40KB")
    return {f"model.layers.{i}.self_attn": layout for i in range(2)}


def source_of(case: Case, example: Path, directory: Path) -> tuple[Path, dict[str, GroupLayout]]:
    if case.family == "example":
        config = json.loads((example / "config.json").read_text())
        layout = gqa(256, 32, 8, config["num_key_value_heads"])
        return example, {f"model.layers.{i}.self_attn": layout for i in range(4)}
    if case.family.startswith("sparse"):
        heads = 15 if case.family == "sparse-gqa" else 5
        return directory, save_sparse(directory, heads, 5)
    return save_tiny(case.family, directory, case.dtype), attention_groups(case.family)


def agrees(row: dict[str, object], truth: dict[str, object], tolerance: dict[str, float]) -> None:
    for name, value in truth.items():
        if isinstance(value, float):
            value = pytest.approx(value, rel=tolerance.get(name, 1e-9))
        assert row[name] == value, name


@pytest.mark.parametrize("name", CASES)
def test_statistics_are_those_of_the_payloads(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    case = CASES[name]
    model, layouts = source_of(case, tiny_llama, tmp_path / "model")
    out = tmp_path / "out"
    options = (*case.options, "--executor", "serial")
    if case.family != "example":  # The default grid is as wide as these heads.
        (tmp_path / "run.yaml").write_text("rank_step: 4\n")
        options += ("--config", tmp_path / "run.yaml")
    done = lestd("compress", model, "--out", out, *options)
    assert done.code == 0, done.err

    source = read_all(model)
    tables = {where: Manifest(tmp_path / where) for where in ("out", "out.run")}
    for table in ("groups", "slices"):
        assert tables["out"].table(table).equals(tables["out.run"].table(table))
    groups = tables["out"].groups().to_pylist()
    slices = tables["out"].slices().to_pylist()
    assert [row["block"] for row in groups] == list(layouts)

    learned, bf16 = "learned" in case.options, case.dtype == torch.bfloat16
    # Errors and the mixing by U3 are computed in float32.
    near = {"relative_error": 1e-5, "squared_error": 2e-5, "squared_energy_stage1": 1e-5}
    near |= {"squared_energy": 1e-5} if learned else {}
    near |= {"squared_energy_stage1": 2e-4} if bf16 else {}
    codecs = set()
    for layer, row in enumerate(groups):
        group, layout = row["block"], layouts[row["block"]]
        path = tmp_path / "out.run" / "payloads" / row["payload"]
        content = path.read_bytes()
        names = [f"{group}.{module.name}.weight" for module in layout.modules]
        dense = b"".join(source[tensor].content for tensor in names)
        truth = measured(read_safetensors(path), source, group, layout)
        exact = {
            "layer": layer,
            "tensors": names,
            "payload_bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "source_sha256": hashlib.sha256(dense).hexdigest(),
            "dense_bytes": len(dense),
        }
        agrees(row, exact | truth.group, near)
        assert (
            out / f"lestd-{layer:05d}-{group.split('.')[-1]}.safetensors"
        ).read_bytes() == content
        assert row["stored_bytes"] <= row["byte_budget"]
        if "global" not in case.options:
            assert row["byte_budget"] == int(float(case.options[1]) * len(dense))
        codecs |= set(row["codec"].split("+"))

        own = [one for one in slices if one["task_id"] == row["task_id"]]
        assert len(own) == len(layout.slices)
        for one, expected in zip(own, truth.slices, strict=True):
            assert (one["layer"], one["block"]) == (layer, group)
            agrees(one, expected, near)

        sums = {key: sum(one[key] for one in own) for key in ("squared_norm", "core_bytes")}
        errors = sum(one["squared_norm"] * one["relative_error"] ** 2 for one in own)
        factors = row["stored_bytes"] - sums["core_bytes"]
        values = {"float32": 4}.get(json.loads(row["format"])["value_type"], 2)
        ranks = [layout.width * row["R1"], layout.head_dim * row["R2"], 4 * (row["R3"] or 0)]
        assert sums["squared_norm"] == pytest.approx(row["squared_norm"])
        assert errors == pytest.approx(row["squared_error"])
        assert factors == pytest.approx(sum(ranks) * values)
        if not learned:
            assert sum(one["nnz"] for one in own) == row["nnz"]
            energies = sum(one["squared_energy"] for one in own)
            assert energies == pytest.approx(row["squared_energy_stage2"])
    assert codecs == set(case.codecs.split())
