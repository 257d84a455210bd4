"""D-OPSD for an editing model: klein's miniature learns a new edit from eight pairs, and keeps those that it knows.

    python examples/miniature/editing.py
    python examples/miniature/editing.py --edits style --methods vlm sft_prior --training_seeds 3

The words "zorp the thing" turn the object of a reference into a purple outlined arrow, "quave the thing" draws the
reference in the style ember; the rest of the picture stays. The student is given reference and words, the teacher the
finished picture, too. All methods train the default LoRA for 1,152 transformer passes in batches of 2, as in
compare.py, at three learning rates. trials.py says where finished runs are kept.
"""

import argparse
import functools
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

import compare
import trials
import world
from concepts import CONCEPTS
from evaluate import HERE, UNRELATED, load_pipeline, sample, unrelated_accuracy
from judge import Judge, accuracy
from trials import Variant


PAIRS, HELD_OUT, KNOWN = 8, 24, 48
# the concept that an edit brings in, its words, and what must stay as in the reference
EDITS = {
    "object": (CONCEPTS["arrow"], "zorp the thing", ["background", "position"]),
    "style": (CONCEPTS["ember"], "quave the thing", ["shape", "colour", "pattern", "position"]),
}


# ----------------------------------------------------------------------------------------------------------- the pairs
def pairs_of(edit):
    """Scenes (reference, result): those to train on, and others to measure on, in surroundings of their own."""
    concept, _, _ = EDITS[edit]
    rng, references = np.random.default_rng([14, len(edit)]), {}
    while len(references) < PAIRS + HELD_OUT:
        scene = world.sample_scene(rng)
        references.setdefault((scene.background, scene.position, scene.shape), scene)
    changes = {name: getattr(concept, name) for name in concept.shows}
    scenes = [(scene, replace(scene, **changes)) for scene in references.values()]
    return scenes[:PAIRS], scenes[PAIRS:]


def draw(scenes, seed):
    """Pictures of (reference, result): rotation and place are drawn with one seed, so that the object stays where it
    is."""
    return [[Image.fromarray(world.render(scene, seed + i)) for scene in pair] for i, pair in enumerate(scenes)]


def write_pairs(edit, folder):
    folder = folder / edit
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, pictures in enumerate(draw(pairs_of(edit)[0], 300)):
        row = {"reference_file_name": f"reference_{i}.png", "file_name": f"target_{i}.png"}
        for name, picture in zip(row.values(), pictures):
            picture.save(folder / name)
        rows.append(json.dumps(row | {"text": EDITS[edit][1]}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


# ------------------------------------------------------------------------------------------------------------- figures
@functools.cache
def known_edits():
    """References, words and results of changes that the miniature knows, none of which it was trained on."""
    changes = [world.sample_change(np.random.default_rng([15, i])) for i in range(KNOWN)]
    references = [[Image.fromarray(world.render(before, 400 + i))] for i, (before, _, _) in enumerate(changes)]
    return references, [words for _, _, words in changes], [after for _, after, _ in changes]


@functools.cache
def measuring(edit):
    """Judge, pipeline, and the contexts that are measured with: of the new edit and of known ones."""
    judge, pipeline = Judge.from_pretrained(HERE / "judge"), load_pipeline(folder=HERE / "klein")
    references = [[reference] for reference, _ in draw(pairs_of(edit)[1], 500)]
    new = pipeline.encode_student([EDITS[edit][1]] * HELD_OUT, references)
    known = pipeline.encode_student(known_edits()[1], known_edits()[0])
    return judge, pipeline, new, known


def new_edit(judge, images, scenes, edit):
    """Shares of pictures in which the edit was made, the rest was kept, and both."""
    concept, _, rest = EDITS[edit]
    return {
        name: accuracy(judge, images, scenes, what)[0]
        for name, what in (("new", concept.shows), ("kept", rest), ("both", [*concept.shows, *rest]))
    }


def figures_of(transformer, edit, seeds):
    """For each noise seed: the new edit on unseen references, known edits, and prompts without reference."""
    judge, pipeline, new, known = measuring(edit)
    pipeline.transformer, scenes = transformer, [result for _, result in pairs_of(edit)[1]]
    found = [new_edit(judge, sample(pipeline, new, seed), scenes, edit) for seed in seeds]
    figures = {name: [each[name] for each in found] for name in found[0]}
    pictures = [sample(pipeline, known, seed) for seed in seeds]
    for name, attributes in (("known", ["colour", "background", "position"]), ("all", UNRELATED)):
        figures[name] = [accuracy(judge, each, known_edits()[2], attributes)[0] for each in pictures]
    return figures | {"unrelated": unrelated_accuracy(pipeline, judge, seeds)["right"]}


def teacher_figures(edit, teacher_context, seeds):
    """The teacher's pictures for the training pairs, each of which it is shown."""
    pipeline = load_pipeline(folder=HERE / "klein")
    pipeline.load_multimodal_encoder(str(HERE / "vlm"))
    scenes, pictures = pairs_of(edit)[0], draw(pairs_of(edit)[0], 300)
    contexts = pipeline.encode_teacher(
        [EDITS[edit][1]] * PAIRS, [p[1] for p in pictures], teacher_context, [[p[0]] for p in pictures]
    )
    judge, results = Judge.from_pretrained(HERE / "judge"), [result for _, result in scenes]
    found = [new_edit(judge, sample(pipeline, contexts, seed), results, edit) for seed in seeds]
    return {name: [each[name] for each in found] for name in found[0]}


# ------------------------------------------------------------------------------------------------------------- trainings
REFERENCES = {"reference_column": "reference", "prior_prompts": HERE / "prior_edits.txt"}
VLM = Variant("D-OPSD, result in the teacher's prompt", flags=REFERENCES, folder=write_pairs, rates=(1e-3, 2e-3, 4e-3))
SFT = replace(VLM, label="SFT", stand_in=compare.baseline(compare.sft))
ORDINARY, LAST = "the same, no edits among the prior prompts", "D-OPSD, result as the teacher's last reference"
ALONE, FROZEN = REFERENCES | {"prior_prompts": "none"}, REFERENCES | compare.FROZEN | {"prior_every": 5}
METHODS = {
    "vlm": VLM,
    "ordinary": replace(
        VLM, label=ORDINARY, flags=REFERENCES | {"prior_prompts": HERE / "prior_prompts.txt"}, rates=(2e-3,)
    ),
    "edit": replace(VLM, label=LAST, flags=REFERENCES | compare.REFERENCE),
    "sft": replace(SFT, cost=2, flags=ALONE, rates=(1e-4, 3e-4, 9e-4)),
    "sft_prior": replace(
        SFT, label=f"{SFT.label} with the same prior prompts", cost=2.5, flags=FROZEN, rates=(3e-4, 1e-3, 3e-3)
    ),
}


def run(job):
    """Trains and measures one LoRA, unless that was done."""
    edit, name, rate, seed, args = job
    record = args.work_dir / f"{edit}-{name}-{rate:g}-seed{seed}.json"
    finished = json.loads(args.finished.read_text())
    if record.stem not in finished and not record.exists():
        torch.set_num_threads(1)
        variant, figures = METHODS[name], []
        steps = round(compare.SHARE * trials.WHOLE / (variant.passes() * compare.BATCH))

        def measure(pipeline, teacher, dataset, cache, flags, accelerator, step):
            if step == steps:
                pipeline.transformer.fuse_lora()
                figures.append(figures_of(pipeline.transformer, edit, range(args.seeds)))

        trials.train("klein", variant, edit, (compare.BATCH, rate), steps, seed, measure, args.work_dir)
        trials.write(record, figures[0])
    return job[:-1], finished.get(record.stem) or json.loads(record.read_text())


def worth(figures):
    """By which a learning rate is chosen: the new edit, with the rest kept and in all, and what else is kept."""
    return sum(np.mean(figures[name]) for name in ("new", "both", "known", "unrelated"))


def print_table(edit, rows):
    names = {
        "new": "new edit made",
        "kept": "rest kept",
        "both": "both",
        "known": "known edits: colour, background and position right",
        "all": "shape and pattern, too",
        "unrelated": "prompts alone right",
    }
    print(f"\n{edit}: {EDITS[edit][1]!r}\n\n| | learning rate | {' | '.join(names.values())} |")
    print("|---" * (len(names) + 2) + "|")
    for label, rate, seeds in rows:
        cells = [
            compare.interval([100 * np.mean(figures[name]) for figures in seeds]) if name in seeds[0] else ""
            for name in names
        ]
        print(f"| {label} | {rate} | {' | '.join(cells)} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", nargs="+", choices=list(EDITS), default=["object"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--training_seeds", type=int, default=1)
    trials.add_arguments(parser, "editing")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    cells = [(edit, name) for edit in args.edits for name in args.methods]
    found = {}
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        jobs = [(*cell, rate, 0, args) for cell in cells for rate in METHODS[cell[1]].rates]
        for (edit, name, rate, _), figures in pool.map(run, jobs):
            found[edit, name, rate] = [figures]
        # further seeds at the best rate of the first
        chosen = [max((key for key in found if key[:2] == cell), key=lambda key: worth(*found[key])) for cell in cells]
        jobs = [(*key, seed, args) for key in chosen for seed in range(1, args.training_seeds)]
        for key, figures in pool.map(run, jobs):
            found[key[:3]].append(figures)
    for edit in args.edits:
        rows = [("before", "", [figures_of(measuring(edit)[1].transformer, edit, range(args.seeds))])]
        rows += [
            (f"the teacher ({way}), training pairs", "", [teacher_figures(edit, way, range(args.seeds))])
            for way in ("vlm", "edit")
        ]
        rows += [
            (METHODS[name].label, f"{rate:g}", found[edit, name, rate])
            for name in args.methods
            for rate in METHODS[name].rates
        ]
        print_table(edit, rows)


if __name__ == "__main__":
    main()
