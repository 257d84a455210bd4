"""What the miniatures of FLUX.2-klein and Krea 2 learn: the four steps of the Z-Image miniature, whose weights they
start from.

The states that the Z-Image miniature visits, from captions and from pictures in its context, are written once. Another
transformer learns the velocities that lead along them on its own few-step grid and, in the first part of its training,
what each of its blocks has to make of the tokens of the picture.
"""

import functools
import json
import sys

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import build
from build import Run, device


sys.path.insert(0, str(build.HERE.parents[1]))

from pipeline_dopsd import DOPSDZImagePipeline  # noqa: E402


ROWS = {"text": 6144, "object": 3584, "style": 2560}
STEPS, TOKENS = 4, 64  # of the few-step grid; of a picture
MATCHED = 0.33  # of the training, in which the blocks also learn the outputs of their counterparts


def z_image():
    pipeline = DOPSDZImagePipeline.from_pretrained(build.HERE / "model", dtype=torch.float32).to(device())
    pipeline.load_multimodal_encoder(str(build.HERE / "vlm"))
    return pipeline


# ---------------------------------------------------------------------------------------------------------------- data
def scaled(args, count):
    """`count` rows in a trial run of `--scale`, whole batches of 64."""
    return max(64, int(count * args.scale) // 64 * 64)


def read_rows(args, kind):
    """Prompts and pictures of the rows, 64 at a time; None for the pictures of captions alone."""
    _, reference, rows = build.read_data(args, kind)
    prompts = [row["prompt"] for row in rows[: scaled(args, ROWS[kind])]]
    for start in tqdm(range(0, len(prompts), 64), desc=kind, mininterval=10):
        chunk = prompts[start : start + 64]
        yield chunk, None if kind == "text" else [Image.fromarray(p) for p in reference[start : start + len(chunk)]]


@torch.no_grad()
def walk(pipeline, contexts, seed):
    """States of the Z-Image miniature before and after each of its steps, (B, 5, 8, 16, 16); row i starts from the
    noise of `seed` + i."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(contexts))]
    states = [torch.cat([torch.randn(1, 8, 16, 16, generator=g) for g in generators]).to(device())]
    for timestep in pipeline.few_step_grid(STEPS, states[0]):
        with torch.autocast(device().type, torch.bfloat16):
            velocity = pipeline.velocity(pipeline.transformer, states[-1], timestep, contexts)
        states.append(pipeline.scheduler.step(velocity, timestep, states[-1], return_dict=False)[0])
    return torch.stack(states, 1).half().cpu()


def write_paths(args, kind, batches):
    """`batches` of contexts of the Z-Image miniature, and the states that it visits."""
    pipeline, contexts, paths = z_image(), [], []
    for known in batches(pipeline):
        paths.append(walk(pipeline, known, len(contexts)))
        contexts += halved(known)
    torch.save({"contexts": contexts, "paths": torch.cat(paths)}, args.work_dir / f"paths_{kind}.pt")


@torch.no_grad()
def stage_paths(args):
    for kind in ROWS:

        def encode(p, kind=kind):
            rows = read_rows(args, kind)
            return (p.encode_teacher(*row) if row[1] else p.encode_student(row[0]) for row in rows)

        write_paths(args, kind, encode)


def halved(contexts):
    return [{name: value.half().cpu() for name, value in context.items()} for context in contexts]


@torch.no_grad()
def write_contexts(args, prefix, pipeline, ways):
    """The contexts of a new miniature's `pipeline`, of captions (`text`) and, with pictures, of each of `ways`,
    functions of prompts and pictures."""
    pipeline.load_multimodal_encoder(str(build.HERE / "vlm"))
    for kind in ROWS:
        contexts = {way: [] for way in (["text"] if kind == "text" else ways)}
        for prompts, pictures in read_rows(args, kind):
            for way, found in contexts.items():
                found += halved(ways[way](prompts, pictures) if pictures else pipeline.encode_student(prompts))
        torch.save(contexts, args.work_dir / f"{prefix}_contexts_{kind}.pt")


class Rows:
    """Batches of 64 rows whose contexts are of one length, so that nothing is padded."""

    def __init__(self, args, prefix, kind, way):
        known = torch.load(args.work_dir / f"paths_{kind}.pt", mmap=True)
        self.theirs, self.paths = known["contexts"], known["paths"]
        self.ours = torch.load(args.work_dir / f"{prefix}_contexts_{kind}.pt", mmap=True)[way]
        lengths = np.array([len(c["prompt_embeds"]) for c in self.ours])
        self.rows_of = {int(n): np.flatnonzero(lengths == n) for n in np.unique(lengths)}
        self.lengths, counts = np.array(list(self.rows_of)), np.array([len(rows) for rows in self.rows_of.values()])
        self.shares = counts / counts.sum()

    def draw(self, rng, sigmas):
        """Both contexts, states before and after one step of the grid `sigmas` for each row, and the number of the
        step."""
        rows = rng.choice(self.rows_of[int(rng.choice(self.lengths, p=self.shares))], 64)
        k = torch.from_numpy(rng.integers(STEPS, size=64))
        contexts = [
            [{name: v.float().to(device()) for name, v in c[i].items()} for i in rows]
            for c in (self.ours, self.theirs)
        ]
        paths = self.paths[rows].float()
        return *contexts, *(at(paths, sigmas[n]).to(device()) for n in (k, k + 1)), k


def at(paths, sigmas):
    """States at `sigmas` (B,), on the straight lines between those of `paths`, which are at the Z-Image miniature's
    own."""
    knots, row = build.grid(STEPS), torch.arange(len(sigmas))
    j = torch.bucketize(-sigmas, -knots, right=True).clamp(1, STEPS)
    share = ((knots[j - 1] - sigmas) / (knots[j - 1] - knots[j])).view(-1, 1, 1, 1)
    return torch.lerp(paths[row, j - 1], paths[row, j], share)


# --------------------------------------------------------------------------------------------------------- transformer
class Donor:
    """The transformer of the Z-Image miniature as a source of weights.

    Its norms behind attention and feed-forward become scales of their last layers, as large as they are on a batch,
    and its
    modulations their mean over the few steps: blocks of klein and Krea 2 have no such norms, and other modulations.
    """

    def __init__(self, args):
        pipeline = z_image()
        t = self.transformer = pipeline.transformer
        self.blocks = [*t.noise_refiner, *t.layers]
        self.embedder = t.all_x_embedder["2-1"]
        self.final = t.all_final_layer["2-1"]
        seen, handles = {}, []

        def listen(module, key, of):
            handles.append(
                module.register_forward_hook(lambda m, i, output: seen.setdefault(key, []).append(of(output.float())))
            )

        size = lambda output: output.square().mean(-1).sqrt().mean()  # noqa: E731
        listen(self.embedder, self.embedder, size)
        for block in (*self.blocks, *t.context_refiner):
            for name in ("attention", "feed_forward"):
                listen(getattr(block, name), (block, name), size)
        for module in (*(block.adaLN_modulation for block in self.blocks), self.final.adaLN_modulation):
            listen(module, module, lambda output: output.mean(0))
        with torch.no_grad():
            prompts, _ = next(read_rows(args, "text"))
            self.contexts, x = pipeline.encode_student(prompts), torch.randn(len(prompts), 8, 16, 16).to(device())
            for timestep in pipeline.few_step_grid(STEPS, x):
                x = pipeline.scheduler.step(
                    pipeline.velocity(t, x, timestep, self.contexts), timestep, x, return_dict=False
                )[0]
        for handle in handles:
            handle.remove()
        self.seen = {key: torch.stack(values).mean(0) for key, values in seen.items()}
        index = torch.arange(4 * t.in_channels).view(2, 2, t.in_channels)  # row, column, channel: of its tokens
        self.order = index.permute(2, 0, 1).flatten()  # channel, row, column: those of klein and Krea 2

    def modulation(self, block):
        """Scale and gate of attention, scale and gate of feed-forward; a block without has none to add or to multiply
        with."""
        if not block.modulation:
            return torch.tensor([0.0, 1.0, 0.0, 1.0]).to(device())[:, None]
        scale_msa, gate_msa, scale_mlp, gate_mlp = self.seen[block.adaLN_modulation].chunk(4)
        return scale_msa, gate_msa.tanh(), scale_mlp, gate_mlp.tanh()

    def last_layers(self, block):
        """Weights of the last layer of attention and of feed-forward, with the norms behind them."""
        norms = {"attention": block.attention_norm2, "feed_forward": block.ffn_norm2}
        scales = [norms[name].weight / self.seen[block, name] for name in ("attention", "feed_forward")]
        layers = (block.attention.to_out[0], block.feed_forward.w2)
        return [scale[:, None] * layer.weight for scale, layer in zip(scales, layers)]


class Counterparts:
    """What the blocks of the Z-Image miniature, and `blocks` of another, make of the tokens of the picture.

    `picture_of(output)` finds these tokens in the output of a block.
    """

    def __init__(self, theirs, blocks, picture_of):
        self.theirs, self.outputs = theirs, {"theirs": {}, "ours": {}}
        old = theirs.transformer
        sides = {
            "theirs": ([*old.noise_refiner, *old.layers], lambda output: output[:, :TOKENS]),
            "ours": (blocks, picture_of),
        }
        for side, (side_blocks, tokens_of) in sides.items():
            for number, block in enumerate(side_blocks):
                block.register_forward_hook(functools.partial(self.note, self.outputs[side], number, tokens_of))

    def note(self, outputs, number, tokens_of, module, inputs, output):
        outputs[number] = tokens_of(output)

    def distance(self, x, timesteps, contexts):
        """Mean squared error of the blocks' outputs, in variances of theirs; the velocity here was computed before."""
        with torch.no_grad(), torch.autocast(device().type, torch.bfloat16):
            self.theirs.velocity(self.theirs.transformer, x, timesteps, contexts)
        pairs = [(self.outputs["ours"][n].float(), known.float()) for n, known in self.outputs["theirs"].items()]
        return sum(F.mse_loss(own, known) / known.var() for own, known in pairs) / len(pairs)


def distill(args, prefix, pipeline, cycle, counterparts, pack=lambda latents: latents):
    """Regression of the velocity between neighbouring states: four steps, no guidance; see `MATCHED`.

    `cycle` says what each batch holds, in turn: kind of rows and way of showing the picture; `pack` makes latents of
    the pipeline from those of the Z-Image miniature.
    """
    rows = {pair: Rows(args, prefix, *pair) for pair in dict.fromkeys(cycle)}
    steps = max(len(cycle), int(args.distill_steps * args.scale))
    run = Run(args, f"{prefix}_distilled", pipeline.transformer, steps, 1.5e-3, ema_decay=0.995)
    logs = {"blocks": []} | {pair: [] for pair in rows}
    pipeline.few_step_grid(STEPS, pack(torch.empty(1, 8, 16, 16)))
    sigmas = pipeline.scheduler.sigmas.float()

    def loss_of(rng):
        pair = cycle[run.step % len(cycle)]
        contexts, known, x, after, k = rows[pair].draw(rng, sigmas)
        step, timesteps = (sigmas[k + 1] - sigmas[k]).view(-1, 1, 1, 1).to(device()), 1000 * sigmas[k].to(device())
        with torch.autocast(device().type, torch.bfloat16):
            velocity = pipeline.velocity(run.model, pack(x), timesteps, contexts)
        loss = F.mse_loss(velocity, pack((after - x) / step))
        logs[pair].append(loss.item())
        if run.step < MATCHED * run.steps:
            distance = counterparts.distance(x, timesteps, known)
            logs["blocks"].append(distance.item())
            loss = loss + distance
        return loss

    run.train(loss_of)
    build.save_transformer(run.model, run.path / "model")
    run.finish(
        **{
            " ".join(pair) if pair in rows else pair: round(float(np.mean(v[-50:])), 4)
            for pair, v in logs.items()
            if v
        }
    )


def export(args, name, stock_class, pipeline, **settings):
    """`name`/ in fp16, in the Hub's layout of the family."""
    folder = args.output_dir / name
    for component in (pipeline.text_encoder, pipeline.vae, pipeline.transformer):
        component.half()
    for component in (pipeline.vae, pipeline.transformer):  # they would name a path of this machine
        component.register_to_config(_name_or_path="")
    pipeline.text_encoder.config._name_or_path = ""
    pipeline.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": stock_class} | settings  # a base of the Hub names the stock class
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


STAGES = {"data": build.stage_data, "paths": stage_paths}


def stage_parser(description, stages, distill_steps):
    """Arguments of a program that builds a miniature from these paths."""
    parser = build.stage_parser(description, stages)
    parser.add_argument("--distill_steps", type=int, default=distill_steps)
    return parser
