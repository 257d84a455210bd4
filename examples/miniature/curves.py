"""Variants of D-OPSD on the miniatures at equal cost, as learning curves: which states are trained, with what weights.

    python examples/miniature/curves.py --work_dir build/curves                      # every table, and curves.png
    python examples/miniature/curves.py --questions fifth noise                      # some of them

The LoRA is the scripts' default one, on the attention and feed-forward of all blocks. A whole run has 120 steps of 4
images with all 4 states, 5,760 passes; each question names the share of it that its variants get. On one concept,
every variant is trained with the same grid of batch sizes and learning rates; its best setting (the highest sum of
concept accuracy and unrelated accuracy at the end) is trained on the other concepts and with further seeds. trials.py
says what a pass is and where finished runs are kept.
"""

import argparse
import itertools
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image, ImageDraw

import trials
from concepts import CONCEPTS, MAIN, write
from trials import WHOLE, K, Variant, script, shown, worth


SIGMAS = [1.0, 0.9, 0.75, 0.5]  # of the four states
state_loss = script.state_loss


# ------------------------------------------------------------------------------------------------------------ variants
def always(*states):
    """A draw that gives every image the same states."""
    return lambda args, places: [list(states)] * len(places)


def independent(args, places):
    """One state for every image, drawn without regard to the others."""
    several = [
        np.random.default_rng([args.seed, 2**41, place // args.train_batch_size]).integers(
            K, size=args.train_batch_size
        )
        for place in places
    ]
    return [[int(drawn[place % args.train_batch_size])] for place, drawn in zip(places, several)]


def leaning(shares):
    """A draw of one state for every image, state k in `shares[k]` of sum(shares) consecutive images."""
    deck = np.repeat(np.arange(K), shares)

    def draw(args, places):
        cycles = [divmod(place, len(deck)) for place in places]
        return [
            [int(np.random.default_rng([args.seed, 2**41, cycle]).permutation(deck)[place])] for cycle, place in cycles
        ]

    return draw


def weighted(weights):
    """The loss with a weight for each state, which its sigma tells."""

    def loss(student_velocity, teacher_velocity, sigma, weighting):
        states = (sigma[:, None] - sigma.new_tensor(SIGMAS)).abs().argmin(dim=1)
        return sigma.new_tensor(weights)[states] * state_loss(student_velocity, teacher_velocity, sigma, weighting)

    return loss


def magnitude_and_direction(student_velocity, teacher_velocity, sigma, weighting):
    """.5 (|p| - |t|)^2 + 2 |p| |t| (1 - cos), |p| without gradient in the second term: with 1 for .5, it has the value
    of the loss."""
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


def pictures(count):
    """A data folder with another number of pictures."""

    def make(name, folder):
        folder = folder / f"{name}-{count}"
        write(name, CONCEPTS[name], folder, count)
        return folder

    return make


def one_caption(name, folder):
    """A data folder without captions of its pictures: all have the shortest one, which is the word alone or nearly
    so."""
    folder = folder / f"{name}-caption"
    write(name, CONCEPTS[name], folder)
    concept = CONCEPTS[name]
    for file in folder.glob("*.txt"):
        file.write_text(f"a {concept.word}" if concept.shape else f"in {concept.word} style")
    return folder


EARLY, LATE = [4, 3, 2, 1], [1, 2, 3, 4]
# what users choose: each in place of 4 pictures with 2 to 4 captions each, rank 16, 128 steps and 1e-3
ADVICE = {
    "pictures1": Variant("1 picture", folder=pictures(1)),
    "pictures2": Variant("2 pictures", folder=pictures(2)),
    "pictures8": Variant("8 pictures", folder=pictures(8)),
    "caption": Variant("one caption for all", folder=one_caption),
    "rate5e-4": Variant("--learning_rate 5e-4", flags={"learning_rate": 5e-4}),
    "rate2e-3": Variant("--learning_rate 2e-3", flags={"learning_rate": 2e-3}),
}
VARIANTS = ADVICE | {
    "m4": Variant("M = 4", 4),
    "m2": Variant("M = 2", 2),
    "m1": Variant("M = 1"),
    "independent": Variant("M = 1, independent draws", replaced={"draw_states": independent}),
    "first": Variant("first state only", replaced={"draw_states": always(0)}),
    "first_two": Variant("first two states", 2, replaced={"draw_states": always(0, 1)}),
    "early": Variant("M = 1, early states more often (4:3:2:1)", replaced={"draw_states": leaning(EARLY)}),
    "early_exact": Variant("the same, weights keep the expectation", replaced={"draw_states": leaning(EARLY), "state_loss": weighted([2.5 / s for s in EARLY])}),
    "late": Variant("M = 1, late states more often (1:2:3:4)", replaced={"draw_states": leaning(LATE)}),
    "late_exact": Variant("the same, weights keep the expectation", replaced={"draw_states": leaning(LATE), "state_loss": weighted([2.5 / s for s in LATE])}),
    "weights": Variant("M = 1, weights 8:4:2:1", replaced={"state_loss": weighted([w / 3.75 for w in (8, 4, 2, 1)])}),
    "direction": Variant("M = 1, magnitude and direction apart", replaced={"state_loss": magnitude_and_direction}),
    "ema99": Variant("M = 1, --ema_decay 0.99", flags={"ema_decay": 0.99}),
    "ema9999": Variant("M = 1, --ema_decay 0.9999", flags={"ema_decay": 0.9999}),
    "ema_then": Variant("M = 1, decay 0.999, then 0.9999", replaced={"LoRATeacher": SlowingTeacher}),
    "rank4": Variant("M = 1, --rank 4", flags={"rank": 4}),
    "rank64": Variant("M = 1, --rank 64", flags={"rank": 64}),
    "prior2": Variant("M = 1, --prior_every 2", flags={"prior_every": 2}),
    "prior5": Variant("M = 1, --prior_every 5", flags={"prior_every": 5}),
}  # fmt: skip


@dataclass(frozen=True)
class Question:
    """Variants, each with its share of the whole passes, the settings that are searched, and the training seeds. Those
    in `given` are trained at that setting, whatever the search says."""

    title: str
    runs: list
    batches: tuple = (2,)
    rates: tuple = (1e-3, 2e-3)
    seeds: int = 3
    curves: bool = False
    model: str = "model"
    searched_on: str = "cored_house"
    given: dict = field(default_factory=dict)

    @property
    def settings(self):
        return list(itertools.product(self.batches, self.rates))

    @property
    def searched(self):
        return [entry for entry in self.runs if entry not in self.given]


BATCHES, RATES = (1, 2, 4), (5e-4, 1e-3, 2e-3)
QUESTIONS = {
    "fifth": Question(
        "All states, at the setting of the first measurements, and one state of each rollout for a fifth of the passes",
        [("m4", 1.0), ("m1", 0.2)], BATCHES, RATES, curves=True, given={("m4", 1.0): (4, 1e-3)},
    ),
    "searched": Question("All states at the best of the same settings", [("m4", 1.0)], BATCHES, RATES, seeds=1),
    # on ember: on klein, the settings differ by 5 points on cored_house
    "klein": Question(
        "The same on klein's miniature", [("m4", 1.0), ("m1", 0.2)], BATCHES, (1e-3, 2e-3, 4e-3), curves=True, model="klein", searched_on="ember"
    ),
    "klein_first": Question("All states on klein's miniature at the setting of the first measurements", [("m4", 1.0)], model="klein", given={("m4", 1.0): (4, 1e-3)}),
    "equal": Question(
        "One, two and all of the states for a fifth of the passes", [("m1", 0.2), ("m2", 0.2), ("m4", 0.2)], (1, 2), (1e-3, 2e-3), curves=True
    ),
    "variants": Question(
        "Variants of one state for a fifth of the passes", [(n, 0.2) for n in VARIANTS if n not in ("m4", "m2", *ADVICE)]
    ),
    "advice": Question(
        "Pictures, captions, steps, rank and learning rate", [("m1", share) for share in (0.05, 0.1, 0.2, 0.4)] + [(n, 0.2) for n in ("rank4", "rank64", *ADVICE)], rates=(1e-3,)
    ),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- runs
def run(job):
    return trials.run(VARIANTS, job)


def answer(question, pool, args):
    """Searches each variant's setting and trains it; returns the settings and, by variant and concept, the runs'
    points."""
    results, runs = {}, {entry: {concept: [] for concept in MAIN} for entry in question.runs}
    jobs = [
        (question.model, *entry, question.searched_on, setting, 0, "", args)
        for entry in question.searched
        for setting in question.settings
    ]
    for (_, name, share, concept, setting, *_), points in pool.map(run, jobs):
        results[(name, share), setting] = points[-1]
        print(name, share, concept, *setting, shown(points[-1]), flush=True)
    best = {
        entry: max(question.settings, key=lambda s: worth(results[entry, s])) for entry in question.searched
    } | question.given  # noqa: B023
    jobs = [
        (question.model, *entry, concept, best[entry], seed, "-curve" if question.curves and (concept, seed) == (question.searched_on, 0) else "", args)
        for seed in range(question.seeds) for entry in question.runs for concept in MAIN
    ]  # fmt: skip
    for (_, name, share, concept, setting, seed, _), points in pool.map(run, jobs):
        runs[name, share][concept].append(points)
        print(name, share, concept, *setting, f"seed {seed}", shown(points[-1]), flush=True)
    return results, best, runs


# --------------------------------------------------------------------------------------------------------------- report
def cell(ends):
    """The mean of several runs' ends and, of three or more, the standard deviation over them."""
    texts = []
    for key in ("concept", "right"):
        values = [100 * np.mean(point[key]) for point in ends]
        texts.append(f"{np.mean(values):.1f}" + (f" ± {np.std(values):.1f}" if len(values) > 2 else ""))
    return " / ".join(texts)


def print_tables(question, results, best, runs):
    print(f"\n{question.title}: concept right / unrelated right, per cent; training seeds: {question.seeds}\n")
    print(
        f"| | passes of an image | share of {WHOLE} | batch | learning rate | {' | '.join(MAIN)} | mean | fine detail |"
    )
    print("|---" * (7 + len(MAIN)) + "|")
    for (name, share), found in runs.items():
        ends = {concept: [points[-1] for points in several] for concept, several in found.items()}
        # one mean over the concepts for each training seed
        means = [
            {key: np.mean([np.mean(p[key]) for p in points]) for key in ("concept", "right")}
            for points in zip(*ends.values())
        ]
        batch, rate = best[name, share]
        row = [
            VARIANTS[name].label,
            f"{VARIANTS[name].passes():g}",
            f"{share:g}",
            batch,
            f"{rate:g}",
            *map(cell, ends.values()),
        ]
        row += [cell(means), f"{np.mean([p['detail'] for points in ends.values() for p in points]):.2f}"]
        print(f"| {' | '.join(map(str, row))} |")
    if not question.searched:
        return
    print(f"\nThe search on {question.searched_on}, training seed 0:\n")
    print(
        "| | share | "
        + " | ".join(f"batch {b}, {r:g}" for b, r in question.settings)
        + " |\n|---|---"
        + "|---" * len(question.settings)
        + "|"
    )
    for name, share in question.searched:
        cells = [shown(results[(name, share), setting]) for setting in question.settings]
        print(f"| {VARIANTS[name].label} | {share:g} | {' | '.join(cells)} |")


def draw_curves(questions, path):
    """A panel for each question, of the concept of its search with the training seed 0: full lines the concept, thin
    ones unrelated prompts."""
    width, height, gap, colours = 420, 240, 60, ["black", "red", "blue"]
    sheet = Image.new("RGB", (len(questions) * (width + gap) + gap, height + 2 * gap), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (question, runs) in enumerate(questions):
        left, whole = gap + column * (width + gap), WHOLE * max(share for _, share in runs)
        at = lambda passes, right: (left + passes / whole * width, gap + height * (1 - right))  # noqa: E731, B023
        draw.rectangle([*at(0, 1), *at(whole, 0)], outline="grey")
        draw.text(
            (left, gap - 35),
            f"{question.searched_on}, {question.model}: per cent right over passes (0 to {whole:.0f})",
            fill="black",
        )
        for share in (0.5, 1.0):
            draw.text((left - 25, at(0, share)[1] - 5), f"{100 * share:.0f}", fill="grey")
        for number, ((name, share), found) in enumerate(runs.items()):
            draw.text(
                (left + 150 * number, gap - 18), f"{VARIANTS[name].label}, share {share:g}", fill=colours[number]
            )
            for key, thickness in (("concept", 3), ("right", 1)):
                draw.line(
                    [at(p["passes"], np.mean(p[key])) for p in found[question.searched_on][0]],
                    fill=colours[number],
                    width=thickness,
                )
    sheet.save(path)


# ---------------------------------------------------------------------------------------------------------------- noise
def print_noise(args, batches=12, warm_up=40):
    """How far gradients of batches of 4 lie from their mean, half-way through a short training of M = 1 on
    cored_house."""
    record, figures = args.work_dir / "noise.json", json.loads(args.finished.read_text()).get("noise", {})
    if not figures and not record.exists():

        def measure(pipeline, teacher, dataset, cache, flags, accelerator, step):
            if step != warm_up:
                return
            rows = dataset.select_columns(["captions", "bucket", "image_hash", "reference_hashes"])
            layouts = script.layouts_of(dataset, flags)
            parameters = [p for p in pipeline.transformer.parameters() if p.requires_grad]
            gradients = []  # of each image of each batch and each state
            for place in range(batches):
                for draw in script.draw_batch(layouts, flags, 10**6 + place, 0, 1):
                    batch = *script.make_batch(pipeline, rows, cache, [draw], None, flags, "cpu"), [list(range(K))]
                    losses = script.rollout(pipeline, pipeline.transformer, teacher, batch, flags, accelerator)
                    gradients += [
                        torch.cat([g.flatten() for g in torch.autograd.grad(loss.sum(), parameters)])
                        for _, loss in losses
                    ]
            g = torch.stack(gradients).view(batches, 4, K, -1)
            whole = g.mean(dim=(1, 2))
            orders = [list(order) for order in itertools.permutations(range(K))]
            balanced = torch.stack(
                [(g[:, range(4), order].mean(1) - whole).square().sum(-1).mean() for order in orders]
            ).mean()
            alone = (g - g.mean(2, keepdim=True)).square().sum(-1).mean() / 4
            signal, batch = whole.mean(0).square().sum(), whole.var(0).sum()
            figures.update(
                {
                    n: (v / signal).item()
                    for n, v in {"batch": batch, "independent": alone, "balanced": balanced}.items()
                }
            )

        trials.train("model", VARIANTS["m1"], "cored_house", (4, 1e-3), 2 * warm_up, 0, measure, args.work_dir)
        trials.write(record, figures)
    figures = figures or json.loads(record.read_text())
    print(
        f"\nVariance of the gradient of a batch of 4, over the squared norm of the mean gradient of {batches} batches\n"
    )
    print("| | of images and noises | of the draw of states | sum |\n|---|---|---|---|")
    for label, own in {
        "M = 4": 0.0,
        "M = 1, independent": figures["independent"],
        "M = 1, balanced": figures["balanced"],
    }.items():
        print(f"| {label} | {figures['batch']:.2f} | {own:.2f} | {figures['batch'] + own:.2f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    trials.add_arguments(parser, "curves")
    parser.add_argument("--questions", nargs="+", choices=[*QUESTIONS, "noise"], default=[*QUESTIONS, "noise"])
    parser.add_argument("--picture", default="curves.png")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    curves, tables = [], []
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
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
