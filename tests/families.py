"""The table of families: a tiny random model of the real classes for each, in the Hub's layout, and what the tests
must know of it."""

import dataclasses
import json
from collections.abc import Callable

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from pipeline_dopsd import DOPSDFlux2KleinPipeline, DOPSDKrea2Pipeline, DOPSDZImagePipeline


SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
]  # fmt: skip
# as Qwen3 turns thinking off: an empty thought after the generation prompt
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string -%}{{ message.content }}
{%- else -%}{%- for part in message.content -%}
{%- if part.type == 'image' -%}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false -%}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif -%}
{%- endif -%}"""
CAPTIONS = {
    "a": [
        "a red square",
        "a square, red, on a plain white background, drawn with a thick outline and seen from the front",
    ],
    "b": ["a blue disc"],
    "c": ["a green bar on white"],
    "d": ["a yellow dot"],
}
HIDDEN = 64
# rope_theta of text encoders and of VLMs, which the transplant must not mix up
TEXT_ROPE = {"rope_type": "default", "rope_theta": 1e4}
VLM_ROPE = {"rope_type": "default", "rope_theta": 5e3, "mrope_section": [4, 2, 2], "mrope_interleaved": True}


def make_tokenizer(folder):
    """Knows the words of the captions and of the chats, so that those have as many tokens as with the real
    tokenizer."""
    stock = DOPSDKrea2Pipeline.without_parts()
    chat = stock.prompt_template_encode_prefix + stock.prompt_template_encode_suffix
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        [c for cs in CAPTIONS.values() for c in cs] + 2 * [chat], vocab_size=600, show_progress=False
    )
    bpe.save_model(str(folder))
    vocab = json.loads((folder / "vocab.json").read_text())
    merges = [tuple(line.split()) for line in (folder / "merges.txt").read_text().splitlines()[1:]]
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, additional_special_tokens=SPECIAL_TOKENS[1:])
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.model_max_length = 512
    return tokenizer


def text_config(tokenizer, hidden_size=HIDDEN, layers=3):
    return {
        "vocab_size": len(tokenizer), "hidden_size": hidden_size, "intermediate_size": 96, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048,
        "pad_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    }  # fmt: skip


def vlm_config(tokenizer, hidden_size=HIDDEN, layers=3):
    """8-pixel patches merged two by two."""
    token = tokenizer.convert_tokens_to_ids
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 8,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": hidden_size,
        "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    return Qwen3VLConfig(
        text_config={**text_config(tokenizer, hidden_size, layers), "rope_parameters": VLM_ROPE}, vision_config=vision,
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"), tie_word_embeddings=True,
        vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"),
    )  # fmt: skip


def save_vlm(folder, tokenizer, hidden_size=HIDDEN, layers=3):
    """A Qwen3-VL with language weights and a rope_theta of its own."""
    torch.manual_seed(1)
    Qwen3VLForConditionalGeneration(vlm_config(tokenizer, hidden_size, layers)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"shortest_edge": 16 * 16, "longest_edge": 128 * 128}
    Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, temporal_patch_size=2, size=size).save_pretrained(folder)


# every tiny model: latents of 4 channels from a VAE f4, images in multiples of 8 pixels, seed 0
def save_z_image(folder, tokenizer, axes_lens=(512, 64, 64), dim=64):
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=dim, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=HIDDEN,
        axes_dims=[dim // 2 - 24, 12, 12], axes_lens=list(axes_lens),
    )  # fmt: skip
    for name, parameter in transformer.named_parameters():
        if name.endswith("pad_token"):
            torch.nn.init.normal_(parameter)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3, latent_channels=4,
        block_out_channels=[8, 16, 16], norm_num_groups=4, scaling_factor=0.5, shift_factor=0.1,
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=Qwen3Model(Qwen3Config(**text_config(tokenizer), rope_parameters=TEXT_ROPE)),
        tokenizer=tokenizer,
        transformer=transformer,
    ).save_pretrained(folder)


def save_klein(folder, tokenizer, dim=32):
    torch.manual_seed(0)
    vae = AutoencoderKLFlux2(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3, latent_channels=4,
        block_out_channels=[8, 16, 16], norm_num_groups=4, layers_per_block=1,
    )  # fmt: skip
    torch.nn.init.normal_(vae.bn.running_mean)
    torch.nn.init.uniform_(vae.bn.running_var, 0.5, 2.0)
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=dim // 16,
        joint_attention_dim=3 * HIDDEN, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    torch.nn.init.normal_(transformer.proj_out.weight)
    # the features are those of layers 9, 18 and 27
    text = Qwen3Config(**text_config(tokenizer, layers=28), rope_parameters=TEXT_ROPE)
    Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=vae,
        text_encoder=Qwen3ForCausalLM(text),
        tokenizer=tokenizer,
        transformer=transformer,
        is_distilled=True,
    ).save_pretrained(folder)


def save_krea(folder, tokenizer, dim=64):
    torch.manual_seed(0)
    transformer = Krea2Transformer2DModel(
        in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=dim // 16, num_key_value_heads=2,
        intermediate_size=96, timestep_embed_dim=32, text_hidden_dim=HIDDEN, num_text_layers=3, text_num_attention_heads=4,
        text_num_key_value_heads=4, text_intermediate_size=96, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    for name, parameter in transformer.named_parameters():
        if name.endswith("scale_shift_table") or "norm" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    torch.nn.init.normal_(transformer.final_layer.linear.weight)
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[-0.5, 0.1, 0.3, -0.2], latents_std=[0.5, 1.5, 0.8, 1.2],
    )  # fmt: skip
    Krea2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, max_image_seq_len=6400
        ),
        vae=vae,
        text_encoder=Qwen3VLModel(vlm_config(tokenizer, layers=4)),
        tokenizer=tokenizer,
        transformer=transformer,
        text_encoder_select_layers=(1, 2, 3),
        is_distilled=True,
    ).save_pretrained(folder)


def z_image_in_comfyui(layer, dim=64):
    """q, k and v are rows of one matrix `qkv`; to_out.0 is called `out`."""
    block, _, kind = layer.partition(".attention.")
    if kind in ("to_q", "to_k", "to_v"):
        return f"{block}.attention.qkv", slice(dim * "qkv".index(kind[-1]), dim * ("qkv".index(kind[-1]) + 1))
    return layer.replace("attention.to_out.0", "attention.out"), slice(None)


def klein_in_comfyui(layer, dim=32):
    """In double-stream blocks q, k and v are rows of `qkv`, of image and of text; single-stream blocks have other
    names alone."""
    number, _, kind = layer.partition("transformer_blocks.")[2].partition(".")
    if number and layer.startswith("single_"):
        return (
            f"single_blocks.{number}.{ {'attn.to_qkv_mlp_proj': 'linear1', 'attn.to_out': 'linear2'}[kind] }",
            slice(None),
        )
    for stream, names in {"img": ("to_q", "to_k", "to_v"), "txt": ("add_q_proj", "add_k_proj", "add_v_proj")}.items():
        if (name := kind.removeprefix("attn.")) in names:
            return f"double_blocks.{number}.{stream}_attn.qkv", slice(
                dim * names.index(name), dim * (names.index(name) + 1)
            )
    names = {
        "attn.to_out.0": "img_attn.proj",
        "attn.to_add_out": "txt_attn.proj",
        "ff.linear_in": "img_mlp.0",
        "ff.linear_out": "img_mlp.2",
    }
    names |= {"ff_context.linear_in": "txt_mlp.0", "ff_context.linear_out": "txt_mlp.2"}
    return f"double_blocks.{number}.{names[kind]}", slice(None)


def krea_in_comfyui(layer):
    """Other names alone: `blocks`, `txtfusion`, and wq, wk, wv, gate, wo and mlp within a block."""
    block, _, kind = (
        layer.replace("transformer_blocks.", "blocks.").replace("text_fusion.", "txtfusion.").rpartition(".attn.")
    )
    if not block:
        return kind.replace(".ff.", ".mlp."), slice(None)
    names = {"to_q": "wq", "to_k": "wk", "to_v": "wv", "to_gate": "gate", "to_out.0": "wo"}
    return f"{block}.attn.{names[kind]}", slice(None)


@dataclasses.dataclass
class Family:
    """What tests ask of a family beyond its own class.

    Args:
        pipeline, stock: this project's class and that of diffusers.
        save: writes a tiny base into a folder, for a tokenizer; `dim` makes its transformer another.
        guidance_scale: with which the stock pipeline guides nothing.
        lora_layers: how many linear layers of the tiny transformer the default LoRA trains.
        text_layers: of text encoder and VLM.
        knows_distilled: whether its model_index.json says that a base is distilled.
        takes, gives: latents in the form that the stock pipeline takes and hands out, as a function of a pipeline and
        of (B, C, h, w).
        in_comfyui: name and rows of the matrix that a layer of the tiny transformer is there.
    """

    pipeline: type
    stock: type
    save: Callable
    guidance_scale: float
    lora_layers: int
    in_comfyui: Callable
    text_layers: int = 3
    knows_distilled: bool = True
    takes: Callable = lambda pipeline, latents: latents
    gives: Callable = lambda pipeline, latents: latents


def pack(pipeline, latents):
    return pipeline._pack_latents(latents, *latents.shape)


FAMILIES = {
    "z_image": Family(
        DOPSDZImagePipeline, ZImagePipeline, save_z_image, 0.0, lora_layers=4 * 7, knows_distilled=False, in_comfyui=z_image_in_comfyui
    ),
    "klein": Family(
        DOPSDFlux2KleinPipeline, Flux2KleinPipeline, save_klein, 1.0, lora_layers=12 + 2 * 2, text_layers=28,
        gives=lambda pipeline, latents: pipeline._pack_latents(latents), in_comfyui=klein_in_comfyui,
    ),
    "krea": Family(
        DOPSDKrea2Pipeline, Krea2Pipeline, save_krea, 0.0, lora_layers=4 * 8, text_layers=4, takes=pack, gives=pack,
        in_comfyui=krea_in_comfyui,
    ),
}  # fmt: skip
