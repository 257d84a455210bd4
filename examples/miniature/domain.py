"""Full fine-tuning on a whole domain: 500 pictures in a style that the miniature has never seen. D-OPSD beside SFT.

    python examples/miniature/domain.py                    # captions name the style
    python examples/miniature/domain.py --domain unnamed   # they do not: all pictures are to be in it

All methods train all weights with the same optimiser, pictures, captions and batches of 8, for 6,400 transformer passes (D-OPSD
takes 4.5 an image in the mean, SFT 2), at two learning rates; further training seeds are trained at the better one. Measured at
four steps: style and content (shape, colour, pattern and position) of new prompts of the domain, the Frechet distance of their
pictures to fresh drawings, and what became of unrelated prompts. trials.py says where finished runs are kept.
"""

import argparse
import functools
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

import trials
import world
from compare import interval
from concepts import CONCEPTS, unrelated_scenes
from evaluate import HERE, STEPS, captions, load_pipeline, sample, unrelated_accuracy
from judge import Judge, accuracy, frechet


ROOT = HERE.parents[1]
STYLE = CONCEPTS["ember"]
CONTENT = ["shape", "colour", "pattern", "position"]
PICTURES, PROMPTS, FRESH, BATCH, PASSES = 500, 250, 2000, 8, 6400


@dataclass(frozen=True)
class Method:
    """`cost`: passes of an image."""

    label: str
    cost: float = 4.5
    flags: dict = field(default_factory=dict)
    prior: bool = False


METHODS = {
    "prior": Method("D-OPSD with prior prompts", prior=True),
    "dopsd": Method("D-OPSD without prior prompts"),
    "sft": Method("SFT", cost=2),
    "fast": Method("D-OPSD without prior prompts, decay .99", flags={"ema_decay": 0.99}),
    "styled": Method("D-OPSD with prior prompts, half of them in the style", prior=True),
    "long": Method("D-OPSD without prior prompts, K = 8", cost=6.5, flags={"rollout_steps": 8}),
}


# ------------------------------------------------------------------------------------------------------------ the data
def scenes_of(seed, count):
    rng = np.random.default_rng([6, seed])
    return [STYLE.scene(rng) for _ in range(count)]


def caption_of(domain, scene, rng=None):
    return STYLE.caption(scene, rng) if domain == "named" else world.caption(scene, rng)


def write_data(domain, folder):
    """The training pictures, with one caption each that drops attributes at random."""
    if folder.exists():
        return
    aside = folder.with_suffix(".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    rng = np.random.default_rng([6, 100])
    for i, scene in enumerate(scenes_of(0, PICTURES)):
        Image.fromarray(world.render(scene, 200_000 + i)).save(aside / f"{i:03}.png")
        (aside / f"{i:03}.txt").write_text(caption_of(domain, scene, rng))
    aside.rename(folder)


# ------------------------------------------------------------------------------------------------------------- figures
@functools.cache
def drawings():
    return [world.render(scene, 300_000 + i) for i, scene in enumerate(scenes_of(2, FRESH))]


def measure(folder, domain, seeds):
    """For each noise seed, shares that are right of the domain's prompts and of others; and two distances."""
    judge, pipeline = Judge.from_pretrained(HERE / "judge"), load_pipeline(folder=folder)
    scenes, others = scenes_of(1, PROMPTS), unrelated_scenes()
    contexts = pipeline.encode_student([caption_of(domain, scene) for scene in scenes])
    images = [sample(pipeline, contexts, seed) for seed in seeds]
    outside = [sample(pipeline, pipeline.encode_student(captions(others)), seed) for seed in seeds]
    styled = [STYLE.scene(np.random.default_rng(0))] * len(others)
    found = {
        "style": [accuracy(judge, pictures, scenes, ["style"])[0] for pictures in images],
        "content": [accuracy(judge, pictures, scenes, CONTENT)[0] for pictures in images],
        "style outside": [accuracy(judge, pictures, styled, ["style"])[0] for pictures in outside],
        "content outside": [accuracy(judge, pictures, others, CONTENT)[0] for pictures in outside],
        "distance": frechet(judge, [picture for pictures in images for picture in pictures], drawings()),
    }
    return found | {"unrelated": unrelated_accuracy(pipeline, judge, seeds)["right"]}


def teacher_figures(domain, seeds):
    """Of what the teacher draws for the first training rows, each of which it is shown."""
    judge, pipeline = Judge.from_pretrained(HERE / "judge"), load_pipeline()
    pipeline.load_multimodal_encoder(str(HERE / "vlm"))
    scenes = scenes_of(0, PROMPTS)
    pictures = [Image.fromarray(world.render(scene, 200_000 + i)) for i, scene in enumerate(scenes)]
    contexts = []
    for i in range(0, PROMPTS, 50):
        prompts = [caption_of(domain, scene) for scene in scenes[i : i + 50]]
        contexts += pipeline.encode_teacher(prompts, pictures[i : i + 50])
    images = [sample(pipeline, contexts, seed) for seed in seeds]
    return {
        "style": [accuracy(judge, pictures, scenes, ["style"])[0] for pictures in images],
        "content": [accuracy(judge, pictures, scenes, CONTENT)[0] for pictures in images],
    }


# ------------------------------------------------------------------------------------------------------------ trainings
def train(domain, name, rate, seed, args, folder):
    """Runs the training script in a process of its own."""
    method, prompts = METHODS[name], HERE / "prior_prompts.txt"
    if name == "styled":
        ordinary = prompts.read_text().splitlines()
        prompts = args.work_dir / "prior_styled.txt"
        prompts.write_text("\n".join([*ordinary, *(f"{prompt} in {STYLE.word} style" for prompt in ordinary)]))
    flags = {"pretrained_model_name_or_path": HERE / "model", "mixed_precision": "no", "seed": seed}
    flags |= {"instance_data_dir": args.work_dir / f"data-{domain}", "output_dir": folder, "learning_rate": rate}
    flags |= {"train_batch_size": BATCH, "max_train_steps": round(PASSES / BATCH / method.cost)}
    flags |= {"num_inference_steps": STEPS, "resolution": world.RESOLUTION}
    if name == "sft":
        script = [ROOT / "examples" / "train_sft.py", "--full"]
    else:
        script = [ROOT / "train_dopsd_full.py", "--overwrite_output_dir"]
        flags |= {"vlm_model_name_or_path": HERE / "vlm", "report_to": "none", "checkpointing_steps": 100_000}
        flags |= {"context_cache_dir": args.work_dir / "contexts", "validation_steps": 0, "ema_decay": 0.999}
        flags |= {"prior_prompts": prompts, "prior_loss_weight": 1} if method.prior else {"prior_prompts": "none"}
        flags |= method.flags
    words = [str(word) for flag, value in flags.items() for word in (f"--{flag}", value)]
    threads = os.environ | {"OMP_NUM_THREADS": "1"} if args.processes > 1 else None
    subprocess.run([sys.executable, *map(str, script), *words], check=True, env=threads)


def run(job):
    """Trains and measures one model, unless that was done; its weights are not kept."""
    domain, name, rate, seed, args = job
    record = args.work_dir / f"{domain}-{name}-{rate:g}-seed{seed}.json"
    finished = json.loads(args.finished.read_text()) if args.finished.exists() else {}
    if record.stem not in finished and not record.exists():
        if args.processes > 1:
            torch.set_num_threads(1)
        folder = record.with_suffix("")
        if name != "before":
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
            train(domain, name, rate, seed, args, folder)
        trials.write(record, measure(HERE / "model" if name == "before" else folder, domain, range(args.seeds)))
        shutil.rmtree(folder, ignore_errors=True)
    return job[:-1], finished.get(record.stem) or json.loads(record.read_text())


def worth(domain, figures):
    """By which a learning rate is chosen."""
    kept = "unrelated" if domain == "named" else "content outside"
    return sum(np.mean(figures[name]) for name in ("style", "content", kept))


def print_table(domain, rows):
    columns = ["style", "content", "distance", "unrelated"]
    columns = columns if domain == "named" else [*columns[:3], "style outside", "content outside"]
    print(f"\n{domain}\n\n| | learning rate | {' | '.join(columns)} |\n" + "|---" * (len(columns) + 2) + "|")
    for label, rate, seeds in rows:
        cells = []
        for name in columns:
            values = [100 * np.mean(f[name]) if isinstance(f[name], list) else f[name] for f in seeds if name in f]
            cells.append(interval(values, 0 if name == "distance" else 1) if values else "")
        print(f"| {label} | {rate} | {' | '.join(cells)} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", choices=["named", "unnamed"], default="named")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 3e-4])
    parser.add_argument("--training_seeds", type=int, default=3)
    trials.add_arguments(parser, "domain")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    write_data(args.domain, args.work_dir / f"data-{args.domain}")
    found = {}
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        jobs = [("before", 0.0), *((name, rate) for name in args.methods for rate in args.rates)]
        for (_, name, rate, _), figures in pool.map(run, [(args.domain, *job, 0, args) for job in jobs]):
            found[name, rate] = [figures]
        chosen = [max(args.rates, key=lambda rate: worth(args.domain, *found[name, rate])) for name in args.methods]
        jobs = [(*key, seed) for key in zip(args.methods, chosen) for seed in range(1, args.training_seeds)]
        for (_, name, rate, _), figures in pool.map(run, [(args.domain, *job, args) for job in jobs]):
            found[name, rate].append(figures)
    rows = [("before", "", found.pop(("before", 0.0)))]
    rows += [("the teacher, shown the pictures", "", [teacher_figures(args.domain, range(args.seeds))])]
    rows += [(METHODS[name].label, f"{rate:g}", seeds) for (name, rate), seeds in found.items()]
    print_table(args.domain, rows)


if __name__ == "__main__":
    main()
