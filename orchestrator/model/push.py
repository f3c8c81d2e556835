"""A finished compressed model goes to the Hub; an upload that broke off is continued.

Nothing is kept on this side: the Hub knows what has arrived. Files that it has are not sent again,
and where hf_xet is installed (a dependency of huggingface_hub on the usual platforms), neither is
what has arrived of a file. All of it is published by one commit in the end, so nobody ever loads
half a model, or one model's config.json with another's weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

from lestd_kernels.errors import LestdError, first_line
from orchestrator.console import logs, output
from orchestrator.manifest.checks import foreign_files
from orchestrator.model.directory import about_model
from orchestrator.model.verify import verify
from workers.storage.names import MANIFEST_DIR, TEMPORARY

_OUR_SHARDS = ("lestd-*.safetensors", "dense-*.safetensors")
_WEIGHT_SUFFIXES = {".safetensors", ".bin"}
# Sent between two lines of progress.
_BATCH_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Pushed:
    """State on the Hub after a push.

    Attributes:
        url: page of the repository, at its branch if one was asked for.
        repository: its id, ``OWNER/NAME``.
        commit: the commit that holds the model.
        files: number of files.
        bytes: their size together.
    """

    url: str
    repository: str
    commit: str
    files: int
    bytes: int


def push(directory: Path, repository: str, private: bool, branch: str | None) -> Pushed:
    """Upload a compressed model: the files that lestd wrote, and nothing else in the directory.

    Shards of a model that was pushed before, and that this one does not have, are deleted there.

    Args:
        directory: the model.
        repository: ``OWNER/NAME``, or ``NAME`` for one of the user's own; created if absent.
        private: make it private; one that is there must be private already.
        branch: where to; made from the main branch if it is not there. None: the main branch.

    Raises:
        LestdError: the model is not finished or is damaged, the repository holds another model or
            is public, access is not granted, or the upload broke off.
    """
    names = _finished_files(directory)
    if logs.in_json() or not output.err.is_terminal:  # Bars would be drawn into the log.
        disable_progress_bars()
    with _explain_hub_errors(repository), warnings.catch_warnings():
        # Ours is no data set: the Parquet files are the model's manifest.
        warnings.filterwarnings("ignore", message=".*commit a data file")
        api = HfApi()
        url = api.create_repo(repository, private=private or None, exist_ok=True)
        if branch is not None:
            api.create_branch(url.repo_id, branch=branch, exist_ok=True)
        info = api.model_info(url.repo_id, revision=branch)
        if private and not info.private:
            raise LestdError(
                f"{url.repo_id} is public; make it private in its settings on the Hub, or leave "
                "--private out"
            )
        present = {file.rfilename for file in info.siblings or ()}
        _refuse_other_weights(url.repo_id, present, names)
        additions = [CommitOperationAdd(name, directory / name) for name in names]
        size = sum(addition.upload_info.size for addition in additions)
        sent = 0
        for batch in _batches(additions):
            # Publishes nothing; upload_folder would make a commit of every few hundred files.
            api.preupload_lfs_files(url.repo_id, batch, revision=branch, free_memory=False)
            sent += sum(addition.upload_info.size for addition in batch)
            arrived = f"{output.size(sent)} of {output.size(size)} uploaded"
            logs.log("message", f"{arrived}; the model appears when all of it is there")
        stale = [name for name in sorted(present - set(names)) if _is_our_shard(name)]
        commit = api.create_commit(
            url.repo_id,
            [*additions, *map(CommitOperationDelete, stale)],
            commit_message="Upload a model compressed with LeSTD",
            revision=branch,
        )
    page = str(url) if branch is None else f"{url}/tree/{branch}"
    return Pushed(page, url.repo_id, commit.oid, len(names), size)


def _batches(additions: list[CommitOperationAdd]) -> Iterator[list[CommitOperationAdd]]:
    batch: list[CommitOperationAdd] = []
    for addition in additions:
        batch.append(addition)
        if sum(each.upload_info.size for each in batch) >= _BATCH_BYTES:
            yield batch
            batch = []
    if batch:
        yield batch


def _finished_files(directory: Path) -> list[str]:
    """Names of a model's files, relative to it, after a check of every one.

    Raises:
        LestdError: it is no finished model, or a file is not as it was written.
    """
    about = about_model(directory)
    if about is None:
        raise LestdError(
            f"{directory} is not a finished lestd model (it has no {MANIFEST_DIR}/model.json); "
            "give the --out of a lestd compress that ended, or run that command again"
        )
    # Sizes take no time, hashes minutes: what is plainly incomplete is said at once.
    for name, stated in about["files"].items():
        path = directory / name
        stated = stated.get("bytes") if isinstance(stated, dict) else None
        if not path.is_file() or path.stat().st_size != stated:
            raise _damaged(directory, f"{path} is absent, or has not the {stated} bytes it had")
    logs.log("message", f"checking {directory} against its manifest")
    # The directory of a model is that of no run, so only the model is looked at.
    problems = verify(directory, directory).problems
    if problems:
        raise _damaged(directory, problems[0])
    manifest = directory / MANIFEST_DIR
    if foreign := foreign_files(manifest):
        raise LestdError(f"{min(foreign)} was not made by lestd; move it out of {directory}")
    written = (path for path in manifest.rglob("*") if path.is_file())
    output = (path for path in written if not path.name.startswith(TEMPORARY))
    return [*about["files"], *sorted(path.relative_to(directory).as_posix() for path in output)]


def _damaged(directory: Path, problem: str) -> LestdError:
    return LestdError(
        f"{problem}; a changed model is not pushed: make {directory} again with the same lestd "
        "compress (a model card is edited on the Hub, afterwards)"
    )


def _refuse_other_weights(repository: str, present: set[str], names: list[str]) -> None:
    """Two models in one repository: Transformers would load the wrong one, or a mixture.

    Raises:
        LestdError: the repository holds weights that no push of ours put there.
    """
    for name in sorted(present - set(names)):
        weights = Path(name).suffix in _WEIGHT_SUFFIXES and "/" not in name
        if weights and not _is_our_shard(name):
            raise LestdError(
                f"{repository} holds {name}, weights of another model; choose another REPO, or "
                "delete that file there"
            )


def _is_our_shard(name: str) -> bool:
    return "/" not in name and any(fnmatch(name, pattern) for pattern in _OUR_SHARDS)


@contextmanager
def _explain_hub_errors(repository: str) -> Iterator[None]:
    try:
        yield
    except LestdError:
        raise
    except HFValidationError as error:
        raise LestdError(
            f"{repository!r} cannot be the name of a Hub repository; expected OWNER/NAME, of "
            "letters, digits, '-', '_' and '.'"
        ) from error
    except Exception as error:
        # hf_xet and the HTTP client each have errors of their own for a connection that broke.
        raise LestdError(_why(repository, error)) from error


def _why(repository: str, error: BaseException) -> str:
    """One sentence about an error, or about what it says was its cause."""
    while error.__cause__ is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    kept = "what has arrived there is kept: run the same command again to continue"
    if not isinstance(error, HfHubHTTPError):
        return (
            f"the upload to {repository} broke off ({type(error).__name__}: {first_line(error)}); "
            f"check the connection and HF_HUB_OFFLINE; {kept}"
        )
    status = error.response.status_code
    said = f"{status}: {error.server_message}" if error.server_message else str(status)
    if status == 401:
        return (
            f"the Hub requires a login to write to {repository} ({said}); log in with "
            "`hf auth login`, or set HF_TOKEN, with a token that has write access"
        )
    if status == 403:
        return (
            f"your token has no write access to {repository} ({said}); use one that has it, or "
            "choose another REPO"
        )
    if status == 404:
        return f"the Hub has no {repository} ({said}); check its owner, its name and --revision"
    return f"the Hub answered {said} for {repository}; {kept}"
