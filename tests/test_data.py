"""Images, captions, buckets and the cache of contexts."""

import gc
import hashlib
import io
import json
import os
import shutil
import tarfile
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
from accelerate import PartialState
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import load_file, save_file

import train_dopsd_lora as script
from conftest import draw, patch_velocity, save_images
from families import CAPTIONS
from pipeline_dopsd import DOPSDZImagePipeline
from train_dopsd_lora import load_image, read_dataset


@pytest.fixture
def read(flags, tmp_path):
    """Captions by image name of a command line."""

    def run(**changes):
        dataset = read_dataset(script.parse_args(flags(tmp_path / "out", **changes)))
        assert set(dataset.column_names) == {"image", "captions"}
        return [row["captions"] for row in dataset]

    return run


def test_captions_in_text_files(read, images, tmp_path):
    """One caption per line; blank lines are no captions."""
    folder = shutil.copytree(images, tmp_path / "images")
    (folder / "b.txt").write_text("\n  a blue disc \n\n")
    assert read(instance_data_dir=folder) == list(CAPTIONS.values())


def test_instance_prompt_is_the_caption_of_images_without_one(read, tmp_path):
    """A folder of bare images trains on --instance_prompt, and captions beside some of them still count."""
    folder = save_images(tmp_path / "images")
    (folder / "b.txt").unlink()
    (folder / "d.txt").unlink()
    captions = read(instance_data_dir=folder, instance_prompt="a photo of sks")
    assert captions == [CAPTIONS["a"], ["a photo of sks"], CAPTIONS["c"], ["a photo of sks"]]


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_captions_in_metadata(read, tmp_path, form):
    """The imagefolder format of `datasets`, so that a folder made for other trainers works as it is."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name in "ab":
        draw("ellipse", "blue").save(folder / f"{name}.png")
    rows = [("a.png", "first, with comma"), ("b.png", "second")]
    if form == "jsonl":
        text = "\n".join(json.dumps({"file_name": n, "text": c}) for n, c in rows)
    else:
        text = "file_name,text\n" + "\n".join(f'{n},"{c}"' for n, c in rows)
    (folder / f"metadata.{form}").write_text(text)
    assert sorted(read(instance_data_dir=folder)) == [["first, with comma"], ["second"]]


def test_column_named_image_beside_file_name(read, tmp_path):
    """Metadata of other programs has a column `image` with a name or a URL; the file is that of file_name."""
    draw("ellipse", "blue").save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"image": "IMG_1", "file_name": "a.png", "text": "one"}))
    assert read(instance_data_dir=tmp_path) == [["one"]]


def test_lists_of_captions_in_metadata(read, tmp_path):
    """Several captions per image are also possible in metadata.jsonl, in a column of any name."""
    folder = tmp_path / "images"
    folder.mkdir()
    draw("ellipse", "blue").save(folder / "a.png")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "says": ["one", "two"]}))
    assert read(instance_data_dir=folder, caption_column="says") == [["one", "two"]]
    with pytest.raises(ValueError, match="--caption_column 'text'"):
        read(instance_data_dir=folder)
    assert read(instance_data_dir=folder, instance_prompt="a thing") == [["a thing"]]


def test_dataset_with_columns_of_other_names(read, tmp_path, images):
    """--dataset_name takes a dataset as it is, without renaming its columns."""
    features = Features({"picture": ImageFeature(), "label": Value("string"), "number": Value("int64")})
    rows = {"picture": [str(images / "a.png"), str(images / "b.png")], "label": ["one", "two"], "number": [1, 2]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / "train.parquet")
    columns = {"image_column": "picture", "caption_column": "label"}
    assert read(instance_data_dir=None, dataset_name=tmp_path / "data", **columns) == [["one"], ["two"]]
    with pytest.raises(ValueError, match="--image_column 'image'"):
        read(instance_data_dir=None, dataset_name=tmp_path / "data", caption_column="label")


def test_shards_of_webdataset(read, images, tmp_path):
    """Sets of more images than the memory holds come in such files; they are to be taken as they are."""
    (tmp_path / "data").mkdir()
    for shard, names in enumerate(("ab", "cd")):
        with tarfile.open(tmp_path / "data" / f"train-{shard:04}.tar", "w") as tar:
            for name in names:
                for suffix in ("png", "txt"):
                    tar.add(images / f"{name}.{suffix}", f"{name}.{suffix}")
    columns = {
        "instance_data_dir": None,
        "dataset_name": tmp_path / "data",
        "image_column": "png",
        "caption_column": "txt",
    }
    assert [captions[0].strip() for captions in read(**columns)] == [
        "\n".join(captions) for captions in CAPTIONS.values()
    ]
    with pytest.raises(ValueError, match="--image_column 'image' is none of the columns .*png"):
        read(**{**columns, "image_column": "image"})


def test_captions_in_text_files_of_capitals(read, images, tmp_path):
    """Files of a camera or of Windows end in .TXT; without them, --instance_prompt would be trained on in silence."""
    folder = shutil.copytree(images, tmp_path / "images")
    (folder / "b.txt").rename(folder / "b.TXT")
    assert read(instance_data_dir=folder, instance_prompt="another") == list(CAPTIONS.values())


@pytest.mark.parametrize(
    "names", [("my-test-shot.png", "dev_board.png"), ("train.png", "test.png"), ("validation-1.png", "a.png")]
)
def test_names_of_images_mean_nothing(read, tmp_path, names):
    """datasets takes a file with `test` or `dev` in its name for another split, which is not trained on."""
    for name in names:
        draw("ellipse", "blue").save(tmp_path / name)
    assert len(read(instance_data_dir=tmp_path, instance_prompt="x")) == 2
    (tmp_path / "metadata.jsonl").write_text(
        "\n".join(json.dumps({"file_name": name, "text": name}) for name in names)
    )
    assert (
        read(instance_data_dir=tmp_path)
        == read(instance_data_dir=None, dataset_name=tmp_path)
        == [[name] for name in names]
    )


def test_dataset_of_images_alone(read, images, tmp_path):
    """With --instance_prompt a dataset needs no further column."""
    pictures = {"image": [str(images / "a.png"), str(images / "b.png")]}
    Dataset.from_dict(pictures, features=Features({"image": ImageFeature()})).to_parquet(
        tmp_path / "data" / "train.parquet"
    )
    assert read(instance_data_dir=None, dataset_name=tmp_path / "data", instance_prompt="a thing") == [["a thing"]] * 2


@pytest.mark.parametrize("form", ["texts", "metadata", "one caption"])
def test_what_is_used_and_what_is_left_out_is_said(train, tmp_path, caplog, form):
    """Whoever sees 3 images where there are 5 finds the mistake before the training, and not after it."""
    folder = save_images(tmp_path / "images")
    (folder / "sub").mkdir()
    for name in ("e.gif", "sub/f.png", ".hidden.png"):
        draw("ellipse", "blue").save(folder / name)
    if form != "texts":
        rows = [
            {"file_name": name, "text": ["x", "y"][: 2 if form == "metadata" else 1]}
            for name in ("a.png", "sub/f.png")
        ]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "prior.txt").write_text("a\nb\nc\n")
    caplog.set_level("INFO", script.__name__)
    train(
        tmp_path / "out",
        instance_data_dir=folder,
        prior_prompts=tmp_path / "prior.txt",
        max_train_steps=1,
        context_cache_dir=tmp_path / "c",
    )
    told = " ".join(caplog.messages)
    if form == "texts":
        assert " on 4 images, 5 captions, 3 prior prompts." in told
        assert f"Not used of {folder}: 2 files (e.gif, sub/f.png)." in told
    else:
        count = 4 if form == "metadata" else 2
        assert f" on 2 images, {count} captions, 3 prior prompts." in told
        assert f"Not used of {folder}: 8 files (a.txt, b.png, b.txt, c.png, c.txt, ..)." in told
    assert ("same caption" in told) == (form == "one caption")


def decode(path):
    image = load_image({"path": str(path), "bytes": None})
    assert image.mode == "RGB"
    assert np.array_equal(image, load_image({"path": "gone", "bytes": path.read_bytes()}))
    return image


def test_exif_orientation(tmp_path):
    """Portraits of a phone would be learned lying on their side."""
    image = Image.new("RGB", (30, 20), "blue")
    image.paste("red", (0, 0, 30, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise for display
    image.save(tmp_path / "x.png", exif=exif)
    upright = decode(tmp_path / "x.png")
    assert upright.size == (20, 30)
    assert upright.getpixel((15, 15)) == (255, 0, 0) and upright.getpixel((5, 15)) == (0, 0, 255)


def palette_with_transparency():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.info["transparency"] = 1
    return image


def grey16(value):
    return Image.fromarray(np.full((4, 4), value, np.uint16))


@pytest.mark.parametrize(
    ("image", "suffix", "expected", "tolerance"),
    [
        (Image.new("RGBA", (4, 4), (255, 0, 0, 128)), "png", (255, 127, 127), 1),
        (Image.new("RGBA", (4, 4), (0, 0, 0, 0)), "png", (255, 255, 255), 0),
        (Image.new("LA", (4, 4), (0, 0)), "png", (255, 255, 255), 0),
        (palette_with_transparency(), "png", (255, 255, 255), 0),
        (Image.new("L", (4, 4), 100), "png", (100, 100, 100), 0),
        (Image.new("1", (4, 4), 1), "png", (255, 255, 255), 0),
        (Image.new("P", (4, 4), 0), "png", (0, 0, 0), 0),
        (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "jpg", (255, 0, 0), 4),
        (Image.new("CMYK", (4, 4), (0, 0, 0, 255)), "tif", (0, 0, 0), 4),
        (grey16(32768), "png", (128, 128, 128), 1),
        (grey16(65535), "png", (255, 255, 255), 0),
        (grey16(200), "png", (1, 1, 1), 1),
        (grey16(0), "png", (0, 0, 0), 0),
        (grey16(32768), "tif", (128, 128, 128), 1),
    ],
    ids=["half-transparent", "transparent", "grey-alpha", "palette-alpha", "grey", "bilevel", "palette", "cmyk",
         "cmyk-black", "16-bit", "16-bit-white", "16-bit-dark", "16-bit-black", "16-bit-tiff"],
)  # fmt: skip
def test_modes_decode_to_the_right_colour(tmp_path, image, suffix, expected, tolerance):
    """A plain convert("RGB") makes transparent parts black and clips 16-bit grey to white."""
    image.save(tmp_path / f"x.{suffix}")
    pixels = np.asarray(decode(tmp_path / f"x.{suffix}")).astype(int)
    assert np.abs(pixels - expected).max() <= tolerance


def test_formats_of_a_photo_folder_are_found(read, tmp_path):
    """An image that is passed over in silence is missing from the training."""
    for name in ("a.JPG", "b.jpeg", "c.webp", "d.bmp"):
        draw("ellipse", "blue").save(tmp_path / name)
    assert len(read(instance_data_dir=tmp_path, instance_prompt="x")) == 4


# --------------------------------------------------------------------------------------------------- buckets and cache
@pytest.fixture
def encoded(monkeypatch):
    """(caption, size of the image) of every pair that the teacher encodes."""
    calls, encode = [], DOPSDZImagePipeline.encode_teacher

    def recorded(self, prompts, images, *rest):
        calls.extend((prompt, image.size) for prompt, image in zip(prompts, images))
        return encode(self, prompts, images, *rest)

    monkeypatch.setattr(DOPSDZImagePipeline, "encode_teacher", recorded)
    return calls


@pytest.fixture
def latent_shapes(monkeypatch):
    """Shapes of the latents that the transformer sees."""
    shapes, velocity = set(), DOPSDZImagePipeline.velocity

    def recorded(self, transformer, latents, timestep, contexts):
        shapes.add(tuple(latents.shape))
        return velocity(self, transformer, latents, timestep, contexts)

    patch_velocity(monkeypatch, DOPSDZImagePipeline, recorded)
    return shapes


def test_images_train_in_the_bucket_of_their_shape(train, tmp_path, encoded, latent_shapes):
    """Landscape and portrait pictures would lose their sides to a square crop."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, size in {"square": (100, 100), "wide": (200, 100), "tall": (100, 180)}.items():
        draw("ellipse", "blue", size).save(folder / f"{name}.png")
    train(tmp_path / "out", instance_data_dir=folder, instance_prompt="a disc", max_train_steps=3)
    assert sorted(size for _, size in encoded) == [(24, 40), (32, 32), (48, 24)]
    assert latent_shapes == {(1, 4, 8, 8), (1, 4, 6, 12), (1, 4, 10, 6)}


def test_cache_is_renewed_when_what_it_holds_changes(train, tmp_path, encoded):
    """A cache that is too faithful trains on the old picture or caption; one that is not costs the encoders' time."""
    folder, steps = save_images(tmp_path / "images"), {"max_train_steps": 1}
    common = {"instance_data_dir": folder, "context_cache_dir": tmp_path / "cache", **steps}

    def encodes(**changes):
        encoded.clear()
        train(tmp_path / "out", "--overwrite_output_dir", **{**common, **changes})
        return sorted(caption for caption, _ in encoded)

    everything = sorted(c for captions in CAPTIONS.values() for c in captions)
    assert encodes() == everything
    assert encodes() == []
    assert encodes(learning_rate=1e-3, rank=2, rollout_steps=1, seed=4) == []
    (folder / "b.txt").write_text("another caption")
    assert encodes() == ["another caption"]
    draw("rectangle", "black").save(folder / "c.png")
    assert encodes() == CAPTIONS["c"]
    assert len(encodes(resolution=24)) == 5
    assert len(encodes(teacher_max_pixels=16 * 16)) == 5
    assert len(encodes(mixed_precision="bf16")) == 5
    assert encodes() == []


def test_equal_images_with_one_caption_are_encoded_once(train, tmp_path, encoded):
    """A dataset that repeats its rows would be encoded as often."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name in "abc":
        draw("ellipse", "blue").save(folder / f"{name}.png")
    train(
        tmp_path / "out",
        instance_data_dir=folder,
        instance_prompt="a disc",
        max_train_steps=1,
        context_cache_dir=tmp_path / "cache",
    )
    assert [caption for caption, _ in encoded] == ["a disc"]


def test_students_context_is_encoded_and_stored_once_for_a_caption(train, tmp_path, encoded, monkeypatch):
    """It depends on the caption alone; stored with each image, contexts would take half as much again on the disk."""
    students, encode = [], DOPSDZImagePipeline.encode_student
    monkeypatch.setattr(
        DOPSDZImagePipeline,
        "encode_student",
        lambda self, prompts, *o: students.extend(prompts) or encode(self, prompts, *o),
    )
    for path in (folder := save_images(tmp_path / "images")).glob("*.txt"):
        path.unlink()
    common = {
        "instance_data_dir": folder,
        "instance_prompt": "a disc",
        "max_train_steps": 1,
        "context_cache_dir": tmp_path / "cache",
    }
    train(tmp_path / "out", **common)
    assert students == ["a disc"] and len(encoded) == 4
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 1 + 4
    train(tmp_path / "other", **common, teacher_max_pixels=16 * 16)  # another teacher
    assert students == ["a disc"] and len(encoded) == 8


@pytest.mark.parametrize("part", ["vlm", "text_encoder", "tokenizer", "variant"])
def test_cache_is_renewed_when_a_model_changes(base, vlm, flags, tmp_path, part):
    """Contexts of other encoder weights would be taken for those of these."""
    models = {"pretrained_model_name_or_path": tmp_path / "base", "vlm_model_name_or_path": tmp_path / "vlm"}
    shutil.copytree(base, tmp_path / "base")
    shutil.copytree(vlm, tmp_path / "vlm")
    row = {"image_hash": "0", "bucket": [32, 32], "reference_hashes": []}

    def path():
        args = script.parse_args(flags(tmp_path / "out", **models))
        script.resolve_arguments(DOPSDZImagePipeline, args)
        return script.ContextCache(DOPSDZImagePipeline, args).paths(row, row, "x")[1]

    before = path()
    assert path() == before
    if part == "variant":
        models["variant"] = "fp16"  # of files in the same folder
    elif part == "tokenizer":
        config = tmp_path / "base" / "tokenizer" / "tokenizer_config.json"
        config.write_text(config.read_text() + "\n")
    else:
        file = (
            tmp_path / "vlm" / "model.safetensors" if part == "vlm" else tmp_path / "base" / part / "model.safetensors"
        )
        weights = load_file(file)
        weights[sorted(weights)[0]] += 1e-3
        save_file(weights, file, {"format": "pt"})
    assert path() != before


@pytest.mark.parametrize("form", ["folder", "parquet", "paths"])
def test_second_start_decodes_no_image(flags, tmp_path, monkeypatch, form):
    """With 100,000 images, a start that decodes them all again takes the better part of an hour; but one that has
    changed would be trained with the context of the old one."""
    folder, changes = save_images(tmp_path / "images"), {}
    if form == "parquet":
        dataset = Dataset.from_dict({"image": sorted(map(str, folder.glob("*.png"))), "text": ["a"] * 4})
        (tmp_path / "parquet").mkdir()
        dataset.cast_column("image", ImageFeature()).to_parquet(tmp_path / "parquet" / "train.parquet")
        changes = {"instance_data_dir": None, "dataset_name": tmp_path / "parquet"}
    if form == "paths":
        rows = [json.dumps({"image": str(path), "text": "a"}) for path in sorted(folder.glob("*.png"))]
        (tmp_path / "paths").mkdir()
        (tmp_path / "paths" / "train.jsonl").write_text("\n".join(rows))
        changes = {"instance_data_dir": None, "dataset_name": tmp_path / "paths"}
    args = script.parse_args(flags(tmp_path / "out", **{"instance_data_dir": folder, **changes}))
    buckets = [(32, 32), (32, 64)]
    first = script.inspect_images(read_dataset(args), buckets, args)
    with monkeypatch.context() as patch:
        patch.setattr("PIL.Image.open", lambda *a, **k: pytest.fail("an image was decoded again"))
        again = script.inspect_images(read_dataset(args), buckets, args)
        assert again["image_hash"] == first["image_hash"] and again["bucket"] == first["bucket"]
    if form != "parquet":  # which holds the images
        draw("ellipse", "black").save(folder / "a.png")
        changed = script.inspect_images(read_dataset(args), buckets, args)
        assert [a == b for a, b in zip(changed["image_hash"], first["image_hash"])] == [False, True, True, True]


def test_float_picture_is_refused(tmp_path):
    """Values from 0 to 1 would be trained as black."""
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(script.InputError, match="a.tiff .* 8 or 16 bits"):
        script.load_image({"path": str(tmp_path / "a.tiff"), "bytes": None})


def test_exchanged_images_are_seen(flags, tmp_path):
    """Of two files of equal size and time, as a ZIP may leave them, each would be trained with the other's caption."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("red", "blue"):
        Image.new("RGB", (32, 32), name).save(folder / f"{name}.bmp")
        os.utime(folder / f"{name}.bmp", (1, 1))
    args = script.parse_args(flags(tmp_path / "out", instance_data_dir=folder, instance_prompt="a"))
    first = script.inspect_images(read_dataset(args), [(32, 32)], args)["image_hash"][:]
    for old, new in (("red", "third"), ("blue", "red"), ("third", "blue")):
        (folder / f"{old}.bmp").rename(folder / f"{new}.bmp")
    assert script.inspect_images(read_dataset(args), [(32, 32)], args)["image_hash"][:] == first[::-1]


def test_changed_models_are_noticed_without_a_reading_of_their_weights(base, tmp_path, monkeypatch):
    """Hashing the 17 GB of a 4B model takes minutes; contexts of another text encoder would be taken for its own."""
    shutil.copytree(base, tmp_path / "base")
    weights, count = tmp_path / "base" / "text_encoder" / "model.safetensors", []
    patterns = ["text_encoder/*.json", "text_encoder/*.safetensors", "tokenizer/*"]
    monkeypatch.setattr(script, "checksum", lambda path, old=script.checksum: count.append(path.name) or old(path))
    first = script.fingerprint(str(tmp_path / "base"), patterns)
    assert "config.json" in count and "tokenizer.json" in count and weights.name not in count
    tensors = load_file(weights)
    for name in (min(tensors), max(tensors)):  # one value of one tensor
        changed = {**tensors, name: tensors[name].clone()}
        changed[name].view(-1)[0] += 1
        save_file(changed, weights, {"format": "pt"})
        assert script.fingerprint(str(tmp_path / "base"), patterns) != first
    save_file(tensors, weights, {"format": "pt"})
    assert script.fingerprint(str(tmp_path / "base"), patterns) == first
    (tmp_path / "base" / "tokenizer" / "added.json").write_text("{}")
    assert script.fingerprint(str(tmp_path / "base"), patterns) != first


def image_bytes(form, orientation=None, **options):
    """A picture that is 40 pixels wide and 24 high."""
    file, exif = io.BytesIO(), Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8))
    picture.save(file, form, exif=exif, **options)
    return file.getvalue()


def exif_behind_pixels(content):
    """The PNG `content` with its eXIf chunk behind its pixels, where it may stand, too."""
    start, pixels = content.index(b"eXIf") - 4, content.index(b"IDAT") - 4
    assert start < pixels
    return content[:start] + content[pixels:-12] + content[start:pixels] + content[-12:]


@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "PNG exif last", "WEBP", "TIFF"])
def test_sizes_from_headers_are_those_of_decoded_images(form, orientation):
    """A portrait that is taken for a landscape loses its head and feet to the crop."""
    content = image_bytes(form.split()[0], orientation)
    if form == "PNG exif last" and orientation:
        content = exif_behind_pixels(content)
    source = {"path": None, "bytes": content}
    size, image_hash = script.inspect_image(source)
    assert tuple(size) == load_image(source).size == ((24, 40) if orientation in (6, 8) else (40, 24))
    assert image_hash == hashlib.sha256(content).hexdigest()


def test_no_pixel_of_a_photo_is_decoded_before_encoding(monkeypatch):
    """100,000 photos of 12 megapixels would be decoded for half a day before anything happens."""
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *a: pytest.fail("decoded"))
    for content in (
        image_bytes("JPEG", 6),
        image_bytes("JPEG", progressive=True),
        image_bytes("PNG"),
        image_bytes("PNG", 8),
    ):
        script.inspect_image({"path": None, "bytes": content})


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("damage", ["cut", "cut in the header", "another file"])
def test_broken_images_are_found_before_encoding(form, damage):
    """An image that was copied in part would end a run after hours of encoding."""
    content = image_bytes(form)
    damaged = {
        "cut": content[: len(content) // 2],
        "cut in the header": content[:20],
        "another file": b"<html>" + content,
    }
    with pytest.raises(ValueError, match="cannot be read as an image"):
        script.inspect_image({"path": None, "bytes": damaged[damage]})


@pytest.mark.parametrize("workers", [1, 2])
def test_broken_images_are_named_together(flags, tmp_path, caplog, workers):
    """Named one at a time, those of a large set would take as many starts; --skip_broken_images goes on without
    them."""
    PartialState()  # which the log asks
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(210):  # enough for two processes
        (folder / f"{number:03}.jpg").write_bytes(
            image_bytes("JPEG", quality=number % 90 + 5)[: 100 if number % 20 == 3 else None]
        )
    command = {"instance_data_dir": folder, "instance_prompt": "x", "dataset_num_workers": workers}

    def inspect(*switches):
        args = script.parse_args(flags(tmp_path / "out", *switches, **command))
        return script.inspect_images(read_dataset(args), [(32, 32)], args)

    with pytest.raises(ValueError, match="11 of 210 images are broken") as error:
        inspect()
    named = [f"{number:03}.jpg" for number in range(210) if f"{number:03}.jpg" in str(error.value)]
    assert named == [f"{number:03}.jpg" for number in range(3, 200, 20)] and "--skip_broken_images" in str(error.value)
    dataset = inspect("--skip_broken_images")
    assert [Path(source["path"]).name for source in dataset["image"][:]] == [
        f"{n:03}.jpg" for n in range(210) if n % 20 != 3
    ]
    assert "Left out: 11 of 210 images" in caplog.text and "003.jpg" in caplog.text
    assert dataset["image_hash"][0] == hashlib.sha256((folder / "000.jpg").read_bytes()).hexdigest() and all(
        dataset["image_hash"][:]
    )


def test_changed_captions_cause_no_new_inspection(flags, tmp_path, monkeypatch):
    """Whoever mends a caption of 100,000 would wait for all images to be read again."""
    folder = save_images(tmp_path / "images")
    args = script.parse_args(flags(tmp_path / "out", instance_data_dir=folder))
    script.inspect_images(read_dataset(args), [(32, 32)], args)
    (folder / "b.txt").write_text("another caption")
    monkeypatch.setattr("PIL.Image.open", lambda *a, **k: pytest.fail("an image was read again"))
    assert script.inspect_images(read_dataset(args), [(32, 32)], args)["captions"][1] == ["another caption"]


@pytest.mark.parametrize("mirrored", [False, True])
def test_no_image_is_copied_into_a_cache(flags, tmp_path, mirrored):
    """A dataset of 200 GB must not take 200 GB more, nor where an image of it is broken."""
    pictures = []
    for pixels in np.random.default_rng(0).integers(0, 256, (8, 256, 256, 3), dtype=np.uint8):
        Image.fromarray(pixels).save(tmp_path / "noise.png")
        pictures.append({"bytes": (tmp_path / "noise.png").read_bytes(), "path": None})
    pictures.insert(3, {"bytes": pictures[0]["bytes"][:1000], "path": None})  # a broken one
    features = Features({"picture": ImageFeature(), "text": Value("string")})
    (tmp_path / "parquet").mkdir()
    Dataset.from_dict({"picture": pictures, "text": ["a"] * 9}, features=features).to_parquet(
        tmp_path / "parquet" / "train.parquet"
    )
    changes = {"instance_data_dir": None, "dataset_name": tmp_path / "parquet", "image_column": "picture"}
    args = script.parse_args(flags(tmp_path / "out", "--skip_broken_images", **changes))
    size = lambda dataset: sum(Path(name).stat().st_size for name in {f["filename"] for f in dataset.cache_files})  # noqa: E731
    before = size(dataset := read_dataset(args))
    dataset = script.inspect_images(dataset, [(32, 32)], args, mirrored)
    assert len(dataset) == (16 if mirrored else 8) and before > 8 * 256 * 256 * 3 and size(dataset) - before < 20_000


def test_interrupted_encoding_goes_on_where_it_stopped(train, tmp_path, monkeypatch):
    """Encoding a large dataset takes hours; what is encoded must not be lost."""
    monkeypatch.setattr(script, "ENCODING_BATCH", 1)
    encode, done = DOPSDZImagePipeline.encode_teacher, []

    def interrupted(self, prompts, images, *others):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(prompts)
        return encode(self, prompts, images, *others)

    cache = tmp_path / "contexts"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(DOPSDZImagePipeline, "encode_teacher", interrupted)
        train(tmp_path / "out", context_cache_dir=cache)
    # all of the student's, three of the teacher's
    assert len(list(cache.glob("*.safetensors"))) == sum(map(len, CAPTIONS.values())) + 3
    rest = []
    with monkeypatch.context() as patch:
        patch.setattr(DOPSDZImagePipeline, "encode_teacher", lambda self, p, *o: rest.append(p) or encode(self, p, *o))
        train(tmp_path / "out", context_cache_dir=cache)
    assert len(rest) == sum(map(len, CAPTIONS.values())) - 3 and not any(p in done for p in rest)


def test_images_are_decoded_ahead_of_the_encoders(train, tmp_path, monkeypatch):
    """A GPU would wait for each photo to be decoded and resized, hours in all; contexts must be those of one
    thread."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(20):
        draw("ellipse", (number, 0, 0)).save(folder / f"{number}.png")
    monkeypatch.setattr(script, "ENCODING_BATCH", 1)
    common = {"instance_data_dir": folder, "instance_prompt": "a disc", "max_train_steps": 1}
    train(tmp_path / "one", dataset_num_workers=1, context_cache_dir=tmp_path / "first", **common)
    monkeypatch.setattr(script, "training_image", forbidden_in(threading.get_ident(), script.training_image))
    train(tmp_path / "two", dataset_num_workers=2, context_cache_dir=tmp_path / "second", **common)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).glob("*.safetensors")} for n in ("first", "second"))
    assert one == two and len(one) == 21
    for path in (tmp_path / "second").glob("*.safetensors"):
        path.unlink()
    (folder / "7.png").write_bytes(b"gone")
    monkeypatch.setattr(script, "inspect_image", lambda source: ([40, 40], source["path"]))
    with pytest.raises(script.InputError, match="^[^\n]*7.png cannot be read as an image[^\n]*$"):
        train(tmp_path / "three", dataset_num_workers=2, context_cache_dir=tmp_path / "second", **common)


def forbidden_in(thread, function):
    return lambda *args: pytest.fail("decoded by the encoders") if threading.get_ident() == thread else function(*args)


def test_disk_that_is_too_small_for_the_contexts_is_found_at_once(train, tmp_path, monkeypatch, caplog):
    """A disk that is full after ten hours of encoding could have been known to be too small."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(script, "ENCODING_BATCH", 1)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage._replace(free=9000))
    caplog.set_level("INFO", script.__name__)
    with pytest.raises(script.InputError, match="--context_cache_dir .* GiB"):
        train(tmp_path / "out", context_cache_dir=tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2
    size = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.safetensors"))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage._replace(free=20 * size))
    train(tmp_path / "out", context_cache_dir=tmp_path / "cache")
    assert "0.0 GiB are still needed for contexts" in caplog.text


def test_warm_cache_loads_no_encoder(train, tmp_path, monkeypatch):
    """Encoders that are not needed take minutes to load and the memory that the training has not got."""
    train(tmp_path / "first", validation_steps=5)

    def loaded(*args, **kwargs):
        pytest.fail("an encoder was loaded")

    monkeypatch.setattr(DOPSDZImagePipeline, "load_multimodal_encoder", loaded)
    monkeypatch.setattr("pipeline_dopsd.VisionPart.from_pretrained", loaded)
    monkeypatch.setattr("transformers.Qwen3Model.from_pretrained", loaded)
    train(tmp_path / "second", validation_steps=5)
    with pytest.raises(pytest.fail.Exception, match="an encoder was loaded"):
        train(tmp_path / "third", context_cache_dir=tmp_path / "cold")


def test_encoders_are_freed_before_the_transformer_loads(train, tmp_path, monkeypatch):
    """Encoders and transformer together do not fit where each alone does."""
    encoders, load = [], DOPSDZImagePipeline.load_multimodal_encoder

    def recorded(self, *args, **kwargs):
        load(self, *args, **kwargs)
        encoders.extend([weakref.ref(self.text_encoder), weakref.ref(self.multimodal_encoder.model)])

    def alive(self, *args):
        gc.collect()
        assert len(encoders) == 2 and not any(encoder() for encoder in encoders)
        raise KeyboardInterrupt  # seen enough

    monkeypatch.setattr(DOPSDZImagePipeline, "load_multimodal_encoder", recorded)
    patch_velocity(monkeypatch, DOPSDZImagePipeline, alive)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "out", context_cache_dir=tmp_path / "cold")


def test_several_captions_are_drawn_at_random(train, tmp_path, monkeypatch):
    """With the first caption alone, a LoRA learns its wording instead of the concept."""
    drawn, read = [], script.ContextCache.read

    def recorded(self, row, shown, caption):
        drawn.append(caption)
        return read(self, row, shown, caption)

    monkeypatch.setattr(script.ContextCache, "read", recorded)
    folder = tmp_path / "images"
    folder.mkdir()
    draw("rectangle", "red").save(folder / "a.png")
    (folder / "a.txt").write_text("one\ntwo\n")
    train(tmp_path / "out", instance_data_dir=folder, max_train_steps=12, rollout_steps=1)
    assert len(drawn) == 12 and 2 <= drawn.count("two") <= 10
    assert drawn not in (["one", "two"] * 6, ["two", "one"] * 6)


# ------------------------------------------------------------------------------------------------------ flips and epochs
def test_mirror_images_are_trained_on_with_contexts_of_their_own(train, tmp_path, monkeypatch):
    """A mirrored image with the context of the other would teach the wrong side."""
    seen, encode = [], DOPSDZImagePipeline.encode_teacher

    def recorded(self, prompts, images, *others):
        seen.extend(np.asarray(image) for image in images)
        return encode(self, prompts, images, *others)

    monkeypatch.setattr(DOPSDZImagePipeline, "encode_teacher", recorded)
    folder = tmp_path / "images"
    folder.mkdir()
    picture = draw("rectangle", "red")
    picture.paste("blue", (0, 0, 10, 40))
    picture.save(folder / "a.png")
    common = {
        "instance_data_dir": folder,
        "instance_prompt": "x",
        "max_train_steps": 1,
        "context_cache_dir": tmp_path / "cache",
    }
    train(tmp_path / "one", **common)
    assert len(seen) == len(list((tmp_path / "cache").glob("*.safetensors"))) - 1 == 1  # and the student's
    train(tmp_path / "two", "--random_flip", **common)
    assert len(seen) == len(list((tmp_path / "cache").glob("*.safetensors"))) - 1 == 2  # the first is known
    assert np.array_equal(seen[0], seen[1][:, ::-1]) and not np.array_equal(seen[0], seen[1])


def test_epochs_are_counted_in_optimisation_steps(flags, tmp_path):
    """As many steps as show each image so often, whatever batch and accumulation."""

    def steps(*switches, **changes):
        args = script.parse_args(flags(tmp_path / "out", *switches, max_train_steps=None, **changes))
        script.make_accelerator(args)
        script.check_inputs(args)
        assert args.num_train_epochs is None
        return args.max_train_steps

    assert steps(num_train_epochs=2) == 8
    assert steps(num_train_epochs=2, gradient_accumulation_steps=3) == 3
    assert steps(num_train_epochs=3, train_batch_size=3) == 4
    assert steps(num_train_epochs=1, train_batch_size=3) == 2  # an epoch that ends within a batch
    assert steps("--random_flip", num_train_epochs=1) == 8


# ------------------------------------------------------------------------------------------------------------ read ahead
def test_next_batches_are_read_while_the_device_computes():
    """Contexts of 40 MB from a slow disk would be waited for in each step."""
    read, asked = [], threading.Semaphore(0)

    def make(number):
        read.append(number)
        asked.release()
        return 10 * number

    batches = script.read_ahead(make, range(6))
    assert next(batches) == 0
    for _ in range(3):  # the one that was taken, and two more, without being asked for
        assert asked.acquire(timeout=30)
    assert read == [0, 1, 2]
    assert list(batches) == [10, 20, 30, 40, 50] and read == list(range(6))


def test_what_goes_wrong_ahead_comes_up_in_its_step():
    """A context that is damaged must not end the steps before it, nor vanish in a thread."""

    def make(number):
        if number == 2:
            raise script.InputError("damaged")
        return number

    batches = script.read_ahead(make, range(6))
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(script.InputError, match="damaged"):
        next(batches)
