"""Memory and time of training on this machine's GPU, beside what memory.py calculates.

    python examples/benchmarks/on_gpu.py                                   # all that fits the card; a stopped run goes on
    python examples/benchmarks/on_gpu.py --models z_image_turbo --recipes '*_24gb' '*_16gb'
    python examples/benchmarks/on_gpu.py --tiny --output tiny.md           # tiny models and K = 2: tries the command in some minutes

Nothing is downloaded: weights are random, of the sizes that memory.py knows, and lie in a temporary folder
(--work_dir, by default beside the table) while they are needed: two bytes for each parameter, 18 GB for
FLUX.2-klein-9B, 26 for Krea-2-Turbo. The scripts' own code loads, quantises, encodes and trains them, so what it needs
of the computer's memory is needed here, too. Each figure is of a fresh process. The cases are the recipes of
examples/recipes that fit by calculation, on a larger card with the memory of the card that they are for, and settings
of full fine-tuning that fit the card.

GiB of `allocated` is PyTorch's peak in steps that train as many states as the script's default, to compare with
`calculated`; of `loading` that before the first step. `reserved` is what PyTorch took from the card; `card` adds what
CUDA itself has, and other programs: close them. Seconds are medians: of a step that trains all K states, of one that
trains 1 (mean over the states it may be), of one of SFT. What the teacher on the CPU does every --ema_refresh_steps
steps is not in them.

Encoding is that of --teacher_context vlm, batches of 4: tokens, text encoder, VLM, contexts to the CPU; not the
loading, not the reading of pictures, which goes on ahead, and no file of the cache. The tokenizer stands in for the
real one, with one token for each byte.
"""

import argparse
import concurrent.futures
import contextlib
import copy
import dataclasses
import fnmatch
import functools
import importlib.metadata
import inspect
import io
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import traceback
import typing
import unittest.mock
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train_dopsd_lora as lora  # first: it silences what libraries say while they are imported


# isort: split
import diffusers
import memory
import step_cost
import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler
from huggingface_hub import split_torch_state_dict_into_shards
from PIL import Image
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel, Qwen2Tokenizer, Qwen3Model, Qwen3VLConfig, Qwen3VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import train_dopsd_full as full


PACKAGES = ["torch", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes", "torchao"]
OUT_OF_MEMORY = "out of memory"
SHARD = "2GB"
# heading of the table, part and name of a figure
COLUMNS = [
    ("calculated", "training", "calculated"), ("allocated", "training", "allocated"), ("reserved", "training", "reserved"),
    ("card", "training", "card"), ("loading", "training", "loading"),
    ("all K, s", "training", "step"), ("1 of K, s", "training", "one"), ("SFT, s", "training", "sft"),
    ("encoders: weights, calculated", "encoding", "calculated"), ("encoders: allocated", "encoding", "allocated"),
    ("encoders: card", "encoding", "card"), ("encoding of an image, s", "encoding", "seconds"),
]  # fmt: skip
# of --tiny, for whatever of these a transformer has; and for language model and vision part of an encoder
TINY = {
    "dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 64, "num_layers": 1,
    "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "joint_attention_dim": 192,
    "intermediate_size": 64, "text_hidden_dim": 64, "text_num_attention_heads": 2, "text_num_key_value_heads": 2, "text_intermediate_size": 64,
}  # fmt: skip
TINY_TEXT = {
    "vocab_size": 512,
    "hidden_size": 64,
    "head_dim": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
}
TINY_VISION = {
    "depth": 3,
    "deepstack_visual_indexes": [0, 1, 2],
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 64,
    "out_hidden_size": 64,
}
TINY_SIDE = 64
CAPTION = "a" * 100  # with the chat, about memory.TEXT_TOKENS
SPECIAL_TOKENS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string -%}{{ message.content }}{%- else -%}{%- for part in message.content -%}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' if part.type == 'image' else part.text }}{%- endfor -%}{%- endif -%}"
    "{{ '<|im_end|>\\n' }}{%- endfor -%}{{ '<|im_start|>assistant\\n' }}"
)


@dataclasses.dataclass
class Case:
    """A recipe, or a setting of full fine-tuning, of a `model` of memory.py on a card of `gib`."""

    name: str
    model: str
    args: argparse.Namespace
    gib: float

    @property
    def is_lora(self):
        return hasattr(self.args, "rank")


# ----------------------------------------------------------------------------------------------------- a base on the disk
def sizes(tiny):
    """Within: the models of memory.py, all of them tiny if that is asked for."""
    if not tiny:
        return contextlib.nullcontext()

    models = {}
    for name, (title, family, config, *rest) in memory.MODELS.items():
        own = {n: p.default for n, p in inspect.signature(family.transformer_class.__init__).parameters.items()}
        # of heads of 16 in place of 128
        axes = {n: [size // 8 for size in own[n]] for n in own if n.startswith("axes_dims")}
        models[name] = title, family, config | {n: TINY[n] for n in own if n in TINY} | axes, *rest
    encoders = {
        name: (text | TINY_TEXT, vision | TINY_VISION, output)
        for name, (text, vision, output) in memory.ENCODERS.items()
    }
    return unittest.mock.patch.multiple(memory, MODELS=models, ENCODERS=encoders)


def save_random(model, folder, only=""):
    """Writes config and random bf16 weights of a `model` on the meta device, those with `only` in their name, as
    `save_pretrained` would. They are made one by one on the GPU and written 2 GB at a time: nothing ever holds all of
    them."""
    ours = isinstance(model, PreTrainedModel)
    (model.config.save_pretrained if ours else model.save_config)(folder)
    pattern = f"{'model' if ours else 'diffusion_pytorch_model'}{{suffix}}.safetensors"
    shapes = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items() if only in name}
    shards = split_torch_state_dict_into_shards(shapes, filename_pattern=pattern, max_shard_size=SHARD)
    needed, free = sum(tensor.nbytes for tensor in shapes.values()), shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{folder} needs {needed / 2**30:.0f} GiB and has {free / 2**30:.0f}; give a --work_dir with more"
        )

    def weight(name):
        shape = shapes[name].shape
        options = {"dtype": torch.bfloat16, "device": "cuda" if torch.cuda.is_available() else "cpu"}
        if len(shape) < 2:  # of norms, and biases
            return torch.full(shape, float(name.endswith("weight")), **options).cpu()
        return torch.randn(shape, **options).mul_(math.prod(shape[1:]) ** -0.5).cpu()

    for file, names in shards.filename_to_tensors.items():
        save_file({name: weight(name) for name in names}, Path(folder, file), {"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        Path(folder, pattern.format(suffix="") + ".index.json").write_text(json.dumps(index))


def save_tokenizer(folder):
    """Writes a tokenizer of Qwen's class with a token for each byte; returns it."""
    vocab = {character: i for i, character in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], additional_special_tokens=SPECIAL_TOKENS, model_max_length=8192)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_base(options, part, model, folder):
    """Writes of a base, and of its VLM into folder/vlm, what `part`, encoding or training, loads."""
    _, family, config, vlm = memory.MODELS[model]
    stock = next(c for c in family.__mro__ if c.__module__.startswith("diffusers."))
    kind = typing.get_type_hints(stock.__init__)["text_encoder"]
    kind = Qwen3Model if kind is PreTrainedModel else kind
    names = {"vae": family.vae_class.__name__, "transformer": family.transformer_class.__name__}
    index = {
        name: ["diffusers", value] for name, value in {"scheduler": "FlowMatchEulerDiscreteScheduler", **names}.items()
    }
    index |= {"text_encoder": ["transformers", kind.__name__], "tokenizer": ["transformers", "Qwen2Tokenizer"]}
    Path(folder, "model_index.json").write_text(json.dumps({"_class_name": stock.__name__, **index}))
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(Path(folder, "scheduler"))
    if part == "training":
        with torch.device("meta"):
            transformer = family.transformer_class(**config)
        return save_random(transformer, Path(folder, "transformer"))
    save_tokenizer(Path(folder, "tokenizer"))
    token = save_tokenizer(Path(folder, "vlm")).convert_tokens_to_ids
    text, vision, output = memory.ENCODERS[vlm]
    tokens = {f"{name}_token_id": token(f"<|{word}|>") for name, word in
              {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}.items()}  # fmt: skip
    whole = Qwen3VLConfig(text_config=text, vision_config=vision, **output, **tokens)
    with torch.device("meta"):
        encoder = kind(whole if kind.config_class is Qwen3VLConfig else kind.config_class(**text, **output))
        reader = Qwen3VLModel(whole)
    save_random(encoder, Path(folder, "text_encoder"))
    save_random(reader, Path(folder, "vlm"), only="visual.")  # its language model is the text encoder's
    size = {"shortest_edge": 256 * 256, "longest_edge": 4096 * 4096}
    Qwen2VLImageProcessorPil(patch_size=16, merge_size=2, temporal_patch_size=2, size=size).save_pretrained(
        Path(folder, "vlm")
    )


# ---------------------------------------------------------------------------------------------------------- measurement
def start(case, folder):
    """Arguments of a case with its base in `folder`; PyTorch gets what a smaller card of the case's size would leave
    it: CUDA itself, and other programs, have theirs."""
    if torch.cuda.is_available() and case.gib < math.inf:
        free, total = torch.cuda.mem_get_info()
        if case.gib * 2**30 < total:
            torch.cuda.set_per_process_memory_fraction(max(case.gib * 2**30 - (total - free), 0.0) / total)
    args = copy.copy(case.args)
    args.pretrained_model_name_or_path, args.vlm_model_name_or_path = folder, os.path.join(folder, "vlm")
    return args


def peaks(device):
    """Bytes since the last reset; on the CPU, the process's memory for all of them."""
    if device.type != "cuda":
        return dict.fromkeys(("allocated", "reserved", "card"), lora.peak_memory_gib(device) * 2**30)
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return {
        "allocated": allocated,
        "reserved": reserved,
        "card": reserved + total - free - torch.cuda.memory_reserved(),
    }


class Training(step_cost.Bench):
    """A training as `main` of the script sets it up, with random contexts; its steps are those of step_cost.py."""

    def __init__(self, case, args):
        family, script = memory.MODELS[case.model][1], lora if case.is_lora else full
        self.args, self.accelerator = args, script.make_accelerator(args)
        device, (planned, batch) = self.accelerator.device, memory.planned(case.model, args)
        quantization = lora.quantization_config("transformer", getattr(args, "quantization", None), diffusers)
        # the VAE would be loaded and dropped
        family = argparse.Namespace(from_pretrained=functools.partial(family.from_pretrained, vae=None))
        self.pipeline = script.load_for_training(family, args, quantization)
        transformer = self.pipeline.transformer
        if case.is_lora:
            lora.offload_blocks(lora.offloaded_blocks(transformer, args), device)
        script.place_for_training(self.pipeline, args, self.accelerator)
        if case.is_lora:
            _, self.parameters = lora.add_lora(self.pipeline, lora.find_lora_targets(planned, args), args)
            self.teacher = lora.LoRATeacher(transformer, self.parameters, args.ema_decay)
            optimizer = lora.make_optimizer(self.parameters, args)
        else:
            self.teacher = full.FullTeacher(transformer, args, self.accelerator)
            full.make_trainable(self.pipeline, args)
            self.parameters = list(transformer.parameters())
            optimizer = full.make_full_optimizer(self.parameters, args)
            if args.fused_backward_pass:
                full.fuse_updates(self.parameters, optimizer)
        self.transformer, self.optimizer = self.accelerator.prepare(transformer, optimizer)
        self.noise, *self.contexts = tree_map(lambda t: torch.randn(t.shape, dtype=t.dtype, device=device), batch)


def measure_training(options, case, folder):
    args = start(case, folder)
    bench = Training(case, args)
    device, every, trained = bench.accelerator.device, args.rollout_steps, args.states_per_rollout
    loading = peaks(device)["allocated"]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for states, _ in 2 * step_cost.ends(every, trained):  # the second time with the optimiser's states
        step_cost.work_of(bench, trained, "step", states)()
    found = {"loading": loading, **peaks(device)}
    names = {(every, "step"): "step", (1, "step"): "one", (every, "sft"): "sft"}
    if getattr(args, "fused_backward_pass", False):  # it updates in the only backward of a step
        del names[every, "step"]
    seconds = step_cost.time_variants(bench, list(names), options.repetitions)
    return found | {name: seconds[variant] for variant, name in names.items()}


def measure_encoding(options, case, folder):
    args = start(case, folder)
    accelerator = lora.make_accelerator(args)
    family = memory.MODELS[case.model][1]
    found = {}
    seconds = {False: [], True: []}
    picture = io.BytesIO()
    Image.effect_noise(2 * [args.resolution], 64).save(picture, "JPEG")
    row = {"image": {"path": None, "bytes": picture.getvalue()}, "image_hash": "", "bucket": 2 * [args.resolution]}

    def write(path, context):
        for tensor in context.values():
            tensor.cpu()
        path.touch()

    def timed(*given, encode=lora.encode_batch):
        seconds[given[-1] is not None].append(step_cost.seconds_of(lambda: encode(*given), accelerator.device))
        found.update(peaks(accelerator.device))

    kinds = [teacher for teacher in seconds for _ in range((1 + options.repetitions) * lora.ENCODING_BATCH)]
    missing = [(Path(folder, f"context-{number}"), teacher, 0, CAPTION) for number, teacher in enumerate(kinds)]
    with unittest.mock.patch.object(lora, "encode_batch", timed):
        lora.encode_missing(family, args, argparse.Namespace(folder=folder, write=write), [row], missing, accelerator)
    return found | {
        "seconds": sum(statistics.median(several[1:]) for several in seconds.values()) / lora.ENCODING_BATCH
    }


MEASURES = {"encoding": measure_encoding, "training": measure_training}


def work(function, options, *inputs):
    """What a process does."""
    with sizes(options.tiny):
        return function(options, *inputs)


def in_fresh_process(function, *inputs):
    """What `function` returns in a process of its own, which leaves nothing on the card."""
    quiet = transformers.utils.logging.set_verbosity_error
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), quiet) as pool:
        return pool.submit(function, *inputs).result()


def attempt(part, options, case, folder):
    """Figures of a case; or, in their place, why it ended, since the others can still run."""
    try:
        return in_fresh_process(work, MEASURES[part], options, case, folder)
    except BrokenProcessPool:
        return {"note": "killed, most likely for want of the computer's memory"}
    except Exception as error:  # of any kind: the card may be full in a library
        text = " ".join(str(error).split()).replace("|", "/")
        if OUT_OF_MEMORY in text:
            return {"note": OUT_OF_MEMORY}
        traceback.print_exc()
        return {"note": f"failed: {type(error).__name__}: {text[:200]}"}


# ------------------------------------------------------------------------------------------------------ cases and table
def card_of(options):
    """What the figures are of, in words, and GiB of the card."""
    name, gib, versions = f"CPU, {torch.get_num_threads()} threads", math.inf, []
    if options.device == "cuda":
        properties, driver = torch.cuda.get_device_properties(0), "unknown"
        with contextlib.suppress(OSError):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            driver = subprocess.run(query, capture_output=True, text=True).stdout.partition("\n")[0]
        gib = properties.total_memory / 2**30
        name = f"{properties.name}, {gib:.1f} GiB, driver {driver}, CUDA {torch.version.cuda}"
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    return f"{name}; {', '.join(versions)}{'; tiny models' if options.tiny else ''}", gib


def prepare(options):
    """What the figures are of, those that an earlier run kept, and the cases that are asked for and fit the card by
    calculation.

    Raises:
        ValueError: the earlier run was on another machine, or no case is left.
    """
    (about, gib), kept, results, cases, too_much = card_of(options), Path(f"{options.output}.json"), {}, [], []
    if kept.exists():
        with lora.blamed_on(kept):
            figures = json.loads(kept.read_text("utf-8"))
            results, of = figures["results"], figures["about"]
        if of != about:
            raise ValueError(f"{kept} is of another machine, or of other versions ({of}): give another --output")
    print(about, flush=True)
    for model in options.models:
        paths = sorted(memory.RECIPES.glob(f"{model}_*gb.sh"), reverse=True)
        found = [(path.stem, memory.recipe_args(path), int(re.search(r"(\d+)gb", path.stem)[1])) for path in paths]
        found += [(f"{model}_full {flags}".strip(), memory.parse(flags), gib) for flags in memory.SETTINGS]
        for name, args, size in found:
            if not any(fnmatch.fnmatch(name, pattern) for pattern in options.recipes):
                continue
            vars(args).update(
                validation_steps=0, enable_vae_tiling=False, report_to="none", output_dir=options.work_dir
            )
            if options.tiny:
                vars(args).update(resolution=TINY_SIDE, teacher_max_pixels=TINY_SIDE**2, rollout_steps=2)
            case, earlier = Case(name, model, args, min(size, gib)), {} if options.again else results.get(name, {})
            calculated = earlier.get("calculated") or calculate(case)
            try:
                lora.check_packages(args)
                if not memory.fits(calculated["training"], case.gib):
                    raise ValueError(f"{calculated['training'] / 2**30 + memory.CUDA_GIB:.1f} GiB by calculation")
            except ValueError as error:
                too_much.append(f"{name}: {error}")
                continue
            results.setdefault(name, {}).update(gib=case.gib if case.gib < math.inf else None, calculated=calculated)
            cases.append(case)
    print("\n".join(f"left out: {reason}" for reason in too_much), flush=True)
    if not cases:
        raise ValueError("nothing is left to run: see --models and --recipes")
    return about, results, cases


def calculate(case):
    """Bytes by memory.py; of full fine-tuning that is far too large, only of what is held, which takes no time."""
    pipeline, batch = memory.planned(case.model, case.args)
    if case.is_lora:
        encoders = memory.encoder_bytes(memory.MODELS[case.model][3], case.args.encoder_quantization)
        return {"training": sum(memory.lora_bytes(pipeline, batch, case.args).values()), "encoding": encoders}
    held = sum(memory.held_bytes(list(pipeline.transformer.parameters()), case.args).values())
    return {
        "training": sum(memory.full_bytes(pipeline, batch, case.args).values())
        if memory.fits(held, case.gib)
        else held
    }


def row_of(name, result):
    """A line of the table."""
    cells = [name, f"{result['gib']:.1f}" if result["gib"] else ""]
    for _, part, key in COLUMNS:
        figures = {"calculated": result["calculated"].get(part), **result.get(part, {})}
        value = figures.get(key)
        cell = (
            f"{value:.3g}"
            if key in ("step", "one", "sft", "seconds") and value
            else f"{value / 2**30:.1f}"
            if value
            else "-"
        )
        cells.append(figures.get("note", cell) if key == "allocated" else cell)
    return f"| {' | '.join(cells)} |"


def save(about, results, output):
    """Writes the table, and beside it the figures from which a later run goes on; one that is killed leaves the last
    ones whole."""
    command = shlex.join(["python", "examples/benchmarks/on_gpu.py", *sys.argv[1:]])
    headings = ["recipe or full fine-tuning", "of GiB", *(heading for heading, _, _ in COLUMNS)]
    lines = [
        f"`{command}` ({about}); GiB, seconds (s).",
        "",
        f"| {' | '.join(headings)} |",
        "|---" * len(headings) + "|",
    ]
    lines += [row_of(name, result) for name, result in results.items() if any(part in result for part in MEASURES)]
    figures = json.dumps({"about": about, "results": results}, indent=1)
    for path, text in ((output, "\n".join(lines) + "\n"), (f"{output}.json", figures)):
        Path(f"{path}.tmp").write_text(text, "utf-8")
        os.replace(f"{path}.tmp", path)


def run(options):
    about, results, cases = in_fresh_process(work, prepare, options)
    save(about, results, options.output)  # a folder that cannot be written is found before hours have passed
    for model, part in ((model, part) for model in options.models for part in MEASURES):
        wanted = [case for case in cases if case.model == model and (case.is_lora or part == "training")]
        # a case that failed for another reason than its size may have been mended
        done = {
            n for n, result in results.items() if part in result and result[part].get("note") in (None, OUT_OF_MEMORY)
        }
        wanted = [case for case in wanted if options.again or case.name not in done]
        if not wanted:
            continue
        with tempfile.TemporaryDirectory(prefix="on_gpu_", dir=options.work_dir) as folder:
            in_fresh_process(work, save_base, options, part, model, folder)
            for case in wanted:
                results[case.name][part] = attempt(part, options, case, folder)
                save(about, results, options.output)
                print(row_of(case.name, results[case.name]), flush=True)
    print(f"The table is in {options.output}.")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--models", nargs="+", choices=list(memory.MODELS), default=list(memory.MODELS))
    parser.add_argument(
        "--recipes",
        nargs="+",
        default=["*"],
        help="names in examples/recipes/ without .sh, or of rows; * for any letters",
    )
    parser.add_argument(
        "--repetitions", type=lora.COUNT, default=5, help="of each timing, after one that is not counted"
    )
    parser.add_argument("--output", default="on_gpu.md", help="the table; figures are kept in OUTPUT.json")
    parser.add_argument(
        "--work_dir", help="folder with room for random weights on its disk; by default that of the table"
    )
    parser.add_argument("--again", action="store_true", help="measure rows anew that are finished")
    parser.add_argument("--tiny", action="store_true", help="tiny models, pictures of 64 x 64, K = 2")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu goes with --tiny")
    options = parser.parse_args()
    options.work_dir = options.work_dir or os.path.dirname(os.path.abspath(options.output))
    try:
        if options.device == "cpu" and not options.tiny:
            raise ValueError("--device cpu would take days: give --tiny, too")
        if options.device == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                f"torch {torch.__version__} sees no CUDA card: install its build for your card (pytorch.org), or try --tiny --device cpu"
            )
        if not os.path.isdir(options.work_dir):
            raise ValueError(f"{options.work_dir} is no folder: see --work_dir and --output")
        # for the processes that it starts
        os.environ.update(
            {"HF_HUB_OFFLINE": "1", **({"ACCELERATE_USE_CPU": "true"} if options.device == "cpu" else {})}
        )
        run(options)
    except (ValueError, OSError, BrokenProcessPool) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
