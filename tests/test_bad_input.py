"""Input that cannot work: one clear error before any weights load, and nothing lost."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT, guarded_environment, save_images
from families import save_z_image
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


def test_a_copy_as_teacher_keeps_no_prior_prompts(refused):
    """It predicts what the student does: a third of the steps would do nothing, and nothing would be kept."""
    refused("--ema_decay 0", "--prior_prompts none", ema_decay=0.0, prior_prompts=None)


def test_contexts_among_the_images(refused, images):
    """Each of them would be warned of as a file that is not used."""
    refused("--context_cache_dir", "images", context_cache_dir=images)


def test_folder_of_another_kind(refused, vlm, tmp_path):
    """What users of other programs have, a file of weights; or the VLM for the base."""
    (tmp_path / "model.safetensors").write_bytes(b"x")
    for name in (tmp_path / "model.safetensors", vlm):
        refused(f"--pretrained_model_name_or_path {name} holds no", "Hub", pretrained_model_name_or_path=name)


def test_prior_prompts(refused, tmp_path):
    """A mistyped or empty file of prior prompts would train without them; with one batch in one, no image would be
    seen."""
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


def test_warm_up_beyond_the_end(refused):
    """The whole run would be a fraction of the rate."""
    changes = {"lr_scheduler": "cosine", "lr_warmup_steps": 500, "max_train_steps": 2}
    refused("--lr_warmup_steps 500", "the run has 2 steps", **changes)


def test_file_name_that_is_no_text(refused, images, tmp_path):
    """datasets ends in twenty lines that name no file."""
    folder = shutil.copytree(images, tmp_path / "copy")
    shutil.copy(next(folder.glob("*.png")), os.fsencode(folder) + b"/caf\xe9.png")
    refused("--instance_data_dir", "udce9", "rename", instance_data_dir=folder)


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
    save_z_image(tmp_path / "short", tokenizer, axes_lens=(66, 64, 64))
    changes = {"pretrained_model_name_or_path": tmp_path / "short", "resolution": 128}
    refused("at most 64", "--teacher_max_pixels", **changes)
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


@pytest.mark.parametrize("flag", ["pretrained_model_name_or_path", "dataset_name"])
def test_hub_that_cannot_be_reached_is_asked_once(flags, tmp_path, flag):
    """A mistyped folder is taken for a repository, and the libraries ask for it for 40 s before they tell a riddle."""
    changes = {"instance_data_dir": None} if flag == "dataset_name" else {}
    command = [
        sys.executable,
        str(ROOT / "train_dopsd_lora.py"),
        *flags(tmp_path / "out", **{**changes, flag: "my_images"}),
    ]
    result = subprocess.run(command, env=guarded_environment(tmp_path), capture_output=True, text=True, timeout=300)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert f"--{flag} my_images is no folder" in line and "HF_HUB_OFFLINE=1" in line
    # one is a question of the library, about who runs it
    assert len((tmp_path / "network.log").read_text().splitlines()) <= 2
