# Two commands: `make serve` and `make test`. Everything else is a convenience.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := models/smollm2-135m-instruct
PORT ?= 8088

.PHONY: serve test test-api test-gpu test-chaos lint bench clean help

help:
	@echo "make serve       the whole farm on this machine, with the demo model, on port $(PORT)"
	@echo "make test        linters, type checks and the test suite"
	@echo "make bench       figures of the farm on this machine, to bench/results/"
	@echo "make test-chaos  the long fault-injection suite"
	@echo "make test-api    other people's clients, and a fuzzer on the HTTP schema"
	@echo "make test-gpu    kernels and engine on the GPU of this machine"

# torch goes first and by pip: on a CPU machine that keeps CUDA out, on a GPU machine the same pin brings it in.
$(VENV)/.serve: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[embedded,demo]'
	touch $@

# A CUDA build of torch brings the Triton that it goes with; without one, Triton is there to interpret and to compile kernels.
$(VENV)/.dev: $(VENV)/.serve
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install --quiet 'triton==3.6.*'
	touch $@

$(MODEL)/config.json: | $(VENV)/.serve
	$(BIN)/tokenmill model fetch-demo --dest $(MODEL)

serve: $(VENV)/.serve $(MODEL)/config.json
	exec $(BIN)/tokenmill serve --model_dir $(MODEL) --model_name smollm2-135m-instruct --port $(PORT)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# One thread: the tests' models are tiny, and several farms share the cores with them. Two processes, each with servers of its own.
test: $(VENV)/.dev lint $(MODEL)/config.json
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -m "not chaos and not gpu and not clients" -n 2 --dist loadfile

test-chaos: $(VENV)/.dev $(MODEL)/config.json
	$(BIN)/python -m pytest tests -m chaos

test-api: $(VENV)/.dev $(MODEL)/config.json
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,clients]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/clients
	test -x $(VENV)-litellm/bin/litellm || ($(PYTHON) -m venv $(VENV)-litellm && $(VENV)-litellm/bin/pip install --quiet litellm)
	TOKENMILL_CLIENTS_PYTHON=$(VENV)-litellm/bin/python OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/clients -k "litellm or held"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/system/test_api_schema.py -m chaos --timeout 1600

# Kernels compile for the GPU that is there; without one the target fails.
test-gpu: $(VENV)/.dev
	$(BIN)/python -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"'
	$(BIN)/python -m pytest tests/kernels tests/workers/test_kv_cache_cuda.py tests/workers/test_gpu_engine.py tests/workers/test_gpu_parallel.py \
		tests/workers/test_page_copier.py tests/workers/transfer/test_contract.py

bench: $(VENV)/.dev $(MODEL)/config.json
	$(BIN)/python -m bench.farm --model_dir $(MODEL)

clean:
	rm -rf $(VENV) $(VENV)-litellm state .pytest_cache .mypy_cache .ruff_cache
