"""A room imports only the rooms below it. One table, read top-down."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Lowest first. Rooms of one line know nothing of each other.
FLOORS = {
    "orchestrator": [
        {"console", "config", "architectures"},
        {"source", "tracking"},
        {"execution", "planning"},
        {"manifest"},
        {"run", "query"},
        {"model"},
        {"compression", "evaluation", "report"},
        {"recovery", "experiments", "audit", "serving", "api"},
        {"cli"},
        {"__main__"},
    ],
    "workers": [
        {"contracts", "storage"},
        {"checkpoint"},
        {"host"},
        {"decompose", "calibration", "evaluation"},
        {"audit", "bench", "recover"},
    ],
    "lestd_kernels": [
        {"errors", "tensorize", "options", "with_tensorly"},
        {"storage"},
        {"linalg", "formats", "backends"},
        {"search", "modules"},
        {"methods", "peft_plugin"},
        {"audit", "transformers_plugin"},
        {"registration"},
        {"vllm_plugin"},
    ],
}


@pytest.mark.parametrize("package", FLOORS)
def test_a_room_knows_only_those_below_it(package: str) -> None:
    floor = {room: number for number, rooms in enumerate(FLOORS[package]) for room in rooms}
    wrong = []
    for path in (ROOT / package).rglob("*.py"):
        here = path.relative_to(ROOT / package).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(package):
                names = (
                    [node.module]
                    if node.module != package
                    else [f"{package}.{a.name}" for a in node.names]
                )
                for name in names:
                    there = name.split(".")[1]
                    if there != here and here != "__init__" and floor[there] >= floor[here]:
                        wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)
