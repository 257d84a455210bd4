"""Tiny random models of the real classes in the Hub's layout, a folder of images, and runs of the training script."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace


# before any import that reads them: no network, and no cache of the user is read or written
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="dopsd-tests-")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["ACCELERATE_USE_CPU"] = "true"
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402
from diffusers import (  # noqa: E402
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry  # noqa: E402
from peft import LoraConfig  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402
from tokenizers import ByteLevelBPETokenizer  # noqa: E402
from transformers import (  # noqa: E402
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil  # noqa: E402

import train_dopsd_full as full_script  # noqa: E402
import train_dopsd_lora as script  # noqa: E402
from pipeline_dopsd import DOPSDZImagePipeline, MultimodalEncoder  # noqa: E402


SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
]  # fmt: skip
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string -%}{{ message.content }}
{%- else -%}{%- for part in message.content -%}
{%- if part.type == 'image' -%}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""
CAPTIONS = {
    "a": [
        "a red square",
        "a square, red, on a plain white background, drawn with a thick outline and seen from the front",
    ],
    "b": ["a blue disc"],
    "c": ["a green bar on white"],
    "d": ["a yellow dot"],
}
HIDDEN = 64
LORA = "pytorch_lora_weights.safetensors"
WEIGHTS = "diffusion_pytorch_model.safetensors"
SECRET = "hf_aTokenThatNobodyMustRead"


def make_tokenizer(folder):
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([c for cs in CAPTIONS.values() for c in cs], vocab_size=300, show_progress=False)
    bpe.save_model(str(folder))
    vocab = json.loads((folder / "vocab.json").read_text())
    merges = [tuple(line.split()) for line in (folder / "merges.txt").read_text().splitlines()[1:]]
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, additional_special_tokens=SPECIAL_TOKENS[1:])
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.model_max_length = 512
    return tokenizer


def text_config(tokenizer, hidden_size=HIDDEN, layers=3):
    return {
        "vocab_size": len(tokenizer), "hidden_size": hidden_size, "intermediate_size": 96, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048,
        "pad_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    }  # fmt: skip


def save_base(folder, tokenizer, axes_lens=(512, 64, 64), dim=64):
    """A Z-Image: text encoder with rope_theta 1e4, VAE f4, images in multiples of 8 pixels."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e4}
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=dim, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=HIDDEN,
        axes_dims=[dim // 2 - 24, 12, 12], axes_lens=list(axes_lens),
    )  # fmt: skip
    for name, parameter in transformer.named_parameters():
        if name.endswith("pad_token"):
            torch.nn.init.normal_(parameter)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3, latent_channels=4,
        block_out_channels=[8, 16, 16], norm_num_groups=4, scaling_factor=0.5, shift_factor=0.1,
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=Qwen3Model(Qwen3Config(**text_config(tokenizer), rope_parameters=rope)),
        tokenizer=tokenizer,
        transformer=transformer,
    ).save_pretrained(folder)


def save_vlm(folder, tokenizer, hidden_size=HIDDEN, layers=3):
    """A Qwen3-VL with language weights and a rope_theta of its own, 8-pixel patches merged two by two."""
    torch.manual_seed(1)
    token = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 5e3, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 8,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": hidden_size,
        "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    config = Qwen3VLConfig(
        text_config={**text_config(tokenizer, hidden_size, layers), "rope_parameters": rope}, vision_config=vision,
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"), tie_word_embeddings=True,
        vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"),
    )  # fmt: skip
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"shortest_edge": 16 * 16, "longest_edge": 128 * 128}
    Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, temporal_patch_size=2, size=size).save_pretrained(folder)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def base(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("base")
    save_base(folder, tokenizer)
    return folder


@pytest.fixture(scope="session")
def vlm(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("vlm")
    save_vlm(folder, tokenizer)
    return folder


@pytest.fixture(scope="session")
def wide_vlm(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("wide_vlm")
    save_vlm(folder, tokenizer, hidden_size=128)
    return folder


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


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Four square images; the first has a short and a long caption."""
    return save_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """The next Accelerator is set up by its own arguments, and attention is PyTorch's, as in a new process."""
    yield
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture(scope="session")
def flags(base, vlm, images, tmp_path_factory):
    """Command line of a short run; later flags win. Contexts are shared by all runs."""
    defaults = {
        "pretrained_model_name_or_path": base, "vlm_model_name_or_path": vlm, "instance_data_dir": images,
        "context_cache_dir": tmp_path_factory.mktemp("contexts"), "resolution": 32, "rank": 4, "rollout_steps": 2,
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
    """Environment of a new process that can reach nothing but the address of the stand-in `hub`; others land in network.log."""
    (folder / "guard").mkdir(parents=True, exist_ok=True)
    (folder / "guard" / "sitecustomize.py").write_text(SITECUSTOMIZE)
    env = {n: v for n, v in os.environ.items() if n not in ("HF_HUB_OFFLINE", "HF_TOKEN")} | {"OMP_NUM_THREADS": "1"}
    env |= {"PYTHONPATH": str(folder / "guard"), "NETWORK_LOG": str(folder / "network.log"), "HF_HOME": str(folder / "home")}
    env |= {"NETWORK_ALLOWED": "127.0.0.1" if hub else "none", "HF_HUB_DISABLE_XET": "1"}
    return env | ({"HF_ENDPOINT": hub} if hub else {})


@pytest.fixture
def subprocess_env():
    """Environment of a new process: one thread, the folder of the scripts not on its path."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}


def run_two_processes(command, environment):
    """Runs a script with its flags in two processes, as `accelerate launch` would on two GPUs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = ["--master_addr", "127.0.0.1", "--master_port", str(probe.getsockname()[1])]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", *address]
    result = subprocess.run([*launcher, *command], env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.fixture
def pipeline(base):
    return DOPSDZImagePipeline.from_pretrained(base)


@pytest.fixture
def encoder(vlm, pipeline):
    """The teacher's encoder, with the text encoder of `pipeline`."""
    encoder = MultimodalEncoder(str(vlm))
    encoder.transplant(pipeline.text_encoder)
    return encoder


@pytest.fixture
def student(pipeline, flags, tmp_path):
    """A LoRA whose student and teacher weights differ; `backward(batch)` is one micro-step, at the states `drawn` for each image
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
        """Contexts on both sides of the transformer's padding to 32 tokens; teacher and student contexts differ."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(size, 4, height // 4, width // 4, generator=generator)
        draw = lambda tokens: {"prompt_embeds": torch.randn(tokens, HIDDEN, generator=generator)}  # noqa: E731
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
