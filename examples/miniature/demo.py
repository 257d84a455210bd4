"""One picture and one table of a demo run at four steps, same seeds: before | after D-OPSD | after ordinary SFT |
teacher.

python examples/miniature/demo.py --concept arrow --dopsd outputs/demo/dopsd --sft outputs/demo/sft --picture demo.png
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from concepts import CONCEPTS, held_out_scenes, training_pictures, unrelated_scenes
from evaluate import (
    HERE,
    captions,
    concept_accuracy,
    load_pipeline,
    sample,
    spread,
    teacher_contexts,
    unrelated_accuracy,
)
from judge import Judge


ZOOM, ROWS = 2, 5


def look(name, lora, concept, seeds):
    """The pictures of a row, and the line of the table."""
    torch.set_num_threads(1)
    judge, pipeline = Judge.from_pretrained(HERE / "judge"), load_pipeline(lora)
    if name == "teacher":
        pipeline.load_multimodal_encoder(str(HERE / "vlm"))
        results, drawn = concept_accuracy(pipeline, judge, concept, range(seeds), teacher_contexts(pipeline, concept))
        return name, drawn[0][:ROWS], f"| teacher, sees a picture | {spread([s for s, _ in results])} | | | |"
    if lora:
        pipeline.fuse_lora()  # draws the same, faster
    prompts = captions(held_out_scenes(concept)[:ROWS], concept) + captions(unrelated_scenes(ROWS))
    pictures = sample(pipeline, pipeline.encode_student(prompts), seed=0)
    results, _ = concept_accuracy(pipeline, judge, concept, range(seeds))
    kept = unrelated_accuracy(pipeline, judge, range(seeds))
    figures = f"{spread(kept['right'])} | {kept['detail']:.2f} | {kept['frechet']:.0f}"
    return name, pictures, f"| {name} | {spread([s for s, _ in results])} | {figures} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concept", default="arrow", choices=list(CONCEPTS))
    parser.add_argument("--dopsd", required=True, help="output folder of train_dopsd_lora.py")
    parser.add_argument("--sft", required=True, help="output folder of train_sft.py")
    parser.add_argument("--picture", default="demo.png")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()

    concept, rows = CONCEPTS[args.concept], {"before": None, "D-OPSD": args.dopsd, "SFT": args.sft, "teacher": None}
    with ProcessPoolExecutor(2) as pool:
        looks = list(pool.map(look, rows, rows.values(), [concept] * len(rows), [args.seeds] * len(rows)))
    pictures = {name: own for name, own, _ in looks} | {"trained on": training_pictures(concept)}

    tile, left, top = 64 * ZOOM, 90, 40
    sheet = Image.new("RGB", (left + tile * 2 * ROWS + 20, top + tile * len(pictures)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=16)

    def paste(row, column, picture):
        gap = 20 if column >= ROWS else 0
        picture = Image.fromarray(np.asarray(picture)).resize((tile - 4, tile - 4), Image.Resampling.NEAREST)
        sheet.paste(picture, (left + tile * column + gap, top + tile * row))

    draw.text((left, 10), f'new scenes of the concept "{concept.word}", 4 steps', fill="black", font=font)
    draw.text((left + tile * ROWS + 20, 10), "unrelated prompts, 4 steps", fill="black", font=font)
    for row, (name, images) in enumerate(pictures.items()):
        draw.text((8, top + tile * row + tile // 2 - 8), name, fill="black", font=font)
        for column, image in enumerate(images):
            paste(row, column, image)
    sheet.save(args.picture)
    # for make report
    prompts = {"concept": held_out_scenes(concept)[: 2 * ROWS], "ordinary": unrelated_scenes()}
    for name, scenes in prompts.items():
        Path(args.picture).with_name(f"{name}_prompts.txt").write_text(
            "\n".join(captions(scenes, concept if name == "concept" else None)) + "\n"
        )

    print(
        f"\nConcept {args.concept!r}, 4 steps, {args.seeds} seeds; per cent right, mean ± standard deviation over seeds"
    )
    print("| | concept, held-out scenes | unrelated prompts | fine detail, unrelated | Frechet distance, unrelated |")
    print("|---|---|---|---|---|")
    print("\n".join(line for *_, line in looks))
    print(f"Picture: {args.picture}")


if __name__ == "__main__":
    main()
