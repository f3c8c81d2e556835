"""The README.md of a compressed model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.repocard import REGEX_YAML_BLOCK

from lestd_kernels.storage.few_bits import FULL_BITS
from orchestrator.config.yaml_text import parse_yaml
from orchestrator.console import logs
from orchestrator.console.markdown import template
from orchestrator.manifest.result_rows import total_expected_loss, total_memory_bytes
from orchestrator.planning.plan import Plan
from orchestrator.source.checkpoint import Source
from workers.storage.files import AnyPath, list_files
from workers.storage.untrusted_files import read_regular

CARD_FILE = "README.md"
_KEPT = ("license", "license_name", "license_link", "language", "datasets", "pipeline_tag")


def model_card(
    source: Source, plan: Plan, rows: Sequence[dict[str, Any]], directory: AnyPath
) -> str:
    """The model's README.md: source, method, sizes, and how to load it."""
    return template("model/model_card.md.jinja").render(
        # A path of this machine is nobody else's business; a Hub id is a name.
        name=source.model if source.revision else source.directory.name,
        source=source,
        plan=plan,
        rows=rows,
        method=rows[0]["method"],
        pattern=rows[0]["pattern"],
        metric=" or ".join(sorted({row["metric"] for row in rows})),
        value_bits=_value_bits(rows),
        factor_bits=rows[0]["factor_bits"],
        expected_loss=total_expected_loss(rows),
        scopes=sorted({row["scope"] for row in rows}),
        metadata=card_metadata(source.directory),
        memory_bytes=total_memory_bytes(rows),
        stored_bytes=sum(row["stored_bytes"] for row in rows),
        file_bytes=sum(
            size for name, size in list_files(directory).items() if name.endswith(".safetensors")
        ),
    )


def _value_bits(rows: Sequence[dict[str, Any]]) -> str | None:
    """Bits of the values, such as "4" or "2 to 8"; None where they are coded."""
    bits = {row["value_bits"] for row in rows}
    for described in (json.loads(row["format"]) for row in rows):
        modules = described["modules"].values() if described["kind"] == "chain" else ()
        bits |= {
            one["own"][0].get("value_bits", FULL_BITS) for one in modules if len(one["own"]) == 1
        }
    if None in bits:
        return None
    return f"{min(bits)} to {max(bits)}" if len(bits) > 1 else str(min(bits))


def card_metadata(directory: Path) -> dict[str, Any]:
    """Licence and language from the source's model card, if it has one; they bind ours too."""
    card = directory / CARD_FILE
    if not card.is_file():
        return {}
    try:
        text = read_regular(card).decode("utf-8-sig", errors="replace")
    except OSError as error:
        return _left_out(card, error.strerror)
    block = REGEX_YAML_BLOCK.search(text)  # What the Hub takes for its front matter.
    if block is None:
        return {}
    try:
        metadata = parse_yaml(block.group(2), texts=True)
    except ValueError as error:
        return _left_out(card, error)
    if not isinstance(metadata, dict):
        return {}
    return {key: metadata[key] for key in _KEPT if _is_said(metadata.get(key))}


def _is_said(value: Any) -> bool:
    """Whether this is a text, or a list of them."""
    texts = value if isinstance(value, list) else [value]
    return all(isinstance(text, str) and text for text in texts)


def _left_out(card: Path, why: object) -> dict[str, Any]:
    logs.log("message", f"the front matter of {card} is left out of the model's card: {why}")
    return {}
