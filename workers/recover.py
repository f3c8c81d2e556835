"""Train a compressed model on a text: an adapter beside it, or its own values in place.

    lora      y = x W_hat + (alpha / r) (x A) B: new matrices A (in, r), B (r, out) for every
              compressed module; the compressed tensors stay as they are. Hu et al., ICLR 2022.
    factors   the stored floating-point values themselves, factors and core values, where they
              stand: a sparse core keeps its positions, and every tensor its shape and dtype. Of
              few-bit values the codes stay, and the scales are trained (PEQA, Kim et al.,
              NeurIPS 2023).

Shapes: n tokens of the text, L inputs of a window. Window i is t_{iL} ... t_{(i+1)L}, L inputs and
the token after each of them, so windows do not overlap. Every epoch takes the windows in an order
of its own, drawn from the seed; a step takes the next `batch` of them.

Master values are kept in float32, and after each step the model holds them rounded as they will be
stored: what is trained is what is written. The state after a step is the master values, Adam's two
moments and the step's number, from which the learning rate, the windows and the random numbers of
the next step follow. A run that is killed and continued is therefore, on a CPU, the same to the
last bit.
"""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lestd_kernels.errors import LestdError
from lestd_kernels.modules.registry import MODULES
from workers.checkpoint.headers import DTYPES
from workers.checkpoint.tensors import ShardIndex, read_header, read_tensor, write_safetensors
from workers.host.loading import load_model
from workers.storage.files import atomic_write, file_sha256
from workers.storage.names import is_inside
from workers.storage.untrusted_files import parse_json, read_regular

LORA, FACTORS = "lora", "factors"
STATE_FILE = "state.json"

_WARM_UP = 0.1
_MAX_GRADIENT_NORM = 1.0
# Logits take L V float32 numbers a window: a step computes few windows at once, and adds up.
_TOKENS_AT_ONCE = 2048
_PARTS = ("value", "exp_avg", "exp_avg_sq")

Progress = Callable[[int, int, float | None], None]
"""Called with (steps done, steps in all, loss of the last step or None)."""


@dataclass(frozen=True)
class RecoverySettings:
    """How to train.

    Attributes:
        train: `LORA` or `FACTORS`.
        steps: optimizer steps.
        batch: windows of a step.
        rank: r of an adapter.
        alpha: scale of an adapter: ``alpha / r`` times its product.
        lr: peak learning rate; it rises over the first tenth of the steps and falls linearly.
        seed: of the order of windows, of A, and of dropout where the model has any.
        dtype: compute dtype, see `load_model`.
        device: ``"cpu"`` or ``"cuda"``.
        threads: CPU threads; they change the last bit.
        save_every: steps between two states on disk.
    """

    train: str
    steps: int
    batch: int
    rank: int
    alpha: float
    lr: float
    seed: int
    dtype: str
    device: str
    threads: int
    save_every: int


@dataclass(frozen=True)
class Trained:
    """Outcome of training.

    Attributes:
        tensors: `FACTORS`: parameter name -> value as it is stored. `LORA`: the adapter's tensors.
        adapter_config: `LORA`: peft's configuration of the adapter, else None.
        losses: mean loss of each step, in nats per token.
    """

    tensors: dict[str, Tensor]
    adapter_config: dict[str, Any] | None
    losses: tuple[float, ...]


def train(
    model_dir: Path,
    windows: Tensor,
    settings: RecoverySettings,
    state_dir: Path,
    progress: Progress,
) -> Trained:
    """Train a compressed model; continue from the state in `state_dir`, if there is one.

    Args:
        model_dir: the compressed model.
        windows: token ids, int64 ``(windows, L + 1)``.
        settings: how.
        state_dir: where the state is kept.
        progress: told of every step.

    Raises:
        LestdError: the model cannot be loaded, nothing in it can be trained in this way, the
            state is damaged, or the loss is not finite.
    """
    with _threads(settings.threads):
        model = load_model(str(model_dir), settings.dtype, settings.device)
        model.requires_grad_(False)
        trained, dtypes = _stored_values(model, model_dir)
        if settings.train == FACTORS:
            losses = _Training(model, trained, dtypes, settings, state_dir).run(windows, progress)
            tensors = {n: p.detach().to("cpu", dtypes[n]) for n, p in trained.items()}
            return Trained(tensors, None, losses)

        # An extra of the package, and slow to import: only an adapter needs it.
        from lestd_kernels.peft_plugin import adapter_files, attach_adapter

        dtype = next(iter(dtypes.values()))
        torch.manual_seed(settings.seed)
        model = attach_adapter(model, settings.rank, settings.alpha)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        dtypes = dict.fromkeys(trained, dtype)
        losses = _Training(model, trained, dtypes, settings, state_dir).run(windows, progress)
        config, tensors = adapter_files(model)
        return Trained({n: t.to(dtype) for n, t in tensors.items()}, config, losses)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _stored_values(
    model: nn.Module, model_dir: Path
) -> tuple[dict[str, nn.Parameter], dict[str, torch.dtype]]:
    """The floating-point tensors of the compressed modules, and their dtypes on disk.

    Raises:
        LestdError: one is not stored under its name.
    """
    found = {
        f"{path}.{name}": parameter
        for path, module in model.named_modules()
        if isinstance(module, MODULES)
        for name, parameter in module.named_parameters(recurse=False)
        if name != "bias"
    }
    stored = ShardIndex.from_directory(model_dir).tensors
    if absent := sorted(found.keys() - stored.keys()):
        raise LestdError(
            f"{model_dir} does not store {absent[0]} under that name; give the directory that "
            "lestd compress wrote"
        )
    return found, {name: DTYPES[stored[name].dtype] for name in found}


class _Training:
    """The loop, and its state."""

    def __init__(
        self,
        model: nn.Module,
        trained: dict[str, nn.Parameter],
        dtypes: dict[str, torch.dtype],
        settings: RecoverySettings,
        state_dir: Path,
    ) -> None:
        self._model, self._trained, self._dtypes = model.train(), trained, dtypes
        for parameter in trained.values():
            parameter.requires_grad_(True)
        self._settings, self._state_dir = settings, state_dir
        self._masters = {n: p.detach().float().clone() for n, p in trained.items()}
        self._losses: list[float] = []
        # One tensor after the other: the sums of the fused forms depend on the device.
        self._optimizer = torch.optim.AdamW(
            self._masters.values(), lr=settings.lr, weight_decay=0.0, foreach=False
        )
        for master in self._masters.values():
            self._optimizer.state[master] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }

    def run(self, windows: Tensor, progress: Progress) -> tuple[float, ...]:
        """Take the steps that are left; the losses of all."""
        settings = self._settings
        self._restore()
        progress(len(self._losses), settings.steps, self._losses[-1] if self._losses else None)
        for step in range(len(self._losses), settings.steps):
            rows = _rows_of_step(step, len(windows), settings.batch, settings.seed)
            self._losses.append(self._step(step, windows[rows]))
            if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
                self._save()
            progress(step + 1, settings.steps, self._losses[-1])
        return tuple(self._losses)

    def _step(self, step: int, batch: Tensor) -> float:
        settings = self._settings
        torch.manual_seed(settings.seed + step + 1)  # Dropout, where the model has any.
        at_once = max(1, _TOKENS_AT_ONCE // (batch.shape[1] - 1))
        total = 0.0
        for part in torch.split(batch.to(settings.device), at_once):
            logits = self._model(input_ids=part[:, :-1], use_cache=False).logits
            loss = functional.cross_entropy(
                logits.flatten(0, 1).float(), part[:, 1:].flatten(), reduction="sum"
            )
            loss = loss / batch[:, 1:].numel()
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        if not math.isfinite(total):
            raise LestdError(
                f"the loss of step {step + 1} is {total}; start over with --fresh and a smaller "
                "--lr, or --dtype float32"
            )
        for name, parameter in self._trained.items():
            # Values of a module that no token of the batch reached have no gradient.
            gradient = parameter.grad
            self._masters[name].grad = None if gradient is None else gradient.float()
            parameter.grad = None
        nn.utils.clip_grad_norm_(self._masters.values(), _MAX_GRADIENT_NORM, foreach=False)
        for group in self._optimizer.param_groups:
            group["lr"] = settings.lr * _schedule(step, settings.steps)
        self._optimizer.step()
        self._publish()
        return total

    def _publish(self) -> None:
        """Put the master values into the model, rounded as they are stored."""
        with torch.no_grad():
            for name, parameter in self._trained.items():
                parameter.copy_(self._masters[name].to(self._dtypes[name]))

    def _save(self) -> None:
        tensors = {}
        for name, master in self._masters.items():
            state = self._optimizer.state[master]
            tensors[f"value.{name}"] = master
            tensors |= {f"{part}.{name}": state[part] for part in _PARTS[1:]}
        path = self._state_dir / f"step-{len(self._losses):06d}.safetensors"
        atomic_write(path, lambda file: write_safetensors(file, tensors))
        steps = {n: float(self._optimizer.state[m]["step"]) for n, m in self._masters.items()}
        state = {
            "file": path.name,
            "sha256": file_sha256(path),
            "losses": self._losses,
            "optimizer_steps": steps,
            "host": socket.gethostname(),
        }
        # Written last: it says which tensors count.
        content = json.dumps(state, indent=1).encode()
        atomic_write(self._state_dir / STATE_FILE, lambda file: file.write(content))
        for old in self._state_dir.glob("step-*.safetensors"):
            if old != path:
                old.unlink()

    def _restore(self) -> None:
        """Take the state on disk, if there is one.

        Raises:
            LestdError: it is damaged.
        """
        path = self._state_dir / STATE_FILE
        if not path.is_file():
            return
        try:
            state = parse_json(read_regular(path))
            if not is_inside(state["file"]):
                raise ValueError(f"it names the file {state['file']!r}")
            file = self._state_dir / state["file"]
            if file_sha256(file) != state["sha256"]:
                raise ValueError(f"{file.name} has changed")
            refs = read_header(file)
            for name, master in self._masters.items():
                value, *moments = (read_tensor(refs[f"{part}.{name}"]) for part in _PARTS)
                master.copy_(value)
                own = self._optimizer.state[master]
                own["step"].fill_(state["optimizer_steps"][name])
                for part, moment in zip(_PARTS[1:], moments, strict=True):
                    own[part].copy_(moment)
            self._losses = [float(loss) for loss in state["losses"]]
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise LestdError(
                f"the state of the recovery in {self._state_dir} is damaged ({error}); start over "
                "with --fresh"
            ) from error
        self._publish()


def _schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate at a step: a linear rise, then a linear fall to 0."""
    rise = max(1, round(_WARM_UP * steps))
    return min((step + 1) / rise, (steps - step) / max(1, steps - rise))


def _rows_of_step(step: int, windows: int, batch: int, seed: int) -> list[int]:
    """Windows of a step: the next of an endless row of epochs, each in an order of its own."""
    rows: list[int] = []
    first = step * batch
    orders: dict[int, Sequence[int]] = {}
    for position in range(first, first + batch):
        epoch, place = divmod(position, windows)
        if epoch not in orders:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            orders[epoch] = torch.randperm(windows, generator=generator).tolist()
        rows.append(orders[epoch][place])
    return rows
