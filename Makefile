# Every target works on a fresh clone: whatever needs the environment makes it first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Config overrides, such as ARGS="model.name=minilm data.train_examples=5000".
ARGS   ?=

TRAIN = $(BIN)/python scripts/train_lora_hf.py --config configs/$(1).yaml $(ARGS)
EVAL  = $(BIN)/python scripts/eval_lora_hf.py --config configs/$(1).yaml $(ARGS)

# Without a hub or a GPU: the packaged encoder on local data.
LOCAL := mrpc-minilm-sgld sst2-minilm-sgld
EXPERIMENTS := sst2-bert-sgld sst2-roberta-sam-sgld mrpc-distilbert-asgld imdb-bert-sam-sgld-r1

.DEFAULT_GOAL := help
.PHONY: help setup demo verify lora-ensembling compare-sst2-bert compare-mrpc-minilm test test-all lint clean experiments-all eval-all \
	$(addprefix experiment-,$(EXPERIMENTS)) $(addprefix eval-,$(EXPERIMENTS)) $(addprefix experiment-,$(LOCAL)) $(addprefix eval-,$(LOCAL))

help: ## list the targets
	@grep -hE '^[a-zA-Z0-9_-]+:.*## ' $(MAKEFILE_LIST) | sort \
		| awk 'BEGIN {FS = ":.*## "} {printf "  %-36s %s\n", $$1, $$2}'

setup: $(STAMP) ## create .venv and install the project with all extras

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		-e '.[offline,dev]'
	@touch $(STAMP)

demo: setup ## the main job on the embedded task: fit, sample, evaluate (under 3 minutes)
	$(BIN)/bayesian-lora train configs/demo.yaml output.overwrite=true $(ARGS)

test: setup ## the quick tests
	$(BIN)/python -m pytest -q -n auto -m "not slow and not gpu" $(ARGS)

test-all: setup ## every test, slow statistical and real-data ones too (GPU ones skip without one)
	$(BIN)/python -m pytest -q -n auto $(ARGS)

lint: setup ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

experiment-sst2-bert-sgld: setup ## SST-2, BERT, SGLD
	$(call TRAIN,experiment_sst2_bert_sgld)

experiment-sst2-roberta-sam-sgld: setup ## SST-2, RoBERTa, SAM-SGLD
	$(call TRAIN,experiment_sst2_roberta_sam_sgld)

experiment-mrpc-distilbert-asgld: setup ## MRPC, DistilBERT, ASGLD
	$(call TRAIN,experiment_mrpc_distilbert_asgld)

experiment-imdb-bert-sam-sgld-r1: setup ## IMDB, BERT, SAM-SGLD rank-1
	$(call TRAIN,experiment_imdb_bert_sam_sgld_r1)

eval-sst2-bert-sgld: setup ## evaluate that experiment's ensemble
	$(call EVAL,experiment_sst2_bert_sgld)

eval-sst2-roberta-sam-sgld: setup ## evaluate that experiment's ensemble
	$(call EVAL,experiment_sst2_roberta_sam_sgld)

eval-mrpc-distilbert-asgld: setup ## evaluate that experiment's ensemble
	$(call EVAL,experiment_mrpc_distilbert_asgld)

eval-imdb-bert-sam-sgld-r1: setup ## evaluate that experiment's ensemble
	$(call EVAL,experiment_imdb_bert_sam_sgld_r1)

experiment-mrpc-minilm-sgld: setup ## MRPC, packaged encoder, SGLD (local data, no hub)
	$(call TRAIN,experiment_mrpc_minilm_sgld)

experiment-sst2-minilm-sgld: setup ## SST-2, packaged encoder, SGLD (local data, no hub)
	$(call TRAIN,experiment_sst2_minilm_sgld)

eval-mrpc-minilm-sgld: setup ## evaluate that experiment's ensemble
	$(call EVAL,experiment_mrpc_minilm_sgld)

eval-sst2-minilm-sgld: setup ## evaluate that experiment's ensemble
	$(call EVAL,experiment_sst2_minilm_sgld)

verify: setup ## measure every sampler against the law it claims (about a minute)
	$(BIN)/bayesian-lora verify $(ARGS)

compare-sst2-bert: setup ## the four seed samplers on SST-2 from one warm start, one table
	$(BIN)/bayesian-lora compare configs/experiment_comparison_sst2_bert.yaml $(ARGS)

compare-mrpc-minilm: setup ## all eight samplers on MRPC, packaged encoder (local data, no hub)
	$(BIN)/bayesian-lora compare configs/experiment_comparison_mrpc_minilm.yaml $(ARGS)

lora-ensembling: setup ## the LoRA-ensembling study: stacks, similarity, growth, gates, one report
	$(BIN)/bayesian-lora study configs/lora_ensembling/study.yaml $(ARGS)

experiments-all: $(addprefix experiment-,$(EXPERIMENTS)) ## all four experiments (make -k goes on after a failure)

eval-all: $(addprefix eval-,$(EXPERIMENTS)) ## evaluate all four

clean: ## remove caches; runs and .venv stay
	rm -rf .pytest_cache .ruff_cache .hypothesis dist
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
