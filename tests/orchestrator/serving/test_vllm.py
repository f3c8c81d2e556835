"""Compressed models in vLLM, whose environment is another: ``make test-vllm``."""

import json
import os
import signal
import subprocess
import urllib.request
from pathlib import Path

import pytest
import torch
from support.cli import PATIENCE, lestd
from support.compressing import compress
from support.paths import ROOT, SUPPORT
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)

import lestd_kernels  # noqa: F401 - registers the format

PYTHON = os.environ.get("LESTD_VLLM_PYTHON")
pytestmark = pytest.mark.skipif(PYTHON is None, reason="make test-vllm runs it")

ENVIRONMENT = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": str(ROOT)}
# The second and the third share a beginning, which vLLM keeps.
PROMPTS = [[5, 17, 3, 40], [9, 8, 7, 6, 5, 4, 3, 2] * 4, [9, 8, 7, 6, 5, 4, 3, 2] * 4 + [11, 12]]
TOKENS = 12
# vLLM has attention for few widths of heads; 32 is one.
COMMON = {
    "vocab_size": 91,
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "eos_token_id": None,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**COMMON),
    "qwen2": Qwen2Config(**COMMON | {"hidden_size": 128}),
    "qwen3_moe": Qwen3MoeConfig(
        **COMMON, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=48
    ),
}
MODELS = {
    "lestd": ("llama", "--metric", "weight", "--keep", 0.5),
    "low-rank": ("llama", "--method", "svd", "--keep", 0.6, "--scope", "all"),
    "few-bit": ("qwen2", "--value-bits", 4, "--factor-bits", 4, "--keep", 0.3, "--scope", "all"),
    "coded": ("llama", "--method", "watersic", "--keep", 0.2, "--scope", "all"),
    "some-layers": ("llama", "--include", "1", "--keep", 0.5),
    "experts": ("qwen3_moe", "--scope", "experts", "--keep", 0.5),
    "attention-of-moe": ("qwen3_moe", "--keep", 0.5),
}


def in_vllm(
    directory: Path,
    tensor_parallel: int = 1,
    model_impl: str = "transformers",
    dtype: str = "float32",
    prompt_logprobs: bool = False,
) -> subprocess.CompletedProcess[str]:
    settings = {
        "tokens": TOKENS,
        "tensor_parallel": tensor_parallel,
        "model_impl": model_impl,
        "dtype": dtype,
        "prompt_logprobs": prompt_logprobs,
    }
    script = SUPPORT / "vllm_tokens.py"
    command = [PYTHON, script, directory, json.dumps(PROMPTS), json.dumps(settings)]
    # Where vLLM sees one node of memory only, it has to be told a core for each of its workers.
    cores = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(tensor_parallel)))}
    return subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        env=ENVIRONMENT | cores,
        timeout=PATIENCE,
    )


def expected(directory: Path) -> list[list[int]]:
    """What Transformers itself goes on with."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    found = []
    for ids in PROMPTS:
        whole = model.generate(torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False)
        found.append(whole[0, len(ids) :].tolist())
    return found


def make(name: str, tmp_path: Path) -> Path:
    family, *options = MODELS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family])
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    return compress(tmp_path / "model", tmp_path / "out", *options)


@pytest.mark.parametrize("name", MODELS)
def test_vllm_gives_the_tokens_of_transformers(name: str, tmp_path: Path) -> None:
    compressed = make(name, tmp_path)
    run = in_vllm(compressed)
    assert run.returncode == 0, run.stderr[-5000:]
    [answer] = [line for line in run.stdout.splitlines() if line.startswith("[[")]
    assert json.loads(answer) == expected(compressed)


def test_packed_weights_run_in_kernels_of_vllm_itself(tmp_path: Path) -> None:
    """Its kernel for CPUs has 4 bits and no float32."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["qwen2"])
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    options = ("--method", "rtn", "--value-bits", 4, "--scale-groups", "inputs", "--keep", 0.9)
    compressed = compress(tmp_path / "model", tmp_path / "out", *options)
    packed = tmp_path / "packed"
    assert lestd("export", compressed, "--compressed-tensors", packed).code == 0
    run = in_vllm(packed, model_impl="auto", dtype="bfloat16", prompt_logprobs=True)
    assert run.returncode == 0, run.stderr[-5000:]
    assert "Using CPUWNA16LinearKernel" in run.stdout + run.stderr
    [answer] = [line for line in run.stdout.splitlines() if line.startswith("[[")]
    found = torch.tensor([one for line in json.loads(answer) for one in line])
    ours, dense = (logprobs(one) for one in (compressed, tmp_path / "model"))
    assert (found - ours).abs().mean() < 0.1
    assert (dense - ours).abs().mean() > 1  # What 4 bits cost this model, whose weights are noise.


def logprobs(directory: Path) -> torch.Tensor:
    """Of every token of the prompts but the first, in float32."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    found = []
    with torch.no_grad():
        for ids in PROMPTS:
            one = torch.tensor([ids])
            scores = model(one).logits[0, :-1].log_softmax(-1)
            found.append(scores.gather(1, one[0, 1:, None])[:, 0])
    return torch.cat(found)


def test_several_devices_are_refused_in_a_sentence(tmp_path: Path) -> None:
    run = in_vllm(make("lestd", tmp_path), tensor_parallel=2)
    assert run.returncode != 0
    assert "use --tensor-parallel-size 1" in run.stdout + run.stderr


def test_the_server_of_vllm_answers_and_ctrl_c_ends_it(tiny_llama: Path, tmp_path: Path) -> None:
    compressed = compress(tiny_llama, tmp_path / "out", "--keep", 0.6)
    command = [PYTHON, "-m", "orchestrator", "serve", compressed, "--port", 0, "--dtype", "float32"]
    log = (tmp_path / "log").open("w")
    server = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=log, text=True, env=ENVIRONMENT
    )
    try:
        assert server.stdout is not None
        url = server.stdout.readline().split(" at ")[1].split(";")[0]
        body = {"model": str(compressed), "prompt": "The city of", "max_tokens": 5}
        request = urllib.request.Request(
            f"{url}/v1/completions",
            json.dumps(body | {"temperature": 0}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            text = json.load(answer)["choices"][0]["text"]
        tokenizer = AutoTokenizer.from_pretrained(compressed)
        model = AutoModelForCausalLM.from_pretrained(compressed, dtype=torch.float32)
        ids = tokenizer("The city of", return_tensors="pt").input_ids
        whole = model.generate(ids, max_new_tokens=5, do_sample=False)
        assert text == tokenizer.decode(whole[0, ids.shape[1] :])
        server.send_signal(signal.SIGINT)
        out, _ = server.communicate(timeout=PATIENCE)
        assert (server.returncode, out.splitlines()[-1]) == (0, "stopped")
    finally:
        server.kill()
