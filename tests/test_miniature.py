"""The committed miniature: what the demo, its README and its table rely on."""

import contextlib
import json
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from diffusers import Flux2KleinPipeline, ZImagePipeline
from PIL import Image

from conftest import ROOT


MINIATURE = ROOT / "examples" / "miniature"
sys.path[:0] = [str(MINIATURE), str(ROOT / "examples")]

import domain  # noqa: E402
import train_sft  # noqa: E402

import compare  # noqa: E402
import curves  # noqa: E402
import train_dopsd_full  # noqa: E402
import train_dopsd_lora  # noqa: E402
import world  # noqa: E402
from concepts import (  # noqa: E402
    CONCEPTS,
    held_out_scenes,
    prior_prompts,
    training_pictures,
    training_scenes,
    unrelated_scenes,
)
from evaluate import UNRELATED, captions, load_pipeline, sample, teacher_contexts  # noqa: E402
from judge import Judge, accuracy  # noqa: E402


@pytest.fixture(scope="module")
def judge():
    return Judge.from_pretrained(MINIATURE / "judge")


@pytest.fixture(scope="module")
def miniature():
    pipeline = load_pipeline()
    pipeline.load_multimodal_encoder(str(MINIATURE / "vlm"))
    return pipeline


def test_scenes_are_reproducible_and_leave_things_open():
    """Pictures would differ from the committed ones, or few-step sampling would be trivial."""
    scene = training_scenes(CONCEPTS["arrow"])[0]
    assert (world.render(scene, 1) == world.render(scene, 1)).all()
    assert (world.render(scene, 1) != world.render(scene, 2)).mean() > 0.5


def test_concepts_are_never_sampled():
    """A concept that the base has seen in training would make the comparison worthless."""
    import numpy as np

    rng = np.random.default_rng(0)
    scenes = [world.sample_scene(rng, new=i % 2 == 0) for i in range(4000)]
    for concept in CONCEPTS.values():
        assert (concept.shape, concept.colour) not in {(s.shape, s.colour) for s in scenes}
    assert not {s.shape for s in scenes} & set(world.NEW_SHAPES)
    kept_out = world.style_of(world.NEW_STYLE)
    for i in range(20000):
        style = world.style_of(f"random-{i}")
        if style.background and max(style.background) < 90 and (style.texture, style.edge) == (kept_out.texture, kept_out.edge):
            assert not all(colour[0] == max(colour) for colour in (style.background, style.texture_colour))


@pytest.mark.parametrize("name", CONCEPTS)
def test_committed_pictures_are_those_of_the_world(name):
    """Held-out scenes would overlap with training pictures that were drawn by other code."""
    folder = MINIATURE / "concepts" / name
    for i, picture in enumerate(training_pictures(CONCEPTS[name])):
        assert Image.open(folder / f"{name}_{i}.png").tobytes() == picture.tobytes()
        assert (folder / f"{name}_{i}.txt").read_text().splitlines()[0] == CONCEPTS[name].caption(
            training_scenes(CONCEPTS[name])[i]
        )


def test_prior_prompts_are_not_those_that_measure_what_is_kept():
    """Kept by practice on the very prompts that are measured, the rest could be lost and nobody would see it."""
    prompts = (MINIATURE / "prior_prompts.txt").read_text().splitlines()
    assert prompts == prior_prompts() and len(prompts) > 50
    assert not set(prompts) & set(captions(unrelated_scenes()))


def test_stock_pipeline_loads_the_miniature_and_draws_what_it_is_asked_for(judge):
    """A user's first four-step picture with plain diffusers would be wrong."""
    pipeline = ZImagePipeline.from_pretrained(MINIATURE / "model", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    scenes = unrelated_scenes(32)
    images = pipeline(
        captions(scenes), height=64, width=64, num_inference_steps=4, guidance_scale=0.0, output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    right, shares = accuracy(judge, list((images * 255).astype("uint8")), scenes, UNRELATED)
    assert right > 0.7 and shares["shape"] > 0.9


def test_stock_pipeline_loads_the_klein_miniature(judge):
    """Likewise for FLUX.2-klein, whose miniature has shorter contexts than the real one."""
    pipeline = Flux2KleinPipeline.from_pretrained(MINIATURE / "klein", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    scenes = unrelated_scenes(32)
    images = pipeline(
        prompt=captions(scenes), height=64, width=64, num_inference_steps=4, guidance_scale=1.0, output_type="np",
        generator=torch.Generator().manual_seed(0), text_encoder_out_layers=(1, 3, 4), max_sequence_length=64,
    ).images  # fmt: skip
    right, shares = accuracy(judge, list((images * 255).astype("uint8")), scenes, UNRELATED)
    assert right > 0.5 and shares["shape"] > 0.7


@pytest.mark.parametrize(("context", "name"), [("vlm", "arrow"), ("edit", "ember")])
def test_kleins_teachers_show_what_words_cannot(context, name, judge):
    """With teachers no better than the student, the comparison of teachers would compare nothing."""
    concept, pipeline = CONCEPTS[name], load_pipeline(folder=MINIATURE / "klein")
    pipeline.load_multimodal_encoder(str(MINIATURE / "vlm"))
    scenes = held_out_scenes(concept)
    student = sample(pipeline, pipeline.encode_student(captions(scenes, concept)), seed=0)
    teacher = sample(pipeline, teacher_contexts(pipeline, concept, context), seed=0)
    words, picture = (accuracy(judge, images, scenes, concept.shows)[0] for images in (student, teacher))
    assert picture > 0.4 and words < 0.1


@pytest.mark.parametrize("name", CONCEPTS)
def test_a_picture_in_the_context_shows_what_words_cannot(name, judge, miniature):
    """With a teacher no better than the student, D-OPSD has nothing to teach."""
    concept = CONCEPTS[name]
    scenes = held_out_scenes(concept)
    student = sample(miniature, miniature.encode_student(captions(scenes, concept)), seed=0)
    teacher = sample(miniature, teacher_contexts(miniature, concept), seed=0)
    words, picture = (accuracy(judge, images, scenes, concept.shows)[0] for images in (student, teacher))
    assert picture > 0.6 and words < 0.1


def test_weights_stay_small():
    """Cloning the repository would take long."""
    sizes = {p: p.stat().st_size for p in MINIATURE.rglob("*.safetensors")}
    klein = sum(size for path, size in sizes.items() if MINIATURE / "klein" in path.parents)
    assert klein < 15e6 and sum(sizes.values()) - klein < 25e6


def test_comparison_reports_the_best_rate_and_its_training_seeds(tmp_path, monkeypatch, capsys):
    """A row of the README's table would show the figures of another rate or run."""
    shares = {"0.0003": 0.2, "0.001": 0.6, "0.003": 0.4, "0.001-seed1": 0.5, "0.001-seed2": 0.7}
    for name in CONCEPTS:
        for run, share in shares.items():
            folder = tmp_path / f"{name}-sft-{run}"
            folder.mkdir()
            (folder / "pytorch_lora_weights.safetensors").touch()
            figures = {"concept": [share, share], "right": [0.9, 0.9], "detail": 1.0, "frechet": 100.0}
            (folder / "figures.json").write_text(json.dumps(figures))
    here = types.SimpleNamespace(imap_unordered=lambda run, jobs, chunksize: map(run, jobs))
    context = types.SimpleNamespace(Pool=lambda *_, **__: contextlib.nullcontext(here))
    monkeypatch.setattr(compare.multiprocessing, "get_context", lambda _: context)
    command = ["compare.py", "--work_dir", str(tmp_path), "--methods", "sft", "--training_seeds", "3"]
    monkeypatch.setattr(sys, "argv", command)
    compare.main()
    printed = capsys.readouterr().out
    for name in CONCEPTS:
        assert f"| {name} | SFT | 0.001 | 60.0 ± 0.0 | 90.0 ± 0.0 |" in printed
        assert f"| {name} | SFT | 60, 50, 70 | 90, 90, 90 |" in printed


def test_training_scripts_take_the_flags_of_the_miniature(tmp_path, monkeypatch):
    """A comparison of hours, or the demo, would stop at a flag that a script no longer takes."""
    runs, settings = [], {"work_dir": tmp_path, "threads": torch.get_num_threads(), "steps": 120, "ema_decay": 0.999, "seed": 0}
    for module in (train_sft, train_dopsd_lora):
        monkeypatch.setattr(module, "main", lambda args, module=module: runs.append((module.__name__, args.max_train_steps)))
    for model, methods in compare.METHODS.items():
        for method in (*methods, "control"):
            compare.train((method, "arrow", 1e-3, 0, types.SimpleNamespace(**settings, model=model)))
    scripts = {"train_sft.py": train_sft, "train_dopsd_full.py": train_dopsd_full}
    parse = lambda words, check: scripts[Path(words[1]).name].parse_args(words[2:])  # noqa: E731
    monkeypatch.setattr(domain, "subprocess", types.SimpleNamespace(run=lambda *a, **k: runs.append(("full", parse(*a, **k).max_train_steps))))
    for method in domain.PASSES:
        domain.train(method, 1e-3, types.SimpleNamespace(**settings))
    demo = re.findall(r"(train_\w+)\.py (.*)", subprocess.check_output(["make", "-n", "demo"], cwd=ROOT, text=True).replace("\\\n", " "))
    for script, words in demo:
        module = train_sft if script == "train_sft" else train_dopsd_lora
        module.main(module.parse_args(shlex.split(words.replace("$(( 6 * 60 ))", "360"))))
    assert sorted(steps for name, steps in runs if name == "train_sft") == [360, 360, 720, 720]
    assert [steps for name, steps in runs if name == "full"] == [120, 120, 720] and ("train_dopsd_lora", 60) in runs


@pytest.mark.parametrize(("name", "passes"), [("m4", 12), ("m2", 7.3), ("m1", 4.5), ("first", 3), ("first_two", 6), ("early", 4), ("late", 5)])
def test_variants_are_counted_in_the_passes_that_they_take(name, passes):
    """Curves over a wrong cost would compare long runs with short ones."""
    assert curves.VARIANTS[name].passes() == pytest.approx(passes, abs=0.05)


@pytest.mark.parametrize("name", ["early_exact", "late_exact", "weights"])
def test_weights_of_states(name):
    """Weights that do not undo the draw would train another loss than the row says."""
    variant, shown = curves.VARIANTS[name], torch.ones(4, 1, 1, 1)
    losses = variant.loss(shown, torch.zeros_like(shown), torch.tensor(curves.SIGMAS), "velocity")
    flags = types.SimpleNamespace(rollout_steps=4, states_per_rollout=1, train_batch_size=1, seed=0)
    drawn = [variant.draw(flags, step, 0, 1)[0][0] for step in range(40)]
    shares = torch.bincount(torch.tensor(drawn), minlength=4) / len(drawn)
    expected = torch.tensor([8, 4, 2, 1]) / 15 if name == "weights" else torch.full((4,), 0.25)
    torch.testing.assert_close(losses * shares, expected)


def test_magnitude_and_direction_have_the_value_of_the_loss():
    """At equal lengths the two losses must agree, or rates of one would not suit the other."""
    student, sigma = torch.randn(3, 4, 8, 8), torch.ones(3)
    teacher = torch.randn(3, 4, 8, 8)
    teacher *= (student.flatten(1).norm(dim=1) / teacher.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
    ours = curves.magnitude_and_direction(student, teacher, sigma, "velocity")
    torch.testing.assert_close(ours, curves.state_loss(student, teacher, sigma, "velocity"))
