"""Builds what examples/evaluate.py looks with on the miniature: a small ConvNeXt and a small image-text model, from
nothing.

    python examples/miniature/build_encoders.py all --work_dir build/encoders

They stand in for facebook/dinov2-base and google/siglip2-base-patch16-224. The first learns the attributes of the
world's pictures, as the judge does, and its heads are dropped; the second starts with its weights and learns which
caption belongs to which picture, with made-up words for half of the objects, as for a concept that nobody has told it
of. Both have seen every shape and the style of the concepts, as the models that they stand in for have seen most
things. The tokenizer is the miniature's. Neither is used in the training of a generator.
"""

import multiprocessing

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    ConvNextConfig,
    ConvNextModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import world
from build import HERE, Run, device, judge_scene, run_stages, stage_parser
from judge import ATTRIBUTES, label, to_tensor


TOKENS = 40


def _row(job):
    """A picture, its attributes and a caption, in which a made-up word stands for the object of every other
    picture."""
    index, seed = job
    scene, picture = judge_scene(index, seed)
    rng = np.random.default_rng([seed, index, 5])
    name = world.new_word(rng) if rng.random() < 0.5 else None
    text = world.caption(
        scene, rng, name=name, style_word=None if scene.style == "plain" else scene.style.split("-")[0]
    )
    return picture, [label(scene, a) for a in ATTRIBUTES], text


def stage_pictures(args):
    """Draws the training pictures once."""
    count = max(320, int(16000 * args.scale))
    with multiprocessing.Pool(args.threads) as pool:
        rows = list(
            tqdm(pool.imap(_row, [(i, args.seed) for i in range(count)], chunksize=64), total=count, mininterval=10)
        )
    np.savez(
        args.work_dir / "pictures.npz", pictures=np.stack([r[0] for r in rows]), labels=np.array([r[1] for r in rows])
    )
    (args.work_dir / "captions.txt").write_text("\n".join(r[2] for r in rows))


def read_pictures(args):
    """Pictures (N, 64, 64, 3), labels (N, attributes), captions."""
    data = np.load(args.work_dir / "pictures.npz")
    return data["pictures"], torch.from_numpy(data["labels"]), (args.work_dir / "captions.txt").read_text().split("\n")


def shown(pictures, rng):
    """Pixels of a batch, some blurred, all a little noisy: pictures of few-step models are."""
    x = to_tensor(pictures).to(device())
    if rng.random() < 0.3:
        x = F.interpolate(F.interpolate(x, scale_factor=0.6, mode="area"), world.RESOLUTION, mode="bilinear")
    return x + torch.randn_like(x) * rng.uniform(0, 0.08)


def save(model, folder):
    """The model in fp16 with the processor of its pictures."""
    model.cpu().half().save_pretrained(folder)
    half = [0.5, 0.5, 0.5]
    size = {"height": world.RESOLUTION, "width": world.RESOLUTION}
    SiglipImageProcessorPil(size=size, image_mean=half, image_std=half, resample=3).save_pretrained(folder)


def stage_image(args):
    """A ConvNeXt whose pooled output tells the attributes."""
    pictures, labels, _ = read_pictures(args)
    held_out = len(pictures) // 16
    torch.manual_seed(args.seed)
    sizes = {"num_stages": 3, "hidden_sizes": [40, 80, 112], "depths": [1, 2, 1]}
    model = ConvNextModel(ConvNextConfig(**sizes, image_size=world.RESOLUTION, layer_scale_init_value=1.0)).to(
        device()
    )
    heads = torch.nn.ModuleDict({name: torch.nn.Linear(112, len(options)) for name, options in ATTRIBUTES.items()}).to(
        device()
    )
    run = Run(args, "image", model, max(4, int(1500 * args.scale)), 3e-3, extra_parameters=heads.parameters())

    def loss_of(rng):
        picks = rng.integers(held_out, len(pictures), 64)
        features = model(shown(pictures[picks], rng)).pooler_output
        return sum(
            F.cross_entropy(head(features), labels[picks, i].to(device())) for i, head in enumerate(heads.values())
        )

    run.train(loss_of)
    with torch.no_grad():
        features = torch.cat([model(x.to(device())).pooler_output for x in to_tensor(pictures[:held_out]).split(128)])
        right = {
            name: head(features).argmax(1).cpu() == labels[:held_out, i]
            for i, (name, head) in enumerate(heads.items())
        }
    run.finish(held_out_accuracy={name: round(values.float().mean().item(), 3) for name, values in right.items()})
    save(model, args.output_dir / "encoders" / "image")


def stage_text(args):
    """An image-text model of that ConvNeXt and a BERT that reads the miniature's tokens."""
    pictures, _, captions = read_pictures(args)
    tokenizer, held_out = AutoTokenizer.from_pretrained(HERE / "model" / "tokenizer"), 64
    tokens = tokenizer(captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    torch.manual_seed(args.seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}
    reader = BertModel(
        BertConfig(
            **sizes, vocab_size=len(tokenizer), max_position_embeddings=TOKENS, pad_token_id=tokenizer.pad_token_id
        )
    )
    eyes = ConvNextModel.from_pretrained(args.output_dir / "encoders" / "image", dtype=torch.float32)
    eyes.config._name_or_path = ""  # a folder of this machine
    eyes.config.hidden_size = 112  # the image-text model asks for it by this name
    config = VisionTextDualEncoderConfig.from_vision_text_configs(eyes.config, reader.config, projection_dim=64)
    model = VisionTextDualEncoderModel(config, eyes, reader)
    run = Run(args, "text", model.to(device()), max(4, int(300 * args.scale)), 1e-3)

    def logits_of(picks, x):
        words = {name: values[picks].to(device()) for name, values in tokens.items() if name != "token_type_ids"}
        return model(**words, pixel_values=x).logits_per_image

    def loss_of(rng):
        picks = rng.choice(np.arange(held_out, len(pictures)), 64, replace=False)
        logits, own = logits_of(picks, shown(pictures[picks], rng)), torch.arange(64, device=device())
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    run.train(loss_of)
    with torch.no_grad():
        logits = logits_of(np.arange(held_out), to_tensor(pictures[:held_out]).to(device()))
    run.finish(
        caption_found_among_64=round((logits.argmax(1).cpu() == torch.arange(held_out)).float().mean().item(), 3)
    )
    save(model, args.output_dir / "encoders" / "text")
    tokenizer.model_max_length = TOKENS
    tokenizer.save_pretrained(args.output_dir / "encoders" / "text")


STAGES = {"pictures": stage_pictures, "image": stage_image, "text": stage_text}


if __name__ == "__main__":
    run_stages(STAGES, stage_parser(__doc__, STAGES).parse_args())
