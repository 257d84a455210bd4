"""Does examples/evaluate.py tell the truth? Its verdicts beside what trainings on the Z-Image miniature came to, by
the judge.

    python examples/miniature/calibrate.py

For each case, a concept and a teacher, `evaluate.py teacher` scores the teacher before training; then a LoRA is
trained with it (default layers, rank 16, one state of each rollout, 128 steps of 2, rate 1e-3 on a cosine, decay .999,
prior prompts) and the judge counts in how many held-out scenes it draws the concept. A wrong teacher is shown pictures
of another concept. One without picture sees the prompt alone, so its loss is zero: the base is judged. Then
`evaluate.py report` looks at trainings of several methods on three concepts, and the judge says which learned the
concept and which kept the unrelated prompts. Finished runs are entries of calibrate.json and are not run again.
"""

import argparse
import contextlib
import functools
import json
import sys
import unittest.mock
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState

import compare
import trials
from concepts import CONCEPTS, MAIN, held_out_scenes, training_pictures, unrelated_scenes, write
from evaluate import HERE, STEPS, captions, concept_accuracy, load_pipeline, unrelated_accuracy
from judge import Judge


sys.path.insert(0, str(HERE.parents[1]))

from examples import evaluate as instruments  # noqa: E402

import train_dopsd_lora as script  # noqa: E402


FINISHED = HERE / "calibrate.json"
ARROW, HOUSE = CONCEPTS["arrow"], CONCEPTS["cored_house"]
GREEN_RINGS = replace(ARROW, colour="green", pattern="rings")
CASES = {
    **{name: CONCEPTS[name] for name in [*MAIN, "checkered_house"]},
    "striped_house": replace(HOUSE, pattern="striped"),
    **{f"green_{shape}": replace(GREEN_RINGS, shape=shape) for shape in ("moon", "hourglass")},
}
TEACHERS = [
    *((name, "target") for name in CASES), *((name, "other") for name in MAIN), ("arrow", "wrong"), ("cored_house", "wrong"), ("arrow", "none"),
]  # fmt: skip
# label -> method of compare.py, learning rate
METHODS = {
    "D-OPSD with prior prompts": ("prior", 1e-3), "D-OPSD": ("dopsd", 1e-3), "SFT, 3e-4": ("sft", 3e-4), "SFT, 1e-3": ("sft", 1e-3),
}  # fmt: skip
TRAINED_WITH = {"target": "prior", "other": "other", "wrong": "wrong", "none": "base"}
BATCH = 2
NEW_PROMPTS, ORDINARY_PROMPTS = 6, 16
KEPT = 0.85  # of the unrelated prompts right: what the judge calls kept. Before training 92 to 94 per cent are


def folder_of(name, work_dir):
    """Pictures and captions of a concept."""
    committed, folder = HERE / "concepts" / name, work_dir / name
    if not committed.exists() and not folder.exists():
        write(name, CASES[name], folder)
    return committed if committed.exists() else folder


@contextlib.contextmanager
def shown(name, teacher):
    """Within: contexts are encoded with what the `teacher` of a concept is shown."""
    load, names = script.load_batch, MAIN
    wrong = training_pictures(CONCEPTS[names[(names.index(name) + 1) % len(names)]]) if teacher == "wrong" else []

    def load_wrong(dataset, args, batch):
        _, references, images = load(dataset, args, batch)
        rows = [script.rows_of(dataset, index, args)[1] for _, _, index, _ in batch]
        return batch, references, images and [wrong[int(row["image_hash"], 16) % len(wrong)] for row in rows]

    encode = instruments.family_of(str(HERE / "model")).encode_teacher
    if teacher == "none":
        encode = lambda self, prompts, *_: self.encode_student(prompts)  # noqa: E731
    with (
        unittest.mock.patch.object(script, "load_batch", load_wrong if teacher == "wrong" else load),
        unittest.mock.patch.object(instruments.family_of(str(HERE / "model")), "encode_teacher", encode),
    ):
        # a context without picture has no image tokens
        with (
            unittest.mock.patch.object(instruments, "token_statistics", lambda *_: [])
            if teacher == "none"
            else contextlib.nullcontext()
        ):
            yield


def call(flags):
    """Runs evaluate.py in this process as a new one would."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    return instruments.main(instruments.parse_args([str(flag) for flag in flags]))


def train(name, method, rate, args):
    """Trains one LoRA, unless it is there, and returns its folder."""
    folder, variant = args.work_dir / f"{name}-{method}-{rate:g}", compare.VARIANTS[method]
    if (folder / script.LORA_WEIGHT_NAME).exists():
        return folder
    steps = round(compare.SHARE * trials.WHOLE / variant.passes() / BATCH)

    def save(pipeline, teacher, dataset, cache, flags, accelerator, step):
        if step == steps:
            weights = script.lora_state_dict(pipeline.transformer)
            pipeline.save_lora_weights(folder, transformer_lora_layers=weights, weight_name=script.LORA_WEIGHT_NAME)

    variant = replace(variant, folder=variant.folder or folder_of)
    trials.train("model", variant, name, (BATCH, rate), steps, 0, save, args.work_dir)
    return folder


@functools.cache
def judge():
    return Judge.from_pretrained(HERE / "judge")


def judged(name, method, rate, args):
    """What the judge says of a trained LoRA: shares right over noise seeds, of the concept and, for the reports, of
    unrelated prompts."""
    pipeline = load_pipeline(None if method == "base" else train(name, method, rate, args))
    results, _ = concept_accuracy(pipeline, judge(), CASES[name], range(args.seeds))
    figures = {"concept": [right for right, _ in results]}
    return figures | (
        unrelated_accuracy(pipeline, judge(), range(args.seeds))
        if (method, rate) in METHODS.values() and name in MAIN
        else {}
    )


def evaluation_flags(name, folder, args):
    """Of `evaluate.py`, on the miniature."""
    data = args.work_dir / "folders"
    data.mkdir(parents=True, exist_ok=True)
    prompts, ordinary = data / f"{name}.prompts", data / "ordinary.prompts"
    prompts.write_text("\n".join(captions(held_out_scenes(CASES[name])[:NEW_PROMPTS], CASES[name])))
    ordinary.write_text("\n".join(captions(unrelated_scenes(ORDINARY_PROMPTS))))
    flags = [
        "--pretrained_model_name_or_path",
        HERE / "model",
        "--instance_data_dir",
        folder_of(name, data),
        "--output_dir",
        folder,
    ]
    flags += [
        "--resolution",
        64,
        "--num_inference_steps",
        STEPS,
        "--mixed_precision",
        "no",
        "--concept_prompts",
        prompts,
    ]
    flags += ["--image_encoder", HERE / "encoders" / "image", "--image_text_encoder", HERE / "encoders" / "text"]
    return [*flags, "--drawing_batch_size", 32, "--encoding_batch_size", 64], ["--ordinary_prompts", ordinary]


def score(name, teacher, args):
    """The figures of `evaluate.py teacher` for a case."""
    flags, _ = evaluation_flags(name, args.work_dir / f"{name}-teacher-{teacher}", args)
    way = "other" if teacher == "other" else "target"
    contexts = f"contexts{'' if teacher in ('target', 'other') else '-' + teacher}"
    flags += [
        "--vlm_model_name_or_path",
        HERE / "vlm",
        "--context_cache_dir",
        args.work_dir / contexts,
        "--teacher_image",
        way,
    ]
    with shown(name, teacher):
        figures = call(["teacher", *flags])["ways"][f"vlm, {way}"]
    return {key: value for key, value in figures.items() if key != "near_each"}


def look(name, method, rate, args):
    """The figures of `evaluate.py report` for a trained LoRA."""
    flags, more = evaluation_flags(name, train(name, method, rate, args), args)
    return call(["report", *flags, *more, "--context_cache_dir", args.work_dir / "contexts"])["figures"]


def once(key, run, finished):
    """Runs what is no entry of calibrate.json yet, and makes it one."""
    if key not in finished:
        finished[key] = run()
        instruments.write_json(FINISHED, finished)


def ranks(values):
    """Ranks from 0, of equal values their mean."""
    values = np.round(values, 6)
    return np.array([(values < v).sum() + ((values == v).sum() - 1) / 2 for v in values])


def print_teachers(finished):
    rows = sorted(
        ((finished[f"score {n} {t}"], finished[f"judged {n} {TRAINED_WITH[t]} 0.001"], n, t) for n, t in TEACHERS),
        key=lambda row: -row[0]["near"][0],
    )
    print(
        "\n| concept | teacher | near the training images | concept right after training, per cent |\n|---|---|---|---|"
    )
    for figures, outcome, name, teacher in rows:
        print(
            f"| {name} | {teacher} | {instruments.shown(figures['near'])} | {100 * np.mean(outcome['concept']):.0f} |"
        )
    scores, outcomes = [row[0]["near"][0] for row in rows], [np.mean(row[1]["concept"]) for row in rows]
    print(f"\nRank correlation of the {len(rows)} cases: {np.corrcoef(ranks(scores), ranks(outcomes))[0, 1]:.2f}")


def print_reports(finished):
    figures = ["learned", "drift", "detail", "gap", "leak"]
    print(
        "\n| concept | method | concept right | unrelated right | "
        + " | ".join(figures)
        + " | learned? | kept? | few steps? |"
    )
    print("|---" * (7 + len(figures)) + "|")
    counts = {"learned": np.zeros((2, 2), int), "kept": np.zeros((2, 2), int)}
    for name in MAIN:
        for label, (method, rate) in METHODS.items():
            outcome = finished[f"judged {name} {method} {rate:g}"]
            record = finished[f"report {name} {method} {rate:g}"]
            table = instruments.report_verdict(record)
            answers = [row["answer"] for row in table]
            cells = [
                name,
                label,
                *(f"{100 * np.mean(outcome[k]):.0f}" for k in ("concept", "right")),
                *(instruments.shown(record[f]) for f in figures),
            ]
            print(f"| {' | '.join(cells + answers)} |")
            truth = {"learned": np.mean(outcome["concept"]) >= 0.5, "kept": np.mean(outcome["right"]) >= KEPT}
            for (question, right), answer in zip(truth.items(), answers):
                counts[question][int(right), int(answer.startswith("yes"))] += 1
    print("\n| the judge | the report: no | the report: yes |\n|---|---|---|")
    for question, table in counts.items():
        for right in (0, 1):
            print(f"| {'' if right else 'not '}{question} | {table[right, 0]} | {table[right, 1]} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=Path("build/calibrate"))
    parser.add_argument("--seeds", type=int, default=2, help="noise seeds of the judge")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    finished = json.loads(FINISHED.read_text()) if FINISHED.exists() else {}
    for name, teacher in TEACHERS:
        once(f"score {name} {teacher}", functools.partial(score, name, teacher, args), finished)
    for name in MAIN:
        for method, rate in METHODS.values():
            once(f"judged {name} {method} {rate:g}", functools.partial(judged, name, method, rate, args), finished)
            once(f"report {name} {method} {rate:g}", functools.partial(look, name, method, rate, args), finished)
    for name, teacher in TEACHERS:
        once(
            f"judged {name} {TRAINED_WITH[teacher]} 0.001",
            functools.partial(judged, name, TRAINED_WITH[teacher], 1e-3, args),
            finished,
        )
    print_teachers(finished)
    print_reports(finished)


if __name__ == "__main__":
    main()
