"""The command families: which models can be compressed, and what of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lestd_kernels.errors import LestdError
from orchestrator.cli.application import app
from orchestrator.cli.options import Json, absolute, output_option
from orchestrator.console import output
from orchestrator.console.markdown import cell

if TYPE_CHECKING:
    from orchestrator.architectures.coverage import Coverage

_COLUMNS = ("family", "known by", "layers with heads", "matrices covered", "why not all")
_HEAD = """\
# Families

<!-- made by: lestd families --markdown docs/families.md -->

Which models LeSTD compresses, and what of each. `lestd plan MODEL` says the same of a model.

- **known by** its own *file* in `orchestrator/architectures`, by what its *modules* show, by a file
  of [yours](running.md#where-the-weights-are), or *refused*: plan says why. *Untried* are families
  of which there is no tiny model to tell by.
- **layers with heads**: share of the decoder layers in which the methods that work by heads
  (`--scope attention`) find a block. The others have attention of another kind.
- **matrices covered**: share of the matrix elements of the decoder layers that `--scope all`
  compresses with a method that stores every matrix on its own: svd, svd_llm, asvd, laser, tt, rtn,
  gptq, watersic, sparsegpt, wanda, magnitude, auto. The others leave out what belongs to no block.

Of tiny models of Transformers {version}; `tests/end_to_end/test_every_family.py` compresses each of
them, loads the result in a fresh process, and compares logits and tokens with its dense export.
Of {families} families {compressed} have what can be compressed, {most} of them 95% or more of their
matrices; {refused} are refused, {untried} untried.

"""
_MOST = 0.95


@app.command(rich_help_panel="Compress a model")
def families(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Families, as model_type of config.json calls them; else all."),
    ] = None,
    markdown: Annotated[
        Path | None, output_option(help="Write the table to FILE.md, too.", callback=absolute)
    ] = None,
    json: Json = False,
) -> None:
    """Show which families of models are known, and what of each stays dense. Takes a minute."""
    from orchestrator.architectures.coverage import coverage, decoder_families
    from orchestrator.console.progress_bar import Meter
    from workers.storage.files import atomic_write

    known = decoder_families()
    if unknown := sorted(set(names or ()) - set(known)):
        raise LestdError(
            f"Transformers has no decoder of the family {unknown[0]!r}; lestd families without a "
            "name lists all that it has"
        )
    found = []
    with Meter("families", "families") as meter:
        chosen = names or known
        for number, name in enumerate(chosen, start=1):
            found.append(coverage(name))
            meter.update(number, len(chosen))
    decoders = [one for one in found if one is not None]
    if markdown is not None:
        text = _as_markdown(decoders)
        atomic_write(markdown, lambda file: file.write(text.encode()))
    if json:
        output.print_json({"families": [asdict(one) for one in decoders]})
        return
    output.print_table("families", _COLUMNS, [_row(one) for one in decoders])


def _row(one: Coverage) -> list[str]:
    """The cells of one family."""
    if one.known in ("refused", "untried"):
        return [one.family, _known(one), "", "", "; ".join(one.why)]
    shares = [f"{share:.0%}" if share else "none" for share in (one.attention, one.covered)]
    return [one.family, _known(one), *shares, "; ".join(one.why)]


def _known(one: Coverage) -> str:
    """By what a family is known; the user's file with its path, also where it is refused."""
    known = "" if one.known == "yours" else f", {one.known}"
    return one.known if one.file is None else f"your file {one.file}{known}"


def _as_markdown(found: Sequence[Coverage]) -> str:
    """The page docs/families.md."""
    import transformers

    lines = [f"| {' | '.join(_COLUMNS)} |", "|---|---|---|---|---|"]
    for one in found:
        name, *rest = map(cell, _row(one))
        lines.append(f"| `{name}` | {' | '.join(rest)} |")
    refused, untried = (sum(one.known == it for one in found) for it in ("refused", "untried"))
    head = _HEAD.format(
        version=transformers.__version__,
        families=len(found),
        compressed=len(found) - refused - untried,
        most=sum(one.covered >= _MOST for one in found),
        refused=refused,
        untried=untried,
    )
    return head + "\n".join(lines) + "\n"
