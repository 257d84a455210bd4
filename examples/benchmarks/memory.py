"""Memory that training takes, computed from model configs alone; prints the README's tables.

    python examples/benchmarks/memory.py          # full fine-tuning: what is held, and the activations of a step
    python examples/benchmarks/memory.py lora     # a LoRA: the peak of each command in examples/recipes/, and which fit this GPU
    python examples/benchmarks/memory.py lora --recipe z_image_turbo_24gb --offloaded_blocks 0.2   # one, with further flags
    python examples/benchmarks/memory.py lora --gpu_gib 16                       # which fit a card of that size
    python examples/benchmarks/memory.py encoders # weights of text encoder and VLM while contexts are encoded
"""

import argparse
import copy
import re
import shlex
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import FlowMatchEulerDiscreteScheduler
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train_dopsd_full as full  # noqa: E402
import train_dopsd_lora as lora  # noqa: E402
from pipeline_dopsd import DOPSDFlux2KleinPipeline, DOPSDZImagePipeline  # noqa: E402


RECIPES = Path(__file__).resolve().parents[1] / "recipes"

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


def parse(flags, mixed_precision="bf16"):
    """Arguments of train_dopsd_full.py for a string of flags."""
    needed = f"--pretrained_model_name_or_path base --instance_data_dir data --output_dir out --mixed_precision {mixed_precision}"
    return full.parse_args([*needed.split(), "--gradient_checkpointing", *flags.split()])


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
CUDA_GIB = 1.0  # of CUDA itself and of what its allocator cannot use


# name in the recipes -> model, family, what its transformer's config has other than the class's defaults, latents (C, h, w) at
# 1024 x 1024, tokens and width of the student's and the teacher's context
MODELS = {
    "z_image_turbo": ("Z-Image-Turbo", DOPSDZImagePipeline, {}, (16, 128, 128), (124, 700), 2560),
    "flux2_klein_4b": (
        "FLUX.2-klein-4B", DOPSDFlux2KleinPipeline,
        {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680, "guidance_embeds": False},
        (128, 64, 64), (512, 512), 7680,
    ),
}  # fmt: skip


def without_weights(model, batch_size):
    """Name, pipeline and batch of one of MODELS, with tensors on the meta device."""
    name, family, config, latents, tokens, width = MODELS[model]
    with torch.device("meta"):
        transformer = family.transformer_class(**config).to(torch.bfloat16).requires_grad_(False)
        noise = torch.empty(batch_size, *latents)
        contexts = [[{"prompt_embeds": torch.empty(n, width, dtype=torch.bfloat16)} for _ in noise] for n in tokens]
    return name, pipeline_of(family, transformer), (noise, *contexts)


def pipeline_of(family, transformer):
    """The pipeline of a transformer, without what turns prompts and pictures into tensors."""
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    return family(FlowMatchEulerDiscreteScheduler(shift=3.0), transformer=transformer, **parts)


def recipe_args(path, more=()):
    """Arguments of train_dopsd_lora.py in a recipe, with `more` flags."""
    command = path.read_text().split('train_dopsd_lora.py"', 1)[1].replace("\\\n", " ").replace('"$@"', "")
    return lora.parse_args([*shlex.split(command), *more])


def lora_bytes(pipeline, batch, args):
    """Peak bytes by kind, see `train_dopsd_lora.estimate_memory`."""
    return lora.estimate_memory(pipeline, lora.find_lora_targets(pipeline, args), batch, args, Accelerator())


def encoder_bytes(name, quantization):
    """Bytes of the weights of text encoder and VLM, which share the language model; its matrices can be quantised, not its output's."""
    text, vision, output = ENCODERS[name]
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **output))
    layers = [layer for layer in model.model.language_model.modules() if isinstance(layer, torch.nn.Linear)]
    matrices = sum(layer.weight.numel() for layer in layers)
    rest = sum(p.numel() for p in model.parameters()) - matrices
    return 2 * rest + lora.QUANTIZED_BYTES.get(quantization, 2) * matrices


def print_encoders():
    print("| encoder, GiB | bf16 | `--encoder_quantization int8` | `--encoder_quantization nf4` |\n|---|---|---|---|")
    for name in ENCODERS:
        cells = [f"{encoder_bytes(name, quantization) / 2**30:.1f}" for quantization in (None, "int8", "nf4")]
        print(f"| {name} | {' | '.join(cells)} |")


def print_lora(options, more):
    fitting = {}
    print("| recipe | flags | weights | LoRA | activations | peak, GiB |\n|---|---|---|---|---|---|")
    for path in sorted(
        RECIPES.glob(f"{options.recipe}.sh"), key=lambda p: (re.sub(r"_\d+gb", "", p.stem), -int(re.search(r"(\d+)gb", p.stem)[1]))
    ):
        args = recipe_args(path, more)
        name, *planned = without_weights(re.sub(r"_\d+gb", "", path.stem), args.train_batch_size)
        estimate = lora_bytes(*planned, args)
        flags = path.read_text().split("--resolution 1024 ")[1].replace("\\\n", "").replace('"$@"', " ".join(more))
        cells = [f"{size / 2**30:.1f}" for size in (*estimate.values(), sum(estimate.values()))]
        print(f"| {path.name} | `{' '.join(flags.split())}` | {' | '.join(cells)} |", flush=True)
        fits = options.gpu_gib and sum(estimate.values()) / 2**30 + CUDA_GIB <= options.gpu_gib
        fitting[name] = fitting.get(name) or (path.name if fits else None)
    if options.gpu_gib:
        for name, recipe in fitting.items():
            print(f"For {name} on {options.gpu_gib:.1f} GiB: {recipe or 'none of these'}")


def print_full():
    """GiB of the models are those of what is held and, after the plus, the activations at 1024 x 1024."""
    planned = [without_weights(model, 1) for model in MODELS]
    counts = [sum(p.numel() for p in pipeline.transformer.parameters()) for _, pipeline, _ in planned]
    names = [f"{name} ({count / 1e9:.2f} B), GiB" for (name, *_), count in zip(planned, counts)]
    print("| flags | weights | gradients | optimiser | teacher | bytes per parameter |", " | ".join(names), "|")
    print("|---|" + "---|" * (5 + len(names)))
    for flags in SETTINGS:
        args, cells = parse(flags), []
        for (_, pipeline, batch), count in zip(planned, counts):
            estimate = full.estimate_full_memory(copy.deepcopy(pipeline), batch, args, Accelerator())
            activations = estimate.pop("activations")
            cells = cells or [f"{size / count:.1f}" for size in (*estimate.values(), sum(estimate.values()))]
            average = 4 * count / 2**30  # in fp32
            host = f", {average:.0f} on the CPU" if args.ema_device == "cpu" and 0 < args.ema_decay < 1 else ""
            cells.append(f"{sum(estimate.values()) / 2**30:.1f} + {activations / 2**30:.1f}{host}")
        print(f"| {f'`{flags}`' if flags else ''} | {' | '.join(cells)} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["full", "lora", "encoders"], default="full")
    parser.add_argument("--gpu_gib", type=float, help="memory of the card; by default that of the first GPU, if there is one")
    parser.add_argument("--recipe", default="*", help="name of a file in examples/recipes/ without .sh")
    options, more = parser.parse_known_args()
    if more and options.what != "lora":
        parser.error(f"only lora takes further flags: {' '.join(more)}")
    if options.gpu_gib is None and torch.cuda.is_available():
        options.gpu_gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    work = {"full": print_full, "lora": lambda: print_lora(options, more), "encoders": print_encoders}
    work[options.what]()


if __name__ == "__main__":
    main()
