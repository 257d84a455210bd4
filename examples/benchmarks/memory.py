"""Memory that training takes, computed from model configs alone.

    python examples/benchmarks/memory.py          # full fine-tuning: what is held, and the activations of a step
    python examples/benchmarks/memory.py lora     # a LoRA: the peak of each command in examples/recipes/, and which fit this GPU
    python examples/benchmarks/memory.py lora --recipe z_image_turbo_24gb --offloaded_blocks 0.2   # one, with further flags
    python examples/benchmarks/memory.py encoders # weights of text encoder and VLM while contexts are encoded
    python examples/benchmarks/memory.py command train_dopsd_lora.py FLAGS   # a command of yours, or one of train_dopsd_full.py
    python examples/benchmarks/memory.py command --gpu_gib 16 train_dopsd_full.py FLAGS

`--gpu_gib` goes with each and stands for a card of that size in place of this machine's. All but `command` need no
download; they print the tables of docs/full_fine_tuning.md and RESULTS.md. `command` reads the configs of the base, a
folder or a Hub id, and no weights, images or captions.

States of a step, two at most, run on PyTorch's meta device, which computes nothing, while the bytes of living tensors
are counted. Images are taken to be square, captions with their chat to have 124 tokens, rows with --reference_column
one reference, the VLM's image tokens to stand for 32 x 32 pixels each. Left out: the VAE and its validation pictures,
and the encoders, which are gone by then.
"""

import argparse
import contextlib
import copy
import itertools
import math
import os
import re
import shlex
import sys
import unittest.mock
import weakref
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train_dopsd_lora as lora  # first: it silences what libraries say while they are imported


# isort: split
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

import train_dopsd_full as full
from pipeline_dopsd import DOPSDFlux2KleinPipeline, DOPSDKrea2Pipeline, DOPSDZImagePipeline, family_of


RECIPES = Path(__file__).resolve().parents[1] / "recipes"
CUDA_GIB = 1.0  # of CUDA itself and of what its allocator cannot use
TEXT_TOKENS = 124
# bytes of a weight, with its share of the scales
QUANTIZED_BYTES = {"nf4": 0.5 + 4 / 64, "int8": 1.0, "fp8": 1.0}

SETTINGS = [
    "",
    "--use_8bit_adam",
    "--optimizer adafactor",
    "--use_8bit_adam --ema_device cpu",
    "--stochastic_rounding",
    "--stochastic_rounding --ema_device cpu",
    "--stochastic_rounding --ema_device cpu --fused_backward_pass --max_grad_norm 0",
    "--stochastic_rounding --ema_decay 1.0 --fused_backward_pass --max_grad_norm 0",
]

# what the configs of Qwen3-VL-4B-Instruct and -8B-Instruct say of language model, vision part and output matrix
ENCODERS = {
    "Qwen3-VL-4B": (
        {"hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 9728},
        {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "out_hidden_size": 2560, "deepstack_visual_indexes": [5, 11, 17]},
        {"tie_word_embeddings": True},
    ),
    "Qwen3-VL-8B": (
        {"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 12288},
        {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "out_hidden_size": 4096, "deepstack_visual_indexes": [8, 16, 24]},
        {"tie_word_embeddings": False},
    ),
}  # fmt: skip

# name in the recipes -> model, family, what its transformer's config has other than the class's defaults, VLM
MODELS = {
    "z_image_turbo": ("Z-Image-Turbo", DOPSDZImagePipeline, {}, "Qwen3-VL-4B"),
    "flux2_klein_4b": (
        "FLUX.2-klein-4B", DOPSDFlux2KleinPipeline,
        {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680, "guidance_embeds": False},
        "Qwen3-VL-4B",
    ),
    "flux2_klein_9b": (
        "FLUX.2-klein-9B", DOPSDFlux2KleinPipeline,
        {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288, "guidance_embeds": False},
        "Qwen3-VL-8B",
    ),
    "krea_2_turbo": ("Krea-2-Turbo", DOPSDKrea2Pipeline, {}, "Qwen3-VL-4B"),
}  # fmt: skip


# -------------------------------------------------------------------------------------------------------- calculation
class PeakMemory(TorchDispatchMode):
    """Counts the bytes of `held` and of all tensors made within, while they live; on the meta device nothing is
    computed."""

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


# all that a rollout asks of accelerate; the meta device has no autocast
WITHOUT_AUTOCAST = argparse.Namespace(autocast=contextlib.nullcontext)


def run_states(script, pipeline, teacher, batch, args):
    """Forwards and backwards of a step's first two states, if it has so many: the second meets the gradients of the
    first."""
    batch = *batch, script.draw_states(args, range(args.train_batch_size))
    rollouts = (
        script.rollout(pipeline, pipeline.transformer, teacher, batch, args, WITHOUT_AUTOCAST)
        for _ in range(args.gradient_accumulation_steps)
    )
    for _, losses in itertools.islice(itertools.chain.from_iterable(rollouts), 2):
        losses.mean().backward()


def lora_bytes(pipeline, batch, args):
    """Peak bytes on the accelerator during training: of the `weights`, of what belongs to the `lora` (weights,
    teacher, gradients, optimiser) and of the `activations`. Up to two states of a step are run on the meta device:
    nothing is allocated.

    Args:
        pipeline: with its transformer on the meta device; it is given the LoRA.
        batch: of tensors on the meta device; see `train_dopsd_lora.make_batch`.
    """
    transformer, targets = pipeline.transformer, lora.find_lora_targets(pipeline, args)
    frozen = list(transformer.parameters())
    lora.save_memory_and_time(transformer, args)
    _, parameters = lora.add_lora(pipeline, targets, args)
    transformer.to(lora.weight_dtype_of(args))  # autocast would compute so with the LoRA, too
    half = parameters[0].element_size()
    teacher = lora.LoRATeacher(transformer, parameters, args.ema_decay)
    with (
        unittest.mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", fused_attention),
        PeakMemory([*transformer.parameters(), *teacher.shadow]) as memory,
    ):
        run_states(lora, pipeline, teacher, batch, args)
    count = sum(p.numel() for p in parameters)
    bytes_of = QUANTIZED_BYTES.get(args.quantization)
    weights = sum(p.numel() * (bytes_of if bytes_of and p.ndim == 2 else p.element_size()) for p in frozen)
    away = [
        sum(p.nbytes for p in block.parameters() if not p.requires_grad)
        for block in lora.offloaded_blocks(transformer, args)
    ]
    weights -= sum(away) - max(away, default=0)  # one at a time visits
    # a quantised matrix is multiplied in half precision; torchao's stay so until the backward of their block
    unpacked = 0
    if args.quantization == "nf4":
        unpacked = max(p.numel() for p in frozen)
    elif args.quantization:
        blocks = lora.repeated_blocks(transformer)
        unpacked = max(sum(p.numel() for p in block.parameters()) for block in blocks)
    return {
        "weights": int(weights),
        "lora": count * (3 * 4 + {"adamw8bit": 2, "adafactor": 0, "prodigy": 16}.get(args.optimizer, 8)),
        "activations": memory.peak - memory.held - half * count + 2 * unpacked,
    }


def optimizer_bytes(parameter, args):
    """Bytes of the optimiser's states of one parameter."""
    shape, count = parameter.shape, parameter.numel()
    if args.optimizer == "adafactor":
        return 4 * (count // shape[-1] + count // shape[-2] if len(shape) > 1 else count)
    if args.optimizer == "prodigy":
        return 4 * 4 * count
    blocks = 2 * (count + 4 * math.ceil(count / 256))  # 8 bits each, and a scale in fp32 for every 256
    if args.stochastic_rounding:  # torchao keeps what does not fill whole blocks in the dtype of the weights
        return blocks if count >= 4096 and count % 256 == 0 else 2 * 2 * count
    if args.optimizer == "adamw8bit":
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


def full_bytes(pipeline, batch, args):
    """As `lora_bytes`, of full fine-tuning: those of `held_bytes` and of the `activations`."""
    transformer = pipeline.transformer.requires_grad_(True)
    parameters = list(transformer.parameters())
    full.save_memory_and_time(transformer, args)
    if args.fused_backward_pass:
        full.fuse_updates(parameters, argparse.Namespace(step=lambda: None))
    teacher = argparse.Namespace(network=lambda: contextlib.nullcontext(transformer))
    with (
        unittest.mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", fused_attention),
        PeakMemory(parameters) as memory,
    ):
        run_states(full, pipeline, teacher, batch, args)
    activations = memory.peak - memory.held - sum(p.grad.nbytes for p in parameters if p.grad is not None)
    if not args.stochastic_rounding and args.mixed_precision != "no":
        # autocast's copies of the fp32 weights live until the backward of what they computed
        blocks = full.repeated_blocks(transformer)
        sizes = [sum(p.nbytes for p in block.parameters()) for block in blocks]
        recomputed = math.ceil(args.checkpointed_blocks * len(blocks)) if args.gradient_checkpointing else 0
        activations += max([0, *sizes[:recomputed]])
        # of a step's only graph, they go as the gradients come
        if args.fused_backward_pass or args.states_per_rollout * args.gradient_accumulation_steps > 1:
            activations += sum(p.nbytes for p in parameters) - sum(sizes[:recomputed])
    return held_bytes(parameters, args) | {"activations": activations}


def encoder_bytes(name, quantization):
    """Bytes of the weights of text encoder and VLM, which share the language model; its matrices can be quantised, not
    its output's."""
    text, vision, output = ENCODERS[name]
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **output))
    layers = [layer for layer in model.model.language_model.modules() if isinstance(layer, torch.nn.Linear)]
    matrices = sum(layer.weight.numel() for layer in layers)
    rest = sum(p.numel() for p in model.parameters()) - matrices
    return 2 * rest + QUANTIZED_BYTES.get(quantization, 2) * matrices


def lora_savings(args):
    """Flags that need less memory than `args`, those first that cost the least time and quality."""
    every = {
        "--use_8bit_adam": args.optimizer != "adamw",
        "--enable_vae_tiling": args.enable_vae_tiling or not args.validation_steps,
        "--gradient_checkpointing": args.gradient_checkpointing,
        "--checkpointed_blocks 1.0": args.checkpointed_blocks == 1,
        "--train_batch_size 1 with --gradient_accumulation_steps": args.train_batch_size == 1,
        "--quantization int8": args.quantization,
        "--quantization nf4": args.quantization == "nf4",
        "--rank 16": args.rank <= 16,
        "--offloaded_blocks 0.5": args.offloaded_blocks or args.quantization or args.compile_blocks,
        "a lower --resolution": False,
    }
    return [flag for flag, given in every.items() if not given]


def full_savings(args):
    """Flags that need less memory than `args` and go with the rest, those first that cost the least."""
    # of the launcher: memory.py has no accelerator
    sharded, several = os.environ.get("ACCELERATE_USE_FSDP") == "true", int(os.environ.get("WORLD_SIZE", 1)) > 1
    unrounded = sharded or args.optimizer != "adamw" or args.mixed_precision != "bf16"
    unfused = sharded or several or args.gradient_accumulation_steps > 1
    unfused = unfused or args.optimizer == "prodigy" or args.mixed_precision == "fp16"
    fused = f"--fused_backward_pass --max_grad_norm 0{' --states_per_rollout 1' * (args.states_per_rollout > 1)}"
    single = args.train_batch_size == 1 or args.fused_backward_pass
    every = {
        "--gradient_checkpointing": args.gradient_checkpointing,
        "--checkpointed_blocks 1.0": args.checkpointed_blocks == 1,
        "--stochastic_rounding": args.stochastic_rounding or unrounded,
        "--use_8bit_adam": args.stochastic_rounding or args.optimizer != "adamw" or not unrounded,
        "--ema_device cpu": sharded or args.ema_device == "cpu" or args.ema_decay in (0.0, 1.0),
        fused: args.fused_backward_pass or unfused,
        "--enable_vae_tiling": args.enable_vae_tiling or not args.validation_steps,
        "--train_batch_size 1 with --gradient_accumulation_steps": single,
        "--ema_decay 1.0": args.ema_decay == 1.0,
        "a lower --resolution": False,
    }
    return [flag for flag, given in every.items() if not given]


# -------------------------------------------------------------------------------------------------- models and batches
def pipeline_of(family, transformer):
    """The pipeline of a transformer, without what turns prompts and pictures into tensors."""
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    return family(FlowMatchEulerDiscreteScheduler(shift=3.0), transformer=transformer, **parts)


def planned(model, args):
    """Pipeline and batch of one of MODELS for `args`, on the meta device."""
    _, family, config, _ = MODELS[model]
    args.num_inference_steps = family.default_num_inference_steps  # there is no base that names another
    lora.resolve_arguments(family, args)
    with torch.device("meta"):
        transformer = family.transformer_class(**config).to(lora.weight_dtype_of(args)).requires_grad_(False)
    pipeline = pipeline_of(family, transformer)
    return pipeline, batch_of(pipeline, pipeline.config, args)


def planned_from_configs(args):
    """Pipeline and batch of the base that `args` name, a folder or a Hub id, on the meta device."""
    flag, base = "pretrained_model_name_or_path", args.pretrained_model_name_or_path
    lora.check_source(flag, base, args.revision)
    with lora.blamed_on(f"--{flag} {base}"):
        family = family_of(base, args.revision)
    lora.resolve_arguments(family, args)
    pipeline = lora.build_without_weights(family, args)
    return pipeline, batch_of(pipeline, family.load_config(base, revision=args.revision), args)


def batch_of(pipeline, pipeline_config, args):
    """Noise (B, C, h, w), student and teacher contexts of square images; see the top of this file for what is assumed.

    Raises:
        ValueError: the transformer takes no such image or context.
    """
    if args.resolution % (pipeline.vae_scale_factor * 2):
        raise ValueError(
            f"--resolution {args.resolution} must be a multiple of {pipeline.vae_scale_factor * 2} for this model."
        )
    config, side = pipeline.transformer.config, min(args.resolution, math.isqrt(args.teacher_max_pixels or 0)) // 32
    longest = pipeline.max_context_length(config, pipeline_config)
    image_tokens = side**2 if args.teacher_context == "vlm" else 0
    if image_tokens >= longest:
        raise ValueError(
            f"An image has {image_tokens} tokens; the transformer takes contexts of {longest}. Lower --teacher_max_pixels."
        )

    def latents(side):
        return pipeline.initial_noise(side, side, torch.Generator()).to("meta")

    # the transformer is shown references of at most 1024 x 1024 pixels
    seen, row = latents(min(args.resolution, 1024)), [latents(1024)] if args.reference_column else []
    contexts = []
    for tokens, images in (
        (TEXT_TOKENS, row),
        (TEXT_TOKENS + image_tokens, row + [seen] * (args.teacher_context == "edit")),
    ):
        shape = pipeline.context_shape(min(tokens, longest), config, pipeline_config)
        embeds = torch.empty(shape, dtype=lora.weight_dtype_of(args), device="meta")
        context = {"prompt_embeds": embeds, **{f"reference_{i}": image[0] for i, image in enumerate(images)}}
        contexts.append(args.train_batch_size * [context])
    return torch.cat(args.train_batch_size * [latents(args.resolution)]), *contexts


def check_calculable(args):
    """Raises ValueError for flags whose memory cannot be calculated, or that the script refuses for their
    precision."""
    if args.compile_blocks:
        raise ValueError("--compile_blocks: what compiled blocks keep is not known; leave it out.")
    for name in ("quantization", "encoder_quantization", "stochastic_rounding"):
        if getattr(args, name, None) and args.mixed_precision != "bf16":
            raise ValueError(f"--{name} computes in bf16: give --mixed_precision bf16.")


# ------------------------------------------------------------------------------------------------------------- tables
def parse(flags, mixed_precision="bf16"):
    """Arguments of train_dopsd_full.py for a string of flags."""
    needed = f"--pretrained_model_name_or_path base --instance_data_dir data --output_dir out --mixed_precision {mixed_precision}"
    return full.parse_args([*needed.split(), "--gradient_checkpointing", *flags.split()])


def recipe_args(path, more=()):
    """Arguments of train_dopsd_lora.py in a recipe, with `more` flags.

    Raises:
        ValueError: with `more` the command is of another base.
    """
    command = shlex.split(
        path.read_text().split('train_dopsd_lora.py"', 1)[1].replace("\\\n", " ").replace('"$@"', "")
    )
    args = lora.parse_args([*command, *more])
    if (args.pretrained_model_name_or_path, args.revision) != (command[1], None):
        raise ValueError("a recipe is of its own base: give another with `memory.py command`")
    check_calculable(args)
    return args


def fits(size, gpu_gib):
    """Whether so many bytes leave a card of `gpu_gib` the memory that CUDA itself takes."""
    return size / 2**30 + CUDA_GIB <= gpu_gib


def print_choices(choices, gpu_gib):
    """Prints for each model the first of its (what, bytes) that fits the card, if there is a card."""
    for model, sizes in choices.items() if gpu_gib else ():
        chosen = next((what for what, size in sizes if fits(size, gpu_gib)), "none of these")
        print(f"For {model} on {gpu_gib:.1f} GiB: {chosen}")


def print_encoders(options):
    print("| encoder, GiB | bf16 | `--encoder_quantization int8` | `--encoder_quantization nf4` |\n|---|---|---|---|")
    choices = {
        name: [(kind or "bf16", encoder_bytes(name, kind)) for kind in (None, "int8", "nf4")] for name in ENCODERS
    }
    for name, sizes in choices.items():
        print(f"| {name} | {' | '.join(f'{size / 2**30:.1f}' for _, size in sizes)} |")
    print_choices(choices, options.gpu_gib)


def print_lora(options, more):
    choices, paths = {}, RECIPES.glob(f"{options.recipe}.sh")
    paths = sorted(paths, key=lambda p: (re.sub(r"_\d+gb", "", p.stem), -int(re.search(r"(\d+)gb", p.stem)[1])))
    if not paths:
        raise ValueError(
            f"--recipe {options.recipe} is none of {', '.join(sorted(path.stem for path in RECIPES.glob('*.sh')))}."
        )
    print("| recipe | flags | weights | LoRA | activations | peak, GiB |\n|---|---|---|---|---|---|")
    for path in paths:
        args, model = recipe_args(path, more), re.sub(r"_\d+gb", "", path.stem)
        estimate = lora_bytes(*planned(model, args), args)
        flags = path.read_text().split("--resolution 1024 ")[1].replace("\\\n", "").replace('"$@"', " ".join(more))
        peak = sum(estimate.values())
        cells = [f"{size / 2**30:.1f}" for size in (*estimate.values(), peak)]
        print(f"| {path.name} | `{' '.join(flags.split())}` | {' | '.join(cells)} |", flush=True)
        choices.setdefault(MODELS[model][0], []).append((path.name, peak))
    print_choices(choices, options.gpu_gib)


def print_full(options):
    """GiB of the models are those of what is held and, after the plus, the activations at 1024 x 1024."""
    models = {MODELS[model][0]: planned(model, parse("")) for model in MODELS}
    counts = {
        name: sum(p.numel() for p in pipeline.transformer.parameters()) for name, (pipeline, _) in models.items()
    }
    names = [f"{name} ({count / 1e9:.2f} B), GiB" for name, count in counts.items()]
    print("| flags | weights | gradients | optimiser | teacher | bytes per parameter |", " | ".join(names), "|")
    print("|---|" + "---|" * (5 + len(names)))
    choices = {name: [] for name in models}
    for flags in SETTINGS:
        args, cells = parse(flags), []
        for name, (pipeline, batch) in models.items():
            estimate, count = full_bytes(copy.deepcopy(pipeline), batch, args), counts[name]
            choices[name].append((flags or "no further flags", sum(estimate.values())))
            activations = estimate.pop("activations")
            cells = cells or [f"{size / count:.1f}" for size in (*estimate.values(), sum(estimate.values()))]
            average = 4 * count / 2**30  # in fp32
            host = f", {average:.0f} on the CPU" if args.ema_device == "cpu" and 0 < args.ema_decay < 1 else ""
            cells.append(f"{sum(estimate.values()) / 2**30:.1f} + {activations / 2**30:.1f}{host}")
        print(f"| {f'`{flags}`' if flags else ''} | {' | '.join(cells)} |", flush=True)
    print_choices(choices, options.gpu_gib)


def print_command(options, words):
    """Peak of a command line of either script, by kind."""
    scripts = {"train_dopsd_lora.py": (lora, lora_bytes), "train_dopsd_full.py": (full, full_bytes)}
    if not words or Path(words[0]).name not in scripts:
        raise ValueError(f"after `command`, give {' or '.join(scripts)} and its flags.")
    script, bytes_of = scripts[Path(words[0]).name]
    args = script.parse_args(words[1:])
    args.mixed_precision = args.mixed_precision or "no"
    check_calculable(args)
    estimate = bytes_of(*planned_from_configs(args), args)
    peak = sum(estimate.values())
    print(f"| {' | '.join(estimate)} | peak, GiB |\n|{'---|' * (len(estimate) + 1)}")
    print(f"| {' | '.join(f'{size / 2**30:.2f}' for size in (*estimate.values(), peak))} |")
    print(f"{args.resolution} x {args.resolution}, batch {args.train_batch_size}, mixed precision {args.mixed_precision}; captions of "
          f"{TEXT_TOKENS} tokens{', a reference of 1024 x 1024' if args.reference_column else ''}; without the VAE, its validation pictures "
          "and the encoders.")  # fmt: skip
    print(f"With {CUDA_GIB:.1f} GiB for CUDA itself: {peak / 2**30 + CUDA_GIB:.1f} GiB.")
    if options.gpu_gib and fits(peak, options.gpu_gib):
        print(f"It fits {options.gpu_gib:.1f} GiB.")
    elif options.gpu_gib:
        savings = lora_savings(args) if script is lora else full_savings(args)
        print(f"It does not fit {options.gpu_gib:.1f} GiB. Cheapest remedies: {', '.join(savings[:3])}.")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("what", nargs="?", choices=["full", "lora", "encoders", "command"], default="full")
    parser.add_argument(
        "--gpu_gib", type=float, help="memory of the card; by default that of the first GPU, if there is one"
    )
    parser.add_argument("--recipe", help="lora: name of a file in examples/recipes/ without .sh, * for any letters")
    options, more = parser.parse_known_args()
    if more and options.what not in ("lora", "command"):
        parser.error(f"only lora and command take further flags: {' '.join(more)}")
    if options.recipe and options.what != "lora":
        parser.error("--recipe goes with lora alone")
    options.recipe = options.recipe or "*"
    if options.gpu_gib is None and torch.cuda.is_available():
        options.gpu_gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    work = {"full": print_full, "encoders": print_encoders, "lora": print_lora, "command": print_command}[options.what]
    try:
        work(options, *([more] if options.what in ("lora", "command") else []))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
