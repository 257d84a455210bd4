"""One file, one strength: in the model that was trained, in diffusers and in ComfyUI."""

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file

import train_dopsd_lora as script
from conftest import LORA


pytestmark = pytest.mark.families()


def deltas(pipeline, adapter):
    """Layer -> the change of its weight that a PEFT adapter makes."""
    modules = pipeline.transformer.named_modules()
    return {n: m.get_delta_weight(adapter).detach() for n, m in modules if hasattr(m, "get_delta_weight")}


@pytest.fixture
def save(family, base, flags, tmp_path):
    """Saves a LoRA of random weights as the script does; returns its folder and what it does to the weights in
    training."""

    def run(name="lora", seed=0, switches=(), **changes):
        PartialState(cpu=True)  # the script's logger asks for it
        args = script.parse_args(flags(tmp_path / name, *switches, **changes))
        pipeline = family.pipeline.from_pretrained(base)
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


def comfyui_deltas(state, shapes, place):
    """Matrix of ComfyUI's model -> the change of it, by the rules of ComfyUI's LoRA loader.

    A key is `transformer.` and diffusers' name of the layer, for which `place` gives ComfyUI's matrix and rows. The
    strength is alpha / rank with the alpha of the key `LAYER.alpha`, or 1 without such a key; metadata is not read.
    """
    changes, read = {}, set()
    for layer, (rows, columns) in shapes.items():
        keys = [f"transformer.{layer}.lora_{side}.weight" for side in "AB"]
        if keys[0] not in state:
            continue
        down, up = (state[key].float() for key in keys)
        alpha = state.get(f"transformer.{layer}.alpha")
        read |= {*keys, f"transformer.{layer}.alpha"}
        name, part = place(layer)
        whole = changes.setdefault(name, torch.zeros(rows if part == slice(None) else 3 * rows, columns))
        whole[part] += up @ down * (1.0 if alpha is None else alpha.item() / down.shape[0])
    assert state.keys() <= read, "keys that ComfyUI does not know"
    return changes


@pytest.mark.parametrize(("alpha", "switches"), [(4, []), (6, []), (6, ["--use_rslora"])])
def test_three_readers_agree(family, save, base, alpha, switches):
    """A LoRA at half or double strength looks like one that was trained too little or too long."""
    folder, trained = save(rank=4, lora_alpha=alpha, switches=switches)
    pipeline = family.stock.from_pretrained(base)
    pipeline.load_lora_weights(folder, adapter_name="lora")
    loaded = deltas(pipeline, "lora")
    state = load_file(folder / LORA)
    folded = torch.cat([weight.flatten() for key, weight in state.items() if ".lora_B." in key]).std().item()
    assert folded == pytest.approx(0.1 * alpha / (2 if switches else 4), rel=0.05)
    assert trained.keys() == loaded.keys() and len(trained) == family.lora_layers
    comfyui = comfyui_deltas(state, {name: change.shape for name, change in trained.items()}, family.in_comfyui)
    for name, change in trained.items():
        matrix, rows = family.in_comfyui(name)
        for other in (loaded[name], comfyui[matrix][rows]):
            assert (other - change).norm() <= 1e-4 * change.norm()


def test_two_loras_scale_and_fuse(family, save, base):
    """What users do with a LoRA beyond loading it; each has its own weights and alpha."""
    (one, first), (two, second) = save("one", rank=4, lora_alpha=6), save("two", seed=1, rank=2, lora_alpha=2)
    pipeline = family.pipeline.from_pretrained(base)
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


def test_base_of_another_size_is_refused(family, save, tokenizer, tmp_path):
    """One sentence in place of a list of hundreds of shapes."""
    folder, _ = save()
    family.save(tmp_path / "wide", tokenizer, dim=96)
    pipeline = family.pipeline.from_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match="trained on another base"):
        pipeline.load_lora_weights(folder)
