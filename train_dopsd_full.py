#!/usr/bin/env python
# Copyright 2026 The D-OPSD training scripts authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch>=2.9",
#     "torchao>=0.16",
#     "diffusers>=0.42.0",
#     "transformers>=5.18",
#     "accelerate>=1.10",
#     "datasets>=4.6",
#     "huggingface_hub>=1.32",
#     "safetensors>=0.8",
#     "Pillow>=10.1",
#     "tensorboard",
# ]
# ///
"""Fine-tunes a whole step-distilled text-to-image model and keeps its few-step quality.

D-OPSD (https://arxiv.org/abs/2605.05204): the student sees the prompt and rolls out its own few steps; the teacher, an
EMA of the student that also sees the training image, predicts the velocity at the same states; the student matches it.

    accelerate launch train_dopsd_full.py --pretrained_model_name_or_path Tongyi-MAI/Z-Image-Turbo \\
        --dataset_name my_dataset --output_dir my_model --mixed_precision bf16 --gradient_checkpointing
"""

import argparse
import collections
import contextlib
import copy
import csv
import dataclasses
import datetime
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml


# ---------------------------------------------------------------------------------------------------------- arguments
QUANTIZATIONS = ["nf4", "int8", "fp8"]
SCHEDULERS = ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
OPTIMIZERS = ["adamw", "adamw8bit", "adafactor", "prodigy"]
SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
# of two, the typed one wins over that of a --config file
ALTERNATIVES = {"instance_data_dir": "dataset_name", "max_train_steps": "num_train_epochs"}
ALTERNATIVES |= {"overwrite_output_dir": "resume_from_checkpoint", "optimizer": "use_8bit_adam"}
ALTERNATIVES |= {other: one for one, other in ALTERNATIVES.items()}
HUB_FLAGS = ["hub_model_id", "hub_private_repo", "hub_push_checkpoints", "hub_timeout"]


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except of switches and of what is found out later."""

    def _get_help_string(self, action):
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """Ends with one line for a wrong flag, without the usage."""

    def error(self, message):
        # a token shows in no log
        words = [word.split("=hf_")[0] for word in message.split() if not word.startswith("hf_")]
        self.exit(2, f"error: {' '.join(words).removeprefix('argument ')}\n")


def number(kind, low=-math.inf, high=math.inf, above=-math.inf, below=math.inf):
    """Type of a flag that takes a finite `kind` from `low` to `high`, or between `above` and `below`."""
    ends = {"at least": low, "above": above, "at most": high, "below": below}
    words = " and ".join(f"{word} {end}" for word, end in ends.items() if math.isfinite(end))

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and above < value < below):  # also true for NaN
            raise argparse.ArgumentTypeError(f"must be a {'whole ' if kind is int else ''}number, {words}, not {text}")
        return value

    return parse


USAGE = "%(prog)s --pretrained_model_name_or_path MODEL --instance_data_dir FOLDER --output_dir FOLDER [flags]"
COUNT, STEP = number(int, low=1), number(int, low=0)
POSITIVE, DECAY, SHARE = number(float, above=0), number(float, low=0, below=1), number(float, low=0, high=1)


def add_shared_arguments(parser):
    add = parser.add_argument_group("models").add_argument
    add("--pretrained_model_name_or_path", required=True, help="Step-distilled base: folder or Hub id.")
    add("--revision", help="Revision of the base on the Hub.")
    add("--variant", help="Variant of the base's weight files, for example fp16.")
    add("--vlm_model_name_or_path", help="Qwen3-VL of the text encoder's size. Default: the family's.")
    add("--teacher_max_pixels", type=COUNT, help="Larger images are scaled down for the VLM. Default: the family's.")
    add("--encoder_quantization", choices=QUANTIZATIONS, help="Quantise text encoder and VLM while they encode.")
    add = parser.add_argument_group("data").add_argument
    add("--instance_data_dir", help="Folder of images; captions as lines of NAME.txt, or metadata.jsonl or .csv.")
    add("--dataset_name", help="Dataset on the Hub or in a folder, in place of --instance_data_dir.")
    add("--dataset_config_name", help="Configuration of the dataset.")
    add("--image_column", default="image", help="Column of the dataset that holds the images.")
    add("--caption_column", default="text", help="Column with a caption, or a list of captions, per image.")
    add("--reference_column", help="Column with an image, or a list of images, that the student sees (editing).")
    add("--instance_prompt", help="Caption of every image that has none.")
    add("--resolution", type=COUNT, default=1024, help="Side of a square image; others have about the same area.")
    add("--random_flip", action="store_true", help="Train on mirror images, too; not of subjects with letters.")
    add("--dataset_num_workers", type=COUNT, default=4, help="Processes or threads that read images.")
    add("--skip_broken_images", action="store_true", help="Leave out images that cannot be read.")
    add("--context_cache_dir", help="Cache of encoded contexts. Default: OUTPUT_DIR/contexts.")
    add("--context_dtype", choices=["fp8"], help="fp8: half the disk; changes the velocity by about 1 per cent.")
    add = parser.add_argument_group("D-OPSD").add_argument
    add("--rollout_steps", type=COUNT, default=4, help="K: states of a rollout, on the inference grid of K steps.")
    add("--states_per_rollout", type=COUNT, default=1, help="M: states of a rollout that are trained, at random.")
    add("--num_inference_steps", type=COUNT, help="Steps of inference and validation. Default: the base's.")
    add("--teacher_context", choices=["vlm", "edit"], help="vlm (default): image in the prompt. edit: as a reference.")
    add("--teacher_prompt_suffix", help="Put after the teacher's prompt. Default: the family's for --teacher_context.")
    add("--teacher_image", choices=["target", "other"], default="target", help="other: teacher sees the next image.")
    add("--ema_decay", type=SHARE, default=0.9999, help="Decay of the teacher. 1: the base. 0: the student.")
    add("--prior_prompts", help="File of ordinary prompts to keep, one a line; or none. Default: built-in ones.")
    add("--prior_every", type=number(int, low=2), default=3, help="Every Nth batch is of --prior_prompts.")
    add("--prior_loss_weight", type=POSITIVE, default=10.0, help="Weight of the loss that keeps what the base draws.")
    add("--loss_weighting", choices=["velocity", "x0"], default="velocity", help="x0: the loss times sigma^2.")
    add = parser.add_argument_group("training").add_argument
    add("--train_batch_size", type=COUNT, default=1, help="Images per process and micro-step.")
    add("--gradient_accumulation_steps", type=COUNT, default=1, help="Micro-steps per optimisation step.")
    add("--max_train_steps", type=COUNT, default=1000, help="Optimisation steps.")
    add("--num_train_epochs", type=COUNT, help="In place of --max_train_steps: how often each image is drawn.")
    add("--learning_rate", type=POSITIVE, default=1e-4, help="Peak learning rate; 1 for prodigy.")
    add("--lr_scheduler", default="constant", choices=SCHEDULERS, help="Learning rate over the steps.")
    add("--lr_warmup_steps", type=STEP, default=0, help="Steps in which the learning rate rises from zero.")
    add("--lr_num_cycles", type=COUNT, default=1, help="Restarts of cosine_with_restarts.")
    add("--lr_power", type=POSITIVE, default=1.0, help="Power of the polynomial scheduler.")
    add("--optimizer", choices=OPTIMIZERS, default="adamw", help="prodigy finds the learning rate itself.")
    add("--use_8bit_adam", action="store_true", help="The same as --optimizer adamw8bit.")
    add("--adam_beta1", type=DECAY, default=0.9, help="Decay of AdamW's mean of gradients.")
    add("--adam_beta2", type=DECAY, default=0.999, help="Decay of its mean of squares.")
    add("--adam_weight_decay", type=number(float, low=0), default=0.0, help="Decoupled weight decay.")
    add("--adam_epsilon", type=POSITIVE, default=1e-8, help="Added to the denominator.")
    add("--max_grad_norm", type=number(float, low=0), default=1.0, help="Norm that gradients are clipped to. 0: none.")
    add("--gradient_checkpointing", action="store_true", help="Recompute activations: less memory, slower.")
    add("--checkpointed_blocks", type=number(float, above=0, high=1), default=1.0, help="Share of blocks recomputed.")
    add("--compile_blocks", action="store_true", help="Compile the repeated blocks, in a slow first step.")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="Default: accelerate's; with python, no.")
    add("--allow_tf32", action="store_true", help="TF32 matrix products on Ampere and newer GPUs.")
    add("--seed", type=number(int, low=0, high=2**32 - 1), default=0, help="Seed of all that is random, at each step.")
    add = parser.add_argument_group("output").add_argument
    add("--config", help="YAML file with flags as keys, or a run's dopsd_settings.json. Typed flags win.")
    add("--output_dir", required=True, help="Folder of the result, checkpoints, validation pictures and logs.")
    add("--overwrite_output_dir", action="store_true", help="Start anew: remove what a run wrote, except contexts.")
    add("--checkpointing_steps", type=COUNT, default=500, help="Steps between checkpoints.")
    add("--checkpoints_total_limit", type=COUNT, help="Checkpoints to keep. Default: all; train_dopsd_full.py: 2.")
    add("--resume_from_checkpoint", help="Checkpoint: a folder, a name in OUTPUT_DIR, or latest (the newest, if any).")
    add("--validation_prompt", nargs="+", help="Prompts of the validation picture. Default: training captions.")
    add("--validation_steps", type=STEP, default=250, help="Steps between validations; one is before step 1. 0: none.")
    add("--num_validation_images", type=COUNT, default=4, help="Rows of the picture without --validation_prompt.")
    add("--enable_vae_tiling", action="store_true", help="Decode validation pictures in tiles: less memory.")
    add("--report_to", default="tensorboard", choices=["tensorboard", "wandb", "none"], help="Tracker.")
    add("--push_to_hub", action="store_true", help="Push the result to the Hub at the end.")
    add("--hub_push_checkpoints", action="store_true", help="Push the result so far at each checkpoint, too.")
    add("--hub_model_id", help="Repository to push to. Default: the name of OUTPUT_DIR.")
    add("--hub_private_repo", action="store_true", help="Make the repository private.")
    add("--hub_token", nargs="?", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    add("--hub_timeout", type=number(float, above=0, high=86400), default=60, help="Seconds to wait for an answer.")


def add_full_arguments(parser):
    add = parser.add_argument_group("full fine-tuning").add_argument
    add("--ema_device", choices=["accelerator", "cpu"], default="accelerator", help="Device of the teacher's average.")
    add("--ema_refresh_steps", type=COUNT, default=10, help="With --ema_device cpu: steps between its updates.")
    add("--stochastic_rounding", action="store_true", help="Weights in bf16 alone, updates rounded at random.")
    about = "Update weights during the backward: no gradient buffer, but no clipping, no accumulation, one process."
    add("--fused_backward_pass", action="store_true", help=about)


def check_arguments(parser, args, words):
    """One error for flags that cannot work, before anything is read. `words`: the command line, without its file."""
    if (args.instance_data_dir is None) == (args.dataset_name is None):
        parser.error("give either --instance_data_dir or --dataset_name")
    if args.states_per_rollout > args.rollout_steps:
        parser.error(f"--states_per_rollout {args.states_per_rollout} exceeds --rollout_steps {args.rollout_steps}")
    if args.overwrite_output_dir and args.resume_from_checkpoint:
        parser.error("--overwrite_output_dir goes without --resume_from_checkpoint")
    if "hub_token" in args:
        parser.error("--hub_token shows the token to others: set HF_TOKEN or run `hf auth login` instead")
    if args.use_8bit_adam and "adamw" not in args.optimizer:
        parser.error(f"--use_8bit_adam is AdamW, not --optimizer {args.optimizer}")
    if args.optimizer == "prodigy" and args.learning_rate < 0.1:
        parser.error("--optimizer prodigy multiplies the rate it finds by --learning_rate: give 1")
    if args.ema_decay == 0 and args.prior_prompts != "none":
        parser.error("--ema_decay 0 teaches nothing on prior prompts: give --prior_prompts none")
    if args.reference_column == args.image_column:
        parser.error("--reference_column must be another than --image_column")
    if args.lr_scheduler == "polynomial" and args.learning_rate <= 1e-7:
        parser.error("--lr_scheduler polynomial ends at 1e-7: give a higher --learning_rate")
    if args.random_flip and args.reference_column:
        parser.error("--random_flip does not go with --reference_column: references are not mirrored")
    args.optimizer = "adamw8bit" if args.use_8bit_adam else args.optimizer
    del args.use_8bit_adam, args.config
    typed = {word.partition("=")[0] for word in words}
    for when, idle, names in [
        ("without --gradient_checkpointing", not args.gradient_checkpointing, ["checkpointed_blocks"]),
        ("without --push_to_hub", not args.push_to_hub, HUB_FLAGS),
        ("with --num_train_epochs", args.num_train_epochs, ["max_train_steps"]),
        ("with --prior_prompts none", args.prior_prompts == "none", ["prior_every", "prior_loss_weight"]),
        ("with --lr_scheduler constant", args.lr_scheduler == "constant", ["lr_warmup_steps"]),
    ]:
        for name in names:
            if idle and f"--{name}" in typed and getattr(args, name) != parser.get_default(name):
                parser.error(f"--{name} has no effect {when}")
    for name, value in vars(args).items():
        values = value if isinstance(value, list) else [value]
        if name != "teacher_prompt_suffix" and not all(str(one).strip() for one in values):
            parser.error(f"--{name} is empty")
        if str(value).startswith("~/"):  # of a file, or behind an equals sign
            setattr(args, name, os.path.expanduser(value))
        if str(value).startswith(".../"):  # see `public_settings`
            parser.error(f"--{name} {value}: the path was shortened; give the whole one")
    args.context_cache_dir = args.context_cache_dir or os.path.join(args.output_dir, "contexts")
    if re.fullmatch(r"checkpoint-\d+/?", args.resume_from_checkpoint or ""):  # as diffusers' scripts take it
        args.resume_from_checkpoint = os.path.join(args.output_dir, args.resume_from_checkpoint)


def check_full_arguments(parser, args):
    """One error for flags that do not go together."""
    if args.stochastic_rounding and args.optimizer != "adamw":
        flag = f"--use_8bit_adam or --optimizer {args.optimizer}"
        parser.error(f"--stochastic_rounding brings its own 8-bit AdamW: leave out {flag}")
    for wrong, remedy in [
        (args.optimizer == "prodigy", "leave out --optimizer prodigy"),
        (args.gradient_accumulation_steps > 1, "give --gradient_accumulation_steps 1"),
        (args.states_per_rollout > 1, "give --states_per_rollout 1"),
        (args.max_grad_norm > 0, "give --max_grad_norm 0"),
    ]:
        if args.fused_backward_pass and wrong:
            parser.error(f"--fused_backward_pass updates each weight at once and holds no gradients: {remedy}")


def with_config(parser, words):
    """The words of a command line behind those of its --config file."""
    first = ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", action="append", default=[])
    configs, given = first.parse_known_args(words)[0].config, {}
    if not configs:
        return words
    if len(configs) > 1:
        parser.error("--config is given twice: put all flags into one file")
    config = configs[0]
    try:
        # nodes hold what is written, such as no, 1.10 or 0123, as a command line does
        entries = yaml.compose(Path(config).read_text("utf-8"), yaml.BaseLoader).value
        entries = [(key.value, value) for key, value in entries]
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        parser.error(f"--config {config} cannot be read as YAML with flags as keys ({error})")
    for name, node in entries:
        if node.value in ("", "~", "null", "Null", "NULL") and node.style is None:
            continue
        flag = parser._option_string_actions.get(f"--{name}")
        texts = [one.value for one in node.value] if isinstance(node, yaml.SequenceNode) else [node.value]
        if flag is None or name in ("config", "help"):
            parser.error(f"--config {config}: there is no flag --{name}")
        if name in given:
            parser.error(f"--config {config} has {name} twice")
        if not all(isinstance(text, str) for text in texts) or len(texts) != 1 and flag.nargs != "+":
            parser.error(f"--config {config}: {name} takes {'a list of texts' if flag.nargs == '+' else 'one text'}")
        if len(texts) > 1 and (dashed := [text for text in texts if text.startswith("-") and " " not in text]):
            parser.error(f"--config {config}: in a list, no word of {name} begins with a dash, as {dashed[0]} does")
        if flag.nargs == 0 and texts[0].lower() not in SWITCHES:
            parser.error(f"--config {config}: {name} is true or false, not {texts[0]}")
        if flag.nargs == 0:
            given[name] = [f"--{name}"] * SWITCHES[texts[0].lower()]
        else:  # one text may begin with a dash
            given[name] = [f"--{name}={texts[0]}"] if len(texts) == 1 else [f"--{name}", *texts]
    typed = {word.partition("=")[0] for word in words}
    given = {name: text for name, text in given.items() if f"--{ALTERNATIVES.get(name)}" not in typed}
    return [*itertools.chain(*given.values()), *words]


def parse_args(input_args=None):
    about = __doc__.split("\n")[0]
    parser = ArgumentParser(description=about, formatter_class=HelpFormatter, usage=USAGE, allow_abbrev=False)
    add_shared_arguments(parser)
    add_full_arguments(parser)
    parser.set_defaults(checkpoints_total_limit=2)  # each is several times the model
    words = sys.argv[1:] if input_args is None else input_args
    args = parser.parse_args(with_config(parser, words))
    check_arguments(parser, args, words)
    check_full_arguments(parser, args)
    return args


# before the imports below, which take seconds
ARGS = parse_args() if __name__ == "__main__" else None


# ---------------------------------------------------------------------------------------------------------- libraries
# what libraries say that means nothing to a user: logger -> beginning of the message
for name, beginning in {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm",
    "torchao": "Failed to load ",
    "torch.utils._pytree": "%s is an Enum subclass",
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects",
    "diffusers.models.modeling_utils": "There are modules in",
}.items():
    logging.getLogger(name).addFilter(lambda record, beginning=beginning: not str(record.msg).startswith(beginning))
warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")  # of torch's norms, under autocast

import diffusers
import huggingface_hub as hub
import numpy as np
import psutil
import torch
import transformers
import xxhash
from accelerate import Accelerator, AutocastKwargs, DistributedType, InitProcessGroupKwargs, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs as DDPKwargs
from accelerate.utils import ProjectConfiguration, gather_object, release_memory, send_to_device, set_seed
from accelerate.utils.environment import parse_flag_from_env
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from datasets import Dataset, Features, Value, concatenate_datasets, disable_progress_bars, load_dataset
from datasets import Image as ImageFeature
from datasets import List as ListFeature
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.normalization import RMSNorm
from diffusers.optimization import get_scheduler
from diffusers.training_utils import find_nearest_bucket, generate_aspect_ratio_buckets
from diffusers.utils import check_min_version, is_torchao_available
from filelock import FileLock, Timeout
from huggingface_hub import ModelCard, is_offline_mode, save_torch_state_dict, snapshot_download
from huggingface_hub.utils import HFValidationError, RepositoryNotFoundError, validate_repo_id
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm
from transformers.optimization import Adafactor

import pipeline_dopsd
from pipeline_dopsd import LORA_WEIGHT_NAME, PRIOR_EDITS, PRIOR_PROMPTS, family_of


check_min_version("0.42.0")

logger = logging.getLogger(__name__)

METADATA_NAMES = ["metadata.jsonl", "metadata.csv"]
PNG_METADATA = re.compile(b"eXIf|iTXt|tEXt|zTXt")
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
SETTINGS_NAME = "dopsd_settings.json"
STATE_NAME = "dopsd_state.json"
OPTIMIZER_NAME = "optimizer.bin"
TRANSFORMER_FILES = ["transformer/*.json", "transformer/*.safetensors"]
SCHEDULER_FILES = ["scheduler/*.json"]
SHARDS_NAME = "shards"
REPOSITORY_FILES = ["README.md", "pipeline.py", "pipeline_dopsd.py", "model_index.json", SETTINGS_NAME]
# flags whose defaults are the base's or its family's
FOLLOWING = ["num_inference_steps", "teacher_context", "teacher_max_pixels", "teacher_prompt_suffix"]
# flags that a resumed run may change: where things are (their content is compared), how long, what is shown, and
# savings of memory that change no result
MAY_CHANGE = set(
    """
    pretrained_model_name_or_path revision vlm_model_name_or_path instance_data_dir dataset_name dataset_config_name
    image_column caption_column reference_column instance_prompt dataset_num_workers skip_broken_images prior_prompts
    context_cache_dir output_dir max_train_steps train_batch_size num_inference_steps checkpointing_steps
    checkpoints_total_limit resume_from_checkpoint overwrite_output_dir validation_prompt validation_steps
    num_validation_images report_to push_to_hub hub_push_checkpoints hub_model_id hub_private_repo hub_timeout
    gradient_checkpointing checkpointed_blocks offloaded_blocks enable_vae_tiling
    """.split()
)
MIRRORED = " mirrored"
UMASK = os.umask(0)  # it is only read by setting it
os.umask(UMASK)
HEADINGS = ["student", "teacher", "training image"]  # of validation pictures
LOGGING_SECONDS = 5  # steps are logged together, at least so often
FP8_NAMES, FP8_MAX = ("prompt_embeds", "prompt_embeds.scale"), torch.finfo(torch.float8_e4m3fn).max
ENCODING_BATCH = 4  # contexts at once: the hidden states of all layers are held


class InputError(ValueError):
    """A mistake in flags or files; the command line shows its one sentence without a traceback."""


# --------------------------------------------------------------------------------------------------------------- data
@contextlib.contextmanager
def blamed_on(what):
    """Within: an error of a library becomes an InputError of one sentence that begins with `what`, flag or file."""
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of any kind: libraries raise what their own dependencies do
        cause = error
        while cause.__cause__ or (cause.__context__ and not cause.__suppress_context__):
            cause = cause.__cause__ or cause.__context__
        told = [str(e) if isinstance(e, (ValueError, OSError)) else f"{type(e).__name__}: {e}" for e in (error, cause)]
        raise InputError(" ".join(f"{what}: {' - '.join(dict.fromkeys(told))}".split())) from error  # in one line


def read_folder(folder, args):
    """The columns of `read_dataset` of a folder of images. Raises ValueError that names the file and the line."""
    files = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    if wrong := [p.name for p in files if p.name.encode(errors="ignore").decode() != p.name]:
        raise ValueError(f"--instance_data_dir {folder}: {wrong[0]!a} is no name in UTF-8; rename the file.")
    metadata = [p for p in files if p.name.lower() in METADATA_NAMES]
    if len(metadata) > 1 or (metadata and metadata[0].name not in METADATA_NAMES):
        raise ValueError(f"{metadata[-1]}: captions stand in one {' or '.join(METADATA_NAMES)}, in small letters.")
    texts = [] if metadata else [p for p in files if p.suffix.lower() == ".txt"]
    found = read_metadata(metadata[0]) if metadata else read_texts(folder, files, texts, args)
    # columns of file names go before others
    names = sorted({name for _, row in found for name in row}, key=lambda name: ("file_name" in name, name))
    columns = {"image" if n == "file_name" else re.sub("_file_names?$", "", n): n for n in names}
    check_columns(columns, metadata[0] if metadata else folder, args)
    rows, captions, places = [], [], {}
    for place, row in found:
        path = path_in(folder, row.get(columns[args.image_column]), place)
        if places.setdefault(path, place) != place:
            raise ValueError(f"{place}: {path.name} has a row ({places[path]}); give its captions as one list.")
        references = as_list(row.get(columns.get(args.reference_column)))
        references = [path_in(folder, name, place) for name in references]
        captions.append(captions_of(row.get(args.caption_column), place, args.caption_column, args.instance_prompt))
        rows.append({"image": str(path), "references": list(map(str, references))})
    used = {*metadata, *texts, *places, *(Path(path) for row in rows for path in row["references"])}
    others = [p.relative_to(folder) for p in folder.rglob("*") if p not in used and (p.is_symlink() or not p.is_dir())]
    if left := sorted(str(p) for p in others if not any(part.startswith(".") for part in p.parts)):
        logger.warning(f"Not used of {folder}: {len(left)} files ({', '.join(left[:5])}{', ..' * (len(left) > 5)}).")
    if len(rows) < 100:
        disable_progress_bars()  # they would only flash by
    image = ImageFeature(decode=False)
    features = {"image": image, "references": ListFeature(image)}
    # of a generator, because datasets caches on disk what it gave
    images = Dataset.from_generator(functools.partial(iter, rows), features=Features(features))
    return with_captions(images if args.reference_column else images.remove_columns("references"), captions)


def with_captions(images, captions):
    """`images` and `captions`, which leave the fingerprint as it is, so that images need not be inspected again."""
    return images.add_column("captions", captions, new_fingerprint=images._fingerprint)


def read_texts(folder, files, texts, args):
    """(place, row) of each image of a folder; its captions are the lines of NAME.txt, one of `texts`."""
    images = [p for p in files if p.suffix.lower() in IMAGE_SUFFIXES and not p.is_dir()]
    text_of = {p.stem: p for p in texts}
    if not images:
        kinds = ", ".join(f"*{suffix}" for suffix in sorted(IMAGE_SUFFIXES))
        raise ValueError(f"--instance_data_dir {folder} holds no images ({kinds}), except in folders in it.")
    stems = {image.stem for image in images}
    for path in texts:
        if path.stem not in stems:
            if other := next((p for p in files if p.stem == path.stem and p not in texts), None):
                raise ValueError(f"{other} is of a kind that is not read; convert it to PNG or JPEG.")
            raise ValueError(f"{path}: caption file without image; name it as the image it belongs to, or remove it.")
        if text_of[path.stem] != path:
            raise ValueError(f"{path}: {text_of[path.stem].name} is of the same image; remove one of them.")
    lines = {stem: read_lines(path) for stem, path in text_of.items()}
    return [(str(p), {"file_name": p.name, args.caption_column: lines.get(p.stem)}) for p in images]


def read_metadata(file):
    """(place, row) of each row of metadata.jsonl or metadata.csv."""
    rows = []
    with blamed_on(file):
        text = file.read_text("utf-8-sig")
        if file.suffix == ".csv":
            reader = csv.DictReader(io.StringIO(text))
            rows = [(f"{file}, line {reader.line_num}", row) for row in reader]
    for number, line in enumerate(text.split("\n") if file.suffix == ".jsonl" else [], 1):
        if line.strip():
            with blamed_on(f"{file}, line {number} is no JSON object"):
                rows.append((f"{file}, line {number}", {**json.loads(line)}))
    if not rows:
        raise ValueError(f"{file} holds no rows.")
    if place := next((place for place, row in rows if None in row), None):
        raise ValueError(f"{place} has more cells than the first line; put a caption with commas in quotes.")
    return rows


def path_in(folder, name, place):
    """The image of a `name` that stands at `place`."""
    path = Path(os.path.normpath(name)) if isinstance(name, str) and name.strip() else Path()
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{place}: {name} is outside of the folder; only images in it are read.")
    if not (folder / path).is_file():
        raise ValueError(f"{place} names no image: {name!r} is no file in the folder, or a link to nothing.")
    return folder / path


def as_list(value):
    """What stands in a cell: nothing, one thing or a list."""
    return value if isinstance(value, list) else [value] if value else []


def check_columns(columns, source, args):
    """Raises ValueError for a flag that names none of the `columns` of a dataset."""
    image, caption = "; metadata has file_name or NAME_file_name", "; name it, or give --instance_prompt"
    for name, hint in {"image_column": image, "caption_column": caption, "reference_column": ""}.items():
        column = getattr(args, name)
        if column and column not in columns and not (name == "caption_column" and args.instance_prompt):
            there = ", ".join(sorted(columns))
            raise ValueError(f"--{name} {column!r} is none of the columns {there} of {source}{hint}.")


def captions_of(value, place, column, instance_prompt):
    """The captions in a cell of a dataset's `column`, or the instance prompt. Raises ValueError without a text."""
    captions = value if isinstance(value, list) else [value]
    if not all(caption is None or isinstance(caption, str) for caption in captions):
        raise ValueError(f"{place}: --caption_column {column} holds {str(value)[:60]!r}, no caption or list of them.")
    captions = [c for c in captions if c and c.strip()] or [instance_prompt]
    if not captions[0]:
        raise ValueError(f"{place} has no caption; add one or give --instance_prompt.")
    with blamed_on(place):
        "".join(captions).encode()  # half a pair of surrogates is no text
    return captions


def read_lines(path, name=None):
    """The lines of a text file, without blank ones. Raises ValueError where it cannot be read."""
    with blamed_on(f"{name or path} is no text file in UTF-8 that can be read"):
        lines = path.read_text("utf-8-sig").split("\n")  # not at other characters, as splitlines() would
    return [line.strip() for line in lines if line.strip()]


def read_dataset(args):
    """Dataset with the columns `image` and `references` (one or several), undecoded, and `captions` (a list). Raises
    ValueError for missing or empty data, a missing column, or an image without caption."""
    flag, folder = f"--dataset_name {args.dataset_name}", Path(args.instance_data_dir or args.dataset_name)
    if args.instance_data_dir and not folder.is_dir():
        raise ValueError(f"--instance_data_dir {folder} is no folder.")
    names = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    if args.instance_data_dir or names & set(METADATA_NAMES):
        return read_folder(folder, args)
    if any(Path(name).suffix.lower() in IMAGE_SUFFIXES for name in names):
        raise ValueError(f"{flag} is a folder of images: give it as --instance_data_dir.")
    check_source("dataset_name", args.dataset_name, repo_type="dataset")
    with blamed_on(flag):
        dataset = load_dataset(args.dataset_name, args.dataset_config_name, split="train")
    if not len(dataset):
        raise ValueError(f"{flag} holds no rows.")
    check_columns(dataset.column_names, args.dataset_name, args)
    column = args.caption_column
    cells = enumerate(dataset[column][:] if column in dataset.column_names else [None] * len(dataset))
    source, prompt = args.dataset_name, args.instance_prompt
    captions = [captions_of(cell, f"Row {i} of {source}", column, prompt) for i, cell in cells]
    pictures = {args.image_column: "image"} | ({args.reference_column: "references"} if args.reference_column else {})
    # columns are worked on apart, so that nothing is copied into the cache, except for lists of references
    images = dataset.select_columns(list(pictures))
    for column in pictures:
        feature = ImageFeature(decode=False)
        with blamed_on(f"{flag}: column {column} holds no images"):
            several = isinstance(images.features[column], ListFeature)
            images = images.cast_column(column, ListFeature(feature) if several else feature)
    return with_captions(images.rename_columns({old: new for old, new in pictures.items() if old != new}), captions)


def load_image(source):
    """RGB image of a row's `image` ({"path", "bytes"}): EXIF orientation applied, alpha on white, 16-bit scaled to 8.
    Raises InputError that names an image that cannot be read."""
    name = source["path"] or "An image of the dataset"
    try:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(source["bytes"]) if source["bytes"] else source["path"]))
        if image.mode == "F":
            raise ValueError("it has no range of its own; save it with 8 or 16 bits")
        if image.mode.startswith("I"):  # 16-bit grey; a plain convert() would clip at 255
            image = Image.fromarray((np.asarray(image, np.float64) / 257).round().clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as error:  # of any kind: decoders raise what damaged files make of them
        raise InputError(f"{name} cannot be read as an image ({error}); replace or remove it.") from None


def inspect_image(source):
    """Upright (width, height) of an undecoded image, and the hash of its content. Of JPEGs and PNGs that end as they
    should no pixel is decoded. Raises ValueError for one that is no image, OSError for a file that cannot be read."""
    if not any((source or {}).values()):
        raise ValueError("An image of the dataset is empty; remove its row.")
    try:
        content, size = source["bytes"] or Path(source["path"]).read_bytes(), None
    except OSError as error:
        raise OSError(f"{source['path']} cannot be read ({error.strerror}); replace or remove it.") from None
    with contextlib.suppress(Exception), Image.open(io.BytesIO(content)) as image:  # `load_image` says what is wrong
        # not PNG's own, which decodes in search of chunks behind the pixels
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
        whole = image.format in ("JPEG", "MPO") and content.endswith(b"\xff\xd9")
        if image.format == "PNG" and not PNG_METADATA.search(content, image.tile[0][2]):
            image.verify()
            whole = True
        size = (image.size[::-1] if orientation in (5, 6, 7, 8) else image.size) if whole else None
    return list(size or load_image(source).size), hashlib.sha256(content).hexdigest()


def stamp_of(dataset):
    """Sizes and times, those of renaming too, of the image files that a dataset names; others stand in itself."""
    stats = []
    for column in sorted({"image", "references"} & {*dataset.column_names}):
        for chunk in dataset.data.column(column).chunks:
            images = chunk.flatten() if isinstance(dataset.features[column], ListFeature) else chunk
            for path in images.field("path").to_pylist():
                with contextlib.suppress(OSError, TypeError, ValueError):
                    stats.append(((stat := os.stat(path)).st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    return digest_of(stats)


def inspect_images(dataset, buckets, args, mirrored=False):
    """Adds `bucket`, the (height, width) of each image in training, `image_hash`, and size and hash of its references.
    Every image is read once; a later run on the same images reads the result from the cache of datasets. `mirrored`:
    see `with_mirrored`. Raises ValueError with the first ten images that cannot be read, unless --skip_broken_images
    leaves their rows out."""
    number, text = Value("int64"), Value("string")
    features = {"bucket": ListFeature(number), "image_hash": text, "reference_sizes": ListFeature(ListFeature(number))}
    features |= {"reference_hashes": ListFeature(text), "broken": text, "row": number}  # row: its number for the user

    def inspect(row, index, stamp):  # with another stamp, datasets calls it anew
        broken = ""
        with blamed_on(f"Row {index}"):
            try:
                found = [inspect_image(source) for source in [row["image"], *as_list(row.get("references"))]]
            except ValueError as error:
                found, broken = [([1, 1], "")], f"Row {index}: {error}"
        sizes, hashes = zip(*found)  # of the image, then of its references
        bucket = buckets[find_nearest_bucket(*sizes[0][::-1], buckets)]
        return dict(zip(features, (bucket, hashes[0], sizes[1:], hashes[1:], broken, index), strict=True))

    workers = min(args.dataset_num_workers, len(dataset) // 100)  # of few images, starting them would take longer
    options = {"features": Features(features), "num_proc": workers if workers > 1 else None, "desc": "images"}
    options["fn_kwargs"] = {"stamp": stamp_of(dataset)}
    added = dataset.map(inspect, with_indices=True, remove_columns=dataset.column_names, **options)
    whole = [index for index, broken in enumerate(added["broken"][:]) if not broken]
    dataset = concatenate_datasets([dataset, added.remove_columns("broken")], axis=1)
    if mirrored:  # before rows are left out: datasets would write a copy of the images that are left
        dataset, whole = with_mirrored(dataset), whole + [len(dataset) + index for index in whole]
    if len(whole) == len(dataset):
        return dataset
    broken = [error for error in added["broken"][:] if error]
    told = f"{len(broken)} of {len(added)} images are broken. {' '.join(broken[:10])}{' ..' * (len(broken) > 10)}"
    if not (args.skip_broken_images and whole):
        raise ValueError(f"{told} --skip_broken_images leaves them out.")
    logger.warning(f"Left out: {told}")
    return dataset.select(whole)


def with_mirrored(dataset):
    """The rows and, behind them, the same rows with mirrored images, whose hash tells so: contexts are their own."""
    hashes = [value + MIRRORED for value in dataset["image_hash"][:]]
    return concatenate_datasets([dataset, dataset.remove_columns("image_hash").add_column("image_hash", hashes)])


def read_prior_prompts(args):
    """The prompts of --prior_prompts or the built-in ones, and those that stand beside references, if there are any.
    Raises ValueError where there are none to read."""
    if args.prior_prompts == "none":
        return [], []
    prompts, edits = PRIOR_PROMPTS, PRIOR_EDITS
    if args.prior_prompts:
        flag = f"--prior_prompts {args.prior_prompts}"
        prompts = edits = read_lines(Path(args.prior_prompts), flag)
        if not prompts:
            raise ValueError(f"{flag} holds no prompt: write one on each line.")
    return prompts, edits if args.reference_column else []


def prior_pairs(prompts, edits, count):
    """(index for `rows_of`, prompt) of prior prompts: `prompts` alone, and `edits` beside the references of `count`
    rows, as often as it takes to use each edit and each row."""
    times = max(count, len(edits)) if edits else 0
    return [(None, prompt) for prompt in prompts] + [(~(k % count), edits[k % len(edits)]) for k in range(times)]


def shown_row(rows, index, args):
    """The row whose image the teacher sees."""
    return rows[(index + 1) % len(rows) if args.teacher_image == "other" else index]


def is_prior(index):
    """Whether an index for `rows_of` is that of a prior prompt."""
    return index is None or index < 0


def rows_of(rows, index, args):
    """The row and the row whose image the teacher sees. Prior prompts, of index None or ~row, have no image; of the
    second kind, they have the row's references."""
    if index is None:
        return ({"image_hash": None, "bucket": None, "reference_hashes": []},) * 2
    if index < 0:
        return ({**rows[~index], "image_hash": None},) * 2
    row = rows[index]
    return row, row if args.teacher_image == "target" else shown_row(rows, index, args)


class Layouts(tuple):
    """Of each row, its layout. Two are one only as one object: in each step, a hash over all rows would take long."""

    __hash__, __eq__ = object.__hash__, object.__eq__


def layouts_of(dataset, args):
    """Of each row, what is the same in a batch: bucket, sizes of references, bucket of the image the teacher sees."""
    buckets = list(map(tuple, dataset["bucket"][:]))  # a slice is read at once
    references = [tuple(map(tuple, sizes)) for sizes in dataset["reference_sizes"][:]]
    return Layouts((b, references[i], shown_row(buckets, i, args)) for i, b in enumerate(buckets))


def training_image(row):
    """The row's image, resized and centre-cropped to its bucket, and mirrored in rows of `with_mirrored`."""
    height, width = row["bucket"]
    image = ImageOps.fit(load_image(row["image"]), (width, height), Image.Resampling.LANCZOS)
    return ImageOps.mirror(image) if row["image_hash"].endswith(MIRRORED) else image


@functools.lru_cache(maxsize=2)
def batch_order(layouts, batch_size, seed, number):
    """Row indices (rows, batch_size) of as many batches as there are rows, each batch of one layout. Every row stands
    in them `batch_size` times, however rare its layout; of a layout, each is drawn once before any is drawn again."""
    rng = np.random.default_rng([seed, 2**42, number])  # 2**42: as in `draw_states`
    groups, batches, places = {}, [], []
    for row, layout in enumerate(layouts):
        groups.setdefault(layout, []).append(row)
    for _, rows in sorted(groups.items()):
        rows = np.array(rows)  # once: of a list, each permutation would make one
        epochs = [rng.permutation(rows) for _ in range(batch_size)]
        batches.append(np.concatenate(epochs).reshape(-1, batch_size))
        places.append((np.arange(len(rows)) + rng.random(len(rows))) / len(rows))  # all along the others'
    return np.concatenate(batches)[np.argsort(np.concatenate(places))]


def prior_steps(micro_steps, args):
    """How many of the first `micro_steps` have batches of prior prompts: every --prior_every'th."""
    return 0 if args.prior_prompts == "none" else micro_steps // args.prior_every


def is_prior_step(micro_step, args):
    """Whether the batch of a micro-step is of prior prompts."""
    return prior_steps(micro_step, args) < prior_steps(micro_step + 1, args)


def images_per_micro_step(args):
    """Of all processes."""
    return args.train_batch_size * PartialState().num_processes


def draw_batch(layouts, args, micro_step, process, num_processes):
    """Row indices and a random generator for each image of a process's micro-batch. Seed and place in the run alone
    decide: a resumed run, or two processes with half the batch each, draw the same. A batch of prior prompts has the
    picture sizes of the rows that come next."""
    total = args.train_batch_size * num_processes
    number, place = divmod(micro_step - prior_steps(micro_step, args), len(layouts))
    rows = batch_order(layouts, total, args.seed, number)[place]
    slots = range(process * args.train_batch_size, (process + 1) * args.train_batch_size)
    return [(int(rows[slot]), np.random.default_rng([args.seed, micro_step, slot])) for slot in slots]


def draw_prior(prior, draws, micro_step, args, process):
    """(index for `rows_of`, prompt) of each image of `draw_batch`, or None where the micro-batch is not of `prior`
    prompts (index -> prompts). Every other one shows references, if there are any; in the others, every prompt is
    drawn once before any is drawn again."""
    if not is_prior_step(micro_step, args):
        return None
    number = prior_steps(micro_step, args)
    turn, alone = divmod(number, 2) if len(prior) > 1 else (number, True)
    if not alone:
        return [(~row, prior[~row][rng.integers(len(prior[~row]))]) for row, rng in draws]
    first, shown = turn * images_per_micro_step(args) + process * args.train_batch_size, []
    for epoch, place in (divmod(place, len(prior[None])) for place in range(first, first + len(draws))):
        # 2**41: as in `draw_states`
        order = np.random.default_rng([args.seed, 2**41, epoch]).permutation(len(prior[None]))
        shown.append((None, prior[None][order[place]]))
    return shown


# ----------------------------------------------------------------------------------------------------------- contexts
def fingerprint(model, patterns, revision=None):
    """Checksum over the files of a model, the same for a folder and for the Hub's. Of weights, whose gigabytes are not
    read, it is over the beginnings of all tensors. Hub models are fetched first; a warm Hub cache needs no network."""
    options = {"revision": revision, "allow_patterns": patterns}
    folder = Path(model if os.path.isdir(model) else snapshot_download(model, **options))
    paths = sorted({p for pattern in patterns for p in folder.glob(pattern) if p.is_file()})
    return digest_of([(path.relative_to(folder).as_posix(), sample_of(path)) for path in paths])


def sample_of(path):
    """Checksum of a file, or of safetensors the header and the beginning of each tensor."""
    if path.suffix != ".safetensors":
        return checksum(path)
    with blamed_on(path), path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        tensors, digest = json.loads(header := file.read(length)), xxhash.xxh3_128(header)
        for first, last in sorted(t["data_offsets"] for name, t in tensors.items() if name != "__metadata__"):
            file.seek(8 + length + first)
            digest.update(file.read(min(last - first, 4096)))
    return digest.hexdigest()


class ContextCache:
    """Contexts, one safetensors file each: the student's of each caption, the teacher's of each image and caption. The
    key changes whenever images, crops, caption, models or settings change."""

    def __init__(self, family, args):
        self.folder = Path(args.context_cache_dir)
        models = ["text_encoder", "vae"] if sees_references(args) else ["text_encoder"]
        encoders = [f"{name}/*.{kind}" for name in models for kind in ("json", "safetensors")]
        base = fingerprint(args.pretrained_model_name_or_path, [*encoders, "tokenizer/*"], args.revision)
        # layers and lengths of contexts stand in the pipeline's own config
        config = family.load_config(args.pretrained_model_name_or_path, revision=args.revision)
        parts = component_folders(config)
        settings = {name: value for name, value in config.items() if name[0] != "_" and name not in parts}
        settings |= {"variant": args.variant} if args.variant else {}  # the files of all are hashed
        self.fp8 = args.context_dtype == "fp8"
        dtype = f"{weight_dtype_of(args)}{' in fp8' * self.fp8}"
        self.models = [digest_of([base, settings, family.encoding_version]), dtype, args.teacher_context]
        self.models += [args.teacher_prompt_suffix, args.encoder_quantization]
        if args.teacher_context == "vlm":
            vlm = fingerprint(args.vlm_model_name_or_path, family.vlm_files)
            self.models += [vlm, args.teacher_max_pixels]

    def paths(self, row, shown, caption):
        """Files of the student's and of the teacher's context; they are one for a prior prompt."""
        base, dtype, _, _, quantization, *_ = self.models
        keys = [[base, dtype, quantization, row["reference_hashes"], caption]]
        if shown["image_hash"]:
            keys.append([self.models, row["reference_hashes"], shown["image_hash"], shown["bucket"], caption])
        paths = [self.folder / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()}.safetensors" for key in keys]
        return paths[0], paths[-1]

    def read(self, row, shown, caption):
        """(student context, teacher context); see `read_context`."""
        paths = self.paths(row, shown, caption)
        contexts = {path: read_context(path) for path in set(paths)}
        return tuple(contexts[path] for path in paths)

    def write(self, path, context):
        aside = path.with_suffix(f".{os.urandom(8).hex()}.tmp")  # containers have the same process numbers
        if self.fp8:
            context = context | dict(zip(FP8_NAMES, to_fp8(context["prompt_embeds"])))
        tensors = {name: tensor.cpu().contiguous() for name, tensor in context.items()}
        try:
            with blamed_on(f"--context_cache_dir {self.folder}"):
                save_file(tensors, aside, {"xxh3_128": tensor_checksum(tensors)})
                apply_umask(aside)
                os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)  # of a full disk

    def holds(self, path):
        """Whether a context of whole length is there; `read` looks at its content. A file that is cut off is named."""
        if not os.path.exists(path):
            return False
        with contextlib.suppress(Exception), safe_open(path, "pt") as file:  # which compares its header with its size
            if "xxh3_128" in file.metadata():
                return True
        logger.error(f"The context {path} is damaged or cannot be read; it is encoded anew.")  # of whichever process
        return False


def read_context(path):
    """The tensors of a stored context. Raises InputError that names a file which is not as it was written."""
    with contextlib.suppress(Exception), safe_open(path, "pt") as file:  # of any kind: the damage may be anywhere
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        if file.metadata()["xxh3_128"] == tensor_checksum(tensors):
            values, scale = (tensors.pop(name, None) for name in FP8_NAMES)
            return tensors | {"prompt_embeds": values if scale is None else values.to(scale.dtype) * scale}
    told = "Remove it and start anew, or with --resume_from_checkpoint latest: it is then encoded anew."
    raise InputError(f"The context {path} is damaged or cannot be read. {told}")


def to_fp8(embeds):
    """(..., dim) in 8 bits, and for each of its vectors (..., 1) what they are to be multiplied with."""
    scale = (embeds.abs().amax(dim=-1, keepdim=True) / FP8_MAX).clamp(min=torch.finfo(embeds.dtype).tiny)
    return (embeds / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale


def tensor_checksum(tensors):
    """Hash over names, dtypes, shapes and values."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.view(torch.uint8).numpy())
    return digest.hexdigest()


def sees_references(args):
    """Whether the transformer is shown reference images, which the VAE encodes."""
    return args.teacher_context == "edit" or args.reference_column is not None


def weight_dtype_of(args):
    """dtype of the frozen weights: that of mixed precision."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(args.mixed_precision, torch.float32)


def encode_contexts(family, args, cache, dataset, pairs, accelerator):
    """Encodes the contexts of the (row index, caption) `pairs` that are not in the cache, then frees the encoders."""
    keys = list(dataset.select_columns(["image_hash", "bucket", "reference_hashes"]))
    # rows with the same images and caption share a file: file -> whether it is the teacher's, row index and caption
    files = {}
    for index, caption in pairs:
        for teacher, path in zip((False, True), cache.paths(*rows_of(keys, index, args), caption)):
            files.setdefault(path, (teacher, index, caption))
    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    bar = tqdm(list(files)[mine], "Checking contexts", delay=5, disable=not accelerator.is_local_main_process)
    missing = gather_object([(path, *files[path]) for path in bar if not cache.holds(path)])
    logger.info(f"Contexts: {len(missing)} of {len(files)} to encode.{' Loading the encoders.' if missing else ''}")
    if missing[mine]:
        with blamed_on(f"--context_cache_dir {cache.folder}"):
            cache.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=cache.folder).close()
        encode_missing(family, args, cache, dataset, missing[mine], accelerator)
    accelerator.wait_for_everyone()


def encode_missing(family, args, cache, dataset, missing, accelerator):
    """Loads the encoders, encodes what is `missing` (file, of teacher or not, row index, caption) and frees them."""
    quantization = quantization_config("text_encoder", args.encoder_quantization, transformers)
    unneeded = {"transformer": None} if sees_references(args) else {"transformer": None, "vae": None}
    pipeline = load_pipeline(family, args, quantization, **unneeded).to(accelerator.device)
    if args.teacher_context == "vlm":
        with blamed_on(f"--vlm_model_name_or_path {args.vlm_model_name_or_path}"):
            pipeline.load_multimodal_encoder(args.vlm_model_name_or_path, args.teacher_max_pixels)
    groups = [group for teacher in (False, True) if (group := [one for one in missing if one[1] == teacher])]
    starts = [(start, group) for group in groups for start in range(0, len(group), ENCODING_BATCH)]
    # the first batches of both kinds show how much all will take
    batches = [group[start : start + ENCODING_BATCH] for start, group in sorted(starts, key=lambda one: one[0] > 0)]
    loaded = read_ahead(functools.partial(load_batch, dataset, args), batches, args.dataset_num_workers)
    shown = {"desc": "Encoding contexts", "unit": " contexts", "unit_scale": accelerator.num_processes}
    with tqdm(total=len(missing), disable=not accelerator.is_local_main_process, **shown) as bar:
        for number, (batch, references, images) in enumerate(loaded, 1):
            encode_batch(pipeline, args, cache, batch, references, images)
            bar.update(len(batch))
            if number == len(groups):
                check_space(cache, groups, accelerator)
    del pipeline
    release_memory()
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(accelerator.device)  # what the encoders took is not of the training


def load_batch(dataset, args, batch):
    """A batch of `encode_missing` with the reference images and, for the teacher, the training image of each row."""
    _, (teacher, *_), indices, _ = zip(*batch)
    rows = [rows_of(dataset, index, args) for index in indices]
    references = [[load_image(source) for source in as_list(row.get("references"))] for row, _ in rows]
    return batch, references, [training_image(shown) for _, shown in rows] if teacher else None


def encode_batch(pipeline, args, cache, batch, references, images):
    """Encodes and stores a few contexts of the student or, with `images`, of the teacher, in one forward."""
    paths, _, _, captions = zip(*batch)
    if images:
        prompts = [caption + args.teacher_prompt_suffix for caption in captions]
        contexts = pipeline.encode_teacher(prompts, images, args.teacher_context, references)
    else:
        contexts = pipeline.encode_student(captions, references)
    for path, context in zip(paths, contexts, strict=True):
        cache.write(path, context)


def check_space(cache, groups, accelerator):
    """Says how much the contexts of all processes will take, by the first batch of each of the `groups`. Raises
    InputError where the disk has less."""
    sizes = [np.mean([path.stat().st_size for path, *_ in group[:ENCODING_BATCH]]) for group in groups]
    left = sum(size * len(group[ENCODING_BATCH:]) for size, group in zip(sizes, groups)) * accelerator.num_processes
    left, free = left / 2**30, shutil.disk_usage(cache.folder).free / 2**30
    told = f"{left:.1f} GiB are still needed for contexts, {free:.1f} GiB are free."
    logger.info(f"Disk space: {told}")
    if left > free:
        remedy = "Free some, or choose a folder on another disk; what is encoded is kept."
        raise InputError(f"--context_cache_dir {cache.folder}: {told} {remedy}")


# ------------------------------------------------------------------------------------------------------------- method
def state_loss(student_velocity, teacher_velocity, sigma, weighting):
    """w_k || u_s - sg(u_t) ||^2 of each image (B,), mean over elements; `sigma` (B,) is that of the image's state.

    w_k = 1 is the paper's loss on velocities. w_k = sigma_k^2 is the same loss on x0_hat = x_t - sigma u, which is
    what the authors' code trains with.
    """
    weight = sigma**2 if weighting == "x0" else 1.0
    return weight * (student_velocity - teacher_velocity.detach()).square().mean(dim=(1, 2, 3))


@torch.no_grad()
def update_ema(shadow, parameters, decay):
    """theta_bar <- decay * theta_bar + (1 - decay) * theta, in the fp32 of `shadow`: bf16 would round it away."""
    for average, parameter in zip(shadow, parameters, strict=True):
        average.lerp_(parameter.to(average.device, average.dtype), 1 - decay)


def places_in_run(micro_step, args, accelerator):
    """Numbers in the run of the images of a process's micro-batch, for `draw_states`."""
    if accelerator.is_fsdp2:  # weights are gathered in every forward: all images must end at the same states
        return [micro_step] * args.train_batch_size
    first = (micro_step * accelerator.num_processes + accelerator.process_index) * args.train_batch_size
    return range(first, first + args.train_batch_size)


def draw_states(args, places):
    """The M of K states, in ascending order, at which images are trained; `places` are the images' numbers in the run.
    Of K consecutive images each state is drawn M times. As in `draw_batch`, seed and place in the run alone decide."""
    drawn = []
    for cycle, place in (divmod(place, args.rollout_steps) for place in places):
        # 2**40 is no micro-step: below 256 images in a batch, no other draw has these numbers
        order = np.random.default_rng([args.seed, 2**40, cycle]).permutation(args.rollout_steps)
        drawn.append(sorted(np.roll(order, -place * args.states_per_rollout)[: args.states_per_rollout].tolist()))
    return drawn


def rollout(pipeline, transformer, teacher, batch, args, accelerator):
    """Yields, for the first, second, .. M-th drawn state k of every image, k and w_k || u_s - sg(u_t) ||^2, both (B,).

    At a drawn state x_{t_k}:  u_t = v_theta_bar(x_{t_k}, t_k, c_t)   teacher: EMA weights, sees the image
                               u_s = v_theta(x_{t_k}, t_k, c_s)       student: text only
    From every state:          x_{t_{k+1}} = x_{t_k} + (sigma_{k+1} - sigma_k) sg(u_s)

    States are not differentiated through, the forward that drives the rollout is the one that is trained, and nothing
    is computed after the last drawn state. Each k is drawn with probability M / K, so that the mean over the drawn
    states has the expectation (1/K) sum_k w_k || u_s - sg(u_t) ||^2: the paper's loss.
    """
    latents, student_contexts, teacher_contexts, drawn = batch
    timesteps, sigmas = pipeline.few_step_grid(args.rollout_steps, latents), pipeline.scheduler.sigmas
    latents, steps, starts = latents.clone(), sigmas.diff().view(-1, 1, 1, 1), [0] * len(latents)
    for ends in zip(*drawn):
        for k in range(max(ends)):  # those images alone that are not yet where they are trained
            moving = [i for i, (start, end) in enumerate(zip(starts, ends)) if start <= k < end]
            if moving:
                with torch.no_grad(), accelerator.autocast():
                    contexts = [student_contexts[i] for i in moving]
                    velocity = pipeline.velocity(pipeline.transformer, latents[moving], timesteps[k], contexts)
                latents[moving] += steps[k] * velocity
        k = torch.tensor(ends, device=latents.device)
        # the teacher first: weights that change between the student's forward and its backward corrupt the gradient
        with torch.no_grad(), accelerator.autocast(), teacher.network() as network:
            teacher_velocity = pipeline.velocity(network, latents, timesteps[k], teacher_contexts)
        with accelerator.autocast():
            student_velocity = pipeline.velocity(transformer, latents, timesteps[k], student_contexts)
        yield k, state_loss(student_velocity, teacher_velocity, sigmas[k], args.loss_weighting)
        latents, starts = latents + steps[k] * student_velocity.detach(), [end + 1 for end in ends]


def backward_each_state(states, transformer, args, accelerator, synchronize, weight=1.0):
    """Accumulates the gradient of `weight` * L, L = (1/M) sum_k loss_k, mean over images. Returns losses, without the
    weight, and counts per state (2, K). Each state's graph is freed by its own backward before the next is computed:
    memory does not grow with M.
    `synchronize` is true in the last micro-step, whose last backward averages the gradients of all processes (with
    FSDP every backward does, because gradients that wait for others are held whole)."""
    table = torch.zeros(2, args.rollout_steps, device=accelerator.device)
    for number in range(args.states_per_rollout):
        last = synchronize and number == args.states_per_rollout - 1
        with contextlib.nullcontext() if last or accelerator.is_fsdp2 else accelerator.no_sync(transformer):
            k, losses = next(states)
            if getattr(args, "fused_backward_pass", False):  # of the full script: weights change during the backward
                check_finite(losses.tolist())
            parts = args.states_per_rollout * args.gradient_accumulation_steps
            accelerator.backward(weight * losses.mean() / parts)
        table.index_add_(1, k, torch.stack([losses.detach(), torch.ones_like(losses)]))
    return table


class FullTeacher:
    """theta_bar of the whole transformer, held as `--ema_decay` and `--ema_device` ask for.

    decay 0: the student itself. decay 1: a frozen copy in the compute dtype. Otherwise an fp32 average: on the
    accelerator it computes under autocast; on the CPU, n = `--ema_refresh_steps` updates are made as one, theta_bar <-
    decay^n theta_bar + (1 - decay^n) theta, and copied to a network in the compute dtype.
    """

    def __init__(self, transformer, args, accelerator):
        self.student, self.module, self.shadow = transformer, transformer, {}
        self.decay, self.refresh_steps, self.age = args.ema_decay, args.ema_refresh_steps, 0
        averaged = 0 < self.decay < 1
        self.on_cpu = averaged and args.ema_device == "cpu"
        if self.decay > 0:
            self.module = copy.deepcopy(transformer).requires_grad_(False)
            if args.compile_blocks:  # which a copy is not
                self.module.compile_repeated_blocks()
        if averaged and not self.on_cpu:
            self.module.float()
        if self.decay > 0 and accelerator.is_fsdp2:
            self.module = fsdp2_prepare_model(accelerator, self.module)
        if averaged:
            weights = self.module.state_dict()
            to_cpu = {"device": "cpu", "dtype": torch.float32, "copy": True}
            self.shadow = {n: w.to(**to_cpu) for n, w in weights.items()} if self.on_cpu else weights

    def step(self):
        """To be called after each update of the student."""
        if not self.shadow:
            return
        self.age += 1
        if not self.on_cpu or self.age == self.refresh_steps:
            self.refresh()

    def refresh(self):
        """Brings average and network up to the last step."""
        if self.age:
            update_ema(self.shadow.values(), self.student.state_dict().values(), self.decay**self.age)
        self.age = 0
        if self.on_cpu:
            self.module.load_state_dict(self.shadow)
        for unit in self.module.modules():
            if isinstance(unit, FSDPModule):
                unit.reshard()  # what the last forward gathered is out of date

    def resume(self, step):
        """Brings the network to the average as a checkpoint had it; the next refresh is as in an uninterrupted run."""
        self.refresh()
        self.age = step % self.refresh_steps if self.on_cpu else 0

    def network(self):
        """Context manager that gives the transformer that computes with theta_bar."""
        return contextlib.nullcontext(self.module)


def make_batch(pipeline, rows, cache, draws, prior, args, device):
    """Noise (B, C, h, w), student contexts and teacher contexts of the drawn rows, of one caption of each at random.
    `prior`: what `draw_prior` drew in their place; the noise is then of the rows' picture sizes."""
    noise, contexts = [], []
    for place, (index, rng) in enumerate(draws):
        row = rows[index]
        index, caption = prior[place] if prior else (index, row["captions"][rng.integers(len(row["captions"]))])
        contexts.append(cache.read(*rows_of(rows, index, args), caption))
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
        noise.append(pipeline.initial_noise(*row["bucket"], generator))
    return send_to_device((torch.cat(noise), *map(list, zip(*contexts))), device)


def read_ahead(make, items, threads=1):
    """Yields make(item) of each of `items`; `threads` make the next ones, and one more, while the device computes."""
    with ThreadPoolExecutor(threads) as reader:
        items = iter(items)
        made = collections.deque(reader.submit(make, item) for item in itertools.islice(items, threads + 1))
        while made:
            batch = made.popleft().result()
            made.extend(reader.submit(make, item) for item in itertools.islice(items, 1))
            yield batch


# --------------------------------------------------------------------------------------------------------- validation
def validation_pairs(dataset, args):
    """(row index, prompt) of each row of the validation picture."""
    pairs = []
    for i, prompt in enumerate(args.validation_prompt or [None] * args.num_validation_images):
        turn, index = divmod(i, len(dataset))
        captions = dataset[index]["captions"]
        pairs.append((index, prompt or captions[turn % len(captions)]))
    return pairs


def validation_sheet(rows, texts):
    """One picture of `rows` of three pictures, under headings, and above the text of each row."""
    (width, height), size = rows[0][0].size, max(10, rows[0][0].width // 32)
    across, down = max(width, 8 * size), height + 2 * size  # headings have room, too
    sheet = Image.new("RGB", (3 * across, 2 * size + len(rows) * down), "white")
    write = functools.partial(ImageDraw.Draw(sheet).text, fill="black", font=ImageFont.load_default(size))
    for column, heading in enumerate(HEADINGS):
        write((column * across, size // 3), heading)
        for number, pictures in enumerate(rows):
            picture = ImageOps.pad(pictures[column], (width, height), color="white")
            sheet.paste(picture, (column * across, 2 * size + number * down))
    for number, text in enumerate(texts, 1):
        write((0, number * down + size // 3), text)
    return sheet


@torch.no_grad()
def log_validation(pipeline, teacher, dataset, cache, args, accelerator, step):
    """Writes a picture with a row per pair: student | teacher | the image that the teacher sees, in as many steps as
    users will run."""
    student, pairs, rows = pipeline.transformer, validation_pairs(dataset, args), []
    for number, (index, prompt) in enumerate(pairs):
        row, shown = dataset[index], shown_row(dataset, index, args)
        noise = pipeline.initial_noise(*row["bucket"], torch.Generator().manual_seed(args.seed + number))
        networks, pictures = (contextlib.nullcontext(student), teacher.network()), []
        for network, context in zip(networks, cache.read(row, shown, prompt)):
            with network as transformer, accelerator.autocast():
                latents = noise.to(accelerator.device)
                pictures += pipeline.sample(transformer, [context], latents, args.num_inference_steps)
        try:
            pictures.append(training_image(shown))
        except ValueError as error:  # gone since the start: no reason to end a run
            logger.warning(f"{error} It is white in the validation picture.")
            pictures.append(Image.new("RGB", pictures[0].size, "white"))
        rows.append(pictures)
    if not accelerator.is_main_process:
        return
    folder, samples = Path(args.output_dir) / "validation", Path(args.output_dir) / "samples"  # of the model card
    for old in samples_in(Path(args.output_dir)):
        old.unlink()
    for made in (folder, samples):
        made.mkdir(parents=True, exist_ok=True)
    for number, (picture, *_) in enumerate(rows if step else []):
        picture.save(samples / f"{number}.png")
    sheet = validation_sheet(rows, [f"step {step}: {prompt}" for _, prompt in pairs])
    sheet.save(folder / f"step-{step:06d}.png")
    logger.info(f"Validation picture: {folder}/step-{step:06d}.png")
    for tracker in accelerator.trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({" | ".join(HEADINGS): np.asarray(sheet)[None]}, step=step, **layout)


# ------------------------------------------------------------------------------------------------------ output folder
def open_output_dir(args):
    """Makes OUTPUT_DIR and returns its lock, to be kept: one run per folder. The system frees it however the process
    ends. Raises ValueError for a folder that is not writable, is of the data or models, or has a run in it."""
    folder = Path(args.output_dir)
    for flag in ("instance_data_dir", "dataset_name", "pretrained_model_name_or_path", "vlm_model_name_or_path"):
        other, ours = Path(getattr(args, flag) or os.devnull).resolve(), folder.resolve()
        around = "data" in flag and other.is_relative_to(ours)
        if other.is_dir() and (ours.is_relative_to(other) or around):
            both = f"--output_dir {folder} and --{flag} {other}"
            raise ValueError(f"{both}: one lies in the other; choose another folder.")
    lock, owner = FileLock(folder / ".lock", is_singleton=True), folder / ".lock_owner"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        owner.write_text(str(os.getpid()))
    except Timeout as error:
        process = f"process {owner.read_text()}" if owner.exists() else "another process"
        raise ValueError(f"--output_dir {folder} is in use by {process}; wait, or choose another folder.") from error
    except OSError as error:
        raise ValueError(f"--output_dir {folder} is not writable ({error.strerror}).") from error
    return lock


def check_output_dir(args):
    """Raises ValueError, with the ways out, for an OUTPUT_DIR where something would be lost or mixed up."""
    folder, asked = Path(args.output_dir), args.resume_from_checkpoint
    checkpoints = list_checkpoints(folder)
    if asked not in (None, "latest") and not (Path(asked) / STATE_NAME).is_file():
        there = ", ".join(path.name for path in checkpoints) or "none"
        told = f"{asked} is no checkpoint: it holds no {STATE_NAME}"
        raise ValueError(f"--resume_from_checkpoint {told}. Checkpoints in {folder}: {there}.")
    if asked == "latest" and checkpoints:
        return
    if asked not in (None, "latest") and (start := Path(asked).resolve()).parent == folder.resolve():
        if start.name in [path.name for path in checkpoints[:-1]]:
            later = f"the steps from there on would be mixed with {checkpoints[-1].name}, which is later"
            remedy = "give another --output_dir, or move the later checkpoints away."
            raise ValueError(f"--resume_from_checkpoint {start}: {later}; {remedy}")
        return
    own = [path.name for path in checkpoints if (path / STATE_NAME).exists()]
    foreign = [path.name for path in checkpoints if path.name not in own]
    results = [path.name for path in results_in(folder)]
    if not own and SETTINGS_NAME not in results:  # of another program, or somebody's project
        ours = (folder / "validation").is_dir()  # of a run that ended before its first checkpoint
        others = ["transformer"] if ours else ["transformer", "samples"]
        foreign += results + [name for name in others if (folder / name).exists()]
    if foreign:
        told = f"--output_dir {folder} holds {foreign[0]}, which no run of this script wrote"
        raise ValueError(f"{told}; choose another folder.")
    if (own or results) and not args.overwrite_output_dir:
        told = f"--output_dir {folder} holds a run ({[*own, *results][0]})"
        way = "Go on with it (--resume_from_checkpoint latest), choose" if own else "It has no checkpoint left: choose"
        raise ValueError(f"{told}. {way} another folder, or remove what it wrote (--overwrite_output_dir).")


def results_in(folder):
    """What the end of a run writes into OUTPUT_DIR."""
    parts = []
    with contextlib.suppress(OSError, ValueError, AttributeError):  # there is none, or it is of something else
        parts = component_folders(json.loads((folder / "model_index.json").read_text()))
    return [folder / n for n in (LORA_WEIGHT_NAME, *REPOSITORY_FILES, *parts) if (folder / n).exists()]


def samples_in(folder):
    """Pictures of the card in OUTPUT_DIR; others may lie beside them."""
    return [path for path in (folder / "samples").glob("*.png") if path.stem.isdecimal()]


def component_folders(index):
    """Names of the components, each a folder, that a model_index.json lists."""
    # each is [library, class], or [null, null]
    named = {n: value[0] for n, value in index.items() if isinstance(value, list) and value}
    return [n for n, library in named.items() if isinstance(library, str) and n.isidentifier() and n[0] != "_"]


def clear_output_dir(args):
    """Removes what a run wrote into OUTPUT_DIR, and nothing else; contexts are kept."""
    folder = Path(args.output_dir)
    patterns = [".checkpoint-*.tmp", ".lora.tmp", ".transformer.tmp", "logs/dopsd*", "validation/step-*.png"]
    others = [path for pattern in patterns for path in folder.glob(pattern)]
    for path in [*list_checkpoints(folder), *results_in(folder), *samples_in(folder), *others]:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


# -------------------------------------------------------------------------------------------------------- checkpoints
@dataclasses.dataclass
class Training:
    """What the steps of a run change, and what its checkpoints hold."""

    accelerator: Accelerator
    transformer: torch.nn.Module
    teacher: object
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    networks: dict  # folder in a checkpoint -> name -> live tensor, of student and teacher
    identity: dict  # see `identity_of`
    prepare: Callable  # called with a checkpoint's folder before anything is written there
    losses: list = dataclasses.field(default_factory=list)  # on training images
    warned: bool = False

    def write(self, folder):
        """Writes networks and the states of optimiser and gradient scaler into a checkpoint's folder."""
        self.prepare(folder)
        for network, tensors in self.networks.items():
            save_weights(tensors, folder / network)
        if self.accelerator.is_main_process:
            self.write_states(self.optimizer.optimizer.state_dict(), folder / OPTIMIZER_NAME)

    def write_states(self, state, path):
        """Of the optimiser and the gradient scaler."""
        scaler = {"scaler": self.accelerator.scaler.state_dict()} if self.accelerator.scaler else {}
        try:
            with path.open("wb") as file:
                torch.save({"optimizer": state, **scaler}, file)
        except RuntimeError as error:  # torch cannot close a file that a full disk broke off
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None

    def read(self, folder):
        """Loads what `write` wrote. Nothing in it can run code."""
        for network, tensors in self.networks.items():
            load_weights(tensors, folder / network)
        self.load_states(torch.load(folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True))

    def load_states(self, saved):
        self.optimizer.optimizer.load_state_dict(saved["optimizer"])
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(saved["scaler"])


class ShardedTraining(Training):
    """With FSDP, all processes write their shards of student, teacher and optimiser at once, as safetensors, which any
    number of processes reads. States of 8 bits, whose blocks cannot be split anew, stay in a file of their process."""

    @property
    def own_states(self):
        return not isinstance(self.optimizer.optimizer, torch.optim.AdamW)

    def optimizer_path(self, folder):
        return folder / (f"optimizer-{self.accelerator.process_index}.bin" if self.own_states else OPTIMIZER_NAME)

    def shards(self):
        """Name -> shard of the tensors of student and teacher."""
        return {f"{network}.{n}": t for network, tensors in self.networks.items() for n, t in tensors.items()}

    def write(self, folder):
        self.prepare(folder)
        shards, state = self.shards(), self.optimizer.optimizer.state_dict()
        state["state"] = {index: dict(values) for index, values in state["state"].items()}
        for index, values in state["state"].items():
            for name, tensor in values.items():
                if isinstance(tensor, DTensor):  # None: it is in the shards
                    shards |= {} if self.own_states else {f"optimizer.{index}.{name}": tensor}
                    values[name] = tensor.to_local() if self.own_states else None
        save_shards(shards, folder / SHARDS_NAME)
        if self.accelerator.is_main_process or self.own_states:
            self.write_states(state, self.optimizer_path(folder))

    def read(self, folder):
        shards, parameters = self.shards(), [p for group in self.optimizer.param_groups for p in group["params"]]
        saved = torch.load(self.optimizer_path(folder), map_location="cpu", weights_only=True)
        for (index, values), parameter in zip(saved["optimizer"]["state"].items(), parameters, strict=True):
            for name, tensor in values.items():
                if tensor is None:
                    values[name] = shards[f"optimizer.{index}.{name}"] = torch.empty_like(parameter)
                elif tensor.shape == parameter.to_local().shape:
                    place = parameter.device_mesh, parameter.placements
                    whole = {"run_check": False, "shape": parameter.shape, "stride": parameter.stride()}
                    values[name] = DTensor.from_local(tensor, *place, **whole)
        reader = distributed_checkpoint.HuggingFaceStorageReader(folder / SHARDS_NAME)
        with first_failure():
            distributed_checkpoint.load(shards, storage_reader=reader)
        self.load_states(saved)


@contextlib.contextmanager
def first_failure():
    """Within: an error of torch's distributed checkpoints, which is no Exception, becomes that of a process."""
    try:
        yield
    except distributed_checkpoint.CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


def save_shards(tensors, folder):
    """Writes name -> DTensor, each process its shards, in safetensors of about 2 GiB: a file is held in memory twice
    while it is written, and not in pinned memory, which torch would keep."""
    sizes = np.cumsum([tensor.nbytes / PartialState().num_processes for tensor in tensors.values()])
    numbers = {name: 1 + int(size // 2**31) for name, size in zip(tensors, sizes)}
    writer = distributed_checkpoint.HuggingFaceStorageWriter(folder, numbers, save_distributed=True)
    writer.per_thread_copy_ahead = 0
    with first_failure():
        distributed_checkpoint.save(tensors, storage_writer=writer)


def list_checkpoints(output_dir):
    """Folders that are named as complete checkpoints, oldest first."""
    steps = {path: path.name.split("-", 1)[1] for path in Path(output_dir).glob("checkpoint-*") if path.is_dir()}
    return sorted((path for path, step in steps.items() if step.isdecimal()), key=lambda path: int(steps[path]))


def checksum(path):
    """Checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def write_through(path):
    """Waits until a file is on the disk. Returns its checksum."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return checksum(path)


def digest_of(value):
    """Checksum of what JSON can hold."""
    return xxhash.xxh3_128(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_state(checkpoint):
    """What `save_checkpoint` noted of a checkpoint. Raises ValueError where a byte of it is missing or damaged."""
    name = STATE_NAME
    try:
        state = json.loads((checkpoint / name).read_text("utf-8"))
        if state.pop("checksum") != digest_of(state) or not {"step", "script", "settings", "identity"} <= state.keys():
            raise ValueError("it has changed since it was written")
        for name, wanted in state["files"].items():
            if checksum(checkpoint / name) != wanted:
                raise ValueError("it has changed since it was written")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{checkpoint} is missing or damaged ({name}: {error})") from error
    return {**state, "path": checkpoint}


def find_checkpoint(args):
    """What `read_state` gives of the checkpoint to resume from, or None. `latest` is the newest that is whole. Raises
    ValueError where there is none, or it is of the other script."""
    asked = args.resume_from_checkpoint
    if not asked:
        return None
    checkpoints = list_checkpoints(args.output_dir)[::-1] if asked == "latest" else [Path(asked)]
    if not checkpoints:
        logger.info(f"{args.output_dir} holds no checkpoint: the run starts at step 0.")
        return None
    for path in checkpoints:
        try:
            state = read_state(path)
        except ValueError as error:
            damage = f"--resume_from_checkpoint {error}"
            if asked != "latest":
                raise ValueError(damage) from error
            logger.warning(damage)
            continue
        if state["script"] != Path(__file__).name:
            raise ValueError(f"--resume_from_checkpoint {path} is of {state['script']}; go on with that script.")
        return state
    raise ValueError(f"{damage}; no checkpoint is whole.")


def identity_of(args, dataset, cache):
    """What the weights of a run depend on, besides its flags: name -> checksum or number."""
    state, shards = AcceleratorState(), 1
    if state.distributed_type == DistributedType.FSDP:  # its 8-bit states stay in files of their processes
        shards = state.num_processes if args.optimizer == "adamw8bit" else "of any number of processes"
    prompts, edits = read_prior_prompts(args)
    return {
        "images": digest_of(dataset["image_hash"][:]),
        "captions": digest_of(dataset["captions"][:]),
        "references": digest_of(dataset["reference_hashes"][:]),
        "prior prompts": digest_of([prompts, edits] if edits else prompts),
        "weights of text encoder, VAE or VLM": digest_of(cache.models),
        "weights of the transformer": fingerprint(
            args.pretrained_model_name_or_path, TRANSFORMER_FILES, args.revision
        ),
        "settings of the scheduler": fingerprint(args.pretrained_model_name_or_path, SCHEDULER_FILES, args.revision),
        "images per micro-step (--train_batch_size times processes)": images_per_micro_step(args),
        "shards of the weights": shards,
    }


def check_resume(state, identity, args):
    """Raises ValueError where going on from a checkpoint would be another training; see `MAY_CHANGE`."""
    checkpoint = state["path"]
    ours, theirs = vars(args), state["settings"]
    # flags that follow from others come last; one that another version had, or has not, counts as None
    for name in sorted({*ours, *theirs} - MAY_CHANGE, key=lambda name: (name in (*FOLLOWING, "lora_alpha"), name)):
        if ours.get(name) != theirs.get(name):
            raise ValueError(f"--{name} is {ours.get(name)}, but {checkpoint} was trained with {theirs.get(name)}.")
    for name, value in identity.items():
        if value != state["identity"].get(name, value):  # another version may not have noted it
            told = f"{checkpoint}: the {name} differ from those it was trained with"
            raise ValueError(f"{told}. Go on with the same, or start in another --output_dir.")
    if state["step"] > args.max_train_steps:
        limit = f"--max_train_steps {args.max_train_steps}"
        raise ValueError(f"{checkpoint} is beyond {limit}: give at least {state['step']}.")


def apply_umask(*paths):
    """Gives files the permissions of other files; safetensors lets nobody but the user read what it writes."""
    for path in paths:
        os.chmod(path, 0o666 & ~UMASK)


def save_weights(tensors, folder, dtype=None, kept=()):
    """Safetensors in the Hub's layout, sharded where large; FSDP's shards are gathered on the main process. `dtype` is
    that of all tensors except those in whose names one of the parts in `kept` stands."""
    gathered, main = {}, PartialState().is_main_process
    for name, tensor in tensors.items():
        # the clone leaves out the padding of a tensor that does not divide evenly over the processes
        whole = tensor.detach().full_tensor().clone() if isinstance(tensor, DTensor) else tensor.detach()
        if main:
            gathered[name] = whole.to("cpu", None if {*name.split(".")} & {*kept} else dtype).contiguous()
    if main:
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_torch_state_dict(gathered, folder, filename_pattern="diffusion_pytorch_model{suffix}.safetensors")
        apply_umask(*Path(folder).glob("*.safetensors"))


@torch.no_grad()
def load_weights(tensors, folder):
    """Copies what `save_weights` wrote into `tensors`. Raises ValueError where names or shapes differ."""
    missing = set(tensors)
    for path in sorted(folder.glob("*.safetensors")):
        for name, saved in load_file(path).items():
            target = tensors.get(name)
            if target is None or target.shape != saved.shape:
                raise ValueError(f"{path.name} has another {name}")
            target.copy_(saved)
            missing.discard(name)
    if missing:
        raise ValueError(f"{folder.name} lacks {min(missing)}")


def prepare_checkpoint(transformer, networks, folder):
    """Writes the configs that make the folders of a checkpoint loadable, where they hold whole weights."""
    if PartialState().is_main_process and not isinstance(transformer, FSDPModule):
        for network in networks:
            transformer.save_config(folder / network)


def save_checkpoint(training, args, step):
    """Writes checkpoint-STEP aside, renames it when it is on the disk, then removes the oldest beyond the limit."""
    folder, accelerator = Path(args.output_dir), training.accelerator
    final, aside = folder / f"checkpoint-{step}", folder / f".checkpoint-{step}.tmp"
    if accelerator.is_main_process:
        for left in folder.glob(".checkpoint-*.tmp"):  # of runs that were killed
            shutil.rmtree(left)
        aside.mkdir()
    accelerator.wait_for_everyone()
    training.write(aside)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        files = {p.relative_to(aside).as_posix(): write_through(p) for p in sorted(aside.rglob("*")) if p.is_file()}
        state = {"step": step, "script": Path(__file__).name, "settings": vars(args)}
        state |= {"identity": training.identity, "files": files}
        (aside / STATE_NAME).write_text(json.dumps({**state, "checksum": digest_of(state)}, indent=2))
        write_through(aside / STATE_NAME)
        if final.exists():  # a damaged one, which was passed over
            shutil.rmtree(final)
        aside.rename(final)
        checkpoints = list_checkpoints(folder)
        whole = checkpoints[: checkpoints.index(final) + 1]  # later ones are damaged
        for old in whole[: -args.checkpoints_total_limit] if args.checkpoints_total_limit else []:
            old.unlink() if old.is_symlink() else shutil.rmtree(old)
    accelerator.wait_for_everyone()


def resume(training, state):
    """Loads a checkpoint, if there is one. Returns the step to start from."""
    if not state:
        return 0
    with blamed_on(f"--resume_from_checkpoint {state['path']} cannot be loaded"):  # though its checksums are right
        training.read(state["path"])
    training.lr_scheduler.last_epoch = state["step"]  # the rate of that step came with the optimiser
    logger.info(f"Resumed from {state['path']} at step {state['step']}.")
    return state["step"]


# ------------------------------------------------------------------------------------------------------------- output
def public_settings(args):
    """The run's flags for other people's eyes: of absolute paths, which tell about this machine, the last part alone,
    as .../NAME, which is no folder that another run could take for it."""
    texts = "instance_prompt", "teacher_prompt_suffix"
    paths = {n: v for n, v in vars(args).items() if isinstance(v, str) and os.path.isabs(v) and n not in texts}
    own = args.context_cache_dir == os.path.join(args.output_dir, "contexts")  # another run has another folder
    shown = vars(args) | {name: f".../{Path(path).name}" for name, path in paths.items()}
    return shown | ({"context_cache_dir": None} if own else {})


def settings_to_share(args):
    """`public_settings` without what follows from the base or the rank, as with another one other defaults apply, and
    without what is asked for once."""
    family, settings = family_of(args.pretrained_model_name_or_path, args.revision), public_settings(args)
    settings |= {"overwrite_output_dir": False, "resume_from_checkpoint": None, "push_to_hub": False}
    for name in FOLLOWING:
        resolve_arguments(family, own := argparse.Namespace(**vars(args) | {name: None}))
        settings[name] = None if getattr(own, name) == getattr(args, name) else settings[name]
    if args.vlm_model_name_or_path in family.vlms.values():
        settings["vlm_model_name_or_path"] = None
    if "lora_alpha" in settings and args.lora_alpha == args.rank:
        settings["lora_alpha"] = None
    return settings


def save_pipeline(transformer, family, args):
    """Writes OUTPUT_DIR in the base's layout: the trained transformer, the base's other parts, the pipeline's code."""
    folder, base = Path(args.output_dir), args.pretrained_model_name_or_path
    aside = folder / ".transformer.tmp"
    # a class of diffusers names the parts that are in fp32 whatever the dtype
    save_weights(transformer.state_dict(), aside, weight_dtype_of(args), transformer._keep_in_fp32_modules or [])
    if not PartialState().is_main_process:
        return
    # FSDP gives the class of what it shards another name
    names = (f'"{kind.__name__}"' for kind in (type(transformer), family.transformer_class))
    (aside / "config.json").write_text(transformer.to_json_string().replace(*names))
    shutil.rmtree(folder / "transformer", ignore_errors=True)
    aside.rename(folder / "transformer")
    index = family.load_config(base, revision=args.revision)
    parts = [name for name in component_folders(index) if name != "transformer"]
    if not os.path.isdir(base):
        base = snapshot_download(base, revision=args.revision, allow_patterns=[f"{name}/*" for name in parts])
    for name in parts:
        shutil.copytree(Path(base, name), folder / name, copy_function=shutil.copyfile, dirs_exist_ok=True)
    if args.num_inference_steps != family.steps_of(args.pretrained_model_name_or_path, args.revision):
        index["num_inference_steps"] = args.num_inference_steps
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    # diffusers writes where a model was loaded from
    for path in [folder / "model_index.json", *folder.glob("*/config.json")]:
        config = json.loads(path.read_text())
        if os.path.isabs(config.get("_name_or_path") or ""):
            config["_name_or_path"] = Path(config["_name_or_path"]).name
            path.write_text(json.dumps(config, indent=2) + "\n")
    shutil.copyfile(pipeline_dopsd.__file__, folder / "pipeline_dopsd.py")
    # one name for all families: diffusers runs each such file in the same module and allows one pipeline class in it
    (folder / "pipeline.py").write_text(f"from .pipeline_dopsd import {family.__name__} as Pipeline  # noqa: F401\n")
    settings = json.dumps(settings_to_share(args), indent=2, ensure_ascii=False)
    (folder / SETTINGS_NAME).write_text(settings + "\n", "utf-8")


# ------------------------------------------------------------------------------------------------------ card and push
def gallery(dataset, args):
    """File name -> prompt of the pictures in `samples` that `log_validation` writes."""
    pairs = validation_pairs(dataset, args) if args.validation_steps else []
    return {f"samples/{number}.png": prompt for number, (_, prompt) in enumerate(pairs)}


def card_data(args, samples, tags):
    """Metadata of the card. The base's licence is read from its card; the Hub is asked for it only before a push."""
    base, licence, prompt = args.pretrained_model_name_or_path, {}, args.instance_prompt
    local, task = Path(base).is_dir(), "image-to-image" if args.reference_column else "text-to-image"
    with contextlib.suppress(Exception):  # no card, not in the cache, or not readable: then no licence is claimed
        options = {"revision": args.revision, "local_files_only": not args.push_to_hub}
        card = Path(base) / "README.md" if local else hub.hf_hub_download(base, "README.md", **options)
        data = ModelCard.load(card).data
        licence = {name: data.get(name) for name in ("license", "license_name", "license_link") if data.get(name)}
    there = [name for name in samples if (Path(args.output_dir) / name).exists()]
    widget = [{"text": samples[name], "output": {"url": name}} for name in there]
    what = {"library_name": "diffusers", "pipeline_tag": task, "tags": [task, "diffusers", "d-opsd", *tags]}
    base = None if local else base  # the Hub refuses what is no repository
    return hub.ModelCardData(base_model=base, instance_prompt=prompt, widget=widget or None, **what, **licence)


def repository_name(args):
    """What --hub_model_id names, or the name of OUTPUT_DIR."""
    return args.hub_model_id or Path(args.output_dir).resolve().name


def example_code(args, samples, loading):
    """Code that draws one picture. `loading`: lines that make `pipe`."""
    prompt = json.dumps(args.instance_prompt or next(iter(samples.values()), "your prompt"), ensure_ascii=False)
    load, image = "", ""
    if args.reference_column:  # references are training images, which are not published
        load, image = "\nfrom diffusers.utils import load_image", 'image=load_image("reference.png"), '  # of the user
    return f"""import torch
from diffusers import DiffusionPipeline{load}

{loading}
pipe.to("cuda" if torch.cuda.is_available() else "cpu")  # or, with less memory: pipe.enable_model_cpu_offload()
image = pipe({image}prompt={prompt}, height={args.resolution}, width={args.resolution},
             num_inference_steps={args.num_inference_steps}, guidance_scale=0.0).images[0]
image.save("image.png")"""


def save_card(args, samples, step, describe, name):
    """Writes README.md for users who load the result as `name`. `samples`: file name -> prompt of the gallery."""
    about, loading, tags = describe(args, name)
    data = card_data(args, samples, tags)
    images = args.train_batch_size * args.gradient_accumulation_steps * PartialState().num_processes
    given = "text and reference images" if args.reference_column else "text alone"
    way = {"vlm": "in its prompt", "edit": "as a reference"}[args.teacher_context]
    teacher = "the base" if args.ema_decay == 1 else f"an average of the student with decay {args.ema_decay}"
    prior = f"One batch in {args.prior_every} was of ordinary prompts, without a training image."
    prior = "" if args.prior_prompts == "none" else prior
    shortened = {name: value for name, value in public_settings(args).items() if str(value).startswith(".../")}
    again = [word for name, value in shortened.items() for word in (f"--{name}", Path(value).name)]
    command = ["accelerate", "launch", Path(__file__).name, "--config", SETTINGS_NAME, *again]
    content = f"""---
{data.to_yaml()}
---

# {name}

{about}, trained with [D-OPSD](https://arxiv.org/abs/2605.05204) on the base's own few-step rollouts.
It is used as the base is: {args.num_inference_steps} steps, no guidance.

{"<Gallery />" if data.widget else ""}

```py
{example_code(args, samples, loading)}
```

## Training

{step} steps with a batch of {images}, learning rate {args.learning_rate},
rollouts of {args.rollout_steps} states, {args.states_per_rollout} of them trained.
The teacher, {teacher}, saw a training image {way}. {prior}
The flags are in [{SETTINGS_NAME}]({SETTINGS_NAME}), null for defaults. The command that reads them, with paths of your own:

```bash
{shlex.join(command)}
```

## Limits

It draws what its teacher could draw when it saw the training images, at the steps above, from {given}
and without guidance.

## Measured

How well it still draws what the base can draw was not measured by the training script.
"""
    ModelCard(content).save(Path(args.output_dir) / "README.md")


def push_command(args, files):
    """The command that pushes the `files` (patterns) of OUTPUT_DIR later."""
    flags = [*(["--private"] if args.hub_private_repo else []), *(f"--include={file}" for file in files)]
    return shlex.join(["hf", "upload", repository_name(args), args.output_dir, ".", *flags])


def push(args, step, save_card, files):
    """Pushes the `files` (patterns) of OUTPUT_DIR. During training, a failure is a warning; at the end, an InputError
    with the command that pushes later what is all saved."""
    client = hub.get_session()
    # huggingface_hub would wait for ever, and makes a new client after a lost connection
    options = {"event_hooks": client.event_hooks, "follow_redirects": True, "timeout": args.hub_timeout}
    hub.set_client_factory(lambda: type(client)(**options))
    hub.constants.HF_HUB_DISABLE_XET = True  # it sends data through a client of its own, which has no timeout of ours
    try:
        repo = hub.create_repo(repository_name(args), private=args.hub_private_repo or None, exist_ok=True).repo_id
        if args.hub_private_repo and not hub.model_info(repo).private:
            raise ValueError(f"{repo} is public: make it private or choose another --hub_model_id first")
        save_card(repo)  # now that the user's name in front is known
        options = {"allow_patterns": files, "commit_message": f"Trained with D-OPSD, step {step}"}
        hub.upload_folder(repo_id=repo, folder_path=args.output_dir, **options)
        logger.info(f"Pushed to {repo}.")
    except Exception as error:  # of the network, the Hub, the token or the name
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        failure = f"The result is saved in {args.output_dir}, but was not pushed ({reason})."
        failure += f" Log in and push it with: {push_command(args, files)}"
        if step == args.max_train_steps:
            raise InputError(failure) from error
        logger.warning(failure)


def publish_result(args, samples, step, describe, files):
    """Writes the card of OUTPUT_DIR, pushes its `files` (patterns) if that is asked for, and at the end says where it
    is and how to draw with it."""
    save = functools.partial(save_card, args, samples, step, describe)
    save(repository_name(args))
    if args.push_to_hub:
        push(args, step, save, files)
    if step == args.max_train_steps:
        pictures = f", pictures in {args.output_dir}/validation" if args.validation_steps else ""
        code = example_code(args, samples, describe(args, args.output_dir)[1])
        logger.info(f"The result is in {args.output_dir}{pictures}. To draw with it:\n\n{code}\n")
        # others could do nothing with a LoRA whose base is a folder
        if not args.push_to_hub and not ("rank" in args and os.path.isdir(args.pretrained_model_name_or_path)):
            logger.info(f"To publish it: {push_command(args, files)}")


def publish_pipeline(transformer, family, samples, args, accelerator, step):
    """Saves the pipeline's folder, and pushes it if that is asked for."""
    save_pipeline(transformer, family, args)
    if accelerator.is_main_process:
        folders = component_folders(json.loads((Path(args.output_dir) / "model_index.json").read_text()))
        files = [*REPOSITORY_FILES, *samples, *(f"{name}/*" for name in folders)]
        publish_result(args, samples, step, describe_pipeline, files)


def describe_pipeline(args, name):
    """What the pipeline in the folder or repository `name` is, code that loads it, and tags for its card."""
    about = f"All weights of {public_settings(args)['pretrained_model_name_or_path']}"
    variant = f"variant={json.dumps(args.variant)}, " if args.variant else ""  # of what is the base's
    source = json.dumps(name, ensure_ascii=False)
    return about, f"pipe = DiffusionPipeline.from_pretrained({source}, {variant}dtype=torch.bfloat16)", []


# ------------------------------------------------------------------------------------------------------------- checks
def check_source(flag, name, revision=None, repo_type="model", file="model_index.json"):
    """Raises ValueError for a `name` that is neither here nor on the Hub, which libraries would ask six times."""
    if os.path.exists(name):
        if file == "model_index.json" and repo_type == "model" and not (Path(name) / file).is_file():
            raise ValueError(f"--{flag} {name} holds no {file}: give a model's folder, or its id on the Hub.")
        return
    try:
        validate_repo_id(name)
        cached = isinstance(hub.try_to_load_from_cache(name, file, revision=revision, repo_type=repo_type), str)
        if not cached and not is_offline_mode():
            hub.repo_info(name, revision=revision, repo_type=repo_type, timeout=5)
    except Exception as error:  # also of the network
        reasons = {
            HFValidationError: "no repository can have that name",
            RepositoryNotFoundError: "the Hub shows you none",
        }
        reason = reasons.get(type(error), f"asking the Hub failed ({error}); HF_HUB_OFFLINE=1 uses its cache")
        raise ValueError(f"--{flag} {name} is no folder, and {reason}.") from error


def check_weights(flag, name, parts, variant=None):
    """Raises ValueError for weights in a folder that are missing or cut off; reads the beginnings of files alone."""
    if not Path(name).is_dir():
        return  # what the Hub sends is checked as it arrives
    if variant and not any(Path(name).glob(f"*/*.{variant}*")):
        raise ValueError(f"--variant {variant}: {name} holds no such weights.")
    for folder in (Path(name) / part for part in parts):
        files = set(folder.glob("*.safetensors"))
        if not files:
            raise ValueError(f"--{flag} {name}: {folder} holds no weights (*.safetensors).")
        for index in folder.glob(f"*.safetensors.index.{variant}.json" if variant else "*.safetensors.index.json"):
            with blamed_on(f"--{flag} {index}"):
                files |= {folder / file for file in json.loads(index.read_text())["weight_map"].values()}
        for file in sorted(files):
            with blamed_on(f"--{flag} {file}"), safe_open(file, "pt"):
                pass


def check_packages(args, sharded=False):
    """Raises ValueError for what cannot work on this machine; `sharded`: FSDP shards what the optimiser trains."""
    packages = {"nf4": "bitsandbytes", "int8": "torchao", "fp8": "torchao"}
    packages |= {"prodigy": "prodigyopt", "tensorboard": "tensorboard", "wandb": "wandb"}
    packages["adamw8bit"] = "torchao" if sharded else "bitsandbytes"
    for flag in ("report_to", "optimizer", "quantization", "encoder_quantization"):
        kind = getattr(args, flag, None)  # a fully trained transformer is never quantised
        if kind in QUANTIZATIONS and args.mixed_precision != "bf16":
            raise ValueError(f"--{flag} {kind} computes in bf16: give --mixed_precision bf16.")
        if kind in packages and not importlib.util.find_spec(packages[kind]):
            raise ValueError(f"--{flag} {kind} needs {packages[kind]}: pip install {packages[kind]}.")
        if kind == "nf4" and flag == "quantization" and not torch.cuda.is_available():
            raise ValueError("--quantization nf4 needs a GPU, which diffusers asks for; int8 does not.")


def resolve_arguments(family, args):
    """Fills in what the base or its family has defaults for.

    Raises:
        ValueError: the family has no such teacher, or takes no reference images.
    """
    base = args.pretrained_model_name_or_path, args.revision
    args.num_inference_steps = args.num_inference_steps or family.steps_of(*base)
    args.teacher_context = args.teacher_context or family.teacher_contexts[0]
    if args.teacher_context == "vlm":
        args.teacher_max_pixels = args.teacher_max_pixels or family.default_teacher_max_pixels
    if args.teacher_context not in family.teacher_contexts:
        raise ValueError(
            f"--teacher_context {args.teacher_context}: this model has {', '.join(family.teacher_contexts)}."
        )
    if args.reference_column and "edit" not in family.teacher_contexts:
        raise ValueError("--reference_column: this model takes no reference images.")
    if args.teacher_prompt_suffix is None:
        args.teacher_prompt_suffix = family.default_teacher_suffixes[args.teacher_context]


def find_vlm(family, args):
    """Fills in the VLM of the size of the base's text encoder, if the teacher needs one. Raises ValueError where the
    family knows none."""
    if args.teacher_context == "vlm" and not args.vlm_model_name_or_path:
        base = {"subfolder": "text_encoder", "revision": args.revision}
        with blamed_on(f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}"):
            config = transformers.AutoConfig.from_pretrained(args.pretrained_model_name_or_path, **base)
        width = config.get_text_config().hidden_size
        args.vlm_model_name_or_path = family.vlms.get(width)
        if not args.vlm_model_name_or_path:
            raise ValueError(f"--vlm_model_name_or_path: name a Qwen3-VL with a hidden size of {width}.")


def check_references(family, args, dataset):
    """Raises ValueError that names an image which the transformer cannot be shown as a reference, or where
    --reference_column holds none."""
    if not sees_references(args):
        return
    rows, references = dataset["row"][:], dataset["reference_sizes"][:]
    for number, (row, bucket, sizes) in enumerate(zip(rows, dataset["bucket"][:], references)):
        with blamed_on(f"Row {row}: its image as a reference, at --resolution {args.resolution}"):
            if args.teacher_context == "edit":
                family.check_reference(*bucket[::-1])
        for place, (width, height) in enumerate(sizes):
            try:
                family.check_reference(width, height)
            except ValueError as error:
                name = as_list(dataset[number]["references"])[place]["path"] or f"{place + 1}"
                raise ValueError(f"Row {row}: its reference {name} cannot be shown: {error}. Replace it.") from error
    if args.reference_column and (alone := [row for row, sizes in zip(rows, references) if not sizes]):
        told = f"--reference_column {args.reference_column}: {len(alone)} of {len(rows)} rows have no reference"
        if len(alone) == len(rows):
            raise ValueError(f"{told}; leave it out, or add them.")
        logger.warning(f"{told}, the first in row {alone[0]}: there, the student sees the caption alone.")


def check_contexts(family, args, dataset, pairs):
    """Raises ValueError for a VLM that does not fit, a text with a special token and a context that is too long."""
    base = {"pretrained_model_name_or_path": args.pretrained_model_name_or_path, "revision": args.revision}
    with blamed_on(f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}"):
        text_config = transformers.AutoConfig.from_pretrained(**base, subfolder="text_encoder")
        tokenizer = transformers.AutoTokenizer.from_pretrained(**base, subfolder="tokenizer")
        transformer_config = family.transformer_class.load_config(**base, subfolder="transformer")
        config = family.load_config(**base)
        longest = family.max_context_length(transformer_config, config)
        longest_prompt = family.max_prompt_length(config)
        no_prompt = family.prompt_length(tokenizer, "")
    special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    edit, suffix = args.teacher_context == "edit", args.teacher_prompt_suffix
    if not edit:
        check_source("vlm_model_name_or_path", args.vlm_model_name_or_path, file="preprocessor_config.json")
        with blamed_on(f"--vlm_model_name_or_path {args.vlm_model_name_or_path}"):
            encoder = family.make_encoder(args.vlm_model_name_or_path, args.teacher_max_pixels, text_config, tokenizer)
        if "*.safetensors" in family.vlm_files:
            check_weights("vlm_model_name_or_path", args.vlm_model_name_or_path, [""])
        special |= {*encoder.tokenizer.all_special_tokens, *encoder.tokenizer.get_added_vocab()}
        ending, buckets = family.chat_ending(tokenizer), list(map(tuple, dataset["bucket"][:]))
        without_text = {bucket: encoder.context_length("", *bucket, ending) for bucket in set(buckets)}
    for index, caption in pairs:
        text = caption if is_prior(index) else caption + suffix
        if token := next((token for token in special if token and token in text), None):
            place = "--teacher_prompt_suffix" if token in suffix else place_of(dataset, index, caption, args)
            raise ValueError(f"{place} holds {token}, a mark of the chat; write it in another way.")
        prompt = text if edit else caption
        other = ", or give other --prior_prompts" * is_prior(index)
        limits = [(longest_prompt, no_prompt, functools.partial(family.prompt_length, tokenizer, prompt), other)]
        if not edit and not is_prior(index):
            bucket = shown_row(buckets, index, args)
            length_of = functools.partial(encoder.context_length, text, *bucket, ending)
            limits.insert(0, (longest, without_text[bucket], length_of, " or lower --teacher_max_pixels"))
        for limit, without, length_of, remedy in limits:
            # a token is at least one byte: of most texts no token needs to be counted
            if without + len(text.encode()) > limit and (length := length_of()) > limit:
                place = place_of(dataset, index, caption, args)
                told = f"The context of {place}, {prompt[:60]!r}, has {length} tokens, at most {limit}"
                raise ValueError(f"{told}. Shorten it{' or --teacher_prompt_suffix' * bool(suffix)}{remedy}.")


def place_of(dataset, index, caption, args):
    """Where a caption or prompt stands."""
    if is_prior(index) and args.prior_prompts is None:
        return "the built-in --prior_prompts"
    if is_prior(index):
        lines = Path(args.prior_prompts).read_text("utf-8-sig").split("\n")
        return f"--prior_prompts {args.prior_prompts}, line {[line.strip() for line in lines].index(caption) + 1}"
    if caption == args.instance_prompt:
        return "--instance_prompt"
    row = dataset[index]
    if caption not in row["captions"]:
        return "--validation_prompt"
    source = row["image"]["path"] or args.dataset_name
    return f"caption {row['captions'].index(caption) + 1} of row {row['row']} ({source})"


def check_base(args):
    """The base's family, and the (height, width) that pictures can have with it.

    Raises:
        ValueError: the base is missing, damaged or of no known family, or does not go with the flags.
    """
    flag, base = "pretrained_model_name_or_path", args.pretrained_model_name_or_path
    check_source(flag, base, args.revision)
    with blamed_on(f"--{flag} {base}"):
        family = family_of(base, args.revision)
        multiple = family.size_multiple(family.vae_class.load_config(base, subfolder="vae", revision=args.revision))
    check_weights(flag, base, ["text_encoder", "transformer", "vae"], args.variant)
    if args.resolution % multiple:
        raise ValueError(f"--resolution {args.resolution} must be a multiple of {multiple} for this model.")
    return family, generate_aspect_ratio_buckets(args.resolution, divisibility=multiple)


@contextlib.contextmanager
def main_process_first(accelerator):
    """Within: the main process first, which fills caches. A mistake that it finds ends the others, too, without a
    word: they would wait for it."""
    failed = accelerator.is_main_process
    if not failed and any(gather_object([False])):
        sys.exit(1)
    try:
        yield
        failed = False
    finally:
        if accelerator.is_main_process:
            gather_object([failed])


def check_inputs(args):
    """Everything that can be known to be wrong before weights load.

    Returns:
        Family, dataset, (row index, caption) pairs, cache of contexts, identity and the state to resume from; see
        `identity_of` and `find_checkpoint`.

    Raises:
        ValueError: with one sentence that names the flag or file.
    """
    check_output_dir(args)
    state = find_checkpoint(args)
    if args.push_to_hub:
        with blamed_on("--hub_model_id"):
            validate_repo_id(repository_name(args))
        if hub.get_token() is None:
            raise ValueError("--push_to_hub: log in first (hf auth login), or set HF_TOKEN.")
    if args.instance_data_dir and Path(args.context_cache_dir).resolve() == Path(args.instance_data_dir).resolve():
        raise ValueError(f"--context_cache_dir {args.context_cache_dir} is that of the images; choose another folder.")
    family, buckets = check_base(args)
    resolve_arguments(family, args)
    find_vlm(family, args)
    dataset = inspect_images(read_dataset(args), buckets, args, args.random_flip)
    if args.num_train_epochs:
        micro_steps = math.ceil(args.num_train_epochs * len(dataset) / images_per_micro_step(args))
        if args.prior_prompts != "none":  # beside them, so that each image is drawn as often as asked
            micro_steps += (micro_steps - 1) // (args.prior_every - 1)
        args.max_train_steps = math.ceil(micro_steps / args.gradient_accumulation_steps)
        args.num_train_epochs = None  # for what reads the arguments from here on, the steps say it
    if args.lr_warmup_steps > args.max_train_steps and args.lr_scheduler != "constant":
        raise ValueError(f"--lr_warmup_steps {args.lr_warmup_steps}: the run has {args.max_train_steps} steps.")
    if args.teacher_image == "other" and len(dataset) < 2 + 2 * args.random_flip:  # which doubles them
        raise ValueError("--teacher_image other needs at least two training images.")
    check_references(family, args, dataset)
    captions = dataset["captions"][:]  # a slice is read at once
    pairs = [(index, caption) for index, own in enumerate(captions) for caption in own]
    if args.validation_steps:
        pairs += [pair for pair in validation_pairs(dataset, args) if pair not in pairs]
    prior = prior_pairs(*read_prior_prompts(args), len(dataset))
    pairs += prior
    sizes = len(set(map(tuple, dataset["bucket"][:])))
    counts = {"images": len(dataset), "picture sizes": sizes if sizes > 1 else 0}
    counts |= {"captions": sum(map(len, captions)), "references": sum(map(len, dataset["reference_hashes"][:]))}
    counts["prior prompts"] = len({prompt for _, prompt in prior})
    told = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
    logger.info(f"Training {args.pretrained_model_name_or_path} on {told}.")
    if len(dataset) > 1 and len({caption for own in captions for caption in own}) == 1:
        advice = "Captions that say what else each image shows teach more: see README.md."
        logger.info(f"All images have the same caption. {advice}")
    check_contexts(family, args, dataset, pairs)
    cache = ContextCache(family, args)
    identity = identity_of(args, dataset, cache)
    if state:
        check_resume(state, identity, args)
    return family, dataset, pairs, cache, identity, state


def check_full_inputs(args, accelerator):
    """Raises ValueError for what does not go with full fine-tuning here; see `check_inputs` for the rest."""
    check_packages(args, accelerator.is_fsdp2)
    if args.stochastic_rounding and not is_torchao_available():
        raise ValueError("--stochastic_rounding needs torchao: pip install torchao.")
    if args.stochastic_rounding and args.mixed_precision != "bf16":
        raise ValueError("--stochastic_rounding holds the weights in bf16: give --mixed_precision bf16.")
    if args.fused_backward_pass and args.mixed_precision == "fp16":
        raise ValueError("--fused_backward_pass cannot unscale the gradients of fp16: give --mixed_precision bf16.")
    if args.fused_backward_pass and accelerator.num_processes > 1:
        raise ValueError("--fused_backward_pass runs in one process; leave it out, or launch with --num_processes 1.")
    if args.optimizer in ("adafactor", "prodigy") and accelerator.is_fsdp2:
        raise ValueError(
            f"--optimizer {args.optimizer} cannot be sharded by FSDP; use --optimizer adamw8bit, or adamw."
        )
    if args.stochastic_rounding and accelerator.is_fsdp2:
        raise ValueError("--stochastic_rounding does not go with FSDP, which holds the weights in fp32; leave it out.")
    if args.ema_device == "cpu" and accelerator.is_fsdp2:
        raise ValueError("--ema_device cpu does not go with FSDP, which shards the average; leave it out.")
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("FSDP version 1 is not supported; set fsdp_version: 2 in the accelerate config.")
    if (
        accelerator.is_fsdp2 and accelerator.state.fsdp_plugin.cpu_ram_efficient_loading
    ):  # fails at weights of the root
        raise ValueError("Set fsdp_cpu_ram_efficient_loading: false in the accelerate config.")


# ------------------------------------------------------------------------------------------------------------- models
def make_accelerator(args):
    """Accelerator, logging and seeds; `args.mixed_precision` becomes what accelerate resolved it to."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        remedy = "launch with a --config_file of examples/accelerate, or run `accelerate config` anew."
        raise InputError(f"DeepSpeed is not supported: {remedy}")
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":  # it renames the weights
        raise InputError("accelerate's dynamo_backend is not supported: set it to no, and give --compile_blocks.")
    device = parse_flag_from_env("ACCELERATE_USE_CPU") or os.environ.get("ACCELERATE_TORCH_DEVICE")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not device and not torch.accelerator.is_available():
        remedy = "install its build for your GPUs, or launch with --cpu"  # each would take itself for the only one
        raise InputError(f"Several processes were launched, but torch sees no GPU: {remedy}.")
    # each weight is used once in a forward: a cache of its copies in half precision would cost memory for nothing;
    # and processes wait for one that reads a large dataset or pushes
    waiting = InitProcessGroupKwargs(timeout=datetime.timedelta(hours=12))
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(args.output_dir, os.path.join(args.output_dir, "logs")),
        # DDP's buckets are the gradients, not a copy of them
        kwargs_handlers=[AutocastKwargs(cache_enabled=False), waiting, DDPKwargs(gradient_as_bucket_view=True)],
    )
    args.mixed_precision = accelerator.mixed_precision
    if args.mixed_precision not in ("no", "bf16") and accelerator.scaler is None:
        raise InputError(f"--mixed_precision {args.mixed_precision} fails here: give --mixed_precision bf16 or no.")
    logging.basicConfig(format="%(asctime)s %(levelname)s: %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        if not accelerator.is_main_process:
            library.utils.logging.set_verbosity_error()
    set_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    return accelerator


def quantization_config(component, kind, library):
    """How the weights of a pipeline's `component`, a model of `library`, are held; None for the dtype of mixed
    precision."""
    if not kind:
        return None
    # what sees in a text encoder, as in a VLM beside one, and an output that nobody asks for
    whole = ["visual", "lm_head"]
    if kind == "nf4":
        options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
        config = library.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=whole, **options)
    else:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

        config = library.TorchAoConfig({"int8": Int8WeightOnlyConfig, "fp8": Float8WeightOnlyConfig}[kind](), whole)
    return diffusers.PipelineQuantizationConfig(quant_mapping={component: config})


def load_pipeline(family, args, quantization_config, **components):
    """The base's pipeline with the weights in the dtype of mixed precision, or quantised; `components` of None are
    left out."""
    options = {"revision": args.revision, "variant": args.variant, "dtype": weight_dtype_of(args)}
    with blamed_on(f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}"):
        options |= {"quantization_config": quantization_config, **components}
        return family.from_pretrained(args.pretrained_model_name_or_path, **options)


def load_for_training(family, args, quantization_config=None):
    """The pipeline with the transformer, not yet trainable, and, where there is validation, the VAE; no encoders."""
    logger.info("Loading the transformer.")
    pipeline = load_pipeline(family, args, quantization_config, text_encoder=None, tokenizer=None)
    if not args.validation_steps:
        pipeline.vae = None  # it was needed for its scale factor alone
    pipeline.set_progress_bar_config(disable=True)
    pipeline.transformer.requires_grad_(False)  # the VAE decodes without gradients
    return pipeline


def place_for_training(pipeline, args, accelerator):
    """Moves the pipeline to the accelerator and makes it compute as the flags say."""
    # FSDP moves the transformer in shards; the whole may not fit
    moved = pipeline.vae if accelerator.is_fsdp2 else pipeline
    if moved:
        moved.to(accelerator.device)
    if pipeline.vae and args.enable_vae_tiling:
        pipeline.vae.enable_tiling()
    save_memory_and_time(pipeline.transformer, args)
    # norms answer in the dtype that they are given, as in inference: attention and quantised layers would go on in
    # autocast's fp32
    for module in pipeline.transformer.modules():
        if isinstance(module, (torch.nn.LayerNorm, torch.nn.RMSNorm, RMSNorm)):
            module.register_forward_hook(lambda _, inputs, output: output.to(inputs[0].dtype))


def repeated_blocks(transformer):
    """The blocks that most of `transformer` consists of, in the order of the model."""
    return [m for m in transformer.modules() if type(m).__name__ in transformer._repeated_blocks]


def save_memory_and_time(transformer, args):
    """What the flags of gradient checkpointing and compilation ask for."""
    blocks = repeated_blocks(transformer)
    recomputed = set(blocks[: math.ceil(args.checkpointed_blocks * len(blocks))])

    def run(block, *inputs):
        return checkpoint(block, *inputs, use_reentrant=False) if block in recomputed else block(*inputs)

    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing(run)
    if args.compile_blocks:
        # lengths of contexts and sizes of images, each with and without gradient
        torch._dynamo.config.recompile_limit = 64
        transformer.compile_repeated_blocks()


def build_without_weights(family, args):
    """The pipeline with transformer and VAE of the configs on the meta device, where tensors have shapes alone."""
    base = {"pretrained_model_name_or_path": args.pretrained_model_name_or_path, "revision": args.revision}
    parts = {"transformer": family.transformer_class, "vae": family.vae_class}
    with blamed_on(f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}"), torch.device("meta"):
        parts = {name: kind.from_config(kind.load_config(**base, subfolder=name)) for name, kind in parts.items()}
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(**base, subfolder="scheduler")
    pipeline = family(scheduler, tokenizer=None, text_encoder=None, **parts)
    pipeline.transformer.to(weight_dtype_of(args)).requires_grad_(False)
    return pipeline


def make_trainable(pipeline, args):
    """All weights of the transformer train: in fp32 under autocast, or in bf16 with stochastic rounding."""
    pipeline.transformer.requires_grad_(True).train()
    if not args.stochastic_rounding:
        pipeline.transformer.float()
    count = sum(p.numel() for p in pipeline.transformer.parameters())
    logger.info(f"Full fine-tuning: {count:,} parameters in {pipeline.transformer.dtype}.")


# ---------------------------------------------------------------------------------------------------------- optimiser
def make_optimizer(parameters, args, optimizer_class=None):
    """What --optimizer asks for, or an AdamW of `optimizer_class`."""
    options = {"lr": args.learning_rate, "weight_decay": args.adam_weight_decay}
    if args.optimizer == "adafactor":
        return Adafactor(parameters, **options, scale_parameter=False, relative_step=False)
    options |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if args.optimizer == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy(parameters, **options, use_bias_correction=True, safeguard_warmup=True)
    if args.optimizer == "adamw8bit" and not optimizer_class:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **options)
    return (optimizer_class or functools.partial(torch.optim.AdamW, fused=True))(parameters, **options)


def make_full_optimizer(parameters, args, sharded=False):
    """`make_optimizer`'s, or torchao's 8-bit AdamW, which rounds stochastically and whose states FSDP can shard."""
    if not args.stochastic_rounding and not (sharded and args.optimizer == "adamw8bit"):
        return make_optimizer(parameters, args)
    from torchao.optim import AdamW8bit

    if parameters[0].device.type == "cpu" and not sharded:  # compiling would take longer than it saves
        AdamW8bit = type("AdamW8bit", (AdamW8bit,), {"step": torch.compiler.set_stance("force_eager")(AdamW8bit.step)})
    else:
        logger.info("torchao compiles its AdamW in the first step, once on this machine; that takes a while.")
    kind = functools.partial(AdamW8bit, bf16_stochastic_round=args.stochastic_rounding)
    return make_optimizer(parameters, args, kind)


def fuse_updates(parameters, optimizer):
    """Makes a backward update each weight as soon as its gradient is complete, and free the gradient.

    `optimizer.step()` skips weights without gradient, so each call updates one weight.
    """

    def update(parameter):
        optimizer.step()
        parameter.grad = None

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(update)


def make_lr_scheduler(optimizer, args):
    """Learning-rate schedule in optimisation steps."""
    steps = {"num_warmup_steps": args.lr_warmup_steps, "num_training_steps": args.max_train_steps}
    return get_scheduler(args.lr_scheduler, optimizer, **steps, num_cycles=args.lr_num_cycles, power=args.lr_power)


# ------------------------------------------------------------------------------------------------------------ logging
def peak_memory_gib(device):
    """Peak of the GPU's allocated memory; on the CPU, the process's resident memory."""
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    return peak / 2**30


def check_finite(losses, grad_norm=0.0):
    """Stops a run that has diverged, before a checkpoint is written."""
    if not all(map(math.isfinite, [*losses, grad_norm])):
        told = f"Loss {losses} or gradient norm {grad_norm} is not finite; the run stops. What was written is kept."
        raise InputError(f"{told} Lower --learning_rate or use --mixed_precision bf16.")


def log_steps(pending, started, bar, args, training):
    """Logs the steps since `started`: `pending` holds of each the step, the sums of losses and counts of each state
    (2, K), the gradient norm and the learning rate. A state that was not drawn is left out.

    Between two calls no loss is read from the device, unless each update must be checked before it is made.
    """
    accelerator = training.accelerator
    table = torch.stack([torch.cat([states.flatten(), norm.view(1)]) for _, states, norm, _ in pending]).tolist()
    timing = {"seconds_per_step": (time.perf_counter() - started) / len(pending)}
    timing["peak_memory_gib"] = peak_memory_gib(accelerator.device)
    fused = getattr(args, "fused_backward_pass", False)
    if fused:  # no gradient is left to be measured; one that was not finite shows in the weights
        weights = training.transformer.parameters()
        check_finite([], float(sum(weight.detach().sum(dtype=torch.float32) for weight in weights)))
    for (step, *_, lr), (*sums_and_counts, grad_norm) in zip(pending, table, strict=True):
        sums, counts = sums_and_counts[: args.rollout_steps], sums_and_counts[args.rollout_steps :]
        # with fp16 the gradient scaler skips a step whose gradient is not finite
        check_finite(sums, grad_norm if accelerator.scaler is None else 0.0)
        loss = sum(sums) / sum(counts)
        states = {f"loss/state_{k + 1}": total / count for k, (total, count) in enumerate(zip(sums, counts)) if count}
        norm = {} if fused else {"grad_norm": grad_norm}
        accelerator.log({"loss": loss, **states, **norm, "lr": lr, **timing}, step=step)
        # a prior prompt's teacher may well equal the student; accumulated steps have images, too
        if args.gradient_accumulation_steps > 1 or args.prior_prompts == "none" or step % args.prior_every:
            training.losses = [*training.losses[-19:], loss]
    bar.set_postfix(loss=np.mean(training.losses or [loss]), lr=lr)
    if training.losses and max(training.losses) < 1e-12 and not training.warned:
        told = "Teacher and student predict the same, so nothing is learned: the teacher does not see the image."
        logger.warning(f"{told} Look at its column of the first validation picture.")
        training.warned = True


# ------------------------------------------------------------------------------------------------- stops and failures
class Stop:
    """SIGTERM, SIGINT and SIGHUP end a training after the step at hand, with a checkpoint; at any other time, and when
    a second one comes a second later or more, the process ends at once. Sooner, it is the same one, which a launcher
    has passed on. A launcher that is gone counts as SIGTERM, since nobody else would end its processes."""

    def __init__(self):
        self.number, self.since, self.training, self.process = 0, 0.0, False, None

    def listen(self):
        """To be called once, by the main thread of a process."""
        self.process = os.getpid()
        for name in ("SIGTERM", "SIGINT", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows lacks one
            if number and signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
                signal.signal(number, self.note)
        parent = psutil.Process().parent()
        with contextlib.suppress(psutil.Error, AttributeError):
            words = parent.cmdline()
            modules = {module.split(".")[0] for flag, module in itertools.pairwise(words) if flag == "-m"}
            if {"accelerate", "torchrun", "torch"} & {*modules, *(Path(word).name for word in words[:2])}:
                threading.Thread(target=self.watch, args=(parent,), daemon=True).start()

    def watch(self, parent):
        while parent.is_running() and os.getppid() == parent.pid:
            time.sleep(1)
        if not self.number:  # Ctrl-C ends launcher and script alike
            os.kill(os.getpid(), signal.SIGTERM)

    def note(self, number, frame):
        name, now = signal.Signals(number).name, time.monotonic()
        if os.getpid() != self.process:  # a worker, which datasets ends so
            os._exit(128 + number)
        if self.number and now - self.since < 1:
            return
        if self.number or not self.training:
            told = "What was written is kept. To go on, run the command again, with --resume_from_checkpoint latest."
            os.write(2, f"\nStopped by {name}. {told}\n".encode())
            os._exit(128 + number)
        os.write(2, f"\n{name}: the step at hand is finished and saved; a second signal ends at once.\n".encode())
        self.number, self.since = number, now

    def asked(self, accelerator):
        """Number of a signal that any of the processes has had, or 0: the same in all of them."""
        if accelerator.num_processes == 1:
            return self.number
        return int(accelerator.gather(torch.tensor([self.number], device=accelerator.device)).max())


STOP = Stop()


# flags that need less memory, those first that cost the least
ENCODING_SAVINGS = "--encoder_quantization int8 or nf4, a lower --teacher_max_pixels"
FULL_SAVINGS = "--gradient_checkpointing, --stochastic_rounding, --ema_device cpu (without FSDP), a lower --resolution"


@contextlib.contextmanager
def explain_failures(savings, folder):
    """Within: running out of the GPU's memory becomes an error that names `savings`, flags that need less; a disk that
    is full or a file that cannot be written or read becomes one that names it, or `folder`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        first = str(error).split(". ")[0]
        raise InputError(f"{first}. What was written is kept. Cheapest remedies: {savings}.") from error
    except (OSError, SafetensorError) as error:
        where = "" if getattr(error, "filename", None) else f"{folder}: "
        told = "What was written before is kept; --resume_from_checkpoint latest goes on from it."
        raise InputError(f"{where}{error}. {told}") from error


# ----------------------------------------------------------------------------------------------------------- training
def train(pipeline, training, dataset, prior, cache, first_step, publish, args):
    """The training loop: validation, rollouts with their backwards, clipping, update, EMA, log, checkpoint."""
    accelerator, transformer, teacher = training.accelerator, training.transformer, training.teacher
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    # FSDP gathers weights in every forward, so all processes must take part in a validation
    validating = args.validation_steps and (accelerator.is_main_process or accelerator.is_fsdp2)
    validate = functools.partial(log_validation, pipeline, teacher, dataset, cache, args, accelerator)
    # also of a run that was stopped at such a step, which ended without
    if validating and (first_step % args.validation_steps == 0 or first_step == args.max_train_steps):
        validate(first_step)
    rows = dataset.select_columns(["captions", "bucket", "image_hash", "reference_hashes"])
    layouts = layouts_of(dataset, args)

    def batch_at(micro_step):
        draws = draw_batch(layouts, args, micro_step, accelerator.process_index, accelerator.num_processes)
        shown = draw_prior(prior, draws, micro_step, args, accelerator.process_index)
        return make_batch(pipeline, rows, cache, draws, shown, args, accelerator.device)

    accumulated = args.gradient_accumulation_steps
    batches = read_ahead(batch_at, range(first_step * accumulated, args.max_train_steps * accumulated))
    shown = {"desc": "Steps", "disable": not accelerator.is_local_main_process}
    bar = tqdm(range(first_step, args.max_train_steps), initial=first_step, total=args.max_train_steps, **shown)
    pending, started, STOP.training = [], time.perf_counter(), True
    for step in bar:
        # what dropout drops and an update rounds is the same in all processes, and in a resumed run
        torch.manual_seed(int(np.random.SeedSequence([args.seed, step]).generate_state(1)[0]))
        table = 0.0
        for micro in range(accumulated):
            batch = *next(batches), draw_states(args, places_in_run(step * accumulated + micro, args, accelerator))
            states = rollout(pipeline, transformer, teacher, batch, args, accelerator)
            synchronize = micro == accumulated - 1
            weight = args.prior_loss_weight if is_prior_step(step * accumulated + micro, args) else 1.0
            table += backward_each_state(states, transformer, args, accelerator, synchronize, weight)
        table = accelerator.reduce(table, "sum")
        grad_norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)
        grad_norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm
        training.optimizer.step()
        training.lr_scheduler.step()
        training.optimizer.zero_grad(set_to_none=True)
        teacher.step()

        done = step + 1
        pending.append((done, table, grad_norm.to(table), float(training.lr_scheduler.get_last_lr()[0])))
        last, stopped = done == args.max_train_steps, STOP.asked(accelerator)
        showing = validating and (done % args.validation_steps == 0 or last) and not stopped
        saving = done % args.checkpointing_steps == 0 or last or stopped
        if not (showing or saving or time.perf_counter() - started > LOGGING_SECONDS):
            continue
        log_steps(pending, started, bar, args, training)
        if showing:
            validate(done)
        if saving:
            save_checkpoint(training, args, done)
            if args.hub_push_checkpoints and not last and not stopped:
                publish(done)
        if stopped:
            bar.close()
            logger.info(f"Stopped at step {done}. Go on with the same command and --resume_from_checkpoint latest.")
            accelerator.end_training()
            sys.exit(128 + stopped)
        pending, started = [], time.perf_counter()
    STOP.training = False


# --------------------------------------------------------------------------------------------------------------- main
def main(args):
    try:
        accelerator = make_accelerator(args)
        if accelerator.is_fsdp2 and (policy := accelerator.state.fsdp_plugin.mixed_precision_policy):
            # else the times of the states were rounded; autocast casts what needs it
            policy = dataclasses.replace(policy, cast_forward_inputs=False)
            accelerator.state.fsdp_plugin.mixed_precision_policy = policy
        with main_process_first(accelerator):
            lock = open_output_dir(args) if accelerator.is_main_process else None
            check_full_inputs(args, accelerator)
            family, dataset, pairs, cache, identity, state = check_inputs(args)
            build_without_weights(family, args)  # configs that do not fit are found before weights load
    except (ValueError, OSError) as error:
        raise InputError(error) from error
    with explain_failures(ENCODING_SAVINGS, args.context_cache_dir):
        encode_contexts(family, args, cache, dataset, pairs, accelerator)
    if args.overwrite_output_dir and accelerator.is_main_process:
        clear_output_dir(args)
    if accelerator.is_main_process:
        with blamed_on(f"--report_to {args.report_to}"):  # a service may refuse
            accelerator.init_trackers("dopsd", config={k: str(v) for k, v in vars(args).items()})

    with explain_failures(FULL_SAVINGS, args.output_dir):
        pipeline = load_for_training(family, args)
        place_for_training(pipeline, args, accelerator)
        teacher = FullTeacher(pipeline.transformer, args, accelerator)
        make_trainable(pipeline, args)
        optimizer = make_full_optimizer(list(pipeline.transformer.parameters()), args, accelerator.is_fsdp2)
        lr_scheduler = make_lr_scheduler(optimizer, args)
        if args.fused_backward_pass:
            fuse_updates(pipeline.transformer.parameters(), optimizer)
        transformer, optimizer = accelerator.prepare(pipeline.transformer, optimizer)
        pipeline.transformer = accelerator.unwrap_model(transformer)
        networks = {"transformer": pipeline.transformer.state_dict()}
        networks |= {"teacher": teacher.shadow} if teacher.shadow else {}
        prepare = functools.partial(prepare_checkpoint, pipeline.transformer, networks)
        kind = ShardedTraining if accelerator.is_fsdp2 else Training
        training = kind(accelerator, transformer, teacher, optimizer, lr_scheduler, networks, identity, prepare)
        first_step = resume(training, state)
        teacher.resume(first_step)

        samples = gallery(dataset, args)
        publish = functools.partial(publish_pipeline, pipeline.transformer, family, samples, args, accelerator)
        prior = collections.defaultdict(list)  # as they were encoded
        for index, prompt in (pair for pair in pairs if is_prior(pair[0])):
            prior[index].append(prompt)
        train(pipeline, training, dataset, prior, cache, first_step, publish, args)
        publish(args.max_train_steps)
        accelerator.end_training()
    if lock:
        lock.release()


def run(main, args):
    """Runs a script; a mistake of the user ends it with one line and exit code 1."""
    try:
        main(args)
    except InputError as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    STOP.listen()
    run(main, ARGS)
