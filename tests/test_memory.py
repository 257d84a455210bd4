"""What makes training fit a consumer's card: the estimate, quantised bases, selective checkpointing, the recipes."""

import functools
import json
import math
import shutil
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
from conftest import LORA, ROOT, draw, patch_velocity
from pipeline_dopsd import DOPSDZImagePipeline


sys.path.insert(0, str(ROOT / "examples" / "benchmarks"))

import memory  # noqa: E402
import step_cost  # noqa: E402


def bench(**changes):
    """Settings of `step_cost.Bench`, a Z-Image of 31 M parameters."""
    defaults = {
        "size": "mid",
        "rollout_steps": 2,
        "states_per_rollout": 2,
        "seed": 0,
        "rank": 16,
        "train_batch_size": 1,
        "mixed_precision": "no",
    }
    defaults |= {
        "gradient_checkpointing": False,
        "checkpointed_blocks": 1.0,
        "offloaded_blocks": 0.0,
        "quantization": None,
        "optimizer": "adamw",
    }
    defaults |= {
        "lora_alpha": 16,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "lora_layers": None,
        "ema_decay": 0.9999,
        "loss_weighting": "velocity",
    }
    defaults |= {"gradient_accumulation_steps": 1, "compile_blocks": False}
    return SimpleNamespace(**{**defaults, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"states_per_rollout": 1},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "checkpointed_blocks": 0.5},
        # a CPU takes more than a minute for each of these
        pytest.param({"mixed_precision": "bf16"}, marks=pytest.mark.slow),
        pytest.param({"mixed_precision": "bf16", "gradient_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param(
            {"mixed_precision": "bf16", "gradient_checkpointing": True, "offloaded_blocks": 1.0},
            marks=pytest.mark.slow,
        ),
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
        transformer = (
            diffusers.ZImageTransformer2DModel(**config).to(script.weight_dtype_of(args)).requires_grad_(False)
        )
        noise = torch.empty(1, transformer.config.in_channels, side, side)
        contexts = [
            [{"prompt_embeds": torch.empty(n, config["cap_feat_dim"], dtype=transformer.dtype)}] for n in tokens
        ]
    estimate = memory.lora_bytes(memory.pipeline_of(DOPSDZImagePipeline, transformer), (noise, *contexts), args)
    trained = sum(p.numel() for p in real.parameters)
    # gradients and weights that visit are allocated within the step; other weights, teacher and optimiser stand before
    # it
    visiting = estimate["weights"] - sum(p.nbytes for p in real.transformer.parameters() if not p.requires_grad)
    assert estimate["activations"] + 4 * trained + visiting == pytest.approx(measured, rel=0.1)
    assert (visiting > 0) == (args.offloaded_blocks > 0)
    states = sum(t.numel() * t.element_size() for s in real.optimizer.state.values() for t in s.values() if t.ndim)
    assert estimate["lora"] == 4 * trained * 3 + states


@pytest.mark.families()
@pytest.mark.parametrize("switches", [[], ["--gradient_checkpointing"]], ids=["plain", "checkpointing"])
def test_estimate_is_what_torch_allocates_of_every_family(pipeline, student, flags, tmp_path, switches):
    """Above, one family at length; here, that nothing which another one computes is left out."""
    args = script.parse_args(flags(tmp_path, *switches, rollout_steps=1, rank=4))
    script.save_memory_and_time(student.transformer, args)
    noise, *contexts = batch = student.batch(1, 256, 256)
    work = functools.partial(student.backward, batch, 1)
    work()
    measured = step_cost.peak_bytes(work, torch.device("cpu"))
    with torch.device("meta"):
        transformer = pipeline.transformer_class.from_config(pipeline.transformer.config).requires_grad_(False)
    planned = memory.pipeline_of(type(pipeline), transformer)
    planned.vae_scale_factor = pipeline.vae_scale_factor
    on_meta = noise.to("meta"), *([{n: t.to("meta") for n, t in c.items()} for c in several] for several in contexts)
    estimate = memory.lora_bytes(planned, on_meta, args)
    assert estimate["activations"] + 4 * sum(p.numel() for p in student.parameters) == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    "flags",
    [
        "--mixed_precision no",
        "--mixed_precision no --states_per_rollout 2",
        "--mixed_precision no --gradient_checkpointing",
        pytest.param("--mixed_precision bf16 --states_per_rollout 2", marks=pytest.mark.slow),
        pytest.param("--mixed_precision bf16 --gradient_checkpointing", marks=pytest.mark.slow),
        pytest.param(
            "--mixed_precision bf16 --gradient_checkpointing --checkpointed_blocks 0.5", marks=pytest.mark.slow
        ),
        pytest.param("--mixed_precision bf16 --gradient_checkpointing --stochastic_rounding", marks=pytest.mark.slow),
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
    estimate = memory.full_bytes(*build("meta"), args)

    pipeline, batch = build("cpu")
    full.save_memory_and_time(pipeline.transformer, args)
    teacher = full.FullTeacher(pipeline.transformer, args, accelerator)
    full.make_trainable(pipeline, args)
    if args.fused_backward_pass:
        full.fuse_updates(pipeline.transformer.parameters(), SimpleNamespace(step=lambda: None))

    def step():
        pipeline.transformer.zero_grad()
        drawn = full.draw_states(args, range(args.train_batch_size))
        states = full.rollout(pipeline, pipeline.transformer, teacher, (*batch, drawn), args, accelerator)
        full.backward_each_state(states, pipeline.transformer, args, accelerator, True)

    measured = step_cost.peak_bytes(step, torch.device("cpu"))
    assert estimate["activations"] + estimate["gradients"] == pytest.approx(measured, rel=0.1)


@pytest.mark.families()
@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_share_of_checkpointed_blocks(student, flags, tmp_path, share):
    """Memory that is left is spent on speed; the gradient stays the same."""
    batch = student.batch()
    _, expected = student.backward(batch)
    args = script.parse_args(flags(tmp_path, "--gradient_checkpointing", checkpointed_blocks=share))
    script.save_memory_and_time(student.transformer, args)
    ran, blocks = [], script.repeated_blocks(student.transformer)
    for block in blocks:
        block.register_forward_pre_hook(lambda *_, block=block: ran.append(block))
    _, gradient = student.backward(batch, rollout_steps=4)
    torch.testing.assert_close(gradient, expected)
    # teacher and student once for each of 4 states, and again in the backward of what is recomputed
    assert len(ran) == 4 * (2 * len(blocks) + math.ceil(share * len(blocks)))


@pytest.mark.families()
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_quantised_base_trains_a_lora_in_fp32(family, train, base, tmp_path, monkeypatch, kind):
    """On a base of 8 bits the LoRA must learn, stay in fp32 and load on the base as it was."""
    from torchao.utils import TorchAOBaseTensor

    seen, loaded = [], script.load_for_training

    def recorded(*args):
        pipeline = loaded(*args)
        seen.append(
            type(pipeline.transformer.get_submodule(family.pipeline.lora_targets(pipeline.transformer)[0]).weight)
        )
        return pipeline

    monkeypatch.setattr(script, "load_for_training", recorded)
    train(tmp_path / "out", "--gradient_checkpointing", quantization=kind, mixed_precision="bf16", max_train_steps=2)
    assert issubclass(seen[0], TorchAOBaseTensor)
    weights = load_file(tmp_path / "out" / LORA)
    assert all(w.dtype == torch.float32 for w in weights.values())
    assert all((w != 0).any() for name, w in weights.items() if "lora_B" in name)
    pipe = diffusers.DiffusionPipeline.from_pretrained(base)
    pipe.load_lora_weights(tmp_path / "out")
    assert pipe(
        prompt="a red square", num_inference_steps=1, guidance_scale=family.guidance_scale, height=32, width=32
    ).images


@pytest.mark.families()
def test_offloaded_blocks_train_the_same_lora(train, tmp_path, monkeypatch):
    """Weights that come and go must be there for the forward, the recomputation and the backward, and leave after
    each."""
    loaded, script_of = [], script.load_for_training
    monkeypatch.setattr(script, "load_for_training", lambda *a: loaded.append(script_of(*a)) or loaded[-1])
    train(tmp_path / "here", "--gradient_checkpointing", max_train_steps=2)
    train(tmp_path / "away", "--gradient_checkpointing", max_train_steps=2, offloaded_blocks=0.5)
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
        monkeypatch.setattr(script, "check_packages", lambda args: None)


@pytest.mark.families()
def test_nf4_base_trains_a_lora(train, nf4_anywhere, tmp_path):
    """The setting for 12 GB."""
    train(tmp_path / "out", "--gradient_checkpointing", quantization="nf4", mixed_precision="bf16", max_train_steps=2)
    weights = load_file(tmp_path / "out" / LORA)
    assert all(w.dtype == torch.float32 for w in weights.values())
    assert all((w != 0).any() for name, w in weights.items() if "lora_B" in name)


@pytest.mark.families()
@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
def test_quantised_encoders_give_nearly_the_same_contexts(family, base, vlm, nf4_of_small_layers, kind):
    """Where the encoder alone fills the card; the VLM must read with the quantised layers, too, not hold its own."""
    contexts = []
    for quantization in (None, kind):
        pipeline = family.pipeline.from_pretrained(
            base,
            dtype=torch.bfloat16,
            quantization_config=script.quantization_config("text_encoder", quantization, transformers),
        )
        pipeline.load_multimodal_encoder(str(vlm))
        contexts.append(
            pipeline.encode_student(["a red square"])
            + pipeline.encode_teacher(["a red square"], [draw("ellipse", "red")])
        )
    layer = pipeline.multimodal_encoder.model.language_model.layers[0].mlp.up_proj
    assert type(layer) is not torch.nn.Linear or type(layer.weight) is not torch.nn.Parameter
    assert any(layer is own for own in pipeline.text_encoder.modules())
    for exact, coarse in zip(*contexts):
        exact, coarse = exact["prompt_embeds"].float(), coarse["prompt_embeds"].float()
        assert 0 < (exact - coarse).norm() < 0.5 * exact.norm()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_training_with_quantised_encoders(train_any, nf4_of_small_layers, tmp_path, kind):
    """A cache of contexts of another precision must not be taken for the one that was asked for."""
    run = functools.partial(train_any, mixed_precision="bf16", max_train_steps=1, context_cache_dir=tmp_path / "cache")
    run(tmp_path / "plain")
    count = len(list((tmp_path / "cache").glob("*.safetensors")))
    run(tmp_path / "coarse", encoder_quantization=kind)
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2 * count


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"offloaded_blocks": 0.5}, ["--offloaded_blocks", "--gradient_checkpointing"]),
        ({"encoder_quantization": "int8"}, ["--encoder_quantization int8", "--mixed_precision bf16"]),
        ({"quantization": "int8"}, ["--quantization int8", "--mixed_precision bf16"]),
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


@pytest.mark.parametrize(
    ("flags", "shown"),
    [("lora --recipe z_image_turbo_12gb", "none of these"), ("full", "none of these"), ("encoders", "none of these"),
     ("command {script} {flags}", "Cheapest remedies: --gradient_checkpointing")],
)  # fmt: skip
def test_cuda_itself_is_counted_for_every_table(monkeypatch, capsys, tmp_path, flags, shown):
    """What fills a card to the last byte by calculation does not run on it."""
    for name in ("lora_bytes", "full_bytes"):
        monkeypatch.setattr(memory, name, lambda *args: {"weights": 10 * 2**30, "activations": 0})
    monkeypatch.setattr(memory, "encoder_bytes", lambda *args: 10 * 2**30)
    monkeypatch.setattr(memory, "planned", lambda *args: (SimpleNamespace(transformer=torch.nn.Linear(1, 1)), None))
    monkeypatch.setattr(memory, "planned_from_configs", lambda args: (None, None))
    words = {
        "script": "train_dopsd_full.py",
        "flags": f"--pretrained_model_name_or_path x --dataset_name x --output_dir {tmp_path}",
    }
    for gpu_gib, fitting in ((10 + memory.CUDA_GIB - 0.1, False), (10 + memory.CUDA_GIB, True)):
        run_memory(monkeypatch, f"{flags.format(**words)} --gpu_gib {gpu_gib}")
        assert (shown in capsys.readouterr().out) != fitting


def run_memory(monkeypatch, line):
    monkeypatch.setattr(sys, "argv", ["memory.py", *line.split()])
    memory.main()


@pytest.fixture
def small_recipe(monkeypatch, base, tmp_path):
    """The recipe for Z-Image-Turbo on 24 GB, of the tests' tiny model; returns the flags of its command."""
    shutil.copytree(base, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    base = tmp_path / "base"
    vae = json.loads((base / "vae" / "config.json").read_text())  # eight pixels for a latent, as in the real models
    vae |= {name: 4 * vae[name][:1] for name in ("block_out_channels", "down_block_types", "up_block_types")}
    (base / "vae" / "config.json").write_text(json.dumps(vae))
    config = {
        n: v
        for n, v in DOPSDZImagePipeline.transformer_class.load_config(base, subfolder="transformer").items()
        if n[0] != "_"
    }
    monkeypatch.setitem(memory.MODELS, "z_image_turbo", ("tiny", DOPSDZImagePipeline, config, None))
    monkeypatch.setattr(memory, "TEXT_TOKENS", 20)
    text = (memory.RECIPES / "z_image_turbo_24gb.sh").read_text().replace("Tongyi-MAI/Z-Image-Turbo", str(base))
    (tmp_path / "z_image_turbo_24gb.sh").write_text(text)
    monkeypatch.setattr(memory, "RECIPES", tmp_path)
    command = text.split('train_dopsd_lora.py"', 1)[1].replace("\\\n", " ")
    return (
        command.replace('"$images"', "images").replace('"$output"', str(tmp_path / "out")).replace('"$@"', "").strip()
    )


def peaks_of(table):
    """The bytes by kind in the last row of a table, in GiB."""
    row = [line for line in table.splitlines() if line.startswith("| ")][-1]
    return [float(cell) for cell in row.strip("| ").split(" | ")[-4:]]


@pytest.mark.parametrize(
    "more", ["--resolution 512", "--resolution 512 --train_batch_size 2", "--resolution 256 --mixed_precision no"]
)
def test_command_and_recipe_agree(monkeypatch, capsys, small_recipe, tmp_path, more):
    """Two answers to one question; and a command must be answered from configs alone, without data, and write
    nothing."""
    monkeypatch.setattr(memory, "CUDA_GIB", 0.0)
    exact = memory.lora_bytes
    # GiB with digits
    monkeypatch.setattr(memory, "lora_bytes", lambda *args: {n: 1000 * size for n, size in exact(*args).items()})
    run_memory(monkeypatch, f"lora {more}")
    by_recipe = peaks_of(capsys.readouterr().out)
    run_memory(monkeypatch, f"command train_dopsd_lora.py {small_recipe} {more} --gpu_gib 1000")
    text = capsys.readouterr().out
    assert by_recipe == pytest.approx(peaks_of(text), abs=0.06) and by_recipe[-1] > 1
    assert "It fits 1000.0 GiB" in text and not (tmp_path / "out").exists()


def test_resolution_changes_the_figures(monkeypatch, capsys, small_recipe):
    """A user who lowers it, so that his card will do, must see what that brings."""
    exact, seen = memory.lora_bytes, []
    # GiB with digits
    monkeypatch.setattr(memory, "lora_bytes", lambda *args: {n: 1000 * size for n, size in exact(*args).items()})
    for resolution in (256, 512):  # the teacher's context stays what it is
        run_memory(monkeypatch, f"lora --teacher_max_pixels 65536 --resolution {resolution}")
        seen.append(peaks_of(capsys.readouterr().out))
    (*held, small, _), (*same, large, _) = seen
    assert held == same and 3 < large / small < 5


@pytest.mark.parametrize(
    ("model", "flags", "more"),
    [("z_image_turbo", "--resolution 512 --teacher_max_pixels 65536", "--resolution 768"), ("z_image_turbo", "", "--teacher_max_pixels 1000000"),
     ("z_image_turbo", "", "--train_batch_size 2"), ("flux2_klein_4b", "", "--teacher_context edit"),
     ("flux2_klein_4b", "--teacher_context edit", "--reference_column reference"), ("krea_2_turbo", "", "--teacher_max_pixels 1000000")],
)  # fmt: skip
def test_flags_that_need_more_change_the_batch(tmp_path, model, flags, more):
    """A flag that is taken and not counted gives the figure of another run."""
    sizes = []
    for line in (flags, f"{flags} {more}"):
        args = memory.recipe_args(memory.RECIPES / f"{model}_24gb.sh", line.split())
        _, (noise, *contexts) = memory.planned(model, args)
        sizes.append(
            noise.numel() + sum(t.numel() for several in contexts for context in several for t in context.values())
        )
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("full --rank 8", "only lora and command take further flags"),
        ("encoders --recipe z_image_turbo_24gb", "--recipe goes with lora alone"),
        ("lora --recipe nothing", "--recipe nothing is none of"),
        ("lora --recipe z_image_turbo_24gb --compile_blocks", "--compile_blocks"),
        ("lora --recipe z_image_turbo_24gb --resolution 1000", "--resolution 1000 must be a multiple of 16"),
        ("lora --recipe z_image_turbo_24gb --pretrained_model_name_or_path mine", "memory.py command"),
        ("lora --recipe z_image_turbo_24gb --teacher_context edit", "--teacher_context edit"),
        ("lora --recipe z_image_turbo_16gb --mixed_precision fp16", "--quantization"),
        ("lora --recipe flux2_klein_4b_24gb --teacher_max_pixels 1000000", "--teacher_max_pixels"),
        ("command other.py", "train_dopsd_lora.py"),
    ],
)  # fmt: skip
def test_what_cannot_be_calculated_is_refused(monkeypatch, capsys, line, message):
    """The figure of another run, in silence, ends in a card that is too small."""
    with pytest.raises(SystemExit) as caught:
        run_memory(monkeypatch, line)
    assert message in capsys.readouterr().err + str(caught.value)


def test_out_of_memory_names_flags_that_help(train_any, tmp_path, monkeypatch):
    """PyTorch's message has addresses and a link, and no flag of this script."""

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    patch_velocity(monkeypatch, DOPSDZImagePipeline, full)
    with pytest.raises(train_any.module.InputError) as caught:
        train_any(tmp_path / "out", validation_steps=0, train_batch_size=2)
    assert "CUDA out of memory" in str(caught.value) and "--gradient_checkpointing" in str(caught.value)


def test_student_and_teacher_share_one_compiled_block(train, images, tmp_path, monkeypatch):
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
    # each length is compiled once: without the long caption, all contexts are padded to one
    shutil.copytree(images, tmp_path / "images", ignore=shutil.ignore_patterns("a.*"))
    changes = {"instance_data_dir": tmp_path / "images", "rollout_steps": 2, "states_per_rollout": 2}
    train(tmp_path / "out", "--compile_blocks", max_train_steps=3, **changes)
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
    card = int(path.stem.rsplit("_", 1)[1].removesuffix("gb"))
    if name in ("flux2_klein_9b", "krea_2_turbo"):  # the others leave gigabytes
        resolved = memory.recipe_args(path)
        assert memory.fits(sum(memory.lora_bytes(*memory.planned(name, resolved), resolved).values()), card)
    assert memory.fits(memory.encoder_bytes(memory.MODELS[name][3], args.encoder_quantization), card)
    # what the shell makes of the file is the command that was read from it
    (tmp_path / "python").write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    (tmp_path / "python").chmod(0o755)
    run = subprocess.run(
        ["sh", path, "my images", "out", "--seed", "7"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    words = run.stdout.splitlines()
    assert words[0].endswith("train_dopsd_lora.py")
    ran = script.parse_args(words[1:])
    # further flags
    script.parse_args([*words[1:], "--validation_steps", "0", "--optimizer", "prodigy", "--learning_rate", "1"])
    assert (ran.instance_data_dir, ran.output_dir, ran.seed) == ("my images", "out", 7)
    assert {**vars(ran), "instance_data_dir": 0, "output_dir": 0, "context_cache_dir": 0, "seed": 0} == {
        **vars(args), "instance_data_dir": 0, "output_dir": 0, "context_cache_dir": 0, "seed": 0,
    }  # fmt: skip


@pytest.mark.parametrize("path", sorted(memory.RECIPES.glob("*.sh")), ids=lambda path: path.stem)
def test_recipe_without_arguments_says_how_to_use_it(path):
    """The shell's own message is about a number that cannot be shifted."""
    run = subprocess.run(["sh", path, "my_images"], capture_output=True, text=True)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith(f"usage: sh {path} ") and run.stderr.count("\n") == 1


@pytest.mark.families()
@pytest.mark.parametrize("script_of", [script, full], ids=["lora", "full"])
def test_command_needs_no_weights(base, flags, tmp_path, script_of, monkeypatch, capsys):
    """With configs alone the largest model is estimated on the smallest machine."""
    folder = tmp_path / "configs"
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    words = flags(tmp_path / "out", pretrained_model_name_or_path=folder, rank=4 if script_of is script else None)
    monkeypatch.setattr(memory, "TEXT_TOKENS", 20)
    memory.print_command(SimpleNamespace(gpu_gib=None), [f"{script_of.__name__}.py", *words])
    assert "peak, GiB" in capsys.readouterr().out and not (tmp_path / "out").exists()


@pytest.mark.parametrize("typo", ["no//typo", "{tmp}"], ids=["no base", "an empty folder"])
def test_command_names_the_flag_of_a_mistyped_base(flags, tmp_path, typo):
    """A library's message about a file says nothing of the flag that was mistyped."""
    words = flags("out", pretrained_model_name_or_path=typo.format(tmp=tmp_path))
    with pytest.raises(ValueError, match=f"^--pretrained_model_name_or_path {typo.format(tmp=tmp_path)}"):
        memory.print_command(SimpleNamespace(gpu_gib=None), ["train_dopsd_lora.py", *words])


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
    monkeypatch.setattr(
        sys, "argv", ["step_cost.py", "--size", "tiny", "--rollout_steps", "1", "2", "--repetitions", "1"]
    )
    step_cost.main()
    rows = [
        line.strip("| ").split(" | ")
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("| ") and "K" not in line
    ]
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
