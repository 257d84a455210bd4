"""Builds the Krea 2 miniature: the same world, VLM and latents, a Krea2Transformer2DModel of four steps.

    python examples/miniature/build_krea.py all --work_dir build/miniature

Needs the Z-Image miniature of this folder and draws pictures as build.py does. The VLM is the text encoder itself; the words of
Krea's chat become tokens of their own, whose embeddings are zero. The VAE learns the latents of the other miniature. The
transformer starts from the weights of Z-Image's where the layers correspond, and learns that model's steps from noise to picture,
at the four states of its own few-step grid, from captions and from pictures in the context.
"""

import functools
import itertools
import json
import sys

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, Krea2Transformer2DModel
from PIL import Image
from tokenizers import AddedToken
from tqdm import tqdm
from transformers import Qwen2Tokenizer, Qwen3VLForConditionalGeneration

import build
from build import Run, device
from judge import to_tensor


sys.path.insert(0, str(build.HERE.parents[1]))

from pipeline_dopsd import DOPSDKrea2Pipeline, DOPSDZImagePipeline  # noqa: E402


ROWS = {"text": 6144, "object": 3584, "style": 2560}
CYCLE = ("text", "object", "text", "style")  # what each training batch holds, in turn
LAYERS = [1, 3, 4]
STEPS, TOKENS = 4, 64  # of the few-step grid; of a picture
MATCHED = 0.33  # of the training, in which the blocks also learn the outputs of their counterparts


# ------------------------------------------------------------------------------------------------------------- parts
def chat_tokenizer():
    """The VLM's tokenizer, with pieces of Krea's system prompt as tokens, so that it has as many of them as the stock pipeline drops."""
    stock = DOPSDKrea2Pipeline.without_parts()
    before = stock.prompt_template_encode_prefix
    words = before.split("\n")[1].removesuffix("<|im_end|>").split(" ")
    pairs = [" ".join(words[i : i + 2]) for i in range(0, len(words), 2)]  # which no caption holds
    for whole, length in itertools.product(range(len(pairs)), range(4, 30)):
        tokenizer = Qwen2Tokenizer.from_pretrained(build.HERE / "vlm")
        tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in [*pairs[:whole], pairs[whole][:length]]])
        if len(tokenizer(before).input_ids) == stock.prompt_template_encode_start_idx:
            return tokenizer
    raise ValueError("The prompt cannot be cut into so many tokens.")


def new_pipeline(args, transformer=None):
    """DOPSDKrea2Pipeline of the miniature's VLM, the VAE if it is there already, and a transformer."""
    tokenizer = chat_tokenizer()
    vlm = Qwen3VLForConditionalGeneration.from_pretrained(build.HERE / "vlm", dtype=torch.float32)
    known = vlm.get_input_embeddings().num_embeddings
    vlm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        vlm.get_input_embeddings().weight[known:] = 0
    folder = args.work_dir / "krea_vae" / "model"
    vae = AutoencoderKLQwenImage.from_pretrained(folder) if folder.exists() else new_vae()
    pipeline = DOPSDKrea2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, max_image_seq_len=6400),
        vae=vae.eval(), text_encoder=vlm.model.eval(), tokenizer=tokenizer, transformer=transformer, text_encoder_select_layers=LAYERS,
    )  # fmt: skip
    return pipeline.to(device())


def z_image():
    pipeline = DOPSDZImagePipeline.from_pretrained(build.HERE / "model", dtype=torch.float32).to(device())
    pipeline.load_multimodal_encoder(str(build.HERE / "vlm"))
    return pipeline


# --------------------------------------------------------------------------------------------------------------- vae
def new_vae():
    torch.manual_seed(0)
    stock = AutoencoderKL.load_config(build.HERE / "model", subfolder="vae")
    channels = stock["latent_channels"]
    return AutoencoderKLQwenImage(
        base_dim=18, z_dim=channels, dim_mult=[1, 2, 3], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[stock["shift_factor"]] * channels, latents_std=[1 / stock["scaling_factor"]] * channels,
    )  # fmt: skip


def stage_vae(args):
    """Encoder and decoder learn, apart, what the VAE of the Z-Image miniature encodes and the pictures that it encodes."""
    data = [build.read_data(args, kind)[0] for kind in build.KINDS]
    teacher = AutoencoderKL.from_pretrained(build.HERE / "model", subfolder="vae", torch_dtype=torch.float32).to(device()).eval()
    vae = new_vae().to(device())
    run = Run(args, "krea_vae", vae, max(4, int(args.vae_steps * args.scale)), 3e-3)
    logs = {"latents": [], "l1": []}

    def loss_of(rng):
        pictures = [d[i] for d, n in zip(data, (6, 6, 4)) for i in rng.integers(len(d), size=n)]
        x = to_tensor(pictures).to(device())
        with torch.no_grad():
            wanted = teacher.encode(x).latent_dist.mean
        with torch.autocast(device().type, torch.bfloat16):
            latents = vae.encode(x[:, :, None]).latent_dist.mean[:, :, 0]
            y = vae.decode(wanted[:, :, None] + 0.05 * torch.randn_like(wanted)[:, :, None]).sample[:, :, 0].float()
        edges = sum(F.l1_loss(y.diff(dim=d), x.diff(dim=d)) for d in (-1, -2))
        distance = F.mse_loss(latents.float(), wanted) * teacher.config.scaling_factor**2
        logs["latents"].append(distance.item())
        logs["l1"].append(F.l1_loss(y, x).item())
        return distance + F.l1_loss(y, x) + 2 * F.mse_loss(y, x) + edges

    run.train(loss_of)
    vae.save_pretrained(run.path / "model")
    run.finish(**{name: round(float(np.mean(values[-100:])), 4) for name, values in logs.items()})


# ---------------------------------------------------------------------------------------------------------------- data
@torch.no_grad()
def stage_paths(args):
    """Of each row both contexts, and the states of the Z-Image miniature before and after each of its steps, (rows, 5, 8, 16, 16)."""
    theirs, ours = z_image(), new_pipeline(args)
    ours.load_multimodal_encoder(str(build.HERE / "vlm"))
    for kind, count in ROWS.items():
        _, reference, rows = build.read_data(args, kind)
        prompts, found = [row["prompt"] for row in rows[: args.rows(count)]], {"ours": [], "theirs": [], "paths": []}
        for start in tqdm(range(0, len(prompts), 64), desc=f"paths {kind}", mininterval=10):
            chunk = prompts[start : start + 64]
            pictures = None if kind == "text" else [Image.fromarray(p) for p in reference[start : start + len(chunk)]]
            own, known = (p.encode_teacher(chunk, pictures) if pictures else p.encode_student(chunk) for p in (ours, theirs))
            x = torch.cat([torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(start + i)) for i in range(len(chunk))]).to(device())
            states = [x]
            for timestep in theirs.few_step_grid(STEPS, x):
                with torch.autocast(device().type, torch.bfloat16):
                    velocity = theirs.velocity(theirs.transformer, x, timestep, known)
                x = theirs.scheduler.step(velocity, timestep, x, return_dict=False)[0]
                states.append(x)
            found["paths"] += torch.stack(states, 1).half().cpu()
            for name, contexts in (("ours", own), ("theirs", known)):
                found[name] += [c["prompt_embeds"].half().cpu() for c in contexts]
        torch.save(found | {"paths": torch.stack(found["paths"])}, args.work_dir / f"krea_{kind}.pt")


class Rows:
    """Batches of 64 rows whose contexts are of one length, so that nothing is padded."""

    def __init__(self, args, kind):
        self.found = torch.load(args.work_dir / f"krea_{kind}.pt")
        lengths = np.array([len(c) for c in self.found["ours"]])
        self.rows_of = {int(n): np.flatnonzero(lengths == n) for n in np.unique(lengths)}
        self.lengths, counts = np.array(list(self.rows_of)), np.array([len(rows) for rows in self.rows_of.values()])
        self.shares = counts / counts.sum()

    def draw(self, rng):
        """Both contexts, states before and after one step of each row, and the number of the step."""
        rows = rng.choice(self.rows_of[int(rng.choice(self.lengths, p=self.shares))], 64)
        k = torch.from_numpy(rng.integers(STEPS, size=64))
        paths, row = self.found["paths"][rows].float(), torch.arange(64)
        contexts = [[{"prompt_embeds": self.found[name][i].float().to(device())} for i in rows] for name in ("ours", "theirs")]
        return *contexts, paths[row, k].to(device()), paths[row, k + 1].to(device()), k


# --------------------------------------------------------------------------------------------------------- transformer
def new_transformer(args):
    """The blocks of the Z-Image miniature, where Krea's have such layers: its norms behind attention and feed-forward, which Krea
    lacks, become scales of their last layers, as large as they are on a batch."""
    theirs = z_image()
    old, c = theirs.transformer, theirs.transformer.config
    ours = Krea2Transformer2DModel(
        in_channels=4 * c.in_channels, num_layers=c.n_layers + 1, attention_head_dim=c.dim // c.n_heads, num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_heads, intermediate_size=512, timestep_embed_dim=128, text_hidden_dim=c.cap_feat_dim,
        num_text_layers=len(LAYERS), text_num_attention_heads=4, text_num_key_value_heads=4, text_intermediate_size=256,
        num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=tuple(c.axes_dims), rope_theta=c.rope_theta,
    )  # fmt: skip
    torch.manual_seed(args.seed)
    blocks = [old.noise_refiner[0], *old.layers]
    sizes, modulations = {}, {}

    def note(module, inputs, output, key):
        sizes.setdefault(key, []).append(output.float().square().mean(-1).sqrt().mean().item())

    handles = []
    for number, block in enumerate(blocks):
        for name in ("attention", "feed_forward"):
            handles.append(getattr(block, name).register_forward_hook(lambda m, i, o, key=(number, name): note(m, i, o, key)))
        handles.append(block.adaLN_modulation.register_forward_hook(lambda m, i, o, n=number: modulations.setdefault(n, []).append(o.mean(0))))
    with torch.no_grad():
        rows = build.read_data(args, "text")[2][:64]
        contexts, x = theirs.encode_student([row["prompt"] for row in rows]), torch.randn(len(rows), 8, 16, 16).to(device())
        for timestep in theirs.few_step_grid(STEPS, x):
            x = theirs.scheduler.step(theirs.velocity(old, x, timestep, contexts), timestep, x, return_dict=False)[0]
        for handle in handles:
            handle.remove()
        embedder, final = old.all_x_embedder["2-1"], old.all_final_layer["2-1"]
        order = packing(theirs, c.in_channels)
        ours.img_in.weight.copy_(embedder.weight[:, order])
        ours.img_in.bias.copy_(embedder.bias)
        ours.final_layer.linear.weight.copy_(-final.linear.weight[order])  # its velocity has the other sign
        ours.final_layer.linear.bias.copy_(-final.linear.bias[order])
        for number, (block, new) in enumerate(zip(blocks, ours.transformer_blocks, strict=True)):
            for name in ("to_q", "to_k", "to_v"):
                getattr(new.attn, name).weight.copy_(getattr(block.attention, name).weight)
            torch.nn.init.zeros_(new.attn.to_gate.weight)
            half = 0.5  # of the gate's sigmoid at 0
            scale = block.attention_norm2.weight / np.mean(sizes[number, "attention"]) / half
            new.attn.to_out[0].weight.copy_(scale[:, None] * block.attention.to_out[0].weight)
            new.attn.norm_q.weight.copy_(block.attention.norm_q.weight - 1)
            new.attn.norm_k.weight.copy_(block.attention.norm_k.weight - 1)
            new.norm1.weight.copy_(block.attention_norm1.weight - 1)
            new.norm2.weight.copy_(block.ffn_norm1.weight - 1)
            scale = block.ffn_norm2.weight / np.mean(sizes[number, "feed_forward"])
            new.ff.gate.weight.copy_(block.feed_forward.w1.weight)
            new.ff.up.weight.copy_(block.feed_forward.w3.weight)
            new.ff.down.weight.copy_(scale[:, None] * block.feed_forward.w2.weight)
            scale_msa, gate_msa, scale_mlp, gate_mlp = torch.stack(modulations[number]).mean(0).chunk(4)
            zero = torch.zeros_like(scale_msa)
            new.scale_shift_table.copy_(torch.stack([scale_msa, zero, gate_msa.tanh(), scale_mlp, zero, gate_mlp.tanh()]))
        torch.nn.init.zeros_(ours.time_mod_proj.weight)
        torch.nn.init.zeros_(ours.time_mod_proj.bias)
    return ours.to(device())


def packing(pipeline, channels):
    """For each entry of a token of Krea's latents, which entry of a token of Z-Image's it is."""
    index = torch.arange(channels * 4).view(2, 2, channels)  # row, column, channel: Z-Image's
    return index.permute(2, 0, 1).flatten()  # channel, row, column: Krea's


class Counterparts:
    """What the blocks of the Z-Image miniature, and those here, make of the tokens of the picture."""

    def __init__(self, theirs, transformer):
        self.theirs, self.outputs = theirs, {"theirs": {}, "ours": {}}
        old = theirs.transformer
        for side, blocks in (("theirs", [old.noise_refiner[0], *old.layers]), ("ours", transformer.transformer_blocks)):
            for number, block in enumerate(blocks):
                block.register_forward_hook(functools.partial(self.note, side, number))

    def note(self, side, number, module, inputs, output):
        # Z-Image has the picture first, Krea last
        self.outputs[side][number] = output[:, :TOKENS] if side == "theirs" else output[:, -TOKENS:]

    def distance(self, x, k, contexts):
        """Mean squared error of the blocks' outputs, in variances of theirs; the velocity here was computed before."""
        with torch.no_grad(), torch.autocast(device().type, torch.bfloat16):
            timesteps = self.theirs.few_step_grid(STEPS, x)
            self.theirs.velocity(self.theirs.transformer, x, timesteps[k], contexts)
        pairs = [(self.outputs["ours"][n].float(), known.float()) for n, known in self.outputs["theirs"].items()]
        return sum(F.mse_loss(own, known) / known.var() for own, known in pairs) / len(pairs)


def stage_distill(args):
    """Regression of the velocity between neighbouring states: four steps, no guidance; see `MATCHED`."""
    pipeline, rows = new_pipeline(args), {kind: Rows(args, kind) for kind in ROWS}
    run = Run(args, "krea_distilled", new_transformer(args), max(4, int(args.distill_steps * args.scale)), 1.5e-3, ema_decay=0.995)
    logs, knots = {"blocks": []} | {kind: [] for kind in ROWS}, few_step_sigmas(pipeline)
    counterparts = Counterparts(z_image(), run.model)

    def loss_of(rng):
        kind = CYCLE[run.step % len(CYCLE)]
        contexts, known, x, after, k = rows[kind].draw(rng)
        # the steps of Krea's own grid lead along the states of the other miniature
        step = (knots[k + 1] - knots[k]).view(-1, 1, 1, 1).to(device())
        with torch.autocast(device().type, torch.bfloat16):
            velocity = pipeline.velocity(run.model, x, 1000 * knots[k].to(device()), contexts)
        loss = F.mse_loss(velocity, (after - x) / step)
        logs[kind].append(loss.item())
        if run.step < MATCHED * run.steps:
            distance = counterparts.distance(x, k, known)
            logs["blocks"].append(distance.item())
            loss = loss + distance
        return loss

    transformer = run.train(loss_of)
    transformer.save_pretrained(run.path / "model")
    run.finish(**{kind: round(float(np.mean(v[-50:])), 4) for kind, v in logs.items() if v})


def few_step_sigmas(pipeline):
    """The pipeline's own four sigmas, and 0."""
    pipeline.few_step_grid(STEPS, torch.empty(1, 8, 16, 16))
    return pipeline.scheduler.sigmas.float()


# ------------------------------------------------------------------------------------------------------------- export
def stage_export(args):
    """`krea/` in fp16, in the Hub's layout of Krea-2-Turbo."""
    folder = args.output_dir / "krea"
    pipeline = new_pipeline(args, Krea2Transformer2DModel.from_pretrained(args.work_dir / "krea_distilled" / "model"))
    for component in (pipeline.text_encoder, pipeline.vae, pipeline.transformer):
        component.half()
        component.config._name_or_path = ""  # it would be a path of this machine
    pipeline.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "Krea2Pipeline"  # a base of the Hub names the stock class
    index["num_inference_steps"] = STEPS
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


STAGES = {"data": build.stage_data, "vae": stage_vae, "paths": stage_paths, "distill": stage_distill, "export": stage_export}


def main():
    parser = build.stage_parser(__doc__, STAGES)
    parser.add_argument("--vae_steps", type=int, default=1000)
    parser.add_argument("--distill_steps", type=int, default=1600)
    args = parser.parse_args()
    args.rows = lambda count: max(64, int(count * args.scale) // 64 * 64)
    build.run_stages(STAGES, args, prefix="krea_")


if __name__ == "__main__":
    main()
