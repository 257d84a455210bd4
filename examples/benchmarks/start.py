"""Seconds from the command to the first step with a dataset of many rows, cold and warm, on the miniature.

    python examples/benchmarks/start.py --rows 100000 --work_dir build/start

The rows repeat 500 pictures, so that encoding, which happens once per picture and caption, does not hide what a start costs.
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
    columns = {"image": [pictures[i % 500][0] for i in range(rows)], "text": [pictures[i % 500][1] for i in range(rows)]}
    folder.mkdir(parents=True, exist_ok=True)
    features = Features({"image": Image(), "text": Value("string")})
    Dataset.from_dict(columns, features=features).to_parquet(folder / "train.parquet")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--work_dir", type=Path, default=Path("build/start"))
    args = parser.parse_args()
    data = args.work_dir / f"data-{args.rows}"
    if not data.exists():
        make_dataset(args.rows, data)
    flags = ["--pretrained_model_name_or_path", MINIATURE / "model", "--vlm_model_name_or_path", MINIATURE / "vlm"]
    flags += ["--dataset_name", data, "--output_dir", args.work_dir / "out", "--resolution", 64, "--validation_steps", 0]
    flags += ["--max_train_steps", 1, "--report_to", "none", "--mixed_precision", "no"]
    for name in ("cold", "warm"):
        started = time.time()
        command = [sys.executable, "-u", str(ROOT / "train_dopsd_full.py"), *map(str, flags)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        print(f"{name}: {time.time() - started:.0f} s from the command to the end of the first step, {args.rows:,} rows", flush=True)


if __name__ == "__main__":
    main()
