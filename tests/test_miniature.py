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
from diffusers import Flux2KleinPipeline, Krea2Pipeline, ZImagePipeline
from PIL import Image

from conftest import ROOT


MINIATURE = ROOT / "examples" / "miniature"
sys.path[:0] = [str(MINIATURE), str(ROOT / "examples")]

import compare  # noqa: E402
import curves  # noqa: E402
import domain  # noqa: E402
import train_dopsd_full  # noqa: E402
import train_dopsd_lora  # noqa: E402
import train_sft  # noqa: E402
import trials  # noqa: E402
import world  # noqa: E402
from concepts import (  # noqa: E402
    CONCEPTS,
    MAIN,
    further_scenes,
    further_scenes_of_the_world,
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


@pytest.fixture(scope="module")
def contexts(tmp_path_factory):
    return tmp_path_factory.mktemp("trials")


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
    for concept in (CONCEPTS[name] for name in MAIN):
        assert (concept.shape, concept.colour) not in {(s.shape, s.colour) for s in scenes}
    assert not {s.shape for s in scenes} & set(world.NEW_SHAPES)
    kept_out = world.style_of(world.NEW_STYLE)
    for i in range(20000):
        style = world.style_of(f"random-{i}")
        if (
            style.background
            and max(style.background) < 90
            and (style.texture, style.edge) == (kept_out.texture, kept_out.edge)
        ):
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
    further = set(captions(further_scenes_of_the_world()))
    assert len(further) == 192 and not further & {*prompts, *captions(unrelated_scenes())}


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


# shorter contexts than the real one
KLEIN = {
    "guidance_scale": 1.0,
    "text_encoder_out_layers": (1, 3, 4),
    "max_sequence_length": 64,
}


@pytest.mark.parametrize(
    ("stock", "folder", "call"),
    [(Flux2KleinPipeline, "klein", KLEIN), (Krea2Pipeline, "krea", {"guidance_scale": 0.0})],
)
def test_stock_pipeline_loads_the_other_miniatures(judge, stock, folder, call):
    """Likewise for the other families; a miniature that draws little could lose little."""
    pipeline = stock.from_pretrained(MINIATURE / folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    scenes, generator = unrelated_scenes(32), torch.Generator().manual_seed(0)
    images = pipeline(
        prompt=captions(scenes),
        height=64,
        width=64,
        num_inference_steps=4,
        output_type="np",
        generator=generator,
        **call,
    ).images
    right, shares = accuracy(judge, list((images * 255).astype("uint8")), scenes, UNRELATED)
    assert right > 0.7 and shares["shape"] > 0.85


@pytest.mark.parametrize(
    ("folder", "context", "name"), [("klein", "vlm", "arrow"), ("klein", "edit", "ember"), ("krea", "vlm", "crown")]
)
def test_teachers_of_other_families_show_what_words_cannot(folder, context, name, judge):
    """With teachers no better than the student, the comparison of teachers would compare nothing."""
    concept, pipeline = CONCEPTS[name], load_pipeline(folder=MINIATURE / folder)
    pipeline.load_multimodal_encoder(str(MINIATURE / "vlm"))
    scenes = held_out_scenes(concept)
    student = sample(pipeline, pipeline.encode_student(captions(scenes, concept)), seed=0)
    teacher = sample(pipeline, teacher_contexts(pipeline, concept, context), seed=0)
    words, picture = (accuracy(judge, images, scenes, concept.shows)[0] for images in (student, teacher))
    assert picture > 0.4 and words < 0.1


@pytest.mark.parametrize("name", CONCEPTS)
def test_a_picture_in_the_context_shows_what_words_cannot(name, judge, miniature):
    """With a teacher no better than the student, D-OPSD has nothing to teach; one concept is there to show it."""
    concept = CONCEPTS[name]
    scenes = held_out_scenes(concept)
    student = sample(miniature, miniature.encode_student(captions(scenes, concept)), seed=0)
    teacher = sample(miniature, teacher_contexts(miniature, concept), seed=0)
    words, picture = (accuracy(judge, images, scenes, concept.shows)[0] for images in (student, teacher))
    assert words < 0.1 and (picture < 0.35 if name == "checkered_house" else picture > 0.6)


@pytest.mark.parametrize("name", ["build_klein", "build_krea", "compare", "editing"])
def test_builders_start(name, tmp_path, subprocess_env):
    """Nobody could build the miniature anew with the README's command."""
    words = [sys.executable, MINIATURE / f"{name}.py", "--help"]
    assert (
        "--work_dir"
        in subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=subprocess_env, check=True).stdout
    )


def test_weights_stay_small():
    """Cloning the repository would take long."""
    sizes = {p: p.stat().st_size for p in MINIATURE.rglob("*.safetensors")}
    others = [
        sum(size for path, size in sizes.items() if MINIATURE / name in path.parents) for name in ("klein", "krea")
    ]
    assert max(others) < 15e6 and sum(sizes.values()) - sum(others) < 25e6


def test_comparison_reports_the_best_rate_and_its_training_seeds(monkeypatch, capsys):
    """A row of the README's table would show the figures of another rate, or a rate at the end of those that were
    tried."""

    def run(job):
        model, name, share, concept, (batch, rate), seed, measured, args = job
        right = {1e-3: 0.6, 2e-3: 0.5}.get(rate, 0.4) + 0.1 * seed
        if name == "sft":
            right = {9e-6: 0.3}.get(rate, 0.2 - rate)
        point = {
            "concept": [right],
            "right": [0.9],
            "detail": 1.0,
            "frechet": 100.0,
            "copying": 0.2,
            "slow": [0.5, 0.8],
        }
        return job[:-1], [point]

    pool = types.SimpleNamespace(map=lambda _, jobs: map(run, jobs))
    monkeypatch.setattr(compare, "ProcessPoolExecutor", lambda *_: contextlib.nullcontext(pool))
    monkeypatch.setattr(
        compare,
        "base_figures",
        lambda args: {c: run(("", "", 0, c, (2, 0.0), 0, "", args))[1][0] for c in args.concepts},
    )
    monkeypatch.setattr(sys, "argv", ["compare.py", "--methods", "prior", "sft"])
    compare.main()
    printed = capsys.readouterr().out
    assert "| D-OPSD with prior prompts | 0.001 | 70.0 ± 24.8 | 90.0 ± 0.0 | 1.00 ± 0.00 |" in printed
    assert re.search(r"\| SFT \| 9e-06 \| 30.0 ± 0.0 .* \| -40.0 ± 24.8 \| 0.0 ± 0.0 \|\n", printed)


@pytest.mark.parametrize(
    "name", [name for name, variant in compare.VARIANTS.items() if variant.stand_in or variant.folder]
)
def test_each_baseline_trains(name, contexts):
    """A comparison of hours would stop at a method, or compare with a LoRA that was not trained."""
    norms = []

    def validate(pipeline, teacher, dataset, cache, args, accelerator, step):
        norms.append(sum(p.norm().item() for n, p in pipeline.transformer.named_parameters() if "lora_B" in n))

    trials.train("model", compare.VARIANTS[name], "arrow", (2, 1e-3), 1, 0, validate, contexts)
    assert norms[0] == 0
    assert (norms[1] > 0) == (name != "no_picture")  # text alone teaches nothing


@pytest.mark.parametrize("name", MAIN)
def test_folders_of_the_advice(tmp_path, name):
    """More pictures that show what is measured would count copies; a folder of another size would answer another
    question."""
    measured = {(scene.background, scene.position) for scene in held_out_scenes(CONCEPTS[name])}
    scenes = further_scenes(CONCEPTS[name], 4)
    assert measured.isdisjoint((scene.background, scene.position) for scene in scenes)
    for variant, count in (("pictures1", 1), ("pictures2", 2), ("pictures8", 8), ("caption", 4)):
        folder = curves.VARIANTS[variant].folder(name, tmp_path)
        assert len(list(folder.glob("*.png"))) == len(list(folder.glob("*.txt"))) == count
    assert len({file.read_text() for file in folder.glob("*.txt")}) == 1


def test_finished_runs_become_entries(tmp_path):
    """A run that is lost on its way into the table's file is an hour lost; one that replaces another's entry is a
    wrong row."""
    finished = tmp_path / "finished.json"
    finished.write_text('{"old": [{"right": [0.5]}]}')
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "new.json").write_text('[{"right": [0.123456789], "step": 3}]')
    trials.collect(tmp_path / "runs", finished)
    assert json.loads(finished.read_text()) == {"old": [{"right": [0.5]}], "new": [{"right": [0.123457], "step": 3}]}


def test_sft_of_the_comparison_is_that_of_the_script():
    """The table's SFT would not be the one that users of train_sft.py get."""
    _, lent = trials.measuring("model")
    stand_in = compare.Baseline(compare.sft, MINIATURE / "concepts" / "arrow", lent)
    x0, contexts = torch.cat(list(stand_in.latents.values()))[:2], lent.encode_student(["a circle", "a red ring"])
    stand_in.shift = train_sft.shift_of(lent, x0, 4)
    torch.manual_seed(0)
    states, sigmas, wanted = stand_in.noised(x0)
    ours = compare.flow_matching(lent, lent.transformer, states, sigmas, wanted, contexts).mean()
    torch.testing.assert_close(ours, train_sft.flow_matching_loss(lent, states, contexts, sigmas, wanted))
    torch.testing.assert_close((1 - sigmas.view(-1, 1, 1, 1)) * x0 + sigmas.view(-1, 1, 1, 1) * (wanted + x0), states)


def test_training_scripts_take_the_flags_of_the_miniature(tmp_path, monkeypatch):
    """A comparison of hours, or the demo, would stop at a flag that a script no longer takes."""
    runs, settings = [], types.SimpleNamespace(work_dir=tmp_path, processes=1)
    for module in (train_sft, train_dopsd_lora):
        monkeypatch.setattr(
            module, "main", lambda args, module=module: runs.append((module.__name__, args.max_train_steps))
        )
    scripts = {"train_sft.py": train_sft, "train_dopsd_full.py": train_dopsd_full}
    parse = lambda words, check, env: scripts[Path(words[1]).name].parse_args(words[2:])  # noqa: E731
    monkeypatch.setattr(
        domain,
        "subprocess",
        types.SimpleNamespace(run=lambda *a, **k: runs.append(("full", parse(*a, **k).max_train_steps))),
    )
    for method in domain.METHODS:
        domain.train("named", method, 1e-3, 0, settings, tmp_path / "out")
    demo = re.findall(
        r"(train_\w+)\.py (.*?) (?:>|\|\|) ",
        subprocess.check_output(["make", "-n", "demo"], cwd=ROOT, text=True).replace("\\\n", " "),
    )
    for name, words in demo:
        module = train_sft if name == "train_sft" else train_dopsd_lora
        module.main(module.parse_args(shlex.split(words.replace("$(( 9 * 128 / 4 ))", "288"))))
    steps = dict(zip(domain.METHODS, (steps for name, steps in runs if name == "full")))
    assert steps == {"prior": 178, "dopsd": 178, "sft": 400, "fast": 178, "styled": 178, "long": 123}
    assert runs[-2:] == [("train_sft", 288), ("train_dopsd_lora", 128)]


@pytest.mark.parametrize(
    ("name", "passes"),
    [("m4", 12), ("m2", 7.3), ("m1", 4.5), ("first", 3), ("first_two", 6), ("early", 4), ("late", 5)],
)
def test_variants_are_counted_in_the_passes_that_they_take(name, passes):
    """Curves over a wrong cost would compare long runs with short ones."""
    assert curves.VARIANTS[name].passes() == pytest.approx(passes, abs=0.05)


@pytest.mark.parametrize("name", ["early_exact", "late_exact", "weights"])
def test_weights_of_states(name):
    """Weights that do not undo the draw would train another loss than the row says."""
    variant, shown = curves.VARIANTS[name], torch.ones(4, 1, 1, 1)
    losses = variant.replaced["state_loss"](shown, torch.zeros_like(shown), torch.tensor(curves.SIGMAS), "velocity")
    flags = types.SimpleNamespace(rollout_steps=4, states_per_rollout=1, train_batch_size=1, seed=0)
    draw = variant.replaced.get("draw_states", train_dopsd_lora.draw_states)
    drawn = [states[0] for states in draw(flags, range(40))]
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
