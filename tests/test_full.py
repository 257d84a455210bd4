"""What train_dopsd_full.py does beyond the LoRA script: the whole teacher, memory, its own optimisers, its output."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import Accelerator
from diffusers import DiffusionPipeline, ZImagePipeline, ZImageTransformer2DModel
from safetensors.torch import load_file
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.fsdp import fully_shard

import train_dopsd_full as script
from conftest import ROOT, WEIGHTS, patch_velocity, run_processes
from families import save_z_image
from pipeline_dopsd import DOPSDZImagePipeline


sys.path.insert(0, str(ROOT / "examples" / "benchmarks"))

import memory  # noqa: E402


@pytest.fixture
def make_teacher(pipeline, train_full, tmp_path):
    """A `FullTeacher` of the tiny transformer for some flags."""

    def make(*switches, **changes):
        pipeline.transformer.requires_grad_(True)
        args = script.parse_args(train_full.flags(tmp_path, *switches, **changes))
        return script.FullTeacher(pipeline.transformer, args, Accelerator(cpu=True))

    return make


def weights_of(folder, name="transformer"):
    return load_file(folder / name / WEIGHTS)


def joined_shards(checkpoint, network="transformer"):
    """The weights of a network in a checkpoint of FSDP, whose shards are of the first dimension."""
    parts = {}
    for file in sorted((checkpoint / "shards").glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if name.startswith(f"{network}."):
                parts.setdefault(name.removeprefix(f"{network}."), []).append(tensor)
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


# ------------------------------------------------------------------------------------------------------------- teacher
@pytest.mark.parametrize("student_dtype", [torch.float32, torch.bfloat16])
def test_average_is_exact_over_2000_updates(student_dtype):
    """At decay 0.9999 an average that rounds stands still, and the teacher is the frozen base without saying so."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(4096, generator=generator)
    student = weights.to(student_dtype)
    shadow, exact = [student.float().clone()], student.double()
    rounded, start = student.bfloat16().clone(), student.double()
    for step in range(2000):
        student = (weights + 0.01 * step).to(student_dtype)
        script.update_ema(shadow, [student], 0.9999)
        exact += (student.double() - exact) * (1 - 0.9999)
        rounded += (student.bfloat16() - rounded) * (1 - 0.9999)
    moved = exact - start
    assert moved.abs().min() > 1e-3
    assert ((shadow[0].double() - exact).abs() / moved.abs()).max() < 1e-3
    assert ((rounded.double() - exact).abs() / moved.abs()).median() > 0.5  # what fp32 is for


def test_frozen_and_live_teachers_hold_no_average(make_teacher):
    """--ema_decay 1.0 is to keep no shadow at all, and 0.0 no second network either."""
    frozen, live = make_teacher(ema_decay=1.0), make_teacher(ema_decay=0.0)
    assert not frozen.shadow and not live.shadow
    with live.network() as network:
        assert network is live.student
    before = {n: w.clone() for n, w in frozen.module.state_dict().items()}
    with torch.no_grad():
        next(frozen.student.parameters()).add_(1.0)
    frozen.step()
    with frozen.network() as network:
        assert all(torch.equal(w, before[n]) for n, w in network.state_dict().items())
        assert not any(p.requires_grad for p in network.parameters())


def test_average_on_the_cpu_is_refreshed_at_the_stated_interval(make_teacher):
    """A copy that is never refreshed is a frozen teacher; one refreshed in every step costs a transfer of all weights.
    At a checkpoint, the steps since the last refresh count for what they are."""
    teacher = make_teacher(ema_decay=0.5, ema_device="cpu", ema_refresh_steps=3)
    name, parameter = next(iter(teacher.student.named_parameters()))
    start, seen = parameter.detach().clone(), []
    for step in range(1, 8):
        with torch.no_grad():
            parameter.copy_(start + step)
        teacher.step()
        seen.append((teacher.module.state_dict()[name] - start).mean().item())
        assert torch.equal(teacher.module.state_dict()[name], teacher.shadow[name])
    teacher.refresh()
    seen.append((teacher.module.state_dict()[name] - start).mean().item())
    third = 3 - 3 * 0.5**3
    sixth = 6 - (6 - third) * 0.5**3
    seventh = 7 - (7 - sixth) * 0.5
    assert seen == pytest.approx([0, 0, third, third, third, sixth, sixth, seventh], abs=1e-5)


def test_average_has_compiled_blocks_of_its_own(make_teacher):
    """A copy of a compiled network is not compiled: half of the forwards would stay slow."""
    teacher = make_teacher("--compile_blocks", ema_decay=0.5)
    assert all(block._compiled_call_impl for block in script.repeated_blocks(teacher.module))


def test_flags_that_fsdp_would_undo_are_refused(train_full, tmp_path, monkeypatch):
    """FSDP holds trained weights in fp32, which nothing rounds at random; and optimisers that know no shards fail at
    the first update, after hours of encoding."""
    plugin = SimpleNamespace(cpu_ram_efficient_loading=False)
    state = SimpleNamespace(fsdp_plugin=plugin)
    accelerator = SimpleNamespace(num_processes=2, is_fsdp2=True, distributed_type="FSDP", state=state)
    args = script.parse_args(train_full.flags(tmp_path, "--stochastic_rounding", mixed_precision="bf16"))
    with pytest.raises(ValueError, match="--stochastic_rounding does not go with FSDP"):
        script.check_full_inputs(args, accelerator)
    monkeypatch.setitem(sys.modules, "prodigyopt", SimpleNamespace(__spec__=True))
    for name in ("adafactor", "prodigy"):
        args = script.parse_args(train_full.flags(tmp_path, optimizer=name, learning_rate=1.0))
        with pytest.raises(
            ValueError, match=f"--optimizer {name} cannot be sharded by FSDP; use --optimizer adamw8bit"
        ):
            script.check_full_inputs(args, accelerator)
    plugin.cpu_ram_efficient_loading = True  # accelerate's default
    with pytest.raises(ValueError, match="fsdp_cpu_ram_efficient_loading: false"):
        script.check_full_inputs(script.parse_args(train_full.flags(tmp_path)), accelerator)


def test_average_on_the_cpu_trains_as_on_the_accelerator(train_full, tmp_path):
    """Refreshed in every step, where the average is held must not change the result."""
    one = train_full(tmp_path / "one", max_train_steps=3)
    two = train_full(tmp_path / "two", max_train_steps=3, ema_device="cpu", ema_refresh_steps=1)
    for network in ("transformer", "teacher"):
        ours, theirs = (weights_of(folder / "checkpoint-3", network) for folder in (one, two))
        assert all(torch.equal(w, theirs[n]) for n, w in ours.items())


# -------------------------------------------------------------------------------------------------- several processes
def accelerate_environment(name):
    """What `accelerate launch` makes of the FSDP part of a config file."""
    config = yaml.safe_load((ROOT / "examples" / "accelerate" / name).read_text())
    settings = {n.upper(): str(v).lower() for n, v in config["fsdp_config"].items()}
    settings |= {n: settings[n].upper() for n in ("FSDP_AUTO_WRAP_POLICY", "FSDP_STATE_DICT_TYPE")}
    device = {"ACCELERATE_USE_CPU": "false", "ACCELERATE_TORCH_DEVICE": "cpu"}
    return {"ACCELERATE_USE_FSDP": "true", **device, **settings}


def test_fsdp_equals_one_process(train_full, tmp_path, monkeypatch):
    """Student, teacher and optimiser in shards, interrupted and resumed with another number of processes: the weights
    of one process with the whole batch."""
    changes = {"adam_epsilon": 1e-3, "validation_steps": 2, "num_validation_images": 1, "max_grad_norm": 1e-2}
    with monkeypatch.context() as patch:  # with FSDP, the images of all processes end at the same state
        patch.setattr(script, "places_in_run", lambda step, *_: [step] * 2)
        one = train_full(tmp_path / "one", max_train_steps=4, train_batch_size=2, **changes)
    for steps, processes in ((2, 2), (3, 1), (4, 2)):
        flags = {
            "max_train_steps": steps,
            "train_batch_size": 2 // processes,
            "resume_from_checkpoint": "latest",
            **changes,
        }
        command = [
            str(ROOT / "tests" / "fsdp_on_cpu.py"),
            script.__file__,
            *train_full.flags(tmp_path / "two", **flags),
        ]
        run_processes(command, tmp_path, processes, **accelerate_environment("fsdp2.yaml"))
    two, ours = tmp_path / "two", weights_of(one)
    assert (two / "transformer" / "config.json").read_text() == (one / "transformer" / "config.json").read_text()
    assert max((weight - ours[n]).abs().max() for n, weight in joined_shards(two / "checkpoint-3").items()) > 1e-4
    for theirs in (weights_of(two), joined_shards(two / "checkpoint-4")):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        joined_shards(two / "checkpoint-4", "teacher"), weights_of(one / "checkpoint-4", "teacher"), rtol=0, atol=1e-5
    )
    with pytest.raises(ValueError, match="shards of the weights"):  # a run without FSDP reads none
        train_full(tmp_path / "two", max_train_steps=5, train_batch_size=2, resume_from_checkpoint="latest", **changes)


def test_fsdp_in_bf16_makes_the_update_of_one_process(train_full, base, tmp_path, monkeypatch):
    """The config that the README names computes in bf16: gradients added up in place of averaged, or weights rounded in
    each update, would train another model."""
    changes = {"adam_epsilon": 1.0, "max_train_steps": 1, "learning_rate": 1e-2, "max_grad_norm": 0}
    with monkeypatch.context() as patch:  # with FSDP, the images of all processes end at the same state
        patch.setattr(script, "places_in_run", lambda step, *_: [step] * 2)
        one = train_full(tmp_path / "one", train_batch_size=2, mixed_precision="bf16", **changes)
    flags = train_full.flags(tmp_path / "two", mixed_precision="bf16", **changes)
    command = [str(ROOT / "tests" / "fsdp_on_cpu.py"), script.__file__, *flags]
    run_processes(command, tmp_path, **accelerate_environment("fsdp2.yaml"))
    base = {n: w.bfloat16().float() for n, w in load_file(base / "transformer" / WEIGHTS).items()}
    ours, theirs = weights_of(one / "checkpoint-1"), joined_shards(tmp_path / "two" / "checkpoint-1")
    # so large an epsilon makes Adam's update the gradient: the worst weight's differs by 4 per cent, of rounding
    off = {n: (theirs[n] - weight).norm() / (weight - base[n]).norm() for n, weight in ours.items()}
    assert max(off.values()) < 0.1, off


def test_8bit_adam_is_sharded_by_fsdp(train_full, tokenizer, tmp_path):
    """bitsandbytes' crashes at the first update, after hours of encoding; torchao's trains and resumes exactly."""
    save_z_image(tmp_path / "base", tokenizer, dim=128)  # shards of 4096 weights or more get states of 8 bits
    changes = {"optimizer": "adamw8bit", "rollout_steps": 1, "pretrained_model_name_or_path": tmp_path / "base"}
    for folder in ("whole", "part"):
        flags = train_full.flags(
            tmp_path / folder, max_train_steps=3, checkpointing_steps=2, resume_from_checkpoint="latest", **changes
        )
        run_processes(
            [str(ROOT / "tests" / "fsdp_on_cpu.py"), script.__file__, *flags],
            tmp_path,
            **accelerate_environment("fsdp2.yaml"),
        )
        if folder == "whole":
            shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "part" / "checkpoint-2")
    whole = weights_of(tmp_path / "whole")
    part = weights_of(tmp_path / "part")
    before = joined_shards(tmp_path / "part" / "checkpoint-2")
    assert all(torch.equal(w, whole[n]) for n, w in part.items())
    assert max((w - before[n]).abs().max() for n, w in part.items()) > 1e-4
    shards = (tmp_path / "whole" / "checkpoint-3").glob("optimizer-*.bin")
    assert (
        0 < sum(p.stat().st_size for p in shards) < 1.5 * (tmp_path / "whole" / "transformer" / WEIGHTS).stat().st_size
    )


@pytest.mark.parametrize(
    "environment",
    [{}, {"WORLD_SIZE": "2"}, {"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}],
    ids=["one", "ddp", "fsdp"],
)
@pytest.mark.parametrize(
    "given",
    ["", "--mixed_precision bf16", "--mixed_precision fp16 --use_8bit_adam", "--gradient_accumulation_steps 2"],
)
def test_advice_of_the_estimate_is_accepted(environment, given, monkeypatch):
    """Each try costs minutes; a flag that the script refuses costs them for nothing."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    several, sharded = "WORLD_SIZE" in environment, "ACCELERATE_USE_FSDP" in environment
    accelerator = SimpleNamespace(
        is_fsdp2=sharded,
        num_processes=1 + several,
        distributed_type="FSDP" if sharded else "NO",
        state=SimpleNamespace(fsdp_plugin=SimpleNamespace(cpu_ram_efficient_loading=False)),
    )
    monkeypatch.setattr(script, "check_packages", lambda *_: None)
    advice = memory.full_savings(memory.parse(given))
    for flag in advice:
        if not flag.startswith("a lower"):
            args = memory.parse(f"{given} {flag}" + (" 2" if flag.endswith("steps") else ""))
            script.check_full_inputs(args, accelerator)
    assert len(advice) >= 3


@pytest.fixture
def one_process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@torch.no_grad()
def test_average_reaches_every_unit_of_fsdp(one_process_group):
    """accelerate keeps a model's last norm gathered after a forward: that of klein's teacher would stay the base's for
    ever."""
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)).requires_grad_(False)
    fully_shard(module[1], mesh=mesh, reshard_after_forward=False)
    fully_shard(module, mesh=mesh)
    x, shadow = torch.ones(1, 4), module.state_dict()
    before = module(x)
    for weight in shadow.values():
        weight.zero_()
    teacher = script.FullTeacher.__new__(script.FullTeacher)
    teacher.module, teacher.shadow, teacher.age, teacher.on_cpu = module, shadow, 0, False
    teacher.refresh()
    assert before.abs().max() > 0 and module(x).abs().max() == 0


def test_error_of_one_process_is_everybodys():
    """torch wraps it in what is no Exception: a full disk would end in a traceback of each process."""
    failures = {1: (OSError(28, "No space left on device"), None)}
    with pytest.raises(OSError, match="No space left"), script.first_failure():
        raise CheckpointException("failed", failures)


# ---------------------------------------------------------------------------------------------------------- optimisers
MODES = {
    "cpu average": ([], {"ema_device": "cpu", "ema_refresh_steps": 2}),
    "stochastic rounding": (["--stochastic_rounding"], {"mixed_precision": "bf16"}),
    "fused": (["--fused_backward_pass"], {"max_grad_norm": 0}),
    "frozen": ([], {"ema_decay": 1.0}),
}


@pytest.mark.parametrize("mode", MODES)
def test_resume_is_exact_in_every_mode(train_full, uncompiled, tmp_path, mode):
    """Ages of the average, factored or 8-bit states and random rounding must all go on where they stopped."""
    switches, changes = MODES[mode]
    # without a checkpoint where the other stops
    whole = train_full(tmp_path / "whole", *switches, **changes, max_train_steps=4)
    part = train_full(tmp_path / "part", *switches, **changes, max_train_steps=3)
    train_full(part, *switches, **changes, max_train_steps=4, resume_from_checkpoint="latest")
    ours, theirs, before = weights_of(part), weights_of(whole), weights_of(part / "checkpoint-3")
    assert all(torch.equal(w, theirs[n]) for n, w in ours.items())
    assert not all(torch.equal(w, before[n].to(w.dtype)) for n, w in ours.items())


def test_fused_run_logs_no_norm(train_full, tmp_path, monkeypatch):
    """Gradients are freed in the backward: a norm of zero would say that nothing is learned, and end good runs."""
    logs = []
    monkeypatch.setattr("accelerate.Accelerator.log", lambda self, values, step: logs.append(values))
    train_full(tmp_path, "--fused_backward_pass", max_grad_norm=0)
    assert len(logs) == 2 and not any("grad_norm" in values for values in logs)


def test_stochastic_rounding_keeps_small_updates():
    """Plain bf16 weights do not move at the learning rates of fine-tuning: training would change almost nothing. On
    the CPU, a first step that compiles would look as if it hung."""
    torch.manual_seed(0)
    torch._dynamo.utils.counters.clear()
    start, rate, steps = torch.full((4096,), 0.5), 1e-5, 100
    moved = {}
    for stochastic in (False, True):
        parameter = torch.nn.Parameter(start.bfloat16())
        flags = "--mixed_precision bf16 --learning_rate 1e-5" + (" --stochastic_rounding" if stochastic else "")
        optimizer = script.make_full_optimizer([parameter], memory.parse(flags))
        for _ in range(steps):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        moved[stochastic] = (start - parameter.detach().float()).mean().item()
    assert moved[False] == 0.0
    assert moved[True] == pytest.approx(rate * steps, rel=0.2)  # as Adam moves a weight with a constant gradient
    assert not torch._dynamo.utils.counters["frames"]


def test_learning_rate_of_torchao_is_logged_as_it_was(train_full, tmp_path, monkeypatch):
    """It is a tensor that the next step changes: steps that are logged together would show the last one's."""
    rates = []
    monkeypatch.setattr("accelerate.Accelerator.log", lambda self, values, **kwargs: rates.append(values.get("lr")))
    train_full(
        tmp_path,
        "--stochastic_rounding",
        mixed_precision="bf16",
        max_train_steps=3,
        lr_scheduler="linear",
        report_to="tensorboard",
        learning_rate=1e-3,
    )
    assert [round(rate, 6) for rate in rates if rate is not None] == [0.000667, 0.000333, 0.0]


def test_compilation_of_a_sharded_optimiser_is_announced(caplog):
    """Without a word about it, the first step would look as if it hung."""
    caplog.set_level("INFO", script.__name__)
    parameter = torch.nn.Parameter(torch.zeros(4096))
    script.make_full_optimizer([parameter], memory.parse("--mixed_precision bf16 --use_8bit_adam"), sharded=True)
    assert "torchao compiles" in caplog.text


def losses_and_weights(pipeline, args, batch):
    """Losses, weights and the most gradients held at once in one optimisation step of AdamW."""
    accelerator, transformer = Accelerator(cpu=True, mixed_precision="no"), pipeline.transformer
    teacher = script.FullTeacher(transformer, args, accelerator)
    transformer.requires_grad_(True)
    optimizer = script.make_full_optimizer(list(transformer.parameters()), args)
    held = []
    if args.fused_backward_pass:
        script.fuse_updates(transformer.parameters(), optimizer)
    for parameter in transformer.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: held.append(sum(p.grad is not None for p in transformer.parameters()))
        )
    states = script.rollout(pipeline, transformer, teacher, batch, args, accelerator)
    losses = script.backward_each_state(states, transformer, args, accelerator, True)
    optimizer.step()
    return losses, {n: p.detach().clone() for n, p in transformer.named_parameters()}, max(held)


def test_update_during_the_backward_equals_the_ordinary_one(base, student, train_full, tmp_path):
    """The memory of a gradient buffer is saved, and nothing else changes."""
    batch, results = (*student.batch(2), [[1], [3]]), []
    for switches in ([], ["--fused_backward_pass"]):
        flags = train_full.flags(
            tmp_path, *switches, rollout_steps=4, max_grad_norm=0, adam_epsilon=1e-3, learning_rate=1e-2
        )
        results.append(losses_and_weights(DOPSDZImagePipeline.from_pretrained(base), script.parse_args(flags), batch))
    (losses, ordinary, held), (fused_losses, fused_weights, fused_held) = results
    torch.testing.assert_close(fused_losses, losses)
    start = weights_of(base)
    assert max((w - start[n]).abs().max() for n, w in ordinary.items()) > 1e-3
    for name, weight in ordinary.items():
        torch.testing.assert_close(fused_weights[name], weight, rtol=0, atol=1e-5)
    assert held > 20 and fused_held == 0  # none is left when the next arrives


@pytest.mark.parametrize("flags", memory.SETTINGS)
def test_memory_table_is_what_torch_allocates(flags, uncompiled):
    """Users choose a card by the README's table."""
    config = {
        "dim": 384, "n_layers": 4, "n_refiner_layers": 1, "n_heads": 12, "n_kv_heads": 12, "cap_feat_dim": 64,
        "in_channels": 4, "axes_dims": [8, 12, 12], "axes_lens": [64, 32, 32],
    }  # fmt: skip
    with torch.device("meta"):
        shapes = list(ZImageTransformer2DModel(**config).parameters())
    args = memory.parse(flags)
    transformer = ZImageTransformer2DModel(**config).bfloat16()
    teacher = script.FullTeacher(transformer, args, Accelerator(cpu=True))
    script.make_trainable(SimpleNamespace(transformer=transformer), args)
    parameters = list(transformer.parameters())
    optimizer = script.make_full_optimizer(parameters, args)
    sizes = lambda tensors: sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())  # noqa: E731
    gradients = []
    if args.fused_backward_pass:
        script.fuse_updates(parameters, optimizer)
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(lambda p: gradients.append(p.numel() * p.element_size()))
    sum((p.float() ** 2).sum() for p in parameters).backward()
    held = sizes([p.grad for p in parameters if p.grad is not None])
    optimizer.step()

    expected = memory.held_bytes(shapes, args)
    assert sizes(parameters) == pytest.approx(expected["weights"], rel=0.01)
    assert (held if held else max(gradients, default=0)) <= 1.01 * expected["gradients"]
    states = [t for s in optimizer.state.values() for t in flatten(s)]
    assert sizes(states) == pytest.approx(expected["optimizer"], rel=0.02)
    own = [] if teacher.module is transformer else [*teacher.module.parameters()]
    assert sizes(own) == pytest.approx(expected["teacher"], rel=0.01)
    on_host = teacher.shadow.values() if args.ema_device == "cpu" else []
    assert sizes(on_host) == (4 * sum(p.numel() for p in shapes) if teacher.on_cpu else 0)


def flatten(value):
    """The plain tensors in an optimiser's state, inside dicts and quantised tensors."""
    if isinstance(value, dict):
        return [t for v in value.values() for t in flatten(v)]
    if hasattr(value, "__tensor_flatten__"):
        return [t for name in value.__tensor_flatten__()[0] for t in flatten(getattr(value, name))]
    return [value] if torch.is_tensor(value) and value.numel() > 1 else []


# -------------------------------------------------------------------------------------------------------------- output
@pytest.fixture(scope="module")
def trained(train_full, tmp_path_factory):
    return train_full(
        tmp_path_factory.mktemp("trained"), validation_steps=2, num_validation_images=1, learning_rate=1e-3
    )


def test_output_is_a_pipeline_that_loads_in_every_way(trained, base):
    """The stock class without remote code, the small pipeline of this project, and the folder's own code."""
    stock = DiffusionPipeline.from_pretrained(trained)
    assert type(stock) is ZImagePipeline
    expected, before = weights_of(trained / "checkpoint-2"), weights_of(base)
    weights = stock.transformer.state_dict()
    assert all(torch.equal(w, expected[n]) for n, w in weights.items())
    assert not any(torch.equal(w, before[n]) for n, w in weights.items() if n.endswith("to_q.weight"))
    custom = DiffusionPipeline.from_pretrained(trained, custom_pipeline=str(trained), trust_remote_code=True)
    for pipeline in (DOPSDZImagePipeline.from_pretrained(trained), custom):
        images = [
            p(prompt="a red square", height=32, width=32, num_inference_steps=2, guidance_scale=0.0,
              generator=torch.Generator().manual_seed(0), output_type="np").images
            for p in (pipeline, stock)
        ]  # fmt: skip
        assert (images[0] == images[1]).all()


def test_output_holds_the_result_alone(trained):
    """The teacher is thrown away; users download what they need."""
    names = {p.name for p in trained.iterdir()} - {
        "checkpoint-2",
        "validation",
        "samples",
        "logs",
        ".lock",
        ".lock_owner",
    }
    assert names == {
        "transformer", "text_encoder", "tokenizer", "vae", "scheduler", "model_index.json", "pipeline.py",
        "pipeline_dopsd.py", "dopsd_settings.json", "README.md",
    }  # fmt: skip
    assert (trained / "checkpoint-2" / "teacher" / WEIGHTS).is_file()


def test_checkpoint_has_the_hubs_layout(trained):
    """A checkpoint can be looked at with the ordinary classes, whatever the number of processes that wrote it."""
    transformer = ZImageTransformer2DModel.from_pretrained(trained / "checkpoint-2", subfolder="transformer")
    expected = weights_of(trained / "checkpoint-2")
    assert all(torch.equal(w, expected[n]) for n, w in transformer.state_dict().items())


def test_large_transformers_are_sharded(trained, monkeypatch, tmp_path):
    """One file of 25 GB fails on many file systems; diffusers and a resume read the shards."""
    save = script.save_torch_state_dict
    monkeypatch.setattr(script, "save_torch_state_dict", lambda *a, **k: save(*a, **k, max_shard_size="200KB"))
    transformer = ZImageTransformer2DModel.from_pretrained(trained, subfolder="transformer")
    tensors = transformer.state_dict()
    script.save_weights(tensors, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    transformer.save_config(tmp_path)
    loaded = ZImageTransformer2DModel.from_pretrained(tmp_path).state_dict()
    again = {n: torch.zeros_like(w) for n, w in tensors.items()}
    script.load_weights(again, tmp_path)
    assert all(torch.equal(w, loaded[n]) and torch.equal(w, again[n]) for n, w in tensors.items())


def test_weights_that_compute_in_fp32_are_saved_so(tmp_path):
    """The model that loads would not be the one that validation drew."""
    tensors = {"layers.0.norm.weight": torch.full((4,), 1.001), "layers.0.to_q.weight": torch.ones(4, 4)}
    script.save_weights(tensors, tmp_path, torch.bfloat16, ["norm"])
    saved = load_file(next(tmp_path.glob("*.safetensors")))
    assert torch.equal(saved["layers.0.norm.weight"], tensors["layers.0.norm.weight"])
    assert saved["layers.0.to_q.weight"].dtype == torch.bfloat16


def test_fused_run_stops_at_broken_weights(train_full, tmp_path, monkeypatch):
    """A gradient that is not finite behind a finite loss is in the weights before anything can be checked; a checkpoint
    or the result would be written."""

    def break_one(parameters, optimizer):
        def update(parameter):
            parameter.data.fill_(float("nan"))

        next(iter(parameters)).register_post_accumulate_grad_hook(update)

    monkeypatch.setattr(script, "fuse_updates", break_one)
    with pytest.raises(script.InputError, match="gradient norm nan is not finite"):
        train_full(tmp_path, "--fused_backward_pass", rollout_steps=1, max_grad_norm=0, max_train_steps=1)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_other_number_of_steps_is_remembered(train, train_full, tmp_path):
    """A model distilled to another number of steps must not be run with the family's, nor a LoRA that is trained on
    it; nor with the base's, where another is asked for."""
    changes = {"max_train_steps": 1}
    folders = {3: train_full(tmp_path / "three", num_inference_steps=3, **changes)}
    changes["pretrained_model_name_or_path"] = folders[3]
    lora = train(tmp_path / "lora", **changes)
    assert json.loads((lora / "model_index.json").read_text())["num_inference_steps"] == 3
    folders[8] = train_full(tmp_path / "eight", num_inference_steps=8, **changes)
    for steps, folder in folders.items():
        assert DOPSDZImagePipeline.from_pretrained(folder).config.num_inference_steps == steps
        assert json.loads((folder / "model_index.json").read_text())["num_inference_steps"] == steps
        assert f"num_inference_steps={steps}," in (folder / "README.md").read_text()


def test_weights_are_saved_in_the_dtype_of_the_base(train_full, tmp_path):
    """Trained in fp32, an fp32 file would be twice as large as the base's without holding more."""
    folder = train_full(tmp_path, mixed_precision="bf16", max_train_steps=1)
    assert {w.dtype for w in weights_of(folder).values()} == {torch.bfloat16}
    for network in ("transformer", "teacher"):
        assert {w.dtype for w in weights_of(folder / "checkpoint-1", network).values()} == {torch.float32}


# ----------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("switches", "changes", "words"),
    [
        ([], {"ema_refresh_steps": 0}, "--ema_refresh_steps: must be a whole number, at least 1"),
        (["--use_8bit_adam", "--stochastic_rounding"], {}, "leave out --use_8bit_adam"),
        (["--fused_backward_pass"], {"optimizer": "prodigy", "learning_rate": 1.0, "max_grad_norm": 0}, "--optimizer prodigy"),
        (["--fused_backward_pass"], {}, "--max_grad_norm 0"),
        (["--fused_backward_pass"], {"max_grad_norm": 0, "gradient_accumulation_steps": 2}, "--gradient_accumulation"),
        (["--fused_backward_pass"], {"max_grad_norm": 0, "states_per_rollout": 2}, "--states_per_rollout 1"),
        (["--stochastic_rounding"], {"mixed_precision": "no"}, "--mixed_precision bf16"),
        (["--fused_backward_pass"], {"max_grad_norm": 0, "mixed_precision": "fp16"}, "--mixed_precision bf16"),
    ],
)  # fmt: skip
def test_flags_that_do_not_go_together(train_full, tmp_path, monkeypatch, capsys, switches, changes, words):
    """Found before weights load."""
    monkeypatch.setattr("diffusers.ModelMixin.from_pretrained", lambda *a, **k: pytest.fail("weights were loaded"))
    with pytest.raises((script.InputError, SystemExit)) as caught:
        train_full(tmp_path, *switches, **changes)
    message = capsys.readouterr().err if caught.type is SystemExit else str(caught.value)
    assert words in message


def test_fused_run_stops_before_a_broken_update(train_full, tmp_path, monkeypatch):
    """Weights that are updated during the backward cannot be saved from a NaN afterwards."""
    calls, velocity = [], DOPSDZImagePipeline.velocity

    def broken(self, *args):
        calls.append(1)
        return velocity(self, *args) * (float("nan") if len(calls) > 2 else 1.0)

    patch_velocity(monkeypatch, DOPSDZImagePipeline, broken)
    with pytest.raises(script.InputError, match="not finite"):
        train_full(
            tmp_path,
            "--fused_backward_pass",
            rollout_steps=1,
            max_grad_norm=0,
            checkpointing_steps=1,
            max_train_steps=4,
        )
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
