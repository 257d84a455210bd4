"""Converts a LoRA to the form that diffusers and ComfyUI load at equal strength, which is what train_dopsd_lora.py
writes.

    python examples/convert_lora.py --pretrained_model_name_or_path Tongyi-MAI/Z-Image-Turbo \\
        --lora old.safetensors --output_dir my_converted_lora

Understood are PEFT's raw keys (`base_model.model.LAYER.lora_A.weight`, also with an adapter's name in them), whose
alpha stands in the file's header, as diffusers writes it, or in adapter_config.json beside the file, or is given with
--lora_alpha, and kohya's keys (`lora_unet_LAYER.lora_down.weight`, `.alpha`). Anything else is refused: a key that is
dropped in silence is a layer that is lost.
"""

import argparse
import json
import math
import os
import re
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# first: it silences what libraries say while they are imported
from train_dopsd_lora import apply_umask, blamed_on, check_source


# isort: split
import torch
from accelerate import init_empty_weights
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import safe_open
from safetensors.torch import load_file

from pipeline_dopsd import LORA_WEIGHT_NAME, family_of


PEFT = re.compile(
    r"(?:base_model\.model\.|transformer\.|diffusion_model\.)*(?P<layer>.+)\.(?P<part>lora_[AB])(?:\.[\w-]+)?\.weight"
)
KOHYA = re.compile(r"lora_(?:unet|transformer)_(?P<layer>\w+)\.(?P<part>lora_down|lora_up|alpha)(?:\.weight)?")
PARTS = {"lora_A": "A", "lora_B": "B", "lora_down": "A", "lora_up": "B", "alpha": "alpha"}


def linear_shapes(family, base):
    """Layer -> (out features, in features) of the base's transformer, which is built without weights."""
    with init_empty_weights():
        transformer = family.transformer_class.from_config(
            family.transformer_class.load_config(base, subfolder="transformer")
        )
    return {n: tuple(m.weight.shape) for n, m in transformer.named_modules() if hasattr(m, "in_features")}


def read_layers(tensors, names, kohya):
    """Layer -> {"A": ..., "B": ..., "alpha": ...} of the tensors of a file; `names` are the layers of the base.

    Raises:
        ValueError: a key that is not understood, or that stands for what another key has given.
    """
    known = {name.replace(".", "_") if kohya else name: name for name in names}
    layers = {}
    for key, tensor in tensors.items():
        found = (KOHYA if kohya else PEFT).fullmatch(key)
        if not found or found["layer"] not in known:
            raise ValueError(
                f"{key} is not understood: no LoRA weight of a layer of this base with PEFT's or kohya's keys."
            )
        parts, part = layers.setdefault(known[found["layer"]], {}), PARTS[found["part"]]
        if part in parts:
            raise ValueError(f"{key} is a second weight for {known[found['layer']]}: the file holds several adapters.")
        parts[part] = tensor
    return layers


def scale_of(parts, kohya, config, alpha):
    """What A times B is multiplied with.

    Raises:
        ValueError: alpha is not known, or no number above 0.
    """
    rank = len(parts["A"])
    if alpha is not None and (kohya or config.get("lora_alpha") is not None):
        raise ValueError("its alpha is known: leave out --lora_alpha.")
    if kohya:
        alpha = parts["alpha"].squeeze().tolist() if "alpha" in parts else rank
    elif alpha is None:
        alpha = config.get("lora_alpha")
    if alpha is None:
        raise ValueError("the file holds no alpha: put adapter_config.json beside it or give --lora_alpha.")
    if not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
        raise ValueError(f"an alpha must be a number above 0, not {alpha}.")
    if kohya:
        return alpha / rank
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def adapter_config(file):
    """What PEFT's config of the adapter says: in the file's header, which diffusers reads, or else beside the file.

    Raises:
        ValueError: it is not understood.
    """
    with safe_open(file, "pt") as opened:
        text = (opened.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY)
    beside = file.parent / "adapter_config.json"
    where = f"{LORA_ADAPTER_METADATA_KEY} in its header" if text else f"{beside.name} beside it"
    with blamed_on(f"--lora {file}: {where} is no JSON object"):
        config = {**json.loads(text or (beside.read_text() if beside.exists() else "{}"))}
    # diffusers puts the component's name before each
    config = {name.removeprefix("transformer."): value for name, value in config.items()}
    for name in ("alpha_pattern", "use_dora"):
        if config.get(name):
            raise ValueError(f"{name} of {where} is not understood.")
    return config


def convert(file, shapes, alpha=None):
    """State dict with the scale folded into lora_B.

    Raises:
        ValueError: the file is not understood or does not fit the base, whose layers have these `shapes`.
    """
    tensors, config = load_file(file), adapter_config(file)
    kohya, result = any(key.startswith("lora_") for key in tensors), {}
    for name, parts in read_layers(tensors, shapes, kohya).items():
        if not parts.keys() >= {"A", "B"}:
            raise ValueError(f"{name} has only {' and '.join(parts)} of A and B.")
        a, b = parts["A"], parts["B"]
        if not all(t.is_floating_point() and t.float().isfinite().all() for t in (a, b)):
            raise ValueError(f"{name} has weights that are no finite numbers.")
        if not a.numel() or a.shape != (len(a), shapes[name][1]) or b.shape != (shapes[name][0], len(a)):
            raise ValueError(f"{name} is {tuple(b.shape)} x {tuple(a.shape)}, the base's layer is {shapes[name]}.")
        scaled = b.float() * scale_of(parts, kohya, config, alpha)
        # fp32 where half precision would round
        exact = all(torch.equal(t.to(b.dtype).float(), t.float()) for t in (a, scaled))
        dtype = b.dtype if exact else torch.float32
        result |= {
            f"{name}.lora_A.weight": a.to(dtype).contiguous(),
            f"{name}.lora_B.weight": scaled.to(dtype).contiguous(),
        }
    if not result:
        raise ValueError("the file holds no weights.")
    return result


def main(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_model_name_or_path", required=True, help="the base that the LoRA was trained on")
    parser.add_argument("--lora", type=Path, required=True, help="the file to convert")
    parser.add_argument(
        "--lora_alpha",
        type=float,
        help="alpha of a file with PEFT's keys, if neither its header nor adapter_config.json says it",
    )
    parser.add_argument("--output_dir", type=Path, required=True, help=f"folder that {LORA_WEIGHT_NAME} is written to")
    args = parser.parse_args(input_args)
    flag, base = "pretrained_model_name_or_path", args.pretrained_model_name_or_path
    written = args.output_dir / LORA_WEIGHT_NAME
    aside = written.with_suffix(".tmp")
    try:
        if written.exists():
            raise ValueError(f"--output_dir {args.output_dir} holds {LORA_WEIGHT_NAME}; choose another folder.")
        if not args.lora.is_file():
            raise ValueError(f"--lora {args.lora}: this is no file.")
        check_source(flag, base)
        with blamed_on(f"--{flag} {base}"):
            family = family_of(base)
            shapes = linear_shapes(family, base)
        with blamed_on(f"--lora {args.lora}"):
            weights = convert(args.lora, shapes, args.lora_alpha)
        with blamed_on(f"--output_dir {args.output_dir} cannot be written to; choose another folder"):
            args.output_dir.mkdir(parents=True, exist_ok=True)
            family.save_lora_weights(args.output_dir, transformer_lora_layers=weights, weight_name=aside.name)
            apply_umask(aside)
            os.replace(aside, written)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    print(f"{len(weights) // 2} layers: {written}")


if __name__ == "__main__":
    main()
