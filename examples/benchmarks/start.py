"""Seconds from the command to the first step on the miniature, cold and warm.

    python examples/benchmarks/start.py --rows 100000 --work_dir build/start     # a dataset of many rows
    python examples/benchmarks/start.py --where                                  # a LoRA on four pictures: where the time goes

The rows repeat 500 pictures, so that encoding, which happens once per picture and caption, does not hide what a start
costs.
"""

import argparse
import io
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage


ROOT = Path(__file__).resolve().parents[2]
MINIATURE = ROOT / "examples" / "miniature"
sys.path.insert(0, str(MINIATURE))

import world  # noqa: E402


def make_dataset(rows, folder):
    """A parquet dataset with `rows` rows that holds the bytes of its images."""
    rng, pictures = np.random.default_rng(0), []
    for i in range(500):
        scene, file = world.sample_scene(rng), io.BytesIO()
        PILImage.fromarray(world.render(scene, i)).save(file, "png")
        pictures.append(({"bytes": file.getvalue(), "path": None}, world.caption(scene)))
    columns = {
        "image": [pictures[i % 500][0] for i in range(rows)],
        "text": [pictures[i % 500][1] for i in range(rows)],
    }
    folder.mkdir(parents=True, exist_ok=True)
    features = Features({"image": Image(), "text": Value("string")})
    Dataset.from_dict(columns, features=features).to_parquet(folder / "train.parquet")


# steps of train_dopsd_lora.main, in its order
STEPS = {
    "make_accelerator": "accelerator", "check_inputs": "dataset and checks", "build_without_weights": "model on the meta device",
    "encode_contexts": "contexts", "load_for_training": "weights", "place_for_training": "to the device", "add_lora": "LoRA",
    "make_optimizer": "optimiser", "backward_each_state": "rollout and backward",
}  # fmt: skip


def time_steps(flags):
    """Runs one step in this process, which has imported nothing of it yet; prints seconds of imports and of each
    step."""
    started = time.perf_counter()
    sys.path.insert(0, str(ROOT))
    import train_dopsd_lora as script

    seconds = {"imports": time.perf_counter() - started}

    def timed(name, function):
        def run(*args, **kwargs):
            before = time.perf_counter()
            result = function(*args, **kwargs)
            seconds[STEPS[name]] = time.perf_counter() - before
            return result

        return run

    for name in STEPS:
        setattr(script, name, timed(name, getattr(script, name)))
    script.main(script.parse_args(flags))
    total = time.perf_counter() - started
    for name, value in {**seconds, "all else": total - sum(seconds.values()), "total": total}.items():
        print(f"| {name} | {value:.2f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--where", action="store_true", help="one step of a LoRA on four pictures, step by step")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--work_dir", type=Path, default=Path("build/start"))
    args = parser.parse_args()
    flags = ["--pretrained_model_name_or_path", MINIATURE / "model", "--vlm_model_name_or_path", MINIATURE / "vlm"]
    flags += ["--output_dir", args.work_dir / "out", "--resolution", 64, "--validation_steps", 0]
    flags += ["--max_train_steps", 1, "--report_to", "none", "--mixed_precision", "no", "--overwrite_output_dir"]
    if args.where:
        time_steps([*map(str, flags), "--instance_data_dir", str(MINIATURE / "concepts" / "arrow")])
        return
    data = args.work_dir / f"data-{args.rows}"
    if not data.exists():
        make_dataset(args.rows, data)
    for name in ("cold", "warm"):
        started = time.time()
        command = [
            sys.executable,
            "-u",
            str(ROOT / "train_dopsd_full.py"),
            *map(str, flags),
            "--dataset_name",
            str(data),
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        print(
            f"{name}: {time.time() - started:.0f} s from the command to the end of the first step, {args.rows:,} rows",
            flush=True,
        )


if __name__ == "__main__":
    main()
