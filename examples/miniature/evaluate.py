"""Measures miniature models with the judge, at four steps.

python examples/miniature/evaluate.py teacher                       # teacher and student before any training
python examples/miniature/evaluate.py gap --base build/miniature/base/pipeline    # base against step-distilled model
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.evaluate import detail  # first: it silences what libraries say while they are imported


# isort: split
import diffusers
import numpy as np
import torch
import transformers
from PIL import Image

import world
from concepts import CONCEPTS, held_out_scenes, training_pictures, unrelated_scenes
from judge import Judge, accuracy, frechet
from pipeline_dopsd import family_of


for library in (diffusers, transformers):
    library.utils.logging.disable_progress_bar()

HERE = Path(__file__).resolve().parent
STEPS = 4
UNRELATED = ["shape", "colour", "pattern", "background", "position"]


def load_pipeline(lora=None, folder=HERE / "model"):
    """The miniature in fp32, with the LoRA of a training folder if one is given."""
    pipeline = family_of(str(folder)).from_pretrained(folder, dtype=torch.float32, num_inference_steps=STEPS)
    pipeline.set_progress_bar_config(disable=True)
    if lora:
        pipeline.load_lora_weights(str(lora))
    return pipeline


@torch.no_grad()
def sample(pipeline, contexts, seed, steps=STEPS, negative=None, guidance=0.0):
    """One picture (64, 64, 3) of uint8 per context; the noise of picture i depends on (seed, i) alone. Guidance:
    Z-Image alone."""
    size, images = world.RESOLUTION, []
    for start in range(0, len(contexts), 64):
        chunk = contexts[start : start + 64]
        generators = [torch.Generator().manual_seed(10_000 * seed + start + i) for i in range(len(chunk))]
        noise = torch.cat([pipeline.initial_noise(size, size, g) for g in generators])
        if guidance:
            embeds, unwanted = ([c["prompt_embeds"] for c in cs] for cs in (chunk, negative * len(chunk)))
            images += pipeline(
                prompt_embeds=embeds, negative_prompt_embeds=unwanted, latents=noise, height=size, width=size,
                num_inference_steps=steps, guidance_scale=guidance,
            ).images  # fmt: skip
        else:
            images += pipeline.sample(pipeline.transformer, chunk, noise, steps)
    return [np.asarray(image) for image in images]


def captions(scenes, concept=None):
    return [concept.caption(s) if concept else world.caption(s) for s in scenes]


def spread(values):
    """mean and standard deviation over seeds, in per cent."""
    return f"{100 * np.mean(values):.1f} ± {100 * np.std(values):.1f}"


def concept_accuracy(pipeline, judge, concept, seeds, contexts=None, steps=STEPS):
    """Per seed, the share of held-out scenes in which all that makes up the concept is right, and the share for every
    attribute of the object and the style alone; and the pictures."""
    scenes = held_out_scenes(concept)
    contexts = contexts or pipeline.encode_student(captions(scenes, concept))
    images = [sample(pipeline, contexts, seed, steps) for seed in seeds]
    each = [accuracy(judge, pictures, scenes, ["shape", "colour", "pattern", "style"])[1] for pictures in images]
    return [(accuracy(judge, p, scenes, concept.shows)[0], shares) for p, shares in zip(images, each)], images


def mean_detail(images):
    """Mean of `detail` over pictures."""
    return float(np.mean([detail(image) for image in images]))


def unrelated_accuracy(pipeline, judge, seeds, steps=STEPS, scenes=None):
    """What a fine-tuned model still does with unrelated prompts: per seed, the share of scenes drawn right in shape,
    colour, pattern, background and position (`right`); the Frechet distance of all pictures to fresh drawings of the
    same scenes (`frechet`); the fine detail of the pictures relative to those drawings (`detail`)."""
    scenes = scenes or unrelated_scenes()
    contexts = pipeline.encode_student(captions(scenes))
    images = [sample(pipeline, contexts, seed, steps) for seed in seeds]
    real = [world.render(s, 50_000 + 100 * seed + i) for seed in seeds for i, s in enumerate(scenes)]
    shares = [accuracy(judge, pictures, scenes, UNRELATED)[0] for pictures in images]
    flat = [p for pictures in images for p in pictures]
    return {"right": shares, "frechet": frechet(judge, flat, real), "detail": mean_detail(flat) / mean_detail(real)}


def teacher_contexts(pipeline, concept, teacher_context="vlm"):
    """Contexts of the held-out prompts with training picture i mod 4."""
    pictures, prompts = training_pictures(concept), captions(held_out_scenes(concept), concept)
    return pipeline.encode_teacher(
        prompts, [pictures[i % len(pictures)] for i in range(len(prompts))], teacher_context
    )


def report_teacher(args):
    judge, pipeline = Judge.from_pretrained(HERE / "judge"), load_pipeline(folder=args.model)
    pipeline.load_multimodal_encoder(str(HERE / "vlm"))
    candidates = dict(CONCEPTS)
    if args.all:
        for shape in world.PICTURED_SHAPES + world.NEW_SHAPES:
            candidates[f"green rings {shape}"] = replace(
                CONCEPTS["arrow"], shape=shape, colour="green", pattern="rings"
            )
    print("| concept | context | right | each attribute |\n|---|---|---|---|")
    for name, concept in candidates.items():
        contexts = {
            "student": None,
            **{f"teacher, {c}": teacher_contexts(pipeline, concept, c) for c in pipeline.teacher_contexts},
        }
        for who, context in contexts.items():
            results, _ = concept_accuracy(pipeline, judge, concept, range(args.seeds), context)
            each = {
                a: np.mean([shares[a] for _, shares in results])
                for a in ("shape", "colour", "pattern", *concept.shows)
            }
            each = ", ".join(f"{a} {100 * v:.0f}" for a, v in each.items())
            print(f"| {name} | {who} | {spread([s for s, _ in results])} | {each} |", flush=True)
    kept = unrelated_accuracy(pipeline, judge, range(args.seeds))
    print(
        f"\nunrelated prompts: {spread(kept['right'])} right, Frechet distance {kept['frechet']:.0f}, detail {kept['detail']:.2f}"
    )


def report_gap(args):
    """The base at 50 steps with guidance, the base at 4 steps with and without, the step-distilled model at 4
    steps."""
    judge = Judge.from_pretrained(HERE / "judge")
    distilled, base = load_pipeline(), load_pipeline(folder=args.base)
    scenes = unrelated_scenes(48)
    contexts, negative = base.encode_student(captions(scenes)), base.encode_student([""])
    real = [world.render(s, 70_000 + 100 * seed + i) for seed in range(args.seeds) for i, s in enumerate(scenes)]
    runs = {
        "base, 50 steps, guidance 1.5": (base, 50, 1.5),
        "base, 4 steps, guidance 1.5": (base, 4, 1.5),
        "base, 4 steps, no guidance": (base, 4, 0.0),
        "step-distilled, 4 steps, no guidance": (distilled, 4, 0.0),
    }
    # the base's own row compares two sets of different seeds: the floor of the distance
    others = [p for seed in range(args.seeds, 2 * args.seeds) for p in sample(base, contexts, seed, 50, negative, 1.5)]
    print(
        "| model | all attributes right | fine detail | Frechet distance to the base at 50 steps | to real pictures |"
    )
    print(f"|---|---|---|---|---|\n| real pictures | {spread([accuracy(judge, real, scenes * args.seeds, UNRELATED)[0]])} "
          f"| 1.00 | {frechet(judge, real, others):.0f} | |")  # fmt: skip
    rows = []
    for name, (pipeline, steps, guidance) in runs.items():
        images = [sample(pipeline, contexts, seed, steps, negative, guidance) for seed in range(args.seeds)]
        shares = [accuracy(judge, pictures, scenes, UNRELATED)[0] for pictures in images]
        flat = [p for pictures in images for p in pictures]
        figures = f"{mean_detail(flat) / mean_detail(real):.2f} | {frechet(judge, flat, others):.0f} | {frechet(judge, flat, real):.0f}"
        print(f"| {name} | {spread(shares)} | {figures} |", flush=True)
        rows.append(np.concatenate(images[0][:12], 1))
    picture = Image.fromarray(np.concatenate(rows, 0))
    picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST).save(args.picture)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["teacher", "gap"])
    parser.add_argument("--model", type=Path, default=HERE / "model", help="teacher: step-distilled pipeline")
    parser.add_argument("--base", help="gap: folder of the undistilled base pipeline")
    parser.add_argument("--picture", default="gap.png", help="gap: where the picture is written")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--all", action="store_true", help="teacher: also every shape that no caption names")
    args = parser.parse_args()
    {"teacher": report_teacher, "gap": report_gap}[args.what](args)


if __name__ == "__main__":
    main()
