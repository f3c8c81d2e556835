"""Fingerprint of a run: holds a call to what an earlier one in the same directory began.

Finished work is never mixed with that of other settings. Where nothing is finished nothing binds:
a command that was refused is corrected and run again, and then is another run.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from lestd_kernels.errors import LestdError
from lestd_kernels.formats.shared_tucker import FORMAT_VERSION
from lestd_kernels.methods import CALIBRATED
from orchestrator.architectures import Structure, parse_architecture
from orchestrator.config.run import RunConfig
from orchestrator.console import logs
from orchestrator.planning.plan import calibration_digest
from orchestrator.source.checkpoint import Source
from workers.checkpoint.digests import sample_digests
from workers.host.devices import software_versions
from workers.storage.files import (
    AnyPath,
    list_names,
)

# What a calibration has before it has found anything.
_NO_WORK = {"calibration.json", "pieces"}


def require_same(
    recorded: dict[str, Any], current: dict[str, Any], where: AnyPath, moved: AnyPath | None = None
) -> None:
    """Refuse to go on with another configuration or source.

    `moved` is what starting over does not delete, and would meet again.

    Raises:
        LestdError: the fingerprints differ; the sentence names the fields.
    """
    if changes := differences(recorded, current):
        away = "" if moved is None else f", with {moved} moved away"
        raise LestdError(
            f"{where} belongs to a run that differs in: {'; '.join(changes)}; undo the change to "
            f"continue it, choose another --out, or start over with --fresh{away}"
        )


def starts_over(recorded: dict[str, Any], current: dict[str, Any], what: str) -> bool:
    """Whether a call differs from what was begun, of which nothing is finished; says so then.

    It may correct one that was refused, so it is not held to what that had.
    """
    changes = differences(recorded, current)
    if changes:
        logs.log(
            "message",
            f"{what} differs in: {'; '.join(changes)}; nothing of it was finished, so "
            "it is started over",
        )
    return bool(changes)


def holds_work(*folders: AnyPath) -> bool:
    """Whether there is more in one of these folders than a call leaves that was refused.

    Raises:
        LestdError: the object store that they lie in does not answer.
    """
    names = (name for folder in folders for name in list_names(folder))
    return any(name not in _NO_WORK and not name.startswith(".") for name in names)


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Paths of the values that differ, each with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(old.keys() | new.keys()):
            found += differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        return found
    return [] if old == new else [f"{path} (was {_short(old)}, is {_short(new)})"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def as_recorded(source: Source, recorded: dict[str, Any] | None) -> Source:
    """The source with the architecture that was found when the run began, if none is given now.

    Another version of Transformers may show another one.

    Raises:
        LestdError: what was recorded is not valid.
    """
    known = (recorded or {}).get("source", {})
    same = known.get("config.json") == source.config_json
    if source.given is not None or not same or "architecture" not in known:
        return source
    text = json.dumps(known["architecture"])
    return replace(source, given=parse_architecture(text, "the record of the run"))


def fingerprint(source: Source, config: RunConfig, device: str) -> dict[str, Any]:
    """Everything that decides the bytes of the result, as plain values.

    Not in it: paths, the executor, the number of workers. `device` is the class that ``auto``
    came to mean.
    """
    chosen = config.model_dump(mode="json")
    chosen |= {"device": device, "allocation": config.used_allocation, "metric": config.used_metric}
    if config.used_metric in CALIBRATED:
        chosen["calibrate_on"] = calibration_digest(config)
    else:  # A text that nothing is computed with, as a comparison gives to all of its methods.
        unused = ("calibrate_on", "samples", "sample_tokens", "gram_width")
        chosen |= {name: RunConfig.model_fields[name].default for name in unused}
    model = {"config.json": source.config_json, "shards": sample_digests(source.index)}
    if source.quantization is not None:
        model["quantization_config"] = source.quantization
    # What a family's own file says is of this version of lestd.
    if source.given is not None or isinstance(source.architecture, Structure):
        model["architecture"] = source.architecture.model_dump(mode="json")
    fields = {
        "format_version": FORMAT_VERSION,
        "config": chosen,
        "source": model,
        "versions": software_versions(),
    }
    # As it will be read back: tuples become lists, keys become strings.
    result: dict[str, Any] = json.loads(json.dumps(fields))
    return result
