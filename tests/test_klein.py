"""FLUX.2-klein: contexts, rollout, both teachers, references and whole runs on a tiny model of the real classes."""

import functools
import json
import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLFlux2,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from huggingface_hub import ModelCard
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

import train_dopsd_full as full_script
import train_dopsd_lora as script
from conftest import CHAT_TEMPLATE, HIDDEN, LORA, ROOT, Trainer, draw, patch_velocity, save_vlm, text_config
from pipeline_dopsd import DOPSDFlux2KleinPipeline, family_of, input_dtype


sys.path.insert(0, str(ROOT / "examples"))

import train_sft  # noqa: E402


THINKING = (
    "{%- if enable_thinking is defined and enable_thinking is false -%}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif -%}"
    "{%- endif -%}"
)
LAYERS = 28  # the features are those of layers 9, 18 and 27
PROMPTS = ["a red square", "a blue disc on white"]


@pytest.fixture(scope="module")
def klein_tokenizer(tokenizer, tmp_path_factory):
    """Qwen3's way of turning thinking off: an empty thought after the generation prompt."""
    folder = tmp_path_factory.mktemp("klein_tokenizer")
    tokenizer.save_pretrained(folder)
    tokenizer = Qwen2Tokenizer.from_pretrained(folder)
    assert CHAT_TEMPLATE.endswith("{%- endif -%}")
    tokenizer.chat_template = CHAT_TEMPLATE.removesuffix("{%- endif -%}") + THINKING
    return tokenizer


@pytest.fixture(scope="module")
def klein(klein_tokenizer, tmp_path_factory):
    """A FLUX.2-klein with one double-stream and two single-stream blocks; images in multiples of 8 pixels."""
    folder = tmp_path_factory.mktemp("klein")
    torch.manual_seed(0)
    vae = AutoencoderKLFlux2(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3, latent_channels=4,
        block_out_channels=[8, 16, 16], norm_num_groups=4, layers_per_block=1,
    )  # fmt: skip
    torch.nn.init.normal_(vae.bn.running_mean)
    torch.nn.init.uniform_(vae.bn.running_var, 0.5, 2.0)
    rope = {"rope_type": "default", "rope_theta": 1e4}
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=3 * HIDDEN, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    torch.nn.init.normal_(transformer.proj_out.weight)
    Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=vae,
        text_encoder=Qwen3ForCausalLM(Qwen3Config(**text_config(klein_tokenizer, layers=LAYERS), rope_parameters=rope)),
        tokenizer=klein_tokenizer,
        transformer=transformer,
        is_distilled=True,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def klein_vlm(klein_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("klein_vlm")
    save_vlm(folder, klein_tokenizer, layers=LAYERS)
    return folder


@pytest.fixture
def pipeline(klein):
    pipeline = DOPSDFlux2KleinPipeline.from_pretrained(klein)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def stock(pipeline):
    stock = Flux2KleinPipeline(**pipeline.components, is_distilled=True)
    stock.set_progress_bar_config(disable=True)
    return stock


@pytest.fixture(scope="module")
def train_klein(klein, klein_vlm, flags, tmp_path_factory):
    """Runs of the LoRA script on two images."""
    folder = tmp_path_factory.mktemp("two_images")
    for name, (shape, fill) in {"a red square": ("rectangle", "red"), "a blue disc": ("ellipse", "blue")}.items():
        draw(shape, fill, (64, 64)).save(folder / f"{fill}.png")
        (folder / f"{fill}.txt").write_text(name)
    defaults = {
        "pretrained_model_name_or_path": klein, "vlm_model_name_or_path": klein_vlm, "instance_data_dir": folder,
        "resolution": 64,
    }  # fmt: skip

    def command(output_dir, *switches, **changes):
        return flags(output_dir, *switches, **{**defaults, **changes})

    return Trainer(script, command, LORA, "student")


RED, BLUE, WIDE = draw("rectangle", "red", (64, 64)), draw("ellipse", "blue", (64, 64)), draw("ellipse", "green", (100, 67))


def test_family_is_known_by_the_base(klein, tmp_path):
    """The scripts never ask which model it is; of an unknown one the user learns which ones there are."""
    assert family_of(str(klein)) is DOPSDFlux2KleinPipeline
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(ValueError, match="ZImagePipeline.*Flux2KleinPipeline"):
        family_of(str(tmp_path))


def test_undistilled_base_is_refused_before_weights_load(train_klein, klein, tmp_path, monkeypatch):
    """It would learn from four-step pictures that are blurred to begin with, and its card would promise four steps."""
    monkeypatch.setattr("diffusers.ModelMixin.from_pretrained", lambda *a, **k: pytest.fail("weights were loaded"))
    shutil.copytree(klein, tmp_path / "undistilled")
    index = json.loads((klein / "model_index.json").read_text()) | {"is_distilled": False}
    (tmp_path / "undistilled" / "model_index.json").write_text(json.dumps(index))
    for run in (train_klein, Trainer(full_script, functools.partial(train_klein.flags, rank=None), None, None)):
        with pytest.raises(ValueError, match="undistilled is not step-distilled.*Give .*FLUX.2-klein-4B"):
            run(tmp_path / "out", pretrained_model_name_or_path=tmp_path / "undistilled")


def test_student_contexts_are_the_stock_pipelines(pipeline, stock):
    """512 tokens with the padding kept, thinking off: a LoRA trained on other features would not work in use."""
    expected, _ = stock.encode_prompt(PROMPTS)
    contexts = pipeline.encode_student(PROMPTS)
    assert expected.shape == (2, 512, 3 * HIDDEN)
    for ours, theirs in zip(contexts, expected, strict=True):
        assert list(ours) == ["prompt_embeds"] and torch.equal(ours["prompt_embeds"], theirs)


def test_vlm_context_is_laid_out_as_the_text_that_the_model_knows(pipeline, klein_vlm):
    """Tokens at positions, or an ending of the chat, that the transformer has never seen would mean little to it."""
    pipeline.load_multimodal_encoder(str(klein_vlm))
    encoder, ending = pipeline.multimodal_encoder, pipeline.chat_ending(pipeline.tokenizer)
    assert ending == "<think>\n\n</think>\n\n"
    vision = "<|vision_start|><|vision_end|>"
    stock = pipeline.tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPTS[0]}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert encoder.chat(PROMPTS[0], 0, ending).replace(vision, "") == stock
    (context,) = pipeline.encode_teacher(PROMPTS[:1], [RED])
    assert context["prompt_embeds"].shape == (512, 3 * HIDDEN)
    (states,) = encoder.hidden_states(PROMPTS[:1], [RED], ending)  # without padding
    length = encoder.context_length(PROMPTS[0], 64, 64, ending)
    expected = torch.cat([states[k] for k in (9, 18, 27)], dim=-1)
    assert len(expected) == length
    torch.testing.assert_close(context["prompt_embeds"][:length], expected, rtol=1e-3, atol=1e-4)


def test_checkpoint_may_have_contexts_of_its_own_length(pipeline, klein_vlm):
    """A model trained on shorter contexts would see positions and padding that it does not know."""
    pipeline.register_to_config(max_sequence_length=96)
    pipeline.load_multimodal_encoder(str(klein_vlm))
    student, teacher = pipeline.encode_student(PROMPTS[:1])[0], pipeline.encode_teacher(PROMPTS[:1], [RED])[0]
    assert student["prompt_embeds"].shape == teacher["prompt_embeds"].shape == (96, 3 * HIDDEN)
    assert pipeline.max_context_length({}, dict(pipeline.config)) == 96 and pipeline.max_context_length({}, {}) == 512


def test_padding_of_the_vlm_context_is_that_of_the_text_encoder(pipeline, klein_vlm):
    """The transformer attends to the padding, so the teacher's must be made as the student's is."""
    pipeline.load_multimodal_encoder(str(klein_vlm))
    encoder = pipeline.multimodal_encoder
    text = pipeline.tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPTS[0]}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    inputs = encoder.tokenizer(text, return_tensors="pt", padding="max_length", max_length=512, padding_side="right")
    with torch.no_grad():
        states = encoder.model(**inputs, output_hidden_states=True).hidden_states
    ours = torch.cat([states[k][0] for k in (9, 18, 27)], dim=-1)
    torch.testing.assert_close(ours, pipeline.encode_student(PROMPTS[:1])[0]["prompt_embeds"], rtol=1e-3, atol=1e-4)


def test_edit_context_is_the_students_with_the_image_as_last_reference(pipeline, stock):
    """The edit branch sees what the stock pipeline makes of an image; other latents would be another picture to it."""
    (teacher,) = pipeline.encode_teacher(PROMPTS[:1], [RED], "edit", [[WIDE]])
    (student,) = pipeline.encode_student(PROMPTS[:1], [[WIDE]])
    assert sorted(student) == ["prompt_embeds", "reference_0"] and sorted(teacher) == [*sorted(student), "reference_1"]
    assert all(torch.equal(teacher[name], student[name]) for name in student)
    pixels = stock.image_processor.preprocess(RED, height=64, width=64, resize_mode="crop")
    with torch.no_grad():
        expected, _ = stock.prepare_image_latents([pixels], 1, None, "cpu", torch.float32)
    assert torch.equal(pipeline._pack_latents(teacher["reference_1"][None]), expected)


@pytest.mark.parametrize("size", [(32, 32), (24, 48)])
@pytest.mark.parametrize("references", [[], [RED], [WIDE, RED]], ids=["text", "one", "two"])
def test_rollout_is_the_stock_pipelines_trajectory(pipeline, stock, size, references):
    """Trained on other states than inference visits, the LoRA would not be on-policy."""
    (height, width), expected, steps = size, [], 4
    noise = pipeline.initial_noise(height, width, torch.Generator().manual_seed(0))
    stock(
        references or None, PROMPTS[0], height=height, width=width, num_inference_steps=steps, guidance_scale=1.0,
        latents=noise.clone(), output_type="latent",
        callback_on_step_end=lambda pipe, step, time, values: expected.append(values["latents"].clone()) or {},
    )  # fmt: skip
    contexts, latents, states = pipeline.encode_student(PROMPTS[:1], [references]), noise, []
    with torch.no_grad():
        for timestep in pipeline.few_step_grid(steps, latents):
            velocity = pipeline.velocity(pipeline.transformer, latents, timestep, contexts)
            latents = pipeline.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
            states.append(pipeline._pack_latents(latents))
    assert len(states) == len(expected) == steps and noise.shape == (1, 16, height // 8, width // 8)
    for ours, theirs in zip(states, expected):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    with torch.no_grad():
        ours = pipeline.sample(pipeline.transformer, contexts, noise, steps)
    images = stock(
        references or None, PROMPTS[0], height=height, width=width, num_inference_steps=steps, latents=noise, guidance_scale=1.0
    ).images  # fmt: skip
    assert np.abs(np.asarray(ours[0]).astype(int) - np.asarray(images[0])).max() <= 1


def test_times_are_rounded_as_in_inference(klein):
    """In bf16 another order of operations gives the last state a time that inference never asks for."""
    pipeline = DOPSDFlux2KleinPipeline.from_pretrained(klein, dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    times = []
    pipeline.transformer.time_guidance_embed.register_forward_pre_hook(lambda _, inputs: times.append(inputs[0].item()))
    pipeline(prompt=PROMPTS[0], height=1024, width=1024, num_inference_steps=4, output_type="latent")
    latents, contexts = torch.zeros(1, 16, 128, 128), pipeline.encode_student(PROMPTS[:1])
    with torch.no_grad():
        for timestep in pipeline.few_step_grid(4, latents):
            for time in (timestep, timestep[None]):  # of all images, and one for each
                pipeline.velocity(pipeline.transformer, latents, time, contexts)
    assert len(set(times)) == 4 and times[:4] == times[4::2] == times[5::2]


def test_cuda_autocast_does_not_widen_what_attention_gets(train_klein, tmp_path, monkeypatch):
    """There, norms answer in fp32: flash attention refuses that, and quantised layers would go on in it."""
    dtypes, attend = set(), torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, value, **kwargs):
        if query.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            dtypes.update((query.dtype, key.dtype, value.dtype))
        return attend(query, key, value, **kwargs)

    def wide(x, *args, norm, **kwargs):
        answer = norm(x, *args, **kwargs)
        return answer.float() if torch.is_autocast_enabled("cpu") and x.device.type == "cpu" else answer

    for name in ("rms_norm", "layer_norm"):
        norm = getattr(torch.nn.functional, name)
        monkeypatch.setattr(torch.nn.functional, name, functools.partial(wide, norm=norm))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    train_klein(tmp_path, mixed_precision="bf16", max_train_steps=1)
    assert dtypes == {torch.bfloat16}


def test_inputs_have_the_dtype_of_the_weights_not_of_the_lora(pipeline):
    """On a base of 4 bits the LoRA's fp32 would be the first floating dtype, and activations twice as large."""
    transformer = pipeline.transformer.bfloat16().requires_grad_(False)
    transformer.add_adapter(LoraConfig(target_modules=["x_embedder", "context_embedder", "to_q"]))
    script.cast_training_params(transformer, torch.float32)
    for module in transformer.modules():
        if isinstance(module, torch.nn.Linear) and module.weight.dtype == torch.bfloat16:
            module.weight = torch.nn.Parameter(module.weight.view(torch.uint8), requires_grad=False)
    assert next(p.dtype for p in transformer.parameters() if p.is_floating_point()) == torch.float32
    assert input_dtype(transformer) == torch.bfloat16


def test_grid_depends_on_the_resolution(pipeline):
    """The fixed grid of a scheduler without mu is not what inference runs (shift of the size of the image)."""
    small, large = (pipeline.few_step_grid(4, torch.zeros(1, 16, side // 16, side // 16)) / 1000 for side in (512, 1024))
    torch.testing.assert_close(large, torch.tensor([1.0, 0.967, 0.908, 0.767]), rtol=0, atol=1e-3)
    torch.testing.assert_close(small, torch.tensor([1.0, 0.958, 0.884, 0.718]), rtol=0, atol=1e-3)


def test_batch_of_two_equals_two_of_one(pipeline):
    """Prompts, references and the time of one image must not reach the other."""
    contexts = pipeline.encode_student(PROMPTS, [[RED], [BLUE]])
    latents, times = torch.randn(2, 16, 4, 4), torch.tensor([700.0, 300.0])
    with torch.no_grad():
        both = pipeline.velocity(pipeline.transformer, latents, times, contexts)
        each = [pipeline.velocity(pipeline.transformer, latents[i : i + 1], times[i], [contexts[i]]) for i in (0, 1)]
        swapped = pipeline.velocity(pipeline.transformer, latents, times, contexts[::-1])
    torch.testing.assert_close(both, torch.cat(each), rtol=1e-4, atol=1e-5)
    assert (both - swapped).abs().max() > 1e-3


def test_lora_covers_both_kinds_of_blocks(pipeline):
    """The public code trained the attention of the double-stream blocks alone, because other names matched nothing."""
    targets = pipeline.lora_targets(pipeline.transformer)
    double = [t for t in targets if t.startswith("transformer_blocks.0.")]
    single = [t for t in targets if t.startswith("single_transformer_blocks.")]
    assert len(double) == 12 and len(single) == 2 * 2 and len(targets) == 16


def test_latents_of_an_image_are_what_the_vae_decodes(pipeline):
    """Reference latents and the baseline's targets would be of another scale than what a rollout ends at."""
    pixels = pipeline.image_processor.preprocess(RED)
    with torch.no_grad():
        latents = pipeline.image_latents(pixels)
        restored = pipeline.to_vae_latents(latents)
        expected = pipeline.vae.encode(pixels).latent_dist.mode()
    assert latents.shape == pipeline.initial_noise(64, 64, torch.Generator()).shape
    torch.testing.assert_close(restored, expected, rtol=1e-4, atol=1e-4)


def test_baseline_trains_klein(train_klein, tmp_path):
    """Without SFT beside it, nobody sees what D-OPSD keeps."""
    dropped = ("vlm_model_name_or_path", "context_cache_dir", "ema_decay", "validation_steps", "report_to")
    flags = train_klein.flags(tmp_path / "out", max_train_steps=2, learning_rate=0.1, **dict.fromkeys(dropped))
    train_sft.main(train_sft.parse_args([*flags, "--class_prompt", "a disc", "--num_class_images", "1"]))
    weights = load_file(tmp_path / "out" / LORA)
    assert all((w != 0).any() for name, w in weights.items() if "lora_B" in name)


@pytest.fixture(scope="module")
def trained(train_klein, tmp_path_factory):
    return train_klein(
        tmp_path_factory.mktemp("trained"), max_train_steps=6, rollout_steps=4, learning_rate=0.3, ema_decay=1.0,
        validation_steps=100, num_validation_images=1, lora_alpha=8,
    )  # fmt: skip


def test_lora_loads_in_all_ways(trained, klein):
    """With and without the code of the repository, a user sees the pictures of the validation."""
    expected = np.asarray(Image.open(trained / "validation" / "step-000006.png")).astype(int)[:64, :64]
    before = np.asarray(Image.open(trained / "validation" / "step-000000.png")).astype(int)[:64, :64]
    assert np.abs(expected - before).max() > 10
    a = DiffusionPipeline.from_pretrained(klein, custom_pipeline=str(trained), trust_remote_code=True)
    a.load_lora_weights(trained)
    b = DiffusionPipeline.from_pretrained(trained, trust_remote_code=True)
    c = DiffusionPipeline.from_pretrained(klein)
    c.load_lora_weights(trained)
    assert type(c) is Flux2KleinPipeline
    few, size = {"num_inference_steps": 4, "guidance_scale": 1.0}, {"height": 64, "width": 64}
    noise = b.initial_noise(64, 64, torch.Generator().manual_seed(0))
    pictures = [pipe("a blue disc", latents=noise, **size).images[0] for pipe in (a, b, type(a).from_pipe(c))]
    pictures += [pipe(prompt="a blue disc", latents=noise, **size, **few).images[0] for pipe in (c, Flux2KleinPipeline.from_pipe(b))]
    assert all(np.abs(np.asarray(picture).astype(int) - expected).max() <= 1 for picture in pictures)


def test_prompt_comes_first_and_pictures_by_name(pipeline, stock):
    """The stock call begins with the picture: `pipe("a photo ..")`, as all other models are called, would raise."""
    size = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "np"}
    for given in ({}, {"image": RED}):
        seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
        ours = pipeline(PROMPTS[0], **given, **size, generator=seeds[0]).images
        theirs = stock(prompt=PROMPTS[0], **given, **size, guidance_scale=1.0, generator=seeds[1]).images
        assert (ours == theirs).all()


def test_fused_pipeline_is_saved_as_a_plain_one(trained, tmp_path):
    """As of Z-Image; a klein that forgot that it is distilled would be run with guidance."""
    pipe = DiffusionPipeline.from_pretrained(trained, trust_remote_code=True)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path)
    saved = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(saved) is Flux2KleinPipeline and saved.config.is_distilled
    size = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "np"}
    pictures = [p(prompt=PROMPTS[0], **size, guidance_scale=1.0, generator=torch.Generator().manual_seed(0)).images for p in (pipe, saved)]
    assert (pictures[0] == pictures[1]).all()


@pytest.fixture
def with_references(tmp_path):
    """Four images, each with a reference of one of two sizes."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = []
    for i, fill in enumerate(["red", "blue", "green", "yellow"]):
        draw("rectangle", fill, (32, 32)).save(folder / f"target_{i}.png")
        draw("ellipse", fill, (64, 64) if i < 2 else (96, 64)).save(folder / f"reference_{i}.png")
        rows.append({"file_name": f"target_{i}.png", "reference_file_name": f"reference_{i}.png", "text": f"a {fill} square"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.mark.parametrize("teacher_context", ["vlm", "edit"])
@pytest.mark.parametrize("teacher_image", ["target", "other"])
def test_every_teacher_trains(train_klein, tmp_path, monkeypatch, teacher_context, teacher_image):
    """Each of the four teachers runs, sees the image it is said to see, and teaches something."""
    shown, encode = {}, DOPSDFlux2KleinPipeline.encode_teacher

    def recorded(self, prompts, images, context, *rest):
        assert context == teacher_context
        shown.update((prompt, image.getpixel((20, 20))) for prompt, image in zip(prompts, images))
        return encode(self, prompts, images, context, *rest)

    monkeypatch.setattr(DOPSDFlux2KleinPipeline, "encode_teacher", recorded)
    logs = []
    monkeypatch.setattr("accelerate.Accelerator.log", lambda self, values, step: logs.append(values))
    changes = {"teacher_context": teacher_context, "teacher_image": teacher_image, "context_cache_dir": tmp_path / "cache"}
    if teacher_context == "edit":
        changes["teacher_prompt_suffix"] = ", as pictured"
    train_klein(tmp_path / "out", **changes)
    suffix = changes.get("teacher_prompt_suffix", "")
    red, blue = (255, 0, 0), (0, 0, 255)
    assert shown["a red square" + suffix] == (red if teacher_image == "target" else blue)
    assert all(values["loss"] > 1e-6 for values in logs) and (tmp_path / "out" / LORA).is_file()


def test_editing_gives_references_to_student_and_target_to_teacher(train_klein, with_references, tmp_path, monkeypatch):
    """A student without its references, or batches of several layouts, would train another task or fail; and so would a user whom
    the card tells to give no picture."""
    seen, velocity = [], DOPSDFlux2KleinPipeline.velocity

    def recorded(self, transformer, latents, timestep, contexts):
        seen.append([{n: tuple(t.shape[1:]) for n, t in c.items() if n != "prompt_embeds"} for c in contexts])
        return velocity(self, transformer, latents, timestep, contexts)

    patch_velocity(monkeypatch, DOPSDFlux2KleinPipeline, recorded)
    train_klein(
        tmp_path / "out", instance_data_dir=with_references, reference_column="reference", teacher_context="edit",
        train_batch_size=2, max_train_steps=2, rollout_steps=1, context_cache_dir=tmp_path / "cache",
    )  # fmt: skip
    assert len(seen) == 2 * 2
    for teacher, student in zip(seen[0::2], seen[1::2]):
        assert teacher[0] == teacher[1] and student[0] == student[1]
        assert teacher[0] == {**student[0], "reference_1": (8, 8)}
    assert {c[0]["reference_0"] for c in seen} == {(8, 8), (8, 12)}

    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.pipeline_tag == "image-to-image" and "image-to-image" in card.data.tags and "text-to-image" not in card.data.tags
    assert "from text alone" not in card.text
    (code,) = re.findall(r"```py\n(.*?)```", card.text, re.DOTALL)
    WIDE.save(tmp_path / "reference.png")
    monkeypatch.chdir(tmp_path)
    seen.clear()
    given = []
    monkeypatch.setattr(Flux2KleinPipeline, "__call__", lambda self, image=None, **_: given.append(image) or SimpleNamespace(images=[1]))
    exec(code, {})
    assert given[0].size == WIDE.size


def test_batches_share_the_size_of_what_the_teacher_sees(train_klein, tmp_path):
    """Two square images whose teachers see images of two shapes cannot be one batch."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, size in {"a": (128, 128), "b": (128, 128), "c": (192, 96)}.items():
        draw("ellipse", "blue", size).save(folder / f"{name}.png")
    changes = {"teacher_context": "edit", "teacher_image": "other", "train_batch_size": 2, "rollout_steps": 1, "resolution": 128}
    train_klein(
        tmp_path / "out", instance_data_dir=folder, instance_prompt="a disc", max_train_steps=3,
        context_cache_dir=tmp_path / "cache", **changes,
    )  # fmt: skip
    assert (tmp_path / "out" / LORA).is_file()


def test_cache_is_renewed_when_the_teacher_changes(train_klein, tmp_path):
    """Contexts of another teacher would be taken for those of this one."""
    cache = tmp_path / "cache"
    counts = []
    for changes in ({}, {"teacher_image": "other"}, {"teacher_context": "edit"}, {"teacher_prompt_suffix": "!"}, {}):
        train_klein(tmp_path / "out", "--overwrite_output_dir", context_cache_dir=cache, max_train_steps=1, rollout_steps=1, **changes)
        counts.append(len(list(cache.glob("*.safetensors"))))
    assert counts == [4, 6, 10, 12, 12]  # the student's two are the same for all; with `edit`, the VAE is in their key


@pytest.mark.parametrize("changes", [{"teacher_context": "edit"}, {"teacher_image": "other"}])
def test_resume_with_another_teacher_is_an_error(train_klein, trained, changes):
    """Half a training by one teacher and half by another is neither."""
    (flag,) = changes
    with pytest.raises(ValueError, match=f"--{flag}"):
        train_klein(
            trained, resume_from_checkpoint="latest", max_train_steps=9, rollout_steps=4, ema_decay=1.0, lora_alpha=8, learning_rate=0.3, **changes
        )  # fmt: skip


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("z", {"teacher_context": "edit"}, "--teacher_context edit"),
        ("z", {"reference_column": "reference"}, "--reference_column"),
        ("klein", {"reference_column": "nowhere"}, "'nowhere'"),
        ("klein", {"teacher_image": "other"}, "--teacher_image other"),
        ("klein", {"teacher_max_pixels": 512 * 512}, "--teacher_max_pixels"),
    ],
)
def test_input_that_no_teacher_can_use(train, train_klein, with_references, tmp_path, monkeypatch, family, changes, words):
    """One error names the flag, before any weights load."""
    monkeypatch.setattr("diffusers.ModelMixin.from_pretrained", lambda *a, **k: pytest.fail("weights were loaded"))
    if "teacher_image" in changes:
        single = tmp_path / "single"
        single.mkdir()
        shutil.copy(with_references / "target_0.png", single / "a.png")
        changes = {**changes, "instance_data_dir": single, "instance_prompt": "a"}
    elif "teacher_max_pixels" in changes:
        (with_references / "metadata.jsonl").unlink()
        draw("ellipse", "blue", (512, 512)).save(with_references / "large.png")
        changes = {**changes, "instance_data_dir": with_references, "instance_prompt": "a" * 600, "resolution": 512}
    else:
        changes = {**changes, "instance_data_dir": with_references}
    with pytest.raises(ValueError, match=words):
        (train if family == "z" else train_klein)(tmp_path / "out", **changes)


def test_full_fine_tuning_leaves_a_pipeline(klein, train_klein, tmp_path):
    """The result of the full script is the base's layout, for plain diffusers and for this project's class."""
    run = Trainer(full_script, train_klein.flags, None, None)
    run(tmp_path / "out", rank=None, learning_rate=1e-3, max_train_steps=2, teacher_context="edit")
    tuned = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(tuned) is Flux2KleinPipeline and tuned.config.is_distilled
    ours = DOPSDFlux2KleinPipeline.from_pretrained(tmp_path / "out")
    base = Flux2KleinPipeline.from_pretrained(klein)
    changed = [not torch.equal(a, b) for a, b in zip(tuned.transformer.parameters(), base.transformer.parameters())]
    assert any(changed)
    assert all(torch.equal(a, b) for a, b in zip(tuned.transformer.parameters(), ours.transformer.parameters()))
