"""Trains and measures variants of D-OPSD, and what it is compared with, on the miniatures: what curves.py and
compare.py share.

All are trained by train_dopsd_lora.py itself, with its default LoRA on the attention and feed-forward of all blocks; a
variant puts functions of its own in the place of some of the script's. Cost is counted in transformer passes, a
forward or a backward of one image. A finished run is a file in the work folder or an entry of a JSON file beside the
programs, and is not run again.

    python examples/miniature/trials.py curves       # files in build/curves become entries of curves.json
"""

import argparse
import functools
import json
import sys
import tempfile
import unittest.mock
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState

import world
from concepts import CONCEPTS, MAIN, further_scenes_of_the_world, training_pictures
from evaluate import HERE, STEPS, concept_accuracy, load_pipeline, unrelated_accuracy
from judge import Judge


sys.path.insert(0, str(HERE.parents[1]))

import train_dopsd_lora as script  # noqa: E402


K, WHOLE = 4, 5760  # states of a rollout; passes of 120 steps of 4 images at all of them
RANK, EMA_DECAY = 16, 0.999


@dataclass(frozen=True)
class Variant:
    """What differs from one state of each rollout: trained states, flags, and what takes the place of the script's
    functions.

    `stand_in` makes, of the concept's folder and a pipeline with its VAE, further functions of that kind; `cost` is
    the mean number of passes of an image where rollouts do not tell it; `folder` makes another data folder of the
    concept's.
    """

    label: str
    states: int = 1
    flags: dict = field(default_factory=dict)
    replaced: dict = field(default_factory=dict)
    stand_in: object = None
    cost: float | None = None
    folder: object = None
    rates: tuple = ()
    prior: bool = True

    def passes(self):
        """Mean passes of an image: of one whose last trained state is the k-th, k student forwards, and for each
        trained state a teacher forward and a backward."""
        if self.cost:
            return self.cost
        args = argparse.Namespace(rollout_steps=K, states_per_rollout=self.states, train_batch_size=1, seed=0)
        draw = self.replaced.get("draw_states", script.draw_states)
        drawn = draw(args, range(12_000))
        return round(float(np.mean([states[-1] + 1 + 2 * len(states) for states in drawn])), 1)


def training_flags(model, data, folder, rate, seed):
    """What all runs on a miniature have in common."""
    flags = ["--pretrained_model_name_or_path", HERE / model, "--instance_data_dir", data, "--output_dir", folder]
    flags += ["--resolution", world.RESOLUTION, "--learning_rate", rate, "--seed", seed, "--lr_scheduler", "cosine"]
    flags += ["--vlm_model_name_or_path", HERE / "vlm", "--num_inference_steps", STEPS, "--rollout_steps", K]
    return [*flags, "--report_to", "none", "--checkpointing_steps", 100_000, "--mixed_precision", "no"]


@functools.cache
def measuring(model):
    """The judge, and a pipeline that encodes the prompts, once, and is lent the transformer in training."""
    pipeline = load_pipeline(folder=HERE / model)
    encode = functools.cache(lambda prompts, encode=pipeline.encode_student: encode(list(prompts)))
    pipeline.encode_student = lambda prompts: encode(tuple(prompts))
    return Judge.from_pretrained(HERE / "judge"), pipeline


def train(model, variant, concept, setting, steps, seed, validate, work_dir):
    """Trains one LoRA; `validate` takes the place of the script's `log_validation`, after every step."""
    batch, rate = setting
    data = HERE / "concepts" / concept
    if variant.folder:
        data = variant.folder(concept, work_dir / "folders")
    with tempfile.TemporaryDirectory() as folder:
        flags = training_flags(model, data, folder, rate, seed)
        flags += ["--train_batch_size", batch, "--max_train_steps", steps, "--validation_steps", 1]
        flags += ["--context_cache_dir", work_dir / "contexts"]
        own = {"states_per_rollout": variant.states, "rank": RANK, "ema_decay": EMA_DECAY}
        own |= {"prior_prompts": HERE / "prior_prompts.txt" if variant.prior else "none"}
        own |= variant.flags
        if own["prior_prompts"] != "none":  # less than the scripts' default: most runs are short
            own = {"prior_loss_weight": 1} | own
        flags += [word for flag, value in own.items() for word in (f"--{flag}", value)]
        replaced = variant.replaced | (variant.stand_in(data, measuring(model)[1]) if variant.stand_in else {})
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        with unittest.mock.patch.multiple(script, **replaced, log_validation=validate):
            script.main(script.parse_args([str(flag) for flag in flags]))


def copying(pictures, concept):
    """Mean distance of pictures to the nearest training picture: root mean square over pixels, 0 to 1."""
    known = np.stack([np.asarray(picture, dtype=float) for picture in training_pictures(CONCEPTS[concept])]) / 255
    return float(np.mean([np.sqrt(np.square(known - p / 255).mean(axis=(1, 2, 3))).min() for p in pictures]))


def figures_of(pipeline, judge, concept, seeds, slow_steps=0, further=False):
    """Concept and unrelated prompts at four steps and, where asked for, at `slow_steps` and of `further` prompts, both
    with one noise seed."""
    results, images = concept_accuracy(pipeline, judge, CONCEPTS[concept], seeds)
    figures = {"concept": [right for right, _ in results], **unrelated_accuracy(pipeline, judge, seeds)}
    figures["copying"] = copying([picture for pictures in images for picture in pictures], concept)
    if further:
        scenes = further_scenes_of_the_world()
        figures["further"] = unrelated_accuracy(pipeline, judge, range(1), scenes=scenes)["right"]
    if slow_steps:
        results, _ = concept_accuracy(pipeline, judge, CONCEPTS[concept], range(1), steps=slow_steps)
        figures["slow"] = [results[0][0], unrelated_accuracy(pipeline, judge, range(1), steps=slow_steps)["right"][0]]
    return figures


def write(record, figures):
    """Writes a finished run aside and renames it: one that is stopped leaves no half."""
    aside = record.with_suffix(".tmp")
    aside.write_text(json.dumps(figures))
    aside.replace(record)


def prefix_of(model):
    """With which the names of the runs on a miniature begin."""
    return "" if model == "model" else f"{model}-"


def run(variants, job):
    """Trains one LoRA, measures it on its way, and returns and stores the figures at each point."""
    model, name, share, concept, setting, seed, measured, args = job
    record = (
        args.work_dir
        / f"{prefix_of(model)}{name}-{share:g}-{concept}-b{setting[0]}-{setting[1]:g}-seed{seed}{measured}.json"
    )
    finished = json.loads(args.finished.read_text())
    if record.stem in finished:
        return job[:-1], finished[record.stem]
    if not record.exists():
        torch.set_num_threads(1)
        variant, points = variants[name], []
        each = variant.passes() * setting[0]
        steps = max(1, round(share * WHOLE / each))
        # on the way two noise seeds will do
        seeds = {round(part * steps): 2 for part in (0.2, 0.4, 0.6) if measured == "-curve"} | {steps: args.seeds}

        def measure(pipeline, teacher, dataset, cache, flags, accelerator, step):
            if step in seeds:
                if step == steps:
                    pipeline.transformer.fuse_lora()  # draws the same, faster
                judge, lent = measuring(model)
                lent.transformer = pipeline.transformer
                figures = figures_of(
                    lent,
                    judge,
                    concept,
                    range(seeds[step]),
                    30 if measured == "-whole" and seed == 0 and concept in MAIN else 0,
                    measured == "-whole",
                )
                points.append({"step": step, "passes": each * step, **figures})

        train(model, variant, concept, setting, steps, seed, measure, args.work_dir)
        write(record, points)
    return job[:-1], json.loads(record.read_text())


def shown(point):
    """concept / unrelated right, per cent."""
    return " / ".join(f"{100 * np.mean(point[key]):.1f}" for key in ("concept", "right"))


def worth(point):
    """By which a setting is chosen: the sum of concept accuracy and unrelated accuracy."""
    return sum(np.mean(point[key]) for key in ("concept", "right"))


def add_arguments(parser, name, seeds=4):
    """What both programs are asked; `name` is that of work folder and of the file of finished runs."""
    parser.add_argument("--work_dir", type=type(HERE), default=HERE.parents[1] / "build" / name)
    parser.add_argument("--seeds", type=int, default=seeds, help="noise seeds of a measurement")
    parser.add_argument("--processes", type=int, default=1, help="runs at once, of one thread each")
    parser.set_defaults(finished=HERE / f"{name}.json")


def rounded(value):
    """`value`, which JSON can hold, with six digits of its numbers."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return (
        [rounded(part) for part in value]
        if isinstance(value, list)
        else float(f"{value:.6g}")
        if isinstance(value, float)
        else value
    )


def collect(work_dir, finished):
    """Takes the finished runs of a work folder into the file `finished`, one on each line."""
    known = json.loads(finished.read_text()) if finished.exists() else {}
    runs = known | {path.stem: rounded(json.loads(path.read_text())) for path in work_dir.glob("*.json")}
    finished.write_text(
        "{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(runs[name])}" for name in sorted(runs)) + "\n}\n"
    )


if __name__ == "__main__":
    collect(HERE.parents[1] / "build" / sys.argv[1], HERE / f"{sys.argv[1]}.json")
