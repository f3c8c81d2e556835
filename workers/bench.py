"""Time one model in a process of its own: prefill, greedy decoding with KV cache, peak memory.

Shapes: B sequences of L prompt tokens, each continued by N tokens. The first of the N comes from
the prefill, N - 1 from decode steps of one token each. Every forward pass ends with its tokens on
the host, as when they are streamed to a reader: so a GPU's work is in the time, and no step can
run ahead.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from lestd_kernels.errors import LestdError, first_line
from workers.evaluation.perplexity import EvalWorker
from workers.host.devices import device_name, peak_memory_bytes, reset_peak_memory


@dataclass(frozen=True)
class BenchSettings:
    """How models are timed.

    Attributes:
        prompt_tokens: L.
        new_tokens: N, at least 2.
        batch: B.
        dtype: compute dtype, see `load_model`.
        device: ``"auto"`` (a GPU where there is one), ``"cpu"`` or ``"cuda"``.
        threads: CPU threads; None for torch's own choice.
        seed: of the random prompts.
    """

    prompt_tokens: int
    new_tokens: int
    batch: int
    dtype: str
    device: str
    threads: int | None
    seed: int = 0


@dataclass(frozen=True)
class BenchModel:
    """A model that is loaded and warm.

    Attributes:
        device: name of the hardware.
        device_type: ``"cpu"`` or ``"cuda"``.
        dtype: compute dtype.
        threads: CPU threads.
        weight_bytes: bytes of its parameters and buffers in memory.
        load_seconds: wall clock of loading.
    """

    device: str
    device_type: str
    dtype: str
    threads: int
    weight_bytes: int
    load_seconds: float


@dataclass(frozen=True)
class Repetition:
    """One repetition, in seconds of wall clock.

    Attributes:
        prefill_seconds: forward pass over the prompts, until its logits are there.
        first_token_seconds: the same until the first tokens are on the host.
        decode_seconds: the other N - 1 tokens of each sequence.
    """

    prefill_seconds: float
    first_token_seconds: float
    decode_seconds: float


class BenchWorker(EvalWorker):
    """Times one model; loads it as an evaluation does.

    Args:
        model_dir: directory of a dense or a compressed model.
        settings: how to time it.
    """

    def __init__(self, model_dir: str, settings: BenchSettings) -> None:
        device = settings.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            raise LestdError("no CUDA device is available here; use --device cpu")
        threads = torch.get_num_threads() if settings.threads is None else settings.threads
        super().__init__(model_dir, settings.dtype, device, threads)
        self._settings = settings
        self._torch_device = torch.device(device)
        self._base_bytes = 0

    def load(self) -> BenchModel:
        """Load the model, and run one repetition that does not count."""
        # Neither the code of the model's family nor the GPU's context counts as the model's.
        config = AutoConfig.from_pretrained(self._model_dir, trust_remote_code=False)
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        torch.zeros(1, device=self._torch_device)
        reset_peak_memory(self._torch_device)
        self._base_bytes = peak_memory_bytes(self._torch_device)
        start = time.perf_counter()
        model = self._model
        self._synchronize()
        seconds = time.perf_counter() - start
        self.measure()
        tensors = [*model.parameters(), *model.buffers()]
        return BenchModel(
            device=device_name(self._torch_device),
            device_type=self._torch_device.type,
            dtype=str(model.dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
            weight_bytes=sum(t.numel() * t.element_size() for t in tensors),
            load_seconds=seconds,
        )

    def measure(self) -> Repetition:
        """One repetition: the prompts of the seed, continued."""
        _, repetition = self.decode()
        return repetition

    @torch.inference_mode()
    def decode(self) -> tuple[list[list[int]], Repetition]:
        """The tokens (N of B) that greedy decoding gives, and what they took."""
        model, s = self._model, self._settings
        generator = torch.Generator().manual_seed(s.seed)
        vocabulary = model.config.get_text_config().vocab_size
        prompts = torch.randint(vocabulary, (s.batch, s.prompt_tokens), generator=generator)
        prompts = prompts.to(self._torch_device)
        mask = torch.ones(
            s.batch, s.prompt_tokens + s.new_tokens, dtype=torch.int64, device=self._torch_device
        )
        cache = DynamicCache(config=model.config)

        def forward(inputs: Tensor, seen: int) -> Tensor:
            logits: Tensor = model(
                input_ids=inputs,
                attention_mask=mask[:, :seen],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
            return logits[:, -1]

        self._synchronize()
        start = time.perf_counter()
        logits = forward(prompts, s.prompt_tokens)
        self._synchronize()
        prefilled = time.perf_counter()
        last = logits.argmax(-1, keepdim=True)
        tokens = [last.flatten().tolist()]
        first = time.perf_counter()
        for step in range(1, s.new_tokens):
            last = forward(last, s.prompt_tokens + step).argmax(-1, keepdim=True)
            tokens.append(last.flatten().tolist())
        end = time.perf_counter()
        return tokens, Repetition(prefilled - start, first - start, end - first)

    def peak_memory(self) -> int:
        """Bytes that this model took at most, from before it was loaded until now.

        On a GPU what torch allocated there; on CPU the growth of the resident set, in which
        mapped files count as far as they were touched, the code of libraries included: some
        20 MiB that only the smallest models show.
        """
        return peak_memory_bytes(self._torch_device) - self._base_bytes

    def _synchronize(self) -> None:
        if self._torch_device.type == "cuda":
            torch.cuda.synchronize(self._torch_device)


def serve(pipe: Connection, model_dir: str, settings: BenchSettings) -> None:
    """Body of the process: ``load``, ``measure`` and ``peak_memory`` as the pipe asks for them.

    Answers are ``(True, value)``, or ``(False, sentence)`` for a problem. Ends with the pipe.
    """
    # Ctrl-C goes to the whole group; the parent answers it, and closes the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    worker: BenchWorker | None = None
    while True:
        try:
            name: str = pipe.recv()
        except EOFError:
            return
        try:
            worker = worker or BenchWorker(model_dir, settings)
            steps: dict[str, Callable[[], object]] = {
                "load": worker.load,
                "measure": worker.measure,
                "peak_memory": worker.peak_memory,
            }
            answer: tuple[bool, object] = (True, steps[name]())
        except LestdError as error:
            answer = (False, str(error))
        except Exception as error:
            # torch and transformers fail in many ways; the parent says which model it was.
            answer = (False, f"{model_dir}: {type(error).__name__}: {first_line(error)}")
        try:
            pipe.send(answer)
        except BrokenPipeError:
            return
