"""The house's rules: imports run downwards, heavy things are imported where they are needed."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.children import run_each

ROOT = Path(__file__).parents[1]
HOUSE = ("orchestrator", "workers", "lestd_kernels")
FILES = [path.relative_to(ROOT) for package in HOUSE for path in (ROOT / package).rglob("*.py")]
# Extras, each in files of its own that only those who need it import.
EXTRAS = {
    Path("lestd_kernels/peft_plugin.py"): {"peft"},
    Path("lestd_kernels/vllm_plugin.py"): {"vllm"},
    Path("workers/evaluation/lm_eval.py"): {"lm_eval", "numpy"},
    Path("workers/evaluation/lm_eval_tasks.py"): {"datasets", "lm_eval", "numpy", "tqdm"},
}
RAY = Path("orchestrator/execution/ray")  # the only place that imports ray
ABOVE = {"orchestrator": (), "workers": ("orchestrator",), "lestd_kernels": HOUSE[:2]}
ALLOWED = {
    "workers": {
        "accelerate",
        "fsspec",
        "huggingface_hub",
        "torch",
        "transformers",
        "upath",
        "workers",
        "lestd_kernels",
    },
    "lestd_kernels": {
        "torch",
        "transformers",
        "safetensors",
        "tensorly",
        "triton",
        "lestd_kernels",
    },
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


@pytest.mark.parametrize("package", HOUSE)
def test_imports_run_downwards(package: str) -> None:
    for path in (path for path in FILES if path.parts[0] == package):
        found = imports(path)
        assert not found & set(ABOVE[package]), path
        if package in ALLOWED:
            allowed = ALLOWED[package] | EXTRAS.get(path, set())
            assert found - set(sys.stdlib_module_names) <= allowed, path
        if RAY not in path.parents:
            assert "ray" not in found, path


HEAVY = ("ray", "torch", "transformers", "tensorly", "pyarrow", "duckdb", "pydantic", "typer")


def loaded(code: str, *names: str) -> set[str]:
    """Which of these packages a fresh Python has imported after some code."""
    code += f"\nimport sys; print([name for name in {names} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(ast.literal_eval(run.stdout))


def test_loading_a_model_needs_no_orchestration() -> None:
    found = loaded("import lestd_kernels.transformers_plugin", *HEAVY, "orchestrator", "workers")
    # transformers itself imports pydantic.
    assert {"torch", "transformers"} <= found <= {"torch", "transformers", "pydantic"}


def test_a_command_starts_without_what_it_does_not_need() -> None:
    """Importing torch and transformers takes seconds, for which a query would wait."""
    assert loaded("import orchestrator.cli", *HEAVY) == {"typer"}
    assert loaded("import orchestrator.query.sql", *HEAVY) == {"pyarrow", "duckdb"}


FIRST = (
    "import lestd_kernels, transformers.quantizers.auto",
    "import transformers.quantizers.auto, lestd_kernels",
    "import lestd_kernels.transformers_plugin",
    "import lestd_kernels.formats; from transformers import AutoModelForCausalLM as Auto; Auto",
)
MAPPED = """
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as mapping
assert "lestd" in mapping
"""


def test_the_format_is_registered_whatever_is_imported_first() -> None:
    statuses, errors = run_each(*(f"{first}\n{MAPPED}" for first in FIRST))
    assert dict(zip(FIRST, statuses, strict=True)) == dict.fromkeys(FIRST, 0), errors


def test_the_tests_of_the_promises_exist() -> None:
    """In docs/security.md ``::test`` is one of the file that was named last."""
    text = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    source, named = "", 0
    for file, test in re.findall(r"((?:fuzz/)?test_\w+\.py)|::(test_\w+)", text):
        if file:
            [path] = (ROOT / "tests").rglob(file)
            source = path.read_text(encoding="utf-8")
        else:
            assert f"def {test}(" in source, test
            named += 1
    assert named > 20
