"""Builds the FLUX.2-klein miniature: the same world, VLM and latents, a Flux2Transformer2DModel that also takes reference images.

    python examples/miniature/build_klein.py all --work_dir build/miniature       # after build.py

Reads what build.py left in `--work_dir`. Rows of three kinds: a caption alone (`text`); a picture in the multimodal context
(`vlm`); a picture as reference image (`edit`). The base learns the first two from the paths from noise to picture of the
step-distilled Z-Image miniature, which takes far fewer steps than flow matching does from nothing, and the third by flow
matching. It is then step-distilled to the four states of klein's own grid, on those paths for all three.
"""

import json
import sys

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from diffusers.training_utils import compute_density_for_timestep_sampling
from PIL import Image
from tqdm import tqdm
from transformers import Qwen3ForCausalLM

import build
from build import Run, device, image_processor, load_vae, load_vlm, read_data, read_tokenizer


sys.path.insert(0, str(build.HERE.parents[1]))

from pipeline_dopsd import DOPSDFlux2KleinPipeline  # noqa: E402


# what each training batch holds, in turn: the data and how the picture is shown
CYCLE = (
    ("text", "text"), ("object", "edit"), ("object", "vlm"), ("style", "edit"),
    ("text", "text"), ("object", "vlm"), ("object", "edit"), ("style", "vlm"),
)  # fmt: skip
ROWS = {"text": 16384, "object": 16384, "style": 8192}
LAYERS, LENGTH = [1, 3, 4], 64


def new_pipeline(args, transformer=None):
    """DOPSDFlux2KleinPipeline of the miniature's VLM and VAE. The batch norm holds one mean and one variance for all channels:
    the latents are then those of the Z-Image miniature."""
    vlm, stock = load_vlm(args).cpu(), load_vae(args).cpu()
    text_encoder = Qwen3ForCausalLM(build.text_encoder_config(vlm))
    text_encoder.model.load_state_dict(vlm.model.language_model.state_dict())
    shared = ("down_block_types", "up_block_types", "block_out_channels", "latent_channels", "layers_per_block", "norm_num_groups",
              "use_quant_conv", "use_post_quant_conv")  # fmt: skip
    vae = AutoencoderKLFlux2(**{name: stock.config[name] for name in shared})
    vae.load_state_dict(stock.state_dict(), strict=False)
    vae.bn.running_mean.fill_(stock.config.shift_factor)
    vae.bn.running_var.fill_(stock.config.scaling_factor**-2 - vae.config.batch_norm_eps)
    return DOPSDFlux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=vae.eval(), text_encoder=text_encoder.eval(),
        tokenizer=read_tokenizer(args), transformer=transformer, text_encoder_out_layers=LAYERS, max_sequence_length=LENGTH,
    ).to(device())  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- data
@torch.no_grad()
def stage_contexts(args):
    """Text contexts of all rows, multimodal contexts and reference latents of the rows with pictures."""
    pipeline = new_pipeline(args)
    vlm = args.work_dir / "vlm" / "model"
    for part in (image_processor(), read_tokenizer(args)):
        part.save_pretrained(vlm)
    pipeline.load_multimodal_encoder(str(vlm))
    for kind, count in ROWS.items():
        _, reference, rows = read_data(args, kind)
        prompts = [row["prompt"] for row in rows[: args.rows(count)]]
        out = {"text": [], "vlm": [], "edit": []}
        for start in tqdm(range(0, len(prompts), 64), desc=f"contexts {kind}", mininterval=10):
            chunk = prompts[start : start + 64]
            out["text"] += [c["prompt_embeds"] for c in pipeline.encode_student(chunk)]
            if kind != "text":
                pictures = [Image.fromarray(p) for p in reference[start : start + len(chunk)]]
                out["vlm"] += [c["prompt_embeds"] for c in pipeline.encode_teacher(chunk, pictures)]
                out["edit"] += [pipeline.encode_references([p])["reference_0"] for p in pictures]
        torch.save({k: torch.stack(v).half() for k, v in out.items() if v}, args.work_dir / f"klein_contexts_{kind}.pt")


@torch.no_grad()
def stage_paths(args):
    """States of the step-distilled Z-Image miniature after each of its steps, (rows, 4, 8, 16, 16); row i starts at `noise_of(i)`."""
    transformer, data, sigmas = build.load_transformer(args, "distilled"), build.read_encoded(args), build.grid(4)
    for kind, count in ROWS.items():
        contexts, states = data[kind]["contexts"][: args.rows(count)], {}
        order = sorted(range(len(contexts)), key=lambda i: len(contexts[i]))  # equal lengths together: little padding
        for start in tqdm(range(0, len(order), 64), desc=f"paths {kind}", mininterval=10):
            rows = order[start : start + 64]
            x, chosen = torch.stack([noise_of(i) for i in rows]).to(device()), build.to_contexts([contexts[i] for i in rows])
            kept = []
            for k in range(4):
                velocity = build.velocity(transformer, x, sigmas[k].expand(len(rows)).to(device()), chosen)
                x = x + (sigmas[k + 1] - sigmas[k]) * velocity
                kept.append(x.half().cpu())
            states |= dict(zip(rows, torch.stack(kept, 1)))
        torch.save(torch.stack([states[i] for i in range(len(order))]), args.work_dir / f"klein_paths_{kind}.pt")


def noise_of(row):
    return torch.randn(8, 16, 16, generator=torch.Generator().manual_seed(row))


class Rows:
    """Batches of 64: contexts as the pipeline takes them, and points on the way from noise to picture."""

    def __init__(self, args, pipeline):
        load = lambda name: torch.load(args.work_dir / f"{name}.pt", mmap=True)  # noqa: E731
        self.contexts = {kind: load(f"klein_contexts_{kind}") for kind in ROWS}
        self.paths = {kind: load(f"klein_paths_{kind}") for kind in ROWS}
        self.pictures = {kind: load(f"latents_{kind}") for kind in ROWS}
        self.patchify = pipeline._patchify_latents

    def context(self, kind, way, picks):
        """One context per row of `picks`."""
        encoded = self.contexts[kind]
        contexts = [{"prompt_embeds": embeds} for embeds in encoded["vlm" if way == "vlm" else "text"][picks]]
        if way == "edit":
            for context, latents in zip(contexts, encoded["edit"][picks]):
                context["reference_0"] = latents
        return [{name: value.float().to(device()) for name, value in context.items()} for context in contexts]

    def path(self, kind, picks, sigmas):
        """State and velocity at `sigmas` (64,), on the straight pieces between the states of the Z-Image miniature."""
        knots = build.grid(4)
        states = torch.cat([torch.stack([noise_of(int(i)) for i in picks])[:, None], self.paths[kind][picks].float()], 1)
        j = torch.bucketize(-sigmas, -knots, right=True).clamp(1, 4)
        row = torch.arange(len(sigmas))
        wide = lambda values: values.view(-1, 1, 1, 1)  # noqa: E731
        velocity = (states[row, j - 1] - states[row, j]) / wide(knots[j - 1] - knots[j])
        at = states[row, j] + wide(sigmas - knots[j]) * velocity
        return self.patchify(at).to(device()), self.patchify(velocity).to(device())


def velocity(pipeline, transformer, latents, sigmas, contexts):
    with torch.autocast(device().type, torch.bfloat16):
        return pipeline.velocity(transformer, latents, 1000 * sigmas.to(device()), contexts)


# ------------------------------------------------------------------------------------------------- base and distillation
def new_transformer(args):
    torch.manual_seed(args.seed)
    return Flux2Transformer2DModel(
        in_channels=32, num_layers=2, num_single_layers=5, attention_head_dim=32, num_attention_heads=6,
        joint_attention_dim=len(LAYERS) * 128, axes_dims_rope=(8, 8, 8, 8), guidance_embeds=False,
    )  # fmt: skip


def stage_base(args):
    """Paths of the Z-Image miniature for captions and multimodal contexts, flow matching for reference images."""
    pipeline = new_pipeline(args)
    rows, transformer = Rows(args, pipeline), build.compiled(new_transformer(args))
    run = Run(args, "klein_base", transformer, max(4, int(args.base_steps * args.scale)), 1.5e-3, ema_decay=0.998)
    logs = {pair: [] for pair in CYCLE}

    def loss_of(rng):
        kind, way = pair = CYCLE[run.step % len(CYCLE)]
        picks = rng.integers(len(rows.paths[kind]), size=64)
        u = compute_density_for_timestep_sampling("logit_normal", 64, logit_mean=0.0, logit_std=1.0)
        sigmas = 5 * u / (1 + 4 * u)  # the few steps of klein's grid all lie above 0.7
        if way == "edit":
            x0 = rows.patchify(rows.pictures[kind][picks].float()).to(device())
            noise, s = torch.randn_like(x0), sigmas.view(-1, 1, 1, 1).to(device())
            states, target = (1 - s) * x0 + s * noise, noise - x0
        else:
            states, target = rows.path(kind, picks, sigmas)
        loss = F.mse_loss(velocity(pipeline, transformer, states, sigmas, rows.context(kind, way, picks)), target)
        logs[pair].append(loss.item())
        return loss

    run.train(loss_of)
    build.save_transformer(transformer, run.path / "model")
    run.finish(**{" ".join(pair): round(float(np.mean(v[-50:])), 4) for pair, v in logs.items() if v})


def few_step_sigmas(pipeline):
    """The pipeline's own four sigmas for 64 x 64 pixels, and 0."""
    pipeline.few_step_grid(4, torch.empty(1, 32, 8, 8))
    return pipeline.scheduler.sigmas.float()


def stage_distill(args):
    """Regression of the secant velocity between neighbouring states of the few-step grid: four steps, no guidance."""
    pipeline = new_pipeline(args)
    rows, transformer = Rows(args, pipeline), build.load_transformer(args, "klein_base", Flux2Transformer2DModel)
    knots = few_step_sigmas(pipeline)
    run = Run(args, "klein_distilled", transformer, max(4, int(args.distill_steps * args.scale)), 1.2e-3, ema_decay=0.995)
    logs = {way: [] for way in ("text", "vlm", "edit")}

    def loss_of(rng):
        kind, way = CYCLE[run.step % len(CYCLE)]
        picks, k = rng.integers(len(rows.paths[kind]), size=64), torch.from_numpy(rng.integers(4, size=64))
        (x, _), (after, _) = (rows.path(kind, picks, knots[n]) for n in (k, k + 1))
        secant = (after - x) / (knots[k + 1] - knots[k]).view(-1, 1, 1, 1).to(device())
        loss = F.mse_loss(velocity(pipeline, transformer, x, knots[k], rows.context(kind, way, picks)), secant)
        logs[way].append(loss.item())
        return loss

    run.train(loss_of)
    build.save_transformer(transformer, run.path / "model")
    run.finish(**{way: round(float(np.mean(v[-50:])), 4) for way, v in logs.items() if v})


def stage_export(args):
    """`klein/` in fp16, in the Hub's layout of FLUX.2-klein."""
    folder = args.output_dir / "klein"
    pipeline = new_pipeline(args, Flux2Transformer2DModel.from_pretrained(args.work_dir / "klein_distilled" / "model"))
    for component in (pipeline.text_encoder, pipeline.vae, pipeline.transformer):
        component.half()
    pipeline.transformer.register_to_config(_name_or_path="")  # it would be a path of this machine
    pipeline.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "Flux2KleinPipeline"  # a base of the Hub names the stock class
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


STAGES = {
    "contexts": stage_contexts, "paths": stage_paths, "base": stage_base, "distill": stage_distill, "export": stage_export,
}  # fmt: skip


def main():
    parser = build.stage_parser(__doc__, STAGES)
    parser.add_argument("--base_steps", type=int, default=600)
    parser.add_argument("--distill_steps", type=int, default=2500)
    args = parser.parse_args()
    args.rows = lambda count: max(64, int(count * args.scale) // 64 * 64)
    build.run_stages(STAGES, args, prefix="klein_")


if __name__ == "__main__":
    main()
