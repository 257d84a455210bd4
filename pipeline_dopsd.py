# Copyright 2026 The D-OPSD training scripts authors. Licensed under the Apache License, Version 2.0.
"""D-OPSD pipelines: everything that training and inference must know about a model family, in one place.

D-OPSD (https://arxiv.org/abs/2605.05204) fine-tunes step-distilled text-to-image models on their own few-step
rollouts. A pipeline of this file is the stock diffusers pipeline plus

- the teacher's context: a VLM whose language model is the pipeline's own text encoder, or the model's own edit branch,
- the few-step grid, the latents and the velocity, with the signs and times of the family,
- the names of the layers that a LoRA trains,
- few-step, text-only inference as the default of a call.

Loading a trained LoRA (`repo` is a folder or a repository on the Hub):

```py
# (a) the base through this file, then the LoRA
pipe = DiffusionPipeline.from_pretrained(base, custom_pipeline=repo, trust_remote_code=True)
pipe.load_lora_weights(repo)
# (b) the repository alone: the base is fetched by its name; for another dtype add base_dtype="float16"
pipe = DiffusionPipeline.from_pretrained(repo, trust_remote_code=True)
# (c) no custom code: pass prompt=.., the number of steps and guidance_scale=0.0 yourself
pipe = DiffusionPipeline.from_pretrained(base)
pipe.load_lora_weights(repo)
```
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from diffusers.pipelines.z_image.pipeline_z_image import (
    calculate_shift,
    get_default_z_image_sigmas,
    retrieve_timesteps,
)
from PIL import Image
from safetensors import safe_open
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3VLModel,
    Qwen3VLVisionModel,
)
from transformers.utils import cached_file


LORA_WEIGHT_NAME = "pytorch_lora_weights.safetensors"

# ordinary prompts of many kinds, which a model draws as before while it learns something else (--prior_prompts)
PRIOR_PROMPTS = """
a portrait photo of an elderly woman with silver hair, soft window light
a man in a blue suit crossing a busy street in the rain
two children building a sandcastle on the beach
a chef slicing vegetables in a restaurant kitchen
a crowd at an open-air concert at night, seen from behind
a tabby cat asleep on a stack of books
a golden retriever running through shallow water
a red fox in fresh snow, telephoto
a flock of flamingos over a lake at sunrise
a macro photo of a bee on a lavender flower
a glass of orange juice beside a plate of pancakes
a bowl of ramen with a soft-boiled egg, top view
a wooden chair in an empty white room
a vintage red bicycle leaning against a brick wall
a silver sports car on a mountain road
a wristwatch on dark velvet, product photo
a pair of worn leather boots by the door
a grand piano on an empty stage
a teapot and four cups on a linen tablecloth
an open laptop and a notebook on a tidy desk
a narrow street in an old Italian town, afternoon light
the skyline of a modern city at dusk, long exposure
a lighthouse on a cliff in a storm
a wooden cabin in a pine forest in winter
a library with tall shelves and a spiral staircase
a waterfall in a tropical jungle
sand dunes under a starry sky
a field of sunflowers below a cloudy sky
an aerial view of a winding river in autumn
a harbour full of small fishing boats, early morning fog
a bookshop window with a sign that says "OPEN"
a chalkboard with the words "soup of the day"
a birthday cake with the number 30 on it
a watercolour painting of a bowl of cherries
an oil painting of a ship at sea
a pencil sketch of an old oak tree
a flat vector illustration of a rocket
a pixel art castle on a hill
a low-poly 3D render of a small island
a black and white photo of a jazz trumpeter
a comic panel of a detective under a street lamp
a stained glass window with a peacock
an isometric illustration of a coffee shop
a paper-cut landscape with layered mountains
three green apples and one red apple on a table
a small yellow ball on top of a large blue cube
a robot watering plants in a greenhouse
an astronaut reading a newspaper on a park bench
""".strip().split("\n")

# the same for models that are given reference images: ordinary edits, with --reference_column
PRIOR_EDITS = """
make it night
make it a sunny morning
change the season to winter
let it rain
put it on a beach
replace the background with a plain white wall
blur the background
change the colour of the main object to blue
make everything except the main object black and white
make the colours warmer
turn it into a watercolour painting
turn it into a pencil drawing
turn it into a pixel art picture
turn it into a low-poly 3D render
make it look like a photo from the 1970s
add a cat in the foreground
add a wooden frame around the picture
add the words "good morning" at the top
remove all text
remove the people in the background
move the main object to the left
make the main object smaller
show it from above
zoom out to show more of the surroundings
""".strip().split("\n")


class VisionPart(Qwen3VLVisionModel):
    """The vision part of a Qwen3-VL, alone."""

    _keys_to_ignore_on_load_unexpected = [r"^(model\.)?language_model\.", r"^lm_head\."]


class MultimodalEncoder:
    """A Qwen3-VL that reads images with the language model of a text-to-image pipeline.

    `transplant` gives its language model the text encoder's own layers (nothing is held twice) and rotary settings.
    Without an image, its hidden states then equal the text encoder's; `verify` proves it on one prompt.

    Args:
        vlm_name_or_path (`str`): the VLM; tokenizer and image processor load at once, weights with `transplant`.
        max_pixels (`int`): larger images are scaled down to this area before they are cut into patches.

    Raises:
        ValueError: the model is no Qwen3-VL, or its tokenizer is not whole.
    """

    skipped_tokens = 0  # at the beginning of a chat, which are no part of a context

    def __init__(self, vlm_name_or_path: str, max_pixels: int = 768 * 768):
        self.name = vlm_name_or_path
        self.config = AutoConfig.from_pretrained(vlm_name_or_path)
        if self.config.model_type != "qwen3_vl":
            raise ValueError(f"{self.name} is a {self.config.model_type!r} model; the teacher needs a Qwen3-VL.")
        self.tokenizer = AutoTokenizer.from_pretrained(vlm_name_or_path)
        if self.tokenizer.chat_template is None:  # a repository may keep it for the processor alone
            file = cached_file(vlm_name_or_path, "chat_template.json")
            self.tokenizer.chat_template = json.loads(Path(file).read_text("utf-8"))["chat_template"]
        if self.tokenizer.convert_ids_to_tokens(self.config.image_token_id) is None:
            raise ValueError(f"{self.name} lacks files of its tokenizer, which knows no images; fetch it anew.")
        self.load_image_processor(max_pixels)
        self.model = None

    def load_image_processor(self, max_pixels: int):
        """Loads what makes patches of images."""
        # backend="pil": the default backend needs torchvision
        self.image_processor = AutoImageProcessor.from_pretrained(self.name, backend="pil")
        shortest = min(self.image_processor.size["shortest_edge"], max_pixels)
        self.size = {"shortest_edge": shortest, "longest_edge": max_pixels}

    def check_config(self, text_config):
        """Raises ValueError if the language model differs in shape from the text encoder; reads no weights."""
        for name in ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "vocab_size"):
            ours, theirs = getattr(text_config, name), getattr(self.config.text_config, name)
            if ours != theirs:
                raise ValueError(
                    f"--vlm_model_name_or_path {self.name} does not fit the text encoder: its {name} is {theirs}, not {ours}. "
                    "Choose the Qwen3-VL of the text encoder's size."
                )

    def transplant(self, text_encoder: PreTrainedModel):
        """Loads the VLM with the weights and the rotary settings of `text_encoder` in its language model.

        Raises:
            ValueError: a weight is missing or left over, or text-only hidden states are not equal afterwards.
        """
        self.check_config(text_encoder.config)
        rope = self.config.text_config.rope_parameters
        self.config.text_config.rope_parameters = {**rope, **text_encoder.config.rope_parameters}
        options = {"config": self.config.vision_config, "dtype": text_encoder.dtype, "output_loading_info": True}
        vision, found = VisionPart.from_pretrained(self.name, key_mapping={r"^(model\.)?visual\.": ""}, **options)
        if unseeing := sorted(f"visual.{name}" for name in found["missing_keys"]):
            missing = ", ".join(unseeing[:3])
            raise ValueError(f"The VLM {self.name} lacks weights of its vision part: {missing}, ..; fetch it anew.")
        with torch.device("meta"):  # its language model would be gigabytes that are thrown away
            self.model = Qwen3VLModel._from_config(self.config)
        ours, theirs = self.model.language_model, text_encoder.base_model
        self.model.visual, ours.rotary_emb = vision, type(ours.rotary_emb)(self.config.text_config)
        shapes = {name: p.shape for name, p in ours.named_parameters()}
        # a weight of 4 bits is packed and has no shape of its own
        given = {name: p.shape if p.is_floating_point() else shapes.get(name) for name, p in theirs.named_parameters()}
        unmatched = sorted({name for name, _ in shapes.items() ^ given.items()})
        if unmatched:
            raise ValueError(
                f"The text encoder's weights do not fit the VLM {self.name}; in one of them missing, or of another shape: {unmatched}."
            )
        # whole layers, not tensors: quantised ones bring their own kind of layer
        for name, layer in theirs.named_modules():
            if any(True for _ in layer.parameters(recurse=False)):
                ours.set_submodule(name, layer)
        self.model.to(text_encoder.device).eval().requires_grad_(False)
        self.verify(text_encoder)

    @torch.no_grad()
    def verify(self, text_encoder: PreTrainedModel, prompt: str = "a photo of a cat on a windowsill"):
        """Raises ValueError unless the VLM and `text_encoder` give the same hidden states for a text-only prompt."""
        # kernels may round differently in half precision; a wrong rotary base shows in fp32 and is set by construction
        tolerance = max(1e-4, 2 * torch.finfo(text_encoder.dtype).eps)
        inputs = self.tokenizer(prompt, return_tensors="pt").to(text_encoder.device)
        ours = self.model(**inputs, output_hidden_states=True).hidden_states
        theirs = text_encoder(**inputs, output_hidden_states=True).hidden_states
        for layer, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            difference = ((a.float() - b.float()).norm(dim=-1) / b.float().norm(dim=-1)).max()  # worst token
            if not difference <= tolerance:  # also true for NaN
                raise ValueError(
                    f"After the transplant, layer {layer} of the VLM {self.name} and of the text encoder differ by "
                    f"{difference:.1e} on a text-only prompt; use a VLM of the same language model family."
                )

    def chat(self, prompt: str, image_tokens: int, ending: str = "") -> str:
        """One user turn, the image if there is one and then the prompt, with the generation prompt and its ending."""
        content = [*([{"type": "image"}] if image_tokens else []), {"type": "text", "text": prompt}]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        pad = self.tokenizer.convert_ids_to_tokens(self.config.image_token_id)
        return text.replace(pad, pad * image_tokens, 1) + ending

    def context_length(self, prompt: str, height: int, width: int, ending: str = "") -> int:
        """Tokens of the context of `prompt` and an image of `height` x `width` pixels; needs no weights."""
        limits = {"min_pixels": self.size["shortest_edge"], "max_pixels": self.size["longest_edge"]}
        patches = self.image_processor.get_number_of_image_patches(height, width, limits)
        chat = self.chat(prompt, patches // self.image_processor.merge_size**2, ending)
        return len(self.tokenizer(chat).input_ids) - self.skipped_tokens

    @torch.no_grad()
    def hidden_states(
        self, prompts: list[str], images: list, ending: str = "", pad_to: int = 0
    ) -> list[tuple[torch.Tensor, ...]]:
        """For each chat with a PIL image and a prompt, the hidden states of all layers, each (tokens, dim); one
        forward.

        Without `images`, the chats are of text alone. Shorter contexts than `pad_to` tokens are padded at the end,
        masked as the text encoder's own padding is.
        """
        inputs, counts = {}, [0] * len(prompts)
        if images:
            inputs = dict(self.image_processor(images=images, size=self.size, return_tensors="pt"))
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
            counts = (inputs["image_grid_thw"].prod(dim=1) // self.image_processor.merge_size**2).tolist()
        chats = [self.chat(prompt, count, ending) for prompt, count in zip(prompts, counts, strict=True)]
        padding = {"padding": "max_length", "max_length": pad_to} if pad_to else {"padding": True}
        inputs |= self.tokenizer(chats, return_tensors="pt", padding_side="right", **padding)
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == self.config.image_token_id).long()
        # counted without the mask: positions go on through the padding, as the text encoder's do
        counted = inputs["input_ids"], inputs["mm_token_type_ids"], inputs.get("image_grid_thw")
        inputs["position_ids"], _ = self.model.get_rope_index(*counted)
        inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
        lengths = [pad_to or int(length) for length in inputs["attention_mask"].sum(dim=1)]
        layers = self.model(**inputs, output_hidden_states=True).hidden_states
        first = self.skipped_tokens
        return [tuple(hidden[i, first:length] for hidden in layers) for i, length in enumerate(lengths)]


class NativeEncoder(MultimodalEncoder):
    """A text encoder that is a Qwen3-VL and reads images with its own weights, in the chat that its pipeline writes.

    Args:
        vlm_name_or_path (`str`): where the image processor comes from, and nothing else.
        max_pixels (`int`): see `MultimodalEncoder`.
        config, tokenizer: those of the text encoder.
        pipeline: has the chat, whose beginning is dropped from the contexts.

    Raises:
        ValueError: the image processor is made for another kind of model.
    """

    def __init__(
        self,
        vlm_name_or_path: str,
        max_pixels: int,
        config: PretrainedConfig,
        tokenizer: AutoTokenizer,
        pipeline: Krea2Pipeline,
    ):
        self.name, self.config, self.tokenizer, self.model = vlm_name_or_path, config, tokenizer, None
        self.before, self.after = pipeline.prompt_template_encode_prefix, pipeline.prompt_template_encode_suffix
        self.skipped_tokens = pipeline.prompt_template_encode_start_idx
        self.load_image_processor(max_pixels)
        vision, ours = config.vision_config, self.image_processor
        if (ours.patch_size, ours.merge_size) != (vision.patch_size, vision.spatial_merge_size):
            raise ValueError(
                f"--vlm_model_name_or_path {self.name} does not fit the text encoder: its image processor cuts patches of "
                f"{ours.patch_size} pixels, not {vision.patch_size}. Choose a Qwen3-VL."
            )

    def transplant(self, text_encoder: PreTrainedModel):
        """Takes the text encoder as it is.

        Raises:
            ValueError: its files lack weights of its vision part, which transformers has then made up.
        """
        held = set()
        for file in Path(text_encoder.name_or_path).glob("*.safetensors"):
            with safe_open(file, "pt") as weights:
                held |= {name.partition("visual.")[2] for name in weights.keys()}
        unseeing = sorted(name for name, _ in text_encoder.visual.named_parameters() if name not in held)
        if held and unseeing:
            raise ValueError(
                f"The text encoder {text_encoder.name_or_path} lacks weights of its vision part: visual.{unseeing[0]}, ..; give a base "
                "whose text encoder is whole."
            )
        self.model = text_encoder

    def chat(self, prompt: str, image_tokens: int, ending: str = "") -> str:
        """The pipeline's chat, with the image, if there is one, at the beginning of the user's turn."""
        image = [self.config.image_token_id] * image_tokens
        ids = self.config.vision_start_token_id, *image, self.config.vision_end_token_id
        image = "".join(self.tokenizer.convert_ids_to_tokens(ids)) if image_tokens else ""
        return self.before + image + prompt + self.after + ending


def input_dtype(transformer: torch.nn.Module, device_type: str) -> torch.dtype:
    """dtype of what `transformer` is given: autocast's, in which inference will be, or that of its own weights, not of
    a LoRA's or of packed 4-bit ones."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    named = transformer.named_parameters()
    return next(p.dtype for name, p in named if p.is_floating_point() and ".lora_" not in name)


class DOPSDMixin:
    """What all families share. A family adds the methods that `DOPSDZImagePipeline` documents.

    A context is a dict of tensors without batch dimension: `prompt_embeds` (tokens, dim) and, where the transformer
    takes reference images, `reference_0`, `reference_1`, .. (C, h, w).
    """

    teacher_contexts = ["vlm"]
    default_teacher_suffixes = {"vlm": ""}
    default_teacher_max_pixels = 768 * 768
    # hidden size of the text encoder -> the Qwen3-VL of its size
    vlms = {2560: "Qwen/Qwen3-VL-4B-Instruct", 4096: "Qwen/Qwen3-VL-8B-Instruct"}
    # what is read of the VLM
    vlm_files = ["*.json", "*.jinja", "*.txt", "*.safetensors"]
    distilled_unless_said = True
    # to be raised when `encode_student` or `encode_teacher` give others: stored contexts are then encoded anew
    encoding_version = 1
    multimodal_encoder: MultimodalEncoder | None = None

    def load_lora_weights(self, pretrained_model_name_or_path_or_dict, **kwargs):
        """As the stock pipeline's, after a look at a repository's model_index.json: at the base that it names, and at
        the number of steps, which becomes that of a call.

        Raises:
            ValueError: the LoRA was trained on another base of the Hub.
        """
        source, base = pretrained_model_name_or_path_or_dict, self.config.get("_name_or_path")
        index, options = {}, {n: kwargs[n] for n in ("token", "revision", "local_files_only") if n in kwargs}
        if isinstance(source, (str, os.PathLike)) and not self.config.get("base_model"):
            with contextlib.suppress(OSError):  # a file, or a repository without model_index.json
                index = DiffusionPipeline.load_config(source, **options)
        trained_on = index.get("base_model")
        # a folder may be a copy of the base under another name
        if trained_on and base and trained_on != base and not os.path.isdir(trained_on) and not os.path.isdir(base):
            raise ValueError(
                f"{source} was trained on {trained_on}, not on {base}. To try it there all the same, load it with the stock "
                "pipeline, without custom_pipeline."
            )
        super().load_lora_weights(source, **kwargs)
        if trained_on and "num_inference_steps" in index:
            self.register_to_config(num_inference_steps=index["num_inference_steps"])

    @classmethod
    def load_lora_into_transformer(cls, state_dict, transformer, **kwargs):
        """As the stock pipeline's. Raises ValueError where a layer of the LoRA does not fit the transformer."""
        modules = dict(transformer.named_modules())
        for name, weight in state_dict.items():
            layer, side, _ = name.removeprefix("transformer.").rpartition(".lora_A.weight")
            if side and getattr(modules.get(layer), "in_features", None) != weight.shape[1]:
                raise ValueError(
                    f"This LoRA was trained on another base: its {layer}, {weight.shape[1]} wide, does not fit."
                )
        super().load_lora_into_transformer(state_dict, transformer=transformer, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """Saves the stock pipeline, which plain diffusers loads; the number of steps stays in its model_index.json.

        Raises:
            ValueError: a LoRA lies beside the weights, which could then not be loaded.
        """
        if self.transformer is not None and any(".lora_" in name for name, _ in self.transformer.named_parameters()):
            remedy = "save_lora_weights() saves the LoRA alone."
            raise ValueError(f"Call fuse_lora() and unload_lora_weights() before save_pretrained(); {remedy}")
        stock = next(c for c in type(self).__mro__ if c.__module__.startswith("diffusers."))
        passing = "_", "base_", "lora_"  # of where the weights came from
        own = {n: v for n, v in self.config.items() if n not in self.components and not n.startswith(passing)}
        # not from_pipe, which would cast the weights to fp32
        taken = {name: value for name, value in own.items() if name in inspect.signature(stock).parameters}
        pipeline = stock(**self.components, **taken)
        pipeline.register_to_config(**own)
        pipeline.save_pretrained(save_directory, **kwargs)

    @classmethod
    def make_encoder(
        cls, vlm_name_or_path: str, max_pixels: int, text_config: PretrainedConfig, tokenizer: AutoTokenizer
    ) -> MultimodalEncoder:
        """The teacher's encoder, without weights yet. Raises ValueError for a VLM that does not fit the text
        encoder."""
        encoder = MultimodalEncoder(vlm_name_or_path, max_pixels)
        encoder.check_config(text_config)
        return encoder

    def load_multimodal_encoder(self, vlm_name_or_path: str, max_pixels: int | None = None):
        """Loads the teacher's encoder; needs `text_encoder`. See `MultimodalEncoder` for the errors."""
        max_pixels = max_pixels or self.default_teacher_max_pixels
        config, tokenizer = self.text_encoder.config, self.tokenizer
        self.multimodal_encoder = self.make_encoder(vlm_name_or_path, max_pixels, config, tokenizer)
        self.multimodal_encoder.transplant(self.text_encoder)

    @classmethod
    def steps_of(cls, model_name_or_path: str, revision: str | None = None) -> int:
        """Number of inference steps that a base's model_index.json names, or the family's."""
        config = cls.load_config(model_name_or_path, revision=revision)
        return config.get("num_inference_steps") or cls.default_num_inference_steps

    @staticmethod
    def chat_ending(tokenizer) -> str:
        """What the family's chats have after the generation prompt."""
        return ""

    @classmethod
    def max_prompt_length(cls, pipeline_config: dict) -> int:
        """Tokens of a prompt with its chat after which the stock pipeline cuts off the rest."""
        return pipeline_config.get("max_sequence_length", cls.stock_length)

    @classmethod
    def prompt_length(cls, tokenizer, prompt: str) -> int:
        """Tokens of a prompt with its chat."""
        turn = [{"role": "user", "content": prompt}]
        chat = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return len(tokenizer(chat + cls.chat_ending(tokenizer)).input_ids)

    @staticmethod
    def size_multiple(vae_config: dict) -> int:
        """Height and width of an image must be multiples of this number of pixels (VAE factor times patch size)."""
        return 2 ** (len(vae_config["block_out_channels"]) - 1) * 2

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) from -1 to 1 of latents as the VAE decodes them."""
        return self.vae.decode(latents, return_dict=False)[0]

    @torch.no_grad()
    def sample(self, transformer, contexts: list[dict], latents: torch.Tensor, num_steps: int) -> list:
        """PIL images that `transformer` draws of the noise `latents` in `num_steps`, as a call does with latents in
        fp32, for any context."""
        for timestep in self.few_step_grid(num_steps, latents):
            velocity = self.velocity(transformer, latents, timestep, contexts)
            latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        with torch.autocast(latents.device.type, enabled=False):
            image = self.decode(self.to_vae_latents(latents).to(self.vae.dtype))
        return self.image_processor.postprocess(image, output_type="pil")

    @classmethod
    def lora_targets(cls, transformer: torch.nn.Module, names: list[str] | None = None) -> list[str]:
        """Full names of the linear layers of `transformer` that begin or end with `names` (default: the family's).

        Raises:
            ValueError: a name matches no linear layer.
        """
        linears = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
        targets = []
        for wanted in names or cls.lora_layers:
            found = [name for name in linears if f".{name}".endswith(f".{wanted}") or name.startswith(f"{wanted}.")]
            if not found:
                endings = ([p for p in name.split(".")[-3:] if not p.isdigit() or p == "0"] for name in linears)
                known = ", ".join(sorted(set(map(".".join, endings))))
                raise ValueError(f"--lora_layers: {wanted!r} matches no linear layer. Layers end in: {known}.")
            targets += [name for name in found if name not in targets]
        return targets


class DOPSDZImagePipeline(DOPSDMixin, ZImagePipeline):
    """Z-Image-Turbo with D-OPSD's contexts; calling it is few-step, text-only inference.

    Args:
        num_inference_steps (`int`): the checkpoint's number of steps, used when a call names none.
    """

    # attention and feed-forward of all blocks: main layers, noise refiner and context refiner
    lora_layers = [
        "attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0",
        "feed_forward.w1", "feed_forward.w2", "feed_forward.w3",
    ]  # fmt: skip
    hidden_layer = -2  # of text encoder and VLM: what the transformer reads
    default_num_inference_steps = 8
    distilled_bases = "Tongyi-MAI/Z-Image-Turbo"
    transformer_class = ZImageTransformer2DModel
    vae_class = AutoencoderKL
    stock_length = inspect.signature(ZImagePipeline.encode_prompt).parameters["max_sequence_length"].default

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL,
        text_encoder: PreTrainedModel,
        tokenizer: AutoTokenizer,
        transformer: ZImageTransformer2DModel,
        num_inference_steps: int = 8,
    ):
        super().__init__(scheduler, vae, text_encoder, tokenizer, transformer)
        self.register_to_config(num_inference_steps=num_inference_steps)

    @torch.no_grad()
    def __call__(self, prompt=None, *, num_inference_steps: int | None = None, guidance_scale: float = 0.0, **kwargs):
        """As [`ZImagePipeline.__call__`], with the checkpoint's number of steps and without guidance by default."""
        # a copy: the stock encode_prompt writes the chat template into the caller's list
        prompt = list(prompt) if isinstance(prompt, list) else prompt
        steps = num_inference_steps or self.config.num_inference_steps
        return super().__call__(prompt=prompt, num_inference_steps=steps, guidance_scale=guidance_scale, **kwargs)

    @staticmethod
    def max_context_length(transformer_config: dict, pipeline_config: dict) -> int:
        """The longest context, in tokens, that the transformer's position table holds (1504 for Z-Image-Turbo).

        A context is padded to a multiple of 32 and the image's position starts one after it.
        """
        return (transformer_config["axes_lens"][0] - 2) // 32 * 32

    @staticmethod
    def context_shape(tokens: int, transformer_config: dict, pipeline_config: dict) -> tuple[int, ...]:
        """Shape of the `prompt_embeds` of a context with so many tokens."""
        return tokens, transformer_config["cap_feat_dim"]

    @torch.no_grad()
    def encode_student(self, prompts: list[str], references=None) -> list[dict]:
        """Student context c_s: the stock text features, `prompt_embeds` (tokens, dim) per prompt."""
        embeds = self.encode_prompt(list(prompts), do_classifier_free_guidance=False)[0]
        return [{"prompt_embeds": e} for e in embeds]

    def encode_teacher(self, prompts: list[str], images: list, teacher_context="vlm", references=None) -> list[dict]:
        """Teacher context c_t: last-but-one hidden states of ALL tokens (chat, vision, text), per prompt and image."""
        states = self.multimodal_encoder.hidden_states(prompts, images)
        return [{"prompt_embeds": layers[self.hidden_layer].clone()} for layers in states]

    def initial_noise(self, height: int, width: int, generator: torch.Generator) -> torch.Tensor:
        """x_{t_1} of one image, (1, C, h, w) in fp32; drawn on the CPU so that it does not depend on the device."""
        return self.prepare_latents(
            1, self.transformer.config.in_channels, height, width, torch.float32, torch.device("cpu"), generator
        )

    def few_step_grid(self, num_steps: int, latents: torch.Tensor) -> torch.Tensor:
        """Sets the scheduler to the inference grid of `num_steps` for `latents`; timesteps (num_steps,), 1000 =
        noise."""
        config = self.scheduler.config
        mu = calculate_shift(
            (latents.shape[-2] // 2) * (latents.shape[-1] // 2),
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        sigmas = get_default_z_image_sigmas(num_steps)
        timesteps, _ = retrieve_timesteps(self.scheduler, num_steps, latents.device, sigmas=sigmas, mu=mu)
        self.scheduler.set_begin_index(0)
        return timesteps

    def velocity(self, transformer, latents: torch.Tensor, timestep: torch.Tensor, contexts: list[dict]):
        """v_theta(x_t, t, c) = noise - data, shape of `latents` (B, C, h, w), fp32.

        The transformer's time runs from 0 (noise) to 1 (data) and its output is data - noise.

        Args:
            transformer: the (possibly wrapped) transformer to run.
            timestep: tensor between 0 (data) and 1000 (noise), scalar or one per image.
            contexts: one per image.
        """
        dtype = input_dtype(transformer, latents.device.type)
        images = list(latents.to(dtype).unsqueeze(2).unbind(0))
        time = (1000 - timestep.expand(len(images))) / 1000
        embeds = [c["prompt_embeds"].to(latents.device, dtype) for c in contexts]
        out = transformer(images, time, embeds, return_dict=False)[0]
        return -torch.stack([o.float() for o in out]).squeeze(2)

    def to_vae_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the VAE decodes them."""
        return latents / self.vae.config.scaling_factor + self.vae.config.shift_factor

    def image_latents(self, pixels: torch.Tensor) -> torch.Tensor:
        """x_0 of preprocessed images (B, 3, H, W): what a rollout ends at, (B, C, h, w)."""
        mean = self.vae.encode(pixels).latent_dist.mean
        return (mean - self.vae.config.shift_factor) * self.vae.config.scaling_factor


class DOPSDFlux2KleinPipeline(DOPSDMixin, Flux2KleinPipeline):
    """FLUX.2-klein with D-OPSD's contexts; calling it is few-step inference, of text alone unless images are given.

    Args:
        num_inference_steps (`int`): the checkpoint's number of steps, used when a call names none.
        text_encoder_out_layers (`list[int]`): layers of the text encoder whose features are concatenated.
        max_sequence_length (`int`): tokens of every context, padding included.
    """

    # attention and feed-forward of the double-stream blocks (image, text), then the fused layers of the others
    lora_layers = [
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.linear_in", "ff.linear_out",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
        "ff_context.linear_in", "ff_context.linear_out",
        "attn.to_qkv_mlp_proj", "attn.to_out",
    ]  # fmt: skip
    teacher_contexts = ["vlm", "edit"]
    default_teacher_suffixes = {
        "vlm": "",
        "edit": ". Keep the subject, the background and the composition of the reference image.",
    }
    # 256 of the 512 tokens of a context: see `encode_teacher`
    default_teacher_max_pixels = 512 * 512
    default_num_inference_steps = 4
    distilled_bases = "black-forest-labs/FLUX.2-klein-4B or black-forest-labs/FLUX.2-klein-9B"
    distilled_unless_said = False
    transformer_class = Flux2Transformer2DModel
    vae_class = AutoencoderKLFlux2
    stock_layers = inspect.signature(Flux2KleinPipeline.encode_prompt).parameters["text_encoder_out_layers"].default
    stock_length = inspect.signature(Flux2KleinPipeline.encode_prompt).parameters["max_sequence_length"].default

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKLFlux2,
        text_encoder: PreTrainedModel,
        tokenizer: AutoTokenizer,
        transformer: Flux2Transformer2DModel,
        is_distilled: bool = True,
        num_inference_steps: int = 4,
        text_encoder_out_layers: list = stock_layers,
        max_sequence_length: int = stock_length,
    ):
        super().__init__(scheduler, vae, text_encoder, tokenizer, transformer, is_distilled)
        layers = list(text_encoder_out_layers)
        encoding = {"text_encoder_out_layers": layers, "max_sequence_length": max_sequence_length}
        self.register_to_config(num_inference_steps=num_inference_steps, **encoding)

    @torch.no_grad()
    def __call__(
        self, prompt=None, *, image=None, num_inference_steps: int | None = None, guidance_scale: float = 1.0, **kwargs
    ):
        """As [`Flux2KleinPipeline.__call__`], with the prompt first as in other families, the checkpoint's number of
        steps and no guidance by default."""
        kwargs = {**self.encoding, **kwargs}
        steps = num_inference_steps or self.config.num_inference_steps
        return super().__call__(image, prompt, num_inference_steps=steps, guidance_scale=guidance_scale, **kwargs)

    @property
    def encoding(self) -> dict:
        """Arguments of the stock encode_prompt that this checkpoint was trained with."""
        return {name: self.config[name] for name in ("text_encoder_out_layers", "max_sequence_length")}

    @staticmethod
    def chat_ending(tokenizer) -> str:
        """What the stock chat template writes after the generation prompt where thinking is off."""
        chat = [{"role": "user", "content": ""}]
        thinking, not_thinking = (
            tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, enable_thinking=enabled)
            for enabled in (True, False)
        )
        return not_thinking.removeprefix(thinking)

    @classmethod
    def max_context_length(cls, transformer_config: dict, pipeline_config: dict) -> int:
        """The length, in tokens, of every context."""
        return cls.max_prompt_length(pipeline_config)

    @classmethod
    def context_shape(cls, tokens: int, transformer_config: dict, pipeline_config: dict) -> tuple[int, ...]:
        """Shape of the `prompt_embeds` of a context; see [`DOPSDZImagePipeline.context_shape`]."""
        return cls.max_prompt_length(pipeline_config), transformer_config["joint_attention_dim"]

    @torch.no_grad()
    def encode_student(self, prompts: list[str], references: list[list] | None = None) -> list[dict]:
        """Student context c_s: the stock text features (max_sequence_length, dim), padding kept, and references."""
        embeds = self.encode_prompt(list(prompts), **self.encoding)[0]
        references = references or [[]] * len(prompts)
        return [{"prompt_embeds": e, **self.encode_references(r)} for e, r in zip(embeds, references, strict=True)]

    @torch.no_grad()
    def encode_teacher(
        self, prompts: list[str], images: list, teacher_context="vlm", references: list[list] | None = None
    ):
        """Teacher context c_t of each prompt and PIL image.

        `edit`: the student's context with the image as the last reference, the transformer's own way to see images.

        `vlm`: image and prompt as one chat, laid out as the only text that the transformer has seen: of
        `max_sequence_length` (512) tokens, so that position ids run from 0 to 511; the real tokens first and the
        padding, masked in the VLM, kept behind them; the chat ends as the text encoder's does with thinking off. A
        longer context would put tokens at positions never seen.
        """
        references = references or [[]] * len(prompts)
        if teacher_context == "edit":
            return self.encode_student(prompts, [[*r, image] for r, image in zip(references, images, strict=True)])
        ending, layers = self.chat_ending(self.tokenizer), self.config.text_encoder_out_layers
        states = self.multimodal_encoder.hidden_states(prompts, images, ending, pad_to=self.config.max_sequence_length)
        embeds = [torch.cat([hidden[k] for k in layers], dim=-1) for hidden in states]
        return [{"prompt_embeds": e, **self.encode_references(own)} for e, own in zip(embeds, references, strict=True)]

    @staticmethod
    @functools.cache
    def check_reference(width: int, height: int):
        """Raises ValueError for a size of images that the stock pipeline does not take as references."""
        Flux2ImageProcessor.check_image_input(Image.new("1", (width, height)))

    def encode_references(self, images: list) -> dict[str, torch.Tensor]:
        """Normalised latents (C, h, w) of each PIL image, resized as the stock pipeline does."""
        latents, multiple = {}, self.vae_scale_factor * 2
        for number, image in enumerate(images):
            image = self.image_processor._resize_if_exceeds_area(self.image_processor.check_image_input(image))
            size = {"height": image.height // multiple * multiple, "width": image.width // multiple * multiple}
            pixels = self.image_processor.preprocess(image, **size, resize_mode="crop")
            pixels = pixels.to(self.vae.device, self.vae.dtype)
            latents[f"reference_{number}"] = self.image_latents(pixels)[0]
        return latents

    def image_latents(self, pixels: torch.Tensor) -> torch.Tensor:
        """x_0 of preprocessed images (B, 3, H, W): what a rollout ends at, (B, C, h, w)."""
        return self._encode_vae_image(pixels, None)

    def initial_noise(self, height: int, width: int, generator: torch.Generator) -> torch.Tensor:
        """x_{t_1} of one image, (1, C, h, w) in fp32; drawn on the CPU so that it does not depend on the device."""
        channels, multiple = self.transformer.config.in_channels, self.vae_scale_factor * 2
        place = torch.float32, torch.device("cpu"), generator
        packed, _ = self.prepare_latents(1, channels // 4, height, width, *place)
        return packed.mT.reshape(1, channels, height // multiple, width // multiple)

    def few_step_grid(self, num_steps: int, latents: torch.Tensor) -> torch.Tensor:
        """Sets the scheduler to the inference grid of `num_steps` for `latents`; timesteps (num_steps,), 1000 =
        noise."""
        mu = compute_empirical_mu(latents.shape[-2] * latents.shape[-1], num_steps)
        sigmas = None if self.scheduler.config.get("use_flow_sigmas") else np.linspace(1.0, 1 / num_steps, num_steps)
        timesteps, _ = retrieve_timesteps(self.scheduler, num_steps, latents.device, sigmas=sigmas, mu=mu)
        self.scheduler.set_begin_index(0)
        return timesteps

    @classmethod
    @functools.lru_cache(maxsize=32)
    def position_ids(cls, batch_size: int, tokens: int, size: tuple, reference_sizes: tuple, device: torch.device):
        """Stock ids of text (B, tokens, 4) and of image and references (B, all h * w, 4); kept, as they depend on
        sizes alone."""
        text_ids = cls._prepare_text_ids(torch.empty(batch_size, tokens, 1))
        ids = cls._prepare_latent_ids(torch.empty(batch_size, *size))
        if reference_sizes:
            reference_ids = cls._prepare_image_ids([torch.empty(1, *size) for size in reference_sizes])
            ids = torch.cat([ids, reference_ids.expand(len(ids), -1, -1)], dim=1)
        return text_ids.to(device), ids.to(device)

    def velocity(self, transformer, latents: torch.Tensor, timestep: torch.Tensor, contexts: list[dict]):
        """v_theta(x_t, t, c) = noise - data; see [`DOPSDZImagePipeline.velocity`].

        The position ids of a batch are those of its first image: all contexts must have references of the same sizes.
        """
        dtype, device = input_dtype(transformer, latents.device.type), latents.device
        embeds = torch.stack([c["prompt_embeds"] for c in contexts]).to(device, dtype)
        tokens = self._pack_latents(latents)
        references = [[c[f"reference_{i}"] for i in range(len(c) - 1)] for c in contexts]
        if references[0]:
            packed = [torch.cat([self._pack_latents(image[None]) for image in images], dim=1) for images in references]
            tokens = torch.cat([tokens, torch.cat(packed).to(tokens)], dim=1)
        sizes = tuple(tuple(image.shape) for image in references[0])
        text_ids, image_ids = self.position_ids(len(latents), embeds.shape[1], tuple(latents.shape[1:]), sizes, device)
        out = transformer(
            hidden_states=tokens.to(dtype),
            timestep=timestep.expand(len(latents)).to(dtype) / 1000,  # in this order, as the stock pipeline rounds
            guidance=None,
            encoder_hidden_states=embeds,
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        return out[:, : latents[0, 0].numel()].mT.reshape(latents.shape).float()

    def to_vae_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the VAE decodes them: the statistics of its batch norm put back, patches taken apart."""
        norm = self.vae.bn
        mean, variance = (kept.view(1, -1, 1, 1).to(latents) for kept in (norm.running_mean, norm.running_var))
        return self._unpatchify_latents(latents * torch.sqrt(variance + self.vae.config.batch_norm_eps) + mean)


class DOPSDKrea2Pipeline(DOPSDMixin, Krea2Pipeline):
    """Krea-2-Turbo with D-OPSD's contexts; calling it is few-step, text-only inference.

    A context is trimmed to its real tokens: `prompt_embeds` (tokens, layers, dim) has the features of several layers
    of the text encoder for each token. All of them stand at position 0 in the transformer, which masks padding, so
    that no length is too long for it.

    Args:
        text_encoder_select_layers (`list[int]`): layers of the text encoder whose features are stacked; see
        [`Krea2Pipeline`].
        num_inference_steps (`int`): the checkpoint's number of steps, used when a call names none.
    """

    # attention and feed-forward of all blocks: main blocks and, as text and image reach them through it, text fusion
    lora_layers = [
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_gate", "attn.to_out.0", "ff.gate", "ff.up", "ff.down",
    ]  # fmt: skip
    # 256 tokens: with a caption no more than the 512 that the transformer has seen, and 16 MB on the disk in bf16
    default_teacher_max_pixels = 512 * 512
    # the text encoder is a VLM itself
    vlm_files = ["preprocessor_config.json"]
    default_num_inference_steps = 8
    distilled_bases = "krea/Krea-2-Turbo"
    distilled_unless_said = False
    transformer_class = Krea2Transformer2DModel
    vae_class = AutoencoderKLQwenImage
    stock_length = inspect.signature(Krea2Pipeline.encode_prompt).parameters["max_sequence_length"].default
    # shift of the grid of distilled checkpoints, in the stock pipeline's call
    mu = 1.15

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKLQwenImage,
        text_encoder: Qwen3VLModel,
        tokenizer: AutoTokenizer,
        transformer: Krea2Transformer2DModel,
        text_encoder_select_layers: list | None = None,
        is_distilled: bool = True,
        patch_size: int = 2,
        num_inference_steps: int = 8,
    ):
        components = scheduler, vae, text_encoder, tokenizer, transformer
        super().__init__(*components, text_encoder_select_layers, is_distilled, patch_size)
        self.register_to_config(num_inference_steps=num_inference_steps)

    @torch.no_grad()
    def __call__(self, prompt=None, *, num_inference_steps: int | None = None, guidance_scale: float = 0.0, **kwargs):
        """As [`Krea2Pipeline.__call__`], with the checkpoint's number of steps and without guidance by default."""
        steps = num_inference_steps or self.config.num_inference_steps
        return super().__call__(prompt, num_inference_steps=steps, guidance_scale=guidance_scale, **kwargs)

    @classmethod
    @functools.cache
    def without_parts(cls) -> DOPSDKrea2Pipeline:
        """A pipeline that knows the stock chat and nothing else."""
        return cls(*[None] * 5)

    @classmethod
    def make_encoder(
        cls, vlm_name_or_path: str, max_pixels: int, text_config: PretrainedConfig, tokenizer: AutoTokenizer
    ) -> MultimodalEncoder:
        """The teacher's encoder, without weights yet. Raises ValueError where the image processor does not fit the
        text encoder."""
        return NativeEncoder(vlm_name_or_path, max_pixels, text_config, tokenizer, cls.without_parts())

    @classmethod
    def prompt_length(cls, tokenizer, prompt: str) -> int:
        """Tokens of a prompt with its chat, as far as they are part of the context."""
        stock = cls.without_parts()
        chat = stock.prompt_template_encode_prefix + prompt, stock.prompt_template_encode_suffix
        return sum(len(tokenizer(part).input_ids) for part in chat) - stock.prompt_template_encode_start_idx

    @staticmethod
    def max_context_length(transformer_config: dict, pipeline_config: dict) -> float:
        """The transformer takes contexts of any length."""
        return math.inf

    @staticmethod
    def context_shape(tokens: int, transformer_config: dict, pipeline_config: dict) -> tuple[int, ...]:
        """Shape of the `prompt_embeds` of a context; see [`DOPSDZImagePipeline.context_shape`]."""
        return tokens, transformer_config["num_text_layers"], transformer_config["text_hidden_dim"]

    @staticmethod
    def size_multiple(vae_config: dict) -> int:
        """See [`DOPSDMixin.size_multiple`]."""
        return 2 ** len(vae_config["temperal_downsample"]) * 2

    @torch.no_grad()
    def encode_student(self, prompts: list[str], references=None) -> list[dict]:
        """Student context c_s: the stock text features of the real tokens, `prompt_embeds` (tokens, layers, dim)."""
        embeds, masks = self.encode_prompt(list(prompts))
        return [{"prompt_embeds": e[mask]} for e, mask in zip(embeds, masks, strict=True)]

    def encode_teacher(self, prompts: list[str], images: list, teacher_context="vlm", references=None) -> list[dict]:
        """Teacher context c_t: the student's, with the image before the prompt in the user's turn.

        The text encoder reads both: image tokens have the positions (time, height, width) that its own function gives
        them.
        """
        states = self.multimodal_encoder.hidden_states(prompts, images)
        taps = self.text_encoder_select_layers
        return [{"prompt_embeds": torch.stack([layers[k] for k in taps], dim=1)} for layers in states]

    def initial_noise(self, height: int, width: int, generator: torch.Generator) -> torch.Tensor:
        """x_{t_1} of one image, (1, C, h, w) in fp32; drawn on the CPU so that it does not depend on the device."""
        channels = self.transformer.config.in_channels // self.patch_size**2
        packed = self.prepare_latents(1, channels, height, width, torch.float32, torch.device("cpu"), generator)
        return self._unpack_latents(packed, height, width)[:, :, 0]

    def few_step_grid(self, num_steps: int, latents: torch.Tensor) -> torch.Tensor:
        """Sets the scheduler to the grid of `num_steps`, one for all sizes; timesteps (num_steps,), 1000 = noise."""
        sigmas = np.linspace(1.0, 1 / num_steps, num_steps)
        timesteps, _ = retrieve_timesteps(self.scheduler, num_steps, latents.device, sigmas=sigmas, mu=self.mu)
        self.scheduler.set_begin_index(0)
        return timesteps

    def velocity(self, transformer, latents: torch.Tensor, timestep: torch.Tensor, contexts: list[dict]):
        """v_theta(x_t, t, c) = noise - data; see [`DOPSDZImagePipeline.velocity`]."""
        (batch, _, height, width), device = latents.shape, latents.device
        dtype = input_dtype(transformer, device.type)
        embeds = [c["prompt_embeds"].to(device, dtype) for c in contexts]
        lengths, longest = [len(e) for e in embeds], max(map(len, embeds))
        mask = None  # more kernels of attention take none
        if min(lengths) < longest:
            mask = torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]
        grid = height // self.patch_size, width // self.patch_size
        out = transformer(
            hidden_states=self._pack_latents(latents, *latents.shape).to(dtype),
            encoder_hidden_states=pad_sequence(embeds, batch_first=True),
            timestep=(timestep / 1000).expand(batch).to(dtype),  # in this order, as the stock pipeline rounds
            position_ids=self.prepare_position_ids(longest, *grid, device),
            encoder_attention_mask=mask,
            return_dict=False,
        )[0]
        pixels = height * self.vae_scale_factor, width * self.vae_scale_factor
        return self._unpack_latents(out.float(), *pixels)[:, :, 0]

    @property
    def latent_statistics(self) -> torch.Tensor:
        """Mean and standard deviation of the VAE's latents, (2, 1, C, 1, 1, 1)."""
        return torch.tensor([self.vae.config.latents_mean, self.vae.config.latents_std])[:, None, :, None, None, None]

    def to_vae_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the VAE decodes them: with an axis of frames and its statistics."""
        mean, std = self.latent_statistics.to(latents)
        return latents.unsqueeze(2) * std + mean

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """See [`DOPSDMixin.decode`]."""
        return super().decode(latents)[:, :, 0]

    def image_latents(self, pixels: torch.Tensor) -> torch.Tensor:
        """x_0 of preprocessed images (B, 3, H, W): what a rollout ends at, (B, C, h, w)."""
        latents = self.vae.encode(pixels.unsqueeze(2)).latent_dist.mean
        mean, std = self.latent_statistics.to(latents)
        return ((latents - mean) / std)[:, :, 0]


class _FromRepository:
    """Way (b): the pipeline of a LoRA repository, which loads the base by its name and then the LoRA beside it.

    `DiffusionPipeline.from_pretrained` hands the folder or repository id to `register_to_config` once the pipeline
    stands. The dtype of the base comes from the repository's config: `from_pretrained(dtype=...)` does not reach a
    custom class, nor does `revision`: `lora_revision` stands for it.
    """

    def register_to_config(self, **kwargs):
        super().register_to_config(**kwargs)
        if "_name_or_path" in kwargs and self.config.get("base_model"):
            source = {"weight_name": LORA_WEIGHT_NAME, "revision": self.config["lora_revision"]}
            self.load_lora_weights(kwargs["_name_or_path"], **source, adapter_name="dopsd")


class DOPSDZImageRepository(_FromRepository, DOPSDZImagePipeline):
    """Z-Image-Turbo plus the LoRA of the repository that this class is loaded from. See `_FromRepository`."""

    _optional_components = ["scheduler", "vae", "text_encoder", "tokenizer", "transformer"]

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler = None,
        vae: AutoencoderKL = None,
        text_encoder: PreTrainedModel = None,
        tokenizer: AutoTokenizer = None,
        transformer: ZImageTransformer2DModel = None,
        num_inference_steps: int = 8,
        base_model: str = None,
        base_revision: str = None,
        base_variant: str = None,
        lora_revision: str = None,
        base_dtype: str = "bfloat16",
    ):
        weights = {"revision": base_revision, "variant": base_variant, "dtype": getattr(torch, base_dtype)}
        base = DiffusionPipeline.from_pretrained(base_model, **weights)
        DOPSDZImagePipeline.__init__(self, **base.components, num_inference_steps=num_inference_steps)
        names = {"base_model": base_model, "base_revision": base_revision, "base_variant": base_variant}
        self.register_to_config(**names, base_dtype=base_dtype, lora_revision=lora_revision)


class DOPSDFlux2KleinRepository(_FromRepository, DOPSDFlux2KleinPipeline):
    """FLUX.2-klein plus the LoRA of the repository that this class is loaded from. See `_FromRepository`."""

    _optional_components = ["scheduler", "vae", "text_encoder", "tokenizer", "transformer"]

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler = None,
        vae: AutoencoderKLFlux2 = None,
        text_encoder: PreTrainedModel = None,
        tokenizer: AutoTokenizer = None,
        transformer: Flux2Transformer2DModel = None,
        is_distilled: bool = True,
        num_inference_steps: int = 4,
        text_encoder_out_layers: list = DOPSDFlux2KleinPipeline.stock_layers,
        max_sequence_length: int = DOPSDFlux2KleinPipeline.stock_length,
        base_model: str = None,
        base_revision: str = None,
        base_variant: str = None,
        lora_revision: str = None,
        base_dtype: str = "bfloat16",
    ):
        weights = {"revision": base_revision, "variant": base_variant, "dtype": getattr(torch, base_dtype)}
        base = DOPSDFlux2KleinPipeline.from_pretrained(base_model, **weights)
        config = {"is_distilled": base.config.is_distilled, "num_inference_steps": num_inference_steps}
        config |= base.encoding
        DOPSDFlux2KleinPipeline.__init__(self, **base.components, **config)
        names = {"base_model": base_model, "base_revision": base_revision, "base_variant": base_variant}
        self.register_to_config(**names, base_dtype=base_dtype, lora_revision=lora_revision)


class DOPSDKrea2Repository(_FromRepository, DOPSDKrea2Pipeline):
    """Krea-2-Turbo plus the LoRA of the repository that this class is loaded from. See `_FromRepository`."""

    _optional_components = ["scheduler", "vae", "text_encoder", "tokenizer", "transformer"]

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler = None,
        vae: AutoencoderKLQwenImage = None,
        text_encoder: Qwen3VLModel = None,
        tokenizer: AutoTokenizer = None,
        transformer: Krea2Transformer2DModel = None,
        text_encoder_select_layers: list | None = None,
        is_distilled: bool = True,
        patch_size: int = 2,
        num_inference_steps: int = 8,
        base_model: str = None,
        base_revision: str = None,
        base_variant: str = None,
        lora_revision: str = None,
        base_dtype: str = "bfloat16",
    ):
        weights = {"revision": base_revision, "variant": base_variant, "dtype": getattr(torch, base_dtype)}
        base = DOPSDKrea2Pipeline.from_pretrained(base_model, **weights)
        config = {name: base.config[name] for name in ("text_encoder_select_layers", "is_distilled", "patch_size")}
        DOPSDKrea2Pipeline.__init__(self, **base.components, **config, num_inference_steps=num_inference_steps)
        names = {"base_model": base_model, "base_revision": base_revision, "base_variant": base_variant}
        self.register_to_config(**names, base_dtype=base_dtype, lora_revision=lora_revision)


# Base pipeline class, as a model_index.json names it -> family
FAMILIES = {
    "ZImagePipeline": DOPSDZImagePipeline,
    "Flux2KleinPipeline": DOPSDFlux2KleinPipeline,
    "Krea2Pipeline": DOPSDKrea2Pipeline,
}


def family_of(model_name_or_path: str, revision: str | None = None) -> type[DOPSDMixin]:
    """The pipeline class for a base model, by the class name in its model_index.json; reads no weights.

    Raises:
        ValueError: the base is of no known family, or its model_index.json says that it is not step-distilled.
    """
    config = DiffusionPipeline.load_config(model_name_or_path, revision=revision)
    name = config.get("_class_name")
    if config.get("base_model"):
        raise ValueError(f"{model_name_or_path} is a LoRA; give its base, {config['base_model']}.")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(f"{model_name_or_path} is of class {name}; known are: {', '.join(FAMILIES)}.")
    family = FAMILIES[name]
    # a file that does not say it is understood as the stock pipeline does
    if not config.get("is_distilled", family.distilled_unless_said):
        raise ValueError(
            f"{model_name_or_path} is not step-distilled (is_distilled in its model_index.json), so it has no few steps to keep. "
            f"Give the distilled model: {family.distilled_bases}."
        )
    return family


def repository_config(
    pipeline: DOPSDMixin,
    num_inference_steps: int,
    base_model: str,
    base_revision: str | None,
    base_variant: str | None,
    base_dtype: str,
) -> dict:
    """model_index.json of a LoRA repository, for way (b)."""
    repository_class = type(pipeline).__name__.replace("Pipeline", "Repository")
    return {
        "_class_name": ["pipeline_dopsd", repository_class],
        "base_model": base_model,
        "base_revision": base_revision,
        "base_variant": base_variant,
        "base_dtype": base_dtype,
        "num_inference_steps": num_inference_steps,
    }
