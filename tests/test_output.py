"""What a run leaves behind, and that it loads everywhere."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, ZImagePipeline
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import train_dopsd_full
import train_dopsd_lora as script
from conftest import LORA, ROOT, SECRET, WEIGHTS, guarded_environment, student_picture
from families import HIDDEN
from pipeline_dopsd import DOPSDZImagePipeline, family_of


STEPS = 4
PROMPT = "a red square"  # the first caption of the first image: the first row of a validation picture


@pytest.fixture(scope="module")
def trained(train, tmp_path_factory):
    """Output folder of a run that changed the model visibly; alpha is not the rank."""
    changes = {
        "rank": 4, "lora_alpha": 16, "rollout_steps": STEPS, "num_inference_steps": STEPS, "max_train_steps": 12, "learning_rate": 0.05,
        "ema_decay": 1.0, "validation_steps": 100, "num_validation_images": 1, "report_to": "tensorboard",
        "checkpointing_steps": 6,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", SECRET)
        return train(tmp_path_factory.mktemp("trained"), **changes)


@pytest.fixture(scope="module")
def expected(trained):
    """The student's picture at the end of training."""
    return student_picture(trained / "validation" / "step-000012.png")


def sample(pipe, **kwargs):
    """The picture that the validation drew, from the text alone."""
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return np.asarray(pipe(PROMPT, height=32, width=32, latents=noise, **kwargs).images[0]).astype(int)


def forwards(pipe):
    """Batch sizes of the transformer's forwards during one call without number of steps and guidance."""
    sizes = []
    handle = pipe.transformer.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    pipe(PROMPT, height=32, width=32, output_type="latent")
    handle.remove()
    return sizes


def test_lora_has_an_effect(trained, expected, base):
    """The tests below compare pictures; they must be others than the base's."""
    stock = ZImagePipeline.from_pretrained(base)
    plain = sample(stock, num_inference_steps=STEPS, guidance_scale=0.0)
    assert np.abs(plain - expected).max() > 20
    before = student_picture(trained / "validation" / "step-000000.png")
    assert np.abs(plain - before).max() <= 1


def test_way_a_the_base_through_the_repositorys_code(trained, expected, base):
    """The pictures of the training, in its few steps and without guidance by default."""
    pipe = DiffusionPipeline.from_pretrained(base, custom_pipeline=str(trained), trust_remote_code=True)
    pipe.load_lora_weights(trained)
    assert type(pipe).__name__ == "DOPSDZImagePipeline"
    assert np.abs(sample(pipe) - expected).max() <= 1
    assert forwards(pipe) == [1] * STEPS


def test_way_b_the_repository_alone(trained, expected):
    """One line gives base and LoRA, with the number of steps that was trained."""
    pipe = DiffusionPipeline.from_pretrained(trained, trust_remote_code=True)
    assert pipe.transformer.dtype == torch.float32
    assert np.abs(sample(pipe) - expected).max() <= 1
    assert forwards(pipe) == [1] * STEPS


def test_way_c_without_custom_code(trained, expected, base):
    """The headline: the file loads in plain diffusers at the strength that was trained."""
    pipe = DiffusionPipeline.from_pretrained(base)
    pipe.load_lora_weights(trained)
    assert type(pipe) is ZImagePipeline
    assert np.abs(sample(pipe, num_inference_steps=STEPS, guidance_scale=0.0) - expected).max() <= 1


@pytest.mark.parametrize("way", "ab")
def test_fused_pipeline_is_saved_as_a_plain_one(trained, expected, base, tmp_path, way):
    """One folder for programs that know neither LoRAs nor remote code; a folder that nothing loads would be found out
    later."""
    if way == "a":
        pipe = DiffusionPipeline.from_pretrained(
            base, custom_pipeline=str(trained), trust_remote_code=True, dtype=torch.bfloat16
        )
        pipe.load_lora_weights(trained, adapter_name="dopsd")
    else:
        pipe = DiffusionPipeline.from_pretrained(trained, trust_remote_code=True)
    assert pipe.get_active_adapters() == ["dopsd"]
    pipe.fuse_lora()
    with pytest.raises(ValueError, match="unload_lora_weights"):
        pipe.save_pretrained(tmp_path / "x")
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "x")
    assert {w.dtype for w in load_file(tmp_path / "x" / "transformer" / WEIGHTS).values()} == {pipe.transformer.dtype}
    if way == "a":
        return
    stock = DiffusionPipeline.from_pretrained(tmp_path / "x")
    assert (
        type(stock) is ZImagePipeline
        and type(DiffusionPipeline.from_pretrained(tmp_path / "x", trust_remote_code=True)) is ZImagePipeline
    )
    assert np.abs(sample(stock, num_inference_steps=STEPS, guidance_scale=0.0) - expected).max() <= 1
    ours = DOPSDZImagePipeline.from_pretrained(tmp_path / "x")
    assert np.abs(sample(ours) - expected).max() <= 1 and forwards(ours) == [1] * STEPS


NEW_PROCESS = """
import sys, numpy as np, torch
from diffusers import DiffusionPipeline
base, repo, out, prompt, steps = sys.argv[1:]
def sample(pipe, **kwargs):
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return np.asarray(pipe(prompt, height=32, width=32, latents=noise, **kwargs).images[0])
a = DiffusionPipeline.from_pretrained(base, custom_pipeline=repo, trust_remote_code=True)
a.load_lora_weights(repo)
b = DiffusionPipeline.from_pretrained(repo, trust_remote_code=True)
c = DiffusionPipeline.from_pretrained(base)
c.load_lora_weights(repo)
few = {"num_inference_steps": int(steps)}
np.savez(out, a=sample(a, **few), b=sample(b), c=sample(c, guidance_scale=0.0, **few))
"""


def test_pictures_of_the_training_in_a_new_process(trained, expected, base, tmp_path, subprocess_env):
    """What a user does on another day: the training process and the files of this project are gone."""
    command = [
        sys.executable,
        "-c",
        NEW_PROCESS,
        str(base),
        str(trained),
        str(tmp_path / "out.npz"),
        PROMPT,
        str(STEPS),
    ]
    env = {**subprocess_env, "HF_HOME": str(tmp_path / "home")}
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    pictures = np.load(tmp_path / "out.npz")
    for way in "abc":
        assert np.abs(pictures[way].astype(int) - expected).max() <= 1, way


def test_lora_file_has_the_form_that_all_programs_load(trained):
    """ComfyUI ignores an alpha in the metadata, and diffusers cannot load Z-Image files with .alpha keys."""
    saved, trained_weights = load_file(trained / LORA), load_file(trained / "checkpoint-12" / "student" / WEIGHTS)
    assert len(saved) == len(trained_weights) == 2 * 28
    for name, weights in trained_weights.items():
        key = "transformer." + name.replace(".default", "")
        strength = 16 / 4 if ".lora_B." in name else 1.0
        assert torch.equal(saved[key], weights * strength)
    with safe_open(trained / LORA, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata["transformer.r"] == metadata["transformer.lora_alpha"] == 4
    assert [p.name for p in trained.glob("*.safetensors")] == [LORA]


def test_default_layers_are_attention_and_feed_forward_of_all_blocks(trained):
    """Layers that are left out in silence are not trained: 7 in each of 2 layers and 2 refiners."""
    layers = {k.removeprefix("transformer.").rsplit(".lora_", 1)[0] for k in load_file(trained / LORA)}
    blocks = ["layers.0", "layers.1", "noise_refiner.0", "context_refiner.0"]
    kinds = ["attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"]
    kinds += ["feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]
    assert layers == {f"{block}.{kind}" for block in blocks for kind in kinds}


def test_lora_layers_are_found_by_the_end_or_beginning_of_their_name(pipeline):
    """--lora_layers takes what people write, never half a name, and no name that matches nothing."""
    found = DOPSDZImagePipeline.lora_targets(pipeline.transformer, ["to_q", "layers.1.feed_forward.w1"])
    assert sorted(found) == [
        "context_refiner.0.attention.to_q", "layers.0.attention.to_q", "layers.1.attention.to_q",
        "layers.1.feed_forward.w1", "noise_refiner.0.attention.to_q",
    ]  # fmt: skip
    refiner = DOPSDZImagePipeline.lora_targets(pipeline.transformer, ["context_refiner"])
    assert len(refiner) == 7 and all(name.startswith("context_refiner.0.") for name in refiner)
    for name in ("o_q", "attention", "to_query"):
        with pytest.raises(ValueError, match=name):
            DOPSDZImagePipeline.lora_targets(pipeline.transformer, ["to_k", name])


def test_token_is_written_nowhere(trained):
    """A folder that is pushed or shared would give the user's account away."""
    files = [p for p in trained.rglob("*") if p.is_file()]
    assert any("events.out" in p.name for p in files) and any(p.name == "dopsd_settings.json" for p in files)
    assert not [p for p in files if SECRET.encode() in p.read_bytes()]


def test_settings_of_the_run_are_kept(trained, base):
    """Months later, the only record of how the LoRA was made."""
    settings = json.loads((trained / "dopsd_settings.json").read_text())
    assert settings["learning_rate"] == 0.05 and settings["rank"] == 4 and settings["lora_alpha"] == 16
    assert settings["pretrained_model_name_or_path"] == f".../{base.name}"  # the path would name the user


def test_settings_of_a_run_make_the_same_run(trained):
    """Who shares a run by its settings gets another run."""
    settings = json.loads((trained / "dopsd_settings.json").read_text())
    paths = {name: f"new/{name}" for name, value in settings.items() if str(value).startswith(".../")}
    words = [
        "--config",
        str(trained / "dopsd_settings.json"),
        "--rank",
        "7",
        *(w for n, v in paths.items() for w in (f"--{n}", v)),
    ]
    assert vars(script.parse_args(words)) == settings | paths | {"rank": 7}


def test_settings_of_a_run_leave_defaults_to_the_next(train, base, tmp_path):
    """With another rank, base or teacher, the strength, the steps and the suffix would be those of the old one."""
    folder = train(tmp_path / "out", max_train_steps=1, rank=4)
    settings = json.loads((folder / "dopsd_settings.json").read_text())
    names = ["lora_alpha", "num_inference_steps", "teacher_context", "teacher_max_pixels", "teacher_prompt_suffix"]
    assert [settings[name] for name in names] == [None] * len(names)
    assert "vlm_model_name_or_path" in settings


def test_command_of_the_card_makes_the_same_run(train_any, tmp_path, monkeypatch):
    """A stranger who pastes it would get an error, or another training."""
    folder = train_any(tmp_path / "out", "--gradient_checkpointing", max_train_steps=1)
    monkeypatch.chdir(folder)
    command = shlex.split(re.search(r"```bash\n(.*?)\n```", Path("README.md").read_text(), re.DOTALL)[1])
    assert command[:3] == ["accelerate", "launch", Path(train_any.module.__file__).name]
    settings = json.loads(Path("dopsd_settings.json").read_text())
    paths = {name: Path(value).name for name, value in settings.items() if str(value).startswith(".../")}
    alpha = {"lora_alpha": settings["rank"]} if "rank" in settings else {}
    assert vars(train_any.module.parse_args(command[3:])) == settings | paths | alpha and paths["output_dir"] == "out"


def write_settings(folder, **settings):
    needed = {"pretrained_model_name_or_path": "-", "instance_data_dir": "-", "output_dir": "-"}
    (folder / "run.json").write_text(json.dumps(needed | settings, ensure_ascii=False), "utf-8")
    return ["--config", str(folder / "run.json")]


def test_flag_that_makes_another_of_the_file_idle(tmp_path, capsys):
    """A flag cannot be taken back, so the file's other one must not stand in its way; typed, both are a mistake."""
    words = [*write_settings(tmp_path, max_train_steps=500), "--num_train_epochs", "3"]
    assert script.parse_args(words).num_train_epochs == 3
    with pytest.raises(SystemExit):
        script.parse_args([*words, "--max_train_steps=400"])
    assert "--max_train_steps has no effect" in capsys.readouterr().err
    other = write_settings(tmp_path, num_train_epochs=3, instance_data_dir=None, dataset_name="you/dogs")
    args = script.parse_args([*other, "--max_train_steps=400", "--instance_data_dir", "images"])
    assert (args.max_train_steps, args.num_train_epochs) == (400, None)
    assert (args.instance_data_dir, args.dataset_name) == ("images", None)
    adam = write_settings(tmp_path, use_8bit_adam=True)
    assert script.parse_args([*adam, "--optimizer", "adafactor"]).optimizer == "adafactor"


def test_emoji_in_a_caption_survives_the_settings(train, tmp_path):
    """JSON's way to write it is read as half a letter by YAML."""
    folder = train(tmp_path / "out", max_train_steps=1, instance_prompt="a dog 😀")
    paths = [
        "pretrained_model_name_or_path",
        "vlm_model_name_or_path",
        "instance_data_dir",
        "context_cache_dir",
        "output_dir",
    ]
    words = ["--config", str(folder / "dopsd_settings.json"), *(word for name in paths for word in (f"--{name}", "x"))]
    assert script.parse_args(words).instance_prompt == "a dog 😀"


def test_shortened_path_in_a_config_is_asked_for(trained, capsys):
    """The result would land in a new folder named `...`, or the contexts be encoded anew there."""
    with pytest.raises(SystemExit):
        script.parse_args(["--config", str(trained / "dopsd_settings.json"), "--instance_data_dir=images"])
    error = capsys.readouterr().err
    assert error.startswith("error: --") and "was shortened" in error and "--instance_data_dir" not in error


def test_no_is_no_in_a_config_file(tmp_path):
    """YAML reads `no` as false: mixed precision would be what accelerate is configured to."""
    (tmp_path / "run.yaml").write_text("mixed_precision: no\npush_to_hub: no\n")
    words = ["--pretrained_model_name_or_path", "-", "--instance_data_dir", "-", "--output_dir", "-"]
    args = script.parse_args(["--config", str(tmp_path / "run.yaml"), *words])
    assert args.mixed_precision == "no" and args.push_to_hub is False


def test_config_file_is_read_as_it_is_written(tmp_path, monkeypatch):
    """YAML makes 20241105, 1.1, 83 and yes of these: another folder, another seed, another caption."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text(
        "output_dir: 2024_11_05\nhub_model_id: 1.10\nseed: 0123\ninstance_prompt: on\nvalidation_prompt: [a, yes, -a cat in a hat]\n"
        "random_flip: True\nrevision: null\na_flag_of_old: null\nteacher_prompt_suffix: ''\ninstance_data_dir: ~/images\npush_to_hub: true\n"
    )
    args = script.parse_args(["--config", str(tmp_path / "run.yaml"), "--pretrained_model_name_or_path", "-"])
    assert (args.output_dir, args.hub_model_id, args.seed) == ("2024_11_05", "1.10", 123)
    assert (args.instance_prompt, args.validation_prompt, args.random_flip) == (
        "on",
        ["a", "yes", "-a cat in a hat"],
        True,
    )
    assert (args.revision, args.teacher_prompt_suffix) == (None, "")
    assert args.instance_data_dir == str(tmp_path / "images")


def test_settings_do_not_ask_again_to_remove_a_run(train, tmp_path):
    """Who goes on from the settings of a run that once overwrote another would lose the run."""
    folder = train(tmp_path / "out", "--overwrite_output_dir", max_train_steps=1)
    settings = json.loads((folder / "dopsd_settings.json").read_text())
    assert not any(settings[n] for n in ("overwrite_output_dir", "resume_from_checkpoint", "push_to_hub"))


def test_validation_picture_says_what_it_shows(trained):
    """Which of three columns is the student?"""
    whole = np.asarray(Image.open(trained / "validation" / "step-000012.png").convert("L"))
    rows = (len(whole) - 20) // 52
    assert len(whole) == 20 + 52 * rows and whole.shape[1] == 3 * 80
    for top in (0, *(20 + 52 * row + 32 for row in range(rows))):
        assert (whole[top : top + 20] < 128).any(), "no heading or no text"


def test_last_lines_say_where_the_result_is_and_how_it_is_loaded(train_any, tmp_path, caplog, base):
    """After an evening of training the user has a folder, and no idea what to type."""
    caplog.set_level("INFO", train_any.module.__name__)
    train_any(tmp_path, max_train_steps=1)
    lora = train_any.module is script
    loading = f'pipe.load_lora_weights("{tmp_path}")' if lora else f'DiffusionPipeline.from_pretrained("{tmp_path}"'
    assert f"The result is in {tmp_path}" in caplog.text and loading in caplog.text
    assert lora is (f'DiffusionPipeline.from_pretrained("{base}", dtype=torch.bfloat16)' in caplog.text)
    # the base of this LoRA is a folder, which others do not have
    assert lora is ("To publish it: hf upload" not in caplog.text)


def test_model_card_of_a_run_without_network(trained, base):
    """A folder as base_model makes the Hub refuse the card; the licence of a base without a card is not made up."""
    card = ModelCard.load(trained / "README.md")
    assert card.data.base_model is None and card.data.get("license") is None and "lora" in card.data.tags
    assert f"num_inference_steps={STEPS}" in card.text and str(base) in card.text


@pytest.mark.parametrize("module", [script, train_dopsd_full])
@pytest.mark.parametrize("text", ["in quotes 'a'", "/imagine a dog", "-style"])
def test_settings_give_the_run_again(module, text, tmp_path):
    """A stranger who uses them would get an error, or another training."""
    flags = ["--pretrained_model_name_or_path", "org/base", "--dataset_name", "org/pictures", "--output_dir", "my folder",
             "--validation_prompt", "a dog", "a 'quoted' cat", "--gradient_checkpointing"]  # fmt: skip
    flags += [f"--instance_prompt={text}", f"--teacher_prompt_suffix={text}"]
    flags += ["--rank", "32", "--lora_alpha", "64"] if module is script else []  # the default of another rank
    for prompts in ([], [f"--validation_prompt={text}"]):
        args = module.parse_args([*flags, *prompts])
        (tmp_path / "settings.json").write_text(json.dumps(module.public_settings(args)))
        assert vars(module.parse_args(["--config", str(tmp_path / "settings.json")])) == vars(args)


def test_family_is_known_by_the_base(base):
    """The script chooses the family; the user does not."""
    assert family_of(str(base)) is DOPSDZImagePipeline


def test_velocity_is_noise_minus_data(pipeline):
    """With a wrong sign or time the rollout leaves the image instead of reaching it."""
    latents, embeds = torch.randn(2, 4, 8, 8), [torch.randn(n, HIDDEN) for n in (5, 40)]
    with torch.no_grad():
        contexts = [{"prompt_embeds": e} for e in embeds]
        ours = pipeline.velocity(pipeline.transformer, latents, torch.tensor(250.0), contexts)
        times = torch.tensor([0.75, 0.75])
        out = pipeline.transformer(list(latents.unsqueeze(2)), times, embeds, return_dict=False)[0]
    assert ours.shape == latents.shape and ours.dtype == torch.float32
    torch.testing.assert_close(ours, -torch.stack(out).squeeze(2))


@pytest.mark.parametrize("name", ["train_dopsd_lora.py", "train_dopsd_full.py"])
def test_two_files_alone_run_without_network(train, train_full, tmp_path, name):
    """`accelerate launch` of a script in an empty folder, on a machine that is offline and does not say so."""
    folder, trainer = tmp_path / "alone", train if "lora" in name else train_full
    folder.mkdir()
    for file in (name, "pipeline_dopsd.py"):
        (folder / file).write_bytes((ROOT / file).read_bytes())
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--mixed_precision", "no"]
    changes = {"validation_steps": 1, "report_to": "tensorboard", "context_cache_dir": None, "mixed_precision": None}
    command = [sys.executable, *launcher, name, *trainer.flags("out", max_train_steps=1, **changes)]
    environment = guarded_environment(tmp_path)
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "network.log").read_text() == ""
    expected = {
        "README.md",
        "model_index.json",
        "pipeline.py",
        "pipeline_dopsd.py",
        "checkpoint-1",
        "validation",
        "samples",
    }
    assert {p.name for p in (folder / "out").iterdir()} >= {trainer.result.split("/")[0], *expected}
