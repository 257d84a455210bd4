#!/usr/bin/env python
"""Says before a training what its teacher can show, after it what was learned and what was kept, and repeats the
paper's protocol.

    python examples/evaluate.py teacher --pretrained_model_name_or_path Tongyi-MAI/Z-Image-Turbo \\
        --instance_data_dir my_images --instance_prompt "a photo of sks dog" --mixed_precision bf16 --output_dir my_lora
    python examples/evaluate.py report --output_dir my_lora --instance_data_dir my_images
    python examples/evaluate.py paper --output_dir my_lora --instance_data_dir my_images --paper_prompts prompts.jsonl

OUTPUT_DIR is that of the training; contexts are shared with it. `report` and `paper` read the flags of the training
from there, except absolute paths, which it does not keep. Each picture is a file in OUTPUT_DIR/evaluation and is not
drawn again with the same models and settings; nor is the judge asked again. The encoders of pictures load once the
text-to-image model has left memory, one after another. torchvision is not needed.
"""

import argparse
import base64
import contextlib
import functools
import hashlib
import html
import io
import itertools
import json
import math
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_dopsd_lora as dopsd  # first: it silences what libraries say while they are imported


# isort: split
import diffusers
import numpy as np
import torch
import transformers
from diffusers.training_utils import free_memory
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from safetensors import safe_open
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

from pipeline_dopsd import LORA_WEIGHT_NAME, MultimodalEncoder


# flags of the training scripts that are honoured here
DATA = [
    "instance_data_dir",
    "dataset_name",
    "dataset_config_name",
    "image_column",
    "caption_column",
    "reference_column",
    "instance_prompt",
]
DATA += ["dataset_num_workers", "skip_broken_images"]
DRAWING = [
    "pretrained_model_name_or_path", "revision", "variant", "encoder_quantization", "quantization", "resolution", "context_cache_dir", "context_dtype",
    "num_inference_steps", "mixed_precision", "allow_tf32", "seed", "output_dir", "enable_vae_tiling",
]  # fmt: skip
WAYS = ["teacher_context", "teacher_image", "teacher_max_pixels", "teacher_prompt_suffix"]
# of the same model, for the first noises of a prompt: where few steps come to the same picture, no few-step ability is
# lost
MANY_STEPS, MANY_NOISES = 30, 2
SURROUNDINGS = [
    "on a beach at sunset",
    "in a snowy forest",
    "in a bright kitchen",
    "on a city street at night",
    "as an oil painting",
]
# what a model must still draw after a training; none is among the built-in prior prompts, which it practises
ORDINARY = """\
a smiling young man with curly hair, studio portrait
an old fisherman mending a net in a harbour
a girl in a yellow raincoat jumping into a puddle
a ballet dancer on a dark stage, one spotlight
three friends laughing at a picnic table
a doctor reading a chart in a hospital corridor
a black cat sitting on a garden wall
a white horse galloping across a meadow
an owl on a branch at night
a family of elephants at a waterhole
a goldfish in a round glass bowl
a green tree frog on a wet leaf
a slice of chocolate cake on a white plate
a wooden board with cheese, grapes and bread
a cup of coffee with latte art, top view
a bowl of fresh strawberries on a blue table
a pizza just out of a stone oven
a red umbrella lying on a wet pavement
a pair of glasses on an open book
an old typewriter with a sheet of paper
a blue ceramic vase with white tulips
a steaming kettle on a gas stove
a mountain bike on a forest trail
a yellow taxi in heavy traffic
a steam train crossing a stone bridge
a sailing boat on a calm lake
a hot air balloon above green hills
a small airport seen from above
a gothic cathedral at noon
a modern glass office tower
a farmhouse kitchen with copper pans
a subway station with an arriving train
a Japanese garden with a red bridge
a desert road leading to distant mountains
a frozen lake under northern lights
a coral reef with many small fish
a volcano erupting at dusk
an orchard in bloom, soft morning light
a city map pinned to a cork board
a neon sign that says "HOTEL"
a handwritten note that reads "back soon"
a charcoal drawing of a sleeping dog
a watercolour of a village by a river
a cartoon of a penguin playing the guitar
a marble statue of a woman holding a lamp
a pop art portrait of a telephone
an old sepia photograph of a train station
two red chairs on either side of a round table
a green cube on the left of a grey sphere
five candles in a row, only one of them lit
a giraffe wearing a striped scarf
a dragon asleep on a pile of books""".split("\n")
# Calibrated on examples/miniature (see its README), where a judge knows what is right; of real models nobody has tried
# them.
WORTH, HOPELESS = 0.5, 0.3
LEARNED, DRIFT, GAP, DETAIL = 0.5, 0.5, 2.0, 0.15
OUTLIER = 4.0


# ---------------------------------------------------------------------------------------------------------- arguments
def add_own_arguments(parser, command):
    """Flags that no training script has."""
    add = parser.add_argument_group("evaluation").add_argument
    add(
        "--image_encoder", default="facebook/dinov2-base", help="Folder or Hub id: pictures are compared in its space."
    )
    add(
        "--image_text_encoder",
        default="google/siglip2-base-patch16-224",
        help="SigLIP or CLIP: does a picture follow its prompt?",
    )
    add("--drawing_batch_size", type=dopsd.COUNT, default=1, help="Pictures drawn at once.")
    add("--encoding_batch_size", type=dopsd.COUNT, default=16, help="Pictures encoded at once.")
    if command != "paper":
        low = 4 if command == "report" else 2
        about = f"Noises of each prompt, the same for all models; at least {low}."
        add("--noise_seeds", type=dopsd.number(int, low=low), default=4, help=about)
        add(
            "--concept_prompts",
            help="Text file of new prompts with the concept, one a line. Default: --instance_prompt in new surroundings.",
        )
        add("--num_captions", type=dopsd.COUNT, default=8, help="Training images whose (first) caption is drawn.")
    if command == "teacher":
        add("--hidden_layer", type=int, nargs="+", help="Layers of the VLM to look at, where the model reads one (Z-Image: -2). For a look: "
            "trained is the family's.")  # fmt: skip
    if command == "report":
        add(
            "--ordinary_prompts",
            help="Text file of prompts without the concept, none of them a prior prompt. Default: a built-in list.",
        )
        add("--pictures", type=dopsd.COUNT, default=12, help="Rows of each part of report.html.")
    if command == "paper":
        add("--paper_prompts", required=True, help="The frozen prompts, see read_paper_prompts in this file.")
        add(
            "--judge",
            default="Qwen/Qwen3-VL-8B-Instruct",
            help="A Qwen3-VL that says whether it is the same subject. none: no judge.",
        )


def parser_of(command, parser):
    """Adds to `parser` the flags of `command`: those of the training scripts that act here as they do there, and its
    own."""
    every = dopsd.ArgumentParser()
    dopsd.add_shared_arguments(every)
    dopsd.add_lora_arguments(every)
    for action in every._actions:
        if action.dest in DATA + DRAWING + (["vlm_model_name_or_path", *WAYS] if command == "teacher" else []):
            if action.dest in WAYS:
                action.nargs, action.default = "+", None
                action.help = action.help.split(" Default:")[0] + " Several are compared."
            if action.dest == "quantization":
                action.help = "Quantise the transformer."
            if action.dest == "encoder_quantization" and command == "paper":
                action.help = "Quantise text encoder and judge."
            if action.dest == "pretrained_model_name_or_path" and command != "teacher":
                action.help += " Not needed where OUTPUT_DIR holds the settings of the training, with a base that has no absolute path."
            parser._add_action(action)
    add_own_arguments(parser, command)
    return parser


def parse_args(input_args=None):
    main = dopsd.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    commands = main.add_subparsers(dest="command")
    parsers = {
        name: parser_of(name, commands.add_parser(name, help=text, formatter_class=dopsd.HelpFormatter, allow_abbrev=False))
        for name, text in [("teacher", "before training"), ("report", "after training"), ("paper", "the paper's protocol")]
    }  # fmt: skip
    words = sys.argv[1:] if input_args is None else input_args
    parser = parsers.get(words[0] if words else "")
    if parser and words[0] != "teacher":
        use_settings(parser, words[1:])
    own = main.parse_args(words)
    if own.command is None:
        main.error("give teacher, report or paper")
    # what the training script's functions ask for, and has no flag here
    needed = [
        "--pretrained_model_name_or_path",
        "-",
        "--instance_data_dir",
        "-",
        "--output_dir",
        "-",
        "--report_to",
        "none",
    ]
    args = argparse.Namespace(**{**vars(dopsd.parse_args(needed)), **vars(own), "validation_steps": 1})
    if (args.instance_data_dir is None) == (args.dataset_name is None):
        parser.error("give either --instance_data_dir or --dataset_name")
    if empty := next((n for n in DATA + DRAWING if isinstance(v := getattr(args, n), str) and not v.strip()), None):
        parser.error(f"--{empty} is empty")
    args.context_cache_dir = args.context_cache_dir or os.path.join(args.output_dir, "contexts")
    return args


def use_settings(parser, words):
    """Makes the flags of the training in OUTPUT_DIR the defaults of `parser`."""
    finder = dopsd.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--output_dir")
    finder.add_argument("--instance_data_dir")
    finder.add_argument("--dataset_name")
    found = finder.parse_known_args(words)[0]
    file = Path(found.output_dir or "") / dopsd.SETTINGS_NAME
    if (
        found.output_dir
        and not file.exists()
        and not any(word.startswith("--pretrained_model_name_or_path") for word in words)
    ):
        parser.error(
            f"--output_dir {found.output_dir} holds no {file.name}: name the output folder of a training, or give --pretrained_model_name_or_path"
        )
    if not found.output_dir or not file.exists():
        return
    try:
        settings = json.loads(file.read_text("utf-8"))
        known = {
            name: settings[name] for name in DATA + DRAWING if settings.get(name) is not None and name != "output_dir"
        }
    except (ValueError, AttributeError, TypeError) as error:
        parser.error(f"{file} cannot be read ({error})")
    known.pop("context_cache_dir", None)
    if found.instance_data_dir or found.dataset_name:
        known = {name: value for name, value in known.items() if name not in ("instance_data_dir", "dataset_name")}
    typed = {word.partition("=")[0][2:] for word in words if word.startswith("--")}
    for name, value in known.items():
        if str(value).startswith(".../") and name not in typed:  # see `public_settings` of the training script
            parser.error(f"{file}: the path {value} was shortened; give --{name}")
        # two parts may be an id of the Hub
        local = name == "instance_data_dir" or name.endswith("_model_name_or_path") and str(value).count("/") != 1
        if local and name not in typed and not os.path.exists(value):
            parser.error(
                f"{file} names {value}, which is not here: call this where the training ran, or give --{name}"
            )
    parser.set_defaults(**known)
    for action in parser._actions:
        action.required = action.required and action.dest not in known


# ------------------------------------------------------------------------------------------------------------- inputs
def check_encoder(flag, name):
    """Raises ValueError for an encoder that cannot be loaded; reads no weights."""
    dopsd.check_source(flag, name, file="config.json")
    with dopsd.blamed_on(f"--{flag} {name}"):
        AutoConfig.from_pretrained(name)
        image_processor(name)
        if flag == "image_text_encoder":
            AutoTokenizer.from_pretrained(name)
    dopsd.check_weights(flag, name, [""])


def read_prompts(flag, name):
    """The lines of a file of prompts. Raises ValueError where it cannot be read or holds none."""
    prompts = dopsd.read_lines(Path(name), f"--{flag} {name}")
    if not prompts:
        raise ValueError(f"--{flag} {name} holds no prompt: write one on each line.")
    return prompts


def check_inputs(args):
    """Family and dataset, after everything that can be known to be wrong before weights load.

    Raises:
        ValueError: with one sentence that names the flag or file.
    """
    dopsd.check_packages(args)
    for flag in ("image_encoder", "image_text_encoder"):
        check_encoder(flag, getattr(args, flag))
    family, buckets = dopsd.check_base(args)
    if args.command != "teacher":
        check_lora(family, args)
    base = args.pretrained_model_name_or_path, args.revision
    args.num_inference_steps = args.num_inference_steps or family.steps_of(*base)
    return family, dopsd.inspect_images(dopsd.read_dataset(args), buckets, args)


def check_lora(family, args):
    """Raises ValueError for a LoRA in OUTPUT_DIR whose shapes are of another base; reads no weights."""
    file = Path(args.output_dir) / LORA_WEIGHT_NAME
    if not file.exists():
        return
    with dopsd.blamed_on(f"--output_dir {args.output_dir}: its LoRA does not load"), safe_open(file, "pt") as lora:
        shapes = {name: lora.get_slice(name).get_shape() for name in lora.keys()}
    layers = dict(dopsd.build_without_weights(family, args).transformer.named_modules())
    for name, shape in shapes.items():
        layer, _, side = name.removeprefix("transformer.").partition(".lora_")
        weight, axis = getattr(layers.get(layer), "weight", None), 1 if side == "A.weight" else 0
        if weight is None or shape[axis] != weight.shape[axis]:
            base = f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}"
            raise ValueError(f"{base} does not fit {file}, whose {name} is {shape}: give the base of the training.")


def concept_pairs(dataset, args):
    """(row index, prompt) of the training captions and of new prompts with the concept."""
    rows = np.linspace(0, len(dataset) - 1, min(args.num_captions, len(dataset))).round().astype(int).tolist()
    captions = [(index, dataset[index]["captions"][0]) for index in rows]
    if not (args.concept_prompts or args.instance_prompt):
        dopsd.logger.info(
            "Only training captions are drawn: --concept_prompts FILE or --instance_prompt gives new prompts of the concept."
        )
    if args.concept_prompts:
        new = read_prompts("concept_prompts", args.concept_prompts)
    else:
        new = [f"{args.instance_prompt}, {place}" for place in SURROUNDINGS] if args.instance_prompt else []
    return captions, [(rows[i % len(rows)], prompt) for i, prompt in enumerate(new)]


def check_prompts(family, args, dataset, pairs):
    """As `check_contexts` of the training script; a prompt that is no caption is one of a file of prompts."""
    try:
        dopsd.check_contexts(family, args, dataset, pairs)
    except ValueError as error:
        raise ValueError(
            str(error).replace(
                "--validation_prompt", "a prompt (--concept_prompts, --ordinary_prompts, --paper_prompts)"
            )
        ) from error


@contextlib.contextmanager
def explained(savings, folder):
    """Within: running out of memory becomes an error that names flags that need less, a full disk one that names the
    folder."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise dopsd.InputError(
            f"{str(error).split('. ')[0]}. What was drawn is kept. Cheapest remedies: {savings}."
        ) from error
    except OSError as error:
        raise dopsd.InputError(
            f"{folder}: {error}. What was drawn is kept; the same command goes on from it."
        ) from error


# ------------------------------------------------------------------------------------------------------------ drawing
@dataclass(frozen=True)
class Drawing:
    """A picture: its context (a file of the cache, and whose it is), size, noise, steps, and which weights draw it."""

    context: Path
    side: str
    size: tuple
    noise: int
    steps: int
    weights: str

    def file(self, args):
        """Where it is kept. The name changes with all that changes the picture."""
        key = [
            self.context.name,
            self.side,
            self.size,
            self.noise,
            self.steps,
            self.weights,
            args.mixed_precision,
            args.quantization,
        ]
        return (
            Path(args.output_dir) / "evaluation" / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.png"
        )


def is_whole(file):
    """Whether a picture is there as it was written."""
    with contextlib.suppress(Exception), Image.open(file) as picture:
        picture.verify()
        return True
    return False


def draw(drawings, load, args, accelerator):
    """Draws what is not there yet or damaged, each picture written aside and then renamed; `load` gives the pipeline,
    if it is needed."""
    missing = {d.file(args): d for d in drawings if not is_whole(d.file(args))}
    if not missing:
        return
    first = next(iter(missing))
    first.parent.mkdir(exist_ok=True)
    with explained("--enable_vae_tiling, --quantization int8, a lower --drawing_batch_size", args.output_dir):
        pipeline = load()
        dopsd.place_for_training(pipeline, args, accelerator)
        bar = tqdm(total=len(missing), desc="Drawing")
        for _, group in itertools.groupby(
            sorted(missing.items(), key=lambda m: (m[1].size, m[1].steps)), lambda m: (m[1].size, m[1].steps)
        ):
            group = list(group)
            # references of several sizes make no batch
            size = (
                1
                if dopsd.sees_references(args) or any("edit" in d.side for _, d in group)
                else args.drawing_batch_size
            )
            for batch in (group[i : i + size] for i in range(0, len(group), size)):
                contexts = [context_of(d, accelerator.device) for _, d in batch]
                noise = [pipeline.initial_noise(*d.size, torch.Generator().manual_seed(d.noise)) for _, d in batch]
                with torch.no_grad(), accelerator.autocast():
                    pictures = pipeline.sample(
                        pipeline.transformer, contexts, torch.cat(noise).to(accelerator.device), batch[0][1].steps
                    )
                for (file, _), picture in zip(batch, pictures):
                    aside = file.with_suffix(".tmp")
                    picture.save(aside, "PNG")
                    os.replace(aside, file)
                bar.update(len(batch))
        bar.close()
        del pipeline
        free_memory()


def context_of(drawing, device):
    """The tensors of a drawing's context."""
    return {name: tensor.to(device) for name, tensor in dopsd.read_context(drawing.context).items()}


def load_base(family, args):
    return dopsd.load_for_training(
        family, args, dopsd.quantization_config("transformer", args.quantization, diffusers)
    )


def load_tuned(family, args):
    """The base with the LoRA of OUTPUT_DIR, or the whole model there."""
    if not (Path(args.output_dir) / LORA_WEIGHT_NAME).exists():
        return load_base(
            family,
            argparse.Namespace(
                **{**vars(args), "pretrained_model_name_or_path": args.output_dir, "revision": None, "variant": None}
            ),
        )
    pipeline = load_base(family, args)
    with dopsd.blamed_on(f"--output_dir {args.output_dir}: its LoRA does not load"):
        pipeline.load_lora_weights(args.output_dir, weight_name=LORA_WEIGHT_NAME)
    return pipeline


# ----------------------------------------------------------------------------------------------------------- encoders
def image_processor(name):
    """The processor of an encoder's pictures that works without torchvision."""
    try:
        return AutoImageProcessor.from_pretrained(name, backend="pil")
    except (ValueError, ImportError):  # DINOv3's has no such version; what its file says, another does as well
        return transformers.BitImageProcessorPil.from_pretrained(name, do_center_crop=False)


class Encoder:
    """A vision model, or an image-text model, of transformers, on `device`. To be deleted before the next one
    loads."""

    def __init__(self, name, device, batch_size):
        self.device, self.batch_size = device, batch_size
        self.model = AutoModel.from_pretrained(name, dtype=torch.float32).to(device).eval()
        self.processor = image_processor(name)
        self.tokenizer = AutoTokenizer.from_pretrained(name) if hasattr(self.model, "get_text_features") else None

    @torch.no_grad()
    def images(self, pictures, patches=False):
        """Features (N, dim) of PIL pictures or files, of length 1: as the model pools them or, with `patches`, the
        mean over the patches."""
        features = []
        for start in tqdm(range(0, len(pictures), self.batch_size), "Looking", delay=5):
            batch = [
                p if isinstance(p, Image.Image) else Image.open(p).convert("RGB")
                for p in pictures[start : start + self.batch_size]
            ]
            pixels = self.processor(images=batch, return_tensors="pt")["pixel_values"].to(self.device)
            out = (
                self.model.get_image_features(pixel_values=pixels)
                if self.tokenizer
                else self.model(pixel_values=pixels)
            )
            # behind the class token, and registers where there are some
            if patches and out.last_hidden_state.ndim == 3:
                out = out.last_hidden_state[:, 1 + getattr(self.model.config, "num_register_tokens", 0) :].mean(dim=1)
            elif patches:
                out = out.last_hidden_state.mean(dim=(2, 3))
            else:
                out = getattr(out, "pooler_output", out).flatten(1)
            features.append(torch.nn.functional.normalize(out.float(), dim=1).cpu())
        return torch.cat(features).double().numpy()

    @torch.no_grad()
    def texts(self, prompts):
        """Features (N, dim) of prompts, of length 1."""
        siglip = self.model.config.model_type.startswith("siglip")
        length = getattr(self.model.config.text_config, "max_position_embeddings", 64)
        # SigLIP was trained on small letters, padded to the full length without a mask
        words = [p.lower() for p in prompts] if siglip else list(prompts)
        inputs = self.tokenizer(
            words, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).to(self.device)
        if siglip:
            inputs.pop("attention_mask", None)
        out = self.model.get_text_features(**inputs)
        return torch.nn.functional.normalize(getattr(out, "pooler_output", out).float(), dim=1).cpu().double().numpy()


@contextlib.contextmanager
def encoder(flag, args, accelerator):
    """Within: the encoder that --`flag` names; afterwards its memory is free."""
    name = getattr(args, flag)
    with explained("a lower --encoding_batch_size", args.output_dir), dopsd.blamed_on(f"--{flag} {name}"):
        loaded = Encoder(name, accelerator.device, args.encoding_batch_size)
        try:
            yield loaded
        finally:
            del loaded.model
            free_memory()


def detail(picture):
    """How much of a picture (H, W, 3) of uint8 is finer than 5 pixels: the mean difference, in grey levels, to its
    median over 5 x 5 pixels. Specks and sharp edges make it up, which is what few steps lose first; blur lowers it."""
    return float(np.abs(picture.astype(float) - Image.fromarray(picture).filter(ImageFilter.MedianFilter(5))).mean())


# ------------------------------------------------------------------------------------------------------------ figures
def interval(statistic, *arrays, draws=2000):
    """Value of a statistic of arrays (prompts, noises), with its 95 % interval over prompts drawn anew, each with all
    its noises; of a single prompt, over its noises."""
    value, rng = statistic(*arrays), np.random.default_rng(0)
    arrays = [a.T for a in arrays] if len(arrays[0]) == 1 else arrays
    count = len(arrays[0])
    # of few prompts the plain percentiles lie too close: Hesterberg's expanded ones make up for n - 1 and Student's t
    student = np.quantile(rng.standard_t(count - 1, 100_000), 0.975)
    tail = 100 * NormalDist().cdf(-student * math.sqrt(count / (count - 1)))
    values = [statistic(*(a[rows] for a in arrays)) for rows in rng.integers(count, size=(draws, count))]
    return [float(value), *map(float, np.percentile(values, [tail, 100 - tail]))]


def common_part(differences):
    """Mean of `differences` (images, dim), its squared length without the part that chance adds to it, and that with
    it."""
    direction, count = differences.mean(axis=0), len(differences)
    biased = length = direction @ direction
    if count > 1:
        length = (count * biased - np.square(differences).sum(axis=1).mean()) / (count - 1)
    return direction, length, biased


def share_of_way(before, after, differences):
    """How far pictures with the features `after` have gone from those `before` towards the training images, as a
    share, (prompts, noises).

    `differences` (images, dim) are those of each training image and the mean of the base's pictures of its caption, so
    that all that the caption says falls out of them. What they have in common is the concept: the share is a
    projection on it, and 1 in the mean for fresh pictures of the concept.
    """
    direction, length, biased = common_part(differences)
    return (after - before) @ direction / max(length, biased / 4)  # images that have little in common tell no length


def membership(pictures, images, left_out=None):
    """Whether each picture, of features (prompts, noises, dim), is as near to the training `images` (images, dim) as
    three in four of these are to one another; (prompts, noises). Fresh pictures of the concept are in three of four
    cases.

    `left_out` holds for each prompt the places of the images that do not count: the one that was shown, so that a copy
    of it counts no more, and that of the same caption, which is near by its scene. Default: prompts are in turn those
    of the images. Where none is left, no distance is told, and a picture counts as near.
    """
    similarity, count = pictures @ images.T, len(images)
    if left_out is None:
        left_out = [{prompt % count} for prompt in range(len(pictures))]
    others = np.array([[place not in own for place in range(count)] for own in left_out], float)
    left = others.sum(axis=1)[:, None]
    limit = np.quantile((images @ images.T * (1 - np.eye(count))).sum(axis=1) / max(count - 1, 1), 0.25)
    near = np.einsum("pni,pi->pn", similarity, others) / np.maximum(left, 1) >= limit
    return (near | (left == 0)).astype(float)


def near(before, after, images, left_out=None):
    """Whether each picture `after` is near the training images: see `membership`, and at least half of
    `share_of_way`."""
    return membership(after, images, left_out) * (
        share_of_way(before, after, images - before[: len(images)].mean(axis=1)) >= 0.5
    )


def told_apart(pictures, texts):
    """Similarity of each picture (prompts, noises, dim) to its own prompt (prompts, dim) over the mean of the others;
    (prompts, noises)."""
    similarity = np.einsum("pnd,qd->pnq", pictures, texts)
    own = np.einsum("pnp->pn", similarity)
    others = np.array([[a != b for b in map(tuple, texts)] for a in map(tuple, texts)], float)
    return own - np.einsum("pnq,pq->pn", similarity, others) / np.maximum(others.sum(1), 1)[:, None]


def shown(values):
    """0.81 [0.75, 0.86]"""
    return f"{values[0]:.2f} [{values[1]:.2f}, {values[2]:.2f}]"


def write_aside(path, text):
    """Writes a file aside and renames it: one that is stopped leaves what was there."""
    aside = path.with_suffix(".tmp")
    aside.write_text(text, "utf-8")
    os.replace(aside, path)


def write_json(path, value):
    write_aside(path, json.dumps(value, indent=2) + "\n")


# ------------------------------------------------------------------------------------------------------------ teacher
def ways_of(family, dataset, args):
    """Name -> arguments of each way of showing the picture, and the layer of the VLM it reads, None for the
    family's."""
    contexts = args.teacher_context or family.teacher_contexts
    # of two images, that of the caption and the shown one, none would be left to compare with
    images = args.teacher_image or (["target", "other"] if len(dataset) > 2 else ["target"])
    many = {name: len(getattr(args, name) or []) > 1 for name in WAYS}
    if args.hidden_layer and not hasattr(family, "hidden_layer"):
        raise ValueError("--hidden_layer: this model reads several layers of the VLM.")
    if args.hidden_layer:
        base = {"pretrained_model_name_or_path": args.pretrained_model_name_or_path, "revision": args.revision}
        count = AutoConfig.from_pretrained(**base, subfolder="text_encoder").get_text_config().num_hidden_layers
        # 0 is what the first layer is given
        if wrong := [layer for layer in args.hidden_layer if not -count - 1 <= layer <= count]:
            raise ValueError(f"--hidden_layer {wrong[0]}: this VLM has {count} layers; give {-count - 1} to {count}.")
    if args.hidden_layer and family.hidden_layer not in args.hidden_layer:  # what is trained is compared with
        args.hidden_layer = [family.hidden_layer, *args.hidden_layer]
    ways = {}
    choices = itertools.product(
        contexts,
        images,
        args.teacher_max_pixels or [None],
        args.teacher_prompt_suffix or [None],
        args.hidden_layer or [None],
    )
    for context, image, pixels, suffix, layer in choices:
        if context == "edit" and (layer, pixels) != (
            (args.hidden_layer or [None])[0],
            (args.teacher_max_pixels or [None])[0],
        ):
            continue  # no VLM
        given = {
            "teacher_context": context,
            "teacher_image": image,
            "teacher_max_pixels": None if context == "edit" else pixels,
        }
        way = argparse.Namespace(**{**vars(args), **given, "teacher_prompt_suffix": suffix})
        dopsd.resolve_arguments(family, way)
        dopsd.find_vlm(family, way)
        if image == "other" and len(dataset) < 2:
            raise ValueError("--teacher_image other needs at least two training images.")
        name = f"{context}, {image}"
        name += f", {way.teacher_max_pixels} pixels" if many["teacher_max_pixels"] and context == "vlm" else ""
        name += f", suffix {suffix!r}" if many["teacher_prompt_suffix"] else ""
        layer = layer if context == "vlm" else None
        if layer is not None and layer != family.hidden_layer:
            name += f", layer {layer}"
            way.context_cache_dir = os.path.join(args.context_cache_dir, f"layer{layer}")
        ways[name] = way, layer
    return ways


def token_statistics(family, way, layer, dataset, files):
    """Of each layer that the teacher's context holds, how far the largest dimension stands out, image tokens against
    text tokens.

    That is the ratio of the largest root mean square of a dimension to the median one, over the tokens of all `files`
    of contexts, whose (row index, prompt) they are the values of.
    """
    base = {"pretrained_model_name_or_path": way.pretrained_model_name_or_path, "revision": way.revision}
    tokenizer = AutoTokenizer.from_pretrained(**base, subfolder="tokenizer")
    config = AutoConfig.from_pretrained(**base, subfolder="text_encoder")
    hidden = config.get_text_config().hidden_size
    vlm = family.make_encoder(way.vlm_model_name_or_path, way.teacher_max_pixels, config, tokenizer)
    limits = {"min_pixels": vlm.size["shortest_edge"], "max_pixels": vlm.size["longest_edge"]}
    tokens = {True: [], False: []}
    for file, (index, prompt) in files.items():
        bucket = dopsd.shown_row(dataset, index, way)["bucket"]
        patches = vlm.image_processor.get_number_of_image_patches(*bucket, limits)
        chat = vlm.chat(
            prompt + way.teacher_prompt_suffix,
            patches // vlm.image_processor.merge_size**2,
            family.chat_ending(tokenizer),
        )
        seen = torch.tensor(vlm.tokenizer(chat).input_ids) == vlm.config.image_token_id
        seen = seen[vlm.skipped_tokens :]
        embeds = dopsd.read_context(file)["prompt_embeds"].float()[: len(seen)]
        embeds = embeds.reshape(len(embeds), -1, hidden)
        seen = seen[: len(embeds)]
        for kind in tokens:
            tokens[kind].append(embeds[seen == kind])
    rms = {kind: torch.cat(found).square().mean(dim=0).sqrt() for kind, found in tokens.items()}
    config = family.load_config(**base)
    several = (
        config.get("text_encoder_out_layers")
        or config.get("text_encoder_select_layers")
        or getattr(family, "stock_layers", None)
    )
    layers = [layer or family.hidden_layer] if hasattr(family, "hidden_layer") else several or range(len(rms[True]))
    return [
        {
            "layer": name,
            **{who: (r[i].max() / r[i].median()).item() for who, r in (("image", rms[True]), ("text", rms[False]))},
        }
        for i, name in enumerate(layers)
    ]


def measure_teacher(drawings, ways, pairs, captions, dataset, args, accelerator):
    """Figures of each of the `ways`, and what the student's pictures are worth."""
    files = {name: [d.file(args) for d in own] for name, own in drawings.items()}
    with encoder("image_encoder", args, accelerator) as look:
        features = {name: look.images(own).reshape(len(pairs), args.noise_seeds, -1) for name, own in files.items()}
        images = look.images([dopsd.training_image(dataset[index]) for index, _ in captions])
    student = features.pop("student")
    differences = images - student[: len(captions)].mean(axis=1)
    with encoder("image_text_encoder", args, accelerator) as read:
        texts = read.texts([prompt for _, prompt in pairs])
        follows = {
            name: told_apart(read.images(own).reshape(len(pairs), args.noise_seeds, -1), texts)
            for name, own in files.items()
        }
    figures, places = {}, {index: place for place, (index, _) in enumerate(captions)}
    for name, own in features.items():
        left_out = [
            {places.get(dopsd.shown_row(range(len(dataset)), index, ways[name][0]))}
            | ({places[index]} if (index, prompt) in captions else set())
            for index, prompt in pairs
        ]
        near_each = near(student, own, images, left_out)
        figures[name] = {
            "near": interval(np.mean, near_each),
            "near_each": near_each.tolist(),
            "way": interval(np.mean, share_of_way(student, own, differences)),
        }
        figures[name]["follows"] = interval(lambda t, s: t.mean() - s.mean(), follows[name], follows["student"])
    _, length, biased = common_part(differences)
    return figures, {
        "follows": float(follows["student"].mean()),
        "near": float(membership(student, images).mean()),
        "lacks": float(length / biased),
    }


def teacher_verdict(ways, student):
    """What to do, in words. `ways` is name -> figures, in which `trainable` says whether flags of the training make
    it, and `near_each` which pictures are near; `student` has figures of the student."""

    def difference(name, other):
        """Interval of the difference of two ways, which draw the same prompts with the same noises."""
        return interval(np.mean, np.subtract(ways[name]["near_each"], ways[other]["near_each"]))

    best = max((name for name in ways if ways[name]["trainable"]), key=lambda name: ways[name]["near"][0])
    share, flags = ways[best]["near"][0], ways[best]["flags"]
    drawn = (
        f"{100 * share:.0f} % of its pictures are as near to the training images as most of these are to one another"
    )
    if share >= WORTH:
        text = f"Worth training with {flags}: {drawn}."
    elif share >= HOPELESS:
        text = f"Doubtful: of the best teacher ({flags}), {drawn}. Expect part of the concept; look at teacher.png."
    else:
        text = f"No teacher can draw this: of the best ({best}), {drawn}. Training will hardly teach it."
    if student["near"] >= WORTH and student["lacks"] < 0.25:
        text = f"The base draws this untrained: the student's pictures lack nothing that the training images have in common. {text}"
    first = next(name for name in ways if ways[name]["trainable"])  # the default way
    if first != best and difference(best, first)[1] <= 0:
        text += f" The difference to {first} is within the noise; look at teacher.png."
    better = [name for name in ways if not ways[name]["trainable"] and difference(name, best)[1] > 0]
    if better:
        text += f" Another layer of the VLM shows more ({better[0]}); the training has no flag for it."
    if wild := [n for n, f in ways.items() if any(layer["image"] > OUTLIER * layer["text"] for layer in f["tokens"])]:
        text += f" Outlying dimensions in the image tokens ({wild[0]}): look for glitches."
    return best, text


def flags_of(way):
    """The flags of the training that make a way of showing the picture."""
    words = [f"--teacher_context {way.teacher_context} --teacher_image {way.teacher_image}"]
    if way.teacher_context == "vlm":
        words.append(f"--teacher_max_pixels {way.teacher_max_pixels}")
    return " ".join(
        words + ([f"--teacher_prompt_suffix {way.teacher_prompt_suffix!r}"] if way.teacher_prompt_suffix else [])
    )


def teacher(args, accelerator):
    """Draws and measures every way of showing the picture. Writes teacher.png and teacher.json."""
    try:
        family, dataset = check_inputs(args)
        captions, new = concept_pairs(dataset, args)
        pairs, drawings, files, ways = captions + new, {}, {}, ways_of(family, dataset, args)
        for way, _ in ways.values():
            check_prompts(family, way, dataset, pairs)
            dopsd.check_references(family, way, dataset)
        caches = {name: dopsd.ContextCache(family, way) for name, (way, _) in ways.items()}
    except (ValueError, OSError) as error:
        raise dopsd.InputError(error) from error
    weights = base_weights(args)
    for name, (way, layer) in ways.items():
        reader = family if layer is None else type(family.__name__, (family,), {"hidden_layer": layer})
        with explained(dopsd.ENCODING_SAVINGS, args.context_cache_dir):
            dopsd.encode_contexts(reader, way, caches[name], dataset, pairs, accelerator)
        students, teachers = zip(
            *(caches[name].paths(*dopsd.rows_of(dataset, index, way), prompt) for index, prompt in pairs)
        )
        files[name] = dict(zip(teachers, pairs))
        shown = f"teacher {way.teacher_context}" + (
            f", layer {layer}" if layer not in (None, getattr(family, "hidden_layer", None)) else ""
        )
        for who, side, paths in (("student", "student", students), (name, shown, teachers)):
            drawings.setdefault(who, [
                Drawing(path, side, tuple(dataset[index]["bucket"]), args.seed + 1000 * seed + i, args.num_inference_steps, weights)
                for i, (path, (index, _)) in enumerate(zip(paths, pairs)) for seed in range(args.noise_seeds)
            ])  # fmt: skip
    draw([d for own in drawings.values() for d in own], functools.partial(load_base, family, args), args, accelerator)
    figures, student = measure_teacher(drawings, ways, pairs, captions, dataset, args, accelerator)
    for name, (way, layer) in ways.items():
        tokens = token_statistics(family, way, layer, dataset, files[name]) if way.teacher_context == "vlm" else []
        figures[name] |= {
            "tokens": tokens,
            "flags": flags_of(way),
            "trainable": layer in (None, getattr(family, "hidden_layer", None)),
        }
    best, verdict = teacher_verdict(figures, student)
    record = {
        "verdict": verdict,
        "best": best,
        "ways": figures,
        "student": student,
        "prompts": [prompt for _, prompt in pairs],
    }
    write_json(Path(args.output_dir) / "teacher.json", record)
    teacher_sheet(drawings, captions, new, dataset, args).save(Path(args.output_dir) / "teacher.png", optimize=True)
    print_teacher(record)
    print(f"\n{verdict}\nPicture: {Path(args.output_dir) / 'teacher.png'}")
    return record


def print_teacher(record):
    print(
        "\n| teacher | near the training images | of the way to them | prompt followed, change | largest dimension, image / text tokens |"
    )
    print("|---|---|---|---|---|")
    for name, f in record["ways"].items():
        tokens = ", ".join(f"layer {t['layer']}: {t['image']:.1f} / {t['text']:.1f}" for t in f["tokens"])
        print(
            f"| {name} | {shown(f['near'])} | {shown(f['way'])} | {f['follows'][0]:+.3f} [{f['follows'][1]:+.3f}, {f['follows'][2]:+.3f}] | {tokens} |"
        )
    print(f"""
near: share of pictures as near to the training images as three in four of these are to one another; 1 is best.
way: 0 is the untrained student, 1 the training images.
prompt followed: similarity to the own prompt over that to the others, less the student's, {record["student"]["follows"]:.3f}; below 0, the teacher follows it less.
largest dimension: where the first number is far above the second, look for glitches in its pictures.""")


def teacher_sheet(drawings, captions, new, dataset, args, rows=4):
    """Rows of training captions and new prompts: training image | student | each teacher."""
    pairs = captions + new
    chosen = [*range(len(captions))[:rows], *range(len(captions), len(pairs))[:rows]]
    side = max(128, min(256, args.resolution))
    names, heading, caption = ["training image", *drawings], 34, 16
    sheet = Image.new("RGB", (len(names) * (side + 6) + 6, heading + len(chosen) * (side + caption + 6)), "white")
    pen, font, small = ImageDraw.Draw(sheet), ImageFont.load_default(size=13), ImageFont.load_default(size=11)
    for column, name in enumerate(names):
        pen.text((6 + column * (side + 6), 8), name if column < 2 else f"teacher: {name}", fill="black", font=font)
    for row, number in enumerate(chosen):
        index, prompt = pairs[number]
        top = heading + row * (side + caption + 6)
        pen.text((6, top), ("caption: " if number < len(captions) else "new: ") + prompt, fill="dimgrey", font=small)
        pictures = [dopsd.training_image(dataset[index])]
        pictures += [Image.open(own[number * args.noise_seeds].file(args)) for own in drawings.values()]
        for column, picture in enumerate(pictures):
            way = Image.Resampling.NEAREST if picture.width < side else Image.Resampling.LANCZOS
            sheet.paste(
                ImageOps.pad(picture, (side, side), way, color="white"), (6 + column * (side + 6), top + caption)
            )
    return sheet.quantize(256) if args.resolution < 128 else sheet


# ------------------------------------------------------------------------------------------------------------- report
def prompt_contexts(family, args, dataset, pairs, accelerator):
    """Files of the students' contexts of (row index, prompt) pairs. No VLM is loaded: without references, an index is
    not needed."""
    way = argparse.Namespace(
        **{**vars(args), "teacher_context": "edit", "teacher_image": "target", "teacher_prompt_suffix": ""}
    )
    try:
        check_prompts(family, way, dataset, [(0 if index is None else index, prompt) for index, prompt in pairs])
        way.teacher_context = "edit" if args.reference_column else None
        dopsd.check_references(family, way, dataset)
        cache = dopsd.ContextCache(family, way)
    except (ValueError, OSError) as error:
        raise dopsd.InputError(error) from error
    with explained("--encoder_quantization int8", args.context_cache_dir):
        dopsd.encode_contexts(family, way, cache, dataset, pairs, accelerator)
    return [cache.paths(*dopsd.rows_of(dataset, index, way), prompt)[0] for index, prompt in pairs]


def measure_report(files, parts, images, args, accelerator):
    """Figures of a report: name -> [value, low, high].

    Args:
        files: (part, who, steps) -> files, noises of a prompt together; `few` or `many` steps.
        parts: part, `concept` or `ordinary`, -> prompts; training captions come first, one for each of the training
        `images`.
    """
    count = {part: len(prompts) for part, prompts in parts.items()}
    with encoder("image_encoder", args, accelerator) as look:
        f = {key: look.images(own).reshape(count[key[0]], len(own) // count[key[0]], -1) for key, own in files.items()}
        images = look.images(images)
    with encoder("image_text_encoder", args, accelerator) as read:
        texts = {part: read.texts(prompts) for part, prompts in parts.items()}
        t = {
            key: read.images(own).reshape(count[key[0]], len(own) // count[key[0]], -1)
            for key, own in files.items()
            if key[2] == "few"
        }
        t = {key: told_apart(own, texts[key[0]]) for key, own in t.items()}
    fine = {
        key: np.array(
            [detail(np.asarray(Image.open(p).convert("RGB"))) for p in tqdm(own, "Detail", delay=5)]
        ).reshape(count[key[0]], -1)
        for key, own in files.items()
    }
    return figures_of(f, t, fine, images)


def figures_of(f, t, fine, images):
    """The figures of `measure_report` from features `f`, `told_apart` `t` and `detail` `fine` of each (part, who,
    steps), and the features of the training images."""
    before, after = (f["concept", who, "few"] for who in ("base", "tuned"))
    differences = images - before[: len(images)].mean(axis=1)
    base, tuned = f["ordinary", "base", "few"], f["ordinary", "tuned", "few"]
    moved, seeds = distance(base, tuned), spread_over_noises(base)
    same = f["concept", "base", "many"].shape[1]  # noises that are drawn in many steps, too
    steps = {who: distance(f["concept", who, "few"][:, :same], f["concept", who, "many"]) for who in ("base", "tuned")}
    ratio = lambda a, b: a.mean() / b.mean()  # noqa: E731
    change = lambda a, b: a.mean() - b.mean()  # noqa: E731
    return {
        "learned": interval(np.mean, near(before, after, images)),
        "way": interval(np.mean, share_of_way(before, after, differences)),
        "concept_follows": interval(change, t["concept", "tuned", "few"], t["concept", "base", "few"]),
        "drift": interval(ratio, moved, seeds),
        "leak": interval(np.mean, share_of_way(base, tuned, differences)),
        "ordinary_follows": interval(
            lambda a, b: a.mean() / b.mean(), t["ordinary", "tuned", "few"], t["ordinary", "base", "few"]
        ),
        "detail": interval(ratio, fine["ordinary", "tuned", "few"], fine["ordinary", "base", "few"]),
        "gap": interval(ratio, steps["tuned"], steps["base"]),
        "gap_detail": interval(
            lambda a, b, c, d: (a.mean() / b.mean()) / (c.mean() / d.mean()),
            *(fine["concept", who, speed][:, :same] for who in ("tuned", "base") for speed in ("few", "many")),
        ),
    }


def distance(a, b):
    """1 - cosine of features of length 1, over the last axis."""
    return 1 - (a * b).sum(axis=-1)


def spread_over_noises(features):
    """(prompts, noises): mean distance of each picture to those of the same prompt with other noises."""
    noises = features.shape[1]
    return distance(features[:, :, None], features[:, None]).sum(axis=2) / (noises - 1)


def report_verdict(figures):
    """Rows of question, answer, figure and limit, from the figures of `measure_report`."""
    rows = [
        (
            "Concept learned",
            ["learned"],
            f"at least {LEARNED:.0%} of pictures as near to the training images as most of these are to one another",
        ),
        (
            "Other prompts kept",
            ["drift", "detail"],
            f"drift at most {DRIFT:g} of the spread over noises, fine detail within {DETAIL:.0%} of the base's",
        ),
        (
            "Few-step ability kept",
            ["gap"],
            f"few against {MANY_STEPS} steps: at most {GAP:g} times the base's difference",
        ),
    ]
    passed = {
        "learned": lambda v: v >= LEARNED,
        "drift": lambda v: v <= DRIFT,
        "detail": lambda v: abs(v - 1) <= DETAIL,
        "gap": lambda v: v <= GAP,
    }
    table = []
    for question, names, limit in rows:
        right = all(passed[n](figures[n][0]) for n in names)
        sure = all(len({passed[n](v) for v in figures[n]}) == 1 for n in names)
        answer = ("yes" if right else "no") + ("" if sure else " (near the limit)")
        table.append(
            {
                "question": question,
                "answer": answer,
                "figure": ", ".join(f"{n} {shown(figures[n])}" for n in names),
                "limit": limit,
            }
        )
    return table


def base_weights(args):
    """Checksum of what draws in the base."""
    files = [*dopsd.TRANSFORMER_FILES, *dopsd.SCHEDULER_FILES, "vae/*.json", "vae/*.safetensors"]
    return dopsd.fingerprint(args.pretrained_model_name_or_path, files, args.revision)


def result_weights(args):
    """Checksum of the weights in OUTPUT_DIR."""
    return dopsd.fingerprint(args.output_dir, [LORA_WEIGHT_NAME, *dopsd.TRANSFORMER_FILES])


def report(args, accelerator):
    """Draws base and tuned model with the same noises, measures them, and writes report.json, report.html and the
    table of the model card."""
    try:
        family, dataset = check_inputs(args)
        captions, new = concept_pairs(dataset, args)
        ordinary = read_prompts("ordinary_prompts", args.ordinary_prompts) if args.ordinary_prompts else ORDINARY
    except (ValueError, OSError) as error:
        raise dopsd.InputError(error) from error
    pairs = [*captions, *new, *((None, prompt) for prompt in ordinary)]
    needed = [pair if args.reference_column else (None, pair[1]) for pair in pairs]
    paths = prompt_contexts(family, args, dataset, needed, accelerator)
    base, result = base_weights(args), result_weights(args)
    drawings, concept = {}, len(captions) + len(new)
    for who, weights in (("base", base), ("tuned", base + result)):
        for part, numbers in (("concept", range(concept)), ("ordinary", range(concept, len(pairs)))):
            for speed, steps in (("few", args.num_inference_steps), ("many", MANY_STEPS)):
                if (part, speed) != ("ordinary", "many"):
                    drawings[part, who, speed] = [
                        Drawing(paths[i], "student", size_of(dataset, pairs[i][0], args), args.seed + 1000 * seed + i, steps, weights)
                        for i in numbers for seed in range(args.noise_seeds if speed == "few" else MANY_NOISES)
                    ]  # fmt: skip
    for who, load in (("base", load_base), ("tuned", load_tuned)):
        draw(
            [d for key, own in drawings.items() if key[1] == who for d in own],
            functools.partial(load, family, args),
            args,
            accelerator,
        )
    files = {key: [d.file(args) for d in own] for key, own in drawings.items()}
    prompts = {"concept": [prompt for _, prompt in captions + new], "ordinary": ordinary}
    images = [dopsd.training_image(dataset[index]) for index, _ in captions]
    figures = measure_report(files, prompts, images, args, accelerator)
    record = {"table": report_verdict(figures), "figures": figures, "weights": result, "noise_seeds": args.noise_seeds,
              "num_inference_steps": args.num_inference_steps, "prompts": {part: len(own) for part, own in prompts.items()},
              "image_encoder": Path(args.image_encoder).name, "image_text_encoder": Path(args.image_text_encoder).name}  # fmt: skip
    folder = Path(args.output_dir)
    write_aside(folder / "report.html", report_page(record, files, prompts, images, args))
    write_json(folder / "report.json", record)
    card = folder / "README.md"
    if card.exists():
        before, _, rest = card.read_text("utf-8").partition("## Measured\n\n")
        _, heading, after = rest.partition("\n## ")  # of the user's own
        told = f"{before.rstrip()}\n\n## Measured\n\n{markdown_table(record)}\n"
        write_aside(card, told + heading + after)
    print(f"\n{markdown_table(record)}\n")
    for row in record["table"]:
        if row["answer"].startswith("no"):
            print(f"{row['question']}: {row['answer']}. {ADVICE[row['question']]}")
    print(f"Pictures and figures: {folder / 'report.html'}")
    return record


def size_of(dataset, index, args):
    """(height, width): that of the row in training or, without a row, --resolution squared."""
    return (args.resolution,) * 2 if index is None else tuple(dataset[index]["bucket"])


def markdown_table(record):
    lines = ["| | | measured, with 95 % interval | limit |", "|---|---|---|---|"]
    return "\n".join(
        lines
        + [f"| {row['question']} | {row['answer']} | {row['figure']} | {row['limit']} |" for row in record["table"]]
    )


ADVICE = {
    "Concept learned": "Was the teacher good (evaluate.py teacher)? Then train longer, or with a higher --learning_rate.",
    "Other prompts kept": "Train with a higher --prior_loss_weight, or with --prior_prompts FILE: the built-in ones (PRIOR_PROMPTS of pipeline_dopsd.py) and prompts of the kind of your images without the concept's word; "
    "after a short training with more steps, too: half-learned styles drift most.",
    "Few-step ability kept": "Take an earlier checkpoint or a lower --learning_rate.",
}
FIGURES = {
    "learned": "of the pictures with the concept that are as near to the training images as three in four of these are to one another",
    "way": "of the way from the base's pictures to the training images, in the image encoder's space; 0 before training",
    "concept_follows": "change of the similarity of a picture to its own prompt over that to the others, prompts with the concept",
    "drift": "distance of base and tuned model on ordinary prompts, same noise, over the distance between two noises of the base",
    "leak": "of the way to the training images that ordinary prompts have gone; 0 before training",
    "ordinary_follows": "how far ordinary pictures can be told apart by their prompts, over the base's; 1 before training",
    "detail": "fine detail of ordinary pictures over the base's; 1 before training",
    "gap": "distance between few and many steps of the tuned model, over that of the base; 1 before training",
    "gap_detail": "fine detail at few over many steps, over the base's; 1 before training",
}
STYLE = """body{font:15px/1.4 sans-serif;margin:2em auto;max-width:70em;padding:0 1em;color:#222}table{border-collapse:collapse;margin:1em 0}
td,th{border:1px solid #ccc;padding:.3em .6em;text-align:left;vertical-align:top}.yes{background:#dff3df}.no{background:#f8dcdc}
.row{display:flex;gap:8px;flex-wrap:wrap;margin:0 0 1.2em}figure{margin:0}figcaption{font-size:12px;color:#666}
img{width:192px;image-rendering:auto}.small img{image-rendering:pixelated}h3{font-size:14px;font-weight:normal;margin:.2em 0}"""


def data_uri(picture, size=384):
    """A picture, scaled down to `size`, that stands in the page itself."""
    picture, buffer = picture.convert("RGB"), io.BytesIO()
    kind = "PNG" if max(picture.size) < 128 else "JPEG"
    picture.thumbnail((size, size))
    picture.save(buffer, kind, **({"optimize": True} if kind == "PNG" else {"quality": 88}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def report_page(record, files, prompts, images, args):
    """report.html: the verdict, every figure, and base and tuned model side by side; nothing is fetched from
    anywhere."""
    text = html.escape

    def figure(picture, label):
        return f'<figure><img src="{data_uri(picture)}" alt="{text(label)}"><figcaption>{text(label)}</figcaption></figure>'

    def rows(part, columns):
        for i, prompt in enumerate(prompts[part][: args.pictures]):
            cells = [
                figure(
                    Image.open(files[part, who, speed][i * len(files[part, who, speed]) // len(prompts[part])]), label
                )
                for who, speed, label in columns
            ]
            yield f'<h3>{text(prompt)}</h3><div class="row">{"".join(cells)}</div>'

    few, many = f"{args.num_inference_steps} steps", f"{MANY_STEPS} steps"
    verdict = [
        f'<tr class="{row["answer"].split()[0]}">'
        + "".join(f"<td>{text(row[n])}</td>" for n in ("question", "answer", "figure", "limit"))
        + "</tr>"
        for row in record["table"]
    ]
    figures = [
        f"<tr><td>{n}</td><td>{shown(v)}</td><td>{text(FIGURES[n])}</td></tr>" for n, v in record["figures"].items()
    ]
    concept = rows(
        "concept",
        [
            ("base", "few", f"base, {few}"),
            ("tuned", "few", f"tuned, {few}"),
            ("base", "many", f"base, {many}"),
            ("tuned", "many", f"tuned, {many}"),
        ],
    )
    ordinary = rows("ordinary", [("base", "few", f"base, {few}"), ("tuned", "few", f"tuned, {few}")])
    name = text(Path(args.output_dir).resolve().name)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{name}: report</title><style>{STYLE}</style></head>
<body{' class="small"' if args.resolution < 128 else ""}><h1>{name}</h1>
<table><tr><th></th><th></th><th>measured, with 95 % interval</th><th>limit</th></tr>{"".join(verdict)}</table>
<p>{record["prompts"]["concept"]} prompts with the concept and {record["prompts"]["ordinary"]} ordinary ones, {args.noise_seeds} noises each, the same for both models. Encoders:
{text(record["image_encoder"])}, {text(record["image_text_encoder"])}. The limits come from a miniature model; look at the pictures, too.</p>
<h2>Trained on</h2><div class="row">{"".join(figure(image, "training image") for image in images)}</div>
<h2>With the concept</h2>{"".join(concept)}
<h2>Ordinary prompts</h2>{"".join(ordinary)}
<h2>All figures</h2><table>{"".join(figures)}</table>
</body></html>
"""


# -------------------------------------------------------------------------------------------------------------- paper
def read_paper_prompts(path, dataset):
    """The frozen prompts of the paper's protocol: JSON lines, one for each training image, in the order of the images.

    {"paraphrase": "..", "new": ["..", "..", "..", ".."], "trigger": "sks dog", "class": "dog"}: a paraphrase of the
    caption, new prompts with the trigger, and what stands for the trigger where an image-text model reads the prompt.
    """
    rows = []
    for number, line in enumerate(dopsd.read_lines(Path(path), f"--paper_prompts {path}"), 1):
        with dopsd.blamed_on(f"--paper_prompts {path}, line {number}"):
            row = json.loads(line)
            texts = [row["paraphrase"], *row["new"], row["trigger"], row["class"]]
            if not row["new"] or not all(isinstance(text, str) and text.strip() for text in texts):
                raise ValueError("every field must hold text, and new a list of it")
            rows.append(row)
    if len(rows) != len(dataset):
        raise ValueError(
            f"--paper_prompts {path} has {len(rows)} lines for {len(dataset)} training images; give one for each."
        )
    return rows


LEVELS = {"SAME": 4, "CLOSE": 3, "RELATED": 2, "DIFFERENT": 1}
QUESTION = (
    "The first picture is a reference. Does the second picture show the same subject, or the same style where the reference is one of a style? "
    "Answer with one word: SAME, CLOSE (nearly the same), RELATED (the same kind of thing) or DIFFERENT."
)


def level_of(answer):
    """4 .. 1 of a judge's answer, or None where it is not one of the four words: "not the same" is no SAME, and two
    words are none."""
    text = re.sub(r"^\W*(the )?(answer|verdict)( is)?\W*", "", answer.strip(), flags=re.IGNORECASE)
    found = re.match(r"\W*(same|close|related|different)\b\W*(.*)", text, re.IGNORECASE | re.DOTALL)
    if not found or re.search(r"\b(same|close|related|different|not|or)\b|n't\b", found[2], re.IGNORECASE):
        return None
    return LEVELS[found[1].upper()]


def judge_dtype(args, device):
    """That of mixed precision; bf16 on a GPU without one, as 8 B weights in fp32 take over 32 GB."""
    dtype = dopsd.weight_dtype_of(args)
    return torch.bfloat16 if device.type == "cuda" and dtype == torch.float32 else dtype


class Judge:
    """A local Qwen3-VL that compares two pictures."""

    def __init__(self, args, device):
        reader = MultimodalEncoder(args.judge)
        self.tokenizer = reader.tokenizer
        self.processor = reader.image_processor
        self.size = reader.size
        self.token = reader.config.image_token_id
        quantization = dopsd.quantization_config("text_encoder", args.encoder_quantization, transformers)
        options = {"quantization_config": quantization and quantization.quant_mapping["text_encoder"]}
        options["dtype"] = judge_dtype(args, device)
        kind = transformers.Qwen3VLForConditionalGeneration
        self.model = kind.from_pretrained(args.judge, **options).to(device).eval()

    @torch.no_grad()
    def answer(self, reference, picture):
        """What it says of a reference and a picture."""
        inputs = dict(self.processor(images=[reference, picture], size=self.size, return_tensors="pt"))
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        counts = (inputs["image_grid_thw"].prod(dim=1) // self.processor.merge_size**2).tolist()
        content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": QUESTION}]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        pad = self.tokenizer.convert_ids_to_tokens(self.token)
        first, second, rest = text.split(pad)
        inputs |= self.tokenizer(first + pad * counts[0] + second + pad * counts[1] + rest, return_tensors="pt")
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == self.token).long()
        inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
        out = self.model.generate(**inputs, max_new_tokens=16, do_sample=False)
        return self.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def judge_answers(asked, args, device):
    """The judge's answer to each of the pairs `asked` of a row of the dataset and the file of a picture. Each answer is
    kept at once in OUTPUT_DIR/evaluation, and what is there is not asked again."""
    file = Path(args.output_dir) / "evaluation" / "answers.json"
    with dopsd.blamed_on(f"{file} (without it, all is asked anew)"):
        known = {**json.loads(file.read_text("utf-8"))} if file.exists() else {}
    with dopsd.blamed_on(f"--judge {args.judge}"):
        who = [args.judge, dopsd.fingerprint(args.judge, ["*.safetensors"])]
    who += [QUESTION, args.encoder_quantization, str(judge_dtype(args, device))]
    keys = [dopsd.digest_of([*who, row["image_hash"], picture.name]) for row, picture in asked]
    missing = {key: pair for key, pair in zip(keys, asked) if key not in known}
    if missing:
        blamed = functools.partial(dopsd.blamed_on, f"--judge {args.judge}")
        with explained("--encoder_quantization int8, a smaller --judge, --judge none", args.output_dir):
            with blamed():
                judge = Judge(args, device)
            for key, (row, picture) in tqdm(missing.items(), "Judging"):
                with blamed():
                    known[key] = judge.answer(dopsd.training_image(row), Image.open(picture).convert("RGB"))
                write_json(file, known)
            del judge
            free_memory()
    return [known[key] for key in keys]


def perceptual_distance(pairs, device):
    """LPIPS (VGG) of each of some pairs of PIL pictures."""
    import lpips

    network = lpips.LPIPS(net="vgg", verbose=False).to(device)
    tensor = lambda p: torch.from_numpy(np.asarray(p)).permute(2, 0, 1)[None].float().to(device) / 127.5 - 1  # noqa: E731
    with torch.no_grad():
        return [network(tensor(a), tensor(b.resize(a.size))).item() for a, b in pairs]


def paper(args, accelerator):
    """The paper's protocol with open models. Writes paper.json."""
    try:
        family, dataset = check_inputs(args)
        rows = read_paper_prompts(args.paper_prompts, dataset)
        if args.judge != "none":
            dopsd.check_source("judge", args.judge, file="config.json")
            with dopsd.blamed_on(f"--judge {args.judge}"):
                MultimodalEncoder(args.judge)
            dopsd.check_weights("judge", args.judge, [""])
    except (ValueError, OSError) as error:
        raise dopsd.InputError(error) from error
    pairs = [(i, prompt) for i, row in enumerate(rows) for prompt in (row["paraphrase"], *row["new"])]
    places = [(i, k) for i, row in enumerate(rows) for k in range(1 + len(row["new"]))]
    paths = prompt_contexts(
        family, args, dataset, [p if args.reference_column else (None, p[1]) for p in pairs], accelerator
    )
    weights = base_weights(args) + result_weights(args)
    drawings = [
        Drawing(
            path, "student", tuple(dataset[i]["bucket"]), args.seed + 100 * i + k, args.num_inference_steps, weights
        )
        for path, (i, k) in zip(paths, places)
    ]
    draw(drawings, functools.partial(load_tuned, family, args), args, accelerator)
    pictures = [Image.open(d.file(args)).convert("RGB") for d in drawings]
    images = [dopsd.training_image(row) for row in dataset]
    paraphrases = [picture for picture, (_, k) in zip(pictures, places) if k == 0]
    with encoder("image_encoder", args, accelerator) as look:
        dino = distance(look.images(images, patches=True), look.images(paraphrases, patches=True))
    figures = {"DINO-D": dino.tolist()}
    paper_record(figures, 0, args)
    with encoder("image_text_encoder", args, accelerator) as read:
        texts = [prompt.replace(rows[i]["trigger"], rows[i]["class"]) for i, prompt in pairs]
        clip = (read.images(pictures) * read.texts(texts)).sum(axis=1)
    figures["CLIP-S"] = clip.tolist()
    try:
        figures["LPIPS-D"] = perceptual_distance(list(zip(images, paraphrases)), accelerator.device)
    except Exception as error:  # of any kind: the package may be missing, what it needs, or its weights
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"LPIPS-D is left out ({reason}). It needs lpips (pip install lpips) and the weights of its network.")
    record = paper_record(figures, 0, args)
    if args.judge != "none":
        asked = [(dataset[i], d.file(args)) for d, (i, k) in zip(drawings, places) if k]
        levels = [level_of(answer) for answer in judge_answers(asked, args, accelerator.device)]
        figures["VLM-J"] = [level for level in levels if level]
        record = paper_record(figures, levels.count(None), args)
    print("\n| " + " | ".join(figures) + " |\n" + "|---" * len(figures) + "|")
    print("| " + " | ".join("none" if v is None else f"{v:.4f}" for v in record["means"].values()) + " |")
    if record["unclear_answers"]:
        print(f"{record['unclear_answers']} answers of the judge are none of its four words; they count in no mean.")
    return record


def paper_record(figures, unclear, args):
    """Writes paper.json with the figures so far, and returns what it holds."""
    record = {"means": {name: float(np.mean(v)) if v else None for name, v in figures.items()}, "figures": figures, "unclear_answers": unclear,
              "prompts": hashlib.sha256(Path(args.paper_prompts).read_bytes()).hexdigest()}  # fmt: skip
    write_json(Path(args.output_dir) / "paper.json", record)
    return record


def main(args):
    accelerator = dopsd.make_accelerator(args)
    if accelerator.num_processes > 1:
        raise dopsd.InputError("evaluate.py runs in one process: launch it with python.")
    folder = Path(args.output_dir)
    if (
        args.command != "teacher"
        and not (folder / LORA_WEIGHT_NAME).exists()
        and not (folder / "transformer").is_dir()
    ):
        raise dopsd.InputError(
            f"--output_dir {folder} holds no result of a training: neither {LORA_WEIGHT_NAME} nor transformer/."
        )
    try:
        lock = dopsd.open_output_dir(args)
    except ValueError as error:
        raise dopsd.InputError(error) from error
    with lock:  # no training in the same folder
        return {"teacher": teacher, "report": report, "paper": paper}[args.command](args, accelerator)


if __name__ == "__main__":
    try:
        dopsd.run(main, parse_args())
    except KeyboardInterrupt:
        print("\nStopped. Pictures drawn so far are kept: the same command goes on from there.", file=sys.stderr)
        sys.exit(130)
