# Copyright 2026 The D-OPSD training scripts authors. Licensed under the Apache License, Version 2.0.
"""D-OPSD pipelines: everything that training and inference must know about a model family, in one place.

D-OPSD (https://arxiv.org/abs/2605.05204) fine-tunes step-distilled text-to-image models on their own few-step rollouts. A
pipeline of this file is the stock diffusers pipeline plus

- the teacher's multimodal context: a VLM whose language model is the pipeline's own text encoder,
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
# (c) no custom code: pass the number of steps and guidance_scale=0.0 yourself
pipe = DiffusionPipeline.from_pretrained(base)
pipe.load_lora_weights(repo)
```
"""

from __future__ import annotations

import contextlib
import os

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.z_image.pipeline_z_image import (
    calculate_shift,
    get_default_z_image_sigmas,
    retrieve_timesteps,
)
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    PreTrainedModel,
    Qwen3VLModel,
)


LORA_WEIGHT_NAME = "pytorch_lora_weights.safetensors"


class MultimodalEncoder:
    """A Qwen3-VL that reads images with the language model of a text-to-image pipeline.

    `transplant` gives its language model the text encoder's own tensors (nothing is held twice) and rotary settings.
    Without an image, its hidden states then equal the text encoder's; `verify` proves it on one prompt.

    Args:
        vlm_name_or_path (`str`): the VLM; tokenizer and image processor load at once, weights with `transplant`.
        max_pixels (`int`): larger images are scaled down to this area before they are cut into patches.

    Raises:
        ValueError: the model is no Qwen3-VL.
    """

    def __init__(self, vlm_name_or_path: str, max_pixels: int = 768 * 768):
        self.name = vlm_name_or_path
        self.config = AutoConfig.from_pretrained(vlm_name_or_path)
        if self.config.model_type != "qwen3_vl":
            raise ValueError(f"{self.name} is a {self.config.model_type!r} model; the teacher needs a Qwen3-VL.")
        self.tokenizer = AutoTokenizer.from_pretrained(vlm_name_or_path)
        # backend="pil": the default backend needs torchvision
        self.image_processor = AutoImageProcessor.from_pretrained(vlm_name_or_path, backend="pil")
        shortest = min(self.image_processor.size["shortest_edge"], max_pixels)
        self.size = {"shortest_edge": shortest, "longest_edge": max_pixels}
        self.model = None

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
        self.model = Qwen3VLModel.from_pretrained(self.name, config=self.config, dtype=text_encoder.dtype)
        try:
            self.model.language_model.load_state_dict(text_encoder.state_dict(), strict=True, assign=True)
        except RuntimeError as error:
            raise ValueError(f"The text encoder's weights do not fit the VLM {self.name}: {error}") from error
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

    def chat(self, prompt: str, image_tokens: int) -> str:
        """One user turn, image first and then the prompt, with the generation prompt."""
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        pad = self.tokenizer.convert_ids_to_tokens(self.config.image_token_id)
        return text.replace(pad, pad * image_tokens, 1)

    def context_length(self, prompt: str, height: int, width: int) -> int:
        """Tokens of the context of `prompt` and an image of `height` x `width` pixels; needs no weights."""
        limits = {"min_pixels": self.size["shortest_edge"], "max_pixels": self.size["longest_edge"]}
        patches = self.image_processor.get_number_of_image_patches(height, width, limits)
        return len(self.tokenizer(self.chat(prompt, patches // self.image_processor.merge_size**2)).input_ids)

    @torch.no_grad()
    def hidden_states(self, prompt: str, image) -> tuple[torch.Tensor, ...]:
        """Hidden states of all layers, each (tokens, dim), for the chat with a PIL `image` and `prompt`."""
        inputs = dict(self.image_processor(images=[image], size=self.size, return_tensors="pt"))
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        image_tokens = int(inputs["image_grid_thw"].prod()) // self.image_processor.merge_size**2
        inputs |= self.tokenizer(self.chat(prompt, image_tokens), return_tensors="pt")
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == self.config.image_token_id).long()
        inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
        return tuple(h[0] for h in self.model(**inputs, output_hidden_states=True).hidden_states)


class DOPSDMixin:
    """What all families share. A family adds the methods that `DOPSDZImagePipeline` documents."""

    multimodal_encoder: MultimodalEncoder | None = None

    def load_lora_weights(self, pretrained_model_name_or_path_or_dict, **kwargs):
        """As the stock pipeline's, after a look at the base that a repository's model_index.json names.

        Raises:
            ValueError: the LoRA was trained on another base of the Hub.
        """
        source, base = pretrained_model_name_or_path_or_dict, self.config.get("_name_or_path")
        trained_on, options = None, {n: kwargs[n] for n in ("token", "revision", "local_files_only") if n in kwargs}
        if isinstance(source, (str, os.PathLike)) and not self.config.get("base_model"):
            with contextlib.suppress(OSError):  # a file, or a repository without model_index.json
                trained_on = DiffusionPipeline.load_config(source, **options).get("base_model")
        # a folder may be a copy of the base under another name
        if trained_on and base and trained_on != base and not os.path.isdir(trained_on) and not os.path.isdir(base):
            raise ValueError(
                f"{source} was trained on {trained_on}, not on {base}. To try it there all the same, load it with the stock "
                "pipeline, without custom_pipeline."
            )
        super().load_lora_weights(source, **kwargs)

    @classmethod
    def load_lora_into_transformer(cls, state_dict, transformer, **kwargs):
        """As the stock pipeline's. Raises ValueError where a layer of the LoRA does not fit the transformer."""
        modules = dict(transformer.named_modules())
        for name, weight in state_dict.items():
            layer, side, _ = name.removeprefix("transformer.").rpartition(".lora_A.weight")
            if side and getattr(modules.get(layer), "in_features", None) != weight.shape[1]:
                raise ValueError(f"This LoRA was trained on another base: its layer {layer}, {weight.shape[1]} wide, does not fit.")
        super().load_lora_into_transformer(state_dict, transformer=transformer, **kwargs)

    def load_multimodal_encoder(self, vlm_name_or_path: str, max_pixels: int = 768 * 768):
        """Loads the teacher's encoder; needs `text_encoder`. See `MultimodalEncoder` for the errors."""
        self.multimodal_encoder = MultimodalEncoder(vlm_name_or_path, max_pixels)
        self.multimodal_encoder.transplant(self.text_encoder)

    @classmethod
    def lora_targets(cls, transformer: torch.nn.Module, names: list[str] | None = None) -> list[str]:
        """Full names of the linear layers of `transformer` that end in one of `names` (default: the family's).

        Raises:
            ValueError: a name matches no linear layer.
        """
        linears = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
        targets = []
        for wanted in names or cls.lora_layers:
            found = [name for name in linears if name == wanted or name.endswith("." + wanted)]
            if not found:
                known = sorted({".".join(p for p in name.split(".")[-3:] if not p.isdigit() or p == "0") for name in linears})
                raise ValueError(f"--lora_layers: {wanted!r} matches no linear layer. Layers end in: {', '.join(known)}.")
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
    default_vlm = "Qwen/Qwen3-VL-4B-Instruct"
    default_num_inference_steps = 8
    transformer_class = ZImageTransformer2DModel
    vae_class = AutoencoderKL

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
    def size_multiple(vae_config: dict) -> int:
        """Height and width of an image must be multiples of this number of pixels (VAE factor times patch size)."""
        return 2 ** (len(vae_config["block_out_channels"]) - 1) * 2

    @staticmethod
    def max_context_length(transformer_config: dict) -> int:
        """The longest context, in tokens, that the transformer's position table holds (1504 for Z-Image-Turbo).

        A context is padded to a multiple of 32 and the image's position starts one after it.
        """
        return (transformer_config["axes_lens"][0] - 2) // 32 * 32

    @torch.no_grad()
    def encode_student(self, prompts: list[str]) -> list[torch.Tensor]:
        """Student context c_s: the stock text features, one (tokens, dim) per prompt."""
        return self.encode_prompt(list(prompts), do_classifier_free_guidance=False)[0]

    def encode_teacher(self, prompts: list[str], images: list) -> list[torch.Tensor]:
        """Teacher context c_t: last-but-one hidden states of ALL tokens (chat, vision, text), one (tokens, dim) per pair."""
        return [self.multimodal_encoder.hidden_states(p, i)[-2] for p, i in zip(prompts, images, strict=True)]

    def initial_noise(self, height: int, width: int, generator: torch.Generator) -> torch.Tensor:
        """x_{t_1} of one image, (1, C, h, w) in fp32; drawn on the CPU so that it does not depend on the device."""
        return self.prepare_latents(
            1, self.transformer.config.in_channels, height, width, torch.float32, torch.device("cpu"), generator
        )

    def few_step_grid(self, num_steps: int, height: int, width: int, device) -> torch.Tensor:
        """Sets the scheduler to the inference grid of `num_steps` and returns its timesteps (num_steps,), 1000 = noise."""
        config = self.scheduler.config
        mu = calculate_shift(
            (height // (self.vae_scale_factor * 2)) * (width // (self.vae_scale_factor * 2)),
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        sigmas = get_default_z_image_sigmas(num_steps)
        timesteps, _ = retrieve_timesteps(self.scheduler, num_steps, device, sigmas=sigmas, mu=mu)
        self.scheduler.set_begin_index(0)
        return timesteps

    def velocity(self, transformer, latents: torch.Tensor, timestep: torch.Tensor, contexts: list[torch.Tensor]):
        """v_theta(x_t, t, c) = noise - data, shape of `latents` (B, C, h, w), fp32.

        The transformer's time runs from 0 (noise) to 1 (data) and its output is data - noise.

        Args:
            transformer: the (possibly wrapped) transformer to run.
            timestep: scalar tensor between 0 (data) and 1000 (noise).
            contexts: one (tokens, dim) per image.
        """
        dtype = getattr(transformer, "module", transformer).dtype  # DDP holds the transformer as its `module`
        images = list(latents.to(dtype).unsqueeze(2).unbind(0))
        time = (1000 - timestep.expand(len(images))) / 1000
        contexts = [c.to(latents.device, dtype) for c in contexts]
        out = transformer(images, time, contexts, return_dict=False)[0]
        return -torch.stack([o.float() for o in out]).squeeze(2)


class _FromRepository:
    """Way (b): the pipeline of a LoRA repository, which loads the base by its name and then the LoRA beside it.

    `DiffusionPipeline.from_pretrained` hands the folder or repository id to `register_to_config` once the pipeline stands.
    The dtype of the base comes from the repository's config: `from_pretrained(dtype=...)` does not reach a custom class.
    """

    def register_to_config(self, **kwargs):
        super().register_to_config(**kwargs)
        if "_name_or_path" in kwargs and self.config.get("base_model"):
            self.load_lora_weights(kwargs["_name_or_path"], weight_name=LORA_WEIGHT_NAME)


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
        base_dtype: str = "bfloat16",
    ):
        base = DiffusionPipeline.from_pretrained(base_model, dtype=getattr(torch, base_dtype))
        DOPSDZImagePipeline.__init__(self, **base.components, num_inference_steps=num_inference_steps)
        self.register_to_config(base_model=base_model, base_dtype=base_dtype)


# Base pipeline class, as a model_index.json names it -> family
FAMILIES = {"ZImagePipeline": DOPSDZImagePipeline}


def family_of(model_name_or_path: str, revision: str | None = None) -> type[DOPSDMixin]:
    """The pipeline class for a base model, by the class name in its model_index.json; reads no weights.

    Raises:
        ValueError: the base is of no known family.
    """
    name = DiffusionPipeline.load_config(model_name_or_path, revision=revision).get("_class_name")
    if name not in FAMILIES:
        raise ValueError(f"{model_name_or_path} is a {name}; known families are: {', '.join(FAMILIES)}.")
    return FAMILIES[name]


def repository_config(pipeline: DOPSDMixin, base_model: str, num_inference_steps: int, base_dtype: str) -> dict:
    """model_index.json of a LoRA repository, for way (b)."""
    repository_class = type(pipeline).__name__.replace("Pipeline", "Repository")
    return {
        "_class_name": ["pipeline_dopsd", repository_class],
        "base_model": base_model,
        "base_dtype": base_dtype,
        "num_inference_steps": num_inference_steps,
    }
