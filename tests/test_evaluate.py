"""examples/evaluate.py: what a user learns before a training, after it, and from the paper's protocol."""

import base64
import dataclasses
import html.parser
import importlib.util
import io
import json
import re
import runpy
import shutil
import subprocess
import sys
import unittest.mock
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    SiglipConfig,
    SiglipModel,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import train_dopsd_lora as script
from conftest import LORA, ROOT, guarded_environment
from hub_stand_in import HubStandIn
from pipeline_dopsd import PRIOR_PROMPTS, DOPSDMixin


sys.path.append(str(ROOT / "examples" / "miniature"))

import world  # noqa: E402
from concepts import (  # noqa: E402
    CONCEPTS,
    MAIN,
    held_out_scenes,
    training_pictures,
    training_scenes,
)


MINIATURE = ROOT / "examples" / "miniature"
spec = importlib.util.spec_from_file_location("instruments", ROOT / "examples" / "evaluate.py")
instruments = importlib.util.module_from_spec(spec)
sys.modules["instruments"] = instruments
spec.loader.exec_module(instruments)

ORDINARY = ["a house", "a tree in the rain", "two cups"]
LINES = [
    {
        "paraphrase": "one red square",
        "new": ["a red square on a beach", "a red square at night"],
        "trigger": "red square",
        "class": "square",
    },
    *(
        {"paraphrase": f"picture {i}", "new": [f"picture {i} at night"], "trigger": "picture", "class": "drawing"}
        for i in range(3)
    ),
]


@pytest.fixture(scope="session")
def encoders(tmp_path_factory, tokenizer):
    """A DINOv2 and a SigLIP with random weights, as folders."""
    folder = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder / "image")
    text = {
        **sizes,
        "intermediate_size": 32,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 24,
        "projection_size": 32,
    }
    SiglipModel(SiglipConfig(text_config=text, vision_config={**sizes, "intermediate_size": 32})).save_pretrained(
        folder / "text"
    )
    for name in ("image", "text"):
        SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / "text")
    return folder


@pytest.fixture(scope="session")
def evaluate(encoders, base, vlm, images, tmp_path_factory):
    """Runs a command of evaluate.py in this process; returns what it records."""
    prompts = tmp_path_factory.mktemp("prompts")
    (prompts / "ordinary.txt").write_text("\n".join(ORDINARY))
    (prompts / "concept.txt").write_text("a red square on a beach\na red square in a wood\n")
    (prompts / "paper.jsonl").write_text("\n".join(map(json.dumps, LINES)))
    contexts = tmp_path_factory.mktemp("contexts")

    def run(command, output_dir, **changes):
        flags = {"pretrained_model_name_or_path": base, "instance_data_dir": images, "output_dir": output_dir, "resolution": 32,
                 "num_inference_steps": 2, "mixed_precision": "no", "context_cache_dir": contexts, "drawing_batch_size": 8,
                 "image_encoder": encoders / "image", "image_text_encoder": encoders / "text"}  # fmt: skip
        flags |= {"teacher": {"vlm_model_name_or_path": vlm, "noise_seeds": 2, "num_captions": 2, "concept_prompts": prompts / "concept.txt"},
                  "report": {"ordinary_prompts": prompts / "ordinary.txt", "num_captions": 2, "concept_prompts": prompts / "concept.txt"},
                  "paper": {"paper_prompts": prompts / "paper.jsonl", "judge": "none"}}[command]  # fmt: skip
        words = [
            word
            for n, v in {**flags, **changes}.items()
            if v is not None
            for word in (f"--{n}", *(v if isinstance(v, list) else [v]))
        ]
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        return instruments.main(instruments.parse_args([command, *map(str, words)]))

    return run


@pytest.fixture(scope="session", autouse=True)
def few_steps():
    patch = pytest.MonkeyPatch()
    patch.setattr(instruments, "MANY_STEPS", 3)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def reported(train, evaluate, tmp_path_factory):
    """A run with its report."""
    folder = train(tmp_path_factory.mktemp("reported") / "out")
    return SimpleNamespace(folder=folder, record=evaluate("report", folder))


def drawn_by(monkeypatch):
    """Counts the pictures that are drawn from here on."""
    count, sample = [], DOPSDMixin.sample

    def counting(self, transformer, contexts, latents, steps):
        count.append(len(contexts))
        return sample(self, transformer, contexts, latents, steps)

    monkeypatch.setattr(DOPSDMixin, "sample", counting)
    return count


def test_teacher_compares_every_way_of_showing_the_picture(evaluate, tmp_path, monkeypatch, capsys):
    """A user would train with a worse teacher than they have, or with one that draws nothing. Pictures of one layer
    must not stand for another, and the layer that is trained must be among them."""
    changes = {"teacher_max_pixels": [32 * 32, 16 * 16], "hidden_layer": [-1], "teacher_image": ["target"]}
    count = drawn_by(monkeypatch)
    record = evaluate("teacher", tmp_path, **changes)
    assert sum(count) == (1 + 2 * 2) * 4 * 2  # student and ways, for each of the prompts and noises
    assert len(record["ways"]) == 2 * 2 and "vlm, target, 256 pixels, layer -1" in record["ways"]
    printed = capsys.readouterr().out
    assert record["verdict"] in printed and all(f"| {name} |" in printed for name in record["ways"])
    way = record["ways"]["vlm, target, 1024 pixels"]
    assert (
        way["flags"] == "--teacher_context vlm --teacher_image target --teacher_max_pixels 1024" and way["trainable"]
    )
    assert not record["ways"]["vlm, target, 1024 pixels, layer -1"]["trainable"]
    assert all(
        np.isfinite(list(t.values())).all() and t["image"] > 1 and t["text"] > 1
        for f in record["ways"].values()
        for t in f["tokens"]
    )
    assert record["ways"]["vlm, target, 1024 pixels, layer -1"]["tokens"] != way["tokens"]
    assert Image.open(tmp_path / "teacher.png").width > 128 * 6


def test_copy_of_what_each_teacher_was_shown_counts_no_more(evaluate, tmp_path, monkeypatch):
    """The way that shows the next image would win with teachers that copy it."""
    seen = []
    near = instruments.near
    monkeypatch.setattr(instruments, "near", lambda *given: (seen.append(given[3]), near(*given))[1])
    evaluate("teacher", tmp_path, num_captions=3, noise_seeds=2, num_inference_steps=1)
    # of 4 images, those of rows 0, 1 or 2, and 3 are looked at; two new prompts are shown those of the first two rows
    rows = np.linspace(0, 3, 3).round().astype(int).tolist()
    target = [0, 1, 2, 0, 1]
    following = [rows.index(row) if (row := (rows[place] + 1) % 4) in rows else None for place in target]
    assert seen[0] == [{place} for place in target] and None in following
    # a picture of a caption is near the image of that caption, whatever was shown
    assert seen[1] == [{own, shown} if i < 3 else {shown} for i, (own, shown) in enumerate(zip(target, following))]


@pytest.mark.families("klein", "krea")
def test_teachers_of_every_family_are_looked_at(evaluate, family, tmp_path):
    """A user of another family would meet a traceback, or no word on one of its teachers."""
    record = evaluate("teacher", tmp_path, teacher_image=["target"], num_inference_steps=1, resolution=64)
    assert list(record["ways"]) == [f"{context}, target" for context in family.pipeline.teacher_contexts]
    tokens = record["ways"]["vlm, target"]["tokens"]
    assert len(tokens) > 1 and all(
        np.isfinite([t["image"], t["text"]]).all() and isinstance(t["layer"], int) for t in tokens
    )


def test_contexts_of_the_check_are_those_of_the_training(evaluate, train, tmp_path, monkeypatch):
    """Both encoders of gigabytes would load a second time."""
    data, out = single(tmp_path / "data"), tmp_path / "out"
    evaluate("teacher", out, num_captions=None, context_cache_dir=None, instance_data_dir=data)
    monkeypatch.setattr(script, "encode_missing", lambda *_: pytest.fail("encoded anew"))
    train(out, instance_data_dir=data, context_cache_dir=None, max_train_steps=1)


def single(folder):
    folder.mkdir()
    Image.new("RGB", (32, 32), "red").save(folder / "a.png")
    (folder / "a.txt").write_text("a red square\n")
    return folder


def test_nothing_is_drawn_twice(reported, evaluate, monkeypatch):
    """Hours of drawing would be lost with every further look; and another LoRA must not be shown with the pictures of
    the last one."""
    count = drawn_by(monkeypatch)
    again = evaluate("report", reported.folder)
    assert not count and again["figures"] == reported.record["figures"]
    left = sorted((reported.folder / "evaluation").iterdir())
    left[0].unlink()
    left[1].write_bytes(left[1].read_bytes()[:100])  # a damaged one is no picture, and no fault of the encoder
    evaluate("report", reported.folder)
    assert sum(count) == 2
    kept = (reported.folder / LORA).read_bytes()
    save_file({name: tensor + 1 for name, tensor in load_file(reported.folder / LORA).items()}, reported.folder / LORA)
    other = evaluate("report", reported.folder)
    (reported.folder / LORA).write_bytes(kept)
    assert (
        sum(count) == 2 + 4 * 4 + 4 * 2 + 3 * 4
        and other["figures"]["drift"][0] > reported.record["figures"]["drift"][0]
    )


def test_an_untrained_lora_has_changed_nothing(evaluate, train, tmp_path, capsys):
    """A report that finds changes where there are none would be believed where there are some."""
    folder = train(tmp_path, learning_rate=1e-30, max_train_steps=1)
    record = evaluate("report", folder)
    record["figures"].pop("learned")  # random features
    expected = {
        "way": 0,
        "drift": 0,
        "leak": 0,
        "detail": 1,
        "gap": 1,
        "gap_detail": 1,
        "ordinary_follows": 1,
        "concept_follows": 0,
    }
    assert {name: round(figure[0], 3) for name, figure in record["figures"].items()} == pytest.approx(expected)
    assert [row["answer"].split()[0] for row in record["table"]] == ["no", "yes", "yes"]
    assert "| Other prompts kept | yes |" in capsys.readouterr().out


class Page(html.parser.HTMLParser):
    """Sources, text and open tags of a page."""

    def __init__(self, text):
        super().__init__()
        self.sources, self.open, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_report_is_one_file_that_needs_no_network(reported):
    """Sent to somebody, it would show empty frames, or ask a server for them."""
    page = Page((reported.folder / "report.html").read_text("utf-8"))
    assert (
        not page.open and all(source.startswith("data:image/") for source in page.sources) and "url(" not in page.text
    )
    pictures = [Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) for source in page.sources]
    assert len(pictures) == 2 + 4 * 4 + 3 * 2 and {picture.size for picture in pictures} == {(32, 32)}
    assert page.text.index("Concept learned") < page.text.index("Trained on") < page.text.index("two cups")
    assert all(f"{name}" in page.text for name in reported.record["figures"])


def test_report_is_in_the_card_of_these_weights_alone(train, evaluate, tmp_path):
    """A stranger would read the figures of another LoRA, or none."""
    folder = train(tmp_path)
    card = lambda: (folder / "README.md").read_text("utf-8")  # noqa: E731
    before = card()
    for _ in range(2):
        evaluate("report", folder)
        assert card().count("| Few-step ability kept |") == 1 and "was not measured" not in card()
    assert card().partition("## Measured")[0] == before.partition("## Measured")[0]
    (folder / "README.md").write_text(card() + "\n## Mine\n\nkept\n", "utf-8")
    evaluate("report", folder)
    assert card().endswith("|\n\n## Mine\n\nkept\n") and card().count("| Few-step ability kept |") == 1
    train(folder, resume_from_checkpoint="latest", max_train_steps=3)
    assert "was not measured" in card() and "Few-step ability kept" not in card()


def test_flags_of_the_training_are_the_defaults(reported, encoders):
    """Pictures at another size or number of steps than the LoRA was trained for."""
    words = [
        "report",
        "--output_dir",
        reported.folder,
        "--instance_data_dir",
        "pictures",
        "--pretrained_model_name_or_path",
        "model",
        "--image_encoder",
        encoders / "image",
    ]
    args = instruments.parse_args(list(map(str, words)))
    assert (args.resolution, args.mixed_precision, args.instance_data_dir) == (32, "no", "pictures")
    assert args.context_cache_dir == str(reported.folder / "contexts")


def test_broken_images_are_left_out_as_in_the_training(reported, tmp_path):
    """A set that was trained with --skip_broken_images could not be looked at."""
    settings = json.loads((reported.folder / script.SETTINGS_NAME).read_text()) | {
        "skip_broken_images": True,
        "dataset_num_workers": 2,
    }
    (tmp_path / script.SETTINGS_NAME).write_text(json.dumps(settings))
    paths = ["--pretrained_model_name_or_path", "x", "--instance_data_dir", "x"]
    args = instruments.parse_args(["report", "--output_dir", str(tmp_path), *paths])
    assert (args.skip_broken_images, args.dataset_num_workers) == (True, 2)


@pytest.mark.parametrize("given", ["--instance_data_dir=x", "--pretrained_model_name_or_path=x"])
def test_path_that_the_settings_shortened_is_asked_for(reported, given, capsys):
    """A user would read that `.../model` is no folder, and not which flag to give."""
    paths = {"--instance_data_dir=x", "--pretrained_model_name_or_path=x"}
    with pytest.raises(SystemExit):
        instruments.parse_args(["report", "--output_dir", str(reported.folder), given])
    missing = (paths - {given}).pop().split("=")[0]
    assert f"was shortened; give {missing}\n" in capsys.readouterr().err
    args = instruments.parse_args(["report", "--output_dir", str(reported.folder), *sorted(paths)])
    assert (args.pretrained_model_name_or_path, args.instance_data_dir, args.resolution) == ("x", "x", 32)


def test_relative_path_of_the_settings_is_asked_for(reported, tmp_path, monkeypatch, capsys):
    """From another folder a user would read of a flag that was never typed."""
    settings = json.loads((reported.folder / "dopsd_settings.json").read_text())
    settings |= {"instance_data_dir": "my_images", "pretrained_model_name_or_path": "you/model"}
    (tmp_path / "dopsd_settings.json").write_text(json.dumps(settings))
    with pytest.raises(SystemExit):
        instruments.parse_args(["report", "--output_dir", str(tmp_path)])
    assert (
        "names my_images, which is not here" in (error := capsys.readouterr().err) and "--instance_data_dir" in error
    )


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    """A page of traceback does not say that the pictures are kept."""
    monkeypatch.setattr(script, "run", unittest.mock.Mock(side_effect=KeyboardInterrupt))
    words = ["--output_dir", ".", "--pretrained_model_name_or_path", "x", "--instance_data_dir", "y"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "report", *words, "--image_encoder", "z"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "examples" / "evaluate.py"), run_name="__main__")
    assert caught.value.code == 130
    assert capsys.readouterr().err.strip().startswith("Stopped. Pictures drawn so far are kept")


def test_folder_without_settings_is_named(tmp_path, capsys):
    """A misspelt folder would be answered with the name of a flag that the README says is not needed."""
    with pytest.raises(SystemExit):
        instruments.parse_args(["report", "--output_dir", str(tmp_path)])
    assert f"--output_dir {tmp_path} holds no dopsd_settings.json" in capsys.readouterr().err


def test_full_model_is_reported(train_full, evaluate, tmp_path):
    """Who trains all weights would be told that there is no result."""
    record = evaluate("report", train_full(tmp_path, max_train_steps=1))
    assert record["figures"]["drift"][0] > 0


@pytest.mark.parametrize(("command", "change", "words"), [
    ("teacher", {"image_encoder": "nobody/none"}, "--image_encoder nobody/none"),
    ("teacher", {"teacher_context": ["edit"]}, "--teacher_context edit"),
    ("teacher", {"concept_prompts": "missing.txt"}, "--concept_prompts missing.txt"),
    ("report", {"concept_prompts": "missing.txt"}, "--concept_prompts missing.txt"),
    ("paper", {"paper_prompts": "missing.jsonl"}, "--paper_prompts missing.jsonl"),
    ("report", {"instance_data_dir": "missing"}, "--instance_data_dir missing"),
    ("paper", {"judge": "nobody/none"}, "--judge nobody/none"),
    ("teacher", {"hidden_layer": [60]}, "--hidden_layer 60: this VLM has 3 layers; give -4 to 3."),
])  # fmt: skip
def test_mistakes_end_in_one_line_before_weights_load(command, change, words, reported, evaluate, monkeypatch):
    """A traceback, or an error after an hour of drawing."""
    monkeypatch.setattr(script, "encode_contexts", lambda *_: pytest.fail("weights load"))
    with pytest.raises(script.InputError) as error:
        evaluate(command, reported.folder, **change)
    assert words in str(error.value)


@pytest.mark.families()
def test_lora_of_another_base_is_refused_before_weights_load(train, evaluate, tmp_path, monkeypatch):
    """All pictures of the base would be drawn first."""
    trained = train(tmp_path / "trained", max_train_steps=1, resolution=64)
    monkeypatch.setattr(script, "encode_contexts", lambda *_: pytest.fail("weights load"))
    weights = load_file(trained / LORA)
    name = list(weights)[-1]
    weights[name] = weights[name].new_zeros(weights[name].shape[0] + 1, weights[name].shape[1] + 1)
    (tmp_path / "out").mkdir()
    save_file(weights, tmp_path / "out" / LORA)
    with pytest.raises(script.InputError, match=f"does not fit .* whose {name} is"):
        evaluate("report", tmp_path / "out", resolution=64)
    with pytest.raises(pytest.fail.Exception, match="weights load"):
        evaluate("report", trained, resolution=64)


def test_mistake_of_flags_is_one_line(tmp_path):
    """As in the training scripts: no traceback."""
    words = [
        "report",
        "--output_dir",
        tmp_path,
        "--instance_data_dir",
        tmp_path,
        "--pretrained_model_name_or_path",
        "x",
        "--mixed_precision",
        "no",
    ]
    with pytest.raises(SystemExit, match=f"^error: --output_dir {tmp_path} holds no result"):
        script.run(instruments.main, instruments.parse_args(list(map(str, words))))


def test_memory_of_an_encoder_is_free_when_the_next_one_loads(encoders):
    """Two encoders and the judge at once do not fit the card that the training needed."""
    args = SimpleNamespace(image_encoder=str(encoders / "image"), encoding_batch_size=1, output_dir="out")
    with instruments.encoder("image_encoder", args, SimpleNamespace(device=torch.device("cpu"))) as look:
        pass
    assert not hasattr(look, "model")


@pytest.mark.families("klein")
def test_reference_that_the_model_does_not_take_is_named(evaluate, tmp_path):
    """The training says so in one line; here it would come as a traceback after the encoders have loaded."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, side in (("target", 64), ("reference", 50)):
        Image.new("RGB", (side, side)).save(folder / f"{name}.png")
    row = {"file_name": "target.png", "reference_file_name": "reference.png", "text": "a square"}
    (folder / "metadata.jsonl").write_text(json.dumps(row))
    with pytest.raises(script.InputError, match="Image too small"):
        evaluate("teacher", tmp_path / "out", instance_data_dir=folder, resolution=64, reference_column="reference")


def test_models_of_the_hub_are_found_without_torchvision(reported, encoders, base, images, tmp_path):
    """Models by name are what a user has; a processor that asks for torchvision ends the run, and nobody else may be
    asked."""
    out = shutil.copytree(reported.folder, tmp_path / "out", ignore=shutil.ignore_patterns("evaluation"))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(map(json.dumps, LINES)))
    with HubStandIn({}) as hub:
        for name, folder in (("base", base), ("image", encoders / "image"), ("text", encoders / "text")):
            hub.upload(f"me/{name}", folder)
        command = [
            sys.executable,
            ROOT / "examples" / "evaluate.py",
            "paper",
            "--output_dir",
            out,
            "--instance_data_dir",
            images,
            "--judge",
            "none",
        ]
        command += [
            "--pretrained_model_name_or_path",
            "me/base",
            "--image_encoder",
            "me/image",
            "--image_text_encoder",
            "me/text",
        ]
        environment = guarded_environment(tmp_path, hub.url)
        result = subprocess.run(
            [*command, "--paper_prompts", prompts], env=environment, cwd=tmp_path, capture_output=True, text=True
        )
    assert result.returncode == 0, result.stderr[-2000:]
    assert (
        len(list((out / "evaluation").glob("*.png"))) == 9
        and len(json.loads((out / "paper.json").read_text())["figures"]["DINO-D"]) == 4
    )
    assert "torchvision" not in sys.modules and (tmp_path / "network.log").read_text() == ""


def test_pictures_are_pooled_by_every_kind_of_encoder(encoders, tmp_path):
    """Features of another shape or unnormalised ones give distances that mean nothing."""
    ConvNextModel(ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], depths=[1, 1])).save_pretrained(tmp_path)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    pictures = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    for name, width in ((tmp_path, 16), (encoders / "image", 32), (encoders / "text", 32)):
        loaded = instruments.Encoder(str(name), torch.device("cpu"), 1)
        for patches in (False, True):
            if not (patches and loaded.tokenizer):
                features = loaded.images(pictures, patches)
                assert features.shape == (2, width) and np.allclose((features**2).sum(1), 1)
    texts = loaded.texts(["A red Square", "a red square", "a house"])
    assert np.allclose(texts[0], texts[1]) and not np.allclose(texts[0], texts[2])


def test_share_of_the_way_is_one_at_pictures_of_the_concept():
    """A verdict on a scale that is not what its words say; chance in four images would make every teacher look worse
    than it is."""
    rng = np.random.default_rng(0)
    before, concept = rng.normal(size=(3, 2, 50)), np.eye(50)[0]

    def share(after, spread, count=4):
        return instruments.share_of_way(before, after, concept + spread * rng.normal(size=(count, 50)))

    assert (
        np.allclose(share(before, 0), 0)
        and np.allclose(share(before + concept, 0), 1)
        and np.allclose(share(before - concept / 2, 0), -0.5)
    )
    assert np.allclose(share(before + np.eye(50)[1], 0), 0) and np.allclose(share(before + concept, 0, count=1), 1)
    assert abs(np.mean([share(before + concept, 0.1) for _ in range(300)]) - 1) < 0.1


def test_pictures_of_the_concept_are_near_and_a_copy_counts_no_more():
    """A teacher that copies the picture that it is shown would seem better than one that draws the concept anew."""
    rng = np.random.default_rng(0)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    concept = np.eye(40)[0] * 2
    images = unit(concept + rng.normal(size=(4, 40)) / 3)
    fresh = unit(concept + rng.normal(size=(8, 200, 40)) / 3)
    base = unit(rng.normal(size=(8, 200, 40)))
    assert (
        0.5 < instruments.near(base, fresh, images).mean()
        and instruments.near(base, unit(rng.normal(size=base.shape)), images).mean() < 0.01
    )
    copies = np.repeat(images[np.arange(8) % 4][:, None], 200, axis=1)
    assert np.isclose(instruments.membership(copies, images).mean(), 0.75)
    # of the next image, which is compared with the other two; with none left out, it is near itself
    following = np.roll(images, -1, axis=0)[:, None]
    left_out = [{i, (i + 1) % 4} for i in range(4)]
    similarity = images @ images.T
    limit = np.quantile((similarity.sum(axis=1) - 1) / 3, 0.25)
    expected = [(similarity[(i + 1) % 4].sum() - 1 - similarity[i, (i + 1) % 4]) / 2 >= limit for i in range(4)]
    assert instruments.membership(following, images, left_out)[:, 0].tolist() == expected
    assert instruments.membership(following, images, [set()] * 4).all()
    assert instruments.membership(base[:1], images, [{0, 1, 2, 3}]).all()
    assert (
        instruments.near(base, base, images[:1]).mean() == 0
        and instruments.near(base[:1], images[:1, None], images[:1]).mean() == 1
    )


def test_scattered_images_are_no_invitation():
    """The images of a style have so little in common that the base's own pictures are as near to them: nothing is
    learned by that."""
    rng = np.random.default_rng(0)
    images, base = rng.normal(size=(4, 40)) + np.eye(40)[0], rng.normal(size=(8, 4, 40))
    assert instruments.near(base, base, images).mean() == 0


def test_interval_narrows_with_prompts_and_holds_its_value():
    """Four prompts would look as sure as forty."""
    rng = np.random.default_rng(0)
    few, many = (instruments.interval(np.mean, rng.normal(size=(n, 4))) for n in (4, 400))
    assert all(low <= value <= high for value, low, high in (few, many)) and many[2] - many[1] < 0.3 * (
        few[2] - few[1]
    )


@pytest.mark.parametrize(("prompts", "student"), [(10, 2.262), (52, 2.008)])
def test_interval_is_as_wide_as_that_of_the_mean_over_prompts(prompts, student):
    """Two LoRAs that differ would pass as alike, or chance as a difference."""
    rng, widths = np.random.default_rng(0), []
    for _ in range(40):
        _, low, high = instruments.interval(np.mean, rng.normal(size=(prompts, 4)), draws=500)
        widths.append(high - low)
    # of the mean of four noises, with Student's t
    assert 0.9 < np.mean(widths) / (2 * student * (0.25 / prompts) ** 0.5) < 1.1


def test_interval_of_one_prompt_is_over_its_noises():
    """A single caption would end in a division by zero, or look sure."""
    value, low, high = instruments.interval(np.mean, np.array([[0.0, 1.0, 0.0, 1.0]]))
    assert (value, low, high) == (0.5, 0, 1)


def test_prompt_that_is_not_followed_is_not_told_apart():
    """A teacher that copies its picture whatever it is asked for would pass."""
    texts = np.eye(3)
    obeying, copying = np.repeat(texts[:, None], 2, axis=1), np.tile(texts[0], (3, 2, 1))
    assert np.allclose(instruments.told_apart(obeying, texts), 1)
    assert np.isclose(instruments.told_apart(copying, texts).mean(), 0)


@pytest.mark.parametrize(("shares", "student", "words"), [
    ([0.8, 0.6], 0.0, "Worth training with --a:"), ([0.4, 0.1], 0.0, "Doubtful"), ([0.2, 0.1], 0.0, "No teacher can draw this"),
    ([0.1, 0.9], 0.0, "Another layer of the VLM shows more (b)"), ([0.8, 0.6], 0.7, "The base draws this untrained"),
])  # fmt: skip
def test_verdict_on_teachers(shares, student, words):
    """Hours of training with a teacher that cannot draw the concept, or with flags that the training does not have."""
    ways = {
        name: {
            "near": [share, share - 0.05, share + 0.05],
            "near_each": [[share] * 4] * 8,
            "flags": f"--{name}",
            "trainable": name == "a",
            "tokens": [],
        }
        for name, share in zip("ab", shares)
    }
    best, verdict = instruments.teacher_verdict(ways, {"near": student, "lacks": 0.1})
    assert words in verdict and best == "a" and "Outlying" not in verdict
    ways["b"]["tokens"] = [{"layer": -2, "image": 60.0, "text": 3.0}]
    assert (
        "Outlying dimensions in the image tokens (b)"
        in instruments.teacher_verdict(ways, {"near": student, "lacks": 0.1})[1]
    )


def test_ways_are_compared_prompt_by_prompt():
    """A teacher that is better on every prompt would be called as good as the default one, since prompts differ more
    than teachers do."""
    figures = lambda each: {"near": instruments.interval(np.mean, each), "near_each": each.tolist(), "tokens": []}  # noqa: E731
    default = np.tile(np.linspace(0, 0.8, 10)[:, None], 4)
    flags = {"flags": "", "trainable": True}
    student = {"near": 0, "lacks": 1}
    for better, unsure in ((default + 0.15, False), (np.roll(default, 5, axis=0) + 0.05, True)):
        ways = {"a": figures(default) | flags, "b": figures(better) | flags}
        assert ways["b"]["near"][1] < ways["a"]["near"][2]
        assert ("within the noise" in instruments.teacher_verdict(ways, student)[1]) == unsure
        ways["b"]["trainable"] = False
        assert ("Another layer" in instruments.teacher_verdict(ways, student)[1]) == (not unsure)


@pytest.mark.parametrize(("answer", "level"), [
    ("SAME", 4), ("Same.", 4), ("**Close**", 3), ("The answer is: RELATED", 2), ("different", 1), ("Answer: DIFFERENT.", 1), ("SAME\n\nBoth show it.", 4),
    ("not the same", None), ("Not SAME", None), ("The same? No, different.", None), ("SAME or CLOSE", None), ("It isn't the same", None), ("SAME is not it", None),
    ("", None), ("I cannot tell", None), ("samey", None), ("different, not the same", None),
])  # fmt: skip
def test_judges_answers_are_read_with_care(answer, level):
    """ "Not the same" counted as the same turns the worst model into the best."""
    assert instruments.level_of(answer) == level


def test_paper_counts_what_the_judge_did_not_answer(reported, evaluate, vlm, capsys):
    """Rows that are dropped in silence leave the easy ones."""
    record = evaluate("paper", reported.folder, judge=vlm)
    assert len(record["figures"]["DINO-D"]) == 4 and len(record["figures"]["CLIP-S"]) == 4 + 5
    assert record["unclear_answers"] + len(record["figures"]["VLM-J"]) == 5
    assert "answers of the judge are none of its four words" in capsys.readouterr().out


def test_judge_that_fails_loses_nothing(reported, evaluate, vlm, tmp_path, monkeypatch, capsys):
    """Hours of drawing and judging would be lost with a judge that does not fit into memory."""
    folder = shutil.copytree(reported.folder, tmp_path / "out", ignore=shutil.ignore_patterns("answers.json"))
    answer, asked = instruments.Judge.answer, []

    def third_fails(self, *pictures):
        asked.append(pictures)
        if len(asked) == 3:
            raise RuntimeError("shapes\ndo not fit")
        return answer(self, *pictures)

    monkeypatch.setattr(instruments.Judge, "answer", third_fails)
    with pytest.raises(script.InputError, match=f"--judge {vlm}: RuntimeError: shapes do not fit"):
        evaluate("paper", folder, judge=vlm)
    assert list(json.loads((folder / "paper.json").read_text())["figures"]) == ["DINO-D", "CLIP-S"]
    record = evaluate("paper", folder, judge=vlm)
    # of five questions, the two that were answered are not asked again
    assert len(asked) == 3 + 3 and record["unclear_answers"] + len(record["figures"]["VLM-J"]) == 5
    assert evaluate("paper", folder, judge=vlm) == record and len(asked) == 6
    assert "LPIPS-D is left out (ModuleNotFoundError" in capsys.readouterr().out or "LPIPS-D" in record["figures"]
    evaluate("paper", folder, judge=vlm, mixed_precision="bf16")
    assert len(asked) == 6 + 5
    (folder / "evaluation" / "answers.json").write_text("[")
    with pytest.raises(script.InputError, match="answers.json"):
        evaluate("paper", folder, judge=vlm)


def test_encoder_that_fails_ends_in_one_line(reported, evaluate, encoders, monkeypatch):
    """A traceback after all pictures are drawn, and what was measured lost."""
    folder, words = reported.folder, f"--image_text_encoder {encoders / 'text'}: RuntimeError: no kernel"
    (folder / "paper.json").unlink(missing_ok=True)
    monkeypatch.setattr(instruments.Encoder, "texts", lambda *_: (_ for _ in ()).throw(RuntimeError("no kernel")))
    with pytest.raises(script.InputError, match=words):
        evaluate("paper", folder)
    assert list(json.loads((folder / "paper.json").read_text())["figures"]) == ["DINO-D"]
    monkeypatch.setattr(
        instruments.Encoder, "images", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("out"))
    )
    with pytest.raises(script.InputError, match="Cheapest remedies: a lower --encoding_batch_size"):
        evaluate("report", folder)


def test_judge_is_held_as_the_flags_say(vlm):
    """8 B weights in fp32 fit no card, and what is asked to be quantised would not be."""
    args = SimpleNamespace(judge=str(vlm), mixed_precision="bf16", encoder_quantization="int8")
    parts = instruments.Judge(args, torch.device("cpu")).model.named_modules()
    layers = [part for name, part in parts if isinstance(part, torch.nn.Linear) and "language_model" in name]
    assert layers and not any(type(layer.weight.data) is torch.Tensor for layer in layers)
    args.mixed_precision, args.encoder_quantization = "no", None
    assert instruments.judge_dtype(args, torch.device("cuda")) == torch.bfloat16
    assert instruments.judge_dtype(args, torch.device("cpu")) == torch.float32


def test_built_in_prompts_are_not_those_of_a_training():
    """What was practised would be measured."""
    assert len(set(instruments.ORDINARY)) >= 50 and not set(instruments.ORDINARY) & set(PRIOR_PROMPTS)


def test_help_and_its_absence_say_what_to_give(capsys):
    """Half a sentence, a word that is no flag, or a flag that is not needed would be all that a stranger reads."""
    for words in ([], ["--help"], ["report", "--help"]):
        with pytest.raises(SystemExit):
            instruments.parse_args(words)
    printed = capsys.readouterr()
    assert printed.err == "error: give teacher, report or paper\n"
    text = " ".join(printed.out.split())
    assert "and repeats the paper's protocol." in text and "Not needed where OUTPUT_DIR holds the settings" in text
    assert "checkpointing" not in text


def test_advice_on_drift_is_what_was_measured(tmp_path, evaluate, reported, monkeypatch, capsys):
    """An earlier checkpoint or a lower rate leaves a style half learned, which spreads it."""
    monkeypatch.setattr(instruments, "DRIFT", -1)
    evaluate("report", reported.folder)
    advice = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Other prompts kept: no"))
    assert "--prior_prompts FILE" in advice and "more steps" in advice
    assert "earlier checkpoint" not in advice and "lower" not in advice


def test_documented_commands_have_real_flags():
    """A stranger pastes them."""
    commands = re.findall(r"evaluate\.py (\w+) (.*)", instruments.__doc__.replace("\\\n", " "))
    for command, words in commands:
        args = instruments.parse_args(
            [command, "--pretrained_model_name_or_path", "x", *re.findall(r'"[^"]+"|\S+', words)]
        )
        assert args.command == command
    assert len(commands) == 3


@pytest.mark.parametrize("name", MAIN)
def test_miniatures_encoder_sees_what_makes_up_a_concept(name):
    """Its verdicts, and their calibration, would be those of a blind man."""
    concept = CONCEPTS[name]
    look = instruments.Encoder(str(MINIATURE / "encoders" / "image"), torch.device("cpu"), 64)
    rng = np.random.default_rng(0)
    any_of = {"shape": world.SHAPES, "colour": list(world.COLOURS), "pattern": world.PATTERNS}

    def plain(scenes):
        return [
            dataclasses.replace(
                s, style="plain", **({n: rng.choice(v) for n, v in any_of.items()} if concept.shape else {})
            )
            for s in scenes
        ]

    def draw(scenes, seed=0):
        return look.images([Image.fromarray(world.render(scene, 900 + seed + i)) for i, scene in enumerate(scenes)])

    training, scenes = training_scenes(concept), held_out_scenes(concept)
    differences = look.images(training_pictures(concept)) - np.mean(
        [draw(plain(training), 100 * k) for k in range(4)], axis=0
    )
    before = draw(plain(scenes))
    assert 0.8 < instruments.share_of_way(before, draw(scenes), differences).mean() < 1.3
    assert abs(instruments.share_of_way(before, draw(plain(scenes), 50), differences).mean()) < 0.2


def test_miniatures_encoders_are_small():
    """Cloning the repository would take long."""
    assert sum(p.stat().st_size for p in (MINIATURE / "encoders").rglob("*.safetensors")) < 1.5e6
