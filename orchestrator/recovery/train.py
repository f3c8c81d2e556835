"""Win back by training what compression has lost; evaluated on held-out text before and after.

OUT.recover/      kept, so that run the same command again to continue, or shows its result again
    recover.json  what is done: settings, the model, the text
    held-out.txt  the end of the text, which is not trained on, where no other text is given
    state.json    see workers.recover: the last state, and the tensors that it names
    evaluations/  finished pieces of the evaluations
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lestd_kernels.errors import LestdError
from orchestrator.console.progress_bar import Meter
from orchestrator.evaluation.model import EvaluationModel, require_positive, resolve_dtype
from orchestrator.evaluation.perplexity import Evaluation, read_text, read_tokens
from orchestrator.evaluation.perplexity_table import evaluate_models
from orchestrator.evaluation.records import ModelFacts, evaluation_versions, open_models, record
from orchestrator.execution.serial import SerialExecutor
from orchestrator.manifest.manifest import Manifest
from orchestrator.model.adapter import adapter_file, adapter_stored_bytes
from orchestrator.model.directory import about_model
from orchestrator.model.reader import CompressedModel, open_compressed
from orchestrator.recovery.write_model import require_free, write_recovered
from orchestrator.run.fingerprint import require_same, starts_over
from workers.recover import LORA, STATE_FILE, RecoverySettings, Trained, train
from workers.storage.building import MARKER, own_directory, require_removable
from workers.storage.files import atomic_write, file_sha256, make_directory, remove_tree
from workers.storage.json_files import read_json, write_json
from workers.storage.names import MANIFEST_DIR

_HELD_OUT = 0.1
_OURS = "recover.json"


@dataclass(frozen=True)
class Recovery:
    """Outcome of a recovery.

    Attributes:
        out: the trained model.
        train: how it was trained.
        steps: steps taken.
        windows: windows of training text.
        losses: training loss of the first and of the last step, in nats per token.
        adapter_bytes: data bytes of the adapter, which are part of what ``evaluations`` count;
            0 where values were trained in place.
        trainable: number of trained values.
        evaluations: on held-out text, before and after.
    """

    out: str
    train: str
    steps: int
    windows: int
    losses: tuple[float, float]
    adapter_bytes: int
    trainable: int
    evaluations: tuple[Evaluation, Evaluation]


def recover(
    directory: Path,
    text: Path,
    out: Path,
    *,
    eval_text: Path | None,
    window: int | None,
    max_windows: int | None,
    epochs: float,
    steps: int | None,
    fresh: bool,
    **settings: Any,
) -> Recovery:
    """Train a compressed model, write it, evaluate both; continue where an earlier call stopped.

    Args:
        directory: the compressed model.
        text: UTF-8 text to train on.
        out: directory of the trained model; must not exist, or be the result of this recovery.
        eval_text: text to evaluate by; None for the last tenth of `text`, which then is not trained
            on.
        window: inputs of a window, of training and of evaluation; see `open_model`.
        max_windows: evaluate the first windows only.
        epochs: how often the text is trained on.
        steps: optimizer steps in place of `epochs`.
        fresh: forget what an earlier call left.
        settings: the other fields of `RecoverySettings`.

    Raises:
        LestdError: `directory` is no model compressed by lestd, or has an adapter already; `out`
            is taken; the text cannot be used or is too short; another process is at work; or
            training or evaluating fails.
    """
    out = out.absolute()
    model = open_compressed(directory)
    about = _require_trainable(model)
    [opened] = open_models([model.directory], window)
    if eval_text is not None:
        read_tokens(opened[0], eval_text, max_windows)
    length = opened[0].window_length
    run_dir = out.with_name(out.name + ".recover")
    # What can be refused is refused before anything is written, or deleted.
    training_text, kept = _split(read_text(text), eval_text)
    windows = _windows(opened[0], training_text, text)
    if steps is None:
        steps = max(1, round(epochs * len(windows) / settings["batch"]))
    if settings["device"] == "auto":
        settings["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    if settings["device"] == "cuda":
        SerialExecutor().require_cuda()
    settings["dtype"] = resolve_dtype(model.directory, settings["dtype"], settings["device"])
    with _claimed(run_dir, fresh):
        held_out = eval_text or run_dir / "held-out.txt"
        if eval_text is None:
            atomic_write(held_out, lambda file: file.write(kept.encode()))
        lora = settings["train"] == LORA
        how = RecoverySettings(steps=steps, **settings)
        stated = asdict(how) | {
            "window": length,
            "model_id": opened[1].model_id,
            "text_sha256": file_sha256(text),
            "held_out_sha256": file_sha256(held_out),
            "versions": evaluation_versions(**({"peft": version("peft")} if lora else {})),
        }
        stated.pop("save_every")  # Decides no byte.
        before = about["fingerprint"].get("recovered", [])
        fingerprint = about["fingerprint"] | {"recovered": [*before, stated]}
        if (run_dir / STATE_FILE).is_file():
            there = out if out.exists() else None
            require_same(read_json(run_dir / _OURS), stated, run_dir, there)
        elif (run_dir / _OURS).is_file():
            begun = f"the recovery that was begun in {run_dir}"
            starts_over(read_json(run_dir / _OURS), stated, begun)
        finished = about_model(out)
        if finished is None or finished["fingerprint"] != fingerprint:
            require_free(out)
        write_json(run_dir / _OURS, stated)

        rows: list[Sequence[dict[str, Any]]] = []
        evaluating: dict[str, Any] = {
            "dtype": how.dtype,
            "device": how.device,
            "threads": how.threads,
            "max_windows": max_windows,
        }

        def evaluate(one: tuple[EvaluationModel, ModelFacts]) -> Evaluation:
            executor, pieces = SerialExecutor(), run_dir / "evaluations"
            return evaluate_models([one], held_out, executor, pieces, rows.append, evaluating)[0]

        first = evaluate(opened)
        trained = _train(model, windows, how, run_dir)
        if not out.exists() or not any(out.iterdir()):
            write_recovered(model, trained, out, fingerprint, stated)
        [after] = open_models([out], window)
        last = evaluate(after)
        for row in rows:
            record(row, Manifest(out / MANIFEST_DIR))
    return Recovery(
        out=str(out),
        train=how.train,
        steps=how.steps,
        windows=len(windows),
        losses=(trained.losses[0], trained.losses[-1]),
        adapter_bytes=adapter_stored_bytes(out),
        trainable=sum(tensor.numel() for tensor in trained.tensors.values()),
        evaluations=(first, last),
    )


def _require_trainable(model: CompressedModel) -> dict[str, Any]:
    """Record of the recovery that the model carries.

    Raises:
        LestdError: it has no manifest, it has an adapter, or a shard is damaged.
    """
    about = about_model(model.directory)
    if about is None:
        raise LestdError(
            f"{model.directory} has no {MANIFEST_DIR}; give the directory that lestd compress wrote"
        )
    if adapter_file(model.directory) is not None:
        raise LestdError(
            f"{model.directory} has an adapter already; recover the model that it was made from, "
            "with more steps"
        )
    for row in model.stated_shards():
        model.check_shard(row)
    return about


@contextmanager
def _claimed(run_dir: Path, fresh: bool) -> Iterator[None]:
    """Make the directory of a recovery; one process works in it.

    Raises:
        LestdError: another does, or something else is there.
    """
    make_directory(run_dir.parent)
    busy = f"another process works in {run_dir}; wait for it to end, or choose another --out"
    with own_directory(run_dir, busy):
        if fresh:
            require_removable(run_dir)
            for path in run_dir.iterdir():
                if path.name != MARKER:
                    remove_tree(path)
        yield


def _split(text: str, eval_text: Path | None) -> tuple[str, str]:
    """The text to train on, and what is kept of it to evaluate by."""
    if eval_text is not None:
        return text, ""
    # At the end of a line, where there is one not far away.
    cut = int(len(text) * (1 - _HELD_OUT))
    cut = text.find("\n", cut) + 1 or cut
    return text[:cut], text[cut:]


def _windows(model: EvaluationModel, text: str, path: Path) -> Tensor:
    """All full windows of a text, token ids int64 ``(windows, L + 1)``.

    Raises:
        LestdError: there is none, or the tokenizer is another model's.
    """
    length = model.window_length
    ids = model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    count = (len(ids) - 1) // length
    if count < 1:
        raise LestdError(
            f"the text {path} has {len(ids)} tokens to train on, fewer than the {length + 1} of "
            "one window; give a longer text, or a smaller --window"
        )
    if max(ids) >= model.vocabulary:
        raise LestdError(
            f"{model.directory}: the tokenizer gives token id {max(ids)} but the model's "
            f"vocab_size is {model.vocabulary}; the tokenizer files belong to another model"
        )
    return torch.tensor([ids[i * length : (i + 1) * length + 1] for i in range(count)])


def _train(
    model: CompressedModel, windows: Tensor, settings: RecoverySettings, run_dir: Path
) -> Trained:
    require_positive("steps", settings.steps)
    with Meter(f"recover {model.directory.name}", "steps") as meter:

        def progress(done: int, total: int, loss: float | None) -> None:
            meter.update(done, total, "" if loss is None else f"loss {loss:.4f}")

        return train(model.directory, windows, settings, run_dir, progress)
