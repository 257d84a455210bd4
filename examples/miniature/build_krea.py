"""Builds the Krea 2 miniature: the same world, VLM and latents, a Krea2Transformer2DModel of four steps.

    python examples/miniature/build_krea.py all --work_dir build/miniature

Needs the Z-Image miniature of this folder and draws pictures as build.py does. The VLM is the text encoder itself; the
words of Krea's chat become tokens of their own, whose embeddings are zero. The VAE learns the latents of the other
miniature. The transformer starts from the weights of Z-Image's where the layers correspond, and learns that model's
steps from noise to picture, at the four states of its own few-step grid, from captions and from pictures in the
context.
"""

import itertools
import sys

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, Krea2Transformer2DModel
from tokenizers import AddedToken
from transformers import Qwen2Tokenizer, Qwen3VLForConditionalGeneration

import build
import paths
from build import Run, device
from judge import to_tensor


sys.path.insert(0, str(build.HERE.parents[1]))

from pipeline_dopsd import DOPSDKrea2Pipeline  # noqa: E402


# what each training batch holds, in turn: the data and how the picture is shown
CYCLE = (("text", "text"), ("object", "vlm"), ("text", "text"), ("style", "vlm"))
LAYERS = [1, 3, 4]


# ------------------------------------------------------------------------------------------------------------- parts
def chat_tokenizer():
    """The VLM's tokenizer, with pieces of Krea's system prompt as tokens, so that it has as many of them as the stock
    pipeline drops."""
    stock = DOPSDKrea2Pipeline.without_parts()
    before = stock.prompt_template_encode_prefix
    words = before.split("\n")[1].removesuffix("<|im_end|>").split(" ")
    pairs = [" ".join(words[i : i + 2]) for i in range(0, len(words), 2)]  # which no caption holds
    for whole, length in itertools.product(range(len(pairs)), range(4, 30)):
        tokenizer = Qwen2Tokenizer.from_pretrained(build.HERE / "vlm")
        tokenizer.add_tokens(
            [AddedToken(piece, normalized=False) for piece in [*pairs[:whole], pairs[whole][:length]]]
        )
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
    """Encoder and decoder learn, apart, what the VAE of the Z-Image miniature encodes and the pictures that it
    encodes."""
    data = [build.read_data(args, kind)[0] for kind in build.KINDS]
    teacher = (
        AutoencoderKL.from_pretrained(build.HERE / "model", subfolder="vae", torch_dtype=torch.float32)
        .to(device())
        .eval()
    )
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


# ------------------------------------------------------------------------------------------------------------ contexts
def stage_contexts(args):
    pipeline = new_pipeline(args)
    paths.write_contexts(args, "krea", pipeline, {"vlm": pipeline.encode_teacher})


# --------------------------------------------------------------------------------------------------------- transformer
def new_transformer(args):
    """The blocks of the Z-Image miniature, where Krea's have such layers."""
    donor = paths.Donor(args)
    c = donor.transformer.config
    torch.manual_seed(args.seed)
    ours = Krea2Transformer2DModel(
        in_channels=4 * c.in_channels, num_layers=c.n_layers + 1, attention_head_dim=c.dim // c.n_heads, num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_heads, intermediate_size=512, timestep_embed_dim=128, text_hidden_dim=c.cap_feat_dim,
        num_text_layers=len(LAYERS), text_num_attention_heads=4, text_num_key_value_heads=4, text_intermediate_size=256,
        num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=tuple(c.axes_dims), rope_theta=c.rope_theta,
    )  # fmt: skip
    with torch.no_grad():
        ours.img_in.weight.copy_(donor.embedder.weight[:, donor.order])
        ours.img_in.bias.copy_(donor.embedder.bias)
        # its velocity has the other sign
        ours.final_layer.linear.weight.copy_(-donor.final.linear.weight[donor.order])
        ours.final_layer.linear.bias.copy_(-donor.final.linear.bias[donor.order])
        for block, new in zip(donor.blocks, ours.transformer_blocks, strict=True):
            last_attention, last_feed_forward = donor.last_layers(block)
            for name in ("to_q", "to_k", "to_v"):
                getattr(new.attn, name).weight.copy_(getattr(block.attention, name).weight)
            torch.nn.init.zeros_(new.attn.to_gate.weight)
            new.attn.to_out[0].weight.copy_(2 * last_attention)  # a gate's sigmoid at 0 halves it
            new.attn.norm_q.weight.copy_(block.attention.norm_q.weight - 1)
            new.attn.norm_k.weight.copy_(block.attention.norm_k.weight - 1)
            new.norm1.weight.copy_(block.attention_norm1.weight - 1)
            new.norm2.weight.copy_(block.ffn_norm1.weight - 1)
            new.ff.gate.weight.copy_(block.feed_forward.w1.weight)
            new.ff.up.weight.copy_(block.feed_forward.w3.weight)
            new.ff.down.weight.copy_(last_feed_forward)
            scale_msa, gate_msa, scale_mlp, gate_mlp = donor.modulation(block)
            zero = torch.zeros_like(scale_msa)
            new.scale_shift_table.copy_(torch.stack([scale_msa, zero, gate_msa, scale_mlp, zero, gate_mlp]))
        torch.nn.init.zeros_(ours.time_mod_proj.weight)
        torch.nn.init.zeros_(ours.time_mod_proj.bias)
    return ours.to(device())


def stage_distill(args):
    pipeline = new_pipeline(args, new_transformer(args))
    blocks = pipeline.transformer.transformer_blocks
    # text comes first
    counterparts = paths.Counterparts(paths.z_image(), blocks, lambda output: output[:, -paths.TOKENS :])
    paths.distill(args, "krea", pipeline, CYCLE, counterparts)


def stage_export(args):
    transformer = Krea2Transformer2DModel.from_pretrained(args.work_dir / "krea_distilled" / "model")
    paths.export(args, "krea", "Krea2Pipeline", new_pipeline(args, transformer), num_inference_steps=paths.STEPS)


STAGES = paths.STAGES | {
    "krea_vae": stage_vae,
    "krea_contexts": stage_contexts,
    "krea_distill": stage_distill,
    "krea_export": stage_export,
}


def main():
    parser = paths.stage_parser(__doc__, STAGES, distill_steps=1600)
    parser.add_argument("--vae_steps", type=int, default=1000)
    build.run_stages(STAGES, parser.parse_args())


if __name__ == "__main__":
    main()
