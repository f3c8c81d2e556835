"""Where a model comes from: a local directory or a Hub id, resolved and checked once.

`resolve_source` has the weights at hand, downloaded if need be; `open_headers` knows everything
about them but their values, and downloads only headers. No weight is read here, and no code that
comes with a model is run.
"""

from __future__ import annotations

import glob
import json
import shlex
import shutil
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import (
    HfApi,
    get_session,
    hf_hub_url,
    hf_raise_for_status,
    snapshot_download,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]
from transformers import AutoConfig, PretrainedConfig

from lestd_kernels.errors import LestdError
from orchestrator.architectures import check_family
from workers.checkpoint import (
    INDEX_FILE,
    WEIGHTS_FILE,
    ShardIndex,
    read_weight_map,
)
from workers.contracts import TensorRef
from workers.files import AnyPath, atomic_write
from workers.headers import LENGTH_BYTES, header_length, parse_header

CONFIG_FILE = "config.json"
BIN_FILE = "pytorch_model.bin"
BIN_INDEX_FILE = "pytorch_model.bin.index.json"
_SIDE_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".tiktoken", ".spm"}
_SIDE_PREFIXES = ("LICENSE", "NOTICE", "README")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
_FIRST_RANGE_BYTES = 256 * 1024
_TIMEOUT_SECONDS = 30.0


@dataclass(frozen=True)
class Source:
    """A checkpoint that can be compressed.

    Attributes:
        model: the directory or Hub id as the user gave it.
        revision: commit of a Hub model; None for a local directory.
        directory: local directory of the checkpoint.
        index: its tensors.
        config: its config, as Transformers understands it.
        config_json: its config.json as it stands in the file.
    """

    model: str
    revision: str | None
    directory: Path
    index: ShardIndex
    config: PretrainedConfig
    config_json: dict[str, Any]


def resolve_source(model: str, revision: str | None = None) -> Source:
    """Find a checkpoint; download it, or what is new of it, if `model` is a Hub id.

    Raises:
        LestdError: it cannot be found, is pickled, is quantized already, is damaged, or belongs
            to an unknown family.
    """
    return _open(model, revision, headers_only=False)


def open_headers(model: str, revision: str | None = None) -> Source:
    """As `resolve_source`, but of a Hub model download config, index and headers only.

    The tensors of a Hub model then have an ``hf://`` address in place of a shard's path.

    Raises:
        LestdError: as `resolve_source`.
    """
    return _open(model, revision, headers_only=True)


def _open(model: str, revision: str | None, headers_only: bool) -> Source:
    local = local_directory(model, revision)
    if local is not None:
        return _open_directory(model, None, local)
    names = list_repository(model, revision)
    if names is None:
        return _open_cached(model, revision)
    directory = _fetch_config(model, revision, names)
    commit = directory.name
    weight_map = {} if WEIGHTS_FILE in names else read_weight_map(directory / INDEX_FILE)
    shards = {WEIGHTS_FILE} if WEIGHTS_FILE in names else set(weight_map.values())
    if absent := sorted(shards - names):
        raise LestdError(
            f"{model} has no file {absent[0]}, but its {INDEX_FILE} names it; tell its publisher, "
            "or choose another --revision"
        )
    if not headers_only:
        side_files = {name for name in names if is_side_file(name)}
        return _open_directory(model, commit, download(model, commit, side_files | shards))
    headers = {shard: _fetch_header(model, commit, shard) for shard in sorted(shards)}
    index = ShardIndex.from_headers(directory, headers, weight_map)
    config_json = read_config_json(directory)
    return Source(model, commit, directory, index, load_config(directory), config_json)


def is_side_file(name: str) -> bool:
    """Whether a file belongs to a model beside its weights: config, tokenizer, licence.

    Nothing that is run or unpickled, and no index of weights, is one.
    """
    if "/" in name or name.endswith(".index.json"):
        return False
    return Path(name).suffix in _SIDE_SUFFIXES or name.startswith(_SIDE_PREFIXES)


def copy_side_files(
    source_dir: Path, target_dir: AnyPath, but: Container[str] = frozenset()
) -> None:
    """Copy the files that belong to a model beside its weights, see `is_side_file`, but some.

    Raises:
        OutOfSpaceError: no space left.
    """
    for path in sorted(source_dir.iterdir()):
        if is_side_file(path.name) and path.name not in but and path.is_file():
            with path.open("rb") as original:
                atomic_write(target_dir / path.name, partial(shutil.copyfileobj, original))


def local_directory(model: str, revision: str | None) -> Path | None:
    """The directory that `model` is; None where it can only be a Hub id.

    Raises:
        LestdError: it is a file, or a revision of a directory is asked for.
    """
    path = Path(model)
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


def list_repository(model: str, revision: str | None) -> set[str] | None:
    """File names of a Hub model; None where the Hub cannot be reached.

    Raises:
        LestdError: `model` is no Hub id, model or revision do not exist, or access is not granted.
    """
    try:
        with _explain_hub_errors(model, revision):
            info = HfApi().model_info(model, revision=revision, timeout=_TIMEOUT_SECONDS)
    except _HubUnreachableError:
        return None
    return {file.rfilename for file in info.siblings or ()}


def download(model: str, revision: str | None, names: Iterable[str]) -> Path:
    """Download files of a Hub model; those in the local cache are not fetched again.

    Returns:
        Directory in the cache of huggingface_hub, named by the commit that `revision` stands for.

    Raises:
        LestdError: the download failed.
    """
    patterns = [glob.escape(name) for name in sorted(names)]
    with _explain_hub_errors(model, revision):
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))


class _HubUnreachableError(LestdError):
    """No answer from the Hub."""


@contextmanager
def _explain_hub_errors(model: str, revision: str | None) -> Iterator[None]:
    where = f"{model} at revision {revision}" if revision else model
    try:
        yield
    except LestdError:
        raise
    except HFValidationError as error:
        raise LestdError(
            f"{model} is neither a directory nor a Hub id; expected an existing directory or "
            "OWNER/NAME"
        ) from error
    except GatedRepoError as error:
        raise LestdError(
            f"{model} is gated: accept its terms on its Hub page, log in with `hf auth login`, and "
            "run the command again"
        ) from error
    except RevisionNotFoundError as error:
        raise LestdError(f"{model} has no revision {revision!r}; check --revision") from error
    except RepositoryNotFoundError as error:
        raise LestdError(
            f"{model} is neither a directory here nor a model on the Hub that you may read; check "
            "the spelling, or log in with `hf auth login` if it is private"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        hint = "log in with `hf auth login`" if status in (401, 403) else "try again later"
        raise LestdError(f"the Hub answered {status} for {where}; {hint}") from error
    except Exception as error:
        # Whatever HTTP client huggingface_hub uses has errors of its own for a dead connection.
        raise _HubUnreachableError(
            f"{where} is no directory here, is not in the local cache, and the Hub cannot be "
            f"reached ({type(error).__name__}); check the connection and HF_HUB_OFFLINE, or give a "
            "local directory"
        ) from error


def _open_cached(model: str, revision: str | None) -> Source:
    """A model of the Hub, which cannot be reached, from the local cache."""
    with _explain_hub_errors(model, revision):
        directory = Path(
            snapshot_download(
                model, revision=revision, local_files_only=True, allow_patterns=[CONFIG_FILE]
            )
        )
    return _open_directory(model, directory.name, directory)


def _open_directory(model: str, commit: str | None, directory: Path) -> Source:
    config_json = read_config_json(directory)
    _check_config(model, config_json)
    check_not_pickled(model, {path.name for path in directory.iterdir()})
    config = load_config(directory)
    return Source(
        model, commit, directory, ShardIndex.from_directory(directory), config, config_json
    )


def _fetch_config(model: str, revision: str | None, names: set[str]) -> Path:
    """Download config and index, and refuse what they rule out before anything larger follows.

    The revision is the user's, not its commit: so the cache learns what it stands for.
    """
    if CONFIG_FILE not in names:
        raise LestdError(f"{model} has no {CONFIG_FILE}, so it is not a Transformers model")
    directory = download(model, revision, {CONFIG_FILE, INDEX_FILE} & names)
    _check_config(model, read_config_json(directory))
    check_not_pickled(model, names)
    return directory


def check_not_pickled(model: str, names: set[str]) -> None:
    """Refuse a directory or repository without a safetensors checkpoint.

    Raises:
        LestdError: weights are pickled (says how to convert them), or there are none.
    """
    if {WEIGHTS_FILE, INDEX_FILE} & names:
        return
    if convertible := sorted({BIN_FILE, BIN_INDEX_FILE} & names):
        out = Path(model).name + "-safetensors"
        raise LestdError(
            f"{model} has only pickled weights ({convertible[0]}), which could run code when "
            "loaded; rewrite them first, without running any: "
            f"lestd convert {shlex.quote(model)} {shlex.quote(out)}"
        )
    if pickled := sorted(name for name in names if name.endswith(_PICKLE_SUFFIXES)):
        raise LestdError(
            f"{model} has no safetensors weights, only pickled files ({pickled[0]}), which are "
            f"never loaded and which lestd convert cannot rewrite (it reads {BIN_FILE}, or "
            f"{BIN_INDEX_FILE} and its shards); get the model as safetensors"
        )
    raise LestdError(
        f"{model} has no weights: expected {WEIGHTS_FILE}, or {INDEX_FILE} and the shards it names"
    )


def read_config_json(directory: Path) -> dict[str, Any]:
    """Read config.json as it stands.

    Raises:
        LestdError: it is absent or not a JSON object.
    """
    path = directory / CONFIG_FILE
    try:
        config = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise LestdError(
            f"{directory} has no {CONFIG_FILE}; expected the directory of a Transformers model"
        ) from error
    except OSError as error:
        raise LestdError(
            f"{path} cannot be read ({error.strerror}); check its permissions"
        ) from error
    except (ValueError, RecursionError) as error:
        raise LestdError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(config, dict):
        raise LestdError(f"{path} must hold a JSON object; download it again")
    return config


def _check_config(model: str, config_json: dict[str, Any]) -> None:
    quantization = config_json.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        if method == "lestd":
            raise LestdError(f"{model} is already compressed by LeSTD; start from its source model")
        raise LestdError(
            f"{model} is already quantized (quant_method {method!r} in {CONFIG_FILE}); start from "
            "the BF16, F16 or F32 model it was made from"
        )
    check_family(config_json.get("model_type"))


def load_config(directory: Path) -> PretrainedConfig:
    """Read config.json as Transformers understands it; no code of the model is run.

    Raises:
        LestdError: Transformers does not accept it.
    """
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:
        # Transformers checks each family's config in its own way, with errors of many types.
        reason = " ".join(str(error).split())
        raise LestdError(
            f"{directory / CONFIG_FILE} is not a config that Transformers accepts ({reason}); "
            "use the config.json that belongs to the weights"
        ) from error
    assert isinstance(config, PretrainedConfig)
    return config


def _fetch_header(model: str, commit: str, shard: str) -> dict[str, TensorRef]:
    """Read the header of a shard on the Hub by range requests."""
    address = f"hf://{model}@{commit}/{shard}"
    with _explain_hub_errors(model, commit):
        content, file_bytes = _fetch_range(model, commit, shard, _FIRST_RANGE_BYTES)
        stop = LENGTH_BYTES + header_length(content[:LENGTH_BYTES], address, file_bytes)
        if stop > len(content):
            content, file_bytes = _fetch_range(model, commit, shard, stop)
        return parse_header(content[LENGTH_BYTES:stop], address, file_bytes)


def _fetch_range(model: str, commit: str, shard: str, stop: int) -> tuple[bytes, int]:
    """The first `stop` bytes of a file on the Hub, fewer if it is shorter, and its size."""
    url = hf_hub_url(model, shard, revision=commit)
    headers = build_hf_headers() | {"Range": f"bytes=0-{stop - 1}", "Accept-Encoding": "identity"}
    # Streamed, so that a server that ignores Range cannot send the whole shard.
    with get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT_SECONDS) as response:
        hf_raise_for_status(response)
        if response.status_code != 206:
            raise LestdError(
                f"the server of {model} does not answer range requests; download the model and "
                "give its directory"
            )
        file_bytes = int(response.headers["Content-Range"].rpartition("/")[2])
        return response.read(), file_bytes
