# make demo: train on the miniature and look at the result. CONCEPT=arrow: an object in place of a style
# make report: after make demo, look at its teacher and its result with examples/evaluate.py
# make test: lint, and the test suite
# make test-slow: the tests that take minutes
# make test-lowest: six of the test files with the lowest versions of requirements.txt. TORCH=2.9.0: torch's, too
# make lint: rules and format of ruff alone
# make style: format the code, and mend what ruff can
# make fix-copies: copy what both scripts share from train_dopsd_lora.py into train_dopsd_full.py
# make flags: write docs/flags.md
# make help: this list. All need python3 and make alone
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)
LOWEST := .venv-lowest-$(TORCH)
DEMO := outputs/demo
CONCEPT ?= ember
# 2 pictures a step and, in the mean, 4.5 transformer passes a picture; SFT has 2 passes, so it gets 9 / 4 times the steps
STEPS ?= 128
SFT_STEPS = $$(( 9 * $(STEPS) / 4 ))
# the best of each method in examples/miniature/compare.py
RATE ?= 1e-3
SFT_RATE ?= 3e-4
MINIATURE := examples/miniature
COMMON := --pretrained_model_name_or_path $(MINIATURE)/model \
	--instance_data_dir $(MINIATURE)/concepts/$(CONCEPT) --resolution 64 --train_batch_size 2 --rank 16 --lr_scheduler cosine --seed 0

.PHONY: help demo report test test-slow test-lowest lint style fix-copies flags

help:
	@sed -n 's/^# make/make/p' Makefile

$(VENV)/.installed: requirements.txt constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --requirement requirements.txt ruff
	touch $@

# both trainings at once, each on one core
demo: export OMP_NUM_THREADS := 1
demo: $(VENV)/.installed
	rm -rf $(DEMO) && mkdir -p $(DEMO)
	$(BIN)/python examples/train_sft.py $(COMMON) --learning_rate $(SFT_RATE) --max_train_steps $(SFT_STEPS) \
		--output_dir $(DEMO)/sft > $(DEMO)/sft.log 2>&1 & sft=$$!; trap "kill $$sft" INT TERM; \
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		train_dopsd_lora.py $(COMMON) --vlm_model_name_or_path $(MINIATURE)/vlm --learning_rate $(RATE) \
		--prior_prompts $(MINIATURE)/prior_prompts.txt --prior_loss_weight 1 --ema_decay 0.999 --num_inference_steps 4 \
		--max_train_steps $(STEPS) --validation_steps $(STEPS) --output_dir $(DEMO)/dopsd || { kill $$sft; exit 1; }; \
	echo "Training SFT, for comparison; its log is $(DEMO)/sft.log"; wait $$sft
	$(BIN)/python $(MINIATURE)/demo.py --concept $(CONCEPT) --dopsd $(DEMO)/dopsd --sft $(DEMO)/sft \
		--picture $(DEMO)/demo.png

EVALUATE := $(BIN)/python examples/evaluate.py
EVALUATED := --image_encoder $(MINIATURE)/encoders/image --image_text_encoder $(MINIATURE)/encoders/text \
	--concept_prompts $(DEMO)/concept_prompts.txt --drawing_batch_size 32 --encoding_batch_size 64 --mixed_precision no

report: $(VENV)/.installed
	$(EVALUATE) teacher $(EVALUATED) --pretrained_model_name_or_path $(MINIATURE)/model --vlm_model_name_or_path $(MINIATURE)/vlm \
		--instance_data_dir $(MINIATURE)/concepts/$(CONCEPT) --resolution 64 --num_inference_steps 4 --teacher_image target other \
		--output_dir $(DEMO)/teacher
	$(EVALUATE) report $(EVALUATED) --ordinary_prompts $(DEMO)/ordinary_prompts.txt --output_dir $(DEMO)/dopsd

# two tests at a time, each on one core. What takes minutes is left out: make test-slow runs it
test: $(VENV)/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

test-slow: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -s -m slow

$(LOWEST)/.installed: requirements.txt constraints.txt
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	(echo torch==$(TORCH); sed '/^torch>/d; s/>=/==/' requirements.txt) > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/pip install --quiet --constraint $(LOWEST)/constraints.txt torch
	$(LOWEST)/bin/pip install --quiet --constraint $(LOWEST)/constraints.txt --requirement requirements.txt
	touch $@

test-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python -m pytest -q $(addprefix tests/test_,method.py contexts.py data.py output.py project.py bad_input.py)

lint: $(VENV)/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

style: $(VENV)/.installed
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

fix-copies:
	$(PYTHON) utils/fix_copies.py

flags: $(VENV)/.installed
	$(BIN)/python utils/flags.py
