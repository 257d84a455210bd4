"""D-OPSD, SFT and DreamBooth on every concept of a miniature, each at the same learning rates; and the control.

    python examples/miniature/compare.py --work_dir build/compare
    python examples/miniature/compare.py --work_dir build/compare_klein --model klein --seeds 4 --rates 1e-3 3e-3

All methods train the same LoRA (the layers through which the text reaches the network: the context refiner of Z-Image, the
text half of klein's double-stream blocks) at the same rank with the same optimiser, batch, pictures and captions, and get the
same number of transformer passes (a forward or a backward of one image): a D-OPSD step costs 12 per image at K = 4 (teacher
forward, student forward and backward at each state), an SFT step 2, a DreamBooth step 4. With prior prompts, a third of the
D-OPSD steps is on those. Each method's learning rate is picked by the same rule, the highest sum of concept accuracy and
unrelated accuracy; with --training_seeds, that rate is trained with further seeds. The control is D-OPSD whose teacher is shown
pictures of ANOTHER concept. On klein, D-OPSD has four teachers: they see a picture in the multimodal context or as a reference
image, the training picture itself or another one of the set; all with prior prompts. Finished runs are kept in --work_dir and
not run again.
"""

import argparse
import json
import multiprocessing
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import world
from concepts import CONCEPTS, training_pictures
from evaluate import HERE, STEPS, concept_accuracy, load_pipeline, spread, unrelated_accuracy
from judge import Judge


PASSES = {"sft": 2, "dreambooth": 4}  # of the transformer, per image and step; D-OPSD's methods take 12
NAMES = {
    "dopsd": "D-OPSD", "prior": "D-OPSD with prior prompts", "sft": "SFT", "dreambooth": "DreamBooth",
    "control": "D-OPSD, teacher shown wrong pictures", "vlm_target": "D-OPSD, vlm, target", "vlm_other": "D-OPSD, vlm, other",
    "edit_target": "D-OPSD, edit, target", "edit_other": "D-OPSD, edit, other",
}  # fmt: skip
METHODS = {"model": ("dopsd", "prior", "sft", "dreambooth"), "klein": ("sft", "vlm_target", "vlm_other", "edit_target", "edit_other")}
LAYERS = {
    "model": ["context_refiner"],
    "klein": ["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context.linear_in", "ff_context.linear_out"],
}  # fmt: skip
CONTROLLED = {"model": "dopsd", "klein": "vlm_target"}


def wrong_folder(name, folder):
    """The concept's captions beside pictures of the next concept."""
    names = list(CONCEPTS)
    pictures = training_pictures(CONCEPTS[names[(names.index(name) + 1) % len(names)]])
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pictures):
        picture.save(folder / f"{name}_{i}.png")
        (folder / f"{name}_{i}.txt").write_text((HERE / "concepts" / name / f"{name}_{i}.txt").read_text())
    return folder


# of train_dopsd_lora.py alone
DOPSD_FLAGS = ["--vlm_model_name_or_path", HERE / "vlm", "--num_inference_steps", STEPS, "--report_to", "none", "--checkpointing_steps", 100_000]


def training_flags(model, data, folder, rate, seed):
    """What all runs on a miniature have in common."""
    flags = ["--pretrained_model_name_or_path", HERE / model, "--instance_data_dir", data, "--output_dir", folder]
    flags += ["--resolution", world.RESOLUTION, "--learning_rate", rate, "--seed", seed, "--lr_scheduler", "cosine"]
    return [*flags, "--mixed_precision", "no"]


def train(job):
    """Trains one LoRA, unless it is there, and returns its folder."""
    method, name, rate, seed, args = job
    folder = args.work_dir / f"{name}-{method}-{rate:g}{f'-seed{seed}' if seed else ''}"
    torch.set_num_threads(args.threads)
    if not (folder / "pytorch_lora_weights.safetensors").exists():
        sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]
        import train_sft

        import train_dopsd_lora

        data = HERE / "concepts" / name
        if method == "control":
            data = wrong_folder(name, args.work_dir / f"{name}-wrong")
        flags = training_flags(args.model, data, folder, rate, seed)
        flags += ["--rank", 16, "--lora_layers", ",".join(LAYERS[args.model]), "--train_batch_size", 4]
        flags += ["--max_train_steps", args.steps * 12 // PASSES.get(method, 12)]
        if method not in PASSES:
            flags += [*DOPSD_FLAGS, "--validation_steps", 0, "--ema_decay", args.ema_decay, "--states_per_rollout", 4]
        if method == "prior" or (args.model == "klein" and method not in PASSES):
            flags += ["--prior_prompts", HERE / "prior_prompts.txt"]
        if "_" in method:
            context, image = method.split("_")
            flags += ["--teacher_context", context, "--teacher_image", image, "--teacher_prompt_suffix", ""]
        if method == "dreambooth":
            flags += ["--class_prompt", *[f"a {shape}" for shape in world.SHAPES]]
        module = train_sft if method in ("sft", "dreambooth") else train_dopsd_lora
        module.main(module.parse_args([str(flag) for flag in flags]))
    return folder


def run(job):
    """Trains one LoRA and measures it; returns and stores the figures."""
    folder, (_, name, *_, args) = train(job), job
    record = folder / "figures.json"
    if not record.exists():
        judge, pipeline = Judge.from_pretrained(HERE / "judge"), load_pipeline(folder, HERE / args.model)
        results, images = concept_accuracy(pipeline, judge, CONCEPTS[name], range(args.seeds))
        Image.fromarray(np.concatenate(images[0][:12], 1)).save(folder / "concept.png")
        figures = {"concept": [share for share, _ in results], **unrelated_accuracy(pipeline, judge, range(args.seeds))}
        record.write_text(json.dumps(figures))
    return job[:-1], json.loads(record.read_text())


def best_rate(results, method, name, rates):
    """The rate with the highest sum of concept and unrelated accuracy, with the training seed 0."""
    return max(rates, key=lambda r: sum(np.mean(results[method, name, r, 0][k]) for k in ("concept", "right")))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=Path("build/compare"))
    parser.add_argument("--model", choices=list(METHODS), default="model", help="the Z-Image miniature or the klein miniature")
    parser.add_argument("--methods", nargs="+", choices=[name for name in NAMES if name != "control"], help="default: all of the model")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--steps", type=int, default=120, help="D-OPSD steps; the others get the same transformer passes")
    parser.add_argument("--ema_decay", type=float, default=0.999)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--training_seeds", type=int, default=1, help="for each method's best rate; the other rates have one")
    parser.add_argument("--threads", type=int, default=1, help="per run; as many runs at once as fit the cores")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)

    results, methods, controlled = {}, args.methods or METHODS[args.model], CONTROLLED[args.model]
    jobs = [(method, name, rate, 0, args) for method in methods for name in CONCEPTS for rate in args.rates]
    processes = max(1, multiprocessing.cpu_count() // args.threads)
    # a fresh process for each run: accelerate keeps global state
    with multiprocessing.get_context("spawn").Pool(processes, maxtasksperchild=1) as pool:
        for key, figures in pool.imap_unordered(run, jobs, chunksize=1):
            results[key] = figures
            print(key, {k: round(float(np.mean(v)), 3) for k, v in figures.items()}, flush=True)
        best = {(method, name): best_rate(results, method, name, args.rates) for method in methods for name in CONCEPTS}
        jobs = [(*key, rate, seed, args) for seed in range(1, args.training_seeds) for key, rate in best.items()]
        if controlled in methods:
            best |= {("control", name): best[controlled, name] for name in CONCEPTS}
            jobs += [("control", name, best["control", name], 0, args) for name in CONCEPTS]
        for key, figures in pool.imap_unordered(run, jobs, chunksize=1):
            results[key] = figures

    print("\n| concept | method | learning rate | concept right | unrelated prompts right | fine detail | Frechet distance |")
    print("|---|---|---|---|---|---|---|")
    for name in CONCEPTS:
        for method in (*methods, *(["control"] if controlled in methods else [])):
            rate = best[method, name]
            f = results[method, name, rate, 0]
            row = [name, NAMES[method], f"{rate:g}", spread(f["concept"]), spread(f["right"])]
            row += [f"{f['detail']:.2f}", f"{f['frechet']:.0f}"]
            print(f"| {' | '.join(row)} |")
    print("\nAll learning rates: concept right / unrelated prompts right, per cent\n")
    print("| concept | method | " + " | ".join(f"{r:g}" for r in args.rates) + " |\n|---|---" + "|---" * len(args.rates) + "|")
    for name in CONCEPTS:
        for method in methods:
            cells = [results[method, name, r, 0] for r in args.rates]
            cells = [f"{100 * np.mean(c['concept']):.0f} / {100 * np.mean(c['right']):.0f}" for c in cells]
            print(f"| {name} | {NAMES[method]} | {' | '.join(cells)} |")
    if args.training_seeds > 1:
        print(f"\nTraining seeds 0 to {args.training_seeds - 1} at the best rate, per cent: mean over noise seeds for each\n")
        print("| concept | method | concept right | unrelated prompts right |\n|---|---|---|---|")
        for name in CONCEPTS:
            for method in methods:
                runs = [results[method, name, best[method, name], seed] for seed in range(args.training_seeds)]
                cells = [", ".join(f"{100 * np.mean(f[k]):.0f}" for f in runs) for k in ("concept", "right")]
                print(f"| {name} | {NAMES[method]} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
