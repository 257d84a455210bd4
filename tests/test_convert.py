"""examples/convert_lora.py: files of other trainers at equal strength, or a clear refusal."""

import json
import math
import re
import sys

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

import train_dopsd_lora
from conftest import LORA, ROOT


sys.path.insert(0, str(ROOT / "examples"))

import convert_lora  # noqa: E402


RANK, ALPHA = 4, 6.0


@pytest.fixture
def layers(family, base):
    """Layer -> (A, B) with the shapes of the tiny transformer, for every kind of layer that the LoRA has."""
    generator = torch.Generator().manual_seed(0)
    shapes = convert_lora.linear_shapes(convert_lora.family_of(base), base)
    names = {next(name for name in shapes if name.endswith(f".{kind}")) for kind in family.pipeline.lora_layers}
    random = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return {n: (random(RANK, shapes[n][1]), random(shapes[n][0], RANK)) for n in sorted(names)}


@pytest.fixture
def convert(base, tmp_path):
    """Runs the command on tensors in a file; returns the folder that it writes to."""

    def run(tensors, *flags, config=None, header=None):
        metadata = header and {"lora_adapter_metadata": json.dumps(header)}
        save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "old.safetensors", metadata)
        if config:
            (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        command = [
            "--pretrained_model_name_or_path",
            base,
            "--lora",
            tmp_path / "old.safetensors",
            "--output_dir",
            tmp_path / "new",
        ]
        convert_lora.main([*map(str, command), *flags])
        return tmp_path / "new"

    return run


def peft_keys(layers, prefix="base_model.model.", adapter=""):
    return {f"{prefix}{n}.lora_{s}{adapter}.weight": t for n, ab in layers.items() for s, t in zip("AB", ab)}


def assert_strength(base, folder, layers, scale):
    """What diffusers' loader adds to the weights is scale * B A."""
    pipeline = DiffusionPipeline.from_pretrained(base)
    before = {n: pipeline.transformer.get_submodule(n).weight.detach().clone() for n in layers}
    pipeline.load_lora_weights(folder)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    for name, (a, b) in layers.items():
        change = pipeline.transformer.get_submodule(name).weight.detach() - before[name]
        torch.testing.assert_close(change, scale * b @ a, rtol=1e-4, atol=1e-5)


@pytest.mark.families()
@pytest.mark.parametrize(
    ("prefix", "adapter", "config", "flags", "scale"),
    [
        ("base_model.model.", "", {"lora_alpha": ALPHA, "r": RANK}, [], ALPHA / RANK),
        ("", ".default", None, ["--lora_alpha", str(ALPHA)], ALPHA / RANK),
        ("transformer.", "", {"lora_alpha": ALPHA, "use_rslora": True}, [], ALPHA / math.sqrt(RANK)),
    ],
)
def test_peft_keys(base, layers, convert, prefix, adapter, config, flags, scale):
    """The public D-OPSD code saves such files, which neither diffusers nor ComfyUI loads for Z-Image."""
    folder = convert(peft_keys(layers, prefix, adapter), *flags, config=config)
    assert_strength(base, folder, layers, scale)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("beside", [None, {"lora_alpha": 1}])
def test_file_of_diffusers_has_the_strength_that_diffusers_gives_it(base, layers, convert, tmp_path, rslora, beside):
    """Its alpha stands in its header alone; another's beside it, or a guess, would run it at another strength."""
    header = {"transformer.lora_alpha": 2 * RANK, "transformer.r": RANK, "transformer.use_rslora": rslora}
    header |= {"transformer.target_modules": list(layers), "transformer.alpha_pattern": {}}
    folder = convert(peft_keys(layers, "transformer."), config=beside, header=header)
    scale = 2 * RANK / (math.sqrt(RANK) if rslora else RANK)
    assert_strength(base, tmp_path / "old.safetensors", layers, scale)
    assert_strength(base, folder, layers, scale)


@pytest.mark.families()
@pytest.mark.parametrize("alpha", [None, ALPHA])
def test_kohya_keys(base, layers, convert, alpha):
    """The most common form; without an alpha its strength is 1."""
    tensors = {}
    for name, (a, b) in layers.items():
        flat = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{flat}.lora_down.weight": a, f"{flat}.lora_up.weight": b}
        if alpha:
            tensors[f"{flat}.alpha"] = torch.tensor(alpha)
    folder = convert(tensors)
    assert_strength(base, folder, layers, (alpha or RANK) / RANK)
    assert not [key for key in load_file(folder / LORA) if "alpha" in key]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_file_has_the_permissions_of_the_umask(layers, convert, monkeypatch, mask):
    """A ComfyUI of another user could not read it."""
    monkeypatch.setattr(train_dopsd_lora, "UMASK", mask)
    written = convert(peft_keys(layers), "--lora_alpha", "4") / LORA
    assert written.stat().st_mode & 0o777 == 0o666 & ~mask


def test_half_precision_loses_no_strength(base, layers, convert):
    """A scale of 1.5 rounds in bf16, by more than the strength may differ."""
    half = {name: tuple(t.bfloat16() for t in ab) for name, ab in layers.items()}
    folder = convert(peft_keys(half), config={"lora_alpha": 1.5 * RANK})
    assert_strength(base, folder, {name: tuple(t.float() for t in ab) for name, ab in half.items()}, 1.5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: {**t, "text_encoder.layers.0.weight": torch.zeros(1)},
            "text_encoder.layers.0.weight is not understood",
        ),
        (lambda t: {re.sub(r"\.0\.", ".9.", n, count=1): x for n, x in t.items()}, ".9.attention.to_k"),
        (lambda t: {n: x for n, x in t.items() if "lora_B" not in n}, "has only A"),
        (lambda t: {n: (x[:, :8] if "lora_A" in n else x) for n, x in t.items()}, "the base's layer is"),
        (
            lambda t: {**t, **{n.replace(".weight", ".teacher.weight"): x.clone() for n, x in t.items()}},
            "several adapters",
        ),
        (lambda t: {f"lora_unet_{n}": x for n, x in t.items()}, "is not understood"),
        (lambda t: {}, "holds no weights"),
    ],
)
def test_what_is_not_understood_is_refused(layers, convert, tmp_path, change, words):
    """A key that is dropped in silence is a layer that is lost."""
    with pytest.raises(SystemExit) as caught:
        convert(change(peft_keys(layers)), config={"lora_alpha": ALPHA})
    assert str(caught.value).startswith("error: ") and words in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_alpha_must_be_known_and_no_file_is_overwritten(layers, convert, tmp_path):
    """A guess would run the LoRA at another strength; the converted file has the name that the original may have."""
    with pytest.raises(SystemExit, match="--lora_alpha"):
        convert(peft_keys(layers))
    # of another alpha, it would run at another strength
    with pytest.raises(SystemExit, match="leave out --lora_alpha"):
        convert(peft_keys(layers), "--lora_alpha", "4", config={"lora_alpha": ALPHA})
    with pytest.raises(SystemExit, match="leave out --lora_alpha"):
        convert(peft_keys(layers), "--lora_alpha", "4", header={"transformer.lora_alpha": ALPHA})
    with pytest.raises(SystemExit, match="lora_adapter_metadata in its header is no JSON object"):
        convert(peft_keys(layers), header=["x"])
    for kind in ("use_dora", "alpha_pattern"):
        with pytest.raises(SystemExit, match=f"{kind} of lora_adapter_metadata in its header"):
            convert(peft_keys(layers), header={"transformer.lora_alpha": ALPHA, f"transformer.{kind}": {"x": 1}})
        with pytest.raises(SystemExit, match=f"{kind} of adapter_config.json beside it"):
            convert(peft_keys(layers), config={"lora_alpha": ALPHA, kind: {"x": 1}})
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / LORA).write_text("kept")
    with pytest.raises(SystemExit, match=f"^error: --output_dir .*new holds {LORA}; choose another folder"):
        convert(peft_keys(layers), "--lora_alpha", "4")
    assert (tmp_path / "new" / LORA).read_text() == "kept"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--pretrained_model_name_or_path", "no//typo"], "--pretrained_model_name_or_path no//typo is no folder"),
        (["--lora", "typo.safetensors"], "--lora typo.safetensors: this is no file"),
        (["--lora", "{tmp}"], "--lora {tmp}: this is no file"),
        (["--output_dir", "{tmp}/file"], "--output_dir {tmp}/file cannot be written to; choose another folder"),
        (["--output_dir", "{tmp}/file/new"], "--output_dir {tmp}/file/new cannot be written to; choose another"),
    ],
)
def test_mistake_is_blamed_on_its_own_flag(layers, convert, tmp_path, words, told):
    """A mistyped base was said to be wrong with the LoRA's file, and a folder that is a file ended in a traceback."""
    (tmp_path / "file").write_text("kept")
    with pytest.raises(SystemExit) as caught:
        convert(peft_keys(layers), "--lora_alpha", "4", *(word.format(tmp=tmp_path) for word in words))
    assert str(caught.value).startswith(f"error: {told.format(tmp=tmp_path)}")
    assert (tmp_path / "file").read_text() == "kept"


def test_interrupted_conversion_leaves_no_torn_file(layers, convert, tmp_path, monkeypatch):
    """Half a file under the result's name would be loaded, and stand in the way of the next try."""
    write = convert_lora.apply_umask

    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert_lora, "apply_umask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(peft_keys(layers), "--lora_alpha", "4")
    assert not (tmp_path / "new" / LORA).exists()
    monkeypatch.setattr(convert_lora, "apply_umask", write)
    folder = convert(peft_keys(layers), "--lora_alpha", "4")
    assert [path.name for path in folder.iterdir()] == [LORA]
