"""Tiny random models of the real classes in the Hub's layout, a folder of images, and runs of the training script."""

import functools
import inspect
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import unittest.mock
from pathlib import Path
from types import SimpleNamespace


# before any import that reads them: no network, and no cache of the user is read or written
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="dopsd-tests-")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["ACCELERATE_USE_CPU"] = "true"
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402
from peft import LoraConfig  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402

import train_dopsd_full as full_script  # noqa: E402
import train_dopsd_lora as script  # noqa: E402
from families import CAPTIONS, FAMILIES, make_tokenizer, save_vlm  # noqa: E402


LORA = "pytorch_lora_weights.safetensors"
WEIGHTS = "diffusion_pytorch_model.safetensors"
SECRET = "hf_aTokenThatNobodyMustRead"


def pytest_generate_tests(metafunc):
    """With the mark `families`, a test runs for each family of tests/families.py, or for those that the mark names:
    `base`, `vlm`, `pipeline`, `student`, `train` and all that builds on them are then of that family. Without it they
    are of Z-Image."""
    if "family" in metafunc.fixturenames:
        mark = metafunc.definition.get_closest_marker("families")
        names = (mark.args or tuple(FAMILIES)) if mark else ("z_image",)
        ids = names if len(names) > 1 else [pytest.HIDDEN_PARAM]
        metafunc.parametrize("family", names, indirect=True, ids=ids, scope="session")


@pytest.fixture(scope="session")
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """Folder of what a function writes for some arguments; written once."""

    @functools.cache
    def folder(write, *args, **kwargs):
        path = tmp_path_factory.mktemp(write.__name__)
        write(path, *args, **kwargs)
        return path

    return folder


@pytest.fixture(scope="session")
def base(family, built, tokenizer):
    return built(family.save, tokenizer)


@pytest.fixture(scope="session")
def vlm(family, built, tokenizer):
    return built(save_vlm, tokenizer, layers=family.text_layers)


@pytest.fixture(scope="session")
def wide_vlm(built, tokenizer):
    return built(save_vlm, tokenizer, hidden_size=128)


def draw(shape, fill, size=(40, 40)):
    image = Image.new("RGB", size, "white")
    getattr(ImageDraw.Draw(image), shape)([8, 8, 30, 30], fill=fill)
    return image


def save_images(folder):
    folder.mkdir(parents=True, exist_ok=True)
    shapes = [("rectangle", "red"), ("ellipse", "blue"), ("rectangle", "green"), ("ellipse", "yellow")]
    for (name, captions), (shape, fill) in zip(CAPTIONS.items(), shapes):
        draw(shape, fill).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text("\n".join(captions) + "\n")
    return folder


def student_picture(file, row=0):
    """The student's picture of 32 x 32 pixels in a row of a validation picture, which has headings and texts of 20
    pixels."""
    top = 20 + row * (32 + 20)
    return np.asarray(Image.open(file)).astype(int)[top : top + 32, :32]


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Four square images; the first has a short and a long caption."""
    return save_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """The next Accelerator is set up by its own arguments, as in a new process."""
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture(scope="session")
def contexts(tmp_path_factory):
    return tmp_path_factory.mktemp("contexts")


@pytest.fixture(scope="session")
def flags(base, vlm, images, contexts):
    """Command line of a short run; later flags win. Contexts are shared by all runs."""
    defaults = {
        "pretrained_model_name_or_path": base, "vlm_model_name_or_path": vlm, "instance_data_dir": images,
        "context_cache_dir": contexts, "resolution": 32, "rank": 4, "rollout_steps": 2,
        "max_train_steps": 2, "learning_rate": 1e-2, "ema_decay": 0.9, "validation_steps": 0, "report_to": "none",
        "mixed_precision": "no", "prior_prompts": "none",
    }  # fmt: skip

    def command(output_dir, *switches, **changes):
        values = {**defaults, **changes, "output_dir": output_dir}
        return [s for n, v in values.items() if v is not None for s in (f"--{n}", str(v))] + list(switches)

    return command


class Trainer:
    """Runs a training script in this process and returns the output folder; names what the script writes."""

    def __init__(self, module, flags, result, student):
        self.module, self.flags, self.result, self.student = module, flags, result, student

    def __call__(self, output_dir, *switches, **changes):
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        self.module.main(self.module.parse_args(self.flags(output_dir, *switches, **changes)))
        return Path(output_dir)


def patch_velocity(patch, family, replacement):
    """Replaces the family's `velocity`."""
    patch.setattr(family, "velocity", replacement)


@pytest.fixture(scope="session")
def train(flags):
    return Trainer(script, flags, LORA, "student")


@pytest.fixture(scope="session")
def train_full(flags):
    def without_lora(output_dir, *switches, **changes):
        return flags(output_dir, *switches, **{"rank": None, "learning_rate": 1e-3, **changes})

    return Trainer(full_script, without_lora, f"transformer/{WEIGHTS}", "transformer")


@pytest.fixture(params=["lora", "full"])
def train_any(request, train, train_full):
    """Each training script in turn."""
    return train if request.param == "lora" else train_full


@pytest.fixture
def uncompiled():
    """torchao's optimiser as it is, without the minutes in which it is compiled for each shape."""
    with torch.compiler.set_stance("force_eager"):
        yield


SITECUSTOMIZE = """
import os, socket
def refuse(name, call):
    def guarded(self, address, *args):
        if self.family == socket.AF_UNIX or address[0] == os.environ["NETWORK_ALLOWED"]:
            return call(self, address, *args)
        note(f"{name} {address}")
    return guarded
def note(text):
    with open(os.environ["NETWORK_LOG"], "a") as log:
        log.write(text + "\\n")
    raise OSError("no network in this test: " + text)
for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, refuse(name, getattr(socket.socket, name)))
find = socket.getaddrinfo
def getaddrinfo(host, *args, **kwargs):
    return find(host, *args, **kwargs) if host == os.environ["NETWORK_ALLOWED"] else note(f"getaddrinfo {host}")
socket.getaddrinfo = getaddrinfo
open(os.environ["NETWORK_LOG"], "a").close()
"""


def guarded_environment(folder, hub=None):
    """Environment of a new process that can reach nothing but the address of the stand-in `hub`; others land in
    network.log."""
    (folder / "guard").mkdir(parents=True, exist_ok=True)
    (folder / "guard" / "sitecustomize.py").write_text(SITECUSTOMIZE)
    env = {n: v for n, v in os.environ.items() if n not in ("HF_HUB_OFFLINE", "HF_TOKEN")} | {"OMP_NUM_THREADS": "1"}
    env |= {
        "PYTHONPATH": str(folder / "guard"),
        "NETWORK_LOG": str(folder / "network.log"),
        "HF_HOME": str(folder / "home"),
    }
    env |= {"NETWORK_ALLOWED": "127.0.0.1" if hub else "none", "HF_HUB_DISABLE_XET": "1"}
    return env | ({"HF_ENDPOINT": hub} if hub else {})


@pytest.fixture
def subprocess_env():
    """Environment of a new process: one thread, the folder of the scripts not on its path."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}


def heed_signals():
    """For a process that a test starts: nohup, and shells for what they start in the background, have signals
    ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def run_script(path, words, errors, environment):
    """What a `ForkedScript` does: as `python path words`, in a process group of its own, with its errors in a file."""
    os.setsid()
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.environ.update(environment)
    heed_signals()
    sys.argv[:] = [path, *words]
    runpy.run_path(path, run_name="__main__")


class ForkedScript:
    """A script in a process that is forked where all packages are imported; it is used as subprocess.Popen is."""

    context = multiprocessing.get_context("forkserver")

    def __init__(self, path, words, errors, **environment):
        self.context.set_forkserver_preload(["conftest"])
        self.errors = errors
        self.process = self.context.Process(target=run_script, args=(path, words, errors, environment))
        # for the server, which starts with the first
        with unittest.mock.patch.dict(os.environ, PYTHONPATH=str(Path(__file__).parent)):
            self.process.start()
        self.pid = self.process.pid

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        self.process.kill()

    @property
    def returncode(self):
        return self.process.exitcode

    def wait(self, timeout):
        self.process.join(timeout)
        if self.process.is_alive():
            raise subprocess.TimeoutExpired("", timeout)
        return self.returncode

    def communicate(self, timeout):
        self.wait(timeout)
        return None, Path(self.errors).read_text()


def run_processes(command, folder, count=2, code=0, **environment):
    """Runs a script with its flags in several processes, as torchrun would on as many GPUs, until all have ended with
    `code`. Returns what each wrote to stderr."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        environment |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(probe.getsockname()[1]),
            "WORLD_SIZE": str(count),
        }
    path, *words = command
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    processes = [
        ForkedScript(path, words, str(folder / f"errors-of-{n}"), **environment, **own) for n, own in enumerate(ranks)
    ]
    errors = []
    try:
        for process in processes:
            errors.append(process.communicate(timeout=300)[1])
            assert process.returncode == code, errors[-1][-3000:]
        return errors
    finally:
        for process in processes:
            process.kill()


@pytest.fixture
def pipeline(family, base):
    pipeline = family.pipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def stock(family, pipeline):
    """The pipeline of diffusers with the parts of `pipeline`."""
    config = {
        n: v
        for n, v in pipeline.config.items()
        if n in inspect.signature(family.stock).parameters and n not in pipeline.components
    }
    stock = family.stock(**pipeline.components, **config)
    stock.set_progress_bar_config(disable=True)
    return stock


@pytest.fixture
def encoder(vlm, pipeline):
    """The teacher's encoder, with the text encoder of `pipeline`."""
    pipeline.load_multimodal_encoder(str(vlm))
    return pipeline.multimodal_encoder


@pytest.fixture
def student(pipeline, flags, tmp_path):
    """A LoRA whose student and teacher weights differ; `backward(batch)` is one micro-step, at the states `drawn` for
    each image
    (default: all): the mean loss of each state and the gradient."""
    pipeline.transformer.requires_grad_(False)
    targets = pipeline.lora_targets(pipeline.transformer)
    pipeline.transformer.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    parameters = [p for p in pipeline.transformer.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(0)
    teacher = script.LoRATeacher(pipeline.transformer, parameters, 0.9)
    with torch.no_grad():
        for parameter, shadow in zip(parameters, teacher.shadow):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            shadow.copy_(torch.randn(shadow.shape, generator=generator) * 0.1)
    accelerator = Accelerator(cpu=True, mixed_precision="no")

    def batch(size=2, height=32, width=32, seed=0):
        """Contexts of unequal lengths, if the family has such, on both sides of Z-Image's padding to 32 tokens; those
        of teacher and student differ."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.cat([pipeline.initial_noise(height, width, generator) for _ in range(size)])
        shape = functools.partial(
            pipeline.context_shape,
            transformer_config=pipeline.transformer.config,
            pipeline_config={"max_sequence_length": 48},
        )
        draw = lambda tokens: {"prompt_embeds": torch.randn(shape(tokens), generator=generator)}  # noqa: E731
        contexts = [[draw(n + i * 17) for i in range(size)] for n in (20, 30)]
        return noise, *contexts

    def backward(batch, rollout_steps=4, synchronize=True, drawn=None, **changes):
        drawn = drawn or [list(range(rollout_steps))] * len(batch[0])
        changes |= {"rollout_steps": rollout_steps, "states_per_rollout": len(drawn[0])}
        args = script.parse_args(flags(tmp_path, **changes))
        for parameter in parameters:
            parameter.grad = None
        states = script.rollout(pipeline, pipeline.transformer, teacher, (*batch, drawn), args, accelerator)
        sums, counts = script.backward_each_state(states, pipeline.transformer, args, accelerator, synchronize)
        assert next(states, None) is None  # takes the last Euler step, whose result training does not need
        return sums / counts, [p.grad.clone() for p in parameters]

    return SimpleNamespace(
        pipeline=pipeline,
        transformer=pipeline.transformer,
        parameters=parameters,
        teacher=teacher,
        batch=batch,
        backward=backward,
    )
