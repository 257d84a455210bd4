"""Krea 2: what it has and no other family."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import train_dopsd_lora as script
from conftest import draw
from families import CAPTIONS
from pipeline_dopsd import DOPSDKrea2Pipeline


pytestmark = pytest.mark.families("krea")
PROMPTS = CAPTIONS["a"]
RED, TALL = draw("rectangle", "red", (32, 32)), draw("ellipse", "blue", (32, 64))


def test_student_contexts_are_the_real_tokens_of_the_stock_pipelines(pipeline, stock):
    """Three features per token, the chat's end behind the prompt: other ones would be of no use in inference."""
    embeds, masks = stock.encode_prompt(PROMPTS)
    assert embeds.shape == (2, 512, 3, 64)
    for prompt, ours, theirs, mask in zip(PROMPTS, pipeline.encode_student(PROMPTS), embeds, masks, strict=True):
        assert torch.equal(ours["prompt_embeds"], theirs[mask])
        assert len(ours["prompt_embeds"]) == len(pipeline.tokenizer(prompt).input_ids) + 5


@pytest.mark.parametrize("other", [[], PROMPTS[1:]], ids=["alone", "in a batch"])
def test_padding_changes_no_velocity(pipeline, stock, other):
    """Contexts are stored without the padding that inference has, a hundredth of the bytes for a short prompt."""
    latents, time = pipeline.initial_noise(32, 48, torch.Generator().manual_seed(0)), torch.tensor(700.0)
    embeds, masks = stock.encode_prompt(PROMPTS[:1])
    with torch.no_grad():
        ours = pipeline.velocity(
            pipeline.transformer,
            latents.repeat(1 + len(other), 1, 1, 1),
            time,
            pipeline.encode_student(PROMPTS[:1] + other),
        )[:1]
        theirs = pipeline.transformer(
            pipeline._pack_latents(latents, *latents.shape), embeds, time[None] / 1000, pipeline.prepare_position_ids(512, 4, 6, "cpu"),
            encoder_attention_mask=masks,
        ).sample  # fmt: skip
    torch.testing.assert_close(ours, pipeline._unpack_latents(theirs, 32, 48)[:, :, 0], rtol=1e-4, atol=1e-5)
    assert ours.std() > 0.1


def test_cache_is_renewed_when_other_layers_are_read(base, flags, tmp_path):
    """Which layers a context holds stands in model_index.json alone."""
    other = shutil.copytree(base, tmp_path / "base")
    index = json.loads((other / "model_index.json").read_text()) | {"text_encoder_select_layers": [0, 1, 2]}
    (other / "model_index.json").write_text(json.dumps(index))
    row, paths = {"image_hash": "0", "bucket": [32, 32], "reference_hashes": []}, []
    for folder in (base, other):
        args = script.parse_args(flags(tmp_path / "out", pretrained_model_name_or_path=folder))
        script.resolve_arguments(DOPSDKrea2Pipeline, args)
        paths.append(script.ContextCache(DOPSDKrea2Pipeline, args).paths(row, row, "x"))
    assert not set(paths[0]) & set(paths[1])


def test_image_tokens_stand_at_rows_and_columns(pipeline, encoder, monkeypatch):
    """At the positions of text, or shifted by the padding of a batch, the text encoder would see scattered patches."""
    rotary, seen = pipeline.text_encoder.language_model.rotary_emb, []
    rotary.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    pipeline.encode_teacher([PROMPTS[1], PROMPTS[0]], [RED, TALL])
    ((_, long, short),) = (axes.unbind(1) for axes in [torch.cat([torch.zeros_like(seen[0][:, :1]), seen[0]], dim=1)])
    # the chat's 34 tokens, <|vision_start|>, 2 x 2 or 4 x 2 patches merged two by two, <|vision_end|>, the prompt, 5
    # tokens
    assert long[:, 34:40].tolist() == [[34, 35, 35, 35, 35, 37], [34, 35, 35, 36, 36, 37], [34, 35, 36, 35, 36, 37]]
    assert short[:, 34:45].tolist() == [
        [34, *[35] * 8, 39, 40], [34, 35, 35, 36, 36, 37, 37, 38, 38, 39, 40], [34, *[35, 36] * 4, 39, 40]
    ]  # fmt: skip


def test_vision_part_is_that_of_the_text_encoder(pipeline, vlm, tmp_path):
    """Nothing of the VLM's gigabytes is read, so that none need be fetched: its image processor is enough."""
    shutil.copy(vlm / "preprocessor_config.json", tmp_path)
    pipeline.load_multimodal_encoder(str(tmp_path))
    assert pipeline.multimodal_encoder.model is pipeline.text_encoder


def test_training_reads_the_image_processor_alone(train, vlm, tmp_path):
    """As above, for a whole run; a changed processor makes other contexts."""
    cache = tmp_path / "cache"
    run = {"max_train_steps": 1, "rollout_steps": 1, "context_cache_dir": tmp_path / "cache"}
    (tmp_path / "processor").mkdir()
    shutil.copy(vlm / "preprocessor_config.json", tmp_path / "processor")
    train(tmp_path / "one", vlm_model_name_or_path=tmp_path / "processor", **run)
    before = set(cache.glob("*.safetensors"))
    path = tmp_path / "processor" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_mean": [0.4, 0.4, 0.4]}))
    train(tmp_path / "two", vlm_model_name_or_path=tmp_path / "processor", **run)
    added = set(cache.glob("*.safetensors")) - before
    assert 0 < len(added) < len(before)  # the teacher's; the student's stay


def test_image_processor_of_another_kind_is_refused_before_weights_load(train, vlm, tmp_path, monkeypatch):
    """Patches of another size would be cut into the text encoder's, each a scattered picture."""
    monkeypatch.setattr("diffusers.ModelMixin.from_pretrained", lambda *a, **k: pytest.fail("weights were loaded"))
    config = json.loads((vlm / "preprocessor_config.json").read_text()) | {"patch_size": 7}
    (tmp_path / "vlm").mkdir()
    (tmp_path / "vlm" / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="--vlm_model_name_or_path .* patches of 7 pixels, not 8"):
        train(tmp_path / "out", vlm_model_name_or_path=tmp_path / "vlm")


def test_text_encoder_without_its_vision_part_is_an_error(base, vlm, tmp_path):
    """Programs of text alone have no use for it; transformers would make up weights, and the teacher be shown
    noise."""
    shutil.copytree(base, tmp_path / "base")
    file = tmp_path / "base" / "text_encoder" / "model.safetensors"
    save_file({n: w for n, w in load_file(file).items() if "visual.blocks.1." not in n}, file, {"format": "pt"})
    pipeline = DOPSDKrea2Pipeline.from_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="lacks weights of its vision part: visual.blocks.1"):
        pipeline.load_multimodal_encoder(str(vlm))


def test_grid_is_the_same_for_all_sizes(pipeline):
    """The stock scheduler's shift follows the resolution, of undistilled checkpoints alone."""
    one, other = (pipeline.few_step_grid(8, torch.zeros(1, 4, side // 4, side // 4)) / 1000 for side in (512, 1024))
    u, shift = torch.linspace(1, 1 / 8, 8), torch.tensor(1.15).exp()
    torch.testing.assert_close(one, shift * u / (1 + (shift - 1) * u), rtol=0, atol=1e-5)
    assert torch.equal(one, other)


def test_lora_may_be_on_text_fusion_alone(pipeline):
    """Through it, text and image reach the network: on the miniature of Z-Image such layers kept most of the rest."""
    found = pipeline.lora_targets(pipeline.transformer, ["text_fusion.layerwise_blocks", "text_fusion.refiner_blocks"])
    assert len(found) == 2 * 8


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_vision_part_is_not_quantised(base, monkeypatch, kind):
    """It is a tenth of the encoder and what the pictures come in through; the memory estimate counts it whole."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    config = script.quantization_config("text_encoder", kind, transformers)
    coarse, exact = (
        DOPSDKrea2Pipeline.from_pretrained(
            base, dtype=torch.bfloat16, transformer=None, quantization_config=given
        ).text_encoder
        for given in (config, None)
    )
    assert all(
        torch.equal(w, exact.get_parameter(name))
        for name, w in coarse.named_parameters()
        if name.startswith("visual.")
    )
    layer = "language_model.layers.0.mlp.up_proj.weight"
    assert type(coarse.get_parameter(layer)) is not type(exact.get_parameter(layer))
