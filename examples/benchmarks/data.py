"""What a large set of images costs before and in the steps.

    python examples/benchmarks/data.py inspect --rows 2000             # cold inspection of photos of 12 megapixels
    python examples/benchmarks/data.py start --rows 100000             # start of a training on as many, all contexts encoded
    python examples/benchmarks/data.py step                            # seconds of drawing and reading in a step of a million rows
    python examples/benchmarks/data.py wait                            # share of a step that waits for contexts of 4 and 40 MB

Photos are 200 distinct ones under other names (hard links), so that the disk holds 0.7 GB; they come from the system's
cache, not from the disk.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from datasets import Dataset
from PIL import Image


ROOT = Path(__file__).resolve().parents[2]
MINIATURE = ROOT / "examples" / "miniature"
sys.path.insert(0, str(ROOT))

import train_dopsd_lora as script  # noqa: E402


FLAGS = [
    "--pretrained_model_name_or_path",
    MINIATURE / "model",
    "--vlm_model_name_or_path",
    MINIATURE / "vlm",
    "--resolution",
    64,
]
FLAGS += [
    "--validation_steps",
    0,
    "--max_train_steps",
    1,
    "--report_to",
    "none",
    "--mixed_precision",
    "no",
    "--overwrite_output_dir",
]


def make_photos(folder, rows, distinct=200):
    """`rows` names of `distinct` JPEGs of 4000 x 3000 pixels, a third of them lying on their side, with captions in
    metadata.jsonl."""
    if (folder / "metadata.jsonl").exists():
        return
    folder.mkdir(parents=True)
    rng, exif = np.random.default_rng(0), Image.Exif()
    exif[0x0112] = 6
    coarse = Image.fromarray(rng.integers(0, 256, (75, 100, 3), dtype=np.uint8)).resize(
        (4000, 3000), Image.Resampling.BICUBIC
    )
    pixels = (
        (np.asarray(coarse).astype(np.int16) + rng.integers(-14, 15, (3000, 4000, 3))).clip(0, 255).astype(np.uint8)
    )
    for i in range(rows):
        if i < distinct:
            moved = np.roll(pixels, rng.integers(3000, size=2), (0, 1))
            Image.fromarray(moved).save(folder / f"{i:06}.jpg", quality=88, exif=exif if i % 3 == 0 else Image.Exif())
        else:
            os.link(folder / f"{i % distinct:06}.jpg", folder / f"{i:06}.jpg")
    lines = (
        json.dumps({"file_name": f"{i:06}.jpg", "text": f"photo {i} of a mountain lake, {'with a long caption ' * 9}"})
        for i in range(rows)
    )
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def command_line(args, folder):
    return [*map(str, FLAGS), "--output_dir", str(args.work_dir / "out"), "--instance_data_dir", str(folder),
            "--context_cache_dir", str(args.work_dir / f"contexts-{args.rows}")]  # fmt: skip


def inspect(args):
    folder = args.work_dir / f"photos-{args.rows}"
    make_photos(folder, args.rows)
    parsed = script.parse_args([*command_line(args, folder), "--dataset_num_workers", str(args.workers)])
    before, started = os.times(), time.perf_counter()
    script.inspect_images(script.read_dataset(parsed), [(64, 64), (56, 72), (72, 56)], parsed)
    seconds, spent = time.perf_counter() - started, sum(os.times()[:4]) - sum(before[:4])
    print(
        f"| {args.rows:,} photos | {args.workers} processes | {seconds:.0f} s | {1000 * spent / args.rows:.1f} ms of a processor each |"
    )


def start(args):
    """Nothing is encoded: the files of all contexts hold zeros."""
    folder = args.work_dir / f"photos-{args.rows}"
    make_photos(folder, args.rows)
    flags = command_line(args, folder)
    parsed = script.parse_args(flags)
    script.make_accelerator(parsed)
    _, dataset, pairs, cache, _, _ = script.check_inputs(parsed)
    width = json.loads((MINIATURE / "model" / "text_encoder" / "config.json").read_text())["hidden_size"]
    rows = list(dataset.select_columns(["image_hash", "bucket", "reference_hashes"]))
    for index, caption in pairs:
        for path in cache.paths(*script.rows_of(rows, index, parsed), caption):
            if not path.exists():
                cache.write(path, {"prompt_embeds": torch.zeros(16, width)})
    command = [sys.executable, "-u", str(ROOT / "train_dopsd_lora.py"), *flags]
    # datasets takes what this program knows of the images for another's: the script inspects them once more
    for which in ("first", "warm"):
        started = time.time()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        contexts = len(list(cache.folder.iterdir()))
        print(
            f"| {args.rows:,} photos, {contexts:,} contexts | {which} start and step | {time.time() - started:.0f} s |"
        )


def step(args):
    rows, rng = args.rows, np.random.default_rng(0)
    buckets = [[1024, 1024], [896, 1152], [1152, 896], [832, 1216], [1216, 832]]
    columns = {"captions": [["a photo"]] * rows, "bucket": [buckets[k] for k in rng.integers(5, size=rows)]}
    columns |= {
        "image_hash": [f"{i:064}" for i in range(rows)],
        "reference_hashes": [[]] * rows,
        "reference_sizes": [[]] * rows,
    }
    dataset = Dataset.from_dict(columns)
    flags = SimpleNamespace(teacher_image="target", train_batch_size=1, seed=0, prior_prompts="none")
    pipeline = SimpleNamespace(initial_noise=lambda height, width, generator: torch.zeros(1))  # and no contexts
    cache = SimpleNamespace(read=lambda row, shown, caption: ({}, {}))
    layouts = script.layouts_of(dataset, flags)
    dataset = dataset.select_columns(["captions", "bucket", "image_hash", "reference_hashes"])

    def make(micro_step):
        draws = script.draw_batch(layouts, flags, micro_step, 0, 1)
        return script.make_batch(pipeline, dataset, cache, draws, None, flags, "cpu")

    started = time.perf_counter()
    make(0)
    first, started = time.perf_counter() - started, time.perf_counter()
    for micro_step in range(1, 501):
        make(micro_step)
    each, started = (time.perf_counter() - started) / 500, time.perf_counter()
    make(rows)
    print(
        f"| {rows:,} rows | first {first:.2f} s | then {1000 * each:.2f} ms a micro-step | next epoch {time.perf_counter() - started:.2f} s |"
    )


def wait(args):
    """The device is played by a sleep of --step_seconds; contexts are read, checked and copied as in training."""
    cache = script.ContextCache.__new__(script.ContextCache)
    cache.folder, cache.models = args.work_dir / "wait", ["base", "dtype", "vlm", "", None]
    cache.folder.mkdir(parents=True, exist_ok=True)
    row = {"reference_hashes": [], "bucket": [1024, 1024]}
    for megabytes in (4, 40):
        shown = [{**row, "image_hash": f"{megabytes}-{i}"} for i in range(8)]
        for one in shown:
            for path in cache.paths(one, one, one["image_hash"]):
                cache.write(path, {"prompt_embeds": torch.randn(512, megabytes * 10**6 // 1024).bfloat16()})

        def make(number):
            one = shown[number % 8]
            return [
                {name: t.clone() for name, t in context.items()} for context in cache.read(one, one, one["image_hash"])
            ]

        for how, batches in [
            ("read in the step", map(make, range(20))),
            ("read ahead", script.read_ahead(make, range(20))),
        ]:
            waits, started = [], time.perf_counter()
            for _ in range(20):
                before = time.perf_counter()
                batch = next(batches)
                waits.append(time.perf_counter() - before)
                time.sleep(args.step_seconds)
                del batch
            share = sum(waits[1:]) / (time.perf_counter() - started)
            print(
                f"| {megabytes} MB for each of student and teacher | {how} | {1000 * np.mean(waits[1:]):.2f} ms | {100 * share:.2f} % |"
            )
    shutil.rmtree(cache.folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["inspect", "start", "step", "wait"])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--step_seconds", type=float, default=0.8)
    parser.add_argument("--work_dir", type=Path, default=Path("build/data"))
    args = parser.parse_args()
    {"inspect": inspect, "start": start, "step": step, "wait": wait}[args.what](args)


if __name__ == "__main__":
    main()
