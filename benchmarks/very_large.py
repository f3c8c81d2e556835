"""Two very large models on a cluster, on paper: bytes, memory and hours, and what binds.

    python benchmarks/very_large.py     prints the second table of docs/scale.md

Nothing is measured here. Tasks, bytes and memory are those of lestd's own plan for the published
shapes; the times come from the constants below: those of ours are measured (docs/decomposition.md,
benchmarks/growth.py), those of the machines are assumed, from the makers' sheets.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import DeepseekV3Config, LlamaConfig

from orchestrator.architectures.coverage import made_up_index
from orchestrator.architectures.infer import build_without_weights
from orchestrator.config.run import RunConfig
from orchestrator.planning.plan import Plan, make_plan
from orchestrator.source.checkpoint import Source

NODES, GPUS_OF_A_NODE = 8, 8
KEEP = 0.4
# Assumed.
GPU_BYTES = 80e9
GPU_FLOPS = 67e12 / 2  # float32 of an H100 SXM outside of its tensor cores, half of it reached.
CORES_OF_A_NODE = 96  # Half of them reached, with the rate below.
EIGEN_FLOPS = 2e12  # What an eigenproblem of some thousand rows reaches on a GPU.
NODE_NETWORK = 25e9 / 8  # Bytes/s of a node's link to a store that all nodes share.
HUB_NETWORK = 10e9 / 8  # Bytes/s of the cluster's one link to the Hub.
HASH_BYTES = 8 * 1.0e9  # sha256 of the driver's eight threads.
# Measured.
FLOOR_FLOPS = 3  # Times width x elements: half a Gram matrix, one projection.
TIMES_FLOOR = 2.0  # Stage I and II over that floor.
CORE_FLOPS = 147e9  # float32, d 7168: the floor of benchmarks/one_layer.py took 30.0 s.
DRIVER_SECONDS = 0.003  # CPU time of the driver for a task, all phases: benchmarks/growth.py.

SHAPES: dict[str, Any] = {
    "405B dense": LlamaConfig(
        **{"vocab_size": 128256, "hidden_size": 16384, "intermediate_size": 53248},
        **{"num_hidden_layers": 126, "num_attention_heads": 128, "num_key_value_heads": 8},
    ),
    "1T-A32B MoE": DeepseekV3Config(
        **{"vocab_size": 163840, "hidden_size": 7168, "intermediate_size": 18432},
        **{"num_hidden_layers": 61, "num_attention_heads": 64, "num_key_value_heads": 64},
        **{"moe_intermediate_size": 2048, "n_routed_experts": 384, "n_shared_experts": 1},
        **{"num_experts_per_tok": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
        **{"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128},
        **{"qk_rope_head_dim": 64, "v_head_dim": 128},
    ),
}


@dataclass(frozen=True)
class Estimate:
    """Of one model: the plan's figures, and seconds of what each resource has to do."""

    tasks: int
    model_bytes: float
    stored_bytes: float
    worker_bytes: float
    seconds: dict[str, float]


def plan_of(config: Any) -> Plan:
    """The plan for a model of which only the configuration is there, in bfloat16."""
    index = made_up_index(build_without_weights(config))  # In float32.
    halves = {
        name: replace(ref, dtype="BF16", byte_range=(0, ref.stored_bytes // 2))
        for name, ref in index.tensors.items()
    }
    index = replace(index, tensors=halves)
    source = Source("published", None, Path(), index, config, config.to_dict())
    return make_plan(source, RunConfig(keep=KEEP, scope="all", method="svd"))


def estimate(plan: Plan) -> Estimate:
    """What a run of this plan would take."""
    layouts = [planned.task.layout for planned in plan.tasks]
    flops = [TIMES_FLOOR * FLOOR_FLOPS * one.width * one.elements for one in layouts]
    on_gpu = [
        work / GPU_FLOPS + 9 * one.width**3 / EIGEN_FLOPS
        for work, one in zip(flops, layouts, strict=True)
    ]
    model, stored = plan.model_bytes, plan.budget_bytes + plan.untouched_bytes
    gpus = NODES * GPUS_OF_A_NODE
    seconds = {
        "GPUs": max(sum(on_gpu) / gpus, max(on_gpu)),
        "or the nodes' CPUs": sum(flops) / (NODES * CORES_OF_A_NODE * CORE_FLOPS / 2),
        "node network": (model + stored) / NODES / NODE_NETWORK,
        "Hub link": model / HUB_NETWORK,
        "driver's check": stored / min(HASH_BYTES, NODE_NETWORK),
        "driver": DRIVER_SECONDS * len(plan.tasks),
    }
    return Estimate(len(plan.tasks), model, stored, plan.worker_memory_bytes, seconds)


def main() -> None:
    """Print the table."""
    found = {name: estimate(plan_of(config)) for name, config in SHAPES.items()}
    rows: dict[str, list[str]] = {
        "tasks": [f"{one.tasks}" for one in found.values()],
        "model, GB": [f"{one.model_bytes / 1e9:,.0f}" for one in found.values()],
        "result, GB": [f"{one.stored_bytes / 1e9:,.0f}" for one in found.values()],
        "moved per node, in + out, GB": [
            f"{one.model_bytes / NODES / 1e9:,.0f} + {one.stored_bytes / NODES / 1e9:,.0f}"
            for one in found.values()
        ],
        "a worker's memory, GB": [f"{one.worker_bytes / 1e9:,.0f}" for one in found.values()],
        "fits a GPU of 80 GB": [
            "yes" if one.worker_bytes < GPU_BYTES else "no" for one in found.values()
        ],
    }
    for name in next(iter(found.values())).seconds:
        rows[f"{name}, min"] = [f"{one.seconds[name] / 60:.1f}" for one in found.values()]
    print(f"| | {' | '.join(found)} |\n|---|{'---:|' * len(found)}")
    for title, cells in rows.items():
        print(f"| {title} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
