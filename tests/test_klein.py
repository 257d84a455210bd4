"""FLUX.2-klein: contexts, rollout, both teachers, references and whole runs on a tiny model of the real classes."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from huggingface_hub import ModelCard

import train_dopsd_lora as script
from conftest import LORA, Trainer, draw, patch_velocity
from families import HIDDEN
from pipeline_dopsd import DOPSDFlux2KleinPipeline


pytestmark = pytest.mark.families("klein")
PROMPTS = ["a red square", "a blue disc"]


@pytest.fixture(scope="module")
def train(flags, tmp_path_factory):
    """Runs of the LoRA script on two images."""
    folder = tmp_path_factory.mktemp("two_images")
    for name, (shape, fill) in {"a red square": ("rectangle", "red"), "a blue disc": ("ellipse", "blue")}.items():
        draw(shape, fill, (64, 64)).save(folder / f"{fill}.png")
        (folder / f"{fill}.txt").write_text(name)

    def command(output_dir, *switches, **changes):
        return flags(output_dir, *switches, **{"instance_data_dir": folder, "resolution": 64, **changes})

    return Trainer(script, command, LORA, "student")


RED = draw("rectangle", "red", (64, 64))
BLUE = draw("ellipse", "blue", (64, 64))
WIDE = draw("ellipse", "green", (100, 67))


def test_student_contexts_are_the_stock_pipelines(pipeline, stock):
    """512 tokens with the padding kept, thinking off: a LoRA trained on other features would not work in use."""
    expected, _ = stock.encode_prompt(PROMPTS)
    contexts = pipeline.encode_student(PROMPTS)
    assert expected.shape == (2, 512, 3 * HIDDEN)
    for ours, theirs in zip(contexts, expected, strict=True):
        assert list(ours) == ["prompt_embeds"] and torch.equal(ours["prompt_embeds"], theirs)


def test_vlm_context_is_laid_out_as_the_text_that_the_model_knows(pipeline, vlm):
    """Tokens at positions, or an ending of the chat, that the transformer has never seen would mean little to it."""
    pipeline.load_multimodal_encoder(str(vlm))
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


def test_checkpoint_may_have_contexts_of_its_own_length(pipeline, vlm):
    """A model trained on shorter contexts would see positions and padding that it does not know."""
    pipeline.register_to_config(max_sequence_length=96)
    pipeline.load_multimodal_encoder(str(vlm))
    student, teacher = pipeline.encode_student(PROMPTS[:1])[0], pipeline.encode_teacher(PROMPTS[:1], [RED])[0]
    assert student["prompt_embeds"].shape == teacher["prompt_embeds"].shape == (96, 3 * HIDDEN)
    assert pipeline.max_context_length({}, dict(pipeline.config)) == 96 and pipeline.max_context_length({}, {}) == 512


def test_padding_of_the_vlm_context_is_that_of_the_text_encoder(pipeline, vlm):
    """The transformer attends to the padding, so the teacher's must be made as the student's is."""
    pipeline.load_multimodal_encoder(str(vlm))
    encoder = pipeline.multimodal_encoder
    text = pipeline.tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPTS[0]}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    inputs = encoder.tokenizer(text, return_tensors="pt", padding="max_length", max_length=512, padding_side="right")
    with torch.no_grad():
        states = encoder.model(**inputs, output_hidden_states=True).hidden_states
    ours = torch.cat([states[k][0] for k in (9, 18, 27)], dim=-1)
    torch.testing.assert_close(ours, pipeline.encode_student(PROMPTS[:1])[0]["prompt_embeds"], rtol=1e-3, atol=1e-4)


def test_positions_go_on_through_the_padding_of_the_vlm_context(pipeline, vlm, monkeypatch):
    """The text encoder's padding has positions of its own; with an image, the VLM would give position 0 to all of
    it."""
    pipeline.load_multimodal_encoder(str(vlm))
    encoder = pipeline.multimodal_encoder
    seen, rotary = [], encoder.model.language_model.rotary_emb
    rotary.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"] if kwargs else args[1]), with_kwargs=True
    )
    (context,) = pipeline.encode_teacher(PROMPTS[:1], [RED])
    positions = seen[0][-3:, 0]
    real = encoder.context_length(PROMPTS[0], *RED.size[::-1], pipeline.chat_ending(pipeline.tokenizer))
    assert 16 < real < positions.shape[1] == len(context["prompt_embeds"])
    assert (positions[:, real - 1 :].diff() == 1).all()


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
@pytest.mark.parametrize("references", [[RED], [WIDE, RED]], ids=["one", "two"])
def test_rollout_with_references_is_the_stock_pipelines_trajectory(pipeline, stock, size, references):
    """As without them: trained on other states than inference visits, the LoRA would not be on-policy."""
    (height, width), expected, steps = size, [], 4
    noise = pipeline.initial_noise(height, width, torch.Generator().manual_seed(0))
    images = stock(
        references, PROMPTS[0], height=height, width=width, num_inference_steps=steps, guidance_scale=1.0, latents=noise.clone(),
        callback_on_step_end=lambda pipe, step, time, values: expected.append(values["latents"].clone()) or {},
    ).images  # fmt: skip
    contexts, latents, states = pipeline.encode_student(PROMPTS[:1], [references]), noise, []
    with torch.no_grad():
        for timestep in pipeline.few_step_grid(steps, latents):
            velocity = pipeline.velocity(pipeline.transformer, latents, timestep, contexts)
            latents = pipeline.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
            states.append(pipeline._pack_latents(latents))
        ours = pipeline.sample(pipeline.transformer, contexts, noise, steps)
    assert len(states) == len(expected) == steps and noise.shape == (1, 16, height // 8, width // 8)
    for state, theirs in zip(states, expected):
        torch.testing.assert_close(state, theirs, rtol=0, atol=1e-5)
    assert np.abs(np.asarray(ours[0]).astype(int) - np.asarray(images[0])).max() <= 1


def test_grid_depends_on_the_resolution(pipeline):
    """The fixed grid of a scheduler without mu is not what inference runs (shift of the size of the image)."""
    small, large = (
        pipeline.few_step_grid(4, torch.zeros(1, 16, side // 16, side // 16)) / 1000 for side in (512, 1024)
    )
    torch.testing.assert_close(large, torch.tensor([1.0, 0.967, 0.908, 0.767]), rtol=0, atol=1e-3)
    torch.testing.assert_close(small, torch.tensor([1.0, 0.958, 0.884, 0.718]), rtol=0, atol=1e-3)


def test_lora_covers_both_kinds_of_blocks(pipeline):
    """The public code trained the attention of the double-stream blocks alone, because other names matched nothing."""
    targets = pipeline.lora_targets(pipeline.transformer)
    double = [t for t in targets if t.startswith("transformer_blocks.0.")]
    single = [t for t in targets if t.startswith("single_transformer_blocks.")]
    assert len(double) == 12 and len(single) == 2 * 2 and len(targets) == 16


@pytest.fixture(scope="module")
def trained(train, tmp_path_factory):
    return train(
        tmp_path_factory.mktemp("trained"), max_train_steps=6, rollout_steps=4, learning_rate=0.3, ema_decay=1.0,
        validation_steps=100, num_validation_images=1, lora_alpha=8,
    )  # fmt: skip


def test_prompt_comes_first_and_pictures_by_name(pipeline, stock):
    """The stock call begins with the picture: `pipe("a photo ..")`, as all other models are called, would raise."""
    size = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "np"}
    seeds = [torch.Generator().manual_seed(0) for _ in "ab"]
    ours = pipeline(PROMPTS[0], image=RED, **size, generator=seeds[0]).images
    assert (ours == stock(prompt=PROMPTS[0], image=RED, **size, guidance_scale=1.0, generator=seeds[1]).images).all()


@pytest.fixture
def with_references(tmp_path):
    """Four images, each with a reference of one of two sizes."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = []
    for i, fill in enumerate(["red", "blue", "green", "yellow"]):
        draw("rectangle", fill, (32, 32)).save(folder / f"target_{i}.png")
        draw("ellipse", fill, (64, 64) if i < 2 else (96, 64)).save(folder / f"reference_{i}.png")
        rows.append(
            {"file_name": f"target_{i}.png", "reference_file_name": f"reference_{i}.png", "text": f"a {fill} square"}
        )
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.mark.parametrize("teacher_context", ["vlm", "edit"])
@pytest.mark.parametrize("teacher_image", ["target", "other"])
def test_every_teacher_trains(train, tmp_path, monkeypatch, teacher_context, teacher_image):
    """Each of the four teachers runs, sees the image it is said to see, and teaches something."""
    shown, encode = {}, DOPSDFlux2KleinPipeline.encode_teacher

    def recorded(self, prompts, images, context, *rest):
        assert context == teacher_context
        shown.update((prompt, image.getpixel((20, 20))) for prompt, image in zip(prompts, images))
        return encode(self, prompts, images, context, *rest)

    monkeypatch.setattr(DOPSDFlux2KleinPipeline, "encode_teacher", recorded)
    logs = []
    monkeypatch.setattr("accelerate.Accelerator.log", lambda self, values, step: logs.append(values))
    changes = {
        "teacher_context": teacher_context,
        "teacher_image": teacher_image,
        "context_cache_dir": tmp_path / "cache",
    }
    if teacher_context == "edit":
        changes["teacher_prompt_suffix"] = ", as pictured"
    train(tmp_path / "out", **changes)
    suffix = changes.get("teacher_prompt_suffix", "")
    red, blue = (255, 0, 0), (0, 0, 255)
    assert shown["a red square" + suffix] == (red if teacher_image == "target" else blue)
    assert all(values["loss"] > 1e-6 for values in logs) and (tmp_path / "out" / LORA).is_file()


def test_editing_gives_references_to_student_and_target_to_teacher(train, with_references, tmp_path, monkeypatch):
    """A student without its references, or batches of several layouts, would train another task or fail; and so would
    a user whom the card tells to give no picture."""
    seen, velocity = [], DOPSDFlux2KleinPipeline.velocity

    def recorded(self, transformer, latents, timestep, contexts):
        seen.append([{n: tuple(t.shape[1:]) for n, t in c.items() if n != "prompt_embeds"} for c in contexts])
        return velocity(self, transformer, latents, timestep, contexts)

    patch_velocity(monkeypatch, DOPSDFlux2KleinPipeline, recorded)
    train(
        tmp_path / "out", instance_data_dir=with_references, reference_column="reference", teacher_context="edit",
        train_batch_size=2, max_train_steps=2, rollout_steps=1, context_cache_dir=tmp_path / "cache",
    )  # fmt: skip
    assert len(seen) == 2 * 2
    for teacher, student in zip(seen[0::2], seen[1::2]):
        assert teacher[0] == teacher[1] and student[0] == student[1]
        assert teacher[0] == {**student[0], "reference_1": (8, 8)}
    assert {c[0]["reference_0"] for c in seen} == {(8, 8), (8, 12)}

    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (
        card.data.pipeline_tag == "image-to-image"
        and "image-to-image" in card.data.tags
        and "text-to-image" not in card.data.tags
    )
    assert "from text alone" not in card.text
    (code,) = re.findall(r"```py\n(.*?)```", card.text, re.DOTALL)
    WIDE.save(tmp_path / "reference.png")
    monkeypatch.chdir(tmp_path)
    seen.clear()
    given = []
    monkeypatch.setattr(
        Flux2KleinPipeline,
        "__call__",
        lambda self, image=None, **_: given.append(image) or SimpleNamespace(images=[WIDE]),
    )
    exec(code, {})
    assert given[0].size == WIDE.size


def test_every_other_batch_of_prior_prompts_shows_references(train, with_references, tmp_path, monkeypatch):
    """A model that learns a new edit would forget those that it knows, which need a reference to be practised."""
    seen, velocity = [], DOPSDFlux2KleinPipeline.velocity

    def recorded(self, transformer, latents, timestep, contexts):
        seen.append(contexts)
        return velocity(self, transformer, latents, timestep, contexts)

    patch_velocity(monkeypatch, DOPSDFlux2KleinPipeline, recorded)
    (tmp_path / "prior.txt").write_text("make it red\nmake it blue\n")
    changes = {"reference_column": "reference", "prior_prompts": tmp_path / "prior.txt", "prior_every": 2}
    changes |= {"instance_data_dir": with_references, "context_cache_dir": tmp_path / "cache", "train_batch_size": 2}
    train(tmp_path / "out", max_train_steps=8, rollout_steps=1, **changes)
    for number, (teacher, student) in enumerate(zip(seen[2::4], seen[3::4])):
        for ours, theirs in zip(student, teacher, strict=True):
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
            assert ("reference_0" in ours) == (number % 2 == 0)
    # of both kinds for each row; each prompt alone and, of four rows, with a row's reference
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 4 + 4 + 2 + 4


def test_prior_prompts_are_shared_out_over_references():
    """Of many prompts and few images, or the other way round, some would never be drawn, or all with all be encoded."""
    for count in (2, 3, 9):
        pairs = script.prior_pairs(["x", "y"], ["a", "b", "c"], count)
        assert pairs[:2] == [(None, "x"), (None, "y")] and len(pairs) == 2 + max(count, 3)
        assert {index for index, _ in pairs[2:]} == {~row for row in range(count)}
        assert {prompt for _, prompt in pairs[2:]} == {"a", "b", "c"}
    assert script.prior_pairs(["x"], [], 4) == [(None, "x")] and script.prior_pairs([], [], 4) == []


def test_batches_share_the_size_of_what_the_teacher_sees(train, tmp_path):
    """Two square images whose teachers see images of two shapes cannot be one batch."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, size in {"a": (128, 128), "b": (128, 128), "c": (192, 96)}.items():
        draw("ellipse", "blue", size).save(folder / f"{name}.png")
    changes = {
        "teacher_context": "edit",
        "teacher_image": "other",
        "train_batch_size": 2,
        "rollout_steps": 1,
        "resolution": 128,
    }
    train(
        tmp_path / "out", instance_data_dir=folder, instance_prompt="a disc", max_train_steps=3,
        context_cache_dir=tmp_path / "cache", **changes,
    )  # fmt: skip
    assert (tmp_path / "out" / LORA).is_file()


def test_cache_is_renewed_when_the_teacher_changes(train, tmp_path):
    """Contexts of another teacher would be taken for those of this one."""
    cache = tmp_path / "cache"
    counts = []
    for changes in ({}, {"teacher_image": "other"}, {"teacher_context": "edit"}, {"teacher_prompt_suffix": "!"}, {}):
        train(
            tmp_path / "out",
            "--overwrite_output_dir",
            context_cache_dir=cache,
            max_train_steps=1,
            rollout_steps=1,
            **changes,
        )
        counts.append(len(list(cache.glob("*.safetensors"))))
    assert counts == [4, 6, 10, 12, 12]  # the student's two are the same for all; with `edit`, the VAE is in their key


@pytest.mark.parametrize(
    ("size", "changes", "words"),
    [
        (
            (50, 80),
            {"reference_column": "reference"},
            "Row 0: its reference .*reference_0.png cannot be shown: Image too small",
        ),
        (
            (640, 64),
            {"reference_column": "reference"},
            "Row 0: its reference .*reference_0.png cannot be shown: Aspect ratio",
        ),
        (
            (64, 64),
            {"teacher_context": "edit", "resolution": 32},
            "Row 0: its image as a reference, at --resolution 32: Image too small",
        ),
    ],
)
def test_reference_that_the_model_does_not_take(train, with_references, tmp_path, size, changes, words):
    """The stock pipeline's own error would come after the encoders have loaded, as a traceback that names no file."""
    folder = shutil.copytree(with_references, tmp_path / "images")
    for file in folder.glob("reference_0*"):
        draw("ellipse", "blue", size).save(file)
    with pytest.raises(ValueError, match=words):
        train(tmp_path / "out", **{"instance_data_dir": folder, **changes})


def test_rows_without_reference_are_told(train, with_references, tmp_path, caplog):
    """A mistyped key makes of a row an image with a caption alone, which the student cannot edit towards."""
    folder = shutil.copytree(with_references, tmp_path / "images")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    changes = {"instance_data_dir": folder, "reference_column": "reference", "max_train_steps": 1}
    for emptied in (rows[1:2], rows):
        for row in emptied:
            row.update(dict.fromkeys((name for name in row if name.startswith("reference")), []))
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        if emptied is rows:
            with pytest.raises(ValueError, match=f"reference: {len(rows)} of {len(rows)} rows have no reference"):
                train(tmp_path / "all", **changes)
        else:
            train(tmp_path / "one", **changes)
            assert f"1 of {len(rows)} rows have no reference, the first in row 1" in caplog.text


@pytest.mark.parametrize("changes", [{"teacher_context": "edit"}, {"teacher_image": "other"}])
def test_resume_with_another_teacher_is_an_error(train, trained, changes):
    """Half a training by one teacher and half by another is neither."""
    (flag,) = changes
    with pytest.raises(ValueError, match=f"--{flag}"):
        train(
            trained, resume_from_checkpoint="latest", max_train_steps=9, rollout_steps=4, ema_decay=1.0, lora_alpha=8, learning_rate=0.3, **changes
        )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reference_column": "nowhere"}, "'nowhere'"),
        ({"teacher_image": "other"}, "--teacher_image other"),
        ({"teacher_max_pixels": 512 * 512}, "--teacher_max_pixels"),
    ],
)
def test_input_that_no_teacher_can_use(train, with_references, tmp_path, monkeypatch, changes, words):
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
        train(tmp_path / "out", **changes)
