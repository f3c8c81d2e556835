"""The location of a model, as its user names it, and the fetching of its small files.

A model is a directory, a Hub id ``OWNER/NAME`` (also ``hf://OWNER/NAME@REVISION``), or the URL of
a directory in a store that fsspec knows: ``s3://BUCKET/PREFIX``, ``gs://BUCKET/PREFIX``.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import (
    HfApi,
    get_hf_file_metadata,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

from lestd_kernels.errors import LestdError
from workers.storage.files import as_source, in_parallel, read_file
from workers.storage.hub import HUB_SCHEME, TIMEOUT_SECONDS, HubUnreachableError, explain_hub_errors
from workers.storage.ranges import is_url
from workers.storage.retries import patiently
from workers.storage.untrusted_files import MAX_SMALL_BYTES

_FILE_SCHEME = "file://"
_USERINFO = re.compile(r"([\w+.-]+)://([^/?#]*)@")


def local_directory(model: str, revision: str | None) -> Path | None:
    """The directory that `model` is; None where it can only be elsewhere.

    Raises:
        LestdError: it is a file, or a revision of a directory is asked for.
    """
    if is_url(model) and not model.startswith(_FILE_SCHEME):
        return None
    path = Path(model.removeprefix(_FILE_SCHEME))
    if model.startswith(_FILE_SCHEME) and not (path.is_absolute() and path.exists()):
        raise LestdError(f"{model} does not exist; expected file:///PATH/OF/A/DIRECTORY")
    if path.is_dir():
        if revision is not None:
            raise LestdError(
                f"{model} is a local directory and has no revision {revision!r}; leave --revision "
                "out, or give a Hub id"
            )
        return path.absolute()
    if path.exists():
        raise LestdError(f"{model} is a file; give the directory of the model instead")
    return None


def store_url(model: str, revision: str | None) -> str | None:
    """The URL of the directory in a store that `model` is; None where it is a Hub id.

    Raises:
        LestdError: a revision of it is asked for, it has a password in it, or it is no plain URL.
    """
    if not is_url(model) or model.startswith(HUB_SCHEME):
        return None
    for protocol, user in _USERINFO.findall(model):
        # What others have before an @ is a name: abfs://CONTAINER@ACCOUNT.
        if ":" in user or protocol in ("http", "https"):
            raise LestdError(
                f"a URL of {protocol}:// has a password or token before its '@', which would end "
                "up in the run directory and in logs; put credentials into the store's own "
                "configuration"
            )
    if "::" in model or "?" in model or "#" in model:
        # After a '?' there may be a signature, which is as good as a password.
        raise LestdError(
            f"{model.partition('?')[0]} is not the URL of a directory; expected one such as "
            "s3://BUCKET/PREFIX, without '::', '?' and '#'"
        )
    if revision is not None:
        raise LestdError(
            f"{model} has no revision {revision!r}; leave --revision out, or give a Hub id"
        )
    return model.rstrip("/")


def hub_id(model: str, revision: str | None) -> tuple[str, str | None]:
    """Hub id and revision that `model` names, with or without ``hf://``.

    Raises:
        LestdError: it names another revision than `revision`.
    """
    if not model.startswith(HUB_SCHEME):
        return model, revision
    name, _, own = model.removeprefix(HUB_SCHEME).rstrip("/").partition("@")
    if own and revision not in (None, own):
        raise LestdError(f"{model} names another revision than --revision {revision}; give one")
    return name, own or revision


def list_repository(model: str, revision: str | None) -> set[str] | None:
    """File names of a Hub model; None where the Hub cannot be reached.

    Raises:
        LestdError: `model` is no Hub id, model or revision do not exist, or access is not granted.
    """

    def listed() -> set[str]:
        with explain_hub_errors(model, revision):
            info = HfApi().model_info(model, revision=revision, timeout=TIMEOUT_SECONDS)
        return {file.rfilename for file in info.siblings or ()}

    try:
        return patiently(listed)
    except HubUnreachableError:
        return None


def download(
    model: str, revision: str | None, names: Iterable[str], limit: int = MAX_SMALL_BYTES
) -> Path:
    """Download files of a Hub model; those in the local cache are not fetched again.

    Args:
        model: its Hub id.
        revision: of the model.
        names: of the files.
        limit: bytes that each may have.

    Returns:
        Directory in the cache of huggingface_hub, named by the commit that `revision` stands for.

    Raises:
        LestdError: the download failed, or one has more bytes than it may.
    """
    names = sorted(names)
    patterns = [glob.escape(name) for name in names]

    def size(name: str) -> int:
        url = hf_hub_url(model, name, revision=revision)
        found = get_hf_file_metadata(url, timeout=TIMEOUT_SECONDS).size or 0
        if found > limit:
            raise LestdError(
                f"{name} of {model} has {found} bytes, expected at most {limit}; "
                "download the model with `hf download`, and name its directory"
            )
        return found

    def downloaded() -> Path:
        with explain_hub_errors(model, revision):
            # The bar counts files as well, and Xet may fetch more than it needs.
            bar = _bar_to(2 * sum(in_parallel(size, names)) + len(names))
            found = snapshot_download(
                model, revision=revision, allow_patterns=patterns, tqdm_class=bar
            )
            return Path(found)

    return patiently(downloaded)


def _bar_to(end: int) -> type[tqdm]:
    """A progress bar that ends a download which goes on behind its end."""

    class Bar(tqdm):
        seen = 0.0

        def update(self, n: float | None = 1) -> Any:
            self.seen += n or 0
            if self.seen > end:
                raise LestdError("the Hub sends more bytes than it said there are; try again later")
            return super().update(n)

    return Bar


def find_cached(model: str, revision: str | None, name: str) -> Path:
    """The snapshot in the local cache that holds at least this file of a Hub model.

    Raises:
        LestdError: it is not there.
    """
    with explain_hub_errors(model, revision):
        return Path(
            snapshot_download(
                model, revision=revision, local_files_only=True, allow_patterns=[name]
            )
        )


def are_cached(model: str, commit: str, names: Iterable[str]) -> bool:
    """Whether the local cache holds all these files of a Hub model."""
    found = (try_to_load_from_cache(model, name, revision=commit) for name in names)
    return all(isinstance(path, str) for path in found)


def fetch_files(url: str, names: Iterable[str], directory: Path) -> Path:
    """Copy small files of a directory in a store to a directory here, which is returned.

    Raises:
        LestdError: one is missing, or cannot be read.
    """
    for name in sorted(names):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(read_file(as_source(f"{url}/{name}")))
    return directory
