"""D-OPSD beside other ways of fine-tuning a step-distilled model, on the miniatures, with the LoRA that users get by
default.

    python examples/miniature/compare.py                                       # the Z-Image miniature
    python examples/miniature/compare.py --methods sft prior --concepts arrow  # a part of it
    python examples/miniature/compare.py --model klein

All methods train the same LoRA with the same optimiser, pictures, captions and batch of 2 for 1,152 transformer
passes, a fifth of what D-OPSD takes with all states in 120 steps of 4. Each has three learning rates, and more of them
where the best is at an end; the one with the highest sum of concept accuracy and unrelated accuracy, mean over an
object and a style with the training seed 0, is trained on all concepts and with further seeds. trials.py says what a
pass is and where finished runs are kept. `long` and `long_weighted` take the scripts' own 1,000 steps of one picture.
"""

import argparse
import functools
import hashlib
import json
import math
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
from PIL import Image

import trials
import world
from concepts import CONCEPTS, MAIN, training_pictures
from evaluate import HERE
from trials import K, Variant, script, shown, worth


sys.path.append(str(HERE.parent))  # behind: it has an evaluate.py of its own

import train_sft  # noqa: E402


SHARE, BATCH = 0.2, 2
LONG_SHARE = 0.78125  # 1,000 steps of 4.5 passes
SEARCHED = ["arrow", "ember"]  # an object and a style
# of Student's t for 2, 3, .. values
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}
PSO_BETA = 30.0  # 1 / standard deviation of the margin, which was .03 after 50 of 96 steps at 1e-4 on the arrow


# ------------------------------------------------------------------------------------------------- what they train on
def wrong_folder(name, folder):
    """The concept's captions beside pictures of the next concept."""
    names = list(CONCEPTS)
    pictures = training_pictures(CONCEPTS[names[(names.index(name) + 1) % len(names)]])
    folder = folder / f"{name}-wrong"
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pictures):
        picture.save(folder / f"{name}_{i}.png")
        (folder / f"{name}_{i}.txt").write_text((HERE / "concepts" / name / f"{name}_{i}.txt").read_text())
    return folder


class Recorder:
    """A cache of contexts that remembers of what it was asked for one."""

    def __init__(self, cache):
        self.cache, self.asked = cache, []

    def read(self, row, shown_row, caption):
        self.asked.append((row and row["image_hash"], caption))
        return self.cache.read(row, shown_row, caption)


class Baseline:
    """Takes the place of the script's `make_batch` and `rollout`; knows x_0 of each drawn picture.

    Args:
        loss: makes, of this object, the transformer, the teacher and the batch, the losses (B,).
    """

    def __init__(self, loss, data, lent):
        self.loss, self.latents, self.samples = loss, {}, {}
        self.prompts = script.read_lines(HERE / "prior_prompts.txt")
        self.prompt_contexts = functools.cache(lambda prompt: lent.encode_student([prompt])[0])
        self.make, self.rollout = script.make_batch, script.rollout
        for file in sorted(data.glob("*.png")):
            image_hash = hashlib.sha256(file.read_bytes()).hexdigest()
            self.latents[image_hash] = train_sft.encode(lent, [Image.open(file).convert("RGB")], [])[0]

    def functions(self):
        return {"make_batch": self.make_batch, "rollout": self.baseline_rollout}

    def make_batch(self, pipeline, rows, cache, draws, prior, args, device):
        recorder = Recorder(cache)
        batch = self.make(pipeline, rows, recorder, draws, prior, args, device)
        # batches are made ahead of their rollout
        batch[0].asked = recorder.asked
        batch[0].x0 = None if prior else torch.cat([self.latents[image] for image, _ in recorder.asked])
        return batch

    def baseline_rollout(self, pipeline, transformer, teacher, batch, args, accelerator):
        self.asked, self.x0 = batch[0].asked, batch[0].x0
        if self.x0 is None:  # of prior prompts
            yield from self.rollout(pipeline, transformer, teacher, batch, args, accelerator)
        else:
            self.shift = train_sft.shift_of(pipeline, self.x0, K)
            yield torch.zeros(len(self.x0), dtype=torch.long), self.loss(self, pipeline, transformer, teacher, batch)

    @torch.no_grad()
    def pictures(self, pipeline, teacher, keys, contexts, count=4):
        """x_0 that the network of `teacher` draws for each context in K steps, one of `count` that are kept by its
        key, at random."""
        found = []
        for key, context in zip(keys, contexts):
            if key not in self.samples:
                with teacher.network() as network:  # with a decay of 1, the base
                    latents = torch.cat(
                        [
                            pipeline.initial_noise(
                                world.RESOLUTION, world.RESOLUTION, torch.Generator().manual_seed(i)
                            )
                            for i in range(count)
                        ]
                    )
                    for timestep in pipeline.few_step_grid(K, latents):
                        velocity = pipeline.velocity(network, latents, timestep, [context] * count)
                        latents = pipeline.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
                self.samples[key] = latents
            found.append(self.samples[key][torch.randint(count, (1,))])
        return torch.cat(found)

    def noised(self, x0):
        """States x_s at times over the whole schedule, s and noise - x0."""
        u, noise = torch.rand(len(x0)), torch.randn_like(x0)
        sigmas = self.shift * u / (1 + (self.shift - 1) * u)
        s = sigmas.view(-1, 1, 1, 1)
        return (1 - s) * x0 + s * noise, sigmas, noise - x0


def flow_matching(pipeline, network, states, sigmas, wanted, contexts):
    """|| v(x_s, s, c) - (noise - x_0) ||^2 of each image, mean over elements."""
    return (pipeline.velocity(network, states, 1000 * sigmas, contexts) - wanted).square().flatten(1).mean(1)


def sft(baseline, pipeline, transformer, teacher, batch):
    return flow_matching(pipeline, transformer, *baseline.noised(baseline.x0), batch[1])


def sft_on_samples(baseline, pipeline, transformer, teacher, batch):
    x0 = baseline.pictures(pipeline, teacher, baseline.asked, batch[2])
    return flow_matching(pipeline, transformer, *baseline.noised(x0), batch[1])


def dreambooth(baseline, pipeline, transformer, teacher, batch):
    """SFT, and SFT on pictures that the base drew of the prior prompts."""
    chosen = [baseline.prompts[i] for i in torch.randint(len(baseline.prompts), (len(batch[1]),))]
    contexts = [baseline.prompt_contexts(prompt) for prompt in chosen]
    drawn = baseline.pictures(pipeline, teacher, chosen, contexts, count=1)
    return sft(baseline, pipeline, transformer, teacher, batch) + flow_matching(
        pipeline, transformer, *baseline.noised(drawn), contexts
    )


def off_policy(baseline, pipeline, transformer, teacher, batch):
    """D-OPSD's loss at states of the few-step grid that are noised training pictures."""
    noise, student, taught, drawn = batch
    timesteps, k = pipeline.few_step_grid(K, noise), torch.tensor([states[0] for states in drawn])
    s = pipeline.scheduler.sigmas[k].view(-1, 1, 1, 1)
    states = (1 - s) * baseline.x0 + s * noise
    with torch.no_grad(), teacher.network() as network:
        wanted = pipeline.velocity(network, states, timesteps[k], taught)
    return flow_matching(pipeline, transformer, states, timesteps[k] / 1000, wanted, student)


def pso(baseline, pipeline, transformer, teacher, batch):
    """Offline PSO: the training picture is preferred to what the base draws of the caption, at the same noise and
    time."""
    margin, contexts = 0, batch[1]
    states, sigmas, wanted = baseline.noised(baseline.x0)
    for sign, x0 in ((1, baseline.x0), (-1, baseline.pictures(pipeline, teacher, baseline.asked, contexts))):
        s, noise = sigmas.view(-1, 1, 1, 1), wanted + baseline.x0
        states = (1 - s) * x0 + s * noise
        with torch.no_grad(), teacher.network() as base:
            reference = flow_matching(pipeline, base, states, sigmas, noise - x0, contexts)
        margin = margin + sign * (
            flow_matching(pipeline, transformer, states, sigmas, noise - x0, contexts) - reference
        )
    return -torch.nn.functional.logsigmoid(-PSO_BETA * margin)


def without_picture(data, lent):
    """The teacher's context is the student's."""
    make = script.make_batch

    def make_batch(*args):
        noise, student, _ = make(*args)
        return noise, student, student

    return {"make_batch": make_batch}


def baseline(loss):
    return lambda data, lent: Baseline(loss, data, lent).functions()


# --------------------------------------------------------------------------------------------------------------- methods
FROZEN = {"ema_decay": 1.0}  # the teacher is the base
LOW, HIGH = (3e-5, 1e-4, 3e-4), (5e-4, 1e-3, 2e-3)
METHODS = {
    "sft": Variant("SFT", stand_in=baseline(sft), cost=2, rates=LOW, prior=False),
    "sft_prior": Variant("SFT with the same prior prompts", stand_in=baseline(sft), cost=2.5, flags=FROZEN | {"prior_every": 5}, rates=HIGH),
    "dreambooth": Variant("DreamBooth", stand_in=baseline(dreambooth), cost=4, flags=FROZEN, rates=LOW, prior=False),
    "samples": Variant("SFT on the teacher's samples", stand_in=baseline(sft_on_samples), cost=2, flags=FROZEN, rates=LOW, prior=False),
    "pso": Variant("PSO", stand_in=baseline(pso), cost=6, flags=FROZEN, rates=LOW, prior=False),
    "off_policy": Variant("off-policy D-OPSD with prior prompts", stand_in=baseline(off_policy), cost=3.5, rates=HIGH),
    "paper": Variant("D-OPSD, all states, no prior prompts (the paper's)", states=K, rates=HIGH, prior=False),
    "dopsd": Variant("D-OPSD without prior prompts", rates=HIGH, prior=False),
    "prior": Variant("D-OPSD with prior prompts", rates=HIGH),
}  # fmt: skip
# at the rate of D-OPSD with prior prompts
CONTROLS = {
    "wrong": Variant("the same, teacher shown wrong pictures", folder=wrong_folder),
    "no_picture": Variant("the same, teacher shown no picture", stand_in=without_picture),
    "other": Variant("the same, teacher shown another picture of the set", flags={"teacher_image": "other"}),
    "copy": Variant("D-OPSD without prior prompts, the teacher a copy of the student", flags={"ema_decay": 0.0}, prior=False),
}  # fmt: skip
REFERENCE = {"teacher_context": "edit", "teacher_prompt_suffix": ""}  # the miniature knows no sentences
KLEIN = {
    "edit": Variant("the same, teacher shown the picture as a reference", flags=REFERENCE),
    "edit_other": Variant("the same, another picture of the set as a reference", flags=REFERENCE | {"teacher_image": "other"}),
}  # fmt: skip
WEIGHT = {"prior_loss_weight": 10}  # the scripts' own, as the decay of LONG
WEIGHTED = {"weighted": Variant("D-OPSD with prior prompts, --prior_loss_weight 10", flags=WEIGHT)}
# for the scripts' own number of steps of their own batch, and with their own decay of the teacher
LONG = {
    "long": Variant("D-OPSD with prior prompts, 1,000 steps of 1", flags={"ema_decay": 0.9999}),
    "long_weighted": Variant("D-OPSD with prior prompts, 1,000 steps of 1, --prior_loss_weight 10", flags={"ema_decay": 0.9999} | WEIGHT),
}  # fmt: skip
CONTROLS |= KLEIN | WEIGHTED | LONG
VARIANTS = METHODS | CONTROLS


def run(job):
    return trials.run(VARIANTS, job)


def search(methods, pool, args):
    """Trains each method at its rates on the searched concepts, with higher or lower ones while the best is at an end;
    returns it."""
    rates, tried, best = {name: list(METHODS[name].rates) for name in methods}, {}, {}
    while len(best) < len(methods):
        jobs = [
            (args.model, name, SHARE, concept, (BATCH, rate), 0, "", args)
            for name in methods for rate in rates[name] for concept in args.searched if (name, rate) not in tried
        ]  # fmt: skip
        for (_, name, _, concept, (_, rate), *_), points in pool.map(run, jobs):
            tried.setdefault((name, rate), {})[concept] = points[-1]
            print(name, concept, rate, shown(points[-1]), flush=True)
        for name in methods:
            at = max(rates[name], key=lambda rate: np.mean([worth(p) for p in tried[name, rate].values()]))  # noqa: B023
            ordered = sorted(rates[name])
            if at == ordered[0]:
                rates[name].append(float(f"{at / (ordered[1] / at):.1g}"))
            elif at == ordered[-1]:
                rates[name].append(float(f"{at * (at / ordered[-2]):.1g}"))
            else:
                best[name] = at
    return best, tried


DIGITS = {"fine detail": 2, "Frechet distance": 0}


def interval(values, digits=1):
    """Mean and half of the 95 % interval over training seeds; nothing where nothing was measured."""
    if not values:
        return ""
    half = (
        f" ± {T95[len(values)] * np.std(values, ddof=1) / len(values) ** 0.5:.{digits}f}" if len(values) in T95 else ""
    )
    return f"{np.mean(values):.{digits}f}{half}"


def base_figures(args):
    """Figures of the untrained model for each concept, kept as those of finished runs are."""
    found, finished = {}, json.loads(args.finished.read_text())
    for concept in args.concepts:
        record = args.work_dir / f"{trials.prefix_of(args.model)}before-{concept}.json"
        if record.stem not in finished and not record.exists():
            judge, pipeline = trials.measuring(args.model)
            figures = trials.figures_of(
                pipeline, judge, concept, range(args.seeds), 30 if concept in MAIN else 0, True
            )
            trials.write(record, [figures])
        found[concept] = (finished.get(record.stem) or json.loads(record.read_text()))[-1]
    return found


def print_tables(found, best, tried, args):
    columns = {
        "concept": lambda p: 100 * np.mean(p["concept"]), "unrelated": lambda p: 100 * np.mean(p["right"]), "fine detail": lambda p: p["detail"],
        "192 further prompts": lambda p: 100 * np.mean(p.get("further", math.nan)),
        "Frechet distance": lambda p: p["frechet"], "copying": lambda p: 100 * p["copying"], "concept, 30 steps": lambda p: 100 * p["slow"][0] if "slow" in p else math.nan,
        "unrelated, 30 steps": lambda p: 100 * p["slow"][1] if "slow" in p else math.nan,
    }  # fmt: skip
    print(f"\nMean over the concepts {', '.join(args.concepts)}; ± 95 per cent interval over the training seeds\n")
    differences = {"concept": "concept", "unrelated": "right"} if "prior" in found else {}
    names = ["", "learning rate", *columns, *(f"{column}, less D-OPSD with prior prompts" for column in differences)]
    print(f"| {' | '.join(names)} |\n" + "|---" * len(names) + "|")

    def mean(name, figure):
        """Of each training seed, the mean over the concepts; at 30 steps the first seed and three concepts alone are
        measured."""
        values = [[v for v in map(figure, seed.values()) if not math.isnan(v)] for seed in found[name]]
        return [np.mean(own) for own in values if own]

    def paired(name, key):
        """Of each training seed, the difference to D-OPSD with prior prompts, on the noise seeds that both have."""
        pairs = [[(own[c][key], ours[c][key]) for c in own] for own, ours in zip(found[name], found["prior"])]
        part = lambda a, b: 100 * np.mean(a[: len(b)])  # noqa: E731
        return [np.mean([part(a, b) - part(b, a) for a, b in seed]) for seed in pairs]

    for name in found:
        label, rate = ("before", "") if name == "before" else (VARIANTS[name].label, f"{best[name]:g}")
        cells = [
            label,
            rate,
            *(interval(mean(name, figure), DIGITS.get(column, 1)) for column, figure in columns.items()),
        ]
        cells += ["" if name in ("before", "prior") else interval(paired(name, key)) for key in differences.values()]
        print(f"| {' | '.join(cells)} |")
    print("\nconcept right / unrelated right, per cent, mean over the training seeds\n")
    print(f"| | {' | '.join(args.concepts)} |" + "\n|---" + "|---" * len(args.concepts) + "|")
    for name, seeds in found.items():
        label = "before" if name == "before" else VARIANTS[name].label
        cells = [
            " / ".join(
                f"{np.mean([columns[c](seed[concept]) for seed in seeds]):.0f}" for c in ("concept", "unrelated")
            )
            for concept in args.concepts
        ]
        print(f"| {label} | {' | '.join(cells)} |")
    print(f"\nThe search, training seed 0: learning rate: {', '.join(args.searched)}\n\n| | |\n|---|---|")
    for name in (name for name in best if name in METHODS):
        cells = [
            f"{rate:g}: " + ", ".join(shown(p[c]) for c in args.searched)
            for (n, rate), p in sorted(tried.items())
            if n == name
        ]
        print(f"| {METHODS[name].label} | {'; '.join(cells)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        choices=["model", "klein", "krea"],
        default="model",
        help="the miniature of Z-Image, klein or Krea 2",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=list(VARIANTS),
        default=[name for name in VARIANTS if name not in KLEIN | WEIGHTED | LONG],
        help=f"default: all but {', '.join(KLEIN)} (on klein alone), {', '.join(WEIGHTED)}, {', '.join(LONG)}",
    )
    parser.add_argument("--concepts", nargs="+", choices=list(CONCEPTS), default=list(CONCEPTS))
    parser.add_argument("--training_seeds", type=int, default=3)
    trials.add_arguments(parser, "compare", seeds=8)
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    args.searched = [name for name in SEARCHED if name in args.concepts] or SEARCHED
    if any(name in CONTROLS for name in args.methods) and "prior" not in args.methods:
        parser.error("the controls take the learning rate of prior: add it to --methods")
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        best, tried = search([name for name in args.methods if name in METHODS], pool, args)
        best |= {name: best["prior"] for name in args.methods if name in CONTROLS}
        extent = {name: (LONG_SHARE, 1) if name in LONG else (SHARE, BATCH) for name in args.methods}
        jobs = [
            (args.model, name, extent[name][0], concept, (extent[name][1], best[name]), seed, "-whole", args)
            for seed in range(args.training_seeds) for name in args.methods for concept in args.concepts
        ]  # fmt: skip
        found = {"before": [base_figures(args)]} | {
            name: [{} for _ in range(args.training_seeds)] for name in args.methods
        }
        for (_, name, _, concept, _, seed, _), points in pool.map(run, jobs):
            found[name][seed][concept] = points[-1]
            print(name, concept, f"seed {seed}", shown(points[-1]), flush=True)
    print_tables(found, best, tried, args)


if __name__ == "__main__":
    main()
