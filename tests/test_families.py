"""What every family must do, in the words of its own class: a new row of the table in families.py is asked all of
it."""

import argparse
import functools
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from safetensors.torch import load_file

import pipeline_dopsd
import train_dopsd_full as full_script
import train_dopsd_lora as script
from conftest import LORA, ROOT, draw, student_picture
from families import CAPTIONS, FAMILIES
from pipeline_dopsd import family_of, input_dtype, repository_config


sys.path.insert(0, str(ROOT / "examples"))

import train_sft  # noqa: E402


pytestmark = pytest.mark.families()
PROMPTS = CAPTIONS["a"]
RED = draw("rectangle", "red", (32, 32))
STEPS = 4


# ---------------------------------------------------------------------------------------------------------- the base
def test_family_is_known_by_the_base(family, base, tmp_path):
    """The scripts never ask which model it is; of an unknown one the user learns which ones there are."""
    assert family_of(str(base)) is family.pipeline
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(ValueError, match="known are: .*" + family.stock.__name__):
        family_of(str(tmp_path))


@pytest.mark.parametrize("said", [False, None], ids=["undistilled", "nothing"])
@pytest.mark.families(*(name for name, family in FAMILIES.items() if family.knows_distilled))
def test_undistilled_base_is_refused_before_weights_load(family, train_any, base, said, tmp_path, monkeypatch):
    """It would learn from few-step pictures that are blurred to begin with, and its card would promise few steps.
    diffusers, too, takes a base that says nothing for an undistilled one."""
    monkeypatch.setattr("diffusers.ModelMixin.from_pretrained", lambda *a, **k: pytest.fail("weights were loaded"))
    shutil.copytree(base, tmp_path / "undistilled")
    index = json.loads((base / "model_index.json").read_text()) | {"is_distilled": said}
    if said is None:
        del index["is_distilled"]
    (tmp_path / "undistilled" / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match=f"undistilled is not step-distilled.*Give .*{family.pipeline.distilled_bases[:20]}"
    ):
        train_any(tmp_path / "out", pretrained_model_name_or_path=tmp_path / "undistilled")


@pytest.mark.families(*(name for name, family in FAMILIES.items() if "edit" not in family.pipeline.teacher_contexts))
@pytest.mark.parametrize("changes", [{"teacher_context": "edit"}, {"reference_column": "reference"}])
def test_editing_needs_a_model_that_edits(family, flags, tmp_path, changes):
    """One error names the flag; otherwise a picture is asked of a transformer that takes none."""
    (flag,) = changes
    with pytest.raises(ValueError, match=f"--{flag}"):
        script.resolve_arguments(
            family.pipeline, argparse.Namespace(**{**vars(script.parse_args(flags(tmp_path))), **changes})
        )


def test_revision_of_the_base_is_that_of_the_training(family, pipeline, flags, tmp_path, monkeypatch):
    """A base that changes on the Hub would be another one below the same LoRA; one that has only fp16 files would not
    load."""
    config = repository_config(pipeline, STEPS, "org/base", "v2", "fp16", "bfloat16")
    asked = []
    monkeypatch.setattr(
        DiffusionPipeline,
        "from_pretrained",
        lambda *args, **options: asked.append((args[-1], options["revision"], options["variant"])) or pipeline,
    )
    getattr(pipeline_dopsd, config.pop("_class_name")[1])(**config)
    assert asked == [("org/base", "v2", "fp16")]
    own = {"pretrained_model_name_or_path": "org/base", "revision": "v2", "variant": "fp16"}
    args = script.parse_args(flags(tmp_path, **own))
    code = 'from_pretrained("org/base", revision="v2", variant="fp16", dtype'
    assert code in script.describe_lora(args, "me/lora")[1]


# ---------------------------------------------------------------------------------------------------------- velocity
def test_sample_is_the_stock_call(family, pipeline, stock):
    """Validation would show other pictures than users see."""
    noise = pipeline.initial_noise(32, 48, torch.Generator().manual_seed(0))
    size = {"height": 32, "width": 48, "num_inference_steps": STEPS, "guidance_scale": family.guidance_scale}
    theirs = stock(prompt=PROMPTS[0], latents=family.takes(pipeline, noise), **size).images[0]
    with torch.no_grad():
        ours = pipeline.sample(pipeline.transformer, pipeline.encode_student(PROMPTS[:1]), noise, STEPS)[0]
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs)).max() <= 1 and np.asarray(ours).std() > 1


def test_call_is_few_steps_without_guidance(family, pipeline, stock):
    """`pipe("a photo ..")` alone must be inference as it was trained; with guidance, pictures of distilled models
    burn."""
    calls = []
    pipeline.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    size = {"height": 32, "width": 32, "output_type": "np"}
    ours = pipeline(PROMPTS[0], **size, generator=torch.Generator().manual_seed(0)).images
    steps = family.pipeline.default_num_inference_steps
    assert len(calls) == steps
    few = {"num_inference_steps": steps, "guidance_scale": family.guidance_scale}
    assert (ours == stock(prompt=PROMPTS[0], **size, **few, generator=torch.Generator().manual_seed(0)).images).all()


def test_times_are_rounded_as_in_inference(family, base):
    """In bf16 another order of operations gives a state a time that inference never asks for."""
    pipeline, times = family.pipeline.from_pretrained(base, dtype=torch.bfloat16), []
    pipeline.set_progress_bar_config(disable=True)

    def noted(module, args, kwargs):
        times.append((kwargs["timestep"] if "timestep" in kwargs else args[1]).flatten()[0].item())

    pipeline.transformer.register_forward_pre_hook(noted, with_kwargs=True)
    pipeline(PROMPTS[0], height=64, width=64, num_inference_steps=8, output_type="latent")
    latents, contexts = pipeline.initial_noise(64, 64, torch.Generator()), pipeline.encode_student(PROMPTS[:1])
    with torch.no_grad():
        for timestep in pipeline.few_step_grid(8, latents):
            for time in (timestep, timestep[None]):  # of all images, and one for each
                pipeline.velocity(pipeline.transformer, latents, time, contexts)
    assert len(set(times)) == 8 and times[:8] == times[8::2] == times[9::2]


def test_inputs_have_the_dtype_of_the_weights_not_of_the_lora(pipeline):
    """On a base of 4 bits the LoRA's fp32 would be the first floating dtype, and activations twice as large."""
    transformer = pipeline.transformer.bfloat16().requires_grad_(False)
    transformer.add_adapter(LoraConfig(target_modules="all-linear"))
    script.cast_training_params(transformer, torch.float32)
    for module in transformer.modules():
        if isinstance(module, torch.nn.Linear) and module.weight.dtype == torch.bfloat16:
            module.weight = torch.nn.Parameter(module.weight.view(torch.uint8), requires_grad=False)
    assert any(p.dtype == torch.float32 for p in transformer.parameters())
    assert input_dtype(transformer, "cpu") == torch.bfloat16


def test_inputs_in_training_have_the_dtype_of_inference(pipeline):
    """Weights of fp32 under autocast would be trained at other times than the saved bf16 model is run at."""
    with torch.autocast("cpu", torch.bfloat16):
        assert input_dtype(pipeline.transformer.float(), "cpu") == torch.bfloat16


def test_cuda_autocast_does_not_widen_what_attention_gets(train, tmp_path, monkeypatch):
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
    train(tmp_path, mixed_precision="bf16", max_train_steps=1, rollout_steps=1)
    assert dtypes == {torch.bfloat16}


def test_latents_of_an_image_are_what_the_vae_decodes(pipeline, monkeypatch):
    """References and the baseline's targets would be of another scale than what a rollout ends at."""
    encode, encoded = pipeline.vae.encode, []
    monkeypatch.setattr(pipeline.vae, "encode", lambda *args: encoded.append(encode(*args)) or encoded[-1])
    with torch.no_grad():
        latents = pipeline.image_latents(pipeline.image_processor.preprocess(RED))
        restored = pipeline.to_vae_latents(latents)
    assert latents.shape == pipeline.initial_noise(32, 32, torch.Generator()).shape
    torch.testing.assert_close(restored, encoded[0].latent_dist.mode(), rtol=1e-4, atol=1e-4)


def test_noise_is_the_stock_pipelines(family, pipeline, stock):
    """A seed would give other pictures in the validation than in use."""
    ours = family.gives(pipeline, pipeline.initial_noise(32, 48, torch.Generator().manual_seed(3)))
    first = []
    stock.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: first.append(
            kwargs["hidden_states"] if kwargs.get("hidden_states") is not None else torch.stack(args[0])
        ),
        with_kwargs=True,
    )
    stock(prompt=PROMPTS[0], height=32, width=48, num_inference_steps=1, guidance_scale=family.guidance_scale, output_type="latent",
          generator=torch.Generator().manual_seed(3))  # fmt: skip
    assert torch.equal(first[0].reshape(ours.shape), ours)


# -------------------------------------------------------------------------------------------------------------- LoRA
def test_default_layers_are_all_that_the_family_names(family, pipeline):
    """The public code trained the attention of some blocks alone on FLUX.2, because other names matched nothing."""
    targets = pipeline.lora_targets(pipeline.transformer)
    assert len(targets) == len(set(targets)) == family.lora_layers
    assert all(isinstance(pipeline.transformer.get_submodule(name), torch.nn.Linear) for name in targets)
    # of a block with a layer that trains, all matrices of attention and feed-forward do
    parts = {
        name.rsplit(kind, 1)[0] + kind
        for name in targets
        for kind in (".attn", ".attention", ".ff", ".feed_forward", ".ff_context")
        if kind in name
    }
    linears = [name for name, module in pipeline.transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    assert {name for name in linears if any(name.startswith(f"{part}.") for part in parts)} <= set(targets)


@pytest.fixture(scope="module")
def trained(train, tmp_path_factory):
    return train(
        tmp_path_factory.mktemp("trained"), max_train_steps=6, rollout_steps=STEPS, states_per_rollout=STEPS, num_inference_steps=STEPS,
        learning_rate=0.3, ema_decay=1.0, validation_steps=100, num_validation_images=1, lora_alpha=8,
    )  # fmt: skip


@pytest.fixture
def drawn(trained):
    """The student's picture before and at the end of training."""
    return [student_picture(trained / "validation" / f"step-{step:06d}.png") for step in (0, 6)]


def picture(pipe, noise, **kwargs):
    return np.asarray(pipe(prompt=PROMPTS[0], latents=noise, height=32, width=32, **kwargs).images[0]).astype(int)


def test_revision_of_the_lora_is_passed_on(family, trained, monkeypatch):
    """from_pretrained's own does not reach it: who asks for an earlier checkpoint would be given the newest without a
    word."""
    seen = []
    monkeypatch.setattr(
        family.stock, "load_lora_weights", lambda self, source, **kwargs: seen.append(kwargs["revision"])
    )
    for given in ({}, {"lora_revision": "abc"}):
        DiffusionPipeline.from_pretrained(trained, trust_remote_code=True, **given)
    assert seen == [None, "abc"]


def test_lora_loads_in_all_ways(family, trained, drawn, base, pipeline):
    """With and without the code of the repository, a user sees the pictures of the validation."""
    before, expected = drawn
    assert np.abs(expected - before).max() > 10
    a = DiffusionPipeline.from_pretrained(base, custom_pipeline=str(trained), trust_remote_code=True)
    a.load_lora_weights(trained)
    b = DiffusionPipeline.from_pretrained(trained, trust_remote_code=True)
    c = DiffusionPipeline.from_pretrained(base)
    c.load_lora_weights(trained)
    assert (
        type(c) is family.stock
        and type(a).__name__ == family.pipeline.__name__
        and b.config.num_inference_steps == STEPS
    )
    noise = family.takes(pipeline, pipeline.initial_noise(32, 32, torch.Generator().manual_seed(0)))
    few = {"num_inference_steps": STEPS, "guidance_scale": family.guidance_scale}
    pictures = [picture(a, noise), picture(b, noise), picture(c, noise, **few)]
    pictures += [picture(family.stock.from_pipe(b), noise, **few)]
    assert all(np.abs(one - expected).max() <= 1 for one in pictures)


def test_fused_pipeline_is_saved_as_a_plain_one(family, trained, drawn, pipeline, tmp_path):
    """One folder for programs that know neither LoRAs nor remote code; one that forgot that it is distilled would be
    guided."""
    pipe = DiffusionPipeline.from_pretrained(trained, trust_remote_code=True)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path)
    saved = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(saved) is family.stock and saved.config.get("is_distilled", True)
    noise = family.takes(pipeline, pipeline.initial_noise(32, 32, torch.Generator().manual_seed(0)))
    plain = picture(saved, noise, num_inference_steps=STEPS, guidance_scale=family.guidance_scale)
    assert np.abs(plain - drawn[1]).max() <= 1
    assert family.pipeline.from_pretrained(tmp_path).config.num_inference_steps == STEPS


def test_card_says_how_the_family_is_used(family, trained):
    """A user pastes its code: the number of steps that was trained, and no guidance."""
    text = (trained / "README.md").read_text()
    assert f"num_inference_steps={STEPS}" in text and "guidance_scale=0.0" in text and "text-to-image" in text


# -------------------------------------------------------------------------------------------------------- other runs
def test_baseline_trains(train, tmp_path):
    """Without SFT beside it, nobody sees what D-OPSD keeps."""
    dropped = (
        "vlm_model_name_or_path",
        "context_cache_dir",
        "ema_decay",
        "validation_steps",
        "report_to",
        "prior_prompts",
    )
    flags = train.flags(tmp_path / "out", max_train_steps=2, learning_rate=0.1, **dict.fromkeys(dropped))
    train_sft.main(train_sft.parse_args([*flags, "--class_prompt", "a disc", "--num_class_images", "1"]))
    weights = load_file(tmp_path / "out" / LORA)
    assert all((w != 0).any() for name, w in weights.items() if "lora_B" in name)


@pytest.mark.parametrize("switches", [[], ["--stochastic_rounding"]], ids=["fp32", "bf16"])
def test_full_fine_tuning_leaves_a_pipeline(family, base, train_full, uncompiled, tmp_path, switches):
    """The result of the full script is the base's layout, for plain diffusers and for this project's class."""
    train_full(
        tmp_path, *switches, learning_rate=1e-2, max_train_steps=2, mixed_precision="bf16" if switches else "no"
    )
    tuned = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(tuned) is family.stock and tuned.config.get("is_distilled", True)
    ours = family.pipeline.from_pretrained(tmp_path).transformer
    before = DiffusionPipeline.from_pretrained(base).transformer
    weights = tuned.transformer.state_dict()
    assert all(torch.equal(w, weights[n]) for n, w in ours.state_dict().items())
    changed = [n for n, w in before.state_dict().items() if not torch.equal(w, weights[n])]
    assert len(changed) > 0.5 * len(weights)
    assert full_script.SETTINGS_NAME in {p.name for p in tmp_path.iterdir()}


def test_resumed_run_is_the_uninterrupted_one(train, tmp_path):
    """Bit for bit, whatever the family keeps between steps."""
    train(tmp_path / "one", max_train_steps=2)
    train(tmp_path / "two", max_train_steps=1)
    train(tmp_path / "two", max_train_steps=2, resume_from_checkpoint="latest")
    one, two = (load_file(tmp_path / name / LORA) for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
