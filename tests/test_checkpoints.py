"""What a run may be resumed from, what it may overwrite, and that nothing in a checkpoint is believed unseen."""

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

import train_dopsd_lora as script
from conftest import LORA, ROOT, WEIGHTS, ForkedScript, heed_signals, save_images


STATE = "dopsd_state.json"


def content(folder):
    """Bytes of every file by its place, the lock excepted."""
    return {
        p.relative_to(folder): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and not p.name.startswith(".lock")
    }


def assert_same(ours, theirs):
    """The tensors of two files are equal bit for bit; their metadata has no fixed order."""
    ours, theirs = load_file(ours), load_file(theirs)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def refused(train, output, *words, **changes):
    """Asserts that a command ends with one sentence that holds all `words`, and leaves the folder as it was."""
    before = content(output)
    with pytest.raises(ValueError) as caught:
        train(output, **changes)
    message = str(caught.value)
    assert "\n" not in message and not [word for word in words if str(word) not in message], message
    assert content(output) == before
    return message


@pytest.fixture(scope="module", params=["lora", "full"])
def runs(request, train, train_full, tmp_path_factory):
    """A script and the folder of a finished run of its, with checkpoints of steps 1, 2 and 3."""
    trainer = train if request.param == "lora" else train_full
    changes = {"max_train_steps": 3, "checkpointing_steps": 1, "checkpoints_total_limit": 3}
    return trainer, trainer(tmp_path_factory.mktemp(f"run_{request.param}"), **changes)


@pytest.fixture
def trainer(runs):
    return runs[0]


@pytest.fixture
def output(runs, tmp_path):
    """A copy of the finished run's folder."""
    return shutil.copytree(runs[1], tmp_path / "out")


# -------------------------------------------------------------------------------------------------- what a run may become
def write_captions(folder):
    (folder / "b.txt").write_text("another caption")


def replace_image(folder):
    Image.new("RGB", (40, 40), "black").save(folder / "b.png")


def remove_image(folder):
    (folder / "b.png").unlink()
    (folder / "b.txt").unlink()


@pytest.mark.parametrize(
    ("change", "name"), [(write_captions, "captions"), (replace_image, "images"), (remove_image, "images")]
)
def test_resume_with_other_data_is_refused(trainer, output, tmp_path, change, name):
    """Half a training on one set of images and half on another is a LoRA that nobody asked for."""
    folder = save_images(tmp_path / "images")
    change(folder)
    refused(trainer, output, "checkpoint-3", name, "--output_dir",
            resume_from_checkpoint="latest", max_train_steps=4, instance_data_dir=folder)  # fmt: skip


def test_resume_with_the_same_data_elsewhere_goes_on(trainer, output, tmp_path):
    """Folders are moved and models copied: their content counts."""
    base, vlm = tmp_path / "base", tmp_path / "vlm"
    flags = trainer.flags(output)
    for flag, copy in (("--pretrained_model_name_or_path", base), ("--vlm_model_name_or_path", vlm)):
        shutil.copytree(flags[flags.index(flag) + 1], copy)
    trainer(output, resume_from_checkpoint="latest", max_train_steps=4, instance_data_dir=save_images(tmp_path / "images"),
            pretrained_model_name_or_path=base, vlm_model_name_or_path=vlm, checkpointing_steps=2)  # fmt: skip
    assert (output / "checkpoint-4").is_dir()


def test_resume_on_another_base_is_refused(trainer, output, base, tmp_path):
    """A LoRA begun on one base and ended on another of the same shapes fits neither."""
    other = shutil.copytree(base, tmp_path / "base")
    path = other / "transformer" / WEIGHTS
    weights = load_file(path)
    weights["layers.0.attention.to_q.weight"] += 0.1
    save_file(weights, path)
    refused(trainer, output, "weights of the transformer", resume_from_checkpoint="latest", max_train_steps=4,
            pretrained_model_name_or_path=other)  # fmt: skip


def test_resume_on_another_schedule_is_refused(trainer, output, base, tmp_path):
    """The student's few steps would be others from there on."""
    other = shutil.copytree(base, tmp_path / "base")
    path = other / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"shift": 9.0}))
    refused(trainer, output, "settings of the scheduler", resume_from_checkpoint="latest", max_train_steps=4,
            pretrained_model_name_or_path=other)  # fmt: skip


def test_resume_with_another_vlm_or_other_prior_prompts_is_refused(trainer, output, vlm, tmp_path):
    """The teacher would change midway."""
    other = shutil.copytree(vlm, tmp_path / "vlm")
    weights = load_file(other / "model.safetensors")
    weights[min(name for name in weights if "visual" in name)] += 0.1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    resume = {"resume_from_checkpoint": "latest", "max_train_steps": 4}
    refused(trainer, output, "text encoder, VAE or VLM", vlm_model_name_or_path=other, **resume)
    (tmp_path / "prompts.txt").write_text("a red car")
    refused(trainer, output, "prior prompts", prior_prompts=tmp_path / "prompts.txt", **resume)


OTHER = {
    "seed": 3, "rollout_steps": 3, "ema_decay": 0.5, "gradient_accumulation_steps": 5, "learning_rate": 0.5, "adam_beta2": 0.5,
    "loss_weighting": "x0", "resolution": 40, "mixed_precision": "bf16", "teacher_image": "other", "max_grad_norm": 0.5,
    "lr_scheduler": "cosine", "teacher_max_pixels": 1024, "teacher_prompt_suffix": ", new",
}  # fmt: skip


@pytest.mark.parametrize("flag", OTHER)
def test_resume_under_other_settings_is_refused(trainer, output, flag):
    """A resume under other settings is no resume; both values are named."""
    value = OTHER[flag]
    refused(
        trainer,
        output,
        f"--{flag}",
        value,
        "checkpoint-3",
        resume_from_checkpoint="latest",
        max_train_steps=4,
        **{flag: value},
    )


def change_state(checkpoint, **changes):
    """Puts other values into what a checkpoint notes of itself, with a right checksum."""
    state = json.loads((checkpoint / STATE).read_text())
    del state["checksum"]
    state |= changes
    (checkpoint / STATE).write_text(json.dumps({**state, "checksum": script.digest_of(state)}))


def test_flag_that_another_version_did_not_have_is_compared(trainer, output):
    """A flag that is new, at its default, may change what is trained: a resume must not take it over without a
    word."""
    settings = script.read_state(output / "checkpoint-3")["settings"]
    change_state(output / "checkpoint-3", settings={n: v for n, v in settings.items() if n != "states_per_rollout"})
    refused(trainer, output, "--states_per_rollout is 1", "None", resume_from_checkpoint="latest", max_train_steps=4)


def test_resume_with_another_batch_is_refused(trainer, output):
    """The order of the images depends on the images per micro-step, over all processes."""
    refused(
        trainer, output, "--train_batch_size", resume_from_checkpoint="latest", max_train_steps=4, train_batch_size=2
    )


def test_list_of_what_may_change_is_that_of_the_docs():
    """What a user may change on resume is read there; it must be what the scripts allow."""
    text = (ROOT / "docs" / "training.md").read_text("utf-8")
    listed = text.split("**A resume may change the flags of this table.**")[1].split("**Checkpoints**")[0]
    assert {name for name in script.MAY_CHANGE if f"`--{name}`" not in listed} == set()
    assert listed.count("`--") == len(script.MAY_CHANGE)


def test_resume_beyond_the_last_step_is_refused(trainer, output):
    """The card would say fewer steps than the weights have."""
    refused(trainer, output, "--max_train_steps 2", "at least 3", resume_from_checkpoint="latest", max_train_steps=2)


def test_other_scripts_checkpoint_is_refused(train, train_full, runs, tmp_path):
    """Weights of a LoRA are no weights of a model."""
    trainer, folder = runs
    other, name = (train_full, "train_dopsd_lora.py") if trainer is train else (train, "train_dopsd_full.py")
    (tmp_path / "new").mkdir()
    refused(other, tmp_path / "new", name, resume_from_checkpoint=folder / "checkpoint-3", max_train_steps=4)


# ------------------------------------------------------------------------------------------------------- the output folder
def test_fresh_start_over_a_run_is_refused(trainer, output):
    """Its checkpoints would be mixed with the new ones, and its result replaced."""
    refused(trainer, output, output, "checkpoint-1", "--resume_from_checkpoint latest", "--overwrite_output_dir")
    for checkpoint in output.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    # there is none to go on from: it would start anew
    for asked in (None, "latest"):
        refused(trainer, output, "no checkpoint left", "--overwrite_output_dir", resume_from_checkpoint=asked)


@pytest.mark.parametrize("name", ["checkpoint_3", "Latest", "checkpoint-9", "checkpoint-3/student", "."])
def test_misspelt_checkpoint_is_named(trainer, output, name):
    """Asked to go on, a user would read that the folder holds a run, and of the flag that removes it."""
    asked = name if name in ("Latest", "checkpoint-9") else output / name
    message = refused(
        trainer, output, "is no checkpoint", "checkpoint-1, ", "checkpoint-3", resume_from_checkpoint=asked
    )
    assert "overwrite" not in message


def test_resume_in_somebodys_project_is_refused(trainer, tmp_path, monkeypatch):
    """Started in it by mistake, a training would replace its README.md; `latest` is no checkpoint there."""
    (tmp_path / "samples").mkdir()
    (tmp_path / "README.md").write_text("mine")
    monkeypatch.chdir(tmp_path)
    refused(trainer, tmp_path, "no run of this script wrote", resume_from_checkpoint="latest")


def test_link_to_a_checkpoint_is_that_checkpoint(trainer, output):
    """The steps from there on would be mixed with those of a later checkpoint."""
    (output / "best").symlink_to("checkpoint-1")
    refused(trainer, output, "checkpoint-1", "checkpoint-3", resume_from_checkpoint=output / "best", max_train_steps=4)


def test_checkpoint_is_found_by_its_name(trainer, output):
    """diffusers' scripts take `checkpoint-500`, shells add a slash; users would be told that there is none."""
    trainer(output, resume_from_checkpoint="checkpoint-3/", max_train_steps=4)
    assert (output / "checkpoint-4").is_dir()


def test_linked_checkpoint_gives_way_to_the_limit(trainer, output, tmp_path):
    """Each run would end one step later, with the advice to resume."""
    shutil.move(output / "checkpoint-1", tmp_path / "moved")
    (output / "checkpoint-1").symlink_to(tmp_path / "moved")
    trainer(output, resume_from_checkpoint="latest", max_train_steps=4, checkpoints_total_limit=1)
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-4"] and (tmp_path / "moved").is_dir()


def test_overwriting_removes_what_the_run_wrote_and_nothing_else(trainer, output, tmp_path):
    """--overwrite_output_dir on a folder with somebody's notes in it must not cost the notes."""
    for name in (
        "notes.txt",
        ".mine.tmp",
        "validation/mine.png",
        "contexts/x.safetensors",
        "mine/checkpoint-1/y",
        "samples/2024-mine.png",
    ):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text("kept")
    trainer(output, "--overwrite_output_dir", max_train_steps=2, learning_rate=2e-2)
    assert [p.name for p in output.glob("checkpoint-*")] == ["checkpoint-2"]
    fresh = trainer(tmp_path / "fresh", max_train_steps=2, learning_rate=2e-2)
    assert_same(output / trainer.result, fresh / trainer.result)
    kept = [p for p in output.rglob("*") if p.is_file() and p.read_bytes() == b"kept"]
    assert len(kept) == 6


def test_overwriting_stays_in_the_folder(trainer, output, tmp_path):
    """The model_index.json of a folder from elsewhere may name any path as a component."""
    for name in ("../kept", str(tmp_path / "kept"), ".."):
        (tmp_path / "kept").mkdir(exist_ok=True)
        index = json.loads((output / "model_index.json").read_text()) | {name: ["diffusers", "X"]}
        (output / "model_index.json").write_text(json.dumps(index))
        args = trainer.module.parse_args(trainer.flags(output, "--overwrite_output_dir"))
        trainer.module.clear_output_dir(args)
        assert (tmp_path / "kept").is_dir() and output.is_dir()
        (output / "model_index.json").write_text(json.dumps(index))


def test_overwriting_waits_for_all_checks(trainer, output, tmp_path):
    """A mistyped flag beside --overwrite_output_dir must not cost the old run."""
    before = content(output)
    with pytest.raises(ValueError, match="nowhere"):
        trainer(output, "--overwrite_output_dir", instance_data_dir=tmp_path / "nowhere")
    assert content(output) == before


@pytest.mark.parametrize("name", ["README.md", "model_index.json", LORA])
def test_files_of_another_project_are_not_overwritten(trainer, tmp_path, name):
    """--output_dir . in somebody's repository."""
    (tmp_path / name).write_text("{}")
    refused(trainer, tmp_path, name, "another folder")
    with pytest.raises(ValueError, match=name):
        trainer(tmp_path, "--overwrite_output_dir")
    assert (tmp_path / name).read_text() == "{}"


@pytest.mark.parametrize("name", ["samples", "transformer"])
def test_folders_of_another_project_are_not_replaced(trainer, tmp_path, name):
    """--output_dir on a folder of one's own pictures or weights, which would be gone at the first validation."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "0.png").write_text("kept")
    refused(trainer, tmp_path, name, "another folder")
    assert (tmp_path / name / "0.png").read_text() == "kept"


def test_checkpoints_of_another_program_are_not_touched(trainer, tmp_path):
    """Other trainers name their folders alike."""
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "model.bin").write_text("kept")
    refused(trainer, tmp_path, "checkpoint-1")
    with pytest.raises(ValueError, match="checkpoint-1"):
        trainer(tmp_path, "--overwrite_output_dir")
    assert (tmp_path / "checkpoint-1" / "model.bin").read_text() == "kept"


@pytest.mark.parametrize("place", ["", "inside", ".."])
def test_output_and_images_lie_apart(trainer, tmp_path, place):
    """The next run would train on its own pictures."""
    images = save_images(tmp_path / "set" / "images")
    before = content(tmp_path)
    with pytest.raises(ValueError, match="--instance_data_dir"):
        trainer(images / place, instance_data_dir=images)
    assert content(tmp_path) == before and not (images / "inside").exists()


def test_output_is_not_the_base(trainer, base):
    """The trained weights would replace those that they were trained from."""
    before = content(base)
    with pytest.raises(ValueError, match="--pretrained_model_name_or_path"):
        trainer(base)
    assert content(base) == before


def test_second_run_in_a_folder_learns_of_the_first(flags, tmp_path, subprocess_env):
    """Two runs in one folder would delete each other's checkpoints."""
    code = "import sys, time; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / ".lock")], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline().strip() == "held"
        (tmp_path / ".lock_owner").write_text(str(holder.pid))
        try:
            with pytest.raises(ValueError, match=f"in use by process {holder.pid}"):
                script.main(script.parse_args(flags(tmp_path)))
        finally:
            holder.kill()
    script.main(script.parse_args(flags(tmp_path, max_train_steps=1)))  # a lock dies with its process
    assert (tmp_path / LORA).is_file()


def test_folders_with_other_names_do_not_matter(trainer, output):
    """Somebody puts a checkpoint aside under a name of their own."""
    shutil.copytree(output / "checkpoint-3", output / "checkpoint-old-2")
    (output / "checkpoint-7").write_text("a file")
    trainer(output, max_train_steps=4, resume_from_checkpoint="latest", checkpoints_total_limit=1)
    assert (output / "checkpoint-old-2").is_dir() and (output / "checkpoint-4").is_dir()


def test_going_back_to_an_earlier_checkpoint_needs_another_folder(trainer, output, tmp_path):
    """`latest` would later take the checkpoint of the way that was left."""
    refused(
        trainer,
        output,
        "checkpoint-3",
        "--output_dir",
        resume_from_checkpoint=output / "checkpoint-2",
        max_train_steps=3,
    )
    whole = trainer(tmp_path / "new", resume_from_checkpoint=output / "checkpoint-2", max_train_steps=3)
    assert_same(whole / trainer.result, output / trainer.result)


def test_full_fine_tuning_keeps_two_checkpoints_by_default(train_full, tmp_path):
    """Each is several times the model: without a limit the README's command would write terabytes."""
    folder = train_full(tmp_path, max_train_steps=4, checkpointing_steps=1)
    assert {p.name for p in folder.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-4"}


def test_latest_of_a_folder_without_checkpoints_starts_anew_and_says_so(trainer, tmp_path, caplog):
    """The folder is misspelt, and the night's training begins again without a word."""
    caplog.set_level("INFO", trainer.module.__name__)
    trainer(tmp_path, max_train_steps=1, resume_from_checkpoint="latest")
    assert f"{tmp_path} holds no checkpoint: the run starts at step 0" in caplog.text


def test_advice_ends_no_run(trainer, tmp_path, monkeypatch):
    """A look at the base's licence is not worth a night's training."""

    def broken(*args, **kwargs):
        raise OSError("broken")

    monkeypatch.setattr(trainer.module.ModelCard, "load", broken)
    trainer(tmp_path, max_train_steps=1)
    assert (tmp_path / "README.md").is_file()


def test_tracker_that_is_not_there_is_refused(trainer, tmp_path, monkeypatch):
    """The curves of a night would be nowhere."""
    find = trainer.module.importlib.util.find_spec
    monkeypatch.setattr(
        trainer.module.importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else find(name, *a)
    )
    refused(trainer, tmp_path, "--report_to wandb", "pip install wandb", report_to="wandb")


def test_full_disk_is_one_line_and_costs_nothing(trainer, output, monkeypatch):
    """The last good checkpoint and the result are what a full disk leaves."""
    before = content(output)

    write = trainer.module.Training.write_states
    monkeypatch.setattr(
        trainer.module.Training, "write_states", lambda self, state, path: write(self, state, Path("/dev/full"))
    )
    with pytest.raises(
        script.InputError if trainer.module is script else ValueError, match=f"^{output}: .*No space left on device"
    ):
        trainer(output, max_train_steps=4, resume_from_checkpoint="latest")
    left = content(output)
    assert all(left[path] == data for path, data in before.items())


# ------------------------------------------------------------------------------------------------------------------ damage
FILES = {"lora": [STATE, f"student/{WEIGHTS}", f"teacher/{WEIGHTS}", "optimizer.bin", LORA],
         "full": [STATE, f"transformer/{WEIGHTS}", f"teacher/{WEIGHTS}", "optimizer.bin", "transformer/config.json"]}  # fmt: skip


def missing(path):
    path.unlink()


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def one_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [missing, half, one_bit, empty])
@pytest.mark.parametrize("number", range(5))
def test_damaged_checkpoint(trainer, output, caplog, number, damage):
    """Of a disk that fails or a copy that was cut off: refused by name, and `latest` takes the one before and says
    so."""
    name = FILES["lora" if trainer.module is script else "full"][number]
    damage(output / "checkpoint-3" / name)
    refused(trainer, output, "--resume_from_checkpoint", "checkpoint-3", name.split("/")[-1],
            resume_from_checkpoint=output / "checkpoint-3", max_train_steps=3)  # fmt: skip
    expected = shutil.copy(output / trainer.result, output / "expected.safetensors")
    with caplog.at_level("WARNING"):
        trainer(output, resume_from_checkpoint="latest", max_train_steps=3)
    assert "checkpoint-3 is missing or damaged" in caplog.text
    assert_same(output / trainer.result, expected)  # trained anew from checkpoint-2
    trainer.module.read_state(output / "checkpoint-3")


def test_no_whole_checkpoint_is_no_fresh_start(trainer, output):
    """A run that begins again over damaged checkpoints would replace the result."""
    for number in (1, 2, 3):
        one_bit(output / f"checkpoint-{number}" / "optimizer.bin")
    refused(trainer, output, "no checkpoint is whole", resume_from_checkpoint="latest", max_train_steps=4)


def test_missing_checkpoint(trainer, output):
    """A mistyped path must not start a new training over the old one."""
    refused(
        trainer, output, "--resume_from_checkpoint", "checkpoint-7", resume_from_checkpoint=output / "checkpoint-7"
    )


class Planted:
    """Writes a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def plant_pickle(path, trap):
    path.write_bytes(pickle.dumps(Planted(trap)))


def plant_torch(path, trap):
    with open(path, "wb") as file:
        torch.save({"optimizer": Planted(trap), "state": Planted(trap)}, file)


NAMES = ["custom_checkpoint_0.pkl", "random_states_0.pkl", "scheduler.bin", "sampler.bin", "scaler.pt", "model.bin", "pytorch_model.bin",
         "optimizer_0/.metadata", "adapter_model.bin", "student/diffusion_pytorch_model.bin", "transformer/diffusion_pytorch_model.bin"]  # fmt: skip


@pytest.mark.parametrize("plant", [plant_pickle, plant_torch])
@pytest.mark.parametrize("number", [0, 1, 2, 3, 4, "others"])
def test_checkpoint_cannot_run_code(trainer, output, tmp_path, number, plant):
    """A checkpoint from a forum or a shared disk, with right checksums: its files may be refused, but never run."""
    folder, trap = output / "checkpoint-3", tmp_path / "trap"
    own = FILES["lora" if trainer.module is script else "full"]
    names = NAMES if number == "others" else [own[number]]
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        plant(folder / name, trap)
    if number:  # an attacker puts the checksums right
        files = json.loads((folder / STATE).read_text())["files"]
        change_state(folder, files=files | {name: script.checksum(folder / name) for name in names})
    try:
        trainer(output, resume_from_checkpoint=folder, max_train_steps=4)
        assert number in (4, "others")  # what no resume reads
    except ValueError as error:
        assert "--resume_from_checkpoint" in str(error) and "\n" not in str(error)
    assert not trap.exists()
    plant(tmp_path / "proof", trap)
    with open(tmp_path / "proof", "rb") as file:
        pickle.load(file) if plant is plant_pickle else torch.load(file, weights_only=False)
    assert trap.exists()  # the trap works where it is not guarded against


# ------------------------------------------------------------------------------------------------------ LoRA of a checkpoint
@pytest.mark.parametrize(
    ("switches", "changes"), [([], {}), ([], {"lora_alpha": 16}), (["--use_rslora"], {"lora_alpha": 16})]
)
def test_every_checkpoint_holds_the_lora_as_users_load_it(train, base, tmp_path, switches, changes):
    """An earlier step is often the better one; it must load at full strength, in plain diffusers."""
    whole = train(tmp_path / "whole", *switches, max_train_steps=2, checkpointing_steps=1, **changes)
    short = train(tmp_path / "short", *switches, max_train_steps=1, **changes)
    assert_same(whole / "checkpoint-1" / LORA, short / LORA)
    assert_same(whole / "checkpoint-2" / LORA, whole / LORA)
    pipe = DiffusionPipeline.from_pretrained(base)
    pipe.load_lora_weights(whole / "checkpoint-1")
    loaded = {n for n, _ in pipe.transformer.named_parameters() if ".lora_" in n}
    assert len(loaded) == 2 * 28
    for name, weights in load_file(whole / "checkpoint-1" / LORA).items():
        layer, side, _ = name.removeprefix("transformer.").rsplit(".", 2)
        module = pipe.transformer.get_submodule(layer)
        assert list(module.scaling.values()) == [1.0]
        assert torch.equal(next(iter(getattr(module, side).values())).weight, weights)


# ------------------------------------------------------------------------------------------------------------------ signals
@pytest.fixture
def start(subprocess_env):
    """Starts a command in a process group of its own."""
    started = []

    def run(*command, **options):
        options |= {"start_new_session": True, "preexec_fn": heed_signals}
        process = subprocess.Popen(command, env=subprocess_env, stderr=subprocess.PIPE, text=True, **options)
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()


@pytest.fixture
def start_script(tmp_path):
    """Starts a script without the seconds of its imports."""
    started = []

    def run(path, *words):
        started.append(ForkedScript(path, words, str(tmp_path / f"errors-{len(started)}")))
        return started[-1]

    yield run
    for process in started:
        process.kill()


def wait_for(condition, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "it did not happen"
        time.sleep(0.05)


LAUNCHER = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--mixed_precision", "no"]


@pytest.mark.parametrize(
    ("train_any", "name"),
    [("lora", "SIGTERM"), ("lora", "SIGINT"), ("lora", "SIGHUP"), ("full", "SIGTERM")],
    indirect=["train_any"],
)
def test_signal_ends_a_run_with_a_checkpoint(train_any, start_script, tmp_path, name):
    """A shut-down, Ctrl-C or a closed terminal costs the step at hand at most."""
    number = getattr(signal, name)
    flags = train_any.flags(
        tmp_path / "out", max_train_steps=100_000, checkpointing_steps=3, checkpoints_total_limit=2
    )
    process = start_script(train_any.module.__file__, *flags)
    wait_for(lambda: (tmp_path / "out" / "checkpoint-3").exists())
    process.send_signal(number)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number, errors[-2000:]
    assert "Traceback" not in errors
    goes_on_from_a_signal(train_any, tmp_path, errors, name == "SIGTERM")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signal_ends_a_launched_run_with_a_checkpoint(train, start, tmp_path, name):
    """The same through `accelerate launch`, and no orphan goes on."""
    flags = train.flags(tmp_path / "out", max_train_steps=100_000, checkpointing_steps=3, checkpoints_total_limit=2)
    process = start(sys.executable, *LAUNCHER, train.module.__file__, *flags)
    wait_for(lambda: (tmp_path / "out" / "checkpoint-3").exists())
    # a terminal sends Ctrl-C and its end to launcher and script alike, a service its SIGTERM to the launcher alone
    process.send_signal(signal.SIGTERM) if name == "SIGTERM" else os.killpg(process.pid, getattr(signal, name))
    errors = process.communicate(timeout=60)[1]
    wait_for(lambda: no_process_in(tmp_path / "out"))
    goes_on_from_a_signal(train, tmp_path, errors)


def goes_on_from_a_signal(trainer, folder, errors, compare=False):
    """A run in `folder`/out that a signal has ended is whole, and is gone on with; it is compared with an
    uninterrupted one."""
    newest = script.list_checkpoints(folder / "out")[-1]
    state = script.read_state(newest)
    assert (
        state["step"] >= 3
        and f"Stopped at step {state['step']}" in errors
        and "--resume_from_checkpoint latest" in errors
    )
    done = state["step"] + 1
    resumed = trainer(folder / "out", max_train_steps=done, resume_from_checkpoint="latest", checkpoints_total_limit=2)
    assert script.read_state(resumed / f"checkpoint-{done}")["step"] == done
    if compare:
        whole = trainer(folder / "whole", max_train_steps=done)
        assert_same(whole / trainer.result, resumed / trainer.result)


@pytest.mark.parametrize(
    ("words", "watched"),
    [
        ("python /venv/bin/accelerate launch train.py", True), ("python -u -m accelerate.commands.launch train.py", True),
        ("/venv/bin/torchrun train.py", True), ("python -m torch.distributed.run train.py", True),
        ("bash my_accelerate_run.sh", False), ("bash -c cd\u00a0/data/accelerate;\u00a0python\u00a0train.py", False), ("bash accelerate.sh", False),
    ],
)  # fmt: skip
def test_parent_that_is_no_launcher_may_end(monkeypatch, words, watched):
    """A script that starts a training with nohup and ends, and has `accelerate` in its name, would take the training
    with it."""
    threads, parent = [], SimpleNamespace(cmdline=lambda: words.split(" "))
    monkeypatch.setattr(script.psutil, "Process", lambda: SimpleNamespace(parent=lambda: parent))
    monkeypatch.setattr(script.signal, "signal", lambda *args: None)
    monkeypatch.setattr(
        script.threading, "Thread", lambda **kwargs: threads.append(kwargs) or SimpleNamespace(start=lambda: None)
    )
    script.Stop().listen()
    assert len(threads) == watched


def test_workers_end_without_a_word(monkeypatch):
    """The end of a worker of `datasets` would read as that of the training, above the error that caused it."""
    monkeypatch.setattr(script.signal, "signal", lambda *args: None)
    monkeypatch.setattr(script.os, "write", lambda *args: pytest.fail("a worker spoke"))
    monkeypatch.setattr(script.os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    stop = script.Stop()
    stop.listen()
    monkeypatch.setattr(script.os, "getpid", lambda: stop.process + 1)
    with pytest.raises(SystemExit, match="143"):
        stop.note(signal.SIGTERM, None)


def test_resumed_run_makes_the_picture_that_a_signal_cut_off(train_any, tmp_path, monkeypatch):
    """The picture of that step would be missing, and the card would show an older one."""
    asked = iter([0, signal.SIGTERM])
    changes = {"validation_steps": 2, "num_validation_images": 1}
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train_any.module.STOP, "asked", lambda accelerator: next(asked))
        train_any(tmp_path, max_train_steps=2, **changes)
    assert not (tmp_path / "validation" / "step-000002.png").exists()
    train_any(tmp_path, max_train_steps=2, resume_from_checkpoint="latest", **changes)
    assert (tmp_path / "validation" / "step-000002.png").exists()


def no_process_in(folder):
    """Whether the lock of a run is free."""
    lock = script.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except script.Timeout:
        return False
    lock.release()
    return True


@pytest.fixture
def slow_script(train, tmp_path):
    """Makes a script that runs the LoRA script with forwards of so many seconds."""

    def make(seconds):
        text = f"""import runpy, sys, time
sys.path.insert(0, {str(ROOT)!r})
import pipeline_dopsd
velocity = pipeline_dopsd.DOPSDZImagePipeline.velocity
pipeline_dopsd.DOPSDZImagePipeline.velocity = lambda *args: (time.sleep({seconds}), velocity(*args))[1]
runpy.run_path({train.module.__file__!r}, run_name="__main__")
"""
        (tmp_path / "slow.py").write_text(text)
        return str(tmp_path / "slow.py")

    return make


def test_second_signal_ends_at_once(train, start_script, slow_script, tmp_path):
    """Whoever presses Ctrl-C twice does not want to wait."""
    flags = train.flags(tmp_path / "out", max_train_steps=1000, rollout_steps=1, checkpointing_steps=1)
    process = start_script(slow_script(4), *flags)
    wait_for(lambda: (tmp_path / "out" / "checkpoint-1").exists())
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(1.1)
    assert process.wait(timeout=3) == 128 + signal.SIGINT
    assert [p.name for p in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-1"]


TORCHRUN = [
    "-m",
    "torch.distributed.run",
    "--nproc_per_node",
    "2",
    "--master_port",
    str(20_000 + os.getpid() % 20_000),
]


@pytest.mark.parametrize("launcher", [LAUNCHER, TORCHRUN], ids=["accelerate", "torchrun"])
def test_ctrl_c_in_a_terminal_is_one_signal(train, start, slow_script, tmp_path, launcher):
    """Launcher and script have it at once; one launcher dies before the step is done, the other passes the signal
    on."""
    flags = train.flags(tmp_path / "out", max_train_steps=1000, rollout_steps=1, checkpointing_steps=1)
    process = start(sys.executable, *launcher, slow_script(2), *flags)
    wait_for(lambda: (tmp_path / "out" / "checkpoint-1").exists())
    os.killpg(process.pid, signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    wait_for(lambda: no_process_in(tmp_path / "out"))
    newest = script.list_checkpoints(tmp_path / "out")[-1]
    assert newest.name == "checkpoint-2" and f"Stopped at step {script.read_state(newest)['step']}" in errors


def test_processes_agree_on_the_step_of_a_signal(train, start, tmp_path):
    """A process that stops one step earlier than the others leaves them waiting for it for hours."""
    flags = train.flags(tmp_path / "out", max_train_steps=100_000, checkpointing_steps=3, checkpoints_total_limit=2)
    process = start(sys.executable, *TORCHRUN, train.module.__file__, *flags)
    wait_for(lambda: (tmp_path / "out" / "checkpoint-3").exists())
    psutil.Process(process.pid).children()[1].send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode != 0
    newest = script.list_checkpoints(tmp_path / "out")[-1]
    assert f"Stopped at step {script.read_state(newest)['step']}" in errors


# -------------------------------------------------------------------------------------------------------------------- kills
def kill_and_resume(trainer, folder, start_script, rng, kills, steps):
    """Kills runs of `trainer` in `folder` at random moments, `kills` times, then lets the last one end."""
    flags = trainer.flags(folder / "out", max_train_steps=steps, checkpointing_steps=2, resume_from_checkpoint="latest",
                          checkpoints_total_limit=2, context_cache_dir=folder / "contexts")  # fmt: skip
    for _ in range(kills):
        process = start_script(trainer.module.__file__, *flags)
        try:
            process.wait(timeout=rng.uniform(0.5, 6))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=10)
    process = start_script(trainer.module.__file__, *flags)
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 0, errors[-2000:]


@pytest.mark.parametrize("kills", [2, pytest.param({LORA: 30}, marks=pytest.mark.slow, id="many")])
def test_killed_runs_end_as_if_they_had_not_been(train_any, start_script, tmp_path, kills):
    """A power cut at any moment costs the steps since the last checkpoint, and nothing else."""
    kills, steps = (2, 60) if kills == 2 else (kills.get(train_any.result, 10), 300)
    kill_and_resume(train_any, tmp_path, start_script, random.Random(0), kills, steps)
    whole = train_any(tmp_path / "whole", max_train_steps=steps, checkpointing_steps=100)
    for place in (".", f"checkpoint-{steps}"):
        assert_same(tmp_path / "out" / place / train_any.result, whole / place / train_any.result)


@pytest.mark.slow
def test_memory_of_a_long_run(train, tmp_path, monkeypatch):
    """A leak of a few kilobytes a step ends a night's run. Prints the seconds of a step at its beginning and its
    end."""
    logs = []
    monkeypatch.setattr(
        "accelerate.Accelerator.log",
        lambda self, values, step: logs.append((values["peak_memory_gib"], values["seconds_per_step"])),
    )
    train(tmp_path, max_train_steps=5000, checkpointing_steps=2500, rollout_steps=1, rank=1)
    memory, seconds = zip(*logs)
    median = lambda values: sorted(values)[len(values) // 2]  # noqa: E731
    print(
        f"memory {memory[-1] / memory[300]:.4f} of that at step 300; seconds {median(seconds[300:800]):.4f} and {median(seconds[-500:]):.4f}"
    )
    assert memory[-1] <= 1.02 * memory[300]
