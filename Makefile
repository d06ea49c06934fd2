# Everything runs in .venv, which these targets make.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BACKENDS ?= jax tensorflow torch
BIN := .venv/bin
export TF_CPP_MIN_LOG_LEVEL := 3
export UV_COMPILE_BYTECODE := 1

.PHONY: demo figure test test-slow lint bench-smoke bench-speed bench-speed-all \
	format fresh clean

# What JAX has compiled once, it reads from there the next time.
demo figure: export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.venv/jax_cache

demo: .venv/.demo  ## install, then distil the digits into demo/
	KERAS_BACKEND=jax $(BIN)/python examples/digits.py

figure: .venv/.demo  ## the paper's figure 1, into demo/two_modes/
	KERAS_BACKEND=jax $(BIN)/python examples/two_modes.py

# In two parts, because TensorFlow keeps all that it has traced.
PARTS := tests/models --ignore=tests/models
test: .venv/.dev  ## every test on every backend; what can't differ, on one
	@set -e; tests='not slow'; for backend in $(BACKENDS); do \
		for part in $(PARTS); do \
			echo "== tests on $$backend: $$part"; \
			KERAS_BACKEND=$$backend $(BIN)/pytest -n 2 --dist loadfile \
				-m "$$tests" $$part; \
		done; \
		tests='not slow and not once'; \
	done

test-slow: .venv/.dev  ## the long ones: kills at random, many devices
	@set -e; for backend in $(BACKENDS); do \
		echo "== slow tests on $$backend"; \
		KERAS_BACKEND=$$backend $(BIN)/pytest -n 0 -m slow; \
	done

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench-smoke: .venv/.dev  ## the guard: a student's quality, against its figure
	KERAS_BACKEND=jax $(BIN)/python -m benchmarks.smoke

bench-speed: .venv/.dev  ## the guard: ratios of speed, against their bounds
	$(BIN)/python -m benchmarks.speed --check

bench-speed-all: .venv/.bench  ## every number of benchmarks/speed/table.md
	$(BIN)/python -m benchmarks.speed

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

fresh:  ## demo and tests from a fresh clone in an empty directory
	dir=$$(mktemp -d) && git clone -q . $$dir/keras_mscm && \
		$(MAKE) -C $$dir/keras_mscm demo lint test && rm -rf $$dir

clean:
	rm -rf .venv

.venv/.demo: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q uv
	$(BIN)/uv pip install -q --python $(BIN)/python -e '.[jax,examples]'
	touch $@

# PyTorch by pip, which takes a CPU build where one is configured. What the
# metrics are compared with asks for torchvision, which has none, and would bring
# another PyTorch; what the adapters are tested on asks for tensorflow-text, and
# would bring another TensorFlow: so without dependencies.
PEERS = torchmetrics==1.9.0 torch-fidelity==0.4.0 clean-fid==0.1.35 \
	lightning-utilities==0.15.3 \
	diffusers==0.42.1 keras-cv==0.9.0 keras-hub==0.32.0
.venv/.dev: .venv/.demo
	$(BIN)/uv pip install -q --python $(BIN)/python -e '.[dev]'
	$(BIN)/python -m pip install -q '$(TORCH)'
	$(BIN)/uv pip install -q --python $(BIN)/python --no-deps $(PEERS)
	touch $@

# What speed is compared with, besides; without torchvision, which it asks for.
.venv/.bench: .venv/.dev
	$(BIN)/python -m pip install -q --no-deps denoising-diffusion-pytorch
	$(BIN)/uv pip install -q --python $(BIN)/python einops
	touch $@
