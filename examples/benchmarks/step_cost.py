"""What an optimisation step costs beside the forwards and backwards that it cannot do without; side by side in one
run.

    python examples/benchmarks/step_cost.py --size mid                 # on the CPU or on a GPU
    python examples/benchmarks/step_cost.py --size real --gradient_checkpointing --mixed_precision bf16   # 6.15 B, a GPU

A Z-Image transformer with random weights and a LoRA; nothing is downloaded. Variants:

    step      this project's optimisation step: rollout, loss, backward per state, clipping, AdamW, EMA
    floor     bare teacher forwards and bare student forwards with backwards of the same transformer, as many as states are
              trained, and bare student forwards for the states before
    sft       one forward with backward and the same update, for comparison
    two-pass  rolls out first, then trains on the states it has seen: K student forwards more
    all       keeps the graphs of all K states until one backward

M of the K states are trained (--states_per_rollout). Where a rollout ends is a matter of chance for M < K: every end
is timed and counts as often as it is drawn. Every repetition runs all variants in turn. Peak memory is what is
allocated above what stands before the step.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from torch.profiler import ProfilerActivity, profile


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train_dopsd_lora as dopsd  # noqa: E402
from pipeline_dopsd import DOPSDZImagePipeline  # noqa: E402


# config of the transformer, side of the latents, tokens of the student's and the teacher's context
SIZES = {
    "tiny": ({"dim": 64, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 64,
              "axes_dims": [8, 12, 12], "axes_lens": [512, 64, 64], "in_channels": 4}, 16, (20, 40)),
    "mid": ({"dim": 512, "n_layers": 6, "n_refiner_layers": 1, "n_heads": 8, "n_kv_heads": 8, "cap_feat_dim": 512,
             "axes_dims": [16, 24, 24], "axes_lens": [512, 64, 64]}, 32, (60, 124)),
    "real": ({}, 128, (124, 700)),
}  # fmt: skip


class Bench:
    """Transformer, LoRA, teacher, optimiser and one batch of random contexts; each method is one variant of a step."""

    def __init__(self, args):
        config, side, tokens = SIZES[args.size]
        self.accelerator = Accelerator(mixed_precision=args.mixed_precision)
        device, dtype = self.accelerator.device, dopsd.weight_dtype_of(args)
        torch.manual_seed(0)
        with torch.device(device):
            torch.set_default_dtype(dtype)
            transformer = ZImageTransformer2DModel(**config)
            torch.set_default_dtype(torch.float32)
        for name in ("x_pad_token", "cap_pad_token"):
            torch.nn.init.normal_(getattr(transformer, name))
        transformer.requires_grad_(False)
        self.pipeline = DOPSDZImagePipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), None, None, None, transformer)
        dopsd.offload_blocks(dopsd.offloaded_blocks(transformer, args), device)
        _, self.parameters = dopsd.add_lora(self.pipeline, self.pipeline.lora_targets(transformer), args)
        dopsd.save_memory_and_time(transformer, args)
        self.args, self.transformer = args, transformer
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, fused=True)
        self.teacher = dopsd.LoRATeacher(transformer, self.parameters, 0.9999)
        draw = lambda n: {"prompt_embeds": torch.randn(n, transformer.config.cap_feat_dim, device=device, dtype=dtype)}  # noqa: E731
        self.contexts = [[draw(n) for _ in range(args.train_batch_size)] for n in tokens]
        self.noise = torch.randn(args.train_batch_size, transformer.config.in_channels, side, side, device=device)

    def update(self):
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def rollout(self, states):
        batch = self.noise, *self.contexts, [states] * len(self.noise)
        return dopsd.rollout(self.pipeline, self.transformer, self.teacher, batch, self.args, self.accelerator)

    def step(self, states):
        dopsd.backward_each_state(self.rollout(states), self.transformer, self.args, self.accelerator, True)
        self.update()
        self.teacher.step()

    def floor(self, states):
        dtype = self.transformer.dtype
        images = list(self.noise.to(dtype).unsqueeze(2).unbind(0))
        times = torch.full((len(images),), 0.5, device=self.noise.device)
        student, teacher = ([c["prompt_embeds"] for c in contexts] for contexts in self.contexts)
        for k in range(states[-1] + 1):
            with torch.no_grad(), self.accelerator.autocast():
                self.transformer(images, times, teacher if k in states else student, return_dict=False)
            if k in states:
                with self.accelerator.autocast():
                    out = self.transformer(images, times, student, return_dict=False)[0]
                torch.autograd.backward(out, [torch.ones_like(o) for o in out])
        self.optimizer.zero_grad(set_to_none=True)

    def sft(self, states):
        with self.accelerator.autocast():
            time = torch.tensor(500.0, device=self.noise.device)
            out = self.pipeline.velocity(self.transformer, self.noise, time, self.contexts[0])
        torch.nn.functional.mse_loss(out, self.noise).backward()
        self.update()

    def two_pass(self, states):
        latents, states = self.noise, []
        timesteps = self.pipeline.few_step_grid(self.args.rollout_steps, latents)
        with torch.no_grad(), self.accelerator.autocast():
            for timestep in timesteps:
                states.append(latents)
                velocity = self.pipeline.velocity(self.transformer, latents, timestep, self.contexts[0])
                latents = self.pipeline.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        for latents, timestep in zip(states, timesteps):
            with torch.no_grad(), self.accelerator.autocast(), self.teacher.network() as network:
                target = self.pipeline.velocity(network, latents, timestep, self.contexts[1])
            with self.accelerator.autocast():
                out = self.pipeline.velocity(self.transformer, latents, timestep, self.contexts[0])
            (torch.nn.functional.mse_loss(out, target) / len(states)).backward()
        self.update()
        self.teacher.step()

    def all(self, states):
        torch.stack([losses for _, losses in self.rollout(states)]).mean().backward()
        self.update()
        self.teacher.step()


VARIANTS = {"step": Bench.step, "floor": Bench.floor, "sft": Bench.sft, "two-pass": Bench.two_pass, "all": Bench.all}


def ends(rollout_steps, count):
    """The M = `count` states up to each state that a rollout may end at, and the share of the draws that end there."""
    draws = [list(range(last + 1 - count, last + 1)) for last in range(count - 1, rollout_steps)]
    return [(states, math.comb(states[-1], count - 1) / math.comb(rollout_steps, count)) for states in draws]


def work_of(bench, count, name, states):
    """One step of the variant `name` with M = `count`, as a function without arguments."""

    def work():
        bench.args.states_per_rollout = count
        VARIANTS[name](bench, states)

    return work


def time_variants(bench, variants, repetitions):
    """Median seconds of each (M, name) in `variants`, mean over the ends of the rollout."""
    works = [
        (variant, states, share)
        for variant in variants
        for states, share in ends(bench.args.rollout_steps, variant[0])
    ]
    times = [[] for _ in works]
    for _ in range(repetitions + 1):
        for (variant, states, _), seconds in zip(works, times):
            seconds.append(seconds_of(work_of(bench, *variant, states), bench.accelerator.device))
    means = dict.fromkeys(variants, 0.0)
    for (variant, _, share), seconds in zip(works, times):
        means[variant] += share * statistics.median(seconds[1:])  # the first does what is done once
    return means


def seconds_of(work, device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def peak_bytes(work, device):
    """Peak of what torch allocates during `work` above what is allocated before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        work()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(file))
        events = [e for e in json.loads(file.read_text())["traceEvents"] if e["name"] == "[memory]"]
    return int(np.cumsum([e["args"]["Bytes"] for e in sorted(events, key=lambda e: e["ts"])]).max())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="mid")
    parser.add_argument("--rollout_steps", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--train_batch_size", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--checkpointed_blocks", type=float, default=1.0)
    parser.add_argument("--offloaded_blocks", type=float, default=0.0)
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    args = parser.parse_args()
    args.loss_weighting, args.gradient_accumulation_steps, args.seed = "velocity", 1, 0
    args.compile_blocks = False
    args.lora_alpha = args.rank
    args.use_rslora = False
    args.lora_dropout = 0.0
    bench, rollout_steps = Bench(args), args.rollout_steps
    device = bench.accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    count = sum(p.numel() for p in bench.transformer.parameters())
    print(f"{name}; torch {torch.__version__}; {args.size}, {count / 1e6:.0f} M parameters; {vars(args)}")
    print(
        "| K | M | variant | seconds (median) | ratio to its floor | to the step of all states | to an SFT step | peak MiB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for every in rollout_steps:
        args.rollout_steps = every
        variants = [(every, name) for name in VARIANTS if name in ("step", "floor", "sft", *args.variants)]
        variants += [(count, name) for count in (2, 1) if count < every for name in ("step", "floor")]
        seconds = time_variants(bench, variants, args.repetitions)
        for count, name in variants:
            ratios = [
                seconds[count, name] / seconds[other] for other in ((count, "floor"), (every, "step"), (every, "sft"))
            ]
            peak = peak_bytes(work_of(bench, count, name, ends(every, count)[-1][0]), device) / 2**20
            cells = [
                every,
                count,
                name,
                f"{seconds[count, name]:.4g}",
                *(f"{ratio:.3f}" for ratio in ratios),
                f"{peak:.0f}",
            ]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
