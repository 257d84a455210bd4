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
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.7",
#     "torchao>=0.16",
#     "diffusers>=0.42.0",
#     "transformers>=5.5",
#     "accelerate>=1.10",
#     "datasets>=4.0",
#     "huggingface_hub>=1.0",
#     "safetensors>=0.5",
#     "Pillow>=10.1",
#     "tensorboard",
# ]
# ///
"""Fine-tunes a whole step-distilled text-to-image model and keeps its few-step quality.

D-OPSD (https://arxiv.org/abs/2605.05204): the student sees the prompt and rolls out its own few steps; the teacher, an EMA of
the student that also sees the training image, predicts the velocity at the same states; the student matches it.

    accelerate launch train_dopsd_full.py --pretrained_model_name_or_path Tongyi-MAI/Z-Image-Turbo \\
        --dataset_name my_dataset --output_dir my_model --mixed_precision bf16 --gradient_checkpointing
"""

import argparse
import contextlib
import copy
import datetime
import functools
import hashlib
import io
import itertools
import json
import logging
import math
import os
import shlex
import shutil
import sys
import time
import unittest.mock
import weakref
from pathlib import Path

import diffusers
import numpy as np
import psutil
import torch
import transformers
from accelerate import Accelerator, PartialState
from accelerate.logging import get_logger
from accelerate.utils import (
    AutocastKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    fsdp2_prepare_model,
    set_seed,
)
from datasets import Dataset, concatenate_datasets, load_dataset
from datasets import Image as ImageFeature
from datasets import List as ListFeature
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from diffusers.models.normalization import RMSNorm
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import (
    find_nearest_bucket,
    free_memory,
    generate_aspect_ratio_buckets,
)
from diffusers.utils import check_min_version, is_bitsandbytes_available, is_torchao_available, make_image_grid
from huggingface_hub import (
    CommitOperationAdd,
    ModelCard,
    ModelCardData,
    create_commit,
    create_repo,
    get_session,
    hf_hub_download,
    model_info,
    save_torch_state_dict,
    set_client_factory,
    snapshot_download,
)
from huggingface_hub.utils import validate_repo_id
from PIL import Image, ImageDraw, ImageOps
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm
from transformers.optimization import Adafactor

import pipeline_dopsd
from pipeline_dopsd import MultimodalEncoder, family_of


# Raises if the minimal version of diffusers is not installed.
check_min_version("0.42.0")

logger = get_logger(__name__)

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
SETTINGS_NAME = "dopsd_settings.json"
STATE_NAME = "trainer_state.json"
LOSSES_NAME = "losses.csv"
REPOSITORY_FILES = ["README.md", "pipeline.py", "pipeline_dopsd.py", "model_index.json", SETTINGS_NAME, "loss.png"]
# flags that a resumed run must share with the run before it
FIXED_ON_RESUME = {
    "seed", "rollout_steps", "states_per_rollout", "ema_decay", "loss_weighting", "train_batch_size", "gradient_accumulation_steps",
    "learning_rate", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon", "use_8bit_adam", "optimizer", "stochastic_rounding",
    "teacher_context", "teacher_image", "teacher_prompt_suffix", "reference_column", "prior_prompts", "prior_every",
    "encoder_quantization",
}  # fmt: skip
NO_IMAGES = {"image_hash": None, "bucket": None, "reference_hashes": []}
QUANTIZATIONS = ["nf4", "int8", "fp8"]
LOGGING_SECONDS = 5  # steps are logged together, at least so often
ENCODING_BATCH = 4  # contexts at once: the hidden states of all layers are held


class InputError(ValueError):
    """A mistake in flags or files that the user can mend; the command line shows its one sentence without a traceback."""


# ---------------------------------------------------------------------------------------------------------- arguments
class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except of switches and of what is found out later."""

    def _get_help_string(self, action):
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def add_model_arguments(parser):
    add = parser.add_argument_group("models").add_argument
    add("--pretrained_model_name_or_path", required=True, help="Step-distilled base: folder or Hub id.")
    add("--revision", help="Revision of the base on the Hub.")
    add("--variant", help="Variant of the base's weight files, for example fp16.")
    add("--vlm_model_name_or_path", help="Qwen3-VL of the text encoder's size, whose vision part reads the training "
        "images for the teacher. Default: that of the family, for example Qwen/Qwen3-VL-4B-Instruct.")
    add("--teacher_max_pixels", type=int, help="Area above which images are scaled down for the VLM; fewer pixels give a "
        "shorter teacher context. Default: the family's.")
    add("--encoder_quantization", choices=QUANTIZATIONS, help="Hold the text encoder, and so the VLM's language model, in 4 bits (nf4: "
        "bitsandbytes) or 8 bits (int8, fp8: torchao) while contexts are encoded.")  # fmt: skip


def add_data_arguments(parser):
    add = parser.add_argument_group("data").add_argument
    add("--instance_data_dir", help="Folder of images with captions as NAME.txt beside each (one caption per line) or in "
        "metadata.jsonl or metadata.csv (imagefolder format).")
    add("--dataset_name", help="Dataset on the Hub or in a folder, in place of --instance_data_dir.")
    add("--dataset_config_name", help="Configuration of the dataset.")
    add("--image_column", default="image", help="Column of the dataset that holds the images.")
    add("--caption_column", default="text", help="Column with a caption, or a list of captions, per image.")
    add("--reference_column", help="Column with an image, or a list of images, that the student itself is given (editing).")
    add("--instance_prompt", help="Caption of every image that has none.")
    add("--resolution", type=int, default=1024, help="Side of a square image. Others are trained in buckets of the same "
        "area and the nearest aspect ratio.")
    add("--context_cache_dir", help="Cache of encoded contexts. Default: OUTPUT_DIR/contexts.")  # fmt: skip


def add_dopsd_arguments(parser):
    add = parser.add_argument_group("D-OPSD").add_argument
    add("--rollout_steps", type=int, default=4, help="K: states of a rollout, the inference grid of that many steps.")
    add("--states_per_rollout", type=int, default=1, help="M: states of each rollout that are trained, drawn so that all come equally "
        "often; the rollout ends after the last. The mean gradient is that of all K.")
    add("--num_inference_steps", type=int, help="Steps that users will run: of the validation pictures, and the default of "
        "the saved pipeline. Default: the family's, 8 for Z-Image-Turbo.")
    add("--teacher_context", choices=["vlm", "edit"], help="How the teacher sees the image. vlm: in its prompt, through the "
        "VLM. edit: as a reference image of the transformer (FLUX.2). Default: vlm.")
    add("--teacher_prompt_suffix", help="Put after the teacher's prompt. Default: the family's for --teacher_context.")
    add("--teacher_image", choices=["target", "other"], default="target", help="The image that the teacher sees: the training "
        "image itself, or the next one of the set, which guards against copying.")
    add("--ema_decay", type=float, default=0.9999, help="Decay of the teacher. 1.0: frozen base. 0.0: copy of the student.")
    add("--prior_prompts", help="Text file with a prompt on each line that the model is to go on drawing as it does: some "
        "batches are rollouts on them, with a teacher that sees no image.")
    add("--prior_every", type=int, default=3, help="Every so many batches, one is of --prior_prompts.")
    add("--loss_weighting", choices=["velocity", "x0"], default="velocity", help="velocity: the paper's loss. "
        "x0: weighted with sigma^2, as in the authors' code.")  # fmt: skip


def add_training_arguments(parser):
    add = parser.add_argument_group("training").add_argument
    add("--train_batch_size", type=int, default=1, help="Images per process and micro-step.")
    add("--gradient_accumulation_steps", type=int, default=1, help="Micro-steps per optimisation step.")
    add("--max_train_steps", type=int, default=1000, help="Optimisation steps.")
    add("--learning_rate", type=float, default=1e-4, help="Peak learning rate.")
    add("--lr_scheduler", default="constant", choices=[s.value for s in SchedulerType if s != SchedulerType.PIECEWISE_CONSTANT],
        help="Learning rate over the steps.")
    add("--lr_warmup_steps", type=int, default=0, help="Steps over which it rises from zero.")
    add("--lr_num_cycles", type=int, default=1, help="Restarts of cosine_with_restarts.")
    add("--lr_power", type=float, default=1.0, help="Power of the polynomial scheduler.")
    add("--use_8bit_adam", action="store_true", help="AdamW of bitsandbytes with 8-bit states.")
    add("--adam_beta1", type=float, default=0.9, help="Decay of AdamW's mean of gradients.")
    add("--adam_beta2", type=float, default=0.999, help="Decay of its mean of squares.")
    add("--adam_weight_decay", type=float, default=0.0, help="Decoupled weight decay.")
    add("--adam_epsilon", type=float, default=1e-8, help="Added to the denominator.")
    add("--max_grad_norm", type=float, default=1.0, help="Longer gradients are scaled down to this norm. 0: none are.")
    add("--gradient_checkpointing", action="store_true", help="Recompute activations: less memory, slower.")
    add("--checkpointed_blocks", type=float, default=1.0, help="Share of the blocks that --gradient_checkpointing recomputes.")
    add("--attention_backend", metavar="NAME", choices=[b.value for b in AttentionBackendName if "sage" not in b.value],
        help="Attention of diffusers, for example flash; those without a backward are left out. Default: PyTorch's.")
    add("--compile_blocks", action="store_true", help="Compile the repeated blocks: faster, after a slow first step.")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="Default: what accelerate is configured to.")
    add("--allow_tf32", action="store_true", help="TF32 matrix products on Ampere and newer GPUs.")
    add("--seed", type=int, default=0, help="All randomness follows from the seed and the step.")


def add_output_arguments(parser):
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", required=True, help="Folder of the result, checkpoints, validation pictures and logs.")
    add("--checkpointing_steps", type=int, default=500, help="Steps between checkpoints.")
    add("--checkpoints_total_limit", type=int, help="Keep only so many of the newest checkpoints.")
    add("--resume_from_checkpoint", help="A checkpoint folder, or 'latest' of OUTPUT_DIR if there is one.")
    add("--validation_prompt", nargs="+", help="Prompts of the validation picture; the teacher sees a training image with "
        "each. Default: training captions.")
    add("--validation_steps", type=int, default=250, help="Steps between validations, from step 0. 0: none.")
    add("--num_validation_images", type=int, default=4, help="Rows of the validation picture without --validation_prompt.")
    add("--enable_vae_tiling", action="store_true", help="Decode validation pictures in tiles: less memory.")
    add("--report_to", default="tensorboard", choices=["tensorboard", "wandb", "none"], help="Tracker.")
    add("--push_to_hub", action="store_true", help="Push the result to the Hub at the end.")
    add("--hub_push_checkpoints", action="store_true", help="Push the result so far at each checkpoint, too.")
    add("--hub_model_id", help="Repository to push to. Default: the name of OUTPUT_DIR.")
    add("--hub_private_repo", action="store_true", help="Make the repository private.")
    add("--hub_token", help="Token to push with. Default: HF_TOKEN or that of the Hub login, which no command line shows.")
    add("--hub_timeout", type=float, default=60, help="Seconds without an answer after which a request of the push fails. Some "
        "are tried six times.")  # fmt: skip


def add_full_arguments(parser):
    add = parser.add_argument_group("full fine-tuning").add_argument
    add("--ema_device", choices=["accelerator", "cpu"], default="accelerator", help="Where the teacher's fp32 average is "
        "held. cpu: a copy in the dtype of --mixed_precision computes on the accelerator.")
    add("--ema_refresh_steps", type=int, default=10, help="With --ema_device cpu: steps between updates of average and copy.")
    add("--optimizer", choices=["adamw", "adafactor"], default="adamw", help="adafactor: without momentum, factored states.")
    add("--stochastic_rounding", action="store_true", help="Hold the weights in bf16 alone; AdamW of torchao with 8-bit "
        "states rounds each update at random, so that small ones are not lost.")
    add("--fused_backward_pass", action="store_true", help="Update each weight during the backward and free its gradient: no "
        "gradient buffer, but no clipping, no accumulation, one state per rollout, one process.")  # fmt: skip


def check_full_arguments(parser, args):
    """One error for flags that do not go together."""
    if args.optimizer != "adamw" and (args.use_8bit_adam or args.stochastic_rounding):
        parser.error(f"--use_8bit_adam and --stochastic_rounding are AdamW, not --optimizer {args.optimizer}: leave one out")
    if args.use_8bit_adam and args.stochastic_rounding:
        parser.error("--stochastic_rounding brings its own 8-bit AdamW: leave out --use_8bit_adam")
    if args.fused_backward_pass and args.gradient_accumulation_steps > 1:
        parser.error("--fused_backward_pass holds no gradient to add to: give --gradient_accumulation_steps 1")
    if args.fused_backward_pass and args.states_per_rollout > 1:
        parser.error("--fused_backward_pass holds no gradient to add to: give --states_per_rollout 1")
    if args.fused_backward_pass and args.max_grad_norm > 0:
        parser.error("--fused_backward_pass cannot clip the norm of a gradient that is never held: give --max_grad_norm 0")


def check_arguments(parser, args):
    """One error for flags that cannot work, before anything is read."""
    if (args.instance_data_dir is None) == (args.dataset_name is None):
        parser.error("give either --instance_data_dir or --dataset_name")
    for name in ("rollout_steps", "states_per_rollout", "train_batch_size", "gradient_accumulation_steps", "max_train_steps", "resolution",
                 "checkpointing_steps", "num_validation_images", "rank", "ema_refresh_steps"):  # fmt: skip
        if getattr(args, name, 1) < 1:  # the last two are of one script each
            parser.error(f"--{name} must be at least 1, not {getattr(args, name)}")
    if args.states_per_rollout > args.rollout_steps:
        parser.error(f"--states_per_rollout must be at most --rollout_steps ({args.rollout_steps}), not {args.states_per_rollout}")
    if not 0.0 <= args.ema_decay <= 1.0:
        parser.error(f"--ema_decay must be between 0 and 1, not {args.ema_decay}")
    if not 0.0 < args.checkpointed_blocks <= 1.0:
        parser.error(f"--checkpointed_blocks must be above 0 and at most 1, not {args.checkpointed_blocks}")
    if args.prior_every < 2:
        parser.error(f"--prior_every must be at least 2, not {args.prior_every}: the other batches are of the images")
    if args.hub_push_checkpoints and not args.push_to_hub:
        parser.error("--hub_push_checkpoints needs --push_to_hub")
    if args.hub_timeout <= 0:
        parser.error(f"--hub_timeout must be positive, not {args.hub_timeout}")
    args.hub_token = (args.hub_token or "").strip() or None
    if args.hub_token:
        sys.argv = [word.replace(args.hub_token, "***") for word in sys.argv]  # trackers may record the command line
    args.context_cache_dir = args.context_cache_dir or os.path.join(args.output_dir, "contexts")


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=HelpFormatter)
    add_model_arguments(parser)
    add_data_arguments(parser)
    add_dopsd_arguments(parser)
    add_full_arguments(parser)
    add_training_arguments(parser)
    add_output_arguments(parser)
    args = parser.parse_args(input_args)
    check_arguments(parser, args)
    check_full_arguments(parser, args)
    return args


# --------------------------------------------------------------------------------------------------------------- data
def read_folder(folder, instance_prompt):
    """Dataset with `image` and `captions` of a folder whose captions are NAME.txt files or `instance_prompt`.

    Raises:
        ValueError: no images, an image without caption, or a caption file without image.
    """
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    images = [p for p in files if p.suffix.lower() in IMAGE_SUFFIXES]
    stems = {p.stem for p in images}
    for path in files:
        if path.suffix == ".txt" and path.stem not in stems:
            raise ValueError(f"{path}: caption file without image; name it as the image it belongs to, or remove it.")
    if not images:
        raise ValueError(f"--instance_data_dir {folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}).")
    captions = []
    for path in images:
        text = path.with_suffix(".txt")
        lines = read_lines(text) if text.exists() else [instance_prompt]
        if not any(lines):
            raise ValueError(f"{path} has no caption: write {text.name} beside it or give --instance_prompt.")
        captions.append(lines)
    # the size and time of each file make the cache of `inspect_images` a cache of these very images
    stamps = [[p.stat().st_size, p.stat().st_mtime_ns] for p in images]
    rows = {"image": [str(p) for p in images], "captions": captions, "stamp": stamps}
    return Dataset.from_generator(columns_to_rows, gen_kwargs={"columns": rows}).remove_columns("stamp")


def read_lines(path, name=None):
    """The lines of a text file, without blank ones. Raises ValueError where it cannot be read."""
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name or path} is no text file in UTF-8 that can be read ({error}).") from error
    return [line.strip() for line in lines if line.strip()]


def columns_to_rows(columns):
    """Rows of a dict of equally long lists. A generator, because datasets caches on disk what a generator gave."""
    for values in zip(*columns.values(), strict=True):
        yield dict(zip(columns, values))


def read_dataset(args):
    """Dataset with the columns `image` (undecoded), `captions` (a list of strings) and `references` (undecoded images).

    Raises:
        ValueError: missing or empty data, a missing column, or an image without caption.
    """
    folder = Path(args.instance_data_dir) if args.instance_data_dir else None
    if folder and not folder.is_dir():
        raise ValueError(f"--instance_data_dir {folder} is no folder.")
    if folder and not any((folder / name).exists() for name in ("metadata.jsonl", "metadata.csv")):
        if args.reference_column:
            raise ValueError(f"--reference_column needs metadata.jsonl or metadata.csv in {folder}, or --dataset_name.")
        return read_folder(folder, args.instance_prompt).cast_column("image", ImageFeature(decode=False))
    if folder:
        dataset = load_dataset("imagefolder", data_dir=str(folder), split="train")
    else:
        dataset = load_dataset(args.dataset_name, args.dataset_config_name, split="train")
    if args.image_column not in dataset.column_names:
        raise ValueError(f"--image_column {args.image_column!r} is none of the columns {dataset.column_names}.")
    if args.caption_column not in dataset.column_names and not args.instance_prompt:
        raise ValueError(
            f"--caption_column {args.caption_column!r} is none of the columns {dataset.column_names}; "
            "name the column, or give --instance_prompt."
        )
    if args.reference_column and args.reference_column not in dataset.column_names:
        raise ValueError(f"--reference_column {args.reference_column!r} is none of the columns {dataset.column_names}.")

    def captions_of(row, index):
        captions = row.get(args.caption_column) or args.instance_prompt
        captions = [c for c in ([captions] if isinstance(captions, str) else captions or []) if c and c.strip()]
        if not captions:
            raise ValueError(f"Row {index} of the dataset has no caption; add one or give --instance_prompt.")
        return {"captions": captions}

    pictures = {args.image_column: "image"} | ({args.reference_column: "references"} if args.reference_column else {})
    for column in pictures:
        several = isinstance(dataset.features[column], ListFeature)
        feature = ImageFeature(decode=False)
        dataset = dataset.cast_column(column, ListFeature(feature) if several else feature)
    # columns are worked on apart, so that no image is copied into the cache
    texts = dataset.remove_columns(list(pictures))
    texts = texts.map(captions_of, with_indices=True, remove_columns=texts.column_names, desc="captions")
    images = dataset.select_columns(list(pictures))
    images = images.rename_columns({old: new for old, new in pictures.items() if old != new})
    return concatenate_datasets([images, texts], axis=1)


def load_image(source):
    """RGB image of a row's `image` ({"path", "bytes"}): EXIF orientation applied, alpha on white, 16-bit scaled to 8.

    Raises:
        ValueError: the image cannot be read; the message names it.
    """
    name = source["path"] or "an image of the dataset"
    try:
        image = Image.open(io.BytesIO(source["bytes"]) if source["bytes"] else source["path"])
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit grey; a plain convert() would clip at 255
            pixels = np.asarray(image, dtype=np.float64) / 65535 * 255
            image = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} cannot be read as an image ({error}); replace or remove it.") from error


def inspect_images(dataset, buckets):
    """Adds `bucket`, the (height, width) of each image in training, `image_hash`, and size and hash of its references. Every
    image is decoded once; a later run on the same images reads the result from the cache of datasets."""

    def inspect(row):
        image = load_image(row["image"])
        bucket = buckets[find_nearest_bucket(image.height, image.width, buckets)]
        references = references_of(row)
        return {
            "bucket": list(bucket),
            "image_hash": hash_image(row["image"]),
            "reference_sizes": [list(load_image(source).size) for source in references],
            "reference_hashes": [hash_image(source) for source in references],
        }

    added = dataset.map(inspect, remove_columns=dataset.column_names, desc="images")
    return concatenate_datasets([dataset, added], axis=1)


def hash_image(source):
    """Hash of the undecoded content of {"path", "bytes"}."""
    return hashlib.sha256(source["bytes"] or Path(source["path"]).read_bytes()).hexdigest()


def read_prior_prompts(args):
    """The lines of --prior_prompts.

    Raises:
        ValueError: they cannot be read, or there are none.
    """
    if not args.prior_prompts:
        return []
    prompts = read_lines(Path(args.prior_prompts), f"--prior_prompts {args.prior_prompts}")
    if not prompts:
        raise ValueError(f"--prior_prompts {args.prior_prompts} holds no prompt: write one on each line.")
    return prompts


def references_of(row):
    """The undecoded images that the student is given: none, one or several."""
    references = row.get("references") or []
    return references if isinstance(references, list) else [references]


def shown_row(rows, index, args):
    """The row whose image the teacher sees."""
    return rows[(index + 1) % len(rows) if args.teacher_image == "other" else index]


def rows_of(rows, index, args):
    """The row and the row whose image the teacher sees; a prior prompt, of index None, has no images."""
    return (NO_IMAGES, NO_IMAGES) if index is None else (rows[index], shown_row(rows, index, args))


def layouts_of(dataset, args):
    """For each row, what the images of a batch must have in common: their bucket, the sizes of their references and the bucket
    of the image that the teacher sees."""
    buckets = list(map(tuple, dataset["bucket"]))
    references = [tuple(map(tuple, sizes)) for sizes in dataset["reference_sizes"]]
    return tuple((b, references[i], shown_row(buckets, i, args)) for i, b in enumerate(buckets))


def training_image(row):
    """The row's image, resized and centre-cropped to its bucket."""
    height, width = row["bucket"]
    return ImageOps.fit(load_image(row["image"]), (width, height), Image.Resampling.LANCZOS)


@functools.lru_cache(maxsize=2)
def epoch_order(layouts, batch_size, seed, epoch):
    """Batches of row indices for one epoch, each of one layout; short batches are filled up from its start."""
    rng = np.random.default_rng([seed, epoch])
    batches = []
    for layout in sorted(set(layouts)):
        rows = rng.permutation([i for i, other in enumerate(layouts) if other == layout])
        rows = np.resize(rows, math.ceil(len(rows) / batch_size) * batch_size)
        batches += list(rows.reshape(-1, batch_size))
    return [batches[i] for i in rng.permutation(len(batches))]


def draw_batch(layouts, batch_size, micro_step, process, num_processes, seed):
    """Row indices and a random generator for each image of a process's micro-batch.

    It is a function of the seed and the place in the run alone: a resumed run draws what the uninterrupted one would, and
    two processes draw what one process with twice the batch would.
    """
    total = batch_size * num_processes
    per_epoch = len(epoch_order(layouts, total, seed, 0))
    order = epoch_order(layouts, total, seed, micro_step // per_epoch)
    slots = range(process * batch_size, (process + 1) * batch_size)
    rows = order[micro_step % per_epoch][slots.start : slots.stop]
    return [(int(row), np.random.default_rng([seed, micro_step, slot])) for row, slot in zip(rows, slots)]


# ----------------------------------------------------------------------------------------------------------- contexts
def fingerprint(model_name_or_path, patterns, revision):
    """A hash over the content of a model's files. Hub models are fetched first; a warm Hub cache needs no network.

    In the Hub's cache a file is a link to a blob that is named by its content, which saves reading gigabytes.
    """
    folder = Path(model_name_or_path)
    if not folder.is_dir():
        folder = Path(snapshot_download(model_name_or_path, revision=revision, allow_patterns=patterns))
    digest = hashlib.sha256()
    for path in sorted({p for pattern in patterns for p in folder.glob(pattern)}):
        digest.update(path.relative_to(folder).as_posix().encode())
        if path.is_symlink() and path.resolve().parent.name == "blobs":
            digest.update(path.resolve().name.encode())
            continue
        with path.open("rb") as file:
            for chunk in iter(lambda: file.read(2**20), b""):
                digest.update(chunk)
    return digest.hexdigest()


class ContextCache:
    """Student and teacher contexts, one memory-mapped safetensors file for each row, row shown to the teacher and caption.

    The key changes whenever images, crops, caption, models or settings change.
    """

    def __init__(self, args):
        self.folder = Path(args.context_cache_dir)
        encoders = ["text_encoder/*", "tokenizer/*", *(["vae/*"] if sees_references(args) else [])]
        self.models = [fingerprint(args.pretrained_model_name_or_path, encoders, args.revision), str(weight_dtype_of(args))]
        self.models += [args.teacher_context, args.teacher_prompt_suffix]
        if args.encoder_quantization:
            self.models.append(args.encoder_quantization)
        if args.teacher_context == "vlm":
            patterns = ["*.json", "*.jinja", "*.txt", "*.safetensors"]
            self.models += [fingerprint(args.vlm_model_name_or_path, patterns, None), args.teacher_max_pixels]

    def path(self, row, shown, caption):
        key = json.dumps([self.models, row["reference_hashes"], shown["image_hash"], shown["bucket"], caption])
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    def read(self, row, shown, caption):
        """(student context, teacher context); they are one for a prior prompt."""
        tensors = load_file(self.path(row, shown, caption))
        split = {who: {n.removeprefix(who + "."): t for n, t in tensors.items() if n.startswith(who)} for who in ("student", "teacher")}
        return split["student"], split["teacher"] or split["student"]

    def write(self, row, shown, caption, student, teacher):
        path = self.path(row, shown, caption)
        aside = path.with_suffix(f".{os.getpid()}.tmp")
        contexts = {"student": student, "teacher": teacher}
        save_file({f"{who}.{n}": t.cpu().contiguous() for who, c in contexts.items() for n, t in c.items()}, aside)
        os.replace(aside, path)


def sees_references(args):
    """Whether the transformer is shown reference images, which the VAE encodes."""
    return args.teacher_context == "edit" or args.reference_column is not None


def weight_dtype_of(args):
    """dtype of the frozen weights: that of mixed precision."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(args.mixed_precision, torch.float32)


def check_contexts(family, args, dataset, pairs):
    """Raises ValueError for a VLM that does not fit or a context that is too long; reads no weights."""
    if args.teacher_context != "vlm":
        return
    base = {"pretrained_model_name_or_path": args.pretrained_model_name_or_path, "revision": args.revision}
    text_config = transformers.AutoConfig.from_pretrained(**base, subfolder="text_encoder")
    args.vlm_model_name_or_path = args.vlm_model_name_or_path or family.vlms.get(text_config.hidden_size)
    if not args.vlm_model_name_or_path:
        raise ValueError(f"--vlm_model_name_or_path: name a Qwen3-VL with a hidden size of {text_config.hidden_size}.")
    encoder = MultimodalEncoder(args.vlm_model_name_or_path, args.teacher_max_pixels)
    encoder.check_config(text_config)
    ending = family.chat_ending(transformers.AutoTokenizer.from_pretrained(**base, subfolder="tokenizer"))
    transformer_config = family.transformer_class.load_config(**base, subfolder="transformer")
    longest = family.max_context_length(transformer_config, family.load_config(**base))
    buckets = list(map(tuple, dataset["bucket"]))
    without_caption = {bucket: encoder.context_length("", *bucket, ending) for bucket in set(buckets)}
    for index, caption in pairs:
        if index is None:
            continue
        bucket = shown_row(buckets, index, args)
        # a token is at least one byte: of most captions no token needs to be counted
        length = without_caption[bucket] + len(caption.encode())
        if length > longest and (length := encoder.context_length(caption, *bucket, ending)) > longest:
            raise ValueError(
                f"The teacher context of {dataset[index]['image']['path']} with caption {caption[:60]!r} has {length} tokens; the "
                f"transformer takes at most {longest}. Lower --teacher_max_pixels or shorten the caption."
            )


def check_quantization(args):
    """Raises ValueError where a quantisation cannot work on this machine."""
    for flag in ("quantization", "encoder_quantization"):
        kind = getattr(args, flag, None)  # a fully trained transformer is never quantised
        if kind and args.mixed_precision != "bf16":
            raise ValueError(f"--{flag} {kind} computes in bf16: give --mixed_precision bf16.")
        if kind == "nf4" and not is_bitsandbytes_available():
            raise ValueError(f"--{flag} nf4 needs bitsandbytes: pip install bitsandbytes.")
        if kind == "nf4" and flag == "quantization" and not torch.cuda.is_available():
            raise ValueError("--quantization nf4 needs a GPU, which diffusers asks for; int8 does not.")
        if kind in ("int8", "fp8") and not is_torchao_available():
            raise ValueError(f"--{flag} {kind} needs torchao: pip install torchao.")


def quantization_config(component, kind, library):
    """How the weights of a pipeline's `component`, a model of `library`, are held; None for the dtype of mixed precision."""
    if not kind:
        return None
    if kind == "nf4":
        config = library.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    else:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

        config = library.TorchAoConfig({"int8": Int8WeightOnlyConfig, "fp8": Float8WeightOnlyConfig}[kind]())
    return diffusers.PipelineQuantizationConfig(quant_mapping={component: config})


def encode_batch(pipeline, args, cache, dataset, pairs):
    """Encodes and stores the contexts of a few (row index, caption) `pairs`, in one forward of each encoder."""
    rows, captions = [rows_of(dataset, index, args) for index, _ in pairs], [caption for _, caption in pairs]
    references = [[load_image(source) for source in references_of(row)] for row, _ in rows]
    students, teachers = pipeline.encode_student(captions, references), [{}] * len(pairs)
    if pairs[0][0] is not None:
        prompts, images = [c + args.teacher_prompt_suffix for c in captions], [training_image(shown) for _, shown in rows]
        teachers = pipeline.encode_teacher(prompts, images, args.teacher_context, references)
    for row, caption, student, teacher in zip(rows, captions, students, teachers, strict=True):
        cache.write(*row, caption, student, teacher)


def encode_contexts(family, args, cache, dataset, pairs, accelerator):
    """Encodes the (row index, caption) `pairs` that are not in the cache, then frees the encoders."""
    keys = list(dataset.select_columns(["image_hash", "bucket", "reference_hashes"]))
    paths = {(index, caption): cache.path(*rows_of(keys, index, args), caption) for index, caption in pairs}
    # rows with the same images and caption share a file
    missing = list({path: pair for pair, path in paths.items() if not path.exists()}.values())
    logger.info(f"Contexts: {len(missing)} of {len(set(paths.values()))} to encode.")
    accelerator.wait_for_everyone()
    if not missing:
        return
    cache.folder.mkdir(parents=True, exist_ok=True)
    pipeline = family.from_pretrained(
        args.pretrained_model_name_or_path,
        transformer=None,
        revision=args.revision,
        variant=args.variant,
        dtype=weight_dtype_of(args),
        quantization_config=quantization_config("text_encoder", args.encoder_quantization, transformers),
        **({} if sees_references(args) else {"vae": None}),
    ).to(accelerator.device)
    if args.teacher_context == "vlm":
        pipeline.load_multimodal_encoder(args.vlm_model_name_or_path, args.teacher_max_pixels)
    # a prior prompt has no teacher, so it shares no batch with others
    for group in ([p for p in missing if p[0] is not None], [p for p in missing if p[0] is None]):
        mine = group[accelerator.process_index :: accelerator.num_processes]
        for start in tqdm(range(0, len(mine), ENCODING_BATCH), "Encoding contexts", disable=not accelerator.is_local_main_process):
            encode_batch(pipeline, args, cache, dataset, mine[start : start + ENCODING_BATCH])
    del pipeline
    free_memory()
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(accelerator.device)  # what the encoders took is not of the training
    accelerator.wait_for_everyone()


# ------------------------------------------------------------------------------------------------------------- method
def state_loss(student_velocity, teacher_velocity, sigma, weighting):
    """w_k || u_s - sg(u_t) ||^2 of each image (B,), mean over elements; `sigma` (B,) is that of the image's state.

    w_k = 1 is the paper's loss on velocities. w_k = sigma_k^2 is the same loss on x0_hat = x_t - sigma u, which is what
    the authors' code trains with.
    """
    weight = sigma**2 if weighting == "x0" else 1.0
    return weight * (student_velocity - teacher_velocity.detach()).square().mean(dim=(1, 2, 3))


@torch.no_grad()
def update_ema(shadow, parameters, decay):
    """theta_bar <- decay * theta_bar + (1 - decay) * theta, in the dtype of `shadow` (fp32: bf16 would round it away)."""
    for average, parameter in zip(shadow, parameters, strict=True):
        average.lerp_(parameter.to(average.device, average.dtype), 1 - decay)


def draw_states(args, micro_step, process, num_processes):
    """The M of K states, in ascending order, at which each image of a process's micro-batch is trained.

    Of K consecutive images of the run every state is drawn M times. As in `draw_batch`, seed and place in the run decide alone.
    """
    drawn, batch_size = [], args.train_batch_size
    for slot in range(process * batch_size, (process + 1) * batch_size):
        cycle, place = divmod(micro_step * num_processes * batch_size + slot, args.rollout_steps)
        # 2**40 is no micro-step, so that no other draw has these numbers
        order = np.random.default_rng([args.seed, 2**40, cycle]).permutation(args.rollout_steps)
        drawn.append(sorted(np.roll(order, -place * args.states_per_rollout)[: args.states_per_rollout].tolist()))
    return drawn


def rollout(pipeline, transformer, teacher, batch, args, accelerator):
    """Yields, for the first, second, .. M-th drawn state k of every image, k and w_k || u_s - sg(u_t) ||^2, both (B,).

    At a drawn state x_{t_k}:  u_t = v_theta_bar(x_{t_k}, t_k, c_t)   teacher: EMA weights, sees the image
                               u_s = v_theta(x_{t_k}, t_k, c_s)       student: text only
    From every state:          x_{t_{k+1}} = x_{t_k} + (sigma_{k+1} - sigma_k) sg(u_s)
    States are not differentiated through, the forward that drives the rollout is the one that is trained, and nothing is
    computed after the last drawn state. Each k is drawn with probability M / K, so that the mean over the drawn states has
    the expectation (1/K) sum_k w_k || u_s - sg(u_t) ||^2: the paper's loss.
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
        # the teacher first: a change of weights between the student's forward and its backward would corrupt the gradient
        with torch.no_grad(), accelerator.autocast(), teacher.network() as network:
            teacher_velocity = pipeline.velocity(network, latents, timesteps[k], teacher_contexts)
        with accelerator.autocast():
            student_velocity = pipeline.velocity(transformer, latents, timesteps[k], student_contexts)
        yield k, state_loss(student_velocity, teacher_velocity, sigmas[k], args.loss_weighting)
        latents, starts = latents + steps[k] * student_velocity.detach(), [end + 1 for end in ends]


def backward_each_state(states, transformer, args, accelerator, synchronize):
    """Accumulates the gradient of L = (1/M) sum_k loss_k, mean over images. Returns sums of losses and counts of each state (2, K).

    Each state's graph is freed by its own backward before the next state is computed: memory does not grow with M.
    `synchronize` is true in the last micro-step, whose last backward averages the gradients of all processes (with FSDP
    every backward does, because gradients that wait for others are held whole).
    """
    table = torch.zeros(2, args.rollout_steps, device=accelerator.device)
    for number in range(args.states_per_rollout):
        last = synchronize and number == args.states_per_rollout - 1
        with contextlib.nullcontext() if last or accelerator.is_fsdp2 else accelerator.no_sync(transformer):
            k, losses = next(states)
            if getattr(args, "fused_backward_pass", False):  # of the full script: weights change during the backward
                check_finite(losses.tolist())
            accelerator.backward(losses.mean() / (args.states_per_rollout * args.gradient_accumulation_steps))
        table.index_add_(1, k, torch.stack([losses.detach(), torch.ones_like(losses)]))
    return table


class FullTeacher:
    """theta_bar of the whole transformer, held as `--ema_decay` and `--ema_device` ask for.

    decay 0: the student itself. decay 1: a frozen copy in the compute dtype. Otherwise an fp32 average: on the accelerator
    it computes under autocast; on the CPU, n = `--ema_refresh_steps` updates are made as one, theta_bar <- decay^n theta_bar +
    (1 - decay^n) theta, and copied to a network in the compute dtype.
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
        """Brings average and network up to the last step; also at checkpoints, since a resumed run starts so."""
        if self.age:
            update_ema(self.shadow.values(), self.student.state_dict().values(), self.decay**self.age)
        self.age = 0
        if self.on_cpu:
            self.module.load_state_dict(self.shadow)
        if isinstance(self.module, FSDPModule):
            self.module.reshard()  # what the last forward gathered is out of date

    def network(self):
        """Context manager that gives the transformer that computes with theta_bar."""
        return contextlib.nullcontext(self.module)


def make_batch(pipeline, rows, cache, draws, prior_prompts, args, device):
    """Noise (B, C, h, w), student contexts and teacher contexts of the drawn rows; one caption of each row at random, or one of
    `prior_prompts` if there are any."""
    noise, contexts = [], []
    for index, rng in draws:
        bucket, captions = rows[index]["bucket"], prior_prompts or rows[index]["captions"]
        caption = captions[rng.integers(len(captions))]
        pair = cache.read(*rows_of(rows, None if prior_prompts else index, args), caption)
        contexts.append([{name: tensor.to(device) for name, tensor in context.items()} for context in pair])
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
        noise.append(pipeline.initial_noise(*bucket, generator))
    return torch.cat(noise).to(device), *map(list, zip(*contexts))


# --------------------------------------------------------------------------------------------------------- validation
def validation_pairs(dataset, args):
    """(row index, prompt) of each row of the validation picture."""
    prompts = args.validation_prompt or [None] * args.num_validation_images
    pairs = []
    for i, prompt in enumerate(prompts):
        index = i % len(dataset)
        captions = dataset[index]["captions"]
        pairs.append((index, prompt or captions[i // len(dataset) % len(captions)]))
    return pairs


@torch.no_grad()
def log_validation(pipeline, teacher, dataset, cache, args, accelerator, step):
    """Writes a picture with a row per pair: student | teacher | the image that the teacher sees, in as many steps as users will
    run."""
    student, pictures = pipeline.transformer, []
    for number, (index, prompt) in enumerate(validation_pairs(dataset, args)):
        row, shown = dataset[index], shown_row(dataset, index, args)
        noise = pipeline.initial_noise(*row["bucket"], torch.Generator().manual_seed(args.seed + number))
        for network, context in zip((contextlib.nullcontext(student), teacher.network()), cache.read(row, shown, prompt)):
            with network as transformer, accelerator.autocast():
                latents = noise.to(accelerator.device)
                pictures += pipeline.sample(transformer, [context], latents, args.num_inference_steps)
        pictures.append(training_image(shown))
    if not accelerator.is_main_process:
        return
    save_samples(pictures[::3] if step else [], args)
    pictures = [ImageOps.pad(picture, pictures[0].size, color="white") for picture in pictures]
    grid = make_image_grid(pictures, rows=len(pictures) // 3, cols=3)
    folder = Path(args.output_dir) / "validation"
    folder.mkdir(parents=True, exist_ok=True)
    grid.save(folder / f"step-{step:06d}.png")
    logger.info(f"Validation (student | teacher | training image): {folder}/step-{step:06d}.png")
    for tracker in accelerator.trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({"student | teacher | training image": np.asarray(grid)[None]}, step=step, **layout)


# -------------------------------------------------------------------------------------------------------- checkpoints
def list_checkpoints(output_dir):
    """Complete checkpoint folders, oldest first."""
    return sorted(Path(output_dir).glob("checkpoint-*[0-9]"), key=lambda path: int(path.name.split("-")[1]))


def find_checkpoint(args):
    """The checkpoint folder to resume from, or None.

    Raises:
        ValueError: it is missing or incomplete, or it was made with other settings.
    """
    if not args.resume_from_checkpoint:
        return None
    path = Path(args.resume_from_checkpoint)
    if args.resume_from_checkpoint == "latest":
        found = list_checkpoints(args.output_dir)
        if not found:
            return None
        path = found[-1]
    try:
        state = json.loads((path / STATE_NAME).read_text())
        for name, size in state["files"].items():
            if (path / name).stat().st_size != size:
                raise ValueError(f"{name} has {(path / name).stat().st_size} bytes, not {size}")
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"--resume_from_checkpoint {path} is missing or half-written ({error}).") from error
    for name, value in state["settings"].items():
        if name in FIXED_ON_RESUME and value != getattr(args, name):
            raise ValueError(f"--{name} is {getattr(args, name)}, but {path} was trained with {value}.")
    return path


def save_weights(tensors, folder, dtype=None):
    """Safetensors in the Hub's layout, sharded where large; FSDP's shards are gathered on the main process."""
    gathered, main = {}, PartialState().is_main_process
    for name, tensor in tensors.items():
        # the clone leaves out the padding of a tensor that does not divide evenly over the processes
        whole = tensor.detach().full_tensor().clone() if isinstance(tensor, DTensor) else tensor.detach()
        if main:
            gathered[name] = whole.to("cpu", dtype).contiguous()
    if main:
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_torch_state_dict(gathered, folder, filename_pattern="diffusion_pytorch_model{suffix}.safetensors")


@torch.no_grad()
def load_weights(tensors, folder):
    """Copies what `save_weights` wrote into `tensors`."""
    for path in sorted(folder.glob("*.safetensors")):
        for name, saved in load_file(path).items():
            target = tensors[name]
            if isinstance(target, DTensor):
                saved = distribute_tensor(saved.to(target.device), target.device_mesh, target.placements)
            target.copy_(saved)


def register_checkpoint_hooks(accelerator, networks):
    """Makes accelerate save and load exactly `networks` (folder name -> name -> live tensor), as safetensors."""

    def save(models, weights, output_dir):
        weights.clear()
        for network, tensors in networks.items():
            save_weights(tensors, Path(output_dir) / network)

    def load(models, input_dir):
        models.clear()
        for network, tensors in networks.items():
            load_weights(tensors, Path(input_dir) / network)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def save_checkpoint(accelerator, args, step):
    """Writes checkpoint-STEP aside, renames it when complete, and only then removes the oldest beyond the limit."""
    final = Path(args.output_dir) / f"checkpoint-{step}"
    aside = Path(args.output_dir) / f".checkpoint-{step}.tmp"
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
    accelerator.wait_for_everyone()
    accelerator.save_state(str(aside))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        files = {p.relative_to(aside).as_posix(): p.stat().st_size for p in aside.rglob("*") if p.is_file()}
        state = {"step": step, "settings": settings_of(args), "files": files}
        (aside / STATE_NAME).write_text(json.dumps(state, indent=2))
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        if args.checkpoints_total_limit:
            for old in list_checkpoints(args.output_dir)[: -args.checkpoints_total_limit]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()


def settings_of(args):
    """The run's flags, without the token."""
    return {name: value for name, value in vars(args).items() if name != "hub_token"}


def public_settings(args):
    """`settings_of` for other people's eyes: of absolute paths, which tell about this machine, the last part alone."""

    def shown(value):
        return Path(value).name if isinstance(value, str) and os.path.isabs(value) and os.path.exists(value) else value

    return {name: shown(value) for name, value in settings_of(args).items()}


def register_full_hooks(accelerator, transformer, teacher, networks):
    """Before a checkpoint, the teacher's copy is brought up to date, as a resumed run will find it; and the configs are
    written that make the folders loadable."""

    def prepare(models, weights, output_dir):
        teacher.refresh()
        if accelerator.is_main_process:
            for network in networks:
                transformer.save_config(Path(output_dir) / network)

    accelerator.register_save_state_pre_hook(prepare)


# ------------------------------------------------------------------------------------------------------------- output
def save_pipeline(transformer, family, args):
    """Writes OUTPUT_DIR in the Hub's layout of the base: the trained transformer, the base's other parts, the pipeline's code."""
    folder, base = Path(args.output_dir), Path(args.pretrained_model_name_or_path)
    aside = folder / ".transformer.tmp"
    save_weights(transformer.state_dict(), aside, weight_dtype_of(args))
    if not PartialState().is_main_process:
        return
    transformer.save_config(aside)
    shutil.rmtree(folder / "transformer", ignore_errors=True)
    aside.rename(folder / "transformer")
    if not base.is_dir():
        base = Path(snapshot_download(args.pretrained_model_name_or_path, revision=args.revision, ignore_patterns=["transformer/*"]))
    index = json.loads((base / "model_index.json").read_text())
    for name in component_folders(index):
        if name != "transformer":
            shutil.copytree(base / name, folder / name, dirs_exist_ok=True)
    if args.num_inference_steps != family.default_num_inference_steps:
        index["num_inference_steps"] = args.num_inference_steps
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    shutil.copyfile(pipeline_dopsd.__file__, folder / "pipeline_dopsd.py")
    # one name for all families: diffusers runs each such file in the same module and allows one pipeline class in it
    (folder / "pipeline.py").write_text(f"from .pipeline_dopsd import {family.__name__} as Pipeline  # noqa: F401\n")
    (folder / SETTINGS_NAME).write_text(json.dumps(public_settings(args), indent=2) + "\n")


def component_folders(index):
    """Names of the components, each a folder, that a model_index.json lists."""
    return [name for name, value in index.items() if isinstance(value, list) and value[0]]


# ------------------------------------------------------------------------------------------------------- card and push
def save_samples(pictures, args):
    """Replaces the pictures of the model card's gallery."""
    folder = Path(args.output_dir) / "samples"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number}.png")


def gallery(dataset, args):
    """File name -> prompt of the pictures that `save_samples` writes."""
    pairs = validation_pairs(dataset, args) if args.validation_steps else []
    return {f"samples/{number}.png": prompt for number, (_, prompt) in enumerate(pairs)}


def card_data(args, samples, tags):
    """Metadata of the card. The base's licence is read from its own card; the Hub is asked for that only before a push."""
    base, licence = args.pretrained_model_name_or_path, {}
    local, prompt = Path(base).is_dir(), args.instance_prompt
    with contextlib.suppress(Exception):  # no card, not in the cache, or not readable: then no licence is claimed
        card = Path(base) / "README.md"
        if not local:
            offline = not args.push_to_hub
            card = hf_hub_download(base, card.name, revision=args.revision, token=args.hub_token, local_files_only=offline)
        data = ModelCard.load(card).data
        licence = {name: data.get(name) for name in ("license", "license_name", "license_link") if data.get(name)}
    widget = [{"text": samples[name], "output": {"url": name}} for name in samples if (Path(args.output_dir) / name).exists()]
    return ModelCardData(
        base_model=None if local else base,  # the Hub refuses what is no repository
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["text-to-image", "diffusers", "d-opsd", *tags],
        instance_prompt=prompt,
        widget=widget or None,
        **licence,
    )


def training_command(args):
    """The command that trained this, without the token and without flags that have their default."""
    defaults = vars(parse_args(["--pretrained_model_name_or_path", "", "--instance_data_dir", "", "--output_dir", ""]))
    words = ["accelerate", "launch", Path(__file__).name]
    for name, value in public_settings(args).items():
        if value is True:
            words.append(f"--{name}")
        elif value not in (None, defaults[name]):
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def draw_loss_curve(args, step):
    """Writes loss.png, the loss over the steps up to `step`; each point is the mean of a hundredth of them."""
    file = Path(args.output_dir) / LOSSES_NAME
    file.touch()
    rows = [line.split(",") for line in file.read_text().splitlines() if line.count(",") == 1]
    # of a step that was done twice, before and after a resume, the later line counts
    losses = [loss for done, loss in sorted({int(done): float(loss) for done, loss in rows}.items()) if done <= step]
    if not losses:
        return
    means = [part.mean() for part in np.array_split(losses, min(100, len(losses)))]
    width, height, margin, top = 640, 320, 40, max(means) or 1.0
    across, up = (width - 2 * margin) / max(1, len(means) - 1), (height - 2 * margin) / top
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle([margin, margin, width - margin, height - margin], outline="grey")
    draw.line([(margin + i * across, height - margin - mean * up) for i, mean in enumerate(means)], fill="blue", width=2)
    draw.text((margin, margin - 15), f"loss, 0 to {top:.3g}", fill="black")
    draw.text((margin, height - margin + 5), f"{len(losses)} steps", fill="black")
    image.save(file.with_name("loss.png"))


def repository_name(args):
    """What --hub_model_id names, or the name of OUTPUT_DIR."""
    return args.hub_model_id or Path(args.output_dir).resolve().name


def save_card(args, samples, step, name, about, loading, tags):
    """Writes README.md.

    Args:
        samples: file name -> prompt of the gallery.
        about: what this is, the beginning of a sentence.
        loading: lines of code that make `pipe`.
    """
    draw_loss_curve(args, step)
    data = card_data(args, samples, tags)
    prompt = json.dumps(args.instance_prompt or next(iter(samples.values()), "your prompt"), ensure_ascii=False)
    images = args.train_batch_size * args.gradient_accumulation_steps * PartialState().num_processes
    shown = {"target": "the training image", "other": "another image of the set"}[args.teacher_image]
    way = "as a reference image"
    if args.teacher_context == "vlm":
        way = f"in its prompt, through the VLM {Path(args.vlm_model_name_or_path).name}"
    content = f"""---
{data.to_yaml()}
---

# {name}

{about}, trained with [D-OPSD](https://arxiv.org/abs/2605.05204) on the base's own few-step rollouts. It is used as the base is:
{args.num_inference_steps} steps, no guidance.

{"<Gallery />" if data.widget else ""}

```py
import torch
from diffusers import DiffusionPipeline

{loading}
pipe.to("cuda" if torch.cuda.is_available() else "cpu")
image = pipe(prompt={prompt}, height={args.resolution}, width={args.resolution}, num_inference_steps={args.num_inference_steps},
             guidance_scale=0.0).images[0]
```

## Training

{step} steps with a batch of {images}, rollouts of {args.rollout_steps} states, {args.states_per_rollout} of them trained, learning rate
{args.learning_rate}. The teacher, an average of the student with decay {args.ema_decay}, saw {shown} {way}.

```bash
{training_command(args)}
```

![Loss over steps](loss.png)

## Limits

It draws what its teacher could draw when it saw the training images, at the steps above, from text alone and without guidance.
How well it still draws what the base can draw was not measured by the training script.
"""
    ModelCard(content).save(Path(args.output_dir) / "README.md")


def push(args, step, save_card, files, message):
    """Pushes the `files` (patterns) of OUTPUT_DIR in one commit. During training, a failure is a warning.

    Raises:
        InputError: the push at the end failed; all is saved, and the message has the command that pushes it later.
    """
    name, folder, client = repository_name(args), Path(args.output_dir), get_session()
    asked = []

    def stop(request):
        if request.url.path.endswith("/repos/create"):
            asked.append(time.monotonic())
            if asked[-1] - asked[0] > args.hub_timeout:
                raise TimeoutError("the Hub is busy with another change")

    # huggingface_hub waits for ever for some answers, and asks for ever while the Hub is busy
    hooks = [hook for hook in client.event_hooks["request"] if hook.__name__ != "stop"]  # without that of the push before
    limits = {"event_hooks": {"request": [*hooks, stop]}, "follow_redirects": True, "timeout": args.hub_timeout}
    set_client_factory(lambda: type(client)(**limits))
    try:
        repo = create_repo(name, token=args.hub_token, private=args.hub_private_repo or None, exist_ok=True).repo_id
        if args.hub_private_repo and not model_info(repo, token=args.hub_token).private:
            raise ValueError(f"{repo} is public: make it private or choose another --hub_model_id first")
        save_card(repo)  # now that the user's name in front is known
        # upload_folder may make several commits
        paths = [path for file in files for path in sorted(folder.glob(file)) if path.is_file()]
        additions = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in paths]
        create_commit(repo, additions, commit_message=message, token=args.hub_token)
        logger.info(f"Pushed to {repo}.")
    except Exception as error:  # of the network, the Hub, the token or the name
        private = ["--private"] if args.hub_private_repo else []
        later = shlex.join(["hf", "upload", name, args.output_dir, ".", *private, *(f"--include={file}" for file in files)])
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        failure = f"The result is saved in {args.output_dir}, but was not pushed ({reason}). Log in and push it with: {later}"
        if step == args.max_train_steps:
            raise InputError(failure) from error
        logger.warning(failure)


def publish_pipeline(transformer, family, samples, args, accelerator, step):
    """Saves the pipeline's folder, and pushes it if that is asked for."""
    save_pipeline(transformer, family, args)
    if not accelerator.is_main_process:
        return
    card = functools.partial(save_full_card, args, samples, step)
    card(repository_name(args))
    if args.push_to_hub:
        folders = component_folders(json.loads((Path(args.output_dir) / "model_index.json").read_text()))
        files = [*REPOSITORY_FILES, *samples, *(f"{name}/*" for name in folders)]
        push(args, step, card, files, f"Model fine-tuned with D-OPSD, step {step}")


def save_full_card(args, samples, step, name):
    """README.md of the pipeline that users load as `name`."""
    about = f"All weights of {public_settings(args)['pretrained_model_name_or_path']}"
    loading = f"pipe = DiffusionPipeline.from_pretrained({json.dumps(name)}, dtype=torch.bfloat16)"
    save_card(args, samples, step, name, about, loading, [])


# --------------------------------------------------------------------------------------------------------------- main
def resolve_arguments(family, args):
    """Fills in what the family has defaults for.

    Raises:
        ValueError: the family has no such teacher, or takes no reference images.
    """
    args.num_inference_steps = args.num_inference_steps or family.default_num_inference_steps
    args.teacher_max_pixels = args.teacher_max_pixels or family.default_teacher_max_pixels
    args.teacher_context = args.teacher_context or family.teacher_contexts[0]
    if args.teacher_context not in family.teacher_contexts:
        raise ValueError(f"--teacher_context {args.teacher_context}: this model has {', '.join(family.teacher_contexts)}.")
    if args.reference_column and "edit" not in family.teacher_contexts:
        raise ValueError("--reference_column: this model takes no reference images.")
    if args.teacher_prompt_suffix is None:
        args.teacher_prompt_suffix = family.default_teacher_suffixes[args.teacher_context]


def check_inputs(args):
    """Everything that can be known to be wrong before weights load. Returns family, dataset, checkpoint and pairs.

    Raises:
        ValueError: with one sentence that names the flag or file.
    """
    output_dir = Path(args.output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / ".writable").touch()
        (output_dir / ".writable").unlink(missing_ok=True)  # of several processes, another may have been faster
    except OSError as error:
        raise ValueError(f"--output_dir {output_dir} is not writable ({error.strerror}).") from error
    if args.use_8bit_adam and not is_bitsandbytes_available():
        raise ValueError("--use_8bit_adam needs bitsandbytes: pip install bitsandbytes.")
    check_quantization(args)
    if args.attention_backend:
        try:
            with attention_backend(args.attention_backend):
                pass
        except RuntimeError as error:
            raise ValueError(f"--attention_backend {args.attention_backend}: {error}") from error
    if args.push_to_hub:
        validate_repo_id(repository_name(args))
        if Path(args.pretrained_model_name_or_path).is_dir():
            logger.warning("The base is a folder: others cannot load what is pushed as it is. Give the base's id on the Hub.")
    family = family_of(args.pretrained_model_name_or_path, args.revision)
    resolve_arguments(family, args)
    checkpoint = find_checkpoint(args)
    vae_config = family.vae_class.load_config(args.pretrained_model_name_or_path, subfolder="vae", revision=args.revision)
    multiple = family.size_multiple(vae_config)
    if args.resolution % multiple:
        raise ValueError(f"--resolution {args.resolution} must be a multiple of {multiple} for this model.")
    buckets = generate_aspect_ratio_buckets(args.resolution, divisibility=multiple)
    dataset = inspect_images(read_dataset(args), buckets)
    if args.teacher_image == "other" and len(dataset) < 2:
        raise ValueError("--teacher_image other needs at least two training images.")
    pairs = [(index, caption) for index, captions in enumerate(dataset["captions"]) for caption in captions]
    if args.validation_steps:
        pairs += [pair for pair in validation_pairs(dataset, args) if pair not in pairs]
    pairs += [(None, prompt) for prompt in read_prior_prompts(args)]
    check_contexts(family, args, dataset, pairs)
    return family, dataset, checkpoint, pairs


def make_accelerator(args):
    """Accelerator, logging and seeds; `args.mixed_precision` becomes what accelerate resolved it to."""
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(project_dir=args.output_dir, logging_dir=os.path.join(args.output_dir, "logs")),
        # each weight is used once in a forward: a cache of its copies in half precision would cost memory for nothing;
        # and processes wait for one that reads a large dataset or pushes
        kwargs_handlers=[AutocastKwargs(cache_enabled=False), InitProcessGroupKwargs(timeout=datetime.timedelta(hours=12))],
    )
    args.mixed_precision = accelerator.mixed_precision
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    if not accelerator.is_main_process:
        transformers.utils.logging.set_verbosity_error()
    set_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    return accelerator


def repeated_blocks(transformer):
    """The blocks that most of `transformer` consists of, in the order of the model."""
    return [m for m in transformer.modules() if type(m).__name__ in transformer._repeated_blocks]


def save_memory_and_time(transformer, args):
    """What the flags of gradient checkpointing, attention and compilation ask for."""
    blocks = repeated_blocks(transformer)
    recomputed = set(blocks[: math.ceil(args.checkpointed_blocks * len(blocks))])

    def run(block, *inputs):
        return checkpoint(block, *inputs, use_reentrant=False) if block in recomputed else block(*inputs)

    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing(run)
    if args.attention_backend:
        transformer.set_attention_backend(args.attention_backend)
    if args.compile_blocks:
        torch._dynamo.config.recompile_limit = 64  # lengths of contexts and sizes of images, each with and without gradient
        transformer.compile_repeated_blocks()


def load_for_training(family, args, quantization_config=None):
    """The pipeline with the transformer, not yet trainable, and, where there is validation, the VAE; no encoders."""
    pipeline = family.from_pretrained(
        args.pretrained_model_name_or_path,
        text_encoder=None,
        tokenizer=None,
        revision=args.revision,
        variant=args.variant,
        dtype=weight_dtype_of(args),
        quantization_config=quantization_config,
    )
    if not args.validation_steps:
        pipeline.vae = None  # it was needed for its scale factor alone
    pipeline.set_progress_bar_config(disable=True)
    pipeline.transformer.requires_grad_(False)  # the VAE decodes without gradients
    return pipeline


def place_for_training(pipeline, args, accelerator):
    """Moves the pipeline to the accelerator and makes it compute as the flags say."""
    moved = pipeline.vae if accelerator.is_fsdp2 else pipeline  # FSDP moves the transformer in shards; the whole may not fit
    if moved:
        moved.to(accelerator.device)
    if pipeline.vae and args.enable_vae_tiling:
        pipeline.vae.enable_tiling()
    save_memory_and_time(pipeline.transformer, args)
    keep_dtype_of_norms(pipeline.transformer)


def keep_dtype_of_norms(transformer):
    """Makes norms answer in the dtype that they are given, as in inference: CUDA's autocast would give fp32, which attention
    and quantised layers would go on with."""
    for module in transformer.modules():
        if isinstance(module, (torch.nn.LayerNorm, torch.nn.RMSNorm, RMSNorm)):
            module.register_forward_hook(lambda _, inputs, output: output.to(inputs[0].dtype))


def build_without_weights(family, args):
    """The pipeline with the transformer and the VAE of the configs on the meta device, where tensors have shapes alone."""
    base = {"pretrained_model_name_or_path": args.pretrained_model_name_or_path, "revision": args.revision}
    parts = {"transformer": family.transformer_class, "vae": family.vae_class}
    with torch.device("meta"):
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


def make_adamw(parameters, args, optimizer_class=functools.partial(torch.optim.AdamW, fused=True)):
    """AdamW, with 8-bit states on request."""
    if args.use_8bit_adam:
        import bitsandbytes

        optimizer_class = bitsandbytes.optim.AdamW8bit
    return optimizer_class(
        parameters,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )


def make_full_optimizer(parameters, args):
    """AdamW, Adafactor, or torchao's 8-bit AdamW that rounds bf16 weights stochastically."""
    if args.optimizer == "adafactor":
        fixed_rate = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
        return Adafactor(parameters, lr=args.learning_rate, weight_decay=args.adam_weight_decay, **fixed_rate)
    if not args.stochastic_rounding:
        return make_adamw(parameters, args)
    from torchao.optim import AdamW8bit

    return make_adamw(parameters, args, functools.partial(AdamW8bit, bf16_stochastic_round=True))


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
    return get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of `held` and of all tensors made within, while they live; on the meta device nothing is computed."""

    def __init__(self, held):
        super().__init__()
        self.sizes, self.bytes, self.peak = {}, 0, 0
        for tensor in held:
            self.count(tensor)
        self.held = self.bytes

    def count(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self.free, storage._cdata)

    def free(self, key):
        self.bytes -= self.sizes.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, tree_leaves(result)):
            self.count(tensor)
        return result


def fused_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Attention without a matrix of scores, as GPUs compute it; on the meta device PyTorch would make that matrix."""
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def optimizer_bytes(parameter, args):
    """Bytes of the optimiser's states of one parameter."""
    shape, count = parameter.shape, parameter.numel()
    if args.optimizer == "adafactor":
        return 4 * (count // shape[-1] + count // shape[-2] if len(shape) > 1 else count)
    blocks = 2 * (count + 4 * math.ceil(count / 256))  # 8 bits each, and a scale in fp32 for every 256
    if args.stochastic_rounding:  # torchao keeps what does not fill whole blocks in the dtype of the weights
        return blocks if count >= 4096 and count % 256 == 0 else 2 * 2 * count
    if args.use_8bit_adam:
        return blocks if count >= 4096 else 2 * 4 * count
    return 2 * 4 * count


def held_bytes(parameters, args):
    """Bytes on the accelerator of what full fine-tuning holds between and during steps, besides activations."""
    count, largest = sum(p.numel() for p in parameters), max(p.numel() for p in parameters)
    weight = 2 if args.stochastic_rounding else 4
    compute = 4 if args.mixed_precision == "no" else 2
    on_accelerator = 0 < args.ema_decay < 1 and args.ema_device == "accelerator"
    return {
        "weights": weight * count,
        "gradients": weight * (largest if args.fused_backward_pass else count),
        "optimizer": sum(optimizer_bytes(p, args) for p in parameters),
        "teacher": 0 if args.ema_decay == 0 else count * (4 if on_accelerator else compute),
    }


def estimate_full_memory(pipeline, batch, args, accelerator):
    """Peak bytes on the accelerator during training: those of `held_bytes` and of the `activations`. States of a step are run
    on the meta device: nothing is allocated.

    Args:
        pipeline: see `build_without_weights`.
        batch: of tensors on the meta device; see `make_batch`.
    """
    transformer = pipeline.transformer.requires_grad_(True)
    parameters = list(transformer.parameters())
    save_memory_and_time(transformer, argparse.Namespace(**{**vars(args), "attention_backend": None, "compile_blocks": False}))
    if args.fused_backward_pass:
        fuse_updates(parameters, argparse.Namespace(step=lambda: None))
    teacher = argparse.Namespace(network=lambda: contextlib.nullcontext(transformer))
    with (
        unittest.mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", fused_attention),
        PeakMemory(parameters) as memory,
    ):
        batch = *batch, draw_states(args, 0, 0, 1)
        rollouts = (rollout(pipeline, transformer, teacher, batch, args, accelerator) for _ in range(args.gradient_accumulation_steps))
        # the second state, if there is one, meets the gradients of the first
        for _, losses in itertools.islice(itertools.chain.from_iterable(rollouts), 2):
            losses.mean().backward()
    activations = memory.peak - memory.held - sum(p.grad.nbytes for p in parameters if p.grad is not None)
    if not args.stochastic_rounding and args.mixed_precision != "no":
        # autocast's copies of the fp32 weights live until the backward of what they computed
        blocks = repeated_blocks(transformer)
        sizes = [sum(p.nbytes for p in block.parameters()) for block in blocks]
        recomputed = math.ceil(args.checkpointed_blocks * len(blocks)) if args.gradient_checkpointing else 0
        activations += max([0, *sizes[:recomputed]])
        # of a step's only graph, they go as the gradients come
        if args.fused_backward_pass or args.states_per_rollout * args.gradient_accumulation_steps > 1:
            activations += sum(p.nbytes for p in parameters) - sum(sizes[:recomputed])
    return held_bytes(parameters, args) | {"activations": activations}


def peak_memory_gib(device):
    """Peak of the GPU's allocated memory; on the CPU, the process's resident memory."""
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    return peak / 2**30


def resume(accelerator, lr_scheduler, networks, checkpoint):
    """Registers what checkpoints hold and loads `checkpoint`, if there is one. Returns the step to start from."""
    accelerator.register_for_checkpointing(lr_scheduler)
    register_checkpoint_hooks(accelerator, networks)
    if not checkpoint:
        return 0
    accelerator.load_state(str(checkpoint))
    step = json.loads((checkpoint / STATE_NAME).read_text())["step"]
    logger.info(f"Resumed from {checkpoint} at step {step}.")
    return step


def check_finite(losses, grad_norm=0.0):
    """Stops a run that has diverged, before a checkpoint is written."""
    if not all(map(math.isfinite, [*losses, grad_norm])):
        raise InputError(
            f"Loss {losses} or gradient norm {grad_norm} is not finite; the run stops here, checkpoints are kept. Lower "
            "--learning_rate or use --mixed_precision bf16."
        )


def log_steps(pending, started, bar, args, accelerator):
    """Logs the steps since `started`: `pending` holds of each the step, the sums of losses and counts of each state (2, K), the
    gradient norm and the learning rate. A state that was not drawn is left out.

    Between two calls the device waits for no reading, unless each update must be checked before it is made.
    """
    table = torch.stack([torch.cat([states.flatten(), norm.view(1)]) for _, states, norm, _ in pending]).tolist()
    timing = {"seconds_per_step": (time.perf_counter() - started) / len(pending), "peak_memory_gib": peak_memory_gib(accelerator.device)}
    for (step, *_, lr), (*sums_and_counts, grad_norm) in zip(pending, table, strict=True):
        sums, counts = sums_and_counts[: args.rollout_steps], sums_and_counts[args.rollout_steps :]
        # with fp16 the gradient scaler skips a step whose gradient is not finite
        check_finite(sums, grad_norm if accelerator.scaler is None else 0.0)
        loss = sum(sums) / sum(counts)
        states = {f"loss/state_{k + 1}": total / count for k, (total, count) in enumerate(zip(sums, counts)) if count}
        accelerator.log({"loss": loss, **states, "grad_norm": grad_norm, "lr": lr, **timing}, step=step)
        if accelerator.is_main_process:
            with open(Path(args.output_dir) / LOSSES_NAME, "a") as file:
                print(step, loss, sep=",", file=file)
    bar.set_postfix(loss=loss, lr=lr)


def encoding_savings(args):
    """Flags that need less memory than `args` while contexts are encoded."""
    every = {
        "--encoder_quantization int8": args.encoder_quantization,
        "--encoder_quantization nf4": args.encoder_quantization == "nf4",
        "a lower --teacher_max_pixels": args.teacher_context != "vlm",
        "a --context_cache_dir that a larger machine has filled": False,
    }
    return [flag for flag, given in every.items() if not given]


@contextlib.contextmanager
def explain_out_of_memory(savings):
    """Within: running out of the GPU's memory becomes an error that names the first of `savings`, flags that need less."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        first = str(error).split(". ")[0]
        raise InputError(f"{first}. What was written is kept. Cheapest remedies: {', '.join(savings[:3])}.") from error


def train(pipeline, transformer, teacher, optimizer, lr_scheduler, dataset, cache, first_step, publish, args, accelerator):
    """The training loop: validation, rollouts with their backwards, clipping, update, EMA, log, checkpoint."""
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    # FSDP gathers weights in every forward, so all processes must take part in a validation
    validating = args.validation_steps and (accelerator.is_main_process or accelerator.is_fsdp2)
    validate = functools.partial(log_validation, pipeline, teacher, dataset, cache, args, accelerator)
    if validating and first_step == 0:
        validate(0)
    rows = dataset.select_columns(["captions", "bucket", "image_hash", "reference_hashes"])
    layouts, prior_prompts = layouts_of(dataset, args), read_prior_prompts(args)
    processes = accelerator.process_index, accelerator.num_processes
    # FSDP gathers weights in every forward, too: all processes must make the same ones
    drawing = (0, 1) if accelerator.is_fsdp2 else processes
    bar = tqdm(range(first_step, args.max_train_steps), initial=first_step, total=args.max_train_steps, desc="Steps",
               disable=not accelerator.is_local_main_process)  # fmt: skip
    pending, started = [], time.perf_counter()
    for step in bar:
        table = 0.0
        for micro in range(args.gradient_accumulation_steps):
            micro_step = step * args.gradient_accumulation_steps + micro
            draws = draw_batch(layouts, args.train_batch_size, micro_step, *processes, args.seed)
            prior = prior_prompts if (micro_step + 1) % args.prior_every == 0 else []
            batch = make_batch(pipeline, rows, cache, draws, prior, args, accelerator.device)
            batch = *batch, draw_states(args, micro_step, *drawing)
            states = rollout(pipeline, transformer, teacher, batch, args, accelerator)
            synchronize = micro == args.gradient_accumulation_steps - 1
            table += backward_each_state(states, transformer, args, accelerator, synchronize)
        table = accelerator.reduce(table, "sum")
        grad_norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)
        grad_norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        teacher.step()

        done = step + 1
        pending.append((done, table, grad_norm.to(table), lr_scheduler.get_last_lr()[0]))
        last = done == args.max_train_steps
        showing = validating and (done % args.validation_steps == 0 or last)
        saving = done % args.checkpointing_steps == 0 or last
        if not (showing or saving or time.perf_counter() - started > LOGGING_SECONDS):
            continue
        log_steps(pending, started, bar, args, accelerator)
        if showing:
            validate(done)
        if saving:
            save_checkpoint(accelerator, args, done)
            if args.hub_push_checkpoints and not last:
                publish(done)
        pending, started = [], time.perf_counter()


def first_batch(pipeline, dataset, cache, args):
    """The first batch of the training, on the meta device."""
    rows = dataset.select_columns(["captions", "bucket", "image_hash", "reference_hashes"])
    draws = draw_batch(layouts_of(dataset, args), args.train_batch_size, 0, 0, 1, args.seed)
    return make_batch(pipeline, rows, cache, draws, [], args, "meta")


def report_memory(estimate, savings, accelerator):
    """Logs the bytes of an estimate, and warns with the first of `savings` if the GPU is too small for it."""
    total, shares = sum(estimate.values()), ", ".join(f"{name} {size / 2**30:.2f}" for name, size in estimate.items())
    logger.info(f"Peak memory by calculation: {total / 2**30:.2f} GiB ({shares}).")
    if accelerator.device.type == "cuda" and total > torch.cuda.get_device_properties(accelerator.device).total_memory:
        logger.warning(f"That is more than this GPU has. Cheapest remedies: {', '.join(savings[:3])}.")


def full_savings(args):
    """Flags that need less memory than `args`, those first that cost the least time and quality."""
    fused = "--fused_backward_pass --max_grad_norm 0" + (" --states_per_rollout 1" if args.states_per_rollout > 1 else "")
    every = {
        "--gradient_checkpointing": args.gradient_checkpointing,
        "--checkpointed_blocks 1.0": args.checkpointed_blocks == 1,
        "--stochastic_rounding": args.stochastic_rounding,
        "--ema_device cpu": args.ema_device == "cpu" or args.ema_decay in (0.0, 1.0),
        fused: args.fused_backward_pass,
        "--enable_vae_tiling": args.enable_vae_tiling or not args.validation_steps,
        "--train_batch_size 1 with --gradient_accumulation_steps": args.train_batch_size == 1,
        "--ema_decay 1.0": args.ema_decay == 1.0,
        "a lower --resolution": False,
    }
    return [flag for flag, given in every.items() if not given]


def check_full_inputs(args, accelerator):
    """What is wrong with full fine-tuning on this machine; see `check_inputs` for the rest.

    Raises:
        ValueError: with one sentence that names the flag.
    """
    if args.stochastic_rounding and not is_torchao_available():
        raise ValueError("--stochastic_rounding needs torchao: pip install torchao.")
    if args.stochastic_rounding and args.mixed_precision != "bf16":
        raise ValueError("--stochastic_rounding holds the weights in bf16: give --mixed_precision bf16.")
    if args.fused_backward_pass and args.mixed_precision == "fp16":
        raise ValueError("--fused_backward_pass cannot unscale the gradients of fp16: give --mixed_precision bf16.")
    if args.fused_backward_pass and accelerator.num_processes > 1:
        raise ValueError("--fused_backward_pass runs in one process; leave it out, or launch with --num_processes 1.")
    if args.stochastic_rounding and accelerator.is_fsdp2:
        raise ValueError("--stochastic_rounding does not go with FSDP, which holds the weights in fp32; leave it out.")
    if args.ema_device == "cpu" and accelerator.is_fsdp2:
        raise ValueError("--ema_device cpu does not go with FSDP, which shards the average; use --ema_device accelerator.")
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("FSDP version 1 is not supported; set fsdp_version: 2 in the accelerate config.")


def main(args):
    accelerator = make_accelerator(args)
    try:
        with accelerator.main_process_first():
            check_full_inputs(args, accelerator)
            family, dataset, checkpoint, pairs = check_inputs(args)
    except (ValueError, OSError) as error:
        raise InputError(error) from error
    cache = ContextCache(args)
    with explain_out_of_memory(encoding_savings(args)):
        encode_contexts(family, args, cache, dataset, pairs, accelerator)
    if accelerator.num_processes == 1:  # FSDP shares the weights out
        planned = build_without_weights(family, args)
        estimate = estimate_full_memory(planned, first_batch(planned, dataset, cache, args), args, accelerator)
        report_memory(estimate, full_savings(args), accelerator)

    pipeline = load_for_training(family, args)
    place_for_training(pipeline, args, accelerator)
    teacher = FullTeacher(pipeline.transformer, args, accelerator)
    make_trainable(pipeline, args)
    optimizer = make_full_optimizer(list(pipeline.transformer.parameters()), args)
    lr_scheduler = make_lr_scheduler(optimizer, args)
    if args.fused_backward_pass:
        fuse_updates(pipeline.transformer.parameters(), optimizer)
    transformer, optimizer = accelerator.prepare(pipeline.transformer, optimizer)
    pipeline.transformer = accelerator.unwrap_model(transformer)
    networks = {"transformer": pipeline.transformer.state_dict(), **({"teacher": teacher.shadow} if teacher.shadow else {})}
    register_full_hooks(accelerator, pipeline.transformer, teacher, networks)
    first_step = resume(accelerator, lr_scheduler, networks, checkpoint)
    teacher.refresh()

    if accelerator.is_main_process:
        accelerator.init_trackers("dopsd", config={k: str(v) for k, v in settings_of(args).items()})
    publish = functools.partial(publish_pipeline, pipeline.transformer, family, gallery(dataset, args), args, accelerator)
    with explain_out_of_memory(full_savings(args)):
        train(pipeline, transformer, teacher, optimizer, lr_scheduler, dataset, cache, first_step, publish, args, accelerator)
    publish(args.max_train_steps)
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main(parse_args())
    except InputError as error:
        sys.exit(f"error: {error}")
