"""What makes training fit a consumer's card: the estimate, quantised bases, selective checkpointing, the recipes."""

import functools
import logging
import math
import subprocess
import sys
from types import SimpleNamespace

import diffusers
import pytest
import torch
import torch._dynamo
import transformers
from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer
from safetensors.torch import load_file
from torch._dynamo.utils import counters

import train_dopsd_full as full
import train_dopsd_lora as script
from conftest import LORA, ROOT, draw, patch_velocity, save_base
from pipeline_dopsd import DOPSDZImagePipeline, family_of


sys.path.insert(0, str(ROOT / "examples" / "benchmarks"))

import memory  # noqa: E402
import step_cost  # noqa: E402


def bench(**changes):
    """Settings of `step_cost.Bench`, a Z-Image of 31 M parameters."""
    defaults = {"size": "mid", "rollout_steps": 2, "states_per_rollout": 2, "seed": 0, "rank": 16, "train_batch_size": 1, "mixed_precision": "no"}
    defaults |= {
        "gradient_checkpointing": False,
        "checkpointed_blocks": 1.0,
        "offloaded_blocks": 0.0,
        "quantization": None,
        "use_8bit_adam": False,
    }
    defaults |= {
        "lora_alpha": 16,
        "use_rslora": False,
        "lora_layers": None,
        "ema_decay": 0.9999,
        "loss_weighting": "velocity",
    }
    defaults |= {"gradient_accumulation_steps": 1, "attention_backend": None, "compile_blocks": False}
    return SimpleNamespace(**{**defaults, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"states_per_rollout": 1},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "checkpointed_blocks": 0.5},
        {"mixed_precision": "bf16"},
        {"mixed_precision": "bf16", "gradient_checkpointing": True},
        {"mixed_precision": "bf16", "gradient_checkpointing": True, "offloaded_blocks": 1.0},
    ],
    ids=["plain", "one_state", "checkpointing", "half", "bf16", "bf16_checkpointing", "bf16_offloading"],
)
def test_estimate_is_what_torch_allocates(changes):
    """A wrong estimate lets a run start that ends out of memory, or turns a user away whose card would do."""
    args = bench(**changes)
    real = step_cost.Bench(args)
    work = functools.partial(real.step, [0, 1][-args.states_per_rollout :])
    work()
    measured = step_cost.peak_bytes(work, torch.device("cpu"))
    with torch.device("meta"):
        config, side, tokens = step_cost.SIZES["mid"]
        transformer = diffusers.ZImageTransformer2DModel(**config).to(script.weight_dtype_of(args)).requires_grad_(False)
        noise = torch.empty(1, transformer.config.in_channels, side, side)
        contexts = [
            [{"prompt_embeds": torch.empty(n, config["cap_feat_dim"], dtype=transformer.dtype)}] for n in tokens
        ]
    estimate = memory.lora_bytes(memory.pipeline_of(DOPSDZImagePipeline, transformer), (noise, *contexts), args)
    trained = sum(p.numel() for p in real.parameters)
    # gradients and weights that visit are allocated within the step; other weights, teacher and optimiser stand before it
    visiting = estimate["weights"] - sum(p.nbytes for p in real.transformer.parameters() if not p.requires_grad)
    assert estimate["activations"] + 4 * trained + visiting == pytest.approx(measured, rel=0.1)
    assert (visiting > 0) == (args.offloaded_blocks > 0)
    states = sum(t.numel() * t.element_size() for s in real.optimizer.state.values() for t in s.values() if t.ndim)
    assert estimate["lora"] == 4 * trained * 3 + states


@pytest.mark.parametrize(
    "flags",
    [
        "--mixed_precision no",
        "--mixed_precision no --states_per_rollout 2",
        "--mixed_precision no --gradient_checkpointing",
        "--mixed_precision bf16 --states_per_rollout 2",
        "--mixed_precision bf16 --gradient_checkpointing",
        "--mixed_precision bf16 --gradient_checkpointing --checkpointed_blocks 0.5",
        "--mixed_precision bf16 --gradient_checkpointing --stochastic_rounding",
        "--mixed_precision bf16 --gradient_checkpointing --stochastic_rounding --fused_backward_pass --max_grad_norm 0",
    ],
)
def test_estimate_of_full_fine_tuning_is_what_torch_allocates(flags, tmp_path):
    """As for the LoRA; here a wrong estimate misses by tens of gigabytes."""
    needed = f"--pretrained_model_name_or_path base --instance_data_dir data --output_dir {tmp_path} --rollout_steps 2"
    args = full.parse_args([*needed.split(), *flags.split()])
    config, side, tokens = step_cost.SIZES["mid"]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)

    def build(device):
        """Pipeline and batch, in the dtype in which the weights compute."""
        dtype = full.weight_dtype_of(args)
        with torch.device(device):
            transformer = diffusers.ZImageTransformer2DModel(**config).to(dtype)
            contexts = [[{"prompt_embeds": torch.zeros(n, config["cap_feat_dim"], dtype=dtype)}] for n in tokens]
            batch = torch.zeros(1, transformer.config.in_channels, side, side), *contexts
        return DOPSDZImagePipeline(scheduler, None, None, None, transformer), batch

    accelerator = full.make_accelerator(args)
    estimate = full.estimate_full_memory(*build("meta"), args, accelerator)

    pipeline, batch = build("cpu")
    full.save_memory_and_time(pipeline.transformer, args)
    teacher = full.FullTeacher(pipeline.transformer, args, accelerator)
    full.make_trainable(pipeline, args)
    if args.fused_backward_pass:
        full.fuse_updates(pipeline.transformer.parameters(), SimpleNamespace(step=lambda: None))

    def step():
        pipeline.transformer.zero_grad()
        drawn = full.draw_states(args, 0, 0, 1)
        states = full.rollout(pipeline, pipeline.transformer, teacher, (*batch, drawn), args, accelerator)
        full.backward_each_state(states, pipeline.transformer, args, accelerator, True)

    measured = step_cost.peak_bytes(step, torch.device("cpu"))
    assert estimate["activations"] + estimate["gradients"] == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("script_of", ["train", "train_full"])
def test_start_shows_the_estimate(script_of, request, tmp_path, caplog):
    """A user learns in the first seconds of a run, not after an hour of encoding the next day, what it will take."""
    with caplog.at_level(logging.INFO):
        request.getfixturevalue(script_of)(tmp_path / "out", max_train_steps=1, rollout_steps=1)
    messages = [r.getMessage() for r in caplog.records]
    assert any("Peak memory by calculation: 0.0" in m and "activations" in m for m in messages)


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_share_of_checkpointed_blocks(student, flags, tmp_path, share):
    """Memory that is left is spent on speed; the gradient stays the same."""
    batch = student.batch()
    _, expected = student.backward(batch)
    args = script.parse_args(flags(tmp_path, "--gradient_checkpointing", checkpointed_blocks=share))
    script.save_memory_and_time(student.transformer, args)
    ran, blocks = [], [m for m in student.transformer.modules() if type(m).__name__ == "ZImageTransformerBlock"]
    for block in blocks:
        block.register_forward_pre_hook(lambda *_, block=block: ran.append(block))
    _, gradient = student.backward(batch, rollout_steps=4)
    torch.testing.assert_close(gradient, expected)
    # teacher and student once for each of 4 states, and again in the backward of what is recomputed
    assert len(ran) == 4 * (2 * len(blocks) + round(share * len(blocks)))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_quantised_base_trains_a_lora_in_fp32(train, base, tmp_path, monkeypatch, kind):
    """On a base of 8 bits the LoRA must learn, stay in fp32 and load on the base as it was."""
    from torchao.utils import TorchAOBaseTensor

    seen, loaded = [], script.load_for_training

    def recorded(*args):
        pipeline = loaded(*args)
        seen.append(type(pipeline.transformer.layers[0].attention.to_q.weight))
        return pipeline

    monkeypatch.setattr(script, "load_for_training", recorded)
    train(
        tmp_path / "out", "--gradient_checkpointing", quantization=kind, mixed_precision="bf16", max_train_steps=2,
        context_cache_dir=tmp_path / "cache",
    )  # fmt: skip
    assert issubclass(seen[0], TorchAOBaseTensor)
    weights = load_file(tmp_path / "out" / LORA)
    assert all(w.dtype == torch.float32 for w in weights.values())
    assert all((w != 0).any() for name, w in weights.items() if "lora_B" in name)
    pipe = diffusers.DiffusionPipeline.from_pretrained(base)
    pipe.load_lora_weights(tmp_path / "out")
    assert pipe("a red square", num_inference_steps=1, guidance_scale=0.0, height=32, width=32).images


def test_offloaded_blocks_train_the_same_lora(train, tmp_path, monkeypatch):
    """Weights that come and go must be there for the forward, the recomputation and the backward, and leave after each."""
    loaded, script_of = [], script.load_for_training
    monkeypatch.setattr(script, "load_for_training", lambda *a: loaded.append(script_of(*a)) or loaded[-1])
    run = functools.partial(train, max_train_steps=2, context_cache_dir=tmp_path / "cache")
    run(tmp_path / "here", "--gradient_checkpointing")
    run(tmp_path / "away", "--gradient_checkpointing", offloaded_blocks=0.5)
    here, away = (load_file(tmp_path / name / LORA) for name in ("here", "away"))
    assert here.keys() == away.keys() and all(torch.equal(here[name], away[name]) for name in here)
    blocks = script.repeated_blocks(loaded[-1].transformer)
    held = [sum(p.numel() for p in block.parameters() if not p.requires_grad) for block in blocks]
    half = math.ceil(len(blocks) / 2)
    assert not any(held[:half]) and all(held[half:])


@pytest.fixture
def nf4_of_small_layers(monkeypatch):
    """Without bitsandbytes' layout for newer CPUs, which takes rows of a multiple of 64 weights alone."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


@pytest.fixture
def nf4_anywhere(monkeypatch, nf4_of_small_layers):
    """bitsandbytes computes on a CPU, too; diffusers asks for a GPU, so its question and ours are left out."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(BnB4BitDiffusersQuantizer, "validate_environment", lambda *a, **k: None)
        monkeypatch.setattr(BnB4BitDiffusersQuantizer, "update_device_map", lambda *a: {"": "cpu"})
        monkeypatch.setattr(script, "check_quantization", lambda args: None)


def test_nf4_base_trains_a_lora(train, nf4_anywhere, tmp_path):
    """The setting for 12 GB."""
    train(tmp_path / "out", "--gradient_checkpointing", quantization="nf4", mixed_precision="bf16", max_train_steps=2)
    weights = load_file(tmp_path / "out" / LORA)
    assert all(w.dtype == torch.float32 for w in weights.values())
    assert all((w != 0).any() for name, w in weights.items() if "lora_B" in name)


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
def test_quantised_encoders_give_nearly_the_same_contexts(base, vlm, nf4_of_small_layers, kind):
    """Where the encoder alone fills the card; the VLM must read with the quantised layers, too, not hold its own."""
    contexts = []
    for quantization in (None, kind):
        pipeline = DOPSDZImagePipeline.from_pretrained(
            base, dtype=torch.bfloat16, quantization_config=script.quantization_config("text_encoder", quantization, transformers)
        )
        pipeline.load_multimodal_encoder(str(vlm))
        contexts.append(pipeline.encode_student(["a red square"]) + pipeline.encode_teacher(["a red square"], [draw("ellipse", "red")]))
    layer = pipeline.multimodal_encoder.model.language_model.layers[0].mlp.up_proj
    assert layer is pipeline.text_encoder.base_model.layers[0].mlp.up_proj
    for exact, coarse in zip(*contexts):
        exact, coarse = exact["prompt_embeds"].float(), coarse["prompt_embeds"].float()
        assert 0 < (exact - coarse).norm() < 0.25 * exact.norm()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_training_with_quantised_encoders(train_any, nf4_of_small_layers, tmp_path, kind):
    """A cache of contexts of another precision must not be taken for the one that was asked for."""
    run = functools.partial(train_any, mixed_precision="bf16", max_train_steps=1, context_cache_dir=tmp_path / "cache")
    run(tmp_path / "plain")
    count = len(list((tmp_path / "cache").iterdir()))
    run(tmp_path / "coarse", encoder_quantization=kind)
    assert len(list((tmp_path / "cache").iterdir())) == 2 * count


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"offloaded_blocks": 0.5}, ["--offloaded_blocks", "--gradient_checkpointing"]),
        ({"encoder_quantization": "int8"}, ["--encoder_quantization int8", "--mixed_precision bf16"]),
        ({"quantization": "int8"}, ["--quantization int8", "--mixed_precision bf16"]),
        ({"attention_backend": "flash"}, ["--attention_backend flash", "install"]),
        ({"checkpointed_blocks": 0}, ["--checkpointed_blocks"]),
    ],
)
def test_settings_that_cannot_work(train, tmp_path, monkeypatch, capsys, changes, words):
    """Found out after minutes of encoding, a missing package has cost those minutes."""
    monkeypatch.setattr(DOPSDZImagePipeline, "from_pretrained", lambda *a, **k: pytest.fail("weights were loaded"))
    with pytest.raises((ValueError, SystemExit)) as caught:
        train(tmp_path / "out", **changes)
    message = capsys.readouterr().err if caught.type is SystemExit else str(caught.value)
    assert all(word in message for word in words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU with bitsandbytes it works")
def test_nf4_without_a_gpu_is_refused(train, tmp_path):
    """bitsandbytes' error names neither the flag nor what to do."""
    with pytest.raises(ValueError, match="--quantization nf4 needs a GPU"):
        train(tmp_path / "out", quantization="nf4", mixed_precision="bf16")


@pytest.mark.parametrize(("gpu_gib", "chosen"), [(24, "24gb"), (13.1, "24gb"), (12.9, "16gb"), (5, None)])
def test_recipe_for_the_card(monkeypatch, capsys, gpu_gib, chosen):
    """A user with a card of another size learns which command to take, with room for CUDA itself."""
    peaks = iter([12, 8, 5])  # of the recipes for 24, 16 and 12 GB
    monkeypatch.setattr(memory, "lora_bytes", lambda *args: {"weights": next(peaks) * 2**30})
    memory.print_lora(SimpleNamespace(recipe="z_image_turbo_*", gpu_gib=gpu_gib), ["--rank", "8"])
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 6 and all("--rank 8" in row for row in rows[2:5])
    assert rows[5].endswith(f"z_image_turbo_{chosen}.sh" if chosen else "none of these")


def test_out_of_memory_names_flags_that_help(train_any, tmp_path, monkeypatch):
    """PyTorch's message has addresses and a link, and no flag of this script."""

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    patch_velocity(monkeypatch, DOPSDZImagePipeline, full)
    with pytest.raises(train_any.module.InputError) as caught:
        train_any(tmp_path / "out", validation_steps=0, train_batch_size=2)
    assert "CUDA out of memory" in str(caught.value) and "--gradient_checkpointing" in str(caught.value)
    assert str(caught.value).count(", ") == 2


def test_student_and_teacher_share_one_compiled_block(train, tmp_path, monkeypatch):
    """A compilation whenever the teacher's weights come in place would make every step take a minute."""
    compiled = DOPSDZImagePipeline.transformer_class.compile_repeated_blocks
    monkeypatch.setattr(
        DOPSDZImagePipeline.transformer_class,
        "compile_repeated_blocks",
        lambda self: compiled(self, backend="aot_eager"),
    )
    torch._dynamo.reset()
    counters.clear()
    graphs, velocity = [], DOPSDZImagePipeline.velocity

    def counted(self, *args):
        result = velocity(self, *args)
        graphs.append(counters["stats"]["unique_graphs"])
        return result

    patch_velocity(monkeypatch, DOPSDZImagePipeline, counted)
    train(tmp_path / "out", "--compile_blocks", max_train_steps=3, rollout_steps=2, states_per_rollout=2, validation_steps=0)
    assert 0 < graphs[1] == graphs[-1]  # all that is compiled is compiled in the first state


def test_vae_decodes_in_tiles(train_any, tmp_path, monkeypatch):
    """--enable_vae_tiling must reach the VAE."""
    tiled = []
    monkeypatch.setattr(DOPSDZImagePipeline.vae_class, "enable_tiling", lambda self: tiled.append(self))
    train_any(tmp_path / "out", "--enable_vae_tiling", max_train_steps=1, rollout_steps=1, validation_steps=1)
    assert len(tiled) == 1


@pytest.mark.parametrize("path", sorted(memory.RECIPES.glob("*.sh")), ids=lambda path: path.stem)
def test_recipes_fit_their_cards(path, tmp_path):
    """A recipe with a mistyped flag, or that is too large by calculation, fails on the card of whoever trusts it."""
    args = memory.recipe_args(path)
    assert args.resolution == 1024
    name = path.stem.rsplit("_", 1)[0]
    assert args.pretrained_model_name_or_path.endswith(memory.MODELS[name][0])
    # what the shell makes of the file is the command that was read from it
    (tmp_path / "accelerate").write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    (tmp_path / "accelerate").chmod(0o755)
    run = subprocess.run(
        ["sh", path, "my images", "out", "--seed", "7"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    words = run.stdout.splitlines()
    assert words[0] == "launch" and words[1].endswith("train_dopsd_lora.py")
    ran = script.parse_args(words[2:])
    assert (ran.instance_data_dir, ran.output_dir, ran.seed) == ("my images", "out", 7)
    assert {**vars(ran), "instance_data_dir": 0, "output_dir": 0, "context_cache_dir": 0, "seed": 0} == {
        **vars(args), "instance_data_dir": 0, "output_dir": 0, "context_cache_dir": 0, "seed": 0,
    }  # fmt: skip


def test_estimate_needs_no_weights(base, tokenizer, flags, tmp_path):
    """With configs alone the largest model is estimated on the smallest machine."""
    folder = tmp_path / "configs"
    save_base(folder, tokenizer)
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    args = script.parse_args(flags(tmp_path / "out", pretrained_model_name_or_path=folder, rank=4))
    pipeline = script.build_without_weights(family_of(str(folder)), args)
    assert pipeline.transformer.device.type == "meta" and script.find_lora_targets(pipeline, args)


def test_out_of_memory_while_encoding_names_flags_that_help(train_any, tmp_path, monkeypatch):
    """Flags of the training would not help where the encoder fills the card."""

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    monkeypatch.setattr(DOPSDZImagePipeline, "encode_teacher", full)
    with pytest.raises(train_any.module.InputError) as caught:
        train_any(tmp_path / "out", context_cache_dir=tmp_path / "cache")
    assert "--encoder_quantization int8" in str(caught.value) and "--gradient_checkpointing" not in str(caught.value)


def test_step_cost_prints_its_table(monkeypatch, capsys):
    """The command of RESULTS.md must run as it stands there."""
    monkeypatch.setattr(sys, "argv", ["step_cost.py", "--size", "tiny", "--rollout_steps", "1", "2", "--repetitions", "1"])
    step_cost.main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ") and "K" not in line]
    whole = ["step", "floor", "sft", "two-pass", "all"]
    assert [row[:3] for row in rows] == [
        *(["1", "1", name] for name in whole), *(["2", "2", name] for name in whole), ["2", "1", "step"], ["2", "1", "floor"]
    ]  # fmt: skip
    assert all(float(cell) > 0 for row in rows for cell in row[3:])


@pytest.mark.parametrize(("steps", "count", "expected"), [(4, 1, 1.5), (4, 2, 4 / 3), (4, 4, 0), (8, 1, 3.5)])
def test_step_cost_counts_ends_as_often_as_they_are_drawn(steps, count, expected):
    """The mean over the ends of a rollout would be that of other draws than a training has."""
    draws = step_cost.ends(steps, count)
    assert sum(share for _, share in draws) == pytest.approx(1)
    assert sum(share * (states[-1] + 1 - count) for states, share in draws) == pytest.approx(expected)
