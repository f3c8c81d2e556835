"""What commands print of a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lestd_kernels.methods import CALIBRATED, LOSS
from lestd_kernels.options import MEMORY
from orchestrator.cli.summary import expected_loss, fold_layers
from orchestrator.config.run import RunConfig
from orchestrator.console import output
from orchestrator.planning.calibration_costs import blocks_of, calibration_costs
from orchestrator.planning.decide import predicted_losses
from orchestrator.planning.plan import Plan
from orchestrator.source.checkpoint import Source
from workers.contracts import OUTSIDE, Task

# Channels of a block of a Gram matrix, where the whole ones take more than the model.
_NARROW = 4096


def _bound(layer: dict[str, Any], name: str, words: str) -> str:
    """A bound in words; nothing where the method has none."""
    return "" if layer[name] is None else words.format(layer[name])


def _block_name(layer: dict[str, Any]) -> str:
    """The kind of block; of a matrix that is a group of its own its path below the layer."""
    if layer["scope"] != "linear":
        return str(layer["scope"])
    inside = layer["layer"] != OUTSIDE
    return str(layer["block"].partition(f".{layer['layer']}.")[2] if inside else layer["block"])


def _sizes(planned: dict[str, Any]) -> str:
    """What the weights in scope take at most."""
    total = planned["total"]
    if planned["size"] != MEMORY:
        return output.size(total["max_bytes"])
    if total["stored_bytes"] == total["max_bytes"]:
        return f"{output.size(total['max_bytes'])}, in memory as on disk"
    return (
        f"{output.size(total['max_bytes'])} in memory, about {output.size(total['stored_bytes'])} "
        "on disk"
    )


def _in_memory(total: dict[str, Any]) -> str:
    """A line for weights that take more memory than disk."""
    if total["memory_bytes"] <= total["max_bytes"]:
        return ""
    return (
        f"loaded, the weights in scope take about {output.size(total['memory_bytes'])} of memory\n"
    )


def print_plan(name: str, planned: dict[str, Any], json: bool) -> None:
    """Print what a compression would do: the plan of `Plan.to_dict`."""
    if json:
        output.print_json(planned)
        return
    decided = planned["budgets_decided"]
    rows = [
        [
            _block_name(layer),
            str(len(layer["tensors"])),
            output.size(layer["dense_bytes"]),
            f"{layer['keep']:.3f}" if decided or not layer["curve_task_id"] else "",
            " to ".join(map(output.size, layer["budget_range"] or [layer["byte_budget"]])),
            _bound(layer, "max_R1", "R1 ≤ {}") + _bound(layer, "max_R2", ", R2 ≤ {}"),
            _bound(layer, "max_nnz", "≤ {:,}"),
            output.size(layer["predicted_memory_bytes"]),
        ]
        for layer in planned["layers"]
    ]
    columns = [
        "layer",
        "block",
        "tensors",
        "dense",
        "keep",
        "target",
        "ranks",
        "nnz",
        "worker memory",
    ]
    total = planned["total"]
    if "expected_loss" in total:
        columns.append("expected loss")
        for row, layer in zip(rows, planned["layers"], strict=True):
            row.append("" if layer["expected_loss"] is None else f"{layer['expected_loss']:.2e}")
    if "predicted_seconds" in total:
        columns.append("seconds")
        for row, layer in zip(rows, planned["layers"], strict=True):
            row.append(f"{layer['predicted_seconds']:.1f}")
    layers = (layer["layer"] for layer in planned["layers"])
    folded = fold_layers(zip(layers, rows, strict=True))
    output.print_table(f"{name} ({planned['family']})", columns, folded)
    if (target := planned["target_loss"]) is not None and not decided:
        output.out.print(
            f"expected loss {expected_loss(target)} at most: the size follows from the calibration "
            f"and from each block's error against bytes, of which {planned['curves_found']} of "
            f"{total['tasks']} are there. Compress with the same options; when its first pass is "
            "done, lestd plan with --out OUT answers, for any target"
        )
    elif not decided:
        output.out.print(
            "allocation global: the targets are decided after a first pass over the layers, which "
            f"finds their error against bytes; together at most {output.size(total['byte_budget'])}"
        )
    output.out.print(
        f"{total['tasks']} tasks; weights in scope {output.size(total['dense_bytes'])} -> at most "
        f"{_sizes(planned)}; whole model {output.size(total['model_bytes'])} -> "
        f"{output.size(total['untouched_bytes'] + total['max_bytes'])} "
        f"(keep {total['keep_of_model']:.3f})\n{_in_memory(total)}"
        f"a worker needs about {output.size(total['worker_memory_bytes'])} of memory; of disk the "
        f"run directory takes at most {output.size(total['run_disk_bytes'])}, the model "
        f"{output.size(total['out_disk_bytes'])} more"
    )
    if planned["quantized"] is not None:
        on_disk, dense, left = (
            output.size(total[name]) for name in ("source_bytes", "model_bytes", "untouched_bytes")
        )
        output.out.print(
            f"the source is quantized ({planned['quantized']}): its {on_disk} on disk stand for "
            f"{dense}, by which sizes are counted; what is not compressed, {left}, comes out "
            "dequantized"
        )
    if "expected_loss" in total:
        output.out.print(f"expected loss {expected_loss(total['expected_loss'])}")
    for one in planned.get("left_dense", ()):
        # Of what is no block the matrices are groups of their own.
        what = "" if one["why"].startswith("no ") else "stays dense: "
        output.out.print(f"{what}{one['module']}: {one['why']}", markup=False, soft_wrap=True)
    if (costs := planned.get("calibration")) is not None:
        output.out.print(
            "calibration comes first: a worker needs about "
            f"{output.size(costs['memory_bytes'])} of memory; of disk it takes "
            f"{output.size(costs['kept_bytes'])}, and at most "
            f"{output.size(costs['working_bytes'])} more while it is made; up to "
            f"{costs['pieces']} workers share it"
        )
        if costs["kept_bytes"] > total["model_bytes"]:
            less = {
                f"with --gram-width {_NARROW}": planned["calibration_narrow"],
                "with scope attention": planned["calibration_of_attention"],
            }
            ways = [
                f"{how} it is {output.size(one['kept_bytes'])} and at most "
                f"{output.size(one['working_bytes'])} more"
                for how, one in less.items()
                if one is not None
            ]
            output.out.print(
                "that is more than the model itself has, for inputs that are wide or many: "
                f"{'; '.join([*ways, 'in the metric weight nothing'])}"
            )
    if "predicted_seconds" in total:
        output.out.print(
            f"decomposing takes about {total['predicted_seconds']:.1f} s in all on a machine like "
            "this; workers share it"
        )


def describe_plan(
    plan: Plan,
    source: Source,
    config: RunConfig,
    time: bool,
    curves: Mapping[str, Sequence[Mapping[str, Any]]] = {},
) -> dict[str, Any]:
    """The plan as plain values.

    Args:
        plan: what is planned.
        source: the checkpoint.
        config: of the run.
        time: whether to predict the seconds of each layer, and in total.
        curves: what an earlier call has found of pass one, by task id, see `decide`.
    """
    described = plan.to_dict() | {"curves_found": len(curves)}
    if curves and plan.decided and config.used_metric == LOSS:
        losses = predicted_losses(plan, curves)
        for layer in described["layers"]:
            layer["expected_loss"] = losses.get(layer["block"])
        described["total"]["expected_loss"] = math.fsum(losses.values())
    if config.used_metric in CALIBRATED:
        tasks = [planned.task for planned in plan.tasks]
        attention = [task for task in tasks if task.scope == "attention"]

        def costs(of: Sequence[Task], gram_width: int | None) -> dict[str, Any]:
            blocks = blocks_of(of, gram_width)
            return asdict(calibration_costs(source, blocks, config.samples, config.sample_tokens))

        described["calibration"] = costs(tasks, config.gram_width)
        described["calibration_of_attention"] = described["calibration_narrow"] = None
        if 0 < len(attention) < len(tasks):
            described["calibration_of_attention"] = costs(attention, config.gram_width)
        narrow = costs(tasks, _NARROW)
        if narrow["kept_bytes"] < described["calibration"]["kept_bytes"]:
            described["calibration_narrow"] = narrow
    if time:
        from orchestrator.planning.timing import predict_seconds  # It imports the methods.

        seconds = predict_seconds(plan, config.device, config.threads)
        for layer in described["layers"]:
            layer["predicted_seconds"] = seconds[layer["block"]]
        described["total"]["predicted_seconds"] = sum(seconds.values())
    return described
