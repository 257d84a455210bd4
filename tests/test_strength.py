"""One file, one strength: in the model that was trained, in diffusers and in ComfyUI."""

import pytest
import torch
from accelerate import PartialState
from diffusers import ZImagePipeline
from safetensors.torch import load_file

import train_dopsd_lora as script
from conftest import LORA
from families import save_z_image
from pipeline_dopsd import DOPSDZImagePipeline


def deltas(pipeline, adapter):
    """Layer -> the change of its weight that a PEFT adapter makes."""
    modules = pipeline.transformer.named_modules()
    return {n: m.get_delta_weight(adapter).detach() for n, m in modules if hasattr(m, "get_delta_weight")}


@pytest.fixture
def save(base, flags, tmp_path):
    """Saves a LoRA of random weights as the script does; returns its folder and what it does to the weights in training."""

    def run(name="lora", seed=0, switches=(), **changes):
        PartialState(cpu=True)  # the script's logger asks for it
        args = script.parse_args(flags(tmp_path / name, *switches, **changes))
        pipeline = DOPSDZImagePipeline.from_pretrained(base)
        pipeline.transformer.requires_grad_(False)
        targets = script.find_lora_targets(pipeline, args)
        script.add_lora(pipeline, targets, args)
        generator = torch.Generator().manual_seed(seed)
        for parameter in pipeline.transformer.parameters():
            if parameter.requires_grad:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        script.save_lora(pipeline, pipeline.transformer, targets, args, args.output_dir)
        return tmp_path / name, deltas(pipeline, "default")

    return run


def comfyui_deltas(state, layers, dim):
    """Layer of ComfyUI's Z-Image -> the change of its weight, by the rules of ComfyUI's LoRA loader.

    A key is `transformer.` and diffusers' name of the layer. q, k and v are rows of one matrix `qkv`; to_out.0 is called `out`.
    The strength is alpha / rank with the alpha of the key `LAYER.alpha`, or 1 without such a key; metadata is not read.
    """
    changes, read = {}, set()
    for layer in layers:
        keys = [f"transformer.{layer}.lora_{side}.weight" for side in "AB"]
        if keys[0] not in state:
            continue
        down, up = (state[key].float() for key in keys)
        alpha = state.get(f"transformer.{layer}.alpha")
        change = up @ down * (1.0 if alpha is None else alpha.item() / down.shape[0])
        read |= {*keys, f"transformer.{layer}.alpha"}
        block, _, kind = layer.partition(".attention.")
        if kind in ("to_q", "to_k", "to_v"):
            whole = changes.setdefault(f"{block}.attention.qkv", torch.zeros(3 * dim, dim))
            whole[dim * "qkv".index(kind[-1]) :][:dim] += change
        else:
            changes[layer.replace("attention.to_out.0", "attention.out")] = change
    assert state.keys() <= read, "keys that ComfyUI does not know"
    return changes


@pytest.mark.parametrize(("alpha", "switches"), [(4, []), (6, []), (6, ["--use_rslora"])])
def test_three_readers_agree(save, base, alpha, switches):
    """A LoRA at half or double strength looks like one that was trained too little or too long."""
    folder, trained = save(rank=4, lora_alpha=alpha, switches=switches)
    pipeline = ZImagePipeline.from_pretrained(base)
    pipeline.load_lora_weights(folder, adapter_name="lora")
    loaded = deltas(pipeline, "lora")
    state = load_file(folder / LORA)
    folded = torch.cat([weight.flatten() for key, weight in state.items() if ".lora_B." in key]).std().item()
    assert folded == pytest.approx(0.1 * alpha / (2 if switches else 4), rel=0.05)
    comfyui = comfyui_deltas(state, trained, pipeline.transformer.config.dim)
    assert trained.keys() == loaded.keys() and len(trained) == 28
    for name, change in trained.items():
        block, _, kind = name.partition(".attention.")
        if kind in ("to_q", "to_k", "to_v"):
            dim = pipeline.transformer.config.dim
            ours = comfyui[f"{block}.attention.qkv"][dim * "qkv".index(kind[-1]) :][:dim]
        else:
            ours = comfyui[name.replace("attention.to_out.0", "attention.out")]
        for other in (loaded[name], ours):
            assert (other - change).norm() <= 1e-4 * change.norm()


def test_two_loras_scale_and_fuse(save, base):
    """What users do with a LoRA beyond loading it; each has its own weights and alpha."""
    (one, first), (two, second) = save("one", rank=4, lora_alpha=6), save("two", seed=1, rank=2, lora_alpha=2)
    pipeline = DOPSDZImagePipeline.from_pretrained(base)
    before = {n: w.clone() for n, w in pipeline.transformer.state_dict().items()}
    pipeline.load_lora_weights(one, adapter_name="one")
    pipeline.load_lora_weights(two, adapter_name="two")
    pipeline.set_adapters(["one", "two"], [0.5, 2.0])
    pipeline.fuse_lora(adapter_names=["one", "two"])
    pipeline.unload_lora_weights()
    after = pipeline.transformer.state_dict()
    for name in first:
        expected = 0.5 * first[name] + 2.0 * second[name]
        torch.testing.assert_close(after[f"{name}.weight"] - before[f"{name}.weight"], expected, rtol=1e-4, atol=1e-5)


def test_base_of_another_size_is_refused(save, tokenizer, tmp_path):
    """One sentence in place of a list of hundreds of shapes."""
    folder, _ = save()
    save_z_image(tmp_path / "wide", tokenizer, dim=96)
    pipeline = DOPSDZImagePipeline.from_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match="trained on another base"):
        pipeline.load_lora_weights(folder)
