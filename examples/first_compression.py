"""A first compression: plan it, do it, see what it cost, load it.

python examples/first_compression.py [DIRECTORY]
"""

from __future__ import annotations

import sys
from pathlib import Path

import lestd

EXAMPLE = Path(__file__).parent / "tiny-llama-wikitext2"


def main() -> None:
    """Compress the attention of a small, really trained Llama to 0.6 of its bytes."""
    model = EXAMPLE / "model"
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "examples-out") / "small"

    plan = lestd.plan(model, keep=0.6)
    print(f"planned: {len(plan.tasks)} blocks, at most {plan.budget_bytes:,} bytes")

    outcome = lestd.compress(model, out, keep=0.6, executor="serial")
    assert outcome.complete, outcome.failures

    text = EXAMPLE / "wikitext-2-test.txt"
    found = lestd.evaluate(out, against=model, text=text, max_windows=8, executor="serial")
    for name, one in zip(("dense", "compressed"), found.perplexities, strict=True):
        print(f"perplexity, {name}: {one.token_perplexity:.2f}")

    small, tokenizer = lestd.load(out)
    asked = tokenizer("The city of", return_tensors="pt")
    answer = small.generate(**asked, max_new_tokens=20, do_sample=False)
    print(tokenizer.decode(answer[0]))


if __name__ == "__main__":
    main()
