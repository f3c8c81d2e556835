"""Gram matrices of a model's activations against a plain float64 forward of the whole model."""

from __future__ import annotations

import copy
import os
import random
import re
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.activations import all_blocks, check, oracle, some_samples, tiny_source
from support.families import FAMILIES
from support.s3 import s3_server
from transformers import AutoTokenizer

from lestd_kernels.errors import LestdError
from orchestrator.compression.calibration import calibrate
from orchestrator.config.cluster import ClusterConfig
from orchestrator.execution.executor import Event, Executor, Listener, WorkerSpec
from orchestrator.execution.open import open_executor
from orchestrator.execution.serial import SerialExecutor
from orchestrator.planning import calibration_costs
from orchestrator.planning.calibration_costs import windows_of_a_piece
from orchestrator.source.checkpoint import resolve_source
from orchestrator.source.texts import read_samples
from workers.calibration.contracts import CalibratedBlock, CalibrationPiece
from workers.calibration.layerwise import LayerwiseModel
from workers.checkpoint.tensors import ShardIndex, read_tensor
from workers.storage.files import as_path, list_names


@pytest.mark.parametrize("family", FAMILIES)
def test_grams_are_those_of_a_whole_forward(family: str, tmp_path: Path) -> None:
    source = tiny_source(family, tmp_path / "model")
    blocks, samples = all_blocks(source), some_samples()
    found = calibrate(source, blocks, samples, SerialExecutor(), tmp_path / "calibration")
    check(found, oracle(source, blocks, samples))
    assert sorted(path.name for path in (tmp_path / "calibration").iterdir()) == [
        "calibration.json",
        *sorted(block.file for block in blocks),
    ]


@pytest.mark.parametrize("family", ["qwen3_moe", "opt"])
def test_wide_inputs_may_have_blocks_of_their_grams(family: str, tmp_path: Path) -> None:
    source, samples = tiny_source(family, tmp_path / "model"), some_samples()
    blocks = all_blocks(source, gram_width=30)
    expected = oracle(source, blocks, samples)
    shapes = {f"{b.path}.{reads}": shape for b in blocks for reads, shape in b.grams.items()}
    assert any(len(shape) == 3 for shape in shapes.values())
    for name, shape in shapes.items():
        width = len(expected[name])
        assert shape[-1] <= max(30, width if len(shape) == 2 else 0)
        if len(shape) == 3:
            assert shape[0] * shape[1] == width
            parts = range(0, width, shape[1])
            own = [expected[name][i : i + shape[1], i : i + shape[1]] for i in parts]
            expected[name] = torch.stack(own)
    run = tmp_path / "calibration"
    check(calibrate(source, blocks, samples, SerialExecutor(), run, gram_width=30), expected)
    whole = all_blocks(source)
    with pytest.raises(LestdError, match="differs in: gram_width"):
        calibrate(source, whole, samples, SerialExecutor(), run)


def test_inputs_are_named_by_who_reads_them(tmp_path: Path) -> None:
    attention, experts, _, ffn, *_ = all_blocks(tiny_source("qwen3_moe", tmp_path))
    assert attention.grams == {"in": (40, 40), "heads": (56, 56)}
    assert attention.modules["v_proj"] == "in"
    assert attention.modules["o_proj"] == "heads"
    assert attention.file == "layer-00000-self_attn.safetensors"
    assert list(experts.grams.items())[:4] == [
        ("in_0", (40, 40)),
        ("hidden_0", (24, 24)),
        ("in_1", (40, 40)),
        ("hidden_1", (24, 24)),
    ]
    assert experts.modules["expert_3.up"] == "in_3"
    assert experts.file == "layer-00000-mlp.experts.safetensors"
    assert ffn.grams == {"in": (40, 40), "hidden": (72, 72)}
    assert {block.layers for block in (attention, experts, ffn)} == {"model.layers"}


def test_a_block_of_the_layer_itself(tmp_path: Path) -> None:
    block = all_blocks(tiny_source("opt", tmp_path))[3]
    assert block.path == "model.decoder.layers.1"
    assert (block.file, block.layers) == ("layer-00001-layer.safetensors", "model.decoder.layers")
    assert block.modules == {"fc1": "in", "fc2": "hidden"}


def test_an_expert_that_no_token_comes_to_has_zeros(tmp_path: Path) -> None:
    source = tiny_source("mixtral", tmp_path / "model")
    blocks, samples = all_blocks(source)[1:2], some_samples(1, 1)
    found = calibrate(source, blocks, samples, SerialExecutor(), tmp_path / "calibration")
    check(found, oracle(source, blocks, samples))
    tokens = [
        int(read_tensor(found.refs[f"model.layers.0.mlp.experts.in_{e}.tokens"])) for e in range(5)
    ]
    assert sorted(tokens) == [0, 0, 0, 1, 1]
    idle = f"model.layers.0.mlp.experts.in_{tokens.index(0)}"
    assert read_tensor(found.refs[idle]).count_nonzero() == 0


def test_a_trained_model_and_its_text(tiny_llama: Path, wikitext: Path, tmp_path: Path) -> None:
    source = resolve_source(str(tiny_llama))
    samples = read_samples(source, str(wikitext), 5, 40)
    blocks = all_blocks(source)
    found = calibrate(source, blocks, samples, SerialExecutor(), tmp_path / "calibration")
    check(found, oracle(source, blocks, samples))


def test_tensor_names_without_the_base_models_prefix(tmp_path: Path) -> None:
    source = tiny_source("opt", tmp_path / "model")
    blocks, samples = all_blocks(source), some_samples(3)
    expected = oracle(source, blocks, samples)
    for shard in source.directory.glob("*.safetensors"):
        tensors = {name.removeprefix("model."): t for name, t in load_file(shard).items()}
        save_file(tensors, shard, metadata={"format": "pt"})
    index = source.directory / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"model.decoder', '"decoder'))
    stripped = replace(source, index=ShardIndex.from_directory(source.directory))
    assert "decoder.layers.0.fc1.weight" in stripped.index.tensors
    found = calibrate(stripped, blocks, samples, SerialExecutor(), tmp_path / "calibration")
    check(found, expected)


# -- memory ---------------------------------------------------------------------------------------


def test_one_layer_is_in_memory_at_a_time(tmp_path: Path) -> None:
    source = tiny_source("qwen3_moe", tmp_path)
    model = LayerwiseModel(
        source.config_json, source.index.tensors, "model.layers", torch.device("cpu")
    )
    states = torch.tensor(some_samples().token_ids[0])
    with torch.inference_mode():
        for layer in (0, 1):
            model.load(layer)
            states = model.run(states)
            real = {n: p for n, p in model.model.named_parameters() if not p.is_meta}
            whole = {n for n in model.model.state_dict() if n.startswith(f"model.layers.{layer}.")}
            embedding = {"model.embed_tokens.weight"} if layer == 0 else set()
            assert real.keys() == whole | embedding | {"model.norm.weight"}
            kept = sum(p.untyped_storage().nbytes() for p in real.values())
            assert kept == 4 * sum(p.numel() for p in real.values())


# -- the same bytes whatever happens --------------------------------------------------------------


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


class StoppingExecutor(SerialExecutor):
    """Ends like a killed driver when so many items are done."""

    def __init__(self, items: int) -> None:
        self.items = items

    def map(
        self, spec: WorkerSpec, items: Sequence[Any], on_event: Listener | None = None
    ) -> Iterator[Any]:
        yield from islice(super().map(spec, items, on_event), self.items)
        raise KeyboardInterrupt


def calibrated(
    family: str, root: Path, executor: Executor, metric: str = "loss", **options: Any
) -> dict[str, bytes]:
    source = tiny_source(family, root / "model")
    blocks = all_blocks(source, metric)
    calibrate(source, blocks, some_samples(), executor, root / "calibration", **options)
    return contents(root / "calibration")


@pytest.mark.parametrize(
    ("family", "metric", "stops"),
    [  # Each layer has six pieces and their sums; the loss six pieces, and the way back as many.
        ("llama", "activation", (1, 3, 4, 5)),
        ("llama", "loss", (13, 3, 4, 5, 4)),
        ("qwen3_moe", "loss", (8, 8, 1, 6, 6)),
    ],
)
def test_an_interrupted_calibration_goes_on_and_changes_no_byte(
    family: str, metric: str, stops: tuple[int, ...], tmp_path: Path
) -> None:
    expected = calibrated(family, tmp_path / "whole", SerialExecutor(), metric)
    begun: list[str] = []
    for items in stops:
        with pytest.raises(KeyboardInterrupt):
            calibrated(
                family,
                tmp_path / "parts",
                StoppingExecutor(items),
                metric,
                on_event=lambda event: begun.append(event.task_id),
            )
    seen: list[tuple[Any, int, int]] = []
    planned: list[Any] = []
    found = calibrated(
        family,
        tmp_path / "parts",
        SerialExecutor(),
        metric,
        on_start=lambda *at: planned.append(at),
        on_progress=lambda *at: seen.append(at),
        on_event=lambda event: begun.append(event.task_id),
    )
    assert found == expected
    # What the interrupted calls had begun last was done, too, but nobody asked for its result.
    assert sorted(set(begun)) == sorted(begun)
    layers = resolve_source(str(tmp_path / "parts" / "model")).config.num_hidden_layers
    assert len(begun) == (7 * layers if metric == "activation" else 14 * layers + 6)
    [(name, items, finished)] = planned
    assert name == "calibrate"
    # Of pieces what the interrupted calls have left, and what is done later is not done again.
    left = [item.task_id for item in items if item.task_id not in finished]
    assert finished
    assert finished < {item.task_id for item in items} & set(begun)
    assert [(outcome.task_id, at, of) for outcome, at, of in seen] == [
        (task_id, at, len(items)) for at, task_id in enumerate(left, start=len(finished) + 1)
    ]


def test_blocks_that_are_asked_for_later_are_added(tmp_path: Path) -> None:
    expected = calibrated("llama", tmp_path / "whole", SerialExecutor(), "activation")
    source = tiny_source("llama", tmp_path / "model")
    blocks, directory = all_blocks(source), tmp_path / "calibration"
    with pytest.raises(KeyboardInterrupt):
        calibrate(source, blocks[2:3], some_samples(), StoppingExecutor(9), directory)
    attention = calibrate(source, blocks[::2], some_samples(), SerialExecutor(), directory)
    everything = calibrate(source, blocks, some_samples(), SerialExecutor(), directory)
    assert contents(directory) == expected
    assert attention.digest == everything.digest
    assert attention.refs.items() < everything.refs.items()
    again = calibrate(source, blocks, some_samples(), StoppingExecutor(0), directory)
    assert again.refs == everything.refs
    # Gradients are added to what is there, and what is there serves either metric.
    calibrate(source, all_blocks(source, "loss"), some_samples(), SerialExecutor(), directory)
    assert contents(directory) == calibrated("llama", tmp_path / "gradients", SerialExecutor())


class ShuffledExecutor(SerialExecutor):
    """Some workers in turn, and items in any order in which each may begin."""

    def __init__(self, workers: int = 2) -> None:
        self.workers = workers

    def map(
        self, spec: WorkerSpec, items: Sequence[Any], on_event: Listener | None = None
    ) -> Iterator[Any]:
        choice = random.Random(5)
        workers = [spec.cls(**spec.kwargs) for _ in range(self.workers)]
        waiting = list(items)
        while waiting:
            unfinished = {item.task_id for item in waiting}
            ready = [item for item in waiting if unfinished.isdisjoint(item.after)]
            item = choice.choice(ready)
            waiting.remove(item)
            yield workers[len(waiting) % self.workers].run(item)


@pytest.mark.parametrize("family", ["gpt_neox", "mixtral"])
def test_who_computes_what_and_when_changes_no_byte(family: str, tmp_path: Path) -> None:
    expected = calibrated(family, tmp_path / "one", SerialExecutor())
    assert calibrated(family, tmp_path / "two", ShuffledExecutor()) == expected


@pytest.mark.slow
def test_more_windows_are_more_pieces_with_the_same_bytes_on_any_pool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration_costs, "_WINDOWS_OF_A_PIECE", 1)
    source, samples = tiny_source("llama", tmp_path / "model"), some_samples(20, 5)
    blocks, found, seen = all_blocks(source, "loss"), [], list[Any]()
    for workers in (1, 2, 5):
        seen.clear()
        pool, place = ShuffledExecutor(workers), tmp_path / str(workers)
        start = lambda _, items, __: seen.extend(items)  # noqa: E731
        calibration = calibrate(source, blocks, samples, pool, place, on_start=start)
        assert len({item.piece for item in seen if isinstance(item, CalibrationPiece)}) == 20
        found.append(contents(place))
    assert found[0] == found[1] == found[2]
    inputs = {name: ref for name, ref in calibration.refs.items() if not name.endswith(".output")}
    check(replace(calibration, refs=inputs), oracle(source, blocks, samples))
    # Who goes on with a calibration divides as it was begun.
    with pytest.raises(KeyboardInterrupt):
        calibrate(source, blocks[:1], samples, StoppingExecutor(5), tmp_path / "begun")
    monkeypatch.undo()
    calibrate(source, blocks, samples, SerialExecutor(), tmp_path / "begun")
    assert contents(tmp_path / "begun") == found[0]


def test_pieces_are_as_many_as_windows_and_disk_allow() -> None:
    def block(width: int) -> CalibratedBlock:
        grams = {"in": (width, width)}
        return CalibratedBlock(0, "model.layers.0.mlp", {"down_proj": "in"}, grams)

    # As it always was, up to 128 windows.
    for windows, length in ((1, 1), (8, 1), (12, 2), (128, 16), (129, 16), (4096, 16)):
        assert windows_of_a_piece([block(512)], windows) == length
    # The matrix of OPT-30B's wide input has 3.3 GB: ten of them for two layers.
    assert windows_of_a_piece([block(28672)], 128) == 16
    assert windows_of_a_piece([block(28672)], 512) == 52


@pytest.mark.slow
@pytest.mark.ray
def test_two_workers_one_of_them_killed_change_no_byte(tmp_path: Path) -> None:
    expected = calibrated("mixtral", tmp_path / "one", SerialExecutor())
    victims: list[int] = []

    def kill(event: Event) -> None:
        if event.kind == "started" and event.task_id == "0001-1" and not victims:
            victims.append(int(re.fullmatch(r".*:(\d+)", event.worker)[1]))  # type: ignore[index]
            os.kill(victims[0], signal.SIGKILL)

    with open_executor(ClusterConfig(workers=2)) as executor:
        found = calibrated("mixtral", tmp_path / "two", executor, on_event=kill)
    assert victims
    assert found == expected


@pytest.mark.slow
def test_a_calibration_in_an_object_store(tmp_path: Path) -> None:
    expected = calibrated("qwen3", tmp_path / "disk", SerialExecutor())
    source = tiny_source("qwen3", tmp_path / "model")
    arguments: Any = (source, all_blocks(source, "loss"), some_samples())
    with s3_server() as (url, _):
        directory = as_path(f"{url}/run/calibration")
        with pytest.raises(KeyboardInterrupt):
            calibrate(*arguments, StoppingExecutor(8), directory)
        found = calibrate(*arguments, SerialExecutor(), directory)
        assert {name: (directory / name).read_bytes() for name in list_names(directory)} == expected
        read_tensor(found.refs["model.layers.1.mlp.hidden"])


# -- what a user can get wrong --------------------------------------------------------------------


def test_another_text_is_not_mixed_in(tmp_path: Path) -> None:
    source = tiny_source("llama", tmp_path / "model")
    blocks, samples = all_blocks(source), some_samples()
    calibrate(source, blocks, samples, SerialExecutor(), tmp_path / "calibration")
    other = replace(samples, about=copy.deepcopy(samples.about) | {"samples": 12})
    with pytest.raises(LestdError, match=r"calibration .*differs in: samples \(was 11, is 12\)"):
        calibrate(source, blocks, other, SerialExecutor(), tmp_path / "calibration")


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    source = tiny_source("llama", tmp_path / "model")
    with pytest.raises(LestdError, match=r"model is not empty and holds config.json"):
        calibrate(source, all_blocks(source), some_samples(), SerialExecutor(), source.directory)


def test_a_layer_that_lacks_a_tensor(tmp_path: Path) -> None:
    source = tiny_source("mixtral", tmp_path / "model")
    gone = next(name for name in source.index.tensors if "layers.1" in name and "experts.3" in name)
    tensors = {name: ref for name, ref in source.index.tensors.items() if name != gone}
    broken = replace(source, index=replace(source.index, tensors=tensors))
    with pytest.raises(LestdError, match=r"model\.layers\.1\.mlp\.experts\S+ is absent"):
        calibrate(
            broken,
            all_blocks(source),
            some_samples(),
            SerialExecutor(),
            tmp_path / "calibration",
        )


def test_weights_that_overflow(tmp_path: Path) -> None:
    source = tiny_source("llama", tmp_path / "model")
    for shard in source.directory.glob("*.safetensors"):
        tensors = {
            n: t * torch.inf if "layers.1.mlp" in n else t for n, t in load_file(shard).items()
        }
        save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(LestdError, match="after layer 1 are not finite"):
        calibrate(
            source,
            all_blocks(source),
            some_samples(),
            SerialExecutor(),
            tmp_path / "calibration",
        )


@pytest.mark.parametrize(
    ("samples", "tokens", "message"),
    [
        (1, 513, "window 513 is longer than the 512 positions"),
        (10, 8, r"short.txt has 7\d tokens, but 10 samples of 8 take 80; give a longer text"),
    ],
)
def test_samples_that_cannot_be_had(
    samples: int, tokens: int, message: str, tiny_llama: Path, wikitext: Path, tmp_path: Path
) -> None:
    text = tmp_path / "short.txt"
    text.write_text(wikitext.read_text()[:300])
    with pytest.raises(LestdError, match=message):
        read_samples(resolve_source(str(tiny_llama)), str(text), samples, tokens)


def test_texts_that_cannot_be_read(tiny_llama: Path, tmp_path: Path) -> None:
    source = resolve_source(str(tiny_llama))
    with pytest.raises(LestdError, match=r"no\.txt cannot be read .*--calibrate-on"):
        read_samples(source, str(tmp_path / "no.txt"), 1, 8)
    (tmp_path / "latin.txt").write_bytes("déjà".encode("latin-1"))
    with pytest.raises(LestdError, match="is not UTF-8: byte 1"):
        read_samples(source, str(tmp_path / "latin.txt"), 1, 8)


def test_samples_are_the_first_tokens_of_the_text(tiny_llama: Path, wikitext: Path) -> None:
    source = resolve_source(str(tiny_llama))
    samples = read_samples(source, str(wikitext), 9, 256)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    whole = tokenizer(wikitext.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    assert [token for window in samples.token_ids for token in window] == whole[: 9 * 256]
    assert {len(window) for window in samples.token_ids} == {256}
