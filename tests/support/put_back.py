"""The dense model with what a compressed one stores put back."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import lestd_kernels  # noqa: F401 - registers the format


def all_tensors(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(shard)
    return tensors


def dense_weight(entry: dict, module: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """W-hat (out, in) of one module, float64, by the formulas of the format and by no code of it.

    Decodes bitmask and csr element by element with numpy-style indexing.
    """
    path, info = entry["path"], entry["modules"][module]
    U1 = tensors[f"{entry['factors']['U1']}.weight"].double()
    U2 = tensors[f"{entry['factors']['U2']}.weight"].double()
    R1, R2 = U1.shape[1], U2.shape[1]

    def core(prefix: str, codec: str, columns: int) -> torch.Tensor:
        values = tensors[f"{prefix}.weight"].double()
        M = torch.zeros(R1 * columns, dtype=torch.float64)
        if codec == "dense":
            M[:] = values
        elif codec == "bitmask":
            mask = tensors[f"{prefix}.mask"]
            bits = torch.tensor(
                [bool(int(mask[i // 8]) >> (i % 8) & 1) for i in range(R1 * columns)]
            )
            M[bits.nonzero()[:, 0]] = values
        else:
            pointers = tensors[f"{prefix}.row_pointers"].tolist()
            for row in range(R1):
                for at in range(pointers[row], pointers[row + 1]):
                    M[row * columns + int(tensors[f"{prefix}.columns"][at])] = values[at]
        return M.reshape(R1, columns)

    if "core" in entry:
        R3 = entry["ranks"]["R3"]
        G = core(entry["core"]["path"], entry["core"]["codec"], entry["core"]["columns"])
        G = G.reshape(R1, R3, -1, R2)
        U3 = tensors[f"{path}.{module}.weight"].double().reshape(-1, R3)
        slices = [
            sum(U3[t, r] * G[:, r, head] for r in range(R3))
            for head in range(G.shape[2])
            for t in range(len(U3))
        ]
    else:
        M = core(f"{path}.{module}", info["codec"], info["slices"] * R2)
        slices = [M[:, i * R2 : (i + 1) * R2] for i in range(info["slices"])]
    W = torch.cat([U1 @ M_s @ U2.T for M_s in slices], dim=1)
    return W.T if info["basis_side"] == "input" else W


def put_back(source: Path, out: Path) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """The dense model with W-hat in place of W, and those W-hat by name."""
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    tensors = all_tensors(out)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    replaced = {}
    for entry in config["groups"]:
        for module in entry["modules"]:
            weight = dense_weight(entry, module, tensors)
            name = f"{entry['path']}.{module}.weight"
            model.get_parameter(name).data.copy_(weight)
            replaced[name] = weight
    return model.eval(), replaced
