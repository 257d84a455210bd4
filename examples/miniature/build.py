"""Builds the miniature from nothing: data, tokenizer, VLM, VAE, judge, base model, step-distilled model.

    python examples/miniature/build.py all                # every stage that is not finished yet
    python examples/miniature/build.py base --work_dir build/miniature

Each stage reads what the stages before it left in `--work_dir`, saves a checkpoint every 200 steps and goes on from
there when it is called again. `vlm` and `vae` do not depend on each other and can run side by side. A GPU is used when
there is one.
"""

import argparse
import json
import multiprocessing
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.training_utils import EMAModel, compute_density_for_timestep_sampling
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer
from tqdm import tqdm
from transformers import (
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import world
from judge import ATTRIBUTES, Judge, inspect, label, to_tensor


HERE = Path(__file__).resolve().parent
KINDS = ("text", "object", "style")
# what each training batch holds, in turn
CYCLE = (
    "text",
    "object",
    "style",
    "object",
    "style",
    "object",
    "style",
    "text",
)
torch._dynamo.config.recompile_limit = 64  # one version of a block per sequence length, with and without gradients
SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
    "<think>", "</think>",
]  # fmt: skip
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string -%}{{ message.content }}
{%- else -%}{%- for part in message.content -%}
{%- if part.type == 'image' -%}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false -%}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif -%}
{%- endif -%}"""
GUIDANCE = 1.5  # in the pipeline's convention: positive + g * (positive - negative)
IMAGE_TOKENS = 16
LOOK_TOKENS = 3
NAMES = world.SHAPES + world.PICTURED_SHAPES
ALL_PATTERNS = world.PATTERNS + world.PICTURED_PATTERNS
ROPE = {"rope_type": "default", "rope_theta": 1e4}


def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# --------------------------------------------------------------------------------------------------------------- data
def _pair(job):
    """One training row: the target picture, the reference picture, the prompt of each way of asking for the target."""
    index, kind, seed = job
    rng = np.random.default_rng([seed, index])
    word = world.new_word(rng)
    scene_seed = int(rng.integers(2**31))
    if kind == "text":
        scene = world.sample_scene(rng)
        picture = world.render(scene, scene_seed)
        return picture, picture, world.caption(scene, rng), scene, scene
    if kind == "object":
        scene = world.sample_scene(rng, new=True)
        name = word if rng.random() < 0.85 else (scene.shape if scene.shape in world.SHAPES else "thing")
        reference = world.sample_surroundings(rng, scene)
        prompt = world.caption(scene, rng, name=name)
    else:
        scene = replace(world.sample_scene(rng), style=f"random-{rng.integers(2**31)}")
        reference = replace(world.sample_scene(rng), style=scene.style)
        prompt = world.caption(scene, rng, style_word=word)
    target = world.render(scene, scene_seed)
    if rng.random() < 0.35:  # the teacher of D-OPSD sees the very picture that it is to draw
        return target, target, prompt, scene, scene
    return target, world.render(reference, scene_seed + 1), prompt, scene, reference


def stage_data(args):
    """Draws the training pictures once: 24,000 captioned scenes, 24,000 object pairs, 12,000 style pairs."""
    folder = args.work_dir / "data"
    folder.mkdir(parents=True, exist_ok=True)
    for kind, count in (("text", 24000), ("object", 24000), ("style", 12000)):
        count = max(64, int(count * args.scale))
        jobs = [(i, kind, args.seed) for i in range(count)]
        with multiprocessing.Pool() as pool:
            rows = list(tqdm(pool.imap(_pair, jobs, chunksize=64), total=count, desc=f"draw {kind}"))
        np.save(folder / f"{kind}_target.npy", np.stack([r[0] for r in rows]))
        if kind != "text":
            np.save(folder / f"{kind}_reference.npy", np.stack([r[1] for r in rows]))
        lines = [json.dumps({"prompt": r[2], "scene": vars(r[3]), "reference": vars(r[4])}) for r in rows]
        (folder / f"{kind}.jsonl").write_text("\n".join(lines))


def read_data(args, kind):
    """Targets, references (N, 64, 64, 3) as memory maps, and the rows with prompt and scenes."""
    folder = args.work_dir / "data"
    target = np.load(folder / f"{kind}_target.npy", mmap_mode="r")
    reference = target if kind == "text" else np.load(folder / f"{kind}_reference.npy", mmap_mode="r")
    rows = [json.loads(line) for line in (folder / f"{kind}.jsonl").read_text().splitlines()]
    for row in rows:
        row["scene"], row["reference"] = world.Scene(**row["scene"]), world.Scene(**row["reference"])
    return target, reference, rows


# ---------------------------------------------------------------------------------------------------------- tokenizer
def stage_tokenizer(args):
    """Byte-level BPE over captions, with Qwen's special tokens and chat template."""
    rng = np.random.default_rng(args.seed)
    texts = [world.caption(world.sample_scene(rng), rng) for _ in range(2000)]
    texts += [world.caption(world.sample_scene(rng), rng, name=world.new_word(rng)) for _ in range(1000)]
    texts += [
        "user\n",
        "assistant\n",
        *world.PICTURED_PATTERNS,
        *world.PICTURED_SHAPES,
        "any",
        "odd",
        "thing",
        "style",
    ] * 50
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=411, special_tokens=[], show_progress=False)
    bpe.save_model(str(args.work_dir))
    vocab = json.loads((args.work_dir / "vocab.json").read_text())
    merges = [tuple(line.split()) for line in (args.work_dir / "merges.txt").read_text().splitlines()[1:]]
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, additional_special_tokens=SPECIAL_TOKENS[1:])
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.model_max_length = 512
    tokenizer.save_pretrained(args.work_dir / "tokenizer")
    assert tokenizer.encode("<|im_start|>") == [tokenizer.convert_tokens_to_ids("<|im_start|>")]


def read_tokenizer(args):
    return Qwen2Tokenizer.from_pretrained(args.work_dir / "tokenizer")


def image_processor():
    pixels = world.RESOLUTION**2
    half = [0.5, 0.5, 0.5]
    return Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=2, temporal_patch_size=2, image_mean=half, image_std=half, resample=3,
        size={"shortest_edge": pixels // 4, "longest_edge": pixels * 4},
    )  # fmt: skip


def chat(tokenizer, prompt, picture):
    content = ([{"type": "image"}] if picture else []) + [{"type": "text", "text": prompt}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return text.replace("<|image_pad|>", "<|image_pad|>" * IMAGE_TOKENS)


# ---------------------------------------------------------------------------------------------------- training helpers
class Run:
    """Model, EMA, optimiser and one-cycle schedule of a stage, saved every 200 steps and resumed from there."""

    def __init__(self, args, name, model, steps, lr, ema_decay=None, extra_parameters=()):
        self.path, self.model, self.steps = args.work_dir / name, model, steps
        muon, adam = [], list(extra_parameters)
        for key, parameter in model.named_parameters():
            hidden = parameter.ndim == 2 and ("layers." in key or "refiner." in key or "blocks." in key)
            (muon if hidden else adam).append(parameter)
        self.optimizers = [torch.optim.AdamW(adam, lr=lr, weight_decay=0.0, betas=(0.9, 0.98))]
        if muon:
            self.optimizers.append(torch.optim.Muon(muon, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
        self.schedulers = [
            torch.optim.lr_scheduler.OneCycleLR(o, max_lr=lr, total_steps=steps, pct_start=0.05, cycle_momentum=False)
            for o in self.optimizers
        ]
        self.parameters = muon + adam
        self.ema = EMAModel(model.parameters(), decay=ema_decay) if ema_decay else None
        self.step, self.losses, self.seconds = 0, [], 0.0
        state = self.path / "state.pt"
        if state.exists():
            saved = torch.load(state, map_location=device(), weights_only=True)
            model.load_state_dict(saved["model"])
            for o, values in zip(self.optimizers + self.schedulers, saved["optimizers"]):
                o.load_state_dict(values)
            if self.ema:
                self.ema.load_state_dict(saved["ema"])
            with torch.no_grad():
                for p, values in zip(extra_parameters, saved["extra"]):
                    p.copy_(values)
            self.step, self.seconds = saved["step"], saved["seconds"]
        self.extra_parameters = list(extra_parameters)

    def save(self):
        self.path.mkdir(parents=True, exist_ok=True)
        values = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers + self.schedulers],
            "ema": self.ema.state_dict() if self.ema else None,
            "extra": [p.detach() for p in self.extra_parameters],
            "step": self.step,
            "seconds": self.seconds,
        }
        torch.save(values, self.path / "state.tmp")
        (self.path / "state.tmp").rename(self.path / "state.pt")

    def train(self, loss_of):
        """Calls `loss_of(rng)` once a step; `rng` depends on the step alone, so that a resumed run draws the same."""
        bar = tqdm(
            range(self.step, self.steps), initial=self.step, total=self.steps, desc=self.path.name, mininterval=10
        )
        started = time.time()
        for step in bar:
            rng = np.random.default_rng([step, 11])
            torch.manual_seed(step)
            loss = loss_of(rng)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            for o in self.optimizers:
                o.step()
                o.zero_grad()
            for s in self.schedulers:
                s.step()
            if self.ema:
                self.ema.step(self.model.parameters())
            self.losses.append(loss.item())
            self.step = step + 1
            if self.step % 50 == 0:
                bar.write(f"{self.path.name} step {self.step} loss {np.mean(self.losses[-50:]):.4f}")
            if self.step % 200 == 0 or self.step == self.steps:
                self.seconds += time.time() - started
                started = time.time()
                self.save()
        if self.ema:
            self.ema.copy_to(self.model.parameters())
        return self.model.eval()

    def finish(self, **figures):
        record = {"steps": self.steps, "seconds": round(self.seconds), **figures}
        (self.path / "figures.json").write_text(json.dumps(record, indent=1))
        print(self.path.name, record)


# ---------------------------------------------------------------------------------------------------------------- vlm
def vlm_config(tokenizer):
    token = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 5,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 2048,
        "pad_token_id": token("<|endoftext|>"),
        "rope_parameters": {**ROPE, "mrope_section": [6, 5, 5], "mrope_interleaved": True},
    }  # fmt: skip
    vision = {
        "depth": 3, "hidden_size": 96, "intermediate_size": 256, "num_heads": 4, "patch_size": 8,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 128, "num_position_embeddings": 64,
        "deepstack_visual_indexes": [1],
    }  # fmt: skip
    return Qwen3VLConfig(
        text_config=text, vision_config=vision, image_token_id=token("<|image_pad|>"), tie_word_embeddings=True,
        video_token_id=token("<|video_pad|>"), vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )  # fmt: skip


def answer(scene, prompt, seen):
    """The description that the VLM learns to give: what the prompt says and, where `seen`, what the picture shows."""
    said = prompt.split()
    show = lambda value: value if seen or value in said else "any"  # noqa: E731
    shape = scene.shape if scene.shape in NAMES else "odd"
    told = [value if value in said else "any" for value in (scene.size, scene.background, scene.position)]
    return " ".join(["", *told, show(scene.colour), show(scene.pattern), show(shape)])


class Looks(torch.nn.Module):
    """Linear read-outs of hidden states: the picture from its own tokens; the upright silhouette, colour, pattern and
    style of what it shows from the last `LOOK_TOKENS` tokens before the answer. They give the VLM a reason to keep,
    where the text-to-image model reads, what an object looks like wherever it stands."""

    def __init__(self):
        super().__init__()
        sizes = {"silhouette": 24 * 24, "colour": 3, "pattern": len(ALL_PATTERNS), "shape": len(NAMES) + 1}
        sizes |= {"texture": len(world.TEXTURES), "edge": len(world.EDGES), "background": 3, "texture_colour": 3}
        self.sizes = sizes
        self.picture = torch.nn.Linear(128, 16 * 16 * 3)
        self.last = torch.nn.Linear(128 * LOOK_TOKENS, sum(sizes.values()))

    def picture_loss(self, hidden, pictures):
        """`hidden` (B * 16, 128) of the image tokens, `pictures` (B, 3, 64, 64)."""
        blocks = pictures.unfold(2, 16, 16).unfold(3, 16, 16)  # (B, 3, 4, 4, 16, 16)
        return F.mse_loss(self.picture(hidden), blocks.permute(0, 2, 3, 1, 4, 5).reshape(len(hidden), -1))

    def read(self, hidden):
        return dict(zip(self.sizes, self.last(hidden).split(list(self.sizes.values()), dim=1)))

    def object_loss(self, hidden, scenes):
        """`hidden` (B, 128 * LOOK_TOKENS). Returns the loss and the share of named shapes that are read off right."""
        out = self.read(hidden)
        index = lambda options, value: options.index(value) if value in options else len(options)  # noqa: E731
        target = lambda values: torch.tensor(np.array(values)).to(hidden.device)  # noqa: E731
        shapes = target([index(NAMES, s.shape) for s in scenes])
        masks = target([world.silhouette(s.shape).ravel() for s in scenes])
        colours = target([world.COLOURS[s.colour] for s in scenes]).float() / 127.5 - 1
        loss = F.binary_cross_entropy_with_logits(out["silhouette"], masks) + F.mse_loss(out["colour"], colours)
        loss = loss + 0.5 * F.cross_entropy(out["shape"], shapes)
        loss = loss + 0.5 * F.cross_entropy(out["pattern"], target([ALL_PATTERNS.index(s.pattern) for s in scenes]))
        return loss, (out["shape"].argmax(1) == shapes).float().mean().item()

    def style_loss(self, hidden, scenes):
        out = self.read(hidden)
        styles = [world.style_of(s.style) for s in scenes]
        target = lambda values: torch.tensor(np.array(values)).to(hidden.device)  # noqa: E731
        loss = 0.5 * F.cross_entropy(out["texture"], target([world.TEXTURES.index(s.texture) for s in styles]))
        loss = loss + 0.5 * F.cross_entropy(out["edge"], target([world.EDGES.index(s.edge) for s in styles]))
        backgrounds = [style.background or world.BACKGROUNDS[scene.background] for style, scene in zip(styles, scenes)]
        loss = loss + F.mse_loss(out["background"], target(backgrounds).float() / 127.5 - 1)
        shown = target([s.texture != "none" for s in styles])
        textures = target([s.texture_colour for s in styles]).float() / 127.5 - 1
        return loss + F.mse_loss(out["texture_colour"][shown], textures[shown])


def vlm_inputs(tokenizer, processor, texts, pictures):
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    if pictures is not None:
        batch.update(processor(images=[np.asarray(p) for p in pictures], return_tensors="pt"))
    batch["mm_token_type_ids"] = (batch["input_ids"] == tokenizer.convert_tokens_to_ids("<|image_pad|>")).long()
    return {k: v.to(device()) for k, v in batch.items()}


def stage_vlm(args):
    """Describing pictures, reading captions, answering prompts about pictured things; and the read-outs of `Looks`
    from the hidden states that the text-to-image model will see."""
    tokenizer, processor = read_tokenizer(args), image_processor()
    data = {kind: read_data(args, kind) for kind in KINDS}
    torch.manual_seed(args.seed)
    model = Qwen3VLForConditionalGeneration(vlm_config(tokenizer)).to(device())
    looks = Looks().to(device())
    run = Run(args, "vlm", model, max(4, int(args.vlm_steps * args.scale)), 2e-3, extra_parameters=looks.parameters())
    logs = {0: [], 1: [], 2: [], "picture": [], "shape": []}

    def loss_of(rng):
        task = run.step % 3  # describe the picture | read the caption | prompt about the picture
        kind = "text" if task == 1 else ("object" if rng.random() < 0.75 else "style")
        target, reference, rows = data[kind]
        picks = np.sort(rng.choice(len(rows), 48, replace=len(rows) < 48))
        prompts, answers = [], []
        for i in picks:
            row = rows[i]
            if task == 0:
                prompt = world.caption(row["reference"], name="thing")
                prompts.append("describe")
                answers.append(answer(row["reference"], prompt, True))
            elif task == 1:
                prompts.append(row["prompt"])
                answers.append(answer(row["scene"], row["prompt"], False))
            else:
                prompts.append(row["prompt"])
                answers.append(answer(row["scene"], row["prompt"], kind == "object"))
        heads = [chat(tokenizer, p, task != 1) for p in prompts]
        pictures = reference[picks] if task != 1 else None
        inputs = vlm_inputs(tokenizer, processor, [h + a + "<|im_end|>" for h, a in zip(heads, answers)], pictures)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        ends = [len(tokenizer(head)["input_ids"]) for head in heads]
        for row_labels, end in zip(labels, ends):
            row_labels[:end] = -100
        out = model(**inputs, labels=labels, output_hidden_states=task != 1)
        logs[task].append(out.loss.item())
        if task == 1:
            return out.loss
        hidden = out.hidden_states[-2].float()
        picture_loss = looks.picture_loss(hidden[inputs["mm_token_type_ids"] == 1], to_tensor(pictures).to(device()))
        logs["picture"].append(picture_loss.item())
        last = torch.stack([h[end - LOOK_TOKENS : end].flatten() for h, end in zip(hidden, ends)])
        scenes, loss = [rows[i]["reference"] for i in picks], out.loss + 3 * picture_loss
        if kind == "style":
            loss = loss + looks.style_loss(last, scenes)
        if kind == "object" or task == 0:
            object_loss, share = looks.object_loss(last, scenes)
            logs["shape"].append(share)
            loss = loss + object_loss
        return loss

    run.train(loss_of)
    model.save_pretrained(args.work_dir / "vlm" / "model")
    names = {
        0: "describe",
        1: "caption",
        2: "prompt_and_picture",
        "picture": "picture_mse",
        "shape": "shapes_read_off",
    }
    run.finish(**{names[k]: round(float(np.mean(v[-100:])), 4) for k, v in logs.items() if v})


# ---------------------------------------------------------------------------------------------------------------- vae
def train_vae(args, name, vae, steps, lr):
    """L1, L2 and edges, with a little KL; saves the model under `name` with the statistics of its latents."""
    data = [read_data(args, kind)[0] for kind in KINDS]
    vae.to(device(), memory_format=torch.channels_last)
    run = Run(args, name, vae, max(4, int(steps * args.scale)), lr)
    logs = []

    def loss_of(rng):
        pictures = [d[i] for d, n in zip(data, (6, 6, 4)) for i in rng.integers(len(d), size=n)]
        x = to_tensor(pictures).to(device())
        if rng.random() < 0.5:
            x = x.flip(-1)
        with torch.autocast(device().type, torch.bfloat16):
            latents = vae.encode(x).latent_dist
            y = vae.decode(latents.sample()).sample.float()
        edges = sum(F.l1_loss(y.diff(dim=d), x.diff(dim=d)) for d in (-1, -2))
        logs.append(F.l1_loss(y, x).item())
        return F.l1_loss(y, x) + 2 * F.mse_loss(y, x) + edges + 1e-5 * latents.kl().mean()

    run.train(loss_of)
    with torch.no_grad():
        x = to_tensor([d[i] for d in data for i in range(64)]).to(device())
        latents = vae.encode(x).latent_dist.mean
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    vae.save_pretrained(run.path / "model")
    run.finish(l1=round(float(np.mean(logs[-100:])), 4))


def stage_vae(args):
    """AutoencoderKL, f4, 8 channels. Not compiled: torch 2.13's compiled backward of it is wrong on a CPU."""
    torch.manual_seed(args.seed)
    vae = AutoencoderKL(
        block_out_channels=(24, 40, 64), down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
        latent_channels=8, layers_per_block=1, norm_num_groups=8, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    train_vae(args, "vae", vae, 1400, 3e-3)


def stage_vae_refined(args):
    """A second cycle of the VAE at a lower rate."""
    vae = AutoencoderKL.from_pretrained(args.work_dir / "vae" / "model")
    train_vae(args, "vae_refined", vae, 1900, 1e-3)


# -------------------------------------------------------------------------------------------------------------- judge
def judge_scene(index, seed):
    """A scene and its picture for the judge, whose world includes the concepts and any number of specks."""
    rng = np.random.default_rng([seed, index, 3])
    scene = world.sample_scene(rng, new=rng.random() < 0.1)
    if rng.random() < 0.5:
        scene = replace(scene, shape=str(rng.choice(world.PICTURED_SHAPES + world.NEW_SHAPES)))
    if rng.random() < 0.3:
        scene = replace(scene, pattern=str(rng.choice(world.PICTURED_PATTERNS)))
    scene = replace(scene, specks=int(rng.integers(9)))
    if rng.random() < 0.3:
        scene = replace(scene, style=world.NEW_STYLE if rng.random() < 0.5 else f"random-{rng.integers(2**31)}")
    return scene, world.render(scene, int(rng.integers(2**31)))


def _labelled(job):
    """A picture and its attributes."""
    scene, picture = judge_scene(*job)
    return picture, {a: label(scene, a) for a in ATTRIBUTES}


def stage_judge(args):
    """The classifier of every attribute, on pictures with noise and blur."""
    count = max(320, int(40000 * args.scale))
    with multiprocessing.Pool() as pool:
        rows = list(tqdm(pool.imap(_labelled, [(i, args.seed) for i in range(count)], chunksize=64), total=count))
    pictures = np.stack([r[0] for r in rows])
    labels = {a: torch.tensor([r[1][a] for r in rows]) for a in ATTRIBUTES}
    torch.manual_seed(args.seed)
    judge = Judge().to(device(), memory_format=torch.channels_last)
    run = Run(args, "judge", judge, max(4, int(2800 * args.scale)), 2e-3)

    def loss_of(rng):
        picks = torch.from_numpy(rng.integers(min(1024, count // 2), count, 64))
        x = to_tensor(pictures[picks.numpy()]).to(device())
        if rng.random() < 0.3:
            x = F.interpolate(F.interpolate(x, scale_factor=0.6, mode="area"), 64, mode="bilinear")
        x = x + torch.randn_like(x) * rng.uniform(0, 0.08)
        with torch.autocast(device().type, torch.bfloat16):
            _, logits = judge(x)
        known = labels["style"][picks].to(device()) == 0  # a random style hides the background's colour
        loss = 0.0
        for a, values in logits.items():
            each = F.cross_entropy(values.float(), labels[a][picks].to(device()), reduction="none")
            loss = loss + (each[known].mean() if a == "background" else each.mean())
        return loss

    run.train(loss_of)
    save_file({k: v.half().contiguous() for k, v in judge.state_dict().items()}, run.path / "judge.safetensors")
    held_out = 1024
    _, predicted = inspect(judge.cpu(), pictures[:held_out])
    known = labels["style"][:held_out] == 0
    shares = {
        a: (predicted[a] == labels[a][:held_out])[known if a == "background" else slice(None)] for a in ATTRIBUTES
    }
    run.finish(held_out_accuracy={a: round(s.float().mean().item(), 3) for a, s in shares.items()})


# ---------------------------------------------------------------------------------------- latents and contexts for base
def load_vae(args):
    return AutoencoderKL.from_pretrained(args.work_dir / "vae_refined" / "model").to(device()).eval()


def load_vlm(args):
    return Qwen3VLForConditionalGeneration.from_pretrained(args.work_dir / "vlm" / "model").to(device()).eval()


@torch.no_grad()
def encode_contexts(args, prompts, pictures=None):
    """Last-but-one hidden states of all tokens: a list of (tokens, 128)."""
    tokenizer, processor, vlm = read_tokenizer(args), image_processor(), load_vlm(args)
    contexts = []
    for start in tqdm(range(0, len(prompts), 128), desc="contexts", mininterval=10):
        texts = [chat(tokenizer, p, pictures is not None) for p in prompts[start : start + 128]]
        batch = None if pictures is None else pictures[start : start + 128]
        inputs = vlm_inputs(tokenizer, processor, texts, batch)
        hidden = vlm.model(**inputs, output_hidden_states=True).hidden_states[-2]
        contexts += [h[m.bool()].half().cpu() for h, m in zip(hidden, inputs["attention_mask"])]
    return contexts


def stage_contexts(args):
    """Contexts of all training rows, once."""
    for kind in KINDS:
        _, reference, rows = read_data(args, kind)
        contexts = encode_contexts(args, [row["prompt"] for row in rows], None if kind == "text" else reference)
        torch.save(contexts, args.work_dir / f"contexts_{kind}.pt")


@torch.no_grad()
def stage_latents(args):
    """Latents of all training pictures, once."""
    vae = load_vae(args).to(memory_format=torch.channels_last)
    for kind in KINDS:
        target, latents = read_data(args, kind)[0], []
        for start in tqdm(range(0, len(target), 128), desc=f"latents {kind}", mininterval=10):
            with torch.autocast(device().type, torch.bfloat16):
                mean = vae.encode(to_tensor(target[start : start + 128]).to(device())).latent_dist.mean.float()
            latents.append(((mean - vae.config.shift_factor) * vae.config.scaling_factor).half().cpu())
        torch.save(torch.cat(latents), args.work_dir / f"latents_{kind}.pt")


def read_encoded(args):
    """Per kind of row, latents (N, 8, 16, 16) and contexts."""
    load = lambda name: torch.load(args.work_dir / f"{name}.pt")  # noqa: E731
    return {k: {"latents": load(f"latents_{k}"), "contexts": load(f"contexts_{k}")} for k in KINDS}


# ------------------------------------------------------------------------------------------------- base and distillation
def new_transformer(args):
    torch.manual_seed(args.seed)
    transformer = ZImageTransformer2DModel(
        in_channels=8, dim=192, n_layers=6, n_refiner_layers=1, n_heads=6, n_kv_heads=6, cap_feat_dim=128,
        axes_dims=[8, 12, 12], axes_lens=[512, 64, 64],
    )  # fmt: skip
    return compiled(transformer)


def compiled(transformer):
    transformer.to(device()).compile_repeated_blocks(dynamic=False)
    return transformer


def velocity(transformer, latents, sigmas, contexts):
    """Velocity noise - data of shape (B, 8, 16, 16); the family's time runs from 0 (noise) to 1 and its sign is
    flipped."""
    with torch.autocast(device().type, torch.bfloat16):
        out = transformer(list(latents.unsqueeze(2).unbind(0)), 1 - sigmas, contexts, return_dict=False)[0]
    return -torch.stack(out).squeeze(2).float()


def to_contexts(contexts):
    return [c.float().to(device()) for c in contexts]


def stage_base(args):
    """Flow matching; six steps in eight with a picture in the context."""
    data = read_encoded(args)
    empty = encode_contexts(args, [""])[0]
    transformer = new_transformer(args)
    run = Run(args, "base", transformer, max(4, int(args.base_steps * args.scale)), 1.5e-3, ema_decay=0.998)
    logs = {"text": [], "object": [], "style": []}

    def loss_of(rng):
        kind = CYCLE[run.step % 8]
        latents, contexts = data[kind]["latents"], data[kind]["contexts"]
        picks = rng.integers(len(latents), size=64)
        x0 = latents[picks].float().to(device())
        noise = torch.randn_like(x0)
        u = compute_density_for_timestep_sampling("logit_normal", 64, logit_mean=0.0, logit_std=1.0).to(device())
        sigmas = 3 * u / (1 + 2 * u)
        s = sigmas.view(-1, 1, 1, 1)
        chosen = [empty if rng.random() < 0.1 else contexts[i] for i in picks]
        loss = F.mse_loss(velocity(transformer, (1 - s) * x0 + s * noise, sigmas, to_contexts(chosen)), noise - x0)
        logs[kind].append(loss.item())
        return loss

    run.train(loss_of)
    save_transformer(transformer, run.path / "model")
    run.finish(**{kind: round(float(np.mean(v[-100:])), 4) for kind, v in logs.items() if v})


def save_transformer(transformer, folder):
    """Saved without the prefix that compiled blocks put before their names."""
    plain = type(transformer).from_config(transformer.config)
    plain.load_state_dict({k.replace("_orig_mod.", ""): v for k, v in transformer.state_dict().items()})
    plain.save_pretrained(folder)


def load_transformer(args, name, kind=ZImageTransformer2DModel):
    return compiled(kind.from_pretrained(args.work_dir / name / "model"))


def grid(steps):
    """Shift-3 grid of the scheduler, from 1 to 0."""
    u = torch.linspace(1, 0, steps + 1)
    return 3 * u / (1 + 2 * u)


@torch.no_grad()
def stage_trajectories(args):
    """The base's own 16-step trajectories with guidance, kept at the four states of the few-step grid and at the
    end."""
    transformer = load_transformer(args, "base")
    data = read_encoded(args)
    empty = encode_contexts(args, [""])[0].float().to(device())
    sigmas = grid(16)
    states, contexts = [], []
    rng = np.random.default_rng(args.seed)
    batches = max(1, int(args.trajectories * args.scale) // 64)
    for batch in tqdm(range(batches), desc="trajectories", mininterval=10):
        kind = CYCLE[batch % 8]
        picks = rng.integers(len(data[kind]["contexts"]), size=64)
        chosen = [data[kind]["contexts"][i] for i in picks]
        x = torch.randn(64, 8, 16, 16, generator=torch.Generator().manual_seed(batch)).to(device())
        kept = [x.cpu()]
        for k in range(16):
            s = sigmas[k].expand(64).to(device())
            positive = velocity(transformer, x, s, to_contexts(chosen))
            negative = velocity(transformer, x, s, [empty] * 64)
            x = x + (sigmas[k + 1] - sigmas[k]) * (positive + GUIDANCE * (positive - negative))
            if k % 4 == 3:
                kept.append(x.cpu())
        states.append(torch.stack(kept, 1).half())
        contexts += chosen
    torch.save({"states": torch.cat(states), "contexts": contexts}, args.work_dir / "trajectories.pt")


def stage_distill(args):
    """Regression of the secant velocity between neighbouring states of the few-step grid: four steps, no guidance."""
    data = torch.load(args.work_dir / "trajectories.pt")
    transformer = load_transformer(args, "base")
    run = Run(args, "distilled", transformer, max(4, int(args.distill_steps * args.scale)), 6e-4, ema_decay=0.995)
    sigmas = grid(4)
    batches = len(data["states"]) // 64
    logs = []

    def loss_of(rng):
        # rows of one batch of trajectories are all with or all without a picture: no padding, no mask
        picks = int(rng.integers(batches)) * 64 + np.arange(64)
        k = torch.from_numpy(rng.integers(4, size=64))
        states = data["states"][picks].float()
        x, after = states[torch.arange(64), k], states[torch.arange(64), k + 1]
        secant = (after - x) / (sigmas[k + 1] - sigmas[k]).view(-1, 1, 1, 1)
        contexts = to_contexts([data["contexts"][i] for i in picks])
        loss = F.mse_loss(velocity(transformer, x.to(device()), sigmas[k].to(device()), contexts), secant.to(device()))
        logs.append(loss.item())
        return loss

    run.train(loss_of)
    save_transformer(transformer, run.path / "model")
    run.finish(secant_mse=round(float(np.mean(logs[-100:])), 4))


# ------------------------------------------------------------------------------------------------------------- export
def text_encoder_config(vlm):
    text = vlm.config.text_config.to_dict()
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "max_position_embeddings", "pad_token_id")  # fmt: skip
    return Qwen3Config(**{k: text[k] for k in keys}, rope_parameters=ROPE, tie_word_embeddings=True)


def assemble(args, name):
    """ZImagePipeline of the transformer called `name` (`base` or `distilled`)."""
    vlm = load_vlm(args).cpu()
    text_encoder = Qwen3Model(text_encoder_config(vlm))
    text_encoder.load_state_dict(vlm.model.language_model.state_dict())
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=load_vae(args).cpu(),
        text_encoder=text_encoder.eval(),
        tokenizer=read_tokenizer(args),
        transformer=ZImageTransformer2DModel.from_pretrained(args.work_dir / name / "model"),
    )


def stage_export(args):
    """`model/`, `vlm/` and `judge/` in bf16 or fp16, in the Hub's layout, and the base beside them in the work
    folder."""
    assemble(args, "base").save_pretrained(args.work_dir / "base" / "pipeline")
    pipeline = assemble(args, "distilled")
    for component in ("text_encoder", "vae", "transformer"):
        getattr(pipeline, component).half()
    for component in (pipeline.vae, pipeline.transformer):
        component.register_to_config(_name_or_path="")  # it would be a path of this machine
    pipeline.save_pretrained(args.output_dir / "model")
    load_vlm(args).half().save_pretrained(args.output_dir / "vlm")
    read_tokenizer(args).save_pretrained(args.output_dir / "vlm")
    image_processor().save_pretrained(args.output_dir / "vlm")
    (args.output_dir / "judge").mkdir(parents=True, exist_ok=True)
    weights = load_file(args.work_dir / "judge" / "judge.safetensors")
    save_file(weights, args.output_dir / "judge" / "judge.safetensors")
    DiffusionPipeline.from_pretrained(args.output_dir / "model")


STAGES = {
    "data": stage_data, "tokenizer": stage_tokenizer, "vlm": stage_vlm, "vae": stage_vae,
    "vae_refined": stage_vae_refined, "judge": stage_judge, "contexts": stage_contexts, "latents": stage_latents,
    "base": stage_base, "trajectories": stage_trajectories, "distill": stage_distill, "export": stage_export,
}  # fmt: skip


def stage_parser(description, stages):
    """Arguments of a program that runs `stages`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["all", *stages])
    parser.add_argument(
        "--work_dir", type=Path, default=Path("build/miniature"), help="intermediate data and checkpoints"
    )
    parser.add_argument("--output_dir", type=Path, default=HERE, help="where what is committed is written")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads, by default all")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="scales data and steps of every stage, for a trial run"
    )
    return parser


def run_stages(stages, args):
    """Runs the stage `args.stage` or, with `all`, those that have not run yet."""
    if args.threads:
        torch.set_num_threads(args.threads)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    for stage in stages if args.stage == "all" else [args.stage]:
        done = args.work_dir / f"{stage}.done"
        if args.stage == "all" and done.exists():
            continue
        stages[stage](args)
        done.touch()


def main():
    parser = stage_parser(__doc__, STAGES)
    parser.add_argument("--vlm_steps", type=int, default=4300)
    parser.add_argument("--base_steps", type=int, default=9900)
    parser.add_argument("--trajectories", type=int, default=2048)
    parser.add_argument("--distill_steps", type=int, default=550)
    run_stages(STAGES, parser.parse_args())


if __name__ == "__main__":
    main()
