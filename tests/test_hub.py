"""From training to other people's hands: the unchanged scripts, diffusers and huggingface_hub in new processes, over
HTTP."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image

import train_dopsd_lora as script
from conftest import LORA, ROOT, SECRET, WEIGHTS, guarded_environment, student_picture
from hub_stand_in import HubStandIn


STEPS, PROMPT = 4, "a red square"  # the prompt of the first sample
BASE_CARD = "---\nlicense: other\nlicense_name: tiny-licence\nlicense_link: https://example.com\n---\nThe base.\n"
LORA_FILES = {LORA, "README.md", "pipeline.py", "pipeline_dopsd.py", "model_index.json", "dopsd_settings.json"}
PICTURES = {"samples/0.png", "samples/1.png"}


@pytest.fixture(scope="module")
def hub(base):
    """A Hub with the base under two names."""
    with HubStandIn({SECRET: "me"}) as hub:
        hub.upload("tiny/base", base)
        hub.files("tiny/base")["README.md"] = BASE_CARD.encode()
        hub.upload("tiny/other", base)
        yield hub


def run(command, folder, **environment):
    env = {**guarded_environment(folder), **environment}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def pushed(hub, flags, tmp_path_factory):
    """A run of the LoRA script whose base comes from the Hub, and which pushes at a checkpoint and at the end."""
    folder = tmp_path_factory.mktemp("pushed")
    changes = {
        "pretrained_model_name_or_path": "tiny/base", "rank": 4, "lora_alpha": 6, "rollout_steps": STEPS, "num_inference_steps": STEPS,
        "max_train_steps": 8, "checkpointing_steps": 4, "learning_rate": 0.05, "ema_decay": 1.0, "validation_steps": 4,
        "num_validation_images": 2, "report_to": "tensorboard", "hub_model_id": "my-lora",
    }  # fmt: skip
    switches = ["--use_rslora", "--push_to_hub", "--hub_push_checkpoints", "--hub_private_repo"]
    command = [sys.executable, ROOT / "train_dopsd_lora.py", *flags("out", *switches, **changes)]
    result = run(command, folder, **guarded_environment(folder, hub.url), HF_TOKEN=SECRET + "\n")
    assert result.returncode == 0, result.stderr[-3000:]
    return SimpleNamespace(
        folder=folder, out=folder / "out", log=result.stdout + result.stderr, files=hub.files("me/my-lora")
    )


@pytest.fixture(scope="module")
def not_pushed(hub, flags, tmp_path_factory):
    """A run of the full script without network, whose push fails."""
    folder = tmp_path_factory.mktemp("not_pushed")
    changes = {"rank": None, "learning_rate": 1e-3, "hub_model_id": "me/my-model", "max_train_steps": 1}
    command = [
        sys.executable,
        ROOT / "train_dopsd_full.py",
        *flags("out", "--push_to_hub", context_cache_dir=None, **changes),
    ]
    # nothing listens on port 9, and so it is refused, as by a firewall
    result = run(command, folder, HF_ENDPOINT="http://127.0.0.1:9", NETWORK_ALLOWED="127.0.0.1", HF_TOKEN=SECRET)
    return SimpleNamespace(folder=folder, out=folder / "out", result=result)


def test_repository_holds_the_result_alone(hub, pushed):
    """Checkpoints, logs, cached contexts of private pictures and the pictures themselves stay at home."""
    assert set(pushed.files) == LORA_FILES | PICTURES
    assert all((pushed.out / name).read_bytes() == content for name, content in pushed.files.items())
    # one commit each
    assert hub.messages("me/my-lora") == [f"Trained with D-OPSD, step {step}" for step in (4, 8)]
    assert hub.repos["me/my-lora"]["private"]
    assert {"checkpoint-8", "logs", "validation"} <= {p.name for p in pushed.out.iterdir()}


def test_nothing_else_is_contacted(pushed, not_pushed):
    """A training of private pictures that talks to anybody but the Hub, or to the Hub unasked."""
    assert (pushed.folder / "network.log").read_text() == (not_pushed.folder / "network.log").read_text() == ""


def test_token_and_paths_are_published_nowhere(pushed, not_pushed, pushed_later, base):
    """The token gives the user's account away, and a path the user's name: also that of a base that is a folder."""
    files = [p for run in (pushed, not_pushed) for p in run.folder.rglob("*") if p.is_file()]
    assert any("events.out" in p.name for p in files)
    assert not [p for p in files if SECRET.encode() in p.read_bytes()]
    assert SECRET not in pushed.log + not_pushed.result.stdout + not_pushed.result.stderr
    assert json.loads(pushed_later["transformer/config.json"])["_name_or_path"] == "transformer"
    published = [*pushed.files.values(), *pushed_later.values()]
    assert not [c for c in published if str(base.parent.parent).encode() in c or str(ROOT).encode() in c]


def test_paths_that_are_gone_are_published_nowhere(flags, tmp_path):
    """A checkpoint that was pruned since would tell the user's name."""
    args = script.parse_args(
        flags(tmp_path, resume_from_checkpoint="/home/somebody/run/checkpoint-4", learning_rate=0.5)
    )
    assert script.public_settings(args)["resume_from_checkpoint"] == ".../checkpoint-4"


@pytest.mark.parametrize("words", [["--hub_token", SECRET], [f"--hub_token={SECRET}"], ["--hub_token"]])
def test_token_on_the_command_line_is_refused(flags, tmp_path, capsys, words):
    """It would be seen by others on the machine, in logs of a scheduler and in what `accelerate launch` prints of a
    failed run."""
    with pytest.raises(SystemExit):
        script.parse_args([*flags(tmp_path), *words])
    printed = "".join(capsys.readouterr())
    assert "HF_TOKEN" in printed.splitlines()[-1] and "hf auth login" in printed and SECRET not in printed


@pytest.mark.parametrize("words", [["--hub_tok", SECRET], [f"--hub_tok={SECRET}"]])
def test_token_behind_a_misspelt_flag_is_not_shown(flags, tmp_path, capsys, words):
    """The error about the flag would be the place where it leaks."""
    with pytest.raises(SystemExit):
        script.parse_args([*flags(tmp_path), *words])
    printed = "".join(capsys.readouterr())
    assert "unrecognized arguments: --hub_tok" in printed and SECRET not in printed


def test_card_is_complete(pushed, monkeypatch):
    """What the Hub shows, and what a stranger needs to know."""
    card = ModelCard(pushed.files["README.md"].decode())
    data = card.data
    assert data.base_model == "tiny/base" and data.pipeline_tag == "text-to-image" and data.library_name == "diffusers"
    assert (data.license, data.license_name, data.license_link) == ("other", "tiny-licence", "https://example.com")
    assert {"text-to-image", "lora", "diffusers", "template:sd-lora", "d-opsd"} <= set(data.tags)
    assert [w["output"]["url"] for w in data.widget] == ["samples/0.png", "samples/1.png"] and data.widget[0][
        "text"
    ] == PROMPT
    for words in (
        f"{STEPS} steps, no guidance",
        f"rollouts of {STEPS} states, 1 of them trained",
        "The teacher",
        "## Limits",
        "0.05",
    ):
        assert words in card.text
    command = shlex.split(re.search(r"```bash\n(.*?)\n```", card.text, re.DOTALL)[1])
    assert command[:3] == ["accelerate", "launch", "train_dopsd_lora.py"]
    monkeypatch.chdir(pushed.out)
    args = script.parse_args(command[3:])
    assert (args.rank, args.lora_alpha, args.use_rslora, args.num_validation_images, args.ema_decay) == (
        4,
        6,
        True,
        2,
        1.0,
    )


def test_gallery_shows_pictures_of_the_student(pushed):
    """Not the base's, and never the training images."""
    for row in range(2):
        sample = np.asarray(Image.open(pushed.out / "samples" / f"{row}.png"))
        assert (sample == student_picture(pushed.out / "validation" / "step-000008.png", row)).all()


# ------------------------------------------------------------------------------------------------------------- loading
USER = """
import json, re, sys, numpy as np, torch
from pathlib import Path
from diffusers import DiffusionPipeline, ZImagePipeline
from huggingface_hub import hf_hub_download
prompt, few = sys.argv[1], {"num_inference_steps": int(sys.argv[2])}
base, repo, pictures, errors = "tiny/base", "me/my-lora", {}, {}
def sample(pipe, **kwargs):
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return np.asarray(pipe(prompt, height=32, width=32, latents=noise, **kwargs).images[0])
def error(name, call):
    try:
        call()
    except ValueError as caught:
        errors[name] = str(caught)

a = DiffusionPipeline.from_pretrained(base, custom_pipeline=repo, trust_remote_code=True)
a.load_lora_weights(repo)
b = DiffusionPipeline.from_pretrained(repo, trust_remote_code=True)
c = DiffusionPipeline.from_pretrained(base)
c.load_lora_weights(repo)
pictures |= {"a": sample(a, **few), "b": sample(b), "c": sample(c, guidance_scale=0.0, **few)}
pictures["from_pipe of c"] = sample(type(a).from_pipe(c), **few)
pictures["from_pipe of b"] = sample(ZImagePipeline.from_pipe(b), guidance_scale=0.0, **few)

half = {"dtype": torch.bfloat16}
pipes = [DiffusionPipeline.from_pretrained(base, custom_pipeline=repo, trust_remote_code=True, **half)]
pipes += [DiffusionPipeline.from_pretrained(repo, trust_remote_code=True, base_dtype="bfloat16")]
pipes += [DiffusionPipeline.from_pretrained(base, **half)]
for pipe in pipes[::2]:
    pipe.load_lora_weights(repo)
for pipe in pipes:
    assert pipe.text_encoder.dtype == torch.bfloat16
    assert {p.dtype for n, p in pipe.transformer.named_parameters() if "lora" not in n} == {torch.bfloat16}

error("a", lambda: DiffusionPipeline.from_pretrained(base, custom_pipeline=repo))
error("b", lambda: DiffusionPipeline.from_pretrained(repo))
other = DiffusionPipeline.from_pretrained("tiny/other", custom_pipeline=repo, trust_remote_code=True)
error("other", lambda: other.load_lora_weights(repo))

for name in (repo, "me/my-model"):
    card = Path(hf_hub_download(name, "README.md")).read_text("utf-8")
    code, = re.findall(r"```py\\n(.*?)```", card, re.DOTALL)
    scope = {}
    exec(code, scope)
    pictures["card of " + name] = sample(scope["pipe"], guidance_scale=0.0, **few)
np.savez("pictures.npz", **pictures)
Path("errors.json").write_text(json.dumps(errors))
"""


@pytest.fixture(scope="module")
def loaded(hub, pushed, pushed_later, tmp_path_factory):
    """What a user with access sees in a new process, on another machine: nothing is in the cache."""
    folder = tmp_path_factory.mktemp("user")
    environment = {**guarded_environment(folder, hub.url), "HF_TOKEN": SECRET}
    result = run([sys.executable, "-c", USER, PROMPT, str(STEPS)], folder, **environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (folder / "network.log").read_text() == ""
    pictures = {name: p.astype(int) for name, p in np.load(folder / "pictures.npz").items()}
    return SimpleNamespace(pictures=pictures, errors=json.loads((folder / "errors.json").read_text()))


def test_snapshot_and_folder_have_one_key(hub, base, tmp_path):
    """Contexts that were encoded on another machine, from the Hub or from a copy, would be encoded once more."""
    patterns = ["text_encoder/*.json", "text_encoder/*.safetensors", "tokenizer/*"]
    code = f"import train_dopsd_lora as s; print(s.fingerprint('tiny/base', {patterns}))"
    environment = guarded_environment(tmp_path, hub.url)
    environment["PYTHONPATH"] += f":{ROOT}"
    result = run([sys.executable, "-c", code], tmp_path, **environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert list((tmp_path / "home").rglob("blobs/*")), "nothing came from the Hub"
    assert result.stdout.split()[-1] == script.fingerprint(str(base), patterns)


def test_only_folders_of_components_are_downloaded(hub, base, flags, tmp_path):
    """Repositories of bases hold single-file checkpoints beside the folders, 7.75 GB on klein."""
    hub.upload("tiny/large", base)
    hub.files("tiny/large").update({"large.safetensors": b"0" * 1000, "examples/picture.png": b"0"})
    changes = {
        "pretrained_model_name_or_path": "tiny/large",
        "max_train_steps": 1,
        "rank": None,
        "learning_rate": 1e-3,
    }
    command = [sys.executable, ROOT / "train_dopsd_full.py", *flags("out", **changes)]
    result = run(command, tmp_path, **guarded_environment(tmp_path, hub.url))
    assert result.returncode == 0, result.stderr[-3000:]
    fetched = {
        p.relative_to(p.parents[i]).as_posix()
        for i in (0, 1)
        for p in (tmp_path / "home").rglob("snapshots/*" + "/*" * (i + 1))
        if p.is_file()
    }
    assert {"model_index.json", "vae/config.json"} <= fetched and not {
        "large.safetensors",
        "examples/picture.png",
    } & fetched
    assert (tmp_path / "out" / "tokenizer").is_dir() and not (tmp_path / "out" / "large.safetensors").exists()


def test_every_way_gives_the_pictures_of_the_training(loaded, pushed):
    """A LoRA that runs weaker than it was trained, or not at all, without an error."""
    expected = np.asarray(Image.open(pushed.out / "samples" / "0.png")).astype(int)
    before = student_picture(pushed.out / "validation" / "step-000000.png")
    assert np.abs(before - expected).max() > 20
    for way in ("a", "b", "c", "from_pipe of c", "from_pipe of b"):
        assert np.abs(loaded.pictures[way] - expected).max() <= 1, way


def test_code_of_the_card_runs_as_pasted(loaded, pushed):
    """It is in bf16, so its pictures are near those of the training, and not those of the base."""
    expected = np.asarray(Image.open(pushed.out / "samples" / "0.png")).astype(int)
    before = student_picture(pushed.out / "validation" / "step-000000.png")
    ours = loaded.pictures["card of me/my-lora"]
    assert np.abs(ours - expected).mean() < 0.5 * np.abs(ours - before).mean()
    assert "card of me/my-model" in loaded.pictures


def test_errors_name_what_to_do(loaded):
    """Without trust_remote_code, and with another base of the same shape, which would give poor pictures without an
    error."""
    assert "trust_remote_code=True" in loaded.errors["a"] and "trust_remote_code=True" in loaded.errors["b"]
    assert "tiny/base" in loaded.errors["other"] and "tiny/other" in loaded.errors["other"]


# ------------------------------------------------------------------------------------------------------ failing pushes
def test_failed_push_ends_with_one_message_and_all_saved(not_pushed):
    """Hours of training lost, or a scheduler that takes the run for a success."""
    result = not_pushed.result
    assert result.returncode == 1 and "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: The result is saved in out, but was not pushed (ConnectError: ")
    assert {"transformer", "README.md", "model_index.json", "checkpoint-1"} <= {
        p.name for p in not_pushed.out.iterdir()
    }


@pytest.fixture(scope="module")
def pushed_later(hub, not_pushed):
    """Runs the command of the message; returns the files that are then on the Hub."""
    command = shlex.split(not_pushed.result.stderr.strip().splitlines()[-1].partition(" with: ")[2])
    assert command[:2] == ["hf", "upload"]
    command[0] = os.path.join(os.path.dirname(sys.executable), "hf")
    environment = {**guarded_environment(not_pushed.folder / "later", hub.url), "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    result = run(command, not_pushed.folder, **environment, HF_TOKEN=SECRET)
    assert result.returncode == 0, result.stdout + result.stderr
    return hub.files("me/my-model")


def test_command_of_the_message_pushes_the_pipeline(pushed_later, not_pushed):
    """Later, the user has that line and the folder, and no script that picks the files."""
    folders = ("transformer", "text_encoder", "tokenizer", "vae", "scheduler")
    files = [p for name in folders for p in (not_pushed.out / name).iterdir()]
    expected = {p.relative_to(not_pushed.out).as_posix() for p in files} | (LORA_FILES - {LORA})
    assert set(pushed_later) == expected and f"transformer/{WEIGHTS}" in expected


FAILURES = """
import json, sys, time
import huggingface_hub
import train_dopsd_lora as script
from accelerate import PartialState
PartialState()
flags, names, results = json.loads(sys.argv[1]), sys.argv[2:], {}
def push(name, *switches, step=None):
    args = script.parse_args([*flags, "--push_to_hub", "--hub_timeout", "2", "--hub_model_id", name, *switches])
    started = time.monotonic()
    try:
        script.push(args, step or args.max_train_steps, lambda name: None, ["README.md", "*.safetensors"])
        return "pushed", 0
    except script.InputError as error:
        return str(error), time.monotonic() - started
for name in names:
    results[name] = push(name)
results["private"] = push("public", "--hub_private_repo")
results["on the way"] = push("create-fails-401", step=1)
huggingface_hub.close_session()  # as huggingface_hub does after a lost connection
results["seconds"] = huggingface_hub.get_session().timeout.read
print(json.dumps(results))
"""


def test_failures_of_the_hub_end_in_time(hub, pushed, flags, tmp_path):
    """401, 403, 409, 500, a stall, a token revoked midway: a client that waits for ever holds the machine
    for ever."""
    hub.create("me/public")
    failures = {
        "create-fails-401": "401 [A-Z]", "create-fails-403": "403 [A-Z]", "create-fails-500": "500 [A-Z]",
        "create-stalls": "timed out", "preupload-fails-401": "401 [A-Z]", "commit-fails-401": "401 [A-Z]",
        "commit-fails-409": "409 [A-Z]", "commit-fails-500": "500 [A-Z]", "commit-stalls": "timed out", "someone/else": "403 [A-Z]",
    }  # fmt: skip
    (tmp_path / "out").mkdir()
    for name in ("README.md", LORA):
        shutil.copy(pushed.out / name, tmp_path / "out")
    before = {p: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    environment = guarded_environment(tmp_path, hub.url)
    environment["PYTHONPATH"] += os.pathsep + str(ROOT)
    environment["HF_HUB_DISABLE_XET"] = "0"  # as with users: its client would wait for minutes
    command = [sys.executable, "-c", FAILURES, json.dumps(flags("out")), "fine", *failures]
    result = run(command, tmp_path, **environment, HF_TOKEN=SECRET)
    assert result.returncode == 0, result.stderr[-3000:]
    results = json.loads(result.stdout.strip().splitlines()[-1])
    assert results.pop("fine")[0] == results.pop("on the way")[0] == "pushed"
    assert results.pop("seconds") == 2 and set(hub.files("me/fine")) == {"README.md", LORA}
    assert "create-fails-401" in result.stderr  # the warning on the way
    assert "me/public is public" in results.pop("private")[0] and not hub.messages("me/public")
    for name, (message, seconds) in results.items():
        reason, _, command = message.partition("Log in and push it with: ")
        assert reason.startswith("The result is saved in out, but was not pushed (") and re.search(
            failures[name], reason
        )
        assert command == f"hf upload {name} out . --include=README.md '--include=*.safetensors'"
        assert seconds < 10  # at 2 seconds for each answer
    assert SECRET not in result.stdout + result.stderr
    assert {p: p.read_bytes() for p in before} == before


def test_flags_of_a_push_that_cannot_work(flags, tmp_path, capsys, monkeypatch):
    """Said at once and not after the training."""
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    for switches, changes in ((["--hub_push_checkpoints"], {}), (["--push_to_hub"], {"hub_timeout": 0})):
        with pytest.raises(SystemExit):
            script.parse_args(flags(tmp_path, *switches, **changes))
        assert "--hub_" in capsys.readouterr().err.splitlines()[-1]
    # a folder, which others lack
    with pytest.raises(script.InputError, match="--push_to_hub.*--pretrained_model_name_or_path"):
        script.main(script.parse_args(flags(tmp_path, "--push_to_hub")))
    with pytest.raises(ValueError, match="^--hub_model_id.*bad name!"):
        script.check_inputs(script.parse_args(flags(tmp_path, "--push_to_hub", hub_model_id="bad name!")))
    with pytest.raises(ValueError, match="^--push_to_hub: log in first"):
        script.check_inputs(script.parse_args(flags(tmp_path, "--push_to_hub", hub_model_id="me/it")))
