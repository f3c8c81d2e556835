"""The house's rules: imports run downwards, heavy things are imported where they are needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOUSE = ("orchestrator", "workers", "lestd_kernels")
FILES = [path.relative_to(ROOT) for package in HOUSE for path in (ROOT / package).rglob("*.py")]
# Extras, each in files of its own that only those who need it import.
EXTRAS = {
    Path("lestd_kernels/peft_plugin.py"): {"peft"},
    Path("workers/judge.py"): {"lm_eval", "numpy"},
    Path("workers/judge_tasks.py"): {"datasets", "lm_eval", "numpy", "tqdm"},
}
RAY = {Path(f"orchestrator/{name}.py") for name in ("ray_executor", "submit", "metrics")}
ABOVE = {"orchestrator": (), "workers": ("orchestrator",), "lestd_kernels": HOUSE[:2]}
ALLOWED = {
    "workers": {
        "fsspec",
        "huggingface_hub",
        "torch",
        "transformers",
        "upath",
        "workers",
        "lestd_kernels",
    },
    "lestd_kernels": {"torch", "transformers", "safetensors", "triton", "lestd_kernels"},
}


def imports(path: Path) -> set[str]:
    """Top-level packages that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names.add((node.module or "").partition(".")[0])
    return names


def test_the_house_is_found() -> None:
    assert {path.parts[0] for path in FILES} == set(HOUSE)
    assert len(FILES) > 20


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_run_downwards(path: Path) -> None:
    package = path.parts[0]
    found = imports(path)
    assert not found & set(ABOVE[package])
    if package in ALLOWED:
        allowed = ALLOWED[package] | EXTRAS.get(path, set())
        assert found - set(sys.stdlib_module_names) <= allowed
    if path not in RAY:
        assert "ray" not in found


def test_loading_a_model_needs_no_orchestration() -> None:
    code = (
        "import sys, lestd_kernels\n"
        "heavy = {'ray', 'pyarrow', 'pydantic', 'typer', 'orchestrator', 'workers', 'tensorly'}\n"
        "print(sorted(heavy & {name.partition('.')[0] for name in sys.modules}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # transformers itself imports pydantic.
    assert set(ast.literal_eval(run.stdout)) <= {"pydantic"}
