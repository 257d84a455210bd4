"""The baseline script of examples/: what D-OPSD is compared with."""

import sys

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from conftest import LORA, ROOT


sys.path.insert(0, str(ROOT / "examples"))

import train_sft  # noqa: E402


def run(flags, output_dir, **changes):
    train_sft.main(train_sft.parse_args(flags(output_dir, **changes)))
    return load_file(output_dir / LORA)


def test_sft_and_dreambooth_train_the_layers_that_dopsd_trains(flags, train, tmp_path):
    """The comparison would be between different LoRAs."""
    ours = load_file(train(tmp_path / "dopsd") / LORA)
    sft = run(flags, tmp_path / "sft")
    dreambooth = run(flags, tmp_path / "dreambooth", class_prompt="a square", num_class_images=2)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in sft.items()}
    assert any((v != 0).any() for k, v in sft.items() if "lora_B" in k)
    assert any(not torch.equal(sft[k], dreambooth[k]) for k in sft)


def test_full_sft_writes_a_pipeline(flags, base, tmp_path):
    """The baseline of full fine-tuning trains all weights and is loaded as the result of D-OPSD is."""
    train_sft.main(train_sft.parse_args(flags(tmp_path, "--full")))
    trained = DiffusionPipeline.from_pretrained(tmp_path).transformer.state_dict()
    before = DiffusionPipeline.from_pretrained(base).transformer.state_dict()
    assert not any(torch.equal(w, before[n]) for n, w in trained.items() if n.endswith("to_q.weight"))


def test_flow_matching_loss_is_zero_for_the_true_velocity():
    """A wrong sign or time would weaken the baseline."""

    class Exact:
        """Knows x0 and returns the velocity noise - x0 = (x_s - x0) / s."""

        transformer = None

        def velocity(self, transformer, states, timestep, contexts):
            return (states - latents) / (timestep / 1000).view(-1, 1, 1, 1)

    latents = torch.randn(16, 4, 8, 8)
    loss = train_sft.flow_matching_loss(Exact(), latents, None, torch.Generator().manual_seed(0), shift=3.0)
    assert loss < 1e-5


def test_flow_matching_draws_times_from_the_schedule_of_inference(pipeline):
    """At other times than inference uses, the baseline would learn less."""
    assert train_sft.shift_of(pipeline, torch.empty(1, 4, 8, 8), 4) == pytest.approx(3.0, rel=1e-3)
