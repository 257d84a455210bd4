"""Input that cannot work: one clear error before any weights load, and nothing lost."""

import json
import shutil
import subprocess
import sys

import pytest

from conftest import LORA, ROOT, WEIGHTS, save_base, save_images
from pipeline_dopsd import DOPSDZImagePipeline


@pytest.fixture
def refused(train, tmp_path, monkeypatch, capsys):
    """Asserts that a command line ends with one error that holds all `words`, before weights load."""

    def loaded(*args, **kwargs):
        pytest.fail("weights were loaded before the input was checked")

    def run(*words, output_dir=tmp_path / "out", **changes):
        with monkeypatch.context() as patch:
            patch.setattr(DOPSDZImagePipeline, "from_pretrained", loaded)
            patch.setattr("transformers.PreTrainedModel.from_pretrained", loaded)
            patch.setattr("diffusers.ModelMixin.from_pretrained", loaded)
            with pytest.raises((ValueError, SystemExit)) as caught:
                train(output_dir, **changes)
        if caught.type is SystemExit:  # argparse prints its message
            assert caught.value.code == 2
            message = capsys.readouterr().err.strip().splitlines()[-1]
        else:
            message = str(caught.value)
        for word in words:
            assert str(word) in message
        return message

    return run


@pytest.fixture
def folder(tmp_path):
    return save_images(tmp_path / "images")


def test_missing_folder(refused, tmp_path):
    """A mistyped path."""
    refused("--instance_data_dir", tmp_path / "nowhere", instance_data_dir=tmp_path / "nowhere")


def test_prior_prompts(refused, tmp_path):
    """A mistyped or empty file of prior prompts would train without them; with one batch in one, no image would be seen."""
    refused("--prior_prompts", tmp_path / "nowhere.txt", prior_prompts=tmp_path / "nowhere.txt")
    (tmp_path / "empty.txt").write_text("\n \n")
    refused("--prior_prompts", "holds no prompt", prior_prompts=tmp_path / "empty.txt")
    refused("--prior_every", "at least 2", prior_every=1)


def test_folder_without_images(refused, tmp_path):
    """A folder of other things, with hidden files of the file manager."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".hidden.png").touch()
    refused("--instance_data_dir", "no images", instance_data_dir=tmp_path / "empty")


@pytest.mark.parametrize("damage", ["empty", "truncated", "text"])
def test_unreadable_image(refused, folder, damage):
    """One bad file among thousands must be named."""
    path = folder / "c.png"
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "truncated": content[: len(content) // 2], "text": b"no image"}[damage])
    refused(path, "cannot be read", instance_data_dir=folder)


def test_image_without_caption(refused, folder):
    """Training on an empty prompt would be a silent mistake."""
    (folder / "b.txt").unlink()
    refused(folder / "b.png", "--instance_prompt", instance_data_dir=folder)


def test_caption_that_is_no_text(refused, folder):
    """A caption saved in another encoding must be named among thousands."""
    (folder / "b.txt").write_bytes("a caf\u00e9".encode("latin-1"))
    refused(folder / "b.txt", "UTF-8", instance_data_dir=folder)


def test_caption_without_image(refused, folder):
    """A caption whose image has another name would be passed over."""
    (folder / "e.txt").write_text("a caption")
    refused(folder / "e.txt", "without image", instance_data_dir=folder)


def test_unknown_lora_layer(refused):
    """A name that matches nothing would leave the layers that were meant untrained."""
    message = refused("--lora_layers", "to_query", lora_layers="to_k,to_query")
    assert "attention.to_q" in message  # what there is


def test_vlm_of_another_width(refused, wide_vlm):
    """Qwen3-VL comes in sizes, one of which fits."""
    refused("--vlm_model_name_or_path", wide_vlm, "128", "64", vlm_model_name_or_path=wide_vlm)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("rollout_steps", 0), ("rollout_steps", -1), ("states_per_rollout", 0), ("states_per_rollout", 3), ("train_batch_size", 0), ("gradient_accumulation_steps", 0),
        ("max_train_steps", 0), ("checkpointing_steps", 0), ("rank", 0), ("ema_decay", 1.5), ("ema_decay", -0.1),
        ("loss_weighting", "other"), ("num_validation_images", 0), ("lr_scheduler", "piecewise_constant"),
    ],
)  # fmt: skip
def test_flags_out_of_range(refused, flag, value):
    """The flag is named."""
    refused(f"--{flag}", value, **{flag: value})


def test_attention_without_a_backward(refused):
    """The layers in front of it would stay as they are, without a word."""
    refused("--attention_backend", "sage", attention_backend="sage")


def test_no_data_or_two_kinds(refused, images):
    """Which of two data sets would be trained on must not be left to a guess."""
    refused("--instance_data_dir", "--dataset_name", instance_data_dir=None)
    refused("--instance_data_dir", "--dataset_name", dataset_name=images)


def test_resolution_not_divisible(refused):
    """The transformer cannot cut such latents into patches."""
    refused("--resolution 36", "multiple of 8", resolution=36)


def test_context_longer_than_the_position_table(refused, folder):
    """An index error in the transformer, after hours of encoding; the caption that is too long is named."""
    (folder / "c.txt").write_text("a long caption " * 120)
    refused(folder / "c.png", "at most 480", "a long caption", instance_data_dir=folder)


def test_image_too_large_for_the_position_table(refused, tokenizer, tmp_path):
    """With a short table, the image alone is too long; a lower --teacher_max_pixels cures it, as the error says."""
    save_base(tmp_path / "short", tokenizer, axes_lens=(130, 64, 64))
    changes = {"pretrained_model_name_or_path": tmp_path / "short", "resolution": 128}
    refused("at most 128", "--teacher_max_pixels", **changes)
    with pytest.raises(pytest.fail.Exception, match="weights were loaded"):
        refused(**changes, teacher_max_pixels=32 * 32)


def test_output_folder_not_writable(refused, tmp_path):
    """Found before hours of training, not when the LoRA is saved."""
    (tmp_path / "file").write_text("kept")
    refused("--output_dir", "not writable", output_dir=tmp_path / "file" / "out")
    refused("--output_dir", "not writable", output_dir=tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"


def test_unknown_family(refused, base, tmp_path):
    """A base that the method is not written for, with the names of those that it is."""
    shutil.copytree(base, tmp_path / "base")
    index = json.loads((base / "model_index.json").read_text()) | {"_class_name": "StableDiffusionPipeline"}
    (tmp_path / "base" / "model_index.json").write_text(json.dumps(index))
    refused("StableDiffusionPipeline", "ZImagePipeline", pretrained_model_name_or_path=tmp_path / "base")


# ------------------------------------------------------------------------------------------------------------ resuming
@pytest.fixture(scope="module")
def run(train, tmp_path_factory):
    return train(tmp_path_factory.mktemp("run"), max_train_steps=2, checkpointing_steps=1)


@pytest.fixture
def output(run, tmp_path):
    """Output folder of a finished run, with checkpoints of steps 1 and 2."""
    return shutil.copytree(run, tmp_path / "out")


def content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_missing_checkpoint(refused, output):
    """A mistyped path must not start a new training over the old one."""
    before = content(output)
    refused("--resume_from_checkpoint", "checkpoint-7", resume_from_checkpoint=output / "checkpoint-7")
    assert content(output) == before


@pytest.mark.parametrize("name", ["trainer_state.json", f"student/{WEIGHTS}", f"teacher/{WEIGHTS}", "optimizer.bin"])
@pytest.mark.parametrize("damage", ["missing", "half"])
def test_half_written_checkpoint(refused, output, name, damage):
    """Of a full disk or a copy that was cut off: named, and with nothing already written lost."""
    path = output / "checkpoint-2" / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    before = content(output)
    refused("--resume_from_checkpoint", "checkpoint-2", resume_from_checkpoint="latest", max_train_steps=3)
    assert content(output) == before


OTHER = {
    "rank": 8, "seed": 3, "rollout_steps": 3, "train_batch_size": 2, "ema_decay": 0.5, "gradient_accumulation_steps": 5,
    "learning_rate": 0.5, "adam_beta2": 0.5, "loss_weighting": "x0", "states_per_rollout": 2,
}  # fmt: skip


@pytest.mark.parametrize("flag", OTHER)
def test_checkpoint_of_other_settings(refused, output, flag):
    """A resume under other settings is no resume, and a learning rate would be ignored; both values are named."""
    value = OTHER[flag]
    before = content(output)
    refused(f"--{flag}", value, "checkpoint-2", resume_from_checkpoint="latest", max_train_steps=3, **{flag: value})
    assert content(output) == before


def test_failed_run_leaves_the_earlier_result(refused, output, folder):
    """The LoRA of yesterday survives the mistake of today."""
    before = content(output)
    (folder / "a.png").write_bytes(b"")
    refused(folder / "a.png", instance_data_dir=folder)
    refused("--lora_layers", lora_layers="nothing")
    assert content(output) == before and (output / LORA).is_file()


def test_command_line_ends_with_one_line_and_an_exit_code(flags, tmp_path, subprocess_env):
    """A scheduler or a shell script must see that the run failed, and the user no traceback."""
    (tmp_path / "empty").mkdir()
    command = [
        sys.executable,
        str(ROOT / "train_dopsd_lora.py"),
        *flags(tmp_path / "out", instance_data_dir=tmp_path / "empty"),
    ]
    result = subprocess.run(command, env=subprocess_env, capture_output=True, text=True, timeout=300)
    assert result.returncode not in (0, None)
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and str(tmp_path / "empty") in last
