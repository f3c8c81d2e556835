"""`lestd serve`: a real server, asked by OpenAI's own client."""

import json
import signal
import socket
import subprocess
import urllib.request
from pathlib import Path

import openai
import pytest
import torch
from support.cli import PATIENCE, lestd, start_lestd
from support.compressing import compress
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT = "The city of"
TOKENS = 6


@pytest.fixture(scope="module")
def compressed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compress(tiny_llama, tmp_path_factory.mktemp("serve") / "out", "--keep", 0.6)


def expected(directory: Path) -> str:
    """What Transformers itself goes on with."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    tokens = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(tokens)


@pytest.mark.slow
def test_a_client_gets_the_models_own_tokens_and_ctrl_c_ends_it(compressed: Path) -> None:
    server = start_lestd(
        *("serve", compressed, "--port", 0, "--dtype", "float32", "--device", "cpu"),
        stderr=subprocess.DEVNULL,
    )
    assert server.stdout is not None
    said = server.stdout.readline()
    assert f"serving {compressed} at http://127.0.0.1:" in said
    url = said.split(" at ")[1].split(";")[0]
    assert server.stdout.readline().startswith(f"curl {url}/v1/completions")
    with urllib.request.urlopen(f"{url}/health", timeout=PATIENCE) as answer:
        assert json.load(answer) == {"status": "ok"}

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=PATIENCE)
    [model] = client.models.list().data
    assert model.id == str(compressed)
    asked = {"model": model.id, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
    whole = client.completions.create(**asked).choices[0].text
    pieces = [part.choices[0].text for part in client.completions.create(**asked, stream=True)]
    assert whole == "".join(pieces) == expected(compressed)
    assert len(pieces) > 1
    with pytest.raises(openai.APIStatusError):
        client.completions.create(**asked | {"model": "/etc"})

    server.send_signal(signal.SIGINT)
    out, _ = server.communicate(timeout=PATIENCE)
    assert (server.returncode, out.strip()) == (0, "stopped")


def test_what_cannot_be_served_is_refused_in_a_sentence(compressed: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused = lestd("serve", compressed, "--port", port)
    assert refused.code == 2
    assert f"cannot listen on 127.0.0.1:{port}" in refused.err
    refused = lestd("serve", tmp_path)
    assert refused.code == 2
    assert "config.json" in refused.err
