# make demo: train on the miniature and look at the result. make test: the test suite. Both need python3 and make alone.
# make test-lowest: fast tests with the lowest versions that requirements.txt allows, in an environment of its own.
# make fix-copies: copy what both scripts share from train_dopsd_lora.py into train_dopsd_full.py.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest
DEMO := outputs/demo
CONCEPT ?= arrow
# 4 pictures a step and 12 transformer passes a picture; SFT has 2 passes, so it gets 6 times the steps
STEPS ?= 60
SFT_STEPS = $$(( 6 * $(STEPS) ))
# of three learning rates, the best of each method (examples/miniature/compare.py)
RATE ?= 3e-3
SFT_RATE ?= 3e-4
MINIATURE := examples/miniature
# the layers through which the text reaches the network: the concept is learned and little else changes
LAYERS ?= context_refiner
COMMON := --pretrained_model_name_or_path $(MINIATURE)/model \
	--instance_data_dir $(MINIATURE)/concepts/$(CONCEPT) --resolution 64 --train_batch_size 4 --rank 16 --lora_layers $(LAYERS) \
	--seed 0

.PHONY: demo test test-slow test-lowest lint fix-copies

$(VENV)/.installed: requirements.txt constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --requirement requirements.txt ruff
	touch $@

demo: $(VENV)/.installed
	rm -rf $(DEMO)
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		train_dopsd_lora.py $(COMMON) --vlm_model_name_or_path $(MINIATURE)/vlm --learning_rate $(RATE) --prior_prompts $(MINIATURE)/prior_prompts.txt --ema_decay 0.999 --num_inference_steps 4 --states_per_rollout 4 \
		--max_train_steps $(STEPS) --validation_steps 30 --output_dir $(DEMO)/dopsd
	$(BIN)/python examples/train_sft.py $(COMMON) --learning_rate $(SFT_RATE) --max_train_steps $(SFT_STEPS) \
		--output_dir $(DEMO)/sft
	$(BIN)/python $(MINIATURE)/demo.py --concept $(CONCEPT) --dopsd $(DEMO)/dopsd --sft $(DEMO)/sft \
		--picture $(DEMO)/demo.png

# two tests at a time, each on one core. What takes minutes is left out: make test-slow runs it
test: $(VENV)/.installed
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

test-slow: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -s -m slow

# torch is that of constraints.txt: of its older releases, none was tried
$(LOWEST)/.installed: requirements.txt constraints.txt
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	(grep '^torch==' constraints.txt; sed '/^torch>/d; s/>=/==/' requirements.txt) > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/pip install --quiet --constraint $(LOWEST)/constraints.txt torch
	$(LOWEST)/bin/pip install --quiet --constraint $(LOWEST)/constraints.txt --requirement requirements.txt
	touch $@

test-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python -m pytest -q $(addprefix tests/test_,method.py contexts.py data.py output.py project.py bad_input.py)

lint: $(VENV)/.installed
	$(BIN)/ruff check .

fix-copies:
	$(PYTHON) utils/fix_copies.py
