"""Where the parameters of a model lie in its checkpoint, as Transformers' own loader finds them.

The loader renames each tensor of the checkpoint, and joins or splits some (Transformers'
`core_model_loading`); the same steps are taken here, with names alone. They are private to the
library: what comes of them is checked against the headers before any work (`find_weights`), so a
change there is refused and not misread.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

# Ends of the names that a compressed module's tensors have (lestd_kernels.formats).
_ENDS = ("weight", "nnz", "side.weight", "m1.weight")


@dataclass(frozen=True)
class StoredParameter:
    """Where a parameter lies.

    Attributes:
        tensors: of the checkpoint; several for one that is joined of many: for each of its parts
            one tensor for every expert, or one that stacks those of all.
        part: ``(k, n)`` where the tensor is that of n parameters, of which this is the k-th.
        transposed: whether a tensor has the last two axes of the parameter exchanged; None while
            that is left to the shapes.
    """

    tensors: tuple[tuple[str, ...], ...]
    part: tuple[int, int] = (0, 1)
    transposed: bool | None = False

    @property
    def name(self) -> str | None:
        """Of the tensor that is the parameter, if one is, as it is."""
        whole = len(self.tensors) == 1 and len(self.tensors[0]) == 1 and self.part == (0, 1)
        return self.tensors[0][0] if whole and not self.transposed else None


class StoredNames:
    """The tensors of a checkpoint, by the parameters of the model that they are loaded into.

    Args:
        model: on any device.
        shapes: of the tensors, by name.
    """

    def __init__(self, model: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._prefix = model.base_model_prefix
        self._state = {name: tuple(one.shape) for name, one in model.state_dict().items()}
        every = get_model_conversion_mapping(model)
        self._renamings = [one for one in every if isinstance(one, WeightRenaming)]
        self._joining = [one for one in every if isinstance(one, WeightConverter)]
        by_parameter: dict[str, dict[str, list[str]]] = {}
        converters: dict[str, Any] = {}
        known = {pattern: one for one in self._joining for pattern in one.source_patterns}
        for name in sorted(shapes, key=dot_natural_key):
            found, pattern = rename_source_key(
                name, self._renamings, self._joining, self._prefix, self._state
            )
            if found not in self._state and name in self._state:
                found, pattern = rename_source_key(name, [], [], self._prefix, self._state)
            by_parameter.setdefault(found, {}).setdefault(pattern or "", []).append(name)
            if pattern is not None:
                converters[found] = known[pattern]
        self._found: dict[str, StoredParameter] = {}
        for parameter, tensors in by_parameter.items():
            converter = converters.get(parameter)
            if converter is None:
                self._found[parameter] = StoredParameter(tuple(map(tuple, tensors.values())))
            else:
                self._found |= _converted(parameter, tensors, converter)
        for parameter, stored in self._found.items():
            # Whether a transposition is due is decided by the shapes, where it may be done before.
            if stored.transposed is None:
                same = shapes[stored.tensors[0][0]] == self._state.get(parameter)
                self._found[parameter] = replace(stored, transposed=not same)

    def of(self, parameter: str) -> StoredParameter | None:
        """Where a parameter lies; None where the checkpoint lacks it, or joins it in a way that
        is not known here."""
        return self._found.get(parameter)

    def lands(self, stored: str, module: str) -> bool:
        """Whether a compressed module's tensors, stored below `stored`, reach `module`."""
        prefix = f"{self._prefix}."
        for end in _ENDS:
            found, pattern = rename_source_key(f"{stored}.{end}", self._renamings, self._joining)
            right = found.removeprefix(prefix) == f"{module}.{end}".removeprefix(prefix)
            if pattern is not None or not right:
                return False
        return True


def _converted(
    parameter: str, tensors: dict[str, list[str]], converter: Any
) -> dict[str, StoredParameter]:
    """Parameters that the loader makes by a converter, of those kinds that are known here."""
    kinds = [type(one) for one in converter.operations]
    parts = tuple(tuple(tensors.get(p, ())) for p in converter.source_patterns)
    targets = converter.target_patterns
    complete = all(parts) and len({len(part) for part in parts}) == 1
    if not complete:
        return {}
    joined = [MergeModulelist, Concatenate] if len(parts) > 1 else [MergeModulelist]
    if kinds == joined and len(targets) == 1:
        merge, *concatenate = converter.operations
        if merge.dim == 0 and all(one.dim == 1 for one in concatenate):
            return {parameter: StoredParameter(parts)}
    # Tensors that stack the matrices of all experts, one for each of the parts.
    stacks = kinds == [Concatenate] and all(len(part) == 1 for part in parts)
    if stacks and len(targets) == 1 and converter.operations[0].dim == 1:
        return {parameter: StoredParameter(parts)}
    if len(parts) > 1 or len(parts[0]) > 1:
        return {}
    if kinds == [Chunk] and converter.operations[0].dim == 0:
        count = len(targets)
        return {
            parameter.replace(targets[0], target): StoredParameter(parts, (k, count))
            for k, target in enumerate(targets)
        }
    if kinds == [Transpose] and len(targets) == 1:
        [transpose] = converter.operations
        if {transpose.dim0, transpose.dim1} in ({1, 2}, {-1, -2}):
            flipped = None if transpose.check_dims else True
            return {parameter: StoredParameter(parts, transposed=flipped)}
    return {}
