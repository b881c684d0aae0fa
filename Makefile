# Two commands on a fresh machine: `make demo` and `make test`. Both set up all they need in .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3 || command -v python)
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-fast train-demo distill-demo clean

$(VENV)/ready: pyproject.toml requirements.txt constraints-test.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints-test.txt --editable '.[headless,train,test]'
	touch $@

demo: $(VENV)/ready
	mkdir -p out
	$(BIN)/context-forcing generate workflows/stories/minute.yaml --output out/minute.mp4 --report out/minute-memory.png

test: $(VENV)/ready
	$(BIN)/python -m pytest

test-fast: $(VENV)/ready
	$(BIN)/python -m pytest -m "not slow and not host"

# A codec and a student from nothing, in one run that was not tried to its end; README says how the shipped ones were made.
train-demo: $(VENV)/ready
	$(BIN)/context-forcing train vae --config demo
	$(BIN)/context-forcing train pretrain --config demo codec=runs/vae/demo_codec.safetensors

# The rest of the pipeline on the demo world, after train-demo's first student.
distill-demo: $(VENV)/ready
	$(BIN)/context-forcing train teacher --config demo
	$(BIN)/context-forcing train local --config demo
	$(BIN)/context-forcing train contextual --config demo

clean:
	rm -rf $(VENV) out runs build *.egg-info
