"""Ordinary fine-tuning of a step-distilled model, for comparison: what D-OPSD is measured against.

    python examples/train_sft.py --pretrained_model_name_or_path ... --instance_data_dir ... --output_dir ...

Flow matching on the training images (SFT); with --class_prompt also on images that the model itself drew of that prompt
(DreamBooth's prior preservation). LoRA layers, optimiser, data, captions and output are those of train_dopsd_lora.py; with
--full, all weights train and the output is that of train_dopsd_full.py.
"""

import argparse
import sys
from pathlib import Path

import torch
from diffusers.training_utils import generate_aspect_ratio_buckets
from tqdm.auto import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_dopsd_full as full  # noqa: E402
import train_dopsd_lora as dopsd  # noqa: E402
from pipeline_dopsd import family_of  # noqa: E402


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    dopsd.add_model_arguments(parser)
    dopsd.add_data_arguments(parser)
    dopsd.add_dopsd_arguments(parser)
    dopsd.add_lora_arguments(parser)
    dopsd.add_training_arguments(parser)
    dopsd.add_output_arguments(parser)
    full.add_full_arguments(parser)
    parser.add_argument("--full", action="store_true", help="Train all weights instead of a LoRA.")
    parser.add_argument("--class_prompt", nargs="+", help="DreamBooth: prompts of the images that preserve the prior.")
    parser.add_argument("--num_class_images", type=int, default=100)
    parser.add_argument("--prior_loss_weight", type=float, default=1.0)
    args = parser.parse_args(input_args)
    dopsd.check_arguments(parser, args)
    args.lora_alpha = args.lora_alpha or args.rank
    return args


def shift_of(pipeline, latents, num_steps):
    """The shift s of the schedule sigma = s u / (1 + (s - 1) u), read off the second point of the inference grid."""
    pipeline.few_step_grid(num_steps, latents)
    sigma, u = pipeline.scheduler.sigmas[1].item(), 1 - 1 / num_steps
    return sigma * (1 - u) / (u * (1 - sigma))


def flow_matching_loss(pipeline, latents, contexts, rng, shift):
    """|| v_theta(x_s, s, c) - (noise - x0) ||^2 at times drawn over the whole schedule."""
    u = torch.rand(len(latents), generator=rng)
    sigmas = (shift * u / (1 + (shift - 1) * u)).to(latents.device)
    noise = torch.randn(latents.shape, generator=rng).to(latents.device)
    s = sigmas.view(-1, 1, 1, 1)
    states = (1 - s) * latents + s * noise
    velocity = pipeline.velocity(pipeline.transformer, states, 1000 * sigmas, contexts)
    return torch.nn.functional.mse_loss(velocity, noise - latents)


@torch.no_grad()
def encode(pipeline, images, captions):
    """Latents (N, C, h, w) of PIL `images` and, for each, the text contexts of its captions."""
    pixels = (pipeline.image_processor.preprocess(image).to(pipeline.device, pipeline.vae.dtype) for image in images)
    return torch.cat([pipeline.image_latents(image).float() for image in pixels]), [pipeline.encode_student(texts) for texts in captions]


def draw(latents, contexts, batch_size, rng):
    picks = torch.randint(len(latents), (batch_size,), generator=rng).tolist()
    captions = [contexts[i][int(torch.randint(len(contexts[i]), (1,), generator=rng))] for i in picks]
    return latents[picks], captions


def main(args):
    accelerator = dopsd.make_accelerator(args)
    family = family_of(args.pretrained_model_name_or_path)
    pipeline = family.from_pretrained(args.pretrained_model_name_or_path, dtype=dopsd.weight_dtype_of(args))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(accelerator.device)
    for module in (pipeline.vae, pipeline.text_encoder, pipeline.transformer):
        module.requires_grad_(False)

    buckets = generate_aspect_ratio_buckets(args.resolution, divisibility=family.size_multiple(pipeline.vae.config))
    dataset = dopsd.inspect_images(dopsd.read_dataset(args), buckets[:1])
    instance = encode(pipeline, [dopsd.training_image(row) for row in dataset], dataset["captions"])
    if args.class_prompt:
        size = {"height": args.resolution, "width": args.resolution, "num_inference_steps": args.rollout_steps}
        prompts = [args.class_prompt[i % len(args.class_prompt)] for i in range(args.num_class_images)]
        generators = [torch.Generator().manual_seed(args.seed + i) for i in range(len(prompts))]
        drawn = [pipeline(p, generator=g, **size).images[0] for p, g in zip(prompts, generators)]
        prior = encode(pipeline, drawn, [[prompt] for prompt in prompts])

    targets = None if args.full else dopsd.find_lora_targets(pipeline, args)
    if args.full:
        full.make_trainable(pipeline, args)
    else:
        dopsd.add_lora(pipeline, targets, args)
    parameters = [p for p in pipeline.transformer.parameters() if p.requires_grad]
    optimizer = full.make_full_optimizer(parameters, args)
    lr_scheduler = dopsd.make_lr_scheduler(optimizer, args)
    shift = shift_of(pipeline, instance[0], args.rollout_steps)
    for step in tqdm(range(args.max_train_steps), desc="SFT steps", mininterval=5):
        rng = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        with accelerator.autocast():
            loss = flow_matching_loss(pipeline, *draw(*instance, args.train_batch_size, rng), rng, shift)
            if args.class_prompt:
                loss_prior = flow_matching_loss(pipeline, *draw(*prior, args.train_batch_size, rng), rng, shift)
                loss = loss + args.prior_loss_weight * loss_prior
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or torch.inf)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad(set_to_none=True)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    if args.full:
        args.num_inference_steps = args.num_inference_steps or family.default_num_inference_steps
        full.save_pipeline(pipeline.transformer, family, args)
    else:
        dopsd.save_lora(pipeline, pipeline.transformer, targets, args)


if __name__ == "__main__":
    main(parse_args())
