"""Links and others' directories under the names we work in, and names that lead out of a model."""

import json
import os
import shutil
from pathlib import Path

import pytest
from support.cli import Finished, digest_tree, lestd
from support.families import save_tiny
from support.pickles import pickled
from support.refusals import SERIAL, refused

from lestd_kernels.errors import LestdError
from orchestrator.compression.calibration import CALIBRATION_FILE
from orchestrator.manifest.checks import payload_problem
from orchestrator.model.assemble import payload_shard_name
from orchestrator.model.directory import about_model
from orchestrator.run.directory import RunDirectory
from workers.storage import building as module
from workers.storage.building import (
    building_directory,
    empty_own_directory,
    make_own_directory,
    open_own_file,
    own_directory,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model, `out`, and its run."""
    root = tmp_path_factory.mktemp("made")
    assert compress(save_tiny("llama", root / "model"), root / "out").code == 0
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    for name in ("model", "out", "out.run"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path


def compress(model: Path, out: Path, *options: object) -> Finished:
    return lestd("compress", model, "--out", out, *SERIAL, *options)


def precious(directory: Path) -> Path:
    directory.mkdir(parents=True)
    (directory / "thesis.txt").write_text("years of work")
    return directory


KINDS = ["link", "directory", "file"]


def take(path: Path, kind: str) -> None:
    """Put something of somebody else's under a name of ours."""
    if kind == "file":
        path.write_text("years of work")
    elif kind == "directory":
        precious(path)
    else:
        path.symlink_to(precious(path.parent / "elsewhere"))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_ours_under_a_name_of_ours_stays(root: Path, kind: str) -> None:
    """For compress that begins, that replaces a model, that starts over; export; convert."""
    pickled(root / "pickles")
    commands = {
        ".new.assembling": ("compress", root / "model", "--out", root / "new", *SERIAL),
        ".out.assembling": ("compress", root / "model", "--out", root / "out", *SERIAL, "--fresh"),
        ".dense.exporting": ("export", root / "out", "--dense", root / "dense"),
        "converted.converting": ("convert", root / "pickles", root / "converted"),
    }
    for name, command in commands.items():
        take(root / name, kind)
        model = digest_tree(root / "out"), digest_tree(root / name)
        run = lestd(*command)
        assert run.code == 2
        assert name in run.err
        assert run.err.splitlines()[-1].startswith("error: ")
        assert model == (digest_tree(root / "out"), digest_tree(root / name))
        assert (root / name).is_symlink() == (kind == "link")
        shutil.rmtree(root / "elsewhere", ignore_errors=True)


def test_own_directories_and_files_are_no_links(tmp_path: Path) -> None:
    victim = precious(tmp_path / "victim") / "thesis.txt"
    (tmp_path / "hard").hardlink_to(victim)
    (tmp_path / "soft").symlink_to(victim)
    (tmp_path / "folder").symlink_to(victim.parent)
    os.mkfifo(tmp_path / "pipe")
    for name in ("hard", "soft", "folder", "pipe"):
        with pytest.raises(LestdError, match="is a link or no plain file"):
            open_own_file(tmp_path / name)
    with pytest.raises(LestdError, match="is a link"):
        make_own_directory(tmp_path / "folder")
    (tmp_path / "mine.recover").mkdir()
    (tmp_path / "mine.recover" / "held-out.txt").write_text("mine")
    for name in ("folder", "mine.recover", "hard"):
        with (
            pytest.raises(LestdError, match="that lestd has not made"),
            own_directory(tmp_path / name, "busy"),
        ):
            raise AssertionError(name)
    with (
        own_directory(tmp_path / "ours", "busy"),
        pytest.raises(LestdError, match=r"^busy$"),
        own_directory(tmp_path / "ours", "busy"),
    ):
        raise AssertionError("both")
    assert victim.read_text() == "years of work"


@pytest.mark.parametrize("name", ["lock", "payloads", "manifest", "untouched", "run.json"])
def test_a_link_in_a_run_directory_is_refused(tmp_path: Path, name: str) -> None:
    run = tmp_path / "out.run"
    run.mkdir()
    target = precious(tmp_path / "victim")
    (run / name).symlink_to(target / "thesis.txt" if name in ("lock", "run.json") else target)
    with pytest.raises(LestdError, match=f"{name} is a link"):
        RunDirectory(run).check_usable()
    if name == "lock":  # Whoever locks without that check, as `lestd status` does.
        with pytest.raises(LestdError, match="is a link"):
            RunDirectory(run).locked().__enter__()
        assert not RunDirectory(run).is_locked()
    assert (target / "thesis.txt").read_text() == "years of work"


def test_what_has_only_our_names_is_no_run(root: Path) -> None:
    """`manifest` is a common name; what `--fresh` and `clean` delete, a run.json says is ours."""
    victim = precious(root / "experiment" / "manifest")
    for command in (
        ("compress", root / "model", "--out", root / "new", *SERIAL, "--fresh"),
        ("clean", root / "out", "--force"),
    ):
        refused(lestd(*command, "--run-dir", root / "experiment"), "manifest", "no run.json")
    precious(root / "sweep" / "calibration")
    with pytest.raises(LestdError, match=r"holds thesis\.txt, but no calibration\.json"):
        empty_own_directory(root / "sweep" / "calibration", CALIBRATION_FILE)
    assert (victim / "thesis.txt").exists()


def test_a_run_directory_and_a_parent_may_be_links_to_another_disk(root: Path) -> None:
    shutil.rmtree(root / "out")
    (root / "out.run").rename(root / "scratch")
    (root / "out.run").symlink_to(root / "scratch")
    (root / "by-link").symlink_to(root)
    assert compress(root / "model", root / "by-link" / "out").code == 0
    assert lestd("verify", root / "out").code == 0
    assert lestd("clean", root / "out").code == 0
    assert (root / "out.run").is_symlink()
    assert not list((root / "scratch").iterdir())


# A replacement that fails.


@pytest.mark.parametrize("protected", [".", "manifest"])
def test_a_write_protected_model_stays_under_fresh(
    root: Path, monkeypatch: pytest.MonkeyPatch, protected: str
) -> None:
    out, before = root / "out", digest_tree(root / "out")
    closed = os.path.normpath(out / protected)
    monkeypatch.setattr(module.os, "access", lambda path, mode: str(path) != closed)
    refused(compress(root / "model", out, "--fresh"), "is write-protected", "chmod u+w")
    monkeypatch.undo()
    assert digest_tree(out) == before
    assert not (root / ".out.assembling").exists()
    assert "already complete" in compress(root / "model", out).out
    assert compress(root / "model", out, "--fresh").code == 0


@pytest.mark.parametrize("failing", ["old", "out"])
def test_a_rename_that_fails_leaves_the_model_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    out, real, calls = tmp_path / "out", Path.rename, []
    precious(out)

    def rename(path: Path, target: Path) -> Path:
        if Path(target).name == failing and not calls:
            calls.append(path)
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, target)

    def replace() -> None:
        with building_directory(out, "assembling", "busy") as building:
            (building.new / "model").write_text("new")
            building.finish()

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(LestdError, match=r"out cannot be replaced .*Permission denied"):
        replace()
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    replace()
    assert [path.name for path in out.iterdir()] == ["model"]


def test_what_a_killed_process_left_is_found_again(tmp_path: Path) -> None:
    """Killed between the two renames: the next call gives the model its name back."""
    place = tmp_path / ".out.assembling"
    precious(place / "old")
    (place / module.MARKER).touch()
    with building_directory(tmp_path / "out", "assembling", "busy"):
        pass
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"
    assert not place.exists()


# Names in records of ours.


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret", "./x", ""])
def test_no_record_names_a_file_outside(root: Path, name: str) -> None:
    secret = root / "secret"
    secret.write_text("x")
    path = root / "out" / "manifest" / "model.json"
    about = json.loads(path.read_text())
    about["files"][name] = {"bytes": 1, "sha256": "2d711642b726b04401627ca9fbac32f5" * 2}
    path.write_text(json.dumps(about))
    with pytest.raises(LestdError, match="not a path inside"):
        about_model(root / "out")
    run = lestd("verify", root / "out")
    assert run.code == 1
    assert repr(name) in run.out
    refused(compress(root / "model", root / "out", "--fresh"), repr(name))
    assert "is not inside" in str(payload_problem({"payload": name}, root / "out.run"))
    with pytest.raises(LestdError, match="malicious"):
        payload_shard_name({"block": f"a.0./{name}", "scope": "ffn", "layer": 0})


def test_a_link_out_of_the_model_is_said_but_the_cache_of_the_hub_is_made_of_them(
    root: Path,
) -> None:
    snapshot = root / "models--a--b" / "snapshots" / "0123"
    blobs = root / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    shutil.copytree(root / "out", snapshot)
    (snapshot / "config.json").rename(blobs / "abc")
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    assert lestd("verify", snapshot).code == 0
    (root / "out" / "config.json").rename(root / "config.json")
    (root / "out" / "config.json").symlink_to(root / "config.json")
    run = lestd("verify", root / "out")
    assert run.code == 1
    assert "config.json is a link out of" in run.out
