# Two commands on a fresh machine: `make demo` and `make test`. Both set up all they need in .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3 || command -v python)
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-fast lint bad-inputs soak train-demo bench-gpu clean

$(VENV)/ready: pyproject.toml requirements.txt constraints-test.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints-test.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/ready
	mkdir -p out
	$(BIN)/context-forcing generate workflows/stories/minute.yaml --output out/minute.mp4 --report out/minute-memory.png

# A file of tests stays in one process: its tests share a server or a trained network.
test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test-fast: $(VENV)/ready
	$(BIN)/python -m pytest -m "not slow and not host"

# The long form of the fault drills, then half an hour of video: hours. SOAK is the number of rounds of a drill.
soak: $(VENV)/ready
	SOAK=$${SOAK:-25} OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s tests/faults tests/nodes/test_interrupts.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/soak.py out/soak

# The long form of the drill of tests/bad_input, 10,000 inputs and more.
bad-inputs: $(VENV)/ready
	BAD_INPUTS=18 $(BIN)/python -m pytest tests/bad_input

# The whole pipeline on the demo world, from nothing to a distilled student; docs/demo_student.md says how the shipped one was made.
train-demo: $(VENV)/ready
	CONTEXT_FORCING=$(BIN)/context-forcing scripts/train_demo.sh

# Speed, memory and drift on a CUDA device, and the tests that need one; docs/performance.md, Bench, says what is counted.
bench-gpu: $(VENV)/ready
	PYTHON=$(BIN)/python CONTEXT_FORCING=$(BIN)/context-forcing scripts/bench_gpu.sh

clean:
	rm -rf $(VENV) out runs build *.egg-info
