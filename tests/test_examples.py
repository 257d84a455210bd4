"""The baseline script of examples/: what D-OPSD is compared with."""

import errno
import re
import shutil
import subprocess
import sys

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file

import train_dopsd_full as full
import train_dopsd_lora as dopsd
from conftest import LORA, ROOT
from pipeline_dopsd import DOPSDZImagePipeline


sys.path.insert(0, str(ROOT / "examples"))

import train_sft  # noqa: E402


@pytest.fixture
def sft(base, images, tmp_path):
    """Runs the baseline for some flags and returns its output folder."""

    def run(name, *switches, **changes):
        values = {
            "pretrained_model_name_or_path": base,
            "instance_data_dir": images,
            "resolution": 32,
            "max_train_steps": 2,
        }
        values |= {
            "learning_rate": 1e-2,
            "mixed_precision": "no",
            **({} if "--full" in switches else {"rank": 4}),
            **changes,
        }
        words = [word for flag, value in values.items() for word in (f"--{flag}", str(value))]
        AcceleratorState._reset_state(True)
        train_sft.main(train_sft.parse_args([*words, *switches, "--output_dir", str(tmp_path / name)]))
        return tmp_path / name

    return run


def test_sft_and_dreambooth_train_the_layers_that_dopsd_trains(sft, train, tmp_path):
    """The comparison would be between different LoRAs."""
    ours = load_file(train(tmp_path / "dopsd") / LORA)
    plain = load_file(sft("sft") / LORA)
    dreambooth = load_file(sft("dreambooth", class_prompt="a square", num_class_images=2) / LORA)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in plain.items()}
    assert any((v != 0).any() for k, v in plain.items() if "lora_B" in k)
    assert any(not torch.equal(plain[k], dreambooth[k]) for k in plain)


def test_full_sft_writes_a_pipeline(sft, base):
    """The baseline of full fine-tuning trains all weights and is loaded as the result of D-OPSD is."""
    trained = DiffusionPipeline.from_pretrained(sft("full", "--full")).transformer.state_dict()
    before = DiffusionPipeline.from_pretrained(base).transformer.state_dict()
    assert not any(torch.equal(w, before[n]) for n, w in trained.items() if n.endswith("to_q.weight"))


def test_class_pictures_are_drawn_in_the_steps_of_inference(sft, monkeypatch):
    """Drawn in fewer steps, they would be worse than what the model can, and would teach it that."""
    steps, call = [], DOPSDZImagePipeline.__call__
    monkeypatch.setattr(
        DOPSDZImagePipeline, "__call__", lambda *a, **kw: steps.append(kw["num_inference_steps"]) or call(*a, **kw)
    )
    sft("out", class_prompt="a square", num_class_images=1, num_inference_steps=3, rollout_steps=2, max_train_steps=1)
    assert steps == [3]


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_training_that_diverges_ends_without_a_result(sft, tmp_path, monkeypatch, broken):
    """A LoRA of NaN would be saved as if all were well, and only its black pictures would show it."""
    loss = train_sft.flow_matching_loss

    def diverged(*args):
        value = loss(*args)
        if broken == "gradient":
            value.register_hook(lambda gradient: gradient * torch.nan)
            return value
        return value * torch.nan

    monkeypatch.setattr(train_sft, "flow_matching_loss", diverged)
    with pytest.raises(dopsd.InputError, match="not finite"):
        sft("out")
    assert not (tmp_path / "out" / LORA).exists()


def test_step_that_the_scaler_skips_is_no_divergence(sft, monkeypatch):
    """With fp16 gradients overflow until the scaler has found its scale, and every such run would end there."""
    make = dopsd.make_accelerator

    def with_scaler(args):
        accelerator = make(args)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
        return accelerator

    monkeypatch.setattr(dopsd, "make_accelerator", with_scaler)
    weights = load_file(sft("out", max_train_steps=1) / LORA)
    # as they began
    assert not any(w.any() for n, w in weights.items() if "lora_B" in n)


@pytest.mark.parametrize(
    "words",
    ["--resume_from_checkpoint latest", "--push_to_hub", "--vlm_model_name_or_path vlm", "--ema_decay 0.9", "--validation_steps 1",
     "--prior_prompts file", "--fused_backward_pass", "--stochastic_rounding", "--full --rank 8", "--full --quantization int8"],
)  # fmt: skip
def test_flags_that_would_do_nothing_are_refused(words, capsys):
    """A baseline that is not what was asked for is not fair, and nothing would show it."""
    needed = ["--pretrained_model_name_or_path", "base", "--instance_data_dir", "data", "--output_dir", "out"]
    with pytest.raises(SystemExit):
        train_sft.parse_args([*needed, *words.split()])
    assert "unrecognized arguments: --" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("words", ["--num_class_images 0", "--num_class_images -1", "--prior_loss_weight -1"])
def test_class_pictures_that_would_not_preserve_are_refused(words, capsys):
    """No pictures end in a traceback once weights have loaded, and a negative weight trains the prior away."""
    needed = ["--pretrained_model_name_or_path", "base", "--instance_data_dir", "data", "--output_dir", "out"]
    with pytest.raises(SystemExit):
        train_sft.parse_args([*needed, "--class_prompt", "a square", *words.split()])
    assert capsys.readouterr().err.startswith(f"error: {words.split()[0]}: must be a ")


@pytest.mark.parametrize("words", ["--num_class_images 5", "--prior_loss_weight 2"])
def test_flags_of_class_pictures_need_a_class_prompt(words, capsys):
    """Without one they do nothing, and nothing would show it."""
    needed = ["--pretrained_model_name_or_path", "base", "--instance_data_dir", "data", "--output_dir", "out"]
    with pytest.raises(SystemExit):
        train_sft.parse_args([*needed, *words.split()])
    assert capsys.readouterr().err == f"error: {words.split()[0]} has no effect without --class_prompt\n"


def test_split_batch_trains_as_the_whole(sft):
    """With half a batch and two micro-steps, a user with a small card compares another training."""
    changes = {"optimizer": "adafactor", "class_prompt": "a square", "num_class_images": 2, "adam_weight_decay": 0.1}
    whole = load_file(sft("whole", train_batch_size=2, **changes) / LORA)
    split = load_file(sft("split", train_batch_size=1, gradient_accumulation_steps=2, **changes) / LORA)
    other = load_file(sft("other", train_batch_size=1, **changes) / LORA)
    for name, weight in whole.items():
        torch.testing.assert_close(split[name], weight, rtol=1e-3, atol=1e-5)
    assert max((other[n] - w).abs().max() for n, w in whole.items()) > 1e-3


def test_means_of_saving_memory_are_honoured(sft, monkeypatch):
    """They change memory and time alone, so only what is called shows that they work."""
    seen, quantised, checkpoint = [], [], dopsd.checkpoint
    monkeypatch.setattr(
        dopsd, "checkpoint", lambda block, *rest, **kwargs: seen.append(block) or checkpoint(block, *rest, **kwargs)
    )
    place = dopsd.place_for_training
    monkeypatch.setattr(
        dopsd, "place_for_training", lambda pipeline, *rest: quantised.append(pipeline.transformer.config.get("quantization_config"))
        or place(pipeline, *rest)
    )  # fmt: skip
    changes = {
        "mixed_precision": "bf16",
        "quantization": "int8",
        "encoder_quantization": "int8",
    }
    folder = sft("out", "--gradient_checkpointing", checkpointed_blocks=0.5, max_train_steps=1, **changes)
    assert len(set(seen)) == 2 and quantised[0]  # of four blocks
    assert all(torch.isfinite(weight).all() for weight in load_file(folder / LORA).values())


def test_mistake_ends_in_one_line(tmp_path, subprocess_env, base):
    """As in the training scripts: found before weights load, without a traceback."""
    (tmp_path / "empty").mkdir()
    command = [
        sys.executable,
        ROOT / "examples" / "train_sft.py",
        "--pretrained_model_name_or_path",
        base,
        "--output_dir",
        tmp_path / "out",
    ]
    result = subprocess.run(
        [*command, "--instance_data_dir", tmp_path / "empty"], env=subprocess_env, capture_output=True, text=True
    )
    assert result.returncode == 1 and "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and str(tmp_path / "empty") in last


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pretrained_model_name_or_path": "no//typo"}, ["--pretrained_model_name_or_path no//typo is no folder"]),
        ({"pretrained_model_name_or_path": "{tmp}/base"}, ["--pretrained_model_name_or_path", "base", "no weights"]),
        ({"output_dir": "{images}/out"}, ["--output_dir", "--instance_data_dir", "choose another folder"]),
        ({"output_dir": "{tmp}/taken"}, ["--output_dir", "taken is in use by", "choose another folder"]),
        ({"output_dir": "{tmp}/lora"}, [f"lora holds {LORA}; choose another folder"]),
        ({"output_dir": "{tmp}/full", "full": True}, ["full holds transformer; choose another folder"]),
    ],
)
def test_what_cannot_work_is_named_before_weights_load(sft, base, images, tmp_path, monkeypatch, changes, words):
    """Found later, a mistake costs the minutes in which the models load, and a library's message names no flag."""
    shutil.copytree(base, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / LORA).touch()
    (tmp_path / "full" / "transformer").mkdir(parents=True)
    monkeypatch.setattr(dopsd, "load_for_training", lambda *args: pytest.fail("weights load"))
    changes = {n: v if v is True else v.format(images=images, tmp=tmp_path) for n, v in changes.items()}
    switches = ["--full"] if changes.pop("full", False) else []
    (tmp_path / "taken").mkdir()
    with FileLock(tmp_path / "taken" / ".lock"), pytest.raises(dopsd.InputError) as caught:
        sft(changes.pop("output_dir", "out"), *switches, **changes)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("switches", [[], ["--full"]], ids=["lora", "full"])
@pytest.mark.parametrize("place", ["encode", "flow_matching_loss"])
def test_out_of_memory_names_flags_that_the_script_takes(sft, monkeypatch, place, switches):
    """A traceback names no remedy, and one of another script would be refused."""

    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    monkeypatch.setattr(train_sft, place, fail)
    with pytest.raises(dopsd.InputError) as caught:
        sft("out", *switches)
    remedies = str(caught.value).split("Cheapest remedies: ")[1]
    assert ("--encoder_quantization int8" if place == "encode" else "--use_8bit_adam") in remedies
    assert set(re.findall(r"--(\w+)", remedies)) <= train_sft.COMMON | train_sft.FULL | train_sft.LORA


@pytest.mark.parametrize(
    ("module", "name", "switches"), [(dopsd, "save_lora", []), (full, "save_pipeline", ["--full"])]
)
def test_result_that_cannot_be_written_is_told_in_one_line(sft, monkeypatch, module, name, switches):
    """On a full disk the run ended in a traceback; it has no checkpoint to go on from, so none must be promised."""

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, name, fail)
    with pytest.raises(dopsd.InputError, match="--output_dir .*: .*No space left") as caught:
        sft("out", *switches, max_train_steps=1)
    assert "--resume_from_checkpoint" not in str(caught.value)


def test_rounding_without_bf16_is_refused(sft):
    """The baseline's weights would stay in fp32, without what the flag says."""
    with pytest.raises(ValueError, match="give --mixed_precision bf16"):
        sft("out", "--full", "--stochastic_rounding")


def test_flow_matching_loss_is_zero_for_the_true_velocity():
    """A wrong sign or time would weaken the baseline."""

    class Exact:
        """Knows x0 and returns the velocity noise - x0 = (x_s - x0) / s."""

        transformer = None

        def velocity(self, transformer, states, timestep, contexts):
            return (states - latents) / (timestep / 1000).view(-1, 1, 1, 1)

    latents = torch.randn(1, 4, 8, 8).expand(16, -1, -1, -1)
    data = latents, [[{"prompt_embeds": torch.zeros(1)}]] * 16
    examples = train_sft.draw(*data, 16, torch.Generator().manual_seed(0), 3.0, "cpu")
    assert train_sft.flow_matching_loss(Exact(), *examples) < 1e-5
    parts = train_sft.micro_batches(examples, 4)
    assert len(parts) == 4 and torch.equal(torch.cat([part[0] for part in parts]), examples[0])


def test_data_is_read_one_by_one_and_goes_to_the_gpu_by_the_batch(pipeline, monkeypatch):
    """All images, or all contexts on the GPU, would fill the memory of whoever has thousands; a prompt of a hundred
    class images would be encoded a hundred times."""
    seen, latents_of, encode = [], pipeline.image_latents, pipeline.encode_student
    monkeypatch.setattr(pipeline, "image_latents", lambda pixels: seen.append("latents") or latents_of(pixels))
    monkeypatch.setattr(pipeline, "encode_student", lambda texts: seen.extend(texts) or encode(texts))
    images = (seen.append("image") or Image.new("RGB", (32, 32)) for _ in range(3))
    data = train_sft.encode(pipeline, images, [["red"], ["red", "blue"], ["red"]])
    assert seen == ["image", "latents"] * 3 + ["red", "blue"]
    assert [len(own) for own in data[1]] == [1, 2, 1] and data[1][0][0] is data[1][2][0]
    states, contexts, *rest = train_sft.draw(*data, 2, torch.Generator().manual_seed(0), 3.0, "meta")
    assert {t.device.type for t in [states, *rest, *(c["prompt_embeds"] for c in contexts)]} == {"meta"}
    assert data[0].device.type == "cpu"


@pytest.mark.parametrize("steps", [4, 1])
def test_flow_matching_draws_times_from_the_schedule_of_inference(pipeline, steps):
    """At other times than inference uses, the baseline would learn less; a grid of one step ended in a traceback."""
    assert train_sft.shift_of(pipeline, torch.empty(1, 4, 8, 8), steps) == pytest.approx(3.0, rel=1e-3)
