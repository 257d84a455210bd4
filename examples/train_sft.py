"""Ordinary fine-tuning of a step-distilled model, for comparison: what D-OPSD is measured against.

    python examples/train_sft.py --pretrained_model_name_or_path ... --instance_data_dir ... --output_dir ...

Flow matching on the training images (SFT), cropped to squares; with --class_prompt also on images that the model
itself drew of that prompt (DreamBooth's prior preservation). LoRA layers, optimiser, data, captions and output are
those of train_dopsd_lora.py; with --full, all weights train and the output is that of train_dopsd_full.py. Of their
flags, only those that do here what they do there are taken. It runs in one process.
"""

import itertools
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_dopsd_lora as dopsd  # first: it silences what libraries say while they are imported


# isort: split
import diffusers
import torch
import transformers
from accelerate.utils import send_to_device
from diffusers.training_utils import free_memory
from tqdm.auto import tqdm

import train_dopsd_full as full


# flags of both training scripts, of a LoRA and of all weights that are honoured here
COMMON = {
    "pretrained_model_name_or_path", "revision", "variant", "encoder_quantization", "instance_data_dir", "dataset_name",
    "dataset_config_name", "image_column", "caption_column", "instance_prompt", "dataset_num_workers", "skip_broken_images",
    "resolution", "rollout_steps", "num_inference_steps",
    "train_batch_size", "gradient_accumulation_steps", "max_train_steps", "learning_rate", "lr_scheduler", "lr_warmup_steps",
    "lr_num_cycles", "lr_power", "optimizer", "use_8bit_adam", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon",
    "max_grad_norm", "prior_loss_weight", "gradient_checkpointing", "checkpointed_blocks", "compile_blocks", "mixed_precision",
    "allow_tf32", "seed", "output_dir",
}  # fmt: skip
LORA = {"rank", "lora_alpha", "use_rslora", "lora_layers", "quantization"}
FULL = {"stochastic_rounding"}
SAVINGS = "--gradient_checkpointing, --stochastic_rounding, --use_8bit_adam, a lower --resolution"


def parse_args(input_args=None):
    own = dopsd.ArgumentParser(add_help=False)
    own.add_argument("--full", action="store_true", help="Train all weights instead of a LoRA.")
    own.add_argument("--class_prompt", nargs="+", help="DreamBooth: prompts of the images that preserve the prior.")
    own.add_argument("--num_class_images", type=dopsd.COUNT, default=100, help="Images of the class prompts.")
    every = dopsd.ArgumentParser(parents=[own])
    for add in (dopsd.add_shared_arguments, dopsd.add_lora_arguments, full.add_full_arguments):
        add(every)
    every.set_defaults(prior_loss_weight=1.0)  # DreamBooth's
    honoured = COMMON | (FULL if own.parse_known_args(input_args)[0].full else LORA)
    parser = dopsd.ArgumentParser(
        description=__doc__.split("\n")[0], parents=[own], formatter_class=dopsd.HelpFormatter, allow_abbrev=False
    )
    for action in every._actions:
        if action.dest in honoured:
            parser._add_action(action)
    parser.parse_args(input_args)  # refuses what would do nothing here
    args = every.parse_args(input_args)  # the rest has defaults
    dopsd.check_arguments(every, args, sys.argv[1:] if input_args is None else input_args)
    if args.full:
        full.check_full_arguments(every, args)
    for name in ("prior_loss_weight", "num_class_images"):
        if not args.class_prompt and getattr(args, name) != every.get_default(name):
            parser.error(f"--{name} has no effect without --class_prompt")
    args.lora_alpha = args.lora_alpha or args.rank
    args.report_to, args.validation_steps = "none", 0
    return args


def shift_of(pipeline, latents, num_steps):
    """The shift s of the schedule sigma = s u / (1 + (s - 1) u), read off the second point of the inference grid."""
    # one step has no second point; the shift is that of two, or next to it
    num_steps = max(num_steps, 2)
    pipeline.few_step_grid(num_steps, latents)
    sigma, u = pipeline.scheduler.sigmas[1].item(), 1 - 1 / num_steps
    return sigma * (1 - u) / (u * (1 - sigma))


def draw(latents, contexts, count, rng, shift, device):
    """`count` examples on `device`: states x_s at times drawn over the whole schedule, contexts, sigmas s and
    velocities noise - x0."""
    picks = torch.randint(len(latents), (count,), generator=rng).tolist()
    captions = [contexts[i][int(torch.randint(len(contexts[i]), (1,), generator=rng))] for i in picks]
    latents = latents[picks]
    u = torch.rand(count, generator=rng)
    sigmas = shift * u / (1 + (shift - 1) * u)
    noise = torch.randn(latents.shape, generator=rng)
    s = sigmas.view(-1, 1, 1, 1)
    return send_to_device(((1 - s) * latents + s * noise, captions, sigmas, noise - latents), device)


def micro_batches(examples, size):
    """The `examples` of `draw` in parts of `size`: what is drawn for a step does not depend on how it is split."""
    return [[column[i : i + size] for column in examples] for i in range(0, len(examples[0]), size)]


def flow_matching_loss(pipeline, states, contexts, sigmas, velocities):
    """|| v_theta(x_s, s, c) - (noise - x0) ||^2, mean over elements."""
    velocity = pipeline.velocity(pipeline.transformer, states, 1000 * sigmas, contexts)
    return torch.nn.functional.mse_loss(velocity, velocities)


@torch.no_grad()
def encode(pipeline, images, captions):
    """Latents (N, C, h, w) of PIL `images`, taken one after another, and, for each, the text contexts of its captions;
    on the CPU, as a GPU may not hold those of all data beside the training."""
    pixels = (pipeline.image_processor.preprocess(image).to(pipeline.device, pipeline.vae.dtype) for image in images)
    latents = torch.cat([pipeline.image_latents(image).float().cpu() for image in pixels])
    contexts = {}
    # a prompt of many images is encoded and held once
    for text in dict.fromkeys(itertools.chain(*captions)):
        contexts[text] = {name: tensor.cpu() for name, tensor in pipeline.encode_student([text])[0].items()}
    return latents, [[contexts[text] for text in texts] for texts in captions]


def check_inputs(args, accelerator):
    """Everything that can be known to be wrong before weights load. Returns the lock of OUTPUT_DIR, family, dataset
    and the LoRA's layers.

    Raises:
        ValueError: with one sentence that names the flag or file.
    """
    if accelerator.num_processes > 1:
        raise ValueError("train_sft.py runs in one process: launch it with python.")
    full.check_full_inputs(args, accelerator) if args.full else dopsd.check_packages(args)
    lock, folder = dopsd.open_output_dir(args), Path(args.output_dir)
    # without checkpoints there is nothing to go on from, and whose files they are cannot be told
    there = [*dopsd.list_checkpoints(folder), *dopsd.results_in(folder), *folder.glob("transformer")]
    if there:
        raise ValueError(f"--output_dir {folder} holds {there[0].name}; choose another folder.")
    family, buckets = dopsd.check_base(args)
    dataset = dopsd.inspect_images(dopsd.read_dataset(args), buckets[:1], args)
    base = args.pretrained_model_name_or_path, args.revision
    args.num_inference_steps = args.num_inference_steps or family.steps_of(*base)
    planned = dopsd.build_without_weights(family, args)
    return lock, family, dataset, None if args.full else dopsd.find_lora_targets(planned, args)


def encode_data(pipeline, family, dataset, args, accelerator):
    """What `encode` makes of the training images and, with --class_prompt, of those that the model draws of it."""
    quantization = dopsd.quantization_config("text_encoder", args.encoder_quantization, transformers)
    encoders = dopsd.load_pipeline(family, args, quantization, transformer=None).to(accelerator.device)
    encoders.set_progress_bar_config(disable=True)
    data = [encode(encoders, (dopsd.training_image(row) for row in dataset), dataset["captions"][:])]
    if args.class_prompt:
        encoders.transformer = pipeline.transformer.to(accelerator.device)
        size = {"height": args.resolution, "width": args.resolution, "num_inference_steps": args.num_inference_steps}
        prompts = [args.class_prompt[i % len(args.class_prompt)] for i in range(args.num_class_images)]
        generators = [torch.Generator().manual_seed(args.seed + i) for i in range(len(prompts))]
        drawn = (encoders(p, generator=g, **size).images[0] for p, g in zip(prompts, generators))
        data.append(encode(encoders, drawn, [[prompt] for prompt in prompts]))
    return data


def main(args):
    accelerator = dopsd.make_accelerator(args)
    try:
        lock, family, dataset, targets = check_inputs(args, accelerator)
    except (ValueError, OSError) as error:
        raise dopsd.InputError(error) from error
    with dopsd.explain_failures("--encoder_quantization int8 or nf4, a lower --resolution", args.output_dir):
        quantization = dopsd.quantization_config("transformer", args.quantization, diffusers)
        pipeline = dopsd.load_for_training(family, args, quantization)
        data = encode_data(pipeline, family, dataset, args, accelerator)
    free_memory()

    with dopsd.explain_failures(SAVINGS if args.full else dopsd.LORA_SAVINGS, args.output_dir):
        dopsd.place_for_training(pipeline, args, accelerator)
        if args.full:
            full.make_trainable(pipeline, args)
        else:
            dopsd.add_lora(pipeline, targets, args)
        parameters = [p for p in pipeline.transformer.parameters() if p.requires_grad]
        optimizer = full.make_full_optimizer(parameters, args)
        lr_scheduler = dopsd.make_lr_scheduler(optimizer, args)
        optimizer = accelerator.prepare(optimizer)
        shift = shift_of(pipeline, data[0][0], args.rollout_steps)
        count = args.train_batch_size * args.gradient_accumulation_steps
        for step in tqdm(range(args.max_train_steps), desc="SFT steps", mininterval=5):
            rng = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
            drawn = [draw(*examples, count, rng, shift, accelerator.device) for examples in data]
            losses = []
            # the prior's are the second, if there are any
            for examples, weight in zip(drawn, (1.0, args.prior_loss_weight)):
                for part in micro_batches(examples, args.train_batch_size):
                    with accelerator.autocast():
                        loss = flow_matching_loss(pipeline, *part)
                    accelerator.backward(loss * weight / args.gradient_accumulation_steps)
                    losses.append(loss.detach())
            grad_norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm or torch.inf)
            # with fp16 the gradient scaler skips a step whose gradient is not finite
            dopsd.check_finite(torch.stack(losses).tolist(), 0.0 if accelerator.scaler else grad_norm.item())
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad(set_to_none=True)
        with dopsd.blamed_on(f"--output_dir {args.output_dir}"):
            if args.full:
                full.save_pipeline(pipeline.transformer, family, args)
            else:
                dopsd.save_lora(pipeline, pipeline.transformer, targets, args, args.output_dir)
    dopsd.logger.info(f"The result is in {args.output_dir}.")
    lock.release()


if __name__ == "__main__":
    try:
        dopsd.run(main, parse_args())
    except KeyboardInterrupt:
        print("\nStopped. There is no checkpoint to go on from.", file=sys.stderr)
        sys.exit(130)
