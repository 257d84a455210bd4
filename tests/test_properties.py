"""Properties that hold for any caption, image size, cache entry and LoRA, tried with hypothesis."""

import sys

import pytest
import torch
from diffusers.training_utils import generate_aspect_ratio_buckets
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

import train_dopsd_lora as script
from conftest import ROOT
from families import SPECIAL_TOKENS
from pipeline_dopsd import DOPSDZImagePipeline


sys.path.insert(0, str(ROOT / "examples"))

import convert_lora  # noqa: E402


# no deadlines: other processes share the machine; one folder for all examples of a test
quiet = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TEXT = st.text(st.characters(codec="utf-8"), max_size=40)
MULTIPLE = 8


# ------------------------------------------------------------------------------------------------------------- captions
@quiet
@given(st.lists(TEXT, max_size=5))
def test_lines_of_a_caption_file_are_its_captions(tmp_path, captions):
    """A caption in any script is trained on as it was written: no character but the line's end parts two captions."""
    captions = [c.strip() for c in captions if c.strip() and not set(c) & {"\n", "\r"}]
    assume(not "".join(captions[:1]).startswith("\ufeff"))  # the mark that some editors put before a text
    (tmp_path / "a.txt").write_text("\n\n".join(captions), "utf-8")
    assert script.read_lines(tmp_path / "a.txt") == captions


@quiet
@given(st.lists(st.one_of(st.none(), TEXT), max_size=4) | TEXT | st.none(), st.none() | TEXT.filter(str.strip))
def test_cells_of_a_dataset_give_captions_or_an_error_that_names_the_row(cell, prompt):
    """Whatever stands in a cell, no blank caption is trained on."""
    given_ = [c for c in (cell if isinstance(cell, list) else [cell]) if c and c.strip()]
    if given_ or prompt:
        assert script.captions_of(cell, "Row 7", "text", prompt) == (given_ or [prompt])
    else:
        with pytest.raises(ValueError, match="^Row 7"):
            script.captions_of(cell, "Row 7", "text", prompt)


@pytest.fixture(scope="module")
def checked(flags, tmp_path_factory):
    """Runs the check of contexts for one image with a caption and a suffix."""
    folder = tmp_path_factory.mktemp("checked")

    def run(caption, suffix=""):
        args = script.parse_args(flags(folder, teacher_prompt_suffix=suffix))
        script.resolve_arguments(DOPSDZImagePipeline, args)
        rows = Rows([{"row": 1, "bucket": [32, 32], "captions": [caption], "image": {"path": "a.png"}}])
        script.check_contexts(DOPSDZImagePipeline, args, rows, [(0, caption)])

    return run


class Rows(list):
    """Rows that also give a column by its name, as a dataset does."""

    def __getitem__(self, key):
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)


@settings(quiet, max_examples=15)
@given(
    TEXT.filter(lambda text: "<|" not in text and "|>" not in text),
    st.sampled_from(SPECIAL_TOKENS),
    st.integers(0, 40),
)
def test_marks_of_the_chat_are_refused_anywhere_and_nothing_else_is(checked, caption, token, place):
    """A mark that slips through ends the user's turn; a caption that is refused without need cannot be trained on."""
    checked(caption)
    for text, suffix in (
        (caption[:place] + token + caption[place:], ""),
        (caption, token),
        (caption + token[:4], token[4:]),
    ):
        with pytest.raises(ValueError, match="mark of the chat"):
            checked(text, suffix)


# -------------------------------------------------------------------------------------------------------------- buckets
@quiet
@given(st.integers(1, 400), st.integers(1, 400), st.integers(4, 40), st.sampled_from([8, 16]))
def test_every_image_gets_a_bucket_of_the_area(height, width, side, multiple):
    """A bucket of another area trains at another noise level, and one that is no multiple fails in the transformer."""
    resolution = side * multiple
    buckets = generate_aspect_ratio_buckets(resolution, divisibility=multiple)
    row = {"bucket": buckets[script.find_nearest_bucket(height, width, buckets)], "image": None, "image_hash": ""}
    assert all(length % multiple == 0 and length > 0 for length in row["bucket"])
    # each side is rounded to the nearest multiple
    high, wide = row["bucket"]
    assert (
        (high - multiple / 2) * (wide - multiple / 2) <= resolution**2 <= (high + multiple / 2) * (wide + multiple / 2)
    )


@settings(quiet, max_examples=30)
@given(st.integers(1, 90), st.integers(1, 90), st.booleans())
def test_training_images_have_the_size_of_their_bucket(tmp_path, height, width, mirrored):
    """Whatever the image: one pixel or a long strip."""
    Image.new("RGB", (width, height), "red").save(tmp_path / "a.png")
    buckets = generate_aspect_ratio_buckets(32, divisibility=MULTIPLE)
    bucket = buckets[script.find_nearest_bucket(height, width, buckets)]
    source = {"path": str(tmp_path / "a.png"), "bytes": None}
    image = script.training_image({"image": source, "bucket": bucket, "image_hash": "0" + mirrored * script.MIRRORED})
    assert (image.height, image.width) == tuple(bucket) and image.mode == "RGB"


# ----------------------------------------------------------------------------------------------------------- cache keys
HASHES = st.text("0123456789abcdef", min_size=1, max_size=3)
ENTRY = st.tuples(
    st.lists(HASHES, max_size=2),
    HASHES,
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    TEXT,
    st.sampled_from(["vlm", "edit"]),
    TEXT,
)


def path_of(entry):
    references, image, bucket, caption, kind, suffix = entry
    cache = object.__new__(script.ContextCache)
    cache.folder, cache.models = script.Path("cache"), ["base", "torch.float32", kind, suffix]
    cache.models.append(None)  # of a quantisation
    return cache.paths({"reference_hashes": references}, {"image_hash": image, "bucket": list(bucket)}, caption)[1]


@settings(quiet, max_examples=300)
@given(ENTRY, ENTRY)
def test_contexts_share_a_file_if_and_only_if_all_is_equal(one, other):
    """Two inputs with one key would train on the context of the other; one input with two keys is encoded twice."""
    assert (path_of(one) == path_of(other)) == (one == other)
    for i, value in enumerate(other):
        changed = (*one[:i], value, *one[i + 1 :])
        assert (path_of(one) == path_of(changed)) == (one == changed)


@settings(quiet, max_examples=50)
@given(st.integers(0, 10**6), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.data())
def test_any_flipped_bit_of_a_context_is_noticed(tmp_path, seed, dtype, data):
    """The header counts, too: it says where a tensor begins."""
    generator = torch.Generator().manual_seed(seed)
    cache = script.ContextCache.__new__(script.ContextCache)
    cache.folder, cache.models, cache.fp8 = tmp_path, ["base", "dtype", "vlm", "", None], False
    row = {"reference_hashes": [], "image_hash": "0", "bucket": [8, 8]}
    written = [{"prompt_embeds": torch.randn(n, 4, generator=generator).to(dtype)} for n in (2, 3)]
    for path, context in zip(cache.paths(row, row, "x"), written):
        cache.write(path, context)
    assert all(
        torch.equal(a["prompt_embeds"], b["prompt_embeds"])
        for a, b in zip(cache.read(row, row, "x"), written, strict=True)
    )
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")  # behind the header, whose blanks mean nothing
    content[data.draw(st.integers(start, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    with pytest.raises(script.InputError, match=path.name):
        cache.read(row, row, "x")


# ------------------------------------------------------------------------------------------------------------ LoRA keys
LAYERS = {
    f"layers.{i}.{name}": (5, 7)
    for i in range(3)
    for name in ("attention.to_q", "attention.to_out.0", "feed_forward.w1")
}
PREFIXES = ["", "transformer.", "base_model.model.", "diffusion_model.", "base_model.model.transformer."]


@settings(quiet, max_examples=60)
@given(
    st.sets(st.sampled_from(sorted(LAYERS)), min_size=1), st.sampled_from([*PREFIXES, "kohya"]), st.sampled_from(["", ".default", ".teacher"]),
    st.integers(1, 4), st.integers(1, 64), *[st.sampled_from([torch.float32, torch.bfloat16])] * 2,
)  # fmt: skip
def test_converted_loras_keep_layers_and_strength(tmp_path, names, prefix, adapter, rank, alpha, dtype, dtype_b):
    """Each layer is there under the base's name, with scale * B A as it was; converted again, nothing changes."""
    generator = torch.Generator().manual_seed(rank + alpha)
    file, tensors, expected = tmp_path / "old.safetensors", {}, {}
    for name in sorted(names):
        a, b = (
            torch.randn(rank, 7, generator=generator).to(dtype),
            torch.randn(5, rank, generator=generator).to(dtype_b),
        )
        expected[name] = alpha / rank * b.float() @ a.float()
        if prefix == "kohya":
            flat = f"lora_unet_{name.replace('.', '_')}"
            tensors |= {
                f"{flat}.lora_down.weight": a,
                f"{flat}.lora_up.weight": b,
                f"{flat}.alpha": torch.tensor(float(alpha)),
            }
        else:
            tensors |= {f"{prefix}{name}.lora_A{adapter}.weight": a, f"{prefix}{name}.lora_B{adapter}.weight": b}
    save_file(tensors, file)
    converted = convert_lora.convert(file, LAYERS, None if prefix == "kohya" else float(alpha))
    assert converted.keys() == {f"{name}.lora_{side}.weight" for name in names for side in "AB"}
    for name in names:
        a, b = (converted[f"{name}.lora_{side}.weight"].float() for side in "AB")
        torch.testing.assert_close(b @ a, expected[name], rtol=1e-5, atol=1e-5)
    save_file(converted, file)
    again = convert_lora.convert(file, LAYERS, float(rank))
    assert all(torch.equal(again[name], converted[name]) for name in converted)


@settings(quiet, max_examples=100)
@given(st.text(st.characters(codec="ascii", categories=["L", "N", "P"]), min_size=1, max_size=40))
def test_other_keys_are_never_dropped(tmp_path, key):
    """A key that is not understood ends the conversion."""
    assume(not any(pattern.fullmatch(key) for pattern in (convert_lora.PEFT, convert_lora.KOHYA)))
    good = {
        "layers.0.attention.to_q.lora_A.weight": torch.ones(1, 7),
        "layers.0.attention.to_q.lora_B.weight": torch.ones(5, 1),
    }
    save_file({**good, key: torch.ones(1)}, tmp_path / "old.safetensors")
    with pytest.raises(ValueError, match="not understood"):
        convert_lora.convert(tmp_path / "old.safetensors", LAYERS, 1.0)
