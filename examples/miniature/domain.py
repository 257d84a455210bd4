"""Full fine-tuning on a whole domain: 500 pictures in a style that the miniature has never seen. D-OPSD beside SFT.

    python examples/miniature/domain.py --work_dir build/domain

All methods train all weights with the same optimiser, batch, pictures and captions, and get the same number of
transformer passes (a D-OPSD step costs 12 per image at K = 4, an SFT step 2); with prior prompts, a third of the
D-OPSD steps is on those. Measured at four steps: the style and everything else that a prompt of the domain asks for,
the unrelated prompts, and the Frechet distance of as many pictures to 2,000 fresh drawings of the domain. Finished
runs are kept in --work_dir and not run again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

import world
from concepts import CONCEPTS
from evaluate import HERE, STEPS, captions, load_pipeline, sample, spread, unrelated_accuracy
from judge import Judge, accuracy, frechet


ROOT = HERE.parents[1]
DOMAIN = CONCEPTS["ember"]
PASSES = {"D-OPSD": 12, "D-OPSD with prior prompts": 12, "SFT": 2}
KEPT = ["shape", "colour", "pattern", "position"]
PICTURES, PROMPTS, FRESH = 500, 500, 2000


def scenes_of(seed, count):
    rng = np.random.default_rng([6, seed])
    return [DOMAIN.scene(rng) for _ in range(count)]


def write_data(folder):
    """The training pictures, with one caption each that drops attributes at random, in the imagefolder format."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([6, 100])
    for i, scene in enumerate(scenes_of(0, PICTURES)):
        Image.fromarray(world.render(scene, 200_000 + i)).save(folder / f"{i:03}.png")
        (folder / f"{i:03}.txt").write_text(DOMAIN.caption(scene, rng))
    return folder


def train(method, rate, args):
    """Runs the training script in a process of its own and returns the folder of the result."""
    folder = args.work_dir / f"{method.replace(' ', '_')}-{rate:g}"
    if (folder / "model_index.json").exists():
        return folder
    flags = ["--pretrained_model_name_or_path", HERE / "model", "--mixed_precision", "no"]
    flags += ["--instance_data_dir", args.work_dir / "data", "--output_dir", folder, "--resolution", world.RESOLUTION]
    flags += ["--train_batch_size", 8, "--learning_rate", rate, "--seed", args.seed, "--num_inference_steps", STEPS]
    flags += ["--max_train_steps", args.steps * PASSES["D-OPSD"] // PASSES[method]]
    if method == "SFT":
        script = [ROOT / "examples" / "train_sft.py", "--full"]
    else:
        script = [ROOT / "train_dopsd_full.py", "--context_cache_dir", args.work_dir / "contexts"]
        flags += ["--vlm_model_name_or_path", HERE / "vlm", "--report_to", "none", "--checkpointing_steps", 100_000]
        flags += ["--validation_steps", 0, "--ema_decay", args.ema_decay, "--states_per_rollout", 4]
        flags += ["--prior_prompts", HERE / "prior_prompts.txt" if "prior" in method else "none"]
    subprocess.run([sys.executable, *map(str, script), *map(str, flags)], check=True)
    return folder


def measure(folder, fresh, args):
    """Per seed: style right, all of `KEPT` right, unrelated prompts right; and the two Frechet distances."""
    judge, pipeline = Judge.from_pretrained(HERE / "judge"), load_pipeline(folder=folder)
    scenes = scenes_of(1, PROMPTS)
    contexts = pipeline.encode_student(captions(scenes, DOMAIN))
    images = [sample(pipeline, contexts, seed) for seed in range(args.seeds)]
    kept = [accuracy(judge, pictures, scenes, KEPT)[0] for pictures in images]
    style = [accuracy(judge, pictures, scenes, ["style"])[0] for pictures in images]
    others = unrelated_accuracy(pipeline, judge, range(args.seeds))
    distance = frechet(judge, [p for pictures in images for p in pictures], fresh)
    return {"style": style, "kept": kept, "fid": distance, "unrelated": others}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=Path("build/domain"))
    parser.add_argument(
        "--steps", type=int, default=200, help="D-OPSD steps of 8; SFT gets the same transformer passes"
    )
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-5, 1e-4, 3e-4])
    parser.add_argument("--ema_decay", type=float, default=0.999)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_data(args.work_dir / "data")
    fresh = [world.render(scene, 300_000 + i) for i, scene in enumerate(scenes_of(2, FRESH))]

    print("| | learning rate | style right | shape, colour, pattern and position right | Frechet distance, domain "
          "| unrelated prompts right | fine detail, unrelated | Frechet distance, unrelated |\n|---|---|---|---|---|---|---|---|")  # fmt: skip
    for method, rate in [("before", 0.0), *((m, r) for m in PASSES for r in args.rates)]:
        record = args.work_dir / f"{method.replace(' ', '_')}-{rate:g}.json"
        if not record.exists():
            folder = HERE / "model" if method == "before" else train(method, rate, args)
            record.write_text(json.dumps(measure(folder, fresh, args)))
        f = json.loads(record.read_text())
        cells = [method, f"{rate:g}", spread(f["style"]), spread(f["kept"]), f"{f['fid']:.0f}"]
        others = f["unrelated"]
        cells += [spread(others["right"]), f"{others['detail']:.2f}", f"{others['frechet']:.0f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
