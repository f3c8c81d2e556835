"""`lestd compare`: a sweep for each method, measured, evaluated, tabled and drawn."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.cli import digest_tree, lestd

from lestd_kernels.errors import LestdError
from lestd_kernels.linalg.operator_norm import operator_norm
from orchestrator.config.run import RunConfig
from orchestrator.experiments.compare import feasible
from orchestrator.experiments.variants import parse_contenders
from orchestrator.source.checkpoint import resolve_source

SERIAL = ("--executor", "serial")


@pytest.mark.parametrize("shape", [(40, 40), (300, 17), (5, 64), (1, 9), (256, 300)])
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_operator_norm_is_numpys(shape: tuple[int, int], decay: float) -> None:
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(shape, generator=generator)
    matrix *= torch.arange(1, shape[1] + 1) ** -decay
    expected = np.linalg.norm(matrix.double().numpy(), 2)
    assert operator_norm(matrix) == pytest.approx(expected, rel=1e-3)
    assert operator_norm(matrix) <= expected * (1 + 1e-5)
    assert operator_norm(matrix) == operator_norm(matrix.clone())


def test_operator_norm_of_nothing() -> None:
    assert operator_norm(torch.zeros(6, 4)) == 0


def test_methods_and_their_options_are_read() -> None:
    found = parse_contenders("lestd, tucker;lestd:pattern=2:4,rank_step=4 lestd:max_flops=0.5")
    assert [(one.method, dict(one.options)) for one in found] == [
        ("lestd", {}),
        ("tucker", {}),
        ("lestd", {"pattern": "2:4", "rank_step": 4}),
        ("lestd", {"max_flops": 0.5}),
    ]
    assert found[2].label == "lestd pattern=2:4 rank_step=4"
    assert found[2].directory == "lestd-pattern-2-4-rank_step-4"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (" , ", "names no method"),
        ("lestd,nothing", "'nothing'"),
        ("lestd:keep=0.5", "'keep=0.5'"),
        ("lestd:value_bit=8", "value_bits"),
        ("rank_step=4,lestd", "'rank_step=4'"),
        ("lestd,tucker,lestd", "'lestd' twice"),
    ],
)
def test_what_is_no_list_of_methods_is_refused(text: str, words: str) -> None:
    with pytest.raises(LestdError) as caught:
        parse_contenders(text)
    assert words in str(caught.value)


def test_sizes_that_a_method_does_not_reach_are_left_out(tiny_llama: Path) -> None:
    source = resolve_source(str(tiny_llama), None)
    [contender] = parse_contenders("lestd")
    configs = {keep: RunConfig(keep=keep) for keep in (0.6, 0.001)}
    kept, [missing] = feasible(source, contender, configs)
    assert list(kept) == [0.6]
    assert missing.keep == 0.001
    assert "byte budget" in missing.reason


def test_the_whole_command(tiny_llama: Path, wikitext: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "out", tmp_path / "text.txt"
    text.write_bytes(wikitext.read_bytes()[:12_000])
    calibrated = ("--calibrate-on", text, "--samples", 4, "--sample-tokens", 32)
    command = (
        *("compare", tiny_llama, "--methods", "lestd tucker", "--keep", "0.3,0.001", "--out", out),
        *("--text", text, "--window", 64, "--max-windows", 4, "--no-speed"),
        *calibrated,
        *SERIAL,
    )
    first = lestd(*command, "--json")
    assert first.code == 0, first.err
    said = json.loads(first.out)
    rows = said["rows"]
    assert [row["label"] for row in rows] == ["lestd", "tucker"]
    assert {one["label"] for one in said["left_out"]} == {"lestd", "tucker"}

    source = load_file(tiny_llama / "model.safetensors")
    for row in rows:
        point, model = row["point"], Path(row["point"]["model"])
        # As `lestd compress` makes it, and each figure by an oracle.
        apart = tmp_path / row["label"]
        options = ("--method", row["label"], "--keep", 0.3, "--out", apart, *calibrated)
        assert lestd("compress", tiny_llama, *options, *SERIAL).code == 0
        assert digest_tree(model) == digest_tree(apart)
        assert lestd("verify", model).code == 0
        dense = tmp_path / f"{row['label']}-dense"
        assert lestd("export", model, "--dense", dense, "--dtype", "float32").code == 0
        hats = {k: v for f in dense.glob("*.safetensors") for k, v in load_file(f).items()}
        names = [name for name in source if "self_attn" in name and name.endswith("proj.weight")]
        worst = squared_error = squared_norm = 0.0
        for name in names:
            W = source[name].double().numpy()
            D = hats[name].double().numpy() - W
            worst = max(worst, np.linalg.norm(D, 2) / np.linalg.norm(W, 2))
            grams = load_file(
                out / "calibration" / f"layer-{int(name.split('.')[2]):05d}-self_attn.safetensors"
            )
            reads = "heads" if "o_proj" in name else "in"
            G = grams[f"{name.rsplit('.', 2)[0]}.{reads}"].double().numpy()
            squared_error += np.trace(D @ G @ D.T)
            squared_norm += np.trace(W @ G @ W.T)
        assert row["operator_error"] == pytest.approx(worst, rel=1e-3)
        assert row["activation_error"] == pytest.approx(
            math.sqrt(squared_error / squared_norm), rel=1e-3
        )
        stored = point["stored_bytes"]
        assert stored <= row["byte_budget"] == 4 * int(0.3 * 2**19)
        assert row["undershoot"] == pytest.approx(1 - stored / row["byte_budget"])
        assert row["model_bytes"] == said["dense"]["model_bytes"] - 2**21 + stored
        assert row["seconds"] > 0
        assert row["decode_ratio"] is None
        [token] = [q for q in point["quality"] if q["metric"] == "token_perplexity"]
        assert token["difference_stderr"] > 0

    table = (out / "compare.md").read_text()
    for words in ("| lestd |", "| tucker |", "operator error", "left out: lestd at keep 0.001"):
        assert words in table
    assert (out / "compare.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    # The same command finds all done, and says the same.
    models = {path: path.stat().st_ino for path in out.rglob("*.safetensors")}
    figures = {p: p.stat().st_mtime_ns for p in (out / "figures").iterdir()}
    again = lestd(*command)
    assert again.code == 0, again.err
    assert figures == {p: p.stat().st_mtime_ns for p in (out / "figures").iterdir()}
    assert models == {p: p.stat().st_ino for p in models}
    assert "4 of 4 windows were already finished" in again.err
    assert table == (out / "compare.md").read_text()
    for words in ("lestd", "tucker", "operator", "left out"):
        assert words in again.out


@pytest.mark.slow
def test_decoding_is_timed_beside_the_dense_model(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("compare", tiny_llama, "--methods", "tucker", "--keep", 0.3, "--out", out, *SERIAL)
    said = json.loads(lestd(*command, "--json").out)
    [row] = said["rows"]
    assert row["decode_ratio"] > 0
    assert "decode" in lestd(*command).out
    assert json.loads(lestd(*command, "--json").out)["rows"] == [row]


def test_nothing_that_fits_is_refused_in_one_sentence(tiny_llama: Path, tmp_path: Path) -> None:
    result = lestd(
        *("compare", tiny_llama, "--methods", "lestd", "--keep", 0.001, "--no-speed"),
        *("--out", tmp_path / "out"),
    )
    assert result.code == 2
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1


def test_a_quantizer_is_listed_at_its_own_size_once(tiny_llama: Path, tmp_path: Path) -> None:
    methods = ("--methods", "rtn:value_bits=3", "--include", 0, "--no-speed")
    command = ("compare", tiny_llama, *methods, "--keep", "0.4,0.21,0.1", "--out", tmp_path / "out")
    result = lestd(*command, *SERIAL, "--json")
    assert result.code == 0, result.err
    said = json.loads(result.out)
    [row] = said["rows"]
    assert row["point"]["keep"] == 0.21
    # 3 bits a weight, and a scale of 16 bits for 64 of them.
    assert row["point"]["stored_bytes"] == 2**18 * 3 // 8 + 2**18 // 64 * 2
    left_out = {one["keep"]: one["reason"] for one in said["left_out"]}
    assert left_out.keys() == {0.4, 0.1}
    assert left_out[0.4] == "it is the model of keep 0.21"
