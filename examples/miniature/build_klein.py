"""Builds the FLUX.2-klein miniature: the same world, VLM and latents, a Flux2Transformer2DModel that also takes
reference images.

    python examples/miniature/build_klein.py all --work_dir build/miniature

Needs the Z-Image miniature of this folder and draws pictures as build.py does. Rows of three kinds: a caption alone
(`text`); a picture in the multimodal context (`vlm`); pictures as reference images (`edit`). The transformer starts
from the weights of Z-Image's where the layers correspond, and learns that model's steps from noise to picture, at the
four states of klein's own grid; see paths.py.
"""

import sys

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from PIL import Image
from tqdm import tqdm
from transformers import Qwen2Tokenizer, Qwen3ForCausalLM, Qwen3VLForConditionalGeneration

import build
import paths
import world
from build import device


sys.path.insert(0, str(build.HERE.parents[1]))

from pipeline_dopsd import DOPSDFlux2KleinPipeline  # noqa: E402


# what each training batch holds, in turn: the data and how the picture is shown
CYCLE = (
    ("text", "text"), ("object", "edit"), ("text", "text"), ("change", "edit"), ("object", "vlm"), ("text", "text"),
    ("beside", "edit"), ("style", "vlm"), ("text", "text"), ("change", "edit"), ("beside", "vlm"), ("text", "text"), ("style", "edit"),
)  # fmt: skip
CHANGES, BESIDE = 2560, 1280  # rows
LAYERS, LENGTH = [1, 3, 4], 64


def new_pipeline(transformer=None):
    """DOPSDFlux2KleinPipeline of the miniature's VLM and VAE. The batch norm holds one mean and one variance for all
    channels:
    the latents are then those of the Z-Image miniature."""
    vlm = Qwen3VLForConditionalGeneration.from_pretrained(build.HERE / "vlm", dtype=torch.float32)
    stock = AutoencoderKL.from_pretrained(build.HERE / "model", subfolder="vae", torch_dtype=torch.float32)
    text_encoder = Qwen3ForCausalLM(build.text_encoder_config(vlm))
    text_encoder.model.load_state_dict(vlm.model.language_model.state_dict())
    shared = ("down_block_types", "up_block_types", "block_out_channels", "latent_channels", "layers_per_block", "norm_num_groups",
              "use_quant_conv", "use_post_quant_conv")  # fmt: skip
    vae = AutoencoderKLFlux2(**{name: stock.config[name] for name in shared})
    vae.load_state_dict(stock.state_dict(), strict=False)
    vae.bn.running_mean.fill_(stock.config.shift_factor)
    vae.bn.running_var.fill_(stock.config.scaling_factor**-2 - vae.config.batch_norm_eps)
    return DOPSDFlux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=vae.eval(), text_encoder=text_encoder.eval(),
        tokenizer=Qwen2Tokenizer.from_pretrained(build.HERE / "vlm"), transformer=transformer, text_encoder_out_layers=LAYERS,
        max_sequence_length=LENGTH,
    ).to(device())  # fmt: skip


def stage_contexts(args):
    """Contexts of all rows: of captions, and with pictures in the multimodal context and as reference images."""
    pipeline = new_pipeline()
    edit = lambda prompts, pictures: pipeline.encode_student(prompts, [[picture] for picture in pictures])  # noqa: E731
    paths.write_contexts(args, "klein", pipeline, {"vlm": pipeline.encode_teacher, "edit": edit})


@torch.no_grad()
def stage_edits(args):
    """Changes of what a reference shows, whose result is what the Z-Image miniature draws of the full caption; and
    objects beside a reference that has nothing to do with them, the last of two references or in the prompt."""
    pipeline, known = new_pipeline(), torch.load(args.work_dir / "paths_object.pt", mmap=True)
    pipeline.load_multimodal_encoder(str(build.HERE / "vlm"))
    chunks = [range(start, start + 64) for start in range(0, paths.scaled(args, CHANGES), 64)]
    changes = [[world.sample_change(np.random.default_rng([12, i])) for i in chunk] for chunk in chunks]
    paths.write_paths(
        args,
        "change",
        lambda p: (p.encode_student([world.caption(after) for _, after, _ in chunk]) for chunk in tqdm(changes)),
    )
    found = {"edit": []}
    for chunk, rows in zip(tqdm(chunks), changes):
        pictures = [[Image.fromarray(world.render(before, i))] for i, (before, _, _) in zip(chunk, rows)]
        found["edit"] += paths.halved(pipeline.encode_student([words for _, _, words in rows], pictures))
    torch.save(found, args.work_dir / "klein_contexts_change.pt")

    found, others = {"edit": [], "vlm": []}, build.read_data(args, "text")[0]
    for chunk, (prompts, pictures) in zip(chunks[: paths.scaled(args, BESIDE) // 64], paths.read_rows(args, "object")):
        beside = [Image.fromarray(others[i]) for i in chunk]
        found["edit"] += paths.halved(pipeline.encode_student(prompts, [list(pair) for pair in zip(beside, pictures)]))
        found["vlm"] += paths.halved(
            pipeline.encode_teacher(prompts, pictures, "vlm", [[picture] for picture in beside])
        )
    torch.save(found, args.work_dir / "klein_contexts_beside.pt")
    count = len(found["edit"])
    torch.save(
        {"contexts": known["contexts"][:count], "paths": known["paths"][:count].clone()},
        args.work_dir / "paths_beside.pt",
    )


# --------------------------------------------------------------------------------------------------------- transformer
def new_transformer(args):
    """The blocks of the Z-Image miniature: its refiners become the streams of the first block, and the last five
    blocks compute feed-forward beside attention. One modulation serves all blocks of a kind; at first it changes
    nothing."""
    donor = paths.Donor(args)
    c = donor.transformer.config
    torch.manual_seed(args.seed)
    ours = Flux2Transformer2DModel(
        in_channels=4 * c.in_channels, num_layers=2, num_single_layers=c.n_layers - 1, attention_head_dim=c.dim // c.n_heads,
        num_attention_heads=c.n_heads, joint_attention_dim=len(LAYERS) * c.cap_feat_dim, axes_dims_rope=(4, 12, 12, 4),
        rope_theta=int(c.rope_theta), guidance_embeds=False,
    ).to(device())  # fmt: skip
    # Z-Image's axes are position in the context, row, column; klein's are reference, row, column, position
    rotary = torch.tensor([*range(4, 8), *range(8, 32), *range(4)])
    heads = (torch.arange(c.n_heads)[:, None] * len(rotary) + rotary).flatten()

    def put(weight, values, start=0):
        weight[start : start + len(values), : values.shape[1]].copy_(values)

    def put_attention(query, key, value, norms, block, scale):
        attention = block.attention
        put(query, attention.to_q.weight[heads] * scale)
        put(key, attention.to_k.weight[heads] * scale)
        put(value, attention.to_v.weight * scale)
        for norm, known in zip(norms, (attention.norm_q, attention.norm_k)):
            norm.weight.copy_(known.weight[rotary])

    def put_stream(attention_layers, norms, out, feed_forward, block):
        scale_msa, gate_msa, scale_mlp, gate_mlp = donor.modulation(block)
        last_attention, last_feed_forward = donor.last_layers(block)
        put_attention(
            *(layer.weight for layer in attention_layers), norms, block, block.attention_norm1.weight * (1 + scale_msa)
        )
        put(out.weight, gate_msa[:, None] * last_attention)
        inner = feed_forward.linear_out.in_features
        feed_forward.linear_out.weight.zero_()
        put(feed_forward.linear_out.weight, gate_mlp[:, None] * last_feed_forward)
        scale = block.ffn_norm1.weight * (1 + scale_mlp)
        put(feed_forward.linear_in.weight, block.feed_forward.w1.weight * scale)
        put(feed_forward.linear_in.weight, block.feed_forward.w3.weight * scale, inner)

    with torch.no_grad():
        ours.x_embedder.weight.copy_(donor.embedder.weight[:, donor.order])
        norm, embedder = donor.transformer.cap_embedder
        size = torch.cat([context["prompt_embeds"] for context in donor.contexts]).float().square().mean().sqrt()
        ours.context_embedder.weight.mul_(0.1)
        ours.context_embedder.weight[:, -c.cap_feat_dim :].copy_(embedder.weight * norm.weight / size)
        for new, image, text in zip(
            ours.transformer_blocks, donor.blocks, (*donor.transformer.context_refiner, donor.blocks[1])
        ):
            a = new.attn
            put_stream((a.to_q, a.to_k, a.to_v), (a.norm_q, a.norm_k), a.to_out[0], new.ff, image)
            put_stream(
                (a.add_q_proj, a.add_k_proj, a.add_v_proj),
                (a.norm_added_q, a.norm_added_k),
                a.to_add_out,
                new.ff_context,
                text,
            )
        for new, block in zip(ours.single_transformer_blocks, donor.blocks[2:], strict=True):
            a, (scale_msa, gate_msa, scale_mlp, gate_mlp) = new.attn, donor.modulation(block)
            joint, inner = a.to_qkv_mlp_proj.weight, a.mlp_hidden_dim
            put_attention(
                *joint[: 3 * c.dim].chunk(3),
                (a.norm_q, a.norm_k),
                block,
                block.attention_norm1.weight * (1 + scale_msa),
            )
            scale = block.ffn_norm1.weight * (1 + scale_mlp)
            put(joint, block.feed_forward.w1.weight * scale, 3 * c.dim)
            put(joint, block.feed_forward.w3.weight * scale, 3 * c.dim + inner)
            last_attention, last_feed_forward = donor.last_layers(block)
            a.to_out.weight.zero_()
            put(
                a.to_out.weight,
                torch.cat([gate_msa[:, None] * last_attention, gate_mlp[:, None] * last_feed_forward], 1),
            )
        scale = 1 + donor.seen[donor.final.adaLN_modulation]
        # its velocity has the other sign
        ours.proj_out.weight.copy_(-(donor.final.linear.weight * scale)[donor.order])
        ours.norm_out.linear.weight.zero_()
        times = torch.linspace(100, 1000, 64).to(device())
        seen = torch.nn.functional.silu(ours.time_guidance_embed(times, None))
        ones = (
            torch.linalg.pinv(seen, rtol=1e-3) @ torch.ones(64, 1).to(device())
        ).mT  # 1 at all times: gates are open
        for modulation, sets in (
            (ours.double_stream_modulation_img, 2),
            (ours.double_stream_modulation_txt, 2),
            (ours.single_stream_modulation, 1),
        ):
            layer = modulation.linear.weight.zero_().unflatten(0, (sets, 3, c.dim))  # shift, scale, gate
            layer[:, 2] = ones
        # klein's layers have no bias: that of Z-Image's first layer becomes the shift
        shift = donor.embedder.bias / donor.seen[donor.embedder]
        ours.double_stream_modulation_img.linear.weight[: c.dim].copy_(shift[:, None] * ones)
    return ours


def stage_distill(args):
    transformer = new_transformer(args)
    pipeline = new_pipeline(transformer)
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    for block in blocks:  # not the module, whose hooks would be compiled, too
        block.forward = torch.compile(block.forward, dynamic=False)

    # a block of two streams returns text and picture; one of a single stream has the picture behind the text, before
    # references
    def picture_of(output):
        return output[1][:, : paths.TOKENS] if isinstance(output, tuple) else output[:, LENGTH : LENGTH + paths.TOKENS]

    counterparts = paths.Counterparts(paths.z_image(), blocks, picture_of)
    paths.distill(args, "klein", pipeline, CYCLE, counterparts, pack=pipeline._patchify_latents)


def stage_export(args):
    transformer = Flux2Transformer2DModel.from_pretrained(args.work_dir / "klein_distilled" / "model")
    paths.export(args, "klein", "Flux2KleinPipeline", new_pipeline(transformer))


STAGES = paths.STAGES | {
    "klein_contexts": stage_contexts,
    "klein_edits": stage_edits,
    "klein_distill": stage_distill,
    "klein_export": stage_export,
}


if __name__ == "__main__":
    build.run_stages(STAGES, paths.stage_parser(__doc__, STAGES, distill_steps=2000).parse_args())
