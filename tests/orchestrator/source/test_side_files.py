"""What belongs to a model beside its weights goes with it, whatever is made of the model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.cli import lestd
from support.families import save_tiny
from support.pickles import assert_same, pickled, read_all
from support.refusals import SERIAL, refused

from orchestrator.model.card import card_metadata
from orchestrator.model.push import _finished_files
from orchestrator.source.convert import convert
from orchestrator.source.side_files import fetch_side_files, find_side_files, side_files

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 4976\n"
KEPT = {
    "additional_chat_templates/tool_use.jinja": "T",
    "original/tokenizer.model": "M",
    # Code goes along, and is not run.
    "modeling_mine.py": "from .configuration_mine import MineConfig\nraise SystemExit(1)\n",
    "configuration_mine.py": "raise SystemExit(1)\n",
    "tokenization_mine.py": "",
}
LEFT = {
    ".git/config.json": "{}",
    "small/config.json": "{}",
    "small/model.safetensors": "",
    "small.eval/1/evaluation.json": "{}",
    "train.py": "",
    "theirs.py": "",
}
AUTO_MAP = {
    "AutoModelForCausalLM": "modeling_mine.MineForCausalLM",
    "AutoModel": "owner/name--theirs.Theirs",
    "AutoConfig": "absent.Config",
}


def furnish(directory: Path) -> None:
    """Files beside the weights, those that go along and those that do not."""
    for name, text in (KEPT | LEFT).items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    config = json.loads((directory / "config.json").read_text()) | {"auto_map": AUTO_MAP}
    (directory / "config.json").write_text(json.dumps(config))
    tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", None]}}
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer))


def test_side_files_and_named_code_are_kept_by_all(tmp_path: Path) -> None:
    model, out, dense = (tmp_path / name for name in ("model", "out", "dense"))
    furnish(save_tiny("llama", model))
    assert lestd("compress", model, "--out", out, *SERIAL).code == 0
    assert lestd("verify", out).code == 0
    pushed = _finished_files(out)
    assert lestd("export", out, "--dense", dense).code == 0
    pickled(tmp_path / "pickles")
    furnish(tmp_path / "pickles")
    convert(str(tmp_path / "pickles"), tmp_path / "converted")
    for made in (out, dense, tmp_path / "converted"):
        assert {name: (made / name).read_text() for name in KEPT} == KEPT
        assert not [name for name in LEFT if (made / name).exists()]
    assert set(pushed) >= KEPT.keys()
    # A file that was put beside them is not deleted with the model; they are.
    mine = out / "additional_chat_templates" / "mine.jinja"
    mine.write_text("mine")
    refused(lestd("compress", model, "--out", out, *SERIAL, "--fresh"), "mine.jinja")
    mine.unlink()
    assert lestd("compress", model, "--out", out, *SERIAL, "--fresh").code == 0


def test_of_a_model_elsewhere_only_named_code_is_fetched(tmp_path: Path) -> None:
    remote, here = save_tiny("llama", tmp_path / "remote"), tmp_path / "here"
    furnish(remote)
    names = {path.relative_to(remote).as_posix() for path in remote.rglob("*") if path.is_file()}

    def fetch(wanted: set[str]) -> Path:
        for name in wanted:
            (here / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(remote / name, here / name)
        return here

    fetch_side_files(names, fetch)
    fetched = {path.relative_to(here).as_posix() for path in here.rglob("*") if path.is_file()}
    assert fetched == find_side_files(remote)
    assert fetched == side_files(names) | {name for name in KEPT if name.endswith(".py")}


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "additional_chat_templates/tool_use.jinja", "modeling_mine.py"]
)
def test_a_pointer_of_git_lfs_is_refused_before_any_work(tmp_path: Path, name: str) -> None:
    model = save_tiny("llama", tmp_path / "model")
    furnish(model)
    (model / name).write_text(POINTER)
    compressing = ("compress", model, "--out", tmp_path / "out", *SERIAL)
    for command in (compressing, ("evaluate", model, "--text", model / "config.json")):
        refused(lestd(*command), name, "git-LFS pointer", "git lfs pull")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_pointers_in_the_place_of_weights(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model")
    next(model.glob("*.safetensors")).write_text(POINTER)
    refused(lestd("compress", model, "--out", tmp_path / "out", *SERIAL), "git lfs pull")
    pickled(tmp_path / "pickles")
    next((tmp_path / "pickles").glob("*.bin")).write_text(POINTER)
    refused(lestd("convert", tmp_path / "pickles", tmp_path / "converted"), "git lfs pull")


@pytest.mark.parametrize("before", ["", "\n", "\ufeff", " \r\n"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_licence_that_the_hub_reads_is_kept(tmp_path: Path, before: str, end: str) -> None:
    card = before + end.join(["---", "license: cc-by-nc-4.0", "---", "# x", ""])
    (tmp_path / "README.md").write_bytes(card.encode())
    assert card_metadata(tmp_path) == {"license": "cc-by-nc-4.0"}


def test_a_conversion_leaves_out_what_the_index_does_not_name(tmp_path: Path) -> None:
    expected = pickled(tmp_path / "model")
    path = next((tmp_path / "model").glob("*.bin"))
    torch.save(torch.load(path) | {"left.over": torch.zeros(2)}, path)
    convert(str(tmp_path / "model"), tmp_path / "out")
    assert_same(read_all(tmp_path / "out"), expected)
