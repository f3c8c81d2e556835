"""Untrusted YAML: run.yaml, cluster.yaml, the front matter of a model card.

The one loader of the tree. It refuses what makes a small text cost without bound or mean what it
does not show: aliases, of which a few lines expand to more than any memory, and keys named twice.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from lestd_kernels.errors import first_line

MAX_CHARACTERS = 2**18
"""Of a text that is parsed; it takes seconds."""


class _Texts(yaml.BaseLoader):
    """Every scalar is the text that stands there: ``no`` is a language, not false."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases are not allowed", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if (name := (key.tag, str(key.value))) in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value!r} is named twice", problem_mark=key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


class _Typed(_Texts, yaml.SafeLoader):
    """Numbers, booleans, dates, ... and nothing that runs code."""


# PyYAML's numbers with an exponent need a point and a sign.
_Typed.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), "-+0123456789"
)


def parse_yaml(text: str, *, texts: bool = False) -> Any:
    """The value of a YAML text.

    Args:
        text: the YAML.
        texts: leave every scalar the text that it is.

    Raises:
        ValueError: it is not YAML, has aliases or keys that are named twice, or is too long; the
            message says where.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"longer than {MAX_CHARACTERS} characters")
    try:
        return yaml.load(text, _Texts if texts else _Typed)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{error.problem}{where}") from error
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError) as error:
        # A value that is not what its explicit tag says fails in the constructor of its type.
        raise ValueError(first_line(error)) from error
