"""The student's and the teacher's contexts."""

import copy
import functools
import json
import shutil

import pytest
import torch
from diffusers import ZImagePipeline
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Qwen3VLModel

import train_dopsd_lora as script
from conftest import draw, save_images
from families import CAPTIONS, CHAT_TEMPLATE
from pipeline_dopsd import DOPSDZImagePipeline, MultimodalEncoder


PROMPTS = CAPTIONS["a"]


def test_student_contexts_are_the_stock_pipelines(pipeline):
    """A LoRA trained on other text features than inference gives would not work when it is used."""
    stock = ZImagePipeline(**pipeline.components)
    expected, _ = stock.encode_prompt(list(PROMPTS), do_classifier_free_guidance=False)
    contexts = pipeline.encode_student(PROMPTS)
    assert len(contexts[0]["prompt_embeds"]) != len(contexts[1]["prompt_embeds"])
    for ours, theirs in zip(contexts, expected, strict=True):
        assert torch.equal(ours["prompt_embeds"], theirs)


@pytest.mark.families()
def test_contexts_carry_no_graph(pipeline, encoder):
    """The activations of a 4 B text encoder, kept for a backward that never comes, do not fit beside it."""
    assert not pipeline.encode_student(PROMPTS[:1])[0]["prompt_embeds"].requires_grad
    (teacher,) = pipeline.encode_teacher(PROMPTS[:1], [draw("rectangle", "red")])
    assert not teacher["prompt_embeds"].requires_grad


@pytest.mark.families()
def test_prompts_of_the_caller_are_left_alone(pipeline):
    """The stock encode_prompt writes the chat template into the list: used again, a prompt would get it twice."""
    prompts = list(PROMPTS)
    pipeline.encode_student(prompts)
    assert prompts == PROMPTS
    pipeline(prompts, height=32, width=32, num_inference_steps=1, output_type="latent")
    assert prompts == PROMPTS


@pytest.mark.families()
def test_teacher_without_an_image_is_the_student(pipeline, encoder):
    """Chat, layers, positions and padding of the teacher's contexts must be those that the transformer knows."""
    for ours, theirs in zip(pipeline.encode_teacher(PROMPTS, []), pipeline.encode_student(PROMPTS), strict=True):
        torch.testing.assert_close(ours["prompt_embeds"], theirs["prompt_embeds"], rtol=1e-3, atol=1e-4)


def test_text_only_states_of_vlm_equal_text_encoders(pipeline, encoder):
    """The teacher's prompt would be read by another language model than the student's."""
    inputs = encoder.tokenizer(PROMPTS[1], return_tensors="pt")
    with torch.no_grad():
        ours = encoder.model(**inputs, output_hidden_states=True).hidden_states
        theirs = pipeline.text_encoder(**inputs, output_hidden_states=True).hidden_states
    assert len(ours) == len(theirs) == 4
    for a, b in zip(ours, theirs):
        assert torch.equal(a, b)


def test_transplant_replaces_weights_that_differ(vlm, pipeline):
    """If the VLM of these tests had the text encoder's weights, the tests beside this one would prove nothing."""
    own = Qwen3VLModel.from_pretrained(vlm).language_model.state_dict()
    assert not torch.equal(
        own["layers.0.mlp.up_proj.weight"], pipeline.text_encoder.state_dict()["layers.0.mlp.up_proj.weight"]
    )
    assert AutoConfig.from_pretrained(vlm).text_config.rope_parameters["rope_theta"] == 5e3


def test_verification_catches_the_vlms_own_rope(vlm, pipeline):
    """With the VLM's rope_theta, teacher features would be silently off."""
    pipeline.text_encoder.config.rope_parameters["rope_theta"] = 5e3  # the encoder itself still rotates with 1e4
    with pytest.raises(ValueError, match="differ by"):
        MultimodalEncoder(str(vlm)).transplant(pipeline.text_encoder)


def test_vlm_without_its_vision_part_is_an_error(vlm, pipeline, tmp_path):
    """With a vision part of random weights, the teacher would be shown noise in place of the pictures."""
    shutil.copytree(vlm, tmp_path / "vlm")
    weights = load_file(vlm / "model.safetensors")
    seeing = [name for name in weights if ".visual." in name]
    save_file(
        {n: w for n, w in weights.items() if n not in seeing[:2]},
        tmp_path / "vlm" / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ValueError, match="lacks weights of its vision part: visual."):
        MultimodalEncoder(str(tmp_path / "vlm")).transplant(pipeline.text_encoder)


def test_chat_template_of_the_processor_alone(vlm, tmp_path):
    """Older repositories keep the template in a file that tokenizers do not read."""
    shutil.copytree(vlm, tmp_path / "vlm")
    expected = MultimodalEncoder(str(vlm)).chat("a red square", 4)
    (tmp_path / "vlm" / "chat_template.jinja").unlink()
    (tmp_path / "vlm" / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    assert MultimodalEncoder(str(tmp_path / "vlm")).chat("a red square", 4) == expected


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_partial_transplant_is_an_error(vlm, pipeline, change):
    """A weight that keeps its old value would leave a teacher made of two language models."""
    attention = pipeline.text_encoder.layers[1].self_attn
    if change == "missing":
        attention.q_norm = torch.nn.Identity()
    elif change == "extra":
        attention.register_parameter("gate", torch.nn.Parameter(torch.ones(1)))
    else:
        attention.k_proj = torch.nn.Linear(64, 16, bias=False)
    with pytest.raises(ValueError, match="do not fit"):
        MultimodalEncoder(str(vlm)).transplant(pipeline.text_encoder)


def test_vlm_of_another_width_is_an_error(wide_vlm, pipeline):
    """The user learns which model to choose, not that two matrices do not fit."""
    with pytest.raises(ValueError, match="hidden_size is 128, not 64"):
        MultimodalEncoder(str(wide_vlm)).transplant(pipeline.text_encoder)


def test_other_models_than_qwen3_vl_are_an_error(base):
    """A text model as VLM would fail deep inside transformers."""
    with pytest.raises(ValueError, match="qwen3"):
        MultimodalEncoder(str(base / "text_encoder"))


def test_language_model_is_held_once(pipeline, encoder):
    """Two copies of the language model would cost 8 GB with the real models."""
    shared = {p.data_ptr() for p in pipeline.text_encoder.parameters()}
    parameters = list(encoder.model.language_model.parameters())
    assert len(parameters) == len(shared)
    assert all(p.data_ptr() in shared for p in parameters)


def test_language_model_of_the_vlm_is_never_loaded(vlm, pipeline, monkeypatch):
    """Beside the text encoder's own it takes 15 GB of the host for the 8B models, to be thrown away."""
    replaced, put = [], torch.nn.Module.set_submodule

    def recorded(self, name, layer):
        replaced.extend(parameter.device.type for parameter in self.get_submodule(name).parameters(recurse=False))
        put(self, name, layer)

    monkeypatch.setattr(torch.nn.Module, "set_submodule", recorded)
    encoder = MultimodalEncoder(str(vlm))
    encoder.transplant(pipeline.text_encoder)
    assert set(replaced) == {"meta"} and len(replaced) == len(list(pipeline.text_encoder.parameters()))
    assert {tensor.device.type for tensor in [*encoder.model.parameters(), *encoder.model.buffers()]} == {"cpu"}
    whole = Qwen3VLModel.from_pretrained(vlm)
    vision = encoder.model.visual.state_dict()
    assert all(torch.equal(tensor, vision[name]) for name, tensor in whole.visual.state_dict().items())


@pytest.mark.families()
def test_teacher_context_sees_the_image(pipeline, encoder):
    """A teacher whose context does not depend on the image has nothing to teach."""
    red, blue = draw("rectangle", "red", (32, 32)), draw("rectangle", "blue", (32, 32))
    seen_red, seen_blue, other = (
        c["prompt_embeds"] for c in pipeline.encode_teacher([PROMPTS[0]] * 2 + ["a blue disc"], [red, blue, red])
    )
    student = pipeline.encode_student(PROMPTS[:1])[0]["prompt_embeds"]
    # 32 x 32 pixels are 4 x 4 patches, 2 x 2 tokens, between <|vision_start|> and <|vision_end|>
    assert seen_red.shape == pipeline.context_shape(len(student) + 4 + 2, pipeline.transformer.config, {})
    assert (seen_red - seen_blue).abs().max() > 1e-3
    assert other.shape != seen_red.shape or not torch.equal(other, seen_red)


def test_teacher_context_is_the_last_but_one_layer(vlm, pipeline):
    """The transformer was trained on the layer before the last; others mean nothing to it."""
    pipeline.load_multimodal_encoder(str(vlm))
    image = draw("rectangle", "red", (32, 32))
    (states,) = pipeline.multimodal_encoder.hidden_states(PROMPTS[:1], [image])
    assert len(states) == 4
    (context,) = pipeline.encode_teacher(PROMPTS[:1], [image])
    assert torch.equal(context["prompt_embeds"], states[2])


@pytest.mark.families()
@pytest.mark.parametrize("max_pixels", [32 * 32, 768 * 768])
@pytest.mark.parametrize("size", [(32, 32), (48, 24), (160, 160)])
def test_context_length_is_known_without_weights(vlm, pipeline, size, max_pixels):
    """A context that is too long for the transformer would only fail after hours of encoding."""
    ending = pipeline.chat_ending(pipeline.tokenizer)
    encoder = pipeline.make_encoder(str(vlm), max_pixels, pipeline.text_encoder.config, pipeline.tokenizer)
    width, height = size
    expected = encoder.context_length(PROMPTS[1], height, width, ending)
    encoder.transplant(pipeline.text_encoder)
    image = draw("ellipse", "blue", size)
    assert len(encoder.hidden_states(PROMPTS[1:2], [image], ending)[0][-2]) == expected


@pytest.mark.families()
def test_contexts_of_a_batch_are_those_of_its_images_alone(pipeline, encoder):
    """Encoded together, images of other sizes and prompts of other lengths must not leak into each other's
    contexts."""
    prompts = [PROMPTS[0], "a blue disc on a very long wooden table beside a window"]
    images = [draw("rectangle", "red", (32, 32)), draw("ellipse", "blue", (48, 96))]
    together = pipeline.encode_teacher(prompts, images)
    for context, prompt, image in zip(together, prompts, images, strict=True):
        (alone,) = pipeline.encode_teacher([prompt], [image])
        torch.testing.assert_close(context["prompt_embeds"], alone["prompt_embeds"], rtol=1e-3, atol=1e-4)
    assert not torch.equal(together[0]["prompt_embeds"], together[1]["prompt_embeds"])


def test_smaller_max_pixels_shorten_the_context(vlm):
    """--teacher_max_pixels is what the error about long contexts tells the user to lower."""
    lengths = [MultimodalEncoder(str(vlm), side**2).context_length("a", 160, 160) for side in (32, 64, 160)]
    assert lengths[0] < lengths[1] < lengths[2]


def test_max_context_length_is_what_the_transformer_takes(pipeline):
    """One token too many is an IndexError inside the transformer; one too few refuses contexts that work."""
    longest = DOPSDZImagePipeline.max_context_length(pipeline.transformer.config, {})
    assert DOPSDZImagePipeline.max_context_length({"axes_lens": [1536, 512, 512]}, {}) == 1504
    noise, time = torch.randn(1, 4, 8, 8), torch.tensor(500.0)
    with torch.no_grad():
        pipeline.velocity(pipeline.transformer, noise, time, [{"prompt_embeds": torch.randn(longest, 64)}])
        with pytest.raises(IndexError):
            pipeline.velocity(pipeline.transformer, noise, time, [{"prompt_embeds": torch.randn(longest + 1, 64)}])


@pytest.mark.parametrize("damage", ["half", "empty", "no checksum"])
def test_contexts_that_are_cut_off_are_encoded_anew(train, tmp_path, monkeypatch, caplog, damage):
    """A full disk or a crash leaves such files; a run would end at them after hours."""
    monkeypatch.setattr(script, "ENCODING_BATCH", 1)  # in a batch, numbers would round otherwise
    cache, small = tmp_path / "cache", {"rollout_steps": 1, "max_train_steps": 1}
    train(tmp_path / "first", context_cache_dir=cache, **small)
    path = min(cache.glob("*.safetensors"))
    content = path.read_bytes()
    if damage == "no checksum":
        save_file(load_file(path), path)
    else:
        path.write_bytes({"half": content[: len(content) // 2], "empty": b""}[damage])
    train(tmp_path / "second", context_cache_dir=cache, **small)
    assert [str(path) in message for message in caplog.messages if "damaged" in message] == [True]
    assert path.read_bytes() == content


def test_damaged_context_ends_the_run_when_it_is_used(train, tmp_path):
    """A bit that has flipped on the disk would be trained on for hours; as told, the file is removed and the run goes
    on."""
    cache, small = tmp_path / "cache", {"rollout_steps": 1, "max_train_steps": 20, "checkpointing_steps": 1}
    train(tmp_path / "first", context_cache_dir=cache, **{**small, "max_train_steps": 1})
    path = max(cache.glob("*.safetensors"))
    content = path.read_bytes()
    path.write_bytes(content[:-9] + bytes([content[-9] ^ 64]) + content[-8:])
    with pytest.raises(
        script.InputError, match=f"{path.name} is damaged .* Remove it .*--resume_from_checkpoint latest"
    ):
        train(tmp_path / "second", context_cache_dir=cache, **small)
    path.unlink()
    train(tmp_path / "second", context_cache_dir=cache, **small, resume_from_checkpoint="latest")
    assert path.exists()


@pytest.mark.families()
def test_contexts_in_8_bits_are_half_as_large_and_nearly_the_same(pipeline, encoder, tmp_path):
    """A hundred thousand images would need twice the disk; a student of other contexts would be another."""
    cache = script.ContextCache.__new__(script.ContextCache)
    cache.folder, latents = tmp_path, pipeline.initial_noise(32, 32, torch.Generator().manual_seed(0))
    timestep = pipeline.few_step_grid(4, latents)[1]
    (context,) = pipeline.encode_teacher(PROMPTS[:1], [draw("rectangle", "red")])
    context = {name: tensor.bfloat16() for name, tensor in context.items()}
    velocities, sizes = [], []
    for cache.fp8 in (False, True):
        path = tmp_path / f"{cache.fp8}.safetensors"
        cache.write(path, context)
        read = script.read_context(path)
        assert read.keys() == context.keys() and read["prompt_embeds"].dtype == torch.bfloat16
        with torch.no_grad():
            velocities.append(pipeline.velocity(pipeline.transformer, latents, timestep, [read]))
        sizes.append(path.stat().st_size)
    assert sizes[1] < 0.6 * sizes[0]
    assert 0 < (velocities[1] - velocities[0]).norm() < 0.05 * velocities[0].norm()


def test_scale_of_8_bits_is_that_of_each_token():
    """One token with outlying dimensions, as Qwen's first has, would round all others to nothing."""
    embeds = torch.tensor([[1000.0, 1.0, -3.0], [0.001, 0.002, -0.0005], [0.0, 0.0, 0.0]])
    values, scale = script.to_fp8(embeds)
    read = values.float() * scale
    torch.testing.assert_close(read[1], embeds[1], rtol=0.07, atol=0)
    assert (read[2] == 0).all() and read.isfinite().all() and read[0, 0] == 1000


def test_training_on_contexts_in_8_bits_is_not_gone_on_with_others(train_any, tmp_path):
    """Half a training on rounded contexts is neither."""
    folder = train_any(tmp_path / "out", context_dtype="fp8", context_cache_dir=tmp_path / "cache", max_train_steps=1)
    with pytest.raises(ValueError, match="--context_dtype"):
        train_any(folder, resume_from_checkpoint="latest", context_cache_dir=tmp_path / "cache", max_train_steps=2)
    train_any(
        folder,
        resume_from_checkpoint="latest",
        context_dtype="fp8",
        context_cache_dir=tmp_path / "cache",
        max_train_steps=2,
    )


def test_start_reads_no_contexts(train, tmp_path, monkeypatch):
    """Those of 100,000 images are hundreds of gigabytes; a start looks at their headers."""
    folder = save_images(tmp_path / "images")
    common = {
        "instance_data_dir": folder,
        "instance_prompt": "x",
        "context_cache_dir": tmp_path / "cache",
        "max_train_steps": 1,
    }
    train(tmp_path / "first", **common)
    summed, checksum = [], script.tensor_checksum
    monkeypatch.setattr(script, "tensor_checksum", lambda tensors: summed.append(1) or checksum(tensors))
    train(tmp_path / "second", **common)
    assert len(summed) <= 2 * 3  # the student's and the teacher's of one step, and of two more that may be read ahead


@pytest.mark.families()
def test_prompts_that_the_stock_pipeline_cuts_off(pipeline):
    """The length that is refused must be the first at which the end of a prompt, with its chat, no longer counts."""
    longest = pipeline.max_prompt_length(pipeline.config)
    length_of = functools.partial(pipeline.prompt_length, pipeline.tokenizer)
    count = longest - length_of("")
    assert length_of("z" * count) == longest and length_of("z" * (count + 1)) == longest + 1
    for letters, counts in ((count, True), (count + 40, False)):  # fewer tokens end a chat
        z, q = (pipeline.encode_student(["z" * (letters - 1) + last])[0]["prompt_embeds"] for last in "zq")
        assert len(z) == pipeline.context_shape(longest, pipeline.transformer.config, {})[0]
        assert torch.equal(z, q) != counts


@pytest.mark.families()
def test_text_encoder_is_not_changed_by_the_transplant(vlm, pipeline):
    """The student's contexts must stay those of the base model."""
    before = copy.deepcopy(pipeline.text_encoder.state_dict())
    expected = pipeline.encode_student(PROMPTS[:1])[0]["prompt_embeds"]
    pipeline.load_multimodal_encoder(str(vlm))
    pipeline.encode_teacher(PROMPTS[:1], [draw("rectangle", "red", (32, 32))])
    assert all(torch.equal(v, before[k]) for k, v in pipeline.text_encoder.state_dict().items())
    assert torch.equal(pipeline.encode_student(PROMPTS[:1])[0]["prompt_embeds"], expected)
