"""Whole runs of both scripts: resume, precision, optimisers, validation, several processes."""

import importlib.util
import json
import os
import sys
import types

import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

import train_dopsd_lora as script
from conftest import LORA, WEIGHTS, patch_velocity, run_processes
from pipeline_dopsd import PRIOR_PROMPTS, DOPSDZImagePipeline


def tensors_of(folder):
    """Student, teacher and optimiser state of a checkpoint as one flat dict."""
    networks = {path.parent.name: load_file(path) for path in folder.glob(f"*/{WEIGHTS}")}
    tensors = {f"{network}.{name}": t for network, weights in networks.items() for name, t in weights.items()}

    def collect(state, prefix):
        for key, value in state.items():
            if isinstance(value, dict):  # bitsandbytes nests its states
                collect(value, f"{prefix}.{key}")
            elif torch.is_tensor(value):
                tensors[f"{prefix}.{key}"] = value

    collect(torch.load(folder / "optimizer.bin", weights_only=True)["optimizer"]["state"], "optimizer")
    return tensors


def assert_equal(ours, theirs):
    """The tensors of two checkpoints, or of two LoRA files, are equal bit for bit."""
    ours, theirs = ((tensors_of if path.is_dir() else load_file)(path) for path in (ours, theirs))
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


@pytest.mark.parametrize(
    ("switches", "changes"),
    [
        ([], {}),
        (
            [],
            {"gradient_accumulation_steps": 2, "train_batch_size": 2, "lr_scheduler": "cosine", "validation_steps": 4},
        ),
        (["--use_8bit_adam", "--gradient_checkpointing"], {"rank": 64, "mixed_precision": "bf16"}),
        ([], {"optimizer": "adafactor"}),
    ],
    ids=["plain", "accumulated", "8bit", "adafactor"],
)
def test_resumed_run_equals_the_uninterrupted_one(train_any, tmp_path, monkeypatch, switches, changes):
    """A resume that is not exact is a second training: other data and noise, a teacher or optimiser that jumps."""
    train, changes = train_any, {n: v for n, v in changes.items() if n != "rank" or train_any.result == LORA}
    whole = train(tmp_path / "whole", *switches, max_train_steps=6, checkpointing_steps=100, **changes)

    part, accumulated, drawn = tmp_path / "part", changes.get("gradient_accumulation_steps", 1), []
    draw_states = train.module.draw_states
    interrupted_at = 4 * accumulated

    def counted(args, places):
        drawn.append(places[0] // args.train_batch_size)
        return draw_states(args, places)

    def interrupted(args, places):
        if places[0] // args.train_batch_size == interrupted_at:
            raise KeyboardInterrupt
        return draw_states(args, places)

    command = {"max_train_steps": 6, "checkpointing_steps": 3, "resume_from_checkpoint": "latest", **changes}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.module, "draw_states", interrupted)
        train(part, *switches, **command)
    assert not (part / train.result).exists() and not (part / "checkpoint-6").exists()

    with monkeypatch.context() as patch:
        patch.setattr(train.module, "draw_states", counted)
        train(part, *switches, **command)
    steps = [micro_step for micro_step in drawn if micro_step]  # the estimate of memory draws for the first
    assert steps == list(range(3 * accumulated, 6 * accumulated))  # steps 4 to 6 alone
    assert_equal(part / "checkpoint-6", whole / "checkpoint-6")
    assert_equal(part / train.result, whole / train.result)
    first, last = tensors_of(part / "checkpoint-3"), tensors_of(part / "checkpoint-6")
    networks = (train.student, "teacher")
    moved = [n for n in first if n.startswith(networks) and ("lora_B" in n or n.endswith("to_q.weight"))]
    assert moved and not any(torch.equal(first[n], last[n]) for n in moved)


def test_resume_can_go_on_for_longer(train_any, tmp_path):
    """More steps after a look at the result: the checkpoint of the last step is where they start."""
    whole = train_any(tmp_path / "whole", max_train_steps=4)
    part = train_any(tmp_path / "part", max_train_steps=2)
    train_any(part, max_train_steps=4, resume_from_checkpoint=str(part / "checkpoint-2"))
    assert_equal(part / "checkpoint-4", whole / "checkpoint-4")


def test_latest_without_checkpoint_starts_anew(train, tmp_path):
    """The same command starts and resumes a run."""
    train(tmp_path, max_train_steps=1, resume_from_checkpoint="latest")
    assert (tmp_path / LORA).is_file()


def test_only_the_newest_checkpoints_are_kept(train, tmp_path):
    """--checkpoints_total_limit keeps the disk from filling up, and never deletes the newest."""
    train(tmp_path, max_train_steps=11, rollout_steps=1, checkpointing_steps=1, checkpoints_total_limit=2)
    assert {p.name for p in tmp_path.glob("*checkpoint*")} == {"checkpoint-10", "checkpoint-11"}


def test_bf16_base_trains_an_fp32_lora(train, tmp_path):
    """In bf16 neither small steps nor an EMA at 0.9999 arrive; a validation must not cast the weights either."""
    train(
        tmp_path, mixed_precision="bf16", validation_steps=1, ema_decay=0.9999, learning_rate=1e-3, max_train_steps=3
    )
    for name in ("student", "teacher"):
        weights = load_file(tmp_path / "checkpoint-3" / name / WEIGHTS)
        assert {w.dtype for w in weights.values()} == {torch.float32}
    student, teacher = (load_file(tmp_path / "checkpoint-3" / n / WEIGHTS) for n in ("student", "teacher"))
    name = next(n for n in student if "lora_B" in n)
    assert 0 < teacher[name].abs().max() < 1e-3 * student[name].abs().max()
    assert {w.dtype for w in load_file(tmp_path / LORA).values()} == {torch.float32}


class Prodigy(torch.optim.AdamW):
    """Stands in for that of the package prodigyopt, which the tests do not install."""

    def __init__(self, parameters, lr, weight_decay, betas, eps, use_bias_correction, safeguard_warmup):
        assert (lr, betas, use_bias_correction, safeguard_warmup) == (1.0, (0.9, 0.99), True, True)
        super().__init__(parameters, lr / 100, betas, eps, weight_decay)


def test_prodigy_is_what_is_asked_for(train_any, tmp_path, monkeypatch, capsys):
    """Another optimiser under its name, or one that starts at a rate that is nothing to it, would hardly train."""
    flags = {"optimizer": "prodigy", "learning_rate": 1.0, "adam_beta2": 0.99, "max_train_steps": 1}
    monkeypatch.setitem(sys.modules, "prodigyopt", types.SimpleNamespace(Prodigy=Prodigy, __spec__=True))
    made, prepare = [], Accelerator.prepare
    monkeypatch.setattr(Accelerator, "prepare", lambda self, *parts: made.append(parts[-1]) or prepare(self, *parts))
    train_any(tmp_path, **flags)
    assert type(made[0]) is Prodigy
    with pytest.raises(SystemExit):
        train_any(tmp_path, **flags | {"learning_rate": 1e-4})
    assert "--learning_rate: give 1" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "package"), [("prodigy", "prodigyopt"), ("adamw8bit", "bitsandbytes")])
def test_optimiser_of_a_missing_package(train_any, tmp_path, monkeypatch, name, package):
    """Said before data is read, with the command that installs it."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda wanted, *rest: None if wanted == package else find(wanted, *rest)
    )
    monkeypatch.setattr(train_any.module, "read_dataset", lambda args: pytest.fail("data was read"))
    with pytest.raises(ValueError, match=f"--optimizer {name} needs {package}: pip install {package}"):
        train_any(tmp_path, optimizer=name, learning_rate=1.0)


def test_8bit_adam_goes_with_no_other_optimiser(train_any, tmp_path, capsys):
    """One of two flags would be passed over without a word; --use_8bit_adam alone is --optimizer adamw8bit."""
    parse = lambda *words, **changes: train_any.module.parse_args(train_any.flags(tmp_path, *words, **changes))  # noqa: E731
    assert parse("--use_8bit_adam") == parse(optimizer="adamw8bit") != parse()
    with pytest.raises(SystemExit):
        parse("--use_8bit_adam", optimizer="adafactor")
    assert "--use_8bit_adam is AdamW, not --optimizer adafactor" in capsys.readouterr().err


def test_8bit_adam_has_8bit_states(train, tmp_path):
    """--use_8bit_adam that falls back to 32 bits would take the memory that it promises to save."""
    train(tmp_path, "--use_8bit_adam", rank=64, max_train_steps=1)
    tensors = tensors_of(tmp_path / "checkpoint-1")
    states = {n: t for n, t in tensors.items() if n.endswith((".state1", ".state2"))}
    assert len(states) == 2 * 2 * 28
    assert {t.dtype for t in states.values() if t.numel() >= 4096} == {torch.uint8}


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_have_the_permissions_of_the_umask(train_any, tmp_path, monkeypatch, mask):
    """A ComfyUI of another user could not read the LoRA; and with a strict umask nobody else may."""
    old = os.umask(mask)
    assert train_any.module.UMASK == old  # that of the import
    try:
        monkeypatch.setattr(train_any.module, "UMASK", mask)
        folder = train_any(
            tmp_path / "out", max_train_steps=1, validation_steps=1, num_validation_images=1, context_cache_dir=None
        )
    finally:
        os.umask(old)
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert {"contexts", "checkpoint-1", "samples"} <= {p.relative_to(folder).parts[0] for p in files}
    assert {p.name: oct(p.stat().st_mode & 0o777) for p in files} == {p.name: oct(0o666 & ~mask) for p in files}


def test_learning_rate_warms_up(train_any, tmp_path, monkeypatch):
    """The schedule counts optimisation steps, not micro-steps."""
    rates = []
    monkeypatch.setattr("accelerate.Accelerator.log", lambda self, values, **kwargs: rates.append(values["lr"]))
    schedule = {"lr_scheduler": "linear", "lr_warmup_steps": 2, "gradient_accumulation_steps": 2}
    train_any(tmp_path, **schedule, max_train_steps=4, rollout_steps=1, learning_rate=1.0)
    assert rates == [0.5, 1.0, 0.5, 0.0]


def test_log_has_what_a_user_steers_by(train_any, tmp_path, monkeypatch):
    """Loss per state, gradient norm, learning rate, time and memory, for every step."""
    logs = []
    monkeypatch.setattr("accelerate.Accelerator.log", lambda self, values, step: logs.append((step, values)))
    train_any(tmp_path, rollout_steps=3, states_per_rollout=3)
    assert [step for step, _ in logs] == [1, 2]
    expected = {
        "loss",
        "loss/state_1",
        "loss/state_2",
        "loss/state_3",
        "grad_norm",
        "lr",
        "seconds_per_step",
        "peak_memory_gib",
    }
    for _, values in logs:
        assert values.keys() >= expected and all(isinstance(v, float) and v > 0 for v in values.values())
        assert values["loss"] == pytest.approx(sum(values[f"loss/state_{k}"] for k in (1, 2, 3)) / 3)


def test_log_has_the_states_that_were_trained(train_any, tmp_path, monkeypatch):
    """A curve of a state with the losses of others, or with zeros where it was not trained, would mislead."""
    logs, losses, rollout = [], [], train_any.module.rollout

    def recorded(*args):
        for k, values in rollout(*args):
            if values.device.type != "meta":  # as in the estimate of memory
                losses[-1].extend(zip(k.tolist(), values.tolist()))
            yield k, values

    def draw(args, places):
        if places[0] % 4 == 0:
            losses.append([])
        return [[[0], [2]], [[0], [0]], [[1], [1]], [[1], [1]]][places[0] // 2]

    monkeypatch.setattr(train_any.module, "rollout", recorded)
    monkeypatch.setattr(train_any.module, "draw_states", draw)
    monkeypatch.setattr("accelerate.Accelerator.log", lambda self, values, step: logs.append(values))
    train_any(tmp_path, rollout_steps=3, train_batch_size=2, gradient_accumulation_steps=2)
    for values, trained in zip(logs, losses[-2:], strict=True):
        assert len(trained) == 4 and values["loss"] == pytest.approx(sum(loss for _, loss in trained) / 4)
        for state in range(3):
            own = [loss for k, loss in trained if k == state]
            assert values.get(f"loss/state_{state + 1}") == (pytest.approx(sum(own) / len(own)) if own else None)
    assert "loss/state_2" not in logs[0] and logs[1].keys() & {"loss/state_1", "loss/state_3"} == set()


def test_steps_that_are_logged_together_keep_their_own_values(train_any, tmp_path, monkeypatch):
    """Logs are read off the device at intervals; a curve with missing or repeated steps would mislead."""
    logs, reads, log_steps = [], [], train_any.module.log_steps
    monkeypatch.setattr("accelerate.Accelerator.log", lambda self, values, step: logs.append((step, values["loss"])))
    monkeypatch.setattr(train_any.module, "log_steps", lambda *args: reads.append(len(args[0])) or log_steps(*args))
    for seconds in (-1, 1000):
        monkeypatch.setattr(train_any.module, "LOGGING_SECONDS", seconds)
        train_any(
            tmp_path / str(seconds), max_train_steps=5, checkpointing_steps=3, context_cache_dir=tmp_path / "cache"
        )
    assert logs[:5] == logs[5:] and [step for step, _ in logs] == [1, 2, 3, 4, 5] * 2
    assert reads == [1, 1, 1, 1, 1, 3, 2]


def test_validation_pictures(train_any, tmp_path):
    """student | teacher | training image, at step 0, every --validation_steps and at the end."""
    prompts = ["a red square", "a prompt that is no caption"]
    train_any(
        tmp_path,
        "--validation_prompt",
        *prompts,
        validation_steps=2,
        max_train_steps=3,
        ema_decay=1.0,
        learning_rate=0.05,
    )
    pictures = {p.name: Image.open(p) for p in (tmp_path / "validation").iterdir()}
    assert sorted(pictures) == ["step-000000.png", "step-000002.png", "step-000003.png"]
    # room for headings, and a text under each row
    assert {p.size for p in pictures.values()} == {(3 * 80, 20 + 2 * (32 + 20))}
    student, teacher, target = (
        [p.crop((x, 20, x + 32, 52)).tobytes() for _, p in sorted(pictures.items())] for x in (0, 80, 160)
    )
    assert len(set(student)) == 3 and len(set(teacher)) == len(set(target)) == 1  # decay 1.0: the frozen base
    assert student[0] != teacher[0]


@pytest.mark.parametrize("given", [True, False])
def test_prior_prompts_have_a_teacher_that_sees_no_image(given, train_any, pipeline, tmp_path, monkeypatch):
    """With an image in its context, the teacher would teach the concept on the very prompts that are to stay as they
    are; without prompts where none are named, a user's model would forget them."""
    prompts = ["a red car", "a small blue door"] if given else PRIOR_PROMPTS
    seen = []
    velocity = DOPSDZImagePipeline.velocity
    (tmp_path / "prior.txt").write_text("\n\n".join(prompts) + "\n")

    def recorded(self, transformer, latents, timestep, contexts):
        seen.append([context["prompt_embeds"].clone() for context in contexts])
        return velocity(self, transformer, latents, timestep, contexts)

    patch_velocity(monkeypatch, DOPSDZImagePipeline, recorded)
    train_any(
        tmp_path / "out", prior_prompts=tmp_path / "prior.txt" if given else None, prior_every=3, max_train_steps=6, rollout_steps=1,
        train_batch_size=2, validation_steps=0, context_cache_dir=tmp_path / "cache",
    )  # fmt: skip
    teacher, student = seen[0::2], seen[1::2]
    same = [all(map(torch.equal, ours, theirs)) for ours, theirs in zip(teacher, student)]
    assert same == [False, False, True, False, False, True]
    expected = [embeds["prompt_embeds"] for embeds in pipeline.encode_student(prompts)]
    assert all(any(torch.equal(embeds, wanted) for wanted in expected) for embeds in student[2] + student[5])


def test_weight_of_prior_prompts_is_on_their_loss_alone(train_any, tmp_path, monkeypatch):
    """Who asks that ordinary prompts are kept better would train the concept at another rate instead."""
    losses, backward = [], Accelerator.backward
    monkeypatch.setattr(
        Accelerator,
        "backward",
        lambda self, loss, **options: losses.append(loss.item()) or backward(self, loss, **options),
    )
    (tmp_path / "prior.txt").write_text("a red car")
    for weight in (1, 4):
        train_any(
            tmp_path / str(weight), prior_prompts=tmp_path / "prior.txt", prior_loss_weight=weight, max_train_steps=3,
            prior_every=3, learning_rate=1e-3, context_cache_dir=tmp_path / "cache", validation_steps=0,
        )  # fmt: skip
    first, second = losses[:3], losses[3:]
    assert second[:2] == first[:2] and second[2] == pytest.approx(4 * first[2], rel=1e-4) and first[2] > 0


def test_prior_prompts_are_those_that_were_encoded(train_any, tmp_path, monkeypatch):
    """Edited while contexts are encoded, for hours, they would end the run at the first one that has none."""
    (tmp_path / "prior.txt").write_text("a red car")
    encode = train_any.module.encode_contexts
    monkeypatch.setattr(
        train_any.module,
        "encode_contexts",
        lambda *args: encode(*args) or (tmp_path / "prior.txt").write_text("a new one"),
    )
    train_any(tmp_path / "out", prior_prompts=tmp_path / "prior.txt", max_train_steps=3)


def test_image_that_is_gone_ends_no_run(train_any, tmp_path, monkeypatch, caplog):
    """The steps since the last checkpoint would be lost for the third column of a picture; a white one says nothing by
    itself."""
    common = {
        "max_train_steps": 1,
        "context_cache_dir": tmp_path / "contexts",
        "validation_steps": 1,
        "num_validation_images": 1,
    }
    train_any(tmp_path / "first", **common)
    monkeypatch.setattr(train_any.module, "load_image", lambda source: (_ for _ in ()).throw(ValueError("gone")))
    train_any(tmp_path / "out", **common)
    sheet = Image.open(tmp_path / "out" / "validation" / "step-000001.png")
    assert sheet.width > 3 * 32 and "gone It is white in the validation picture" in caplog.text


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed is not supported"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "dynamo_backend is not supported"),
    ],
)
def test_what_the_launcher_must_not_ask_for(train_any, tmp_path, monkeypatch, name, value, told):
    """DeepSpeed's error would come after all contexts are encoded; a model saved with dynamo's names loads as noise."""
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=told):
        train_any(tmp_path)


def test_pictures_are_decoded_as_in_inference(train_any, tmp_path, monkeypatch):
    """Autocast would widen what the VAE holds, at 1024 pixels by a gigabyte, and change the pictures."""
    cast, decode = [], AutoencoderKL.decode
    monkeypatch.setattr(
        AutoencoderKL, "decode", lambda *a, **k: cast.append(torch.is_autocast_enabled("cpu")) or decode(*a, **k)
    )
    train_any(tmp_path, mixed_precision="bf16", max_train_steps=1, validation_steps=1, num_validation_images=1)
    assert cast and not any(cast)


def test_unused_vae_does_not_change_the_training(train_any, tmp_path):
    """The size of the latents follows from the VAE, also where no validation needs its weights."""
    with_vae = train_any(tmp_path / "with", validation_steps=100, num_validation_images=1)
    without = train_any(tmp_path / "without", validation_steps=0)
    assert_equal(with_vae / "checkpoint-2", without / "checkpoint-2")


def test_two_processes_equal_one_with_twice_the_batch(train_any, tmp_path):
    """Without the average over processes, or with the same data in both, a second GPU would be for nothing."""
    changes = {"max_train_steps": 3, "learning_rate": 1e-3, "adam_epsilon": 1e-3}
    one = train_any(tmp_path / "one", train_batch_size=2, checkpointing_steps=1, checkpoints_total_limit=3, **changes)
    run_processes([train_any.module.__file__, *train_any.flags(tmp_path / "two", **changes)], tmp_path)
    ours, theirs = load_file(one / train_any.result), load_file(tmp_path / "two" / train_any.result)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], rtol=0, atol=1e-5)
    first, last = (tensors_of(one / f"checkpoint-{step}") for step in (1, 3))
    assert max((first[n] - last[n]).abs().max() for n in first if n.startswith(train_any.student)) > 1e-4


def test_two_processes_share_a_quantised_base(train, tmp_path):
    """Packed weights cannot be sent to the other process; they are read from the same files."""
    changes = {"max_train_steps": 1, "quantization": "int8", "mixed_precision": "bf16"}
    run_processes([train.module.__file__, *train.flags(tmp_path, "--gradient_checkpointing", **changes)], tmp_path)
    assert all((w != 0).any() for name, w in load_file(tmp_path / LORA).items() if "lora_B" in name)


def test_processes_without_a_gpu_are_told_so(train, tmp_path):
    """Each would take itself for the only one, and OUTPUT_DIR for that of another run."""
    command = [train.module.__file__, *train.flags(tmp_path / "out")]
    environment = {"ACCELERATE_USE_CPU": "false", "CUDA_VISIBLE_DEVICES": ""}
    for errors in run_processes(command, tmp_path, code=1, **environment):
        assert errors.splitlines()[-1].startswith("error: Several processes were launched, but torch sees no GPU")


def test_one_process_says_what_is_wrong(train_any, tmp_path):
    """A traceback of each other process, which waited for it, would bury its line."""
    command = [train_any.module.__file__, *train_any.flags(tmp_path / "out", resolution=36)]
    first, second = run_processes(command, tmp_path, code=1)
    assert first.splitlines()[-1].startswith("error: --resolution 36") and "Traceback" not in first
    assert not second


def test_checkpoint_is_complete_before_it_has_its_name(train_any, tmp_path, monkeypatch):
    """A run killed while it saves must leave a folder that --resume_from_checkpoint latest does not take."""
    train_any(tmp_path, max_train_steps=2)

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_any.module.torch, "save", killed)
        train_any(tmp_path, max_train_steps=3, resume_from_checkpoint="latest")
    assert sorted(p.name for p in tmp_path.glob("*checkpoint-*")) == [".checkpoint-3.tmp", "checkpoint-2"]
    (tmp_path / ".checkpoint-3.tmp" / "left_over.safetensors").touch()
    train_any(tmp_path, max_train_steps=3, resume_from_checkpoint="latest")
    assert json.loads((tmp_path / "checkpoint-3" / "dopsd_state.json").read_text())["step"] == 3
    assert not list(tmp_path.rglob("left_over*"))


def test_non_finite_loss_stops_the_run_and_keeps_the_checkpoint(train_any, tmp_path, monkeypatch):
    """A run that goes on with NaN overwrites what was good."""
    train_any(tmp_path, max_train_steps=1, states_per_rollout=2)
    saved = (tmp_path / train_any.result).read_bytes()
    calls, velocity = [], DOPSDZImagePipeline.velocity

    def broken(self, *args):
        calls.append(1)
        return velocity(self, *args) * (float("nan") if len(calls) > 2 * 2 * 2 else 1.0)

    patch_velocity(monkeypatch, DOPSDZImagePipeline, broken)
    with pytest.raises(ValueError, match="not finite"):
        train_any(
            tmp_path,
            states_per_rollout=2,
            max_train_steps=9,
            checkpointing_steps=1,
            checkpoints_total_limit=1,
            resume_from_checkpoint="latest",
        )
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    assert all(torch.isfinite(t.float()).all() for t in tensors_of(tmp_path / "checkpoint-3").values())
    assert (tmp_path / train_any.result).read_bytes() == saved


def test_non_finite_gradient_does_not_reach_a_checkpoint(train_any, tmp_path, monkeypatch):
    """The loss can be finite where its gradient is not; one such step turns all weights into NaN."""
    calls, velocity = [], DOPSDZImagePipeline.velocity

    def broken(self, *args):
        calls.append(1)
        out = velocity(self, *args)
        return out + torch.sqrt(out * 0) if len(calls) > 2 * 2 * 2 else out  # 0 with an infinite derivative

    patch_velocity(monkeypatch, DOPSDZImagePipeline, broken)
    with pytest.raises(ValueError, match="not finite"):
        train_any(tmp_path, states_per_rollout=2, max_train_steps=6, checkpointing_steps=1, checkpoints_total_limit=1)
    (newest,) = tmp_path.glob("checkpoint-*")
    assert all(torch.isfinite(t.float()).all() for t in tensors_of(newest).values())


def blind(out):
    return out - out.detach() + 1.0


@pytest.mark.parametrize("broken", [blind, None])
def test_run_that_comes_to_nothing_says_so_once(train, tmp_path, monkeypatch, caplog, broken):
    """An evening of training that cannot learn anything must not look like one that does."""
    velocity = DOPSDZImagePipeline.velocity
    if broken:
        patch_velocity(monkeypatch, DOPSDZImagePipeline, lambda self, *args: broken(velocity(self, *args)))
    monkeypatch.setattr(train.module, "LOGGING_SECONDS", 0)
    (tmp_path / "prior.txt").write_text("a red car")
    with caplog.at_level("WARNING"):
        train(tmp_path / "out", max_train_steps=30, rollout_steps=1, learning_rate=1e-6, checkpointing_steps=1000,
              prior_prompts=tmp_path / "prior.txt", context_cache_dir=tmp_path / "cache")  # fmt: skip
    assert caplog.text.count("predict the same") == int(broken is blind)


def test_seed_makes_a_run_repeatable(train_any, tmp_path):
    """The same command gives the same LoRA, and --seed another one."""
    first, second = train_any(tmp_path / "1"), train_any(tmp_path / "2")
    assert_equal(first / train_any.result, second / train_any.result)
    other = load_file(train_any(tmp_path / "3", seed=1) / train_any.result)
    assert not any(torch.equal(w, other[n]) for n, w in load_file(first / train_any.result).items())


def test_dropout_follows_from_the_step_and_spares_the_teacher(train, tmp_path, monkeypatch):
    """A resumed run would drop other inputs; a teacher with holes would teach them."""
    dropout = {"lora_dropout": 0.5, "max_train_steps": 4}
    whole = train(tmp_path / "whole", **dropout)
    part = train(tmp_path / "part", **{**dropout, "max_train_steps": 2})
    train(part, **dropout, resume_from_checkpoint="latest")
    weights = load_file(whole / train.result)
    assert all(torch.equal(weights[name], other) for name, other in load_file(part / train.result).items())
    plain = load_file(train(tmp_path / "plain", max_train_steps=4) / train.result)
    assert any(not torch.equal(weights[name], plain[name]) for name in plain)


def test_dropout_is_of_the_student_alone(pipeline, flags, tmp_path):
    """Teacher and validation pictures are drawn without gradients."""
    args = script.parse_args(flags(tmp_path, lora_dropout=0.5))
    pipeline.transformer.requires_grad_(False)
    script.add_lora(pipeline, ["layers.0.attention.to_q"], args)
    layer = pipeline.transformer.layers[0].attention.to_q
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    given = torch.randn(3, layer.in_features)
    assert not torch.equal(layer(given), layer(given))
    with torch.no_grad():
        assert torch.equal(layer(given), layer(given))
