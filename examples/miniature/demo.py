"""One picture and one table of a demo run at four steps, same seeds: before | after D-OPSD | after ordinary SFT | teacher.

    python examples/miniature/demo.py --concept arrow --dopsd outputs/demo/dopsd --sft outputs/demo/sft --picture demo.png
"""

import argparse

import numpy as np
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concept", default="arrow", choices=list(CONCEPTS))
    parser.add_argument("--dopsd", required=True, help="output folder of train_dopsd_lora.py")
    parser.add_argument("--sft", required=True, help="output folder of train_sft.py")
    parser.add_argument("--picture", default="demo.png")
    parser.add_argument("--seeds", type=int, default=4)
    args = parser.parse_args()

    judge, concept = Judge.from_pretrained(HERE / "judge"), CONCEPTS[args.concept]
    concept_prompts = captions(held_out_scenes(concept)[:ROWS], concept)
    prompts = concept_prompts + captions(unrelated_scenes(ROWS))
    pictures, lines = {}, []
    for name, lora in {"before": None, "D-OPSD": args.dopsd, "SFT": args.sft}.items():
        pipeline = load_pipeline(lora)
        pictures[name] = sample(pipeline, pipeline.encode_student(prompts), seed=0)
        results, _ = concept_accuracy(pipeline, judge, concept, range(args.seeds))
        kept = unrelated_accuracy(pipeline, judge, range(args.seeds))
        figures = f"{spread(kept['right'])} | {kept['detail']:.2f} | {kept['frechet']:.0f}"
        lines.append(f"| {name} | {spread([s for s, _ in results])} | {figures} |")

    pipeline = load_pipeline()
    pipeline.load_multimodal_encoder(str(HERE / "vlm"))
    results, drawn = concept_accuracy(pipeline, judge, concept, range(args.seeds), teacher_contexts(pipeline, concept))
    pictures["teacher"] = drawn[0][:ROWS]
    lines.append(f"| teacher, sees a picture | {spread([s for s, _ in results])} | | | |")
    pictures["trained on"] = training_pictures(concept)

    tile, left, top = 64 * ZOOM, 90, 40
    sheet = Image.new("RGB", (left + tile * len(prompts) + 20, top + tile * len(pictures)), "white")
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

    print(f"\nConcept {args.concept!r}, 4 steps, {args.seeds} seeds; per cent right, mean ± standard deviation over seeds")
    print("| | concept, held-out scenes | unrelated prompts | fine detail, unrelated | Frechet distance, unrelated |")
    print("|---|---|---|---|---|")
    print("\n".join(lines))
    print(f"Picture: {args.picture}")


if __name__ == "__main__":
    main()
