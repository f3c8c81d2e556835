"""A checkpoint that can be compressed, local or remote: resolved, and checked once.

Of a model elsewhere only config, index and headers are fetched here: its tensors are read by byte
range where they are needed. No weight is read here, and no code that comes with a model is run.
"""

from __future__ import annotations

import atexit
import re
import shlex
import shutil
import tempfile
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from lestd_kernels.errors import LestdError
from orchestrator.architectures import (
    Architecture,
    SliceGroup,
    Structure,
    check_family,
    find_architecture,
    read_architecture,
    user_file,
)
from orchestrator.source.counts import check_counts
from orchestrator.source.location import (
    are_cached,
    download,
    fetch_files,
    find_cached,
    hub_id,
    list_repository,
    local_directory,
    store_url,
)
from orchestrator.source.quantized import (
    KEY,
    READABLE,
    as_dense,
    is_readable,
    quantization_of,
    without_quantization,
)
from orchestrator.source.side_files import fetch_side_files, find_side_files, is_side_folder
from workers.checkpoint.tensors import INDEX_FILE, WEIGHTS_FILE, ShardIndex, read_weight_map
from workers.storage.files import as_source, list_files, list_tree, require_content
from workers.storage.hub import HUB_SCHEME
from workers.storage.ranges import is_url
from workers.storage.untrusted_files import parse_json, read_regular

CONFIG_FILE = "config.json"
BIN_FILE = "pytorch_model.bin"
BIN_INDEX_FILE = "pytorch_model.bin.index.json"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
# Part of a URL: a name that no server and no URL parser takes for anything else.
_PLAIN_NAME = re.compile(r"[\w.+=@ -]+(/[\w.+=@ -]+)*")


@dataclass(frozen=True)
class Source:
    """A checkpoint that can be compressed.

    Attributes:
        model: the directory, Hub id or URL as the user gave it.
        revision: commit of a Hub model; None for any other.
        directory: local directory with config.json and, where the tensors are here too, all files
            of the checkpoint.
        index: its tensors.
        config: its config, as Transformers understands it.
        config_json: its config.json as it stands in the file.
        given: its architecture where it was told, by the user or by an earlier call of a run.
        quantization: how it is quantized; `index`, `config` and `config_json` are those of the
            dense model that it stands for.
    """

    model: str
    revision: str | None
    directory: Path
    index: ShardIndex
    config: PretrainedConfig
    config_json: dict[str, Any]
    given: Architecture | Structure | None = None
    quantization: dict[str, Any] | None = None

    @cached_property
    def architecture(self) -> Architecture | Structure:
        """How its weights divide into slices.

        Raises:
            LestdError: see `orchestrator.architectures.find_architecture`.
        """
        return self.given or find_architecture(self.config, self.index)

    def groups(self, scope: str) -> list[SliceGroup]:
        """The blocks in scope, by layer, found in the checkpoint and checked.

        Args:
            scope: one of `orchestrator.architectures.SCOPES`.

        Raises:
            LestdError: see `Architecture.groups`; or a given architecture is not the model's.
        """
        found = self.architecture.groups(self.config, self.index, scope)
        if self.given is not None:
            from orchestrator.architectures.given import require_modules  # Imports the modules.

            require_modules(found, self.config, self.index)
        return found

    def fetch_side_files(self) -> Path:
        """A local directory with the files beside the weights (see
        `orchestrator.source.side_files`).

        Raises:
            LestdError: the model lies elsewhere, and they cannot be fetched.
        """
        url = self.index.location
        if self.revision is not None and is_url(url):
            names = list_repository(self.model, self.revision)
            if names is None:
                raise LestdError(
                    f"the Hub cannot be reached for the tokenizer and other files of {self.model}; "
                    "check the connection, and run the same command again to continue"
                )
            return fetch_side_files(names, partial(download, self.model, self.revision))
        if is_url(url):
            fetch = partial(fetch_files, url, directory=self.directory)
            return fetch_side_files(set(list_tree(as_source(url), is_side_folder)), fetch)
        return self.directory


def resolve_source(
    model: str, revision: str | None = None, architecture: Path | None = None
) -> Source:
    """Find a checkpoint; of one elsewhere that is not in the local cache, read the headers.

    Args:
        model: directory, Hub id or URL.
        revision: of a Hub model.
        architecture: a file that describes it, in place of its family's (the user's own goes
            before lestd's) or of what is found.

    Raises:
        LestdError: it cannot be found, is pickled, is quantized in a way that cannot be read, is
            damaged, or belongs to an unknown family.
    """
    if architecture is not None:
        given = read_architecture(architecture)
        return replace(_find(model, revision), given=given)
    source = _find(model, revision)
    file = user_file(source.config.model_type)
    return source if file is None else replace(source, given=read_architecture(file))


def _find(model: str, revision: str | None) -> Source:
    local = local_directory(model, revision)
    if local is not None:
        return _open_directory(model, None, local)
    url = store_url(model, revision)
    if url is not None:
        return _open_store(url)
    model, revision = hub_id(model, revision)
    names = list_repository(model, revision)
    if names is None:  # The Hub cannot be reached.
        cached = find_cached(model, revision, CONFIG_FILE)
        _require_cached_weights(model, cached)
        return _open_directory(model, cached.name, cached)
    _require_config(model, names)
    # The revision is the user's, not its commit: so the cache learns what it stands for.
    directory = download(model, revision, {CONFIG_FILE, INDEX_FILE} & names)
    commit = directory.name
    weight_map = _check_before_weights(model, directory, names)
    shards = set(weight_map.values()) or {WEIGHTS_FILE}
    if absent := sorted(shards - names):
        raise LestdError(
            f"{model} has no file {absent[0]}, but its {INDEX_FILE} names it; report it to the "
            "publisher, or choose another --revision"
        )
    if are_cached(model, commit, shards):
        directory = fetch_side_files(names, partial(download, model, commit))
        return _open_directory(model, commit, directory)
    index = ShardIndex.from_url(f"{HUB_SCHEME}{model}@{commit}", weight_map)
    return _source(model, commit, directory, index)


def _require_cached_weights(model: str, snapshot: Path) -> None:
    """Refuse a snapshot of which lestd itself has downloaded no more than config and index."""
    shards = {WEIGHTS_FILE}
    if (snapshot / INDEX_FILE).is_file() and not (snapshot / WEIGHTS_FILE).is_file():
        shards = set(read_weight_map(snapshot / INDEX_FILE).values())
    pickled = any((snapshot / name).is_file() for name in (BIN_FILE, BIN_INDEX_FILE))
    if not pickled and not all((snapshot / shard).is_file() for shard in shards):
        raise LestdError(
            f"the Hub cannot be reached and the local cache lacks {model}'s weights; check the "
            "connection and HF_HUB_OFFLINE, or hf download it first"
        )


def _open_store(url: str) -> Source:
    """A model in a directory of a store."""
    names = set(list_files(as_source(url)))
    if not names:
        raise LestdError(
            f"{url} does not exist, or holds no file; check the spelling, and that endpoint and "
            "credentials are those of its store"
        )
    _require_config(url, names)
    scratch = tempfile.mkdtemp(prefix="lestd-")
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    directory = Path(scratch) / (url.rpartition("/")[2] or "model")
    directory.mkdir()
    fetch_files(url, {CONFIG_FILE, INDEX_FILE} & names, directory)
    weight_map = _check_before_weights(url, directory, names)
    index = ShardIndex.from_url(url, weight_map)
    return _source(url, None, directory, index)


def _require_config(model: str, names: set[str]) -> None:
    if CONFIG_FILE not in names:
        raise LestdError(f"{model} has no {CONFIG_FILE}, so it is not a Transformers model")


def _check_before_weights(model: str, directory: Path, names: set[str]) -> dict[str, str]:
    """Refuse what config and index rule out before anything larger follows.

    Returns:
        Tensor name -> shard; empty for a single file.
    """
    _check_config(model, read_config_json(directory))
    check_not_pickled(model, names)
    if WEIGHTS_FILE in names:
        return {}
    weight_map = read_weight_map(directory / INDEX_FILE)
    for shard in sorted(set(weight_map.values())):
        if not _PLAIN_NAME.fullmatch(shard):
            raise LestdError(
                f"{INDEX_FILE} of {model} names the shard {shard!r}, which has characters that "
                "mean something in a URL; rename the shard"
            )
    return weight_map


def check_pointers(directory: Path) -> None:
    """Refuse git-LFS pointers in the place of config, index, tokenizer and what else is needed.

    Those of shards are met where their headers are read.

    Raises:
        LestdError: one is there.
    """
    if directory.is_dir():
        indexes = (INDEX_FILE, BIN_INDEX_FILE)
        require_content(directory, (name for name in indexes if (directory / name).is_file()))
        find_side_files(directory)


def _open_directory(model: str, commit: str | None, directory: Path) -> Source:
    check_pointers(directory)
    _check_config(model, read_config_json(directory))
    check_not_pickled(model, {path.name for path in directory.iterdir()})
    return _source(model, commit, directory, ShardIndex.from_directory(directory))


def _source(model: str, commit: str | None, directory: Path, index: ShardIndex) -> Source:
    """A checkpoint whose config.json has been checked; a quantized one as a dense one."""
    config_json, config = read_config_json(directory), load_config(directory, index)
    quantization = quantization_of(config_json)
    if quantization is not None:
        config_json = without_quantization(config_json)
        for part in (config, config.get_text_config(decoder=True)):
            part.__dict__.pop(KEY, None)
        index = as_dense(index, quantization, config.get_text_config(decoder=True).dtype)
    return Source(model, commit, directory, index, config, config_json, quantization=quantization)


def check_not_pickled(model: str, names: set[str]) -> None:
    """Refuse a directory or repository without a safetensors checkpoint.

    Raises:
        LestdError: weights are pickled (says how to convert them), or there are none.
    """
    if {WEIGHTS_FILE, INDEX_FILE} & names:
        return
    if convertible := sorted({BIN_FILE, BIN_INDEX_FILE} & names):
        directory = Path(model).resolve()  # The model may be called "." or "..".
        out = f"{directory.name}-safetensors"
        if directory == Path.cwd():
            out = f"../{out}"  # Beside the model, not in it.
        what = "COPY_OF_IT_HERE" if is_url(model) else shlex.quote(model)
        raise LestdError(
            f"{model} has only pickled weights ({convertible[0]}), which could run code when "
            "loaded; rewrite them first, without running any: "
            f"lestd convert {what} {shlex.quote(out)}"
        )
    if pickled := sorted(name for name in names if name.endswith(_PICKLE_SUFFIXES)):
        raise LestdError(
            f"{model} has no safetensors weights, only pickled files ({pickled[0]}), which are "
            f"never loaded and which lestd convert cannot rewrite (it reads {BIN_FILE}, or "
            f"{BIN_INDEX_FILE} and its shards); get the model as safetensors"
        )
    if gguf := sorted(name for name in names if name.endswith(".gguf")):
        raise LestdError(
            f"{model} has its weights in {gguf[0]}, and GGUF is not read; get the safetensors "
            "model that it was made from, which the model card names"
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
        config = parse_json(read_regular(path))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise LestdError(
            f"{directory} has no {CONFIG_FILE}; expected the directory of a Transformers model "
            "(one that was cloned from the Hub is whole after `git lfs pull`)"
        ) from error
    except OSError as error:
        raise LestdError(
            f"{path} cannot be read ({error.strerror}); check the file and its permissions"
        ) from error
    except ValueError as error:
        raise LestdError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(config, dict):
        raise LestdError(f"{path} must hold a JSON object; download it again")
    return config


def _check_config(model: str, config_json: dict[str, Any]) -> None:
    quantization = quantization_of(config_json)
    if quantization and not is_readable(quantization):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        if method == "lestd":
            raise LestdError(f"{model} is already compressed by LeSTD; start from its source model")
        raise LestdError(
            f"{model} is already quantized (quant_method {method!r} in {CONFIG_FILE}), and lestd "
            f"dequantizes {READABLE} alone; start from the BF16, F16 or F32 model it was made from"
        )
    check_family(config_json.get("model_type"))


def load_config(directory: Path, index: ShardIndex | None = None) -> PretrainedConfig:
    """Read config.json as Transformers understands it; no code of the model is run.

    Args:
        directory: where it lies.
        index: the model's tensors, where they lie elsewhere.

    Raises:
        LestdError: Transformers does not accept it, or it counts more layers, heads or experts
            than the tensors have room for.
    """
    config_json = read_config_json(directory)
    check_counts(
        directory / CONFIG_FILE, config_json, lambda: index or ShardIndex.from_directory(directory)
    )
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
    quantization = getattr(config, "quantization_config", None)
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if quantization is not None and not isinstance(method, str):
        raise LestdError(
            f"{directory / CONFIG_FILE} has a quantization_config without the name of a "
            "quant_method; copy the model again from where it was made"
        )
    return config
