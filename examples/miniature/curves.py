"""Variants of D-OPSD on the miniatures at equal cost, as learning curves: which states are trained, with what weights.

    python examples/miniature/curves.py --work_dir build/curves                      # every table, and curves.png
    python examples/miniature/curves.py --questions fifth noise                      # some of them

The LoRA is the scripts' default one, on the attention and feed-forward of all blocks. Cost is counted in transformer passes, a
forward or a backward of one image: of an image whose last trained state is the k-th, k student forwards, and for each trained
state a teacher forward and a backward. A whole run has 120 steps of 4 images with all 4 states, 5,760 passes; each question names the share of it that
its variants get. On one concept, every variant is trained with the same grid of batch sizes and learning rates; its best setting (the
highest sum of concept accuracy and unrelated accuracy at the end) is trained on the other concepts and with further seeds.
A finished run is one file in --work_dir, or an entry of curves.json, and is not run again.
"""

import argparse
import functools
import itertools
import json
import multiprocessing
import sys
import tempfile
import unittest.mock
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image, ImageDraw

from compare import DOPSD_FLAGS, best_rate, training_flags
from concepts import CONCEPTS
from evaluate import HERE, concept_accuracy, load_pipeline, unrelated_accuracy
from judge import Judge


sys.path.insert(0, str(HERE.parents[1]))

import train_dopsd_lora as script  # noqa: E402


K, WHOLE, SEARCHED = 4, 5760, "cored_house"
FINISHED = HERE / "curves.json"
SIGMAS = [1.0, 0.9, 0.75, 0.5]  # of the four states
draw_states, state_loss = script.draw_states, script.state_loss


# ------------------------------------------------------------------------------------------------------------ variants
def always(*states):
    """A draw that gives every image the same states."""
    return lambda args, micro_step, process, num_processes: [list(states)] * args.train_batch_size


def independent(args, micro_step, process, num_processes):
    """One state for every image, drawn without regard to the others."""
    return np.random.default_rng([args.seed, 2**41, micro_step]).integers(K, size=(args.train_batch_size, 1)).tolist()


def leaning(shares):
    """A draw of one state for every image, state k in `shares[k]` of sum(shares) consecutive images."""
    deck = np.repeat(np.arange(K), shares)

    def draw(args, micro_step, process, num_processes):
        places = [divmod(micro_step * args.train_batch_size + slot, len(deck)) for slot in range(args.train_batch_size)]
        return [[int(np.random.default_rng([args.seed, 2**41, cycle]).permutation(deck)[place])] for cycle, place in places]

    return draw


def weighted(weights):
    """The loss with a weight for each state, which its sigma tells."""

    def loss(student_velocity, teacher_velocity, sigma, weighting):
        states = (sigma[:, None] - sigma.new_tensor(SIGMAS)).abs().argmin(dim=1)
        return sigma.new_tensor(weights)[states] * state_loss(student_velocity, teacher_velocity, sigma, weighting)

    return loss


def magnitude_and_direction(student_velocity, teacher_velocity, sigma, weighting):
    """.5 (|p| - |t|)^2 + 2 |p| |t| (1 - cos), |p| without gradient in the second term: with 1 for .5, it has the value of the loss."""
    p, t = student_velocity.flatten(1), teacher_velocity.detach().flatten(1)
    lengths, wanted = p.norm(dim=1), t.norm(dim=1)
    direction = 2 * lengths.detach() * wanted * (1 - torch.cosine_similarity(p, t))
    return (0.5 * (lengths - wanted).square() + direction) / p.shape[1]


class SlowingTeacher(script.LoRATeacher):
    """A decay of .999 in the first half of 128 steps and of .9999 in the second."""

    steps = 0

    def step(self):
        self.steps += 1
        self.decay = 0.999 if self.steps <= 64 else 0.9999
        super().step()


@dataclass(frozen=True)
class Variant:
    """What differs from M = 1: trained states per rollout, flags of the script, and what takes the place of its functions."""

    label: str
    states: int = 1
    flags: dict = field(default_factory=dict)
    draw: object = draw_states
    loss: object = state_loss
    teacher: object = script.LoRATeacher

    def passes(self):
        """Mean passes of an image."""
        args = argparse.Namespace(rollout_steps=K, states_per_rollout=self.states, train_batch_size=1, seed=0)
        drawn = [self.draw(args, step, 0, 1)[0] for step in range(12_000)]
        return round(float(np.mean([states[-1] + 1 + 2 * len(states) for states in drawn])), 1)


EARLY, LATE = [4, 3, 2, 1], [1, 2, 3, 4]
VARIANTS = {
    "m4": Variant("M = 4", 4),
    "m2": Variant("M = 2", 2),
    "m1": Variant("M = 1"),
    "independent": Variant("M = 1, independent draws", draw=independent),
    "first": Variant("first state only", draw=always(0)),
    "first_two": Variant("first two states", 2, draw=always(0, 1)),
    "early": Variant("M = 1, early states more often (4:3:2:1)", draw=leaning(EARLY)),
    "early_exact": Variant("the same, weights keep the expectation", draw=leaning(EARLY), loss=weighted([2.5 / s for s in EARLY])),
    "late": Variant("M = 1, late states more often (1:2:3:4)", draw=leaning(LATE)),
    "late_exact": Variant("the same, weights keep the expectation", draw=leaning(LATE), loss=weighted([2.5 / s for s in LATE])),
    "weights": Variant("M = 1, weights 8:4:2:1", loss=weighted([w / 3.75 for w in (8, 4, 2, 1)])),
    "direction": Variant("M = 1, magnitude and direction apart", loss=magnitude_and_direction),
    "ema99": Variant("M = 1, --ema_decay 0.99", flags={"ema_decay": 0.99}),
    "ema9999": Variant("M = 1, --ema_decay 0.9999", flags={"ema_decay": 0.9999}),
    "ema_then": Variant("M = 1, decay 0.999, then 0.9999", teacher=SlowingTeacher),
    "rank4": Variant("M = 1, --rank 4", flags={"rank": 4}),
    "rank64": Variant("M = 1, --rank 64", flags={"rank": 64}),
    "prior2": Variant("M = 1, --prior_every 2", flags={"prior_every": 2}),
    "prior5": Variant("M = 1, --prior_every 5", flags={"prior_every": 5}),
}  # fmt: skip


@dataclass(frozen=True)
class Question:
    """Variants, each with its share of the whole passes, the settings that are searched, and the training seeds."""

    title: str
    runs: list
    batches: tuple = (2,)
    rates: tuple = (1e-3, 2e-3)
    seeds: int = 3
    curves: bool = False
    model: str = "model"

    @property
    def settings(self):
        return list(itertools.product(self.batches, self.rates))


QUESTIONS = {
    "fifth": Question(
        "One, two and all of the states for a fifth of the passes, and all of them for all passes",
        [("m1", 0.2), ("m2", 0.2), ("m4", 0.2), ("m4", 1.0)], (1, 2, 4), (5e-4, 1e-3, 2e-3), curves=True,
    ),
    "klein": Question(
        "The same on klein's miniature", [("m1", 0.2), ("m4", 1.0)], (2, 4), curves=True, model="klein"
    ),
    "variants": Question("Variants of one state for a fifth of the passes", [(n, 0.2) for n in VARIANTS if n not in ("m4", "m2")]),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- runs
@functools.cache
def measuring(model):
    """The judge, and a pipeline that encodes the prompts and is lent the transformer in training."""
    return Judge.from_pretrained(HERE / "judge"), load_pipeline(folder=HERE / model)


def train(model, variant, concept, setting, steps, seed, validate, args):
    """Trains one LoRA; `validate` takes the place of the script's `log_validation`, after every step."""
    batch, rate = setting
    with tempfile.TemporaryDirectory() as folder:
        flags = training_flags(model, HERE / "concepts" / concept, folder, rate, seed)
        flags += ["--train_batch_size", batch, "--max_train_steps", steps, "--validation_steps", 1, *DOPSD_FLAGS]
        flags += ["--context_cache_dir", args.work_dir / "contexts", "--prior_prompts", HERE / "prior_prompts.txt"]
        own = {"rollout_steps": K, "states_per_rollout": variant.states, "rank": 16, "ema_decay": 0.999, **variant.flags}
        flags += [word for flag, value in own.items() for word in (f"--{flag}", value)]
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        replaced = {
            "log_validation": validate, "draw_states": variant.draw, "state_loss": variant.loss, "LoRATeacher": variant.teacher,
        }  # fmt: skip
        with unittest.mock.patch.multiple(script, **replaced):
            script.main(script.parse_args([str(flag) for flag in flags]))


def run(job):
    """Trains one LoRA, measures it on its way, and returns and stores the figures at each point."""
    model, name, share, concept, setting, seed, curve, args = job
    prefix, curved = "" if model == "model" else f"{model}-", "-curve" if curve else ""
    record = args.work_dir / f"{prefix}{name}-{share:g}-{concept}-b{setting[0]}-{setting[1]:g}-seed{seed}{curved}.json"
    finished = json.loads(FINISHED.read_text())
    if record.stem in finished:
        return job[:-1], finished[record.stem]
    if not record.exists():
        torch.set_num_threads(1)
        each, points = VARIANTS[name].passes() * setting[0], []
        steps = max(1, round(share * WHOLE / each))
        # on the way two noise seeds will do
        seeds = {round(part * steps): 2 for part in (0.2, 0.4, 0.6) if curve} | {steps: args.seeds}

        def measure(pipeline, teacher, dataset, cache, flags, accelerator, step):
            if step in seeds:
                judge, lent = measuring(model)
                lent.transformer, noises = pipeline.transformer, range(seeds[step])
                results, _ = concept_accuracy(lent, judge, CONCEPTS[concept], noises)
                figures = {"concept": [right for right, _ in results], **unrelated_accuracy(lent, judge, noises)}
                points.append({"step": step, "passes": each * step, **figures})

        train(model, VARIANTS[name], concept, setting, steps, seed, measure, args)
        record.write_text(json.dumps(points))
    return job[:-1], json.loads(record.read_text())


def answer(question, pool, args):
    """Searches each variant's setting and trains it; returns the settings and, by variant and concept, the runs' points."""
    results, runs = {}, {entry: {concept: [] for concept in CONCEPTS} for entry in question.runs}
    jobs = [(question.model, *entry, SEARCHED, setting, 0, False, args) for entry in question.runs for setting in question.settings]
    for (_, name, share, concept, setting, *_), points in pool.imap_unordered(run, jobs):
        results[(name, share), concept, setting, 0] = points[-1]
        print(name, share, concept, *setting, shown(points[-1]), flush=True)
    best = {entry: best_rate(results, entry, SEARCHED, question.settings) for entry in question.runs}
    jobs = [
        (question.model, *entry, concept, best[entry], seed, question.curves and seed == 0, args)
        for seed in range(question.seeds) for entry in question.runs for concept in CONCEPTS
    ]  # fmt: skip
    for (_, name, share, concept, setting, seed, _), points in pool.imap(run, jobs):
        runs[name, share][concept].append(points)
        print(name, share, concept, *setting, f"seed {seed}", shown(points[-1]), flush=True)
    return results, best, runs


# --------------------------------------------------------------------------------------------------------------- report
def shown(point):
    """concept / unrelated right, per cent."""
    return " / ".join(f"{100 * np.mean(point[key]):.1f}" for key in ("concept", "right"))


def cell(ends):
    """The mean of several runs' ends and, of three or more, the standard deviation over them."""
    texts = []
    for key in ("concept", "right"):
        values = [100 * np.mean(point[key]) for point in ends]
        texts.append(f"{np.mean(values):.1f}" + (f" ± {np.std(values):.1f}" if len(values) > 2 else ""))
    return " / ".join(texts)


def print_tables(question, results, best, runs):
    print(f"\n{question.title}: concept right / unrelated right, per cent; training seeds: {question.seeds}\n")
    print(f"| | passes of an image | share of {WHOLE} | batch | learning rate | {' | '.join(CONCEPTS)} | mean | fine detail |")
    print("|---" * (7 + len(CONCEPTS)) + "|")
    for (name, share), found in runs.items():
        ends = {concept: [points[-1] for points in several] for concept, several in found.items()}
        # one mean over the concepts for each training seed
        means = [{key: np.mean([np.mean(p[key]) for p in points]) for key in ("concept", "right")} for points in zip(*ends.values())]
        batch, rate = best[name, share]
        row = [VARIANTS[name].label, f"{VARIANTS[name].passes():g}", f"{share:g}", batch, f"{rate:g}", *map(cell, ends.values())]
        row += [cell(means), f"{np.mean([p['detail'] for points in ends.values() for p in points]):.2f}"]
        print(f"| {' | '.join(map(str, row))} |")
    print(f"\nThe search on {SEARCHED}, training seed 0:\n")
    print("| | share | " + " | ".join(f"batch {b}, {r:g}" for b, r in question.settings) + " |\n|---|---" + "|---" * len(question.settings) + "|")
    for name, share in runs:
        cells = [shown(results[(name, share), SEARCHED, setting, 0]) for setting in question.settings]
        print(f"| {VARIANTS[name].label} | {share:g} | {' | '.join(cells)} |")


def draw_curves(questions, path):
    """A row of panels for each question, one panel for each concept: full lines the concept, thin ones unrelated prompts."""
    width, height, gap, colours = 330, 220, 45, ["black", "red", "blue", "green"]
    sheet = Image.new("RGB", (len(CONCEPTS) * (width + gap) + gap, len(questions) * (height + 2 * gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (question, runs) in enumerate(questions):
        for column, concept in enumerate(CONCEPTS):
            left, top = gap + column * (width + gap), gap + row * (height + 2 * gap)
            at = lambda passes, right: (left + passes / WHOLE * width, top + height * (1 - right))  # noqa: E731, B023
            draw.rectangle([*at(0, 1), *at(WHOLE, 0)], outline="grey")
            draw.text((left, top - 30), f"{concept}: per cent right over passes (0 to {WHOLE})", fill="black")
            for share in (0.5, 1.0):
                draw.text((left - 25, at(0, share)[1] - 5), f"{100 * share:.0f}", fill="grey")
            for number, ((name, share), found) in enumerate(runs.items()):
                draw.text((left + 82 * number, top - 15), f"{VARIANTS[name].label}, {share:g}", fill=colours[number])
                curve = found[concept][0]
                for key, thickness in (("concept", 3), ("right", 1)):
                    draw.line([at(p["passes"], np.mean(p[key])) for p in curve], fill=colours[number], width=thickness)
    sheet.save(path)


# ---------------------------------------------------------------------------------------------------------------- noise
def print_noise(args, batches=12, warm_up=40):
    """How far gradients of batches of 4 lie from their mean, half-way through a short training of M = 1 on SEARCHED."""
    record, figures = args.work_dir / "noise.json", json.loads(FINISHED.read_text()).get("noise", {})
    if not figures and not record.exists():

        def measure(pipeline, teacher, dataset, cache, flags, accelerator, step):
            if step != warm_up:
                return
            rows, layouts = dataset.select_columns(["captions", "bucket", "image_hash", "reference_hashes"]), script.layouts_of(dataset, flags)
            parameters = [p for p in pipeline.transformer.parameters() if p.requires_grad]
            gradients = []  # of each image of each batch and each state
            for place in range(batches):
                for draw in script.draw_batch(layouts, 4, 10**6 + place, 0, 1, 0):
                    batch = *script.make_batch(pipeline, rows, cache, [draw], [], flags, "cpu"), [list(range(K))]
                    losses = script.rollout(pipeline, pipeline.transformer, teacher, batch, flags, accelerator)
                    gradients += [torch.cat([g.flatten() for g in torch.autograd.grad(loss.sum(), parameters)]) for _, loss in losses]
            g = torch.stack(gradients).view(batches, 4, K, -1)
            whole = g.mean(dim=(1, 2))
            orders = [list(order) for order in itertools.permutations(range(K))]
            balanced = torch.stack([(g[:, range(4), order].mean(1) - whole).square().sum(-1).mean() for order in orders]).mean()
            alone = (g - g.mean(2, keepdim=True)).square().sum(-1).mean() / 4
            signal, batch = whole.mean(0).square().sum(), whole.var(0).sum()
            figures.update({n: (v / signal).item() for n, v in {"batch": batch, "independent": alone, "balanced": balanced}.items()})

        train("model", VARIANTS["m1"], SEARCHED, (4, 1e-3), 2 * warm_up, 0, measure, args)
        record.write_text(json.dumps(figures))
    figures = figures or json.loads(record.read_text())
    print(f"\nVariance of the gradient of a batch of 4, over the squared norm of the mean gradient of {batches} batches\n")
    print("| | of images and noises | of the draw of states | sum |\n|---|---|---|---|")
    for label, own in {"M = 4": 0.0, "M = 1, independent": figures["independent"], "M = 1, balanced": figures["balanced"]}.items():
        print(f"| {label} | {figures['batch']:.2f} | {own:.2f} | {figures['batch'] + own:.2f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=Path("build/curves"))
    parser.add_argument("--questions", nargs="+", choices=[*QUESTIONS, "noise"], default=[*QUESTIONS, "noise"])
    parser.add_argument("--picture", default="curves.png")
    parser.add_argument("--seeds", type=int, default=4, help="noise seeds of a measurement")
    parser.add_argument("--processes", type=int, default=1, help="runs at once, of one thread each")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    curves, tables = [], []
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        for question in [QUESTIONS[name] for name in args.questions if name in QUESTIONS]:
            found = answer(question, pool, args)
            tables.append((question, *found))
            curves += [(question, found[-1])] if question.curves else []
    for table in tables:
        print_tables(*table)
    if "noise" in args.questions:
        print_noise(args)
    if curves:
        draw_curves(curves, args.picture)


if __name__ == "__main__":
    main()
