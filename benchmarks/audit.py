"""Contact sheets of generated pictures with what the exact judge says of each, for an audit by eye.

python benchmarks/audit.py [--out runs/audit]

Each tile shows the picture, its number, its prompt and the facts that the judge denies. What a person sees otherwise is
listed in docs/world.md.
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw

COUNT, PER_SHEET, COLUMNS, SCALE = 200, 40, 8, 5


def main() -> None:
    from diffalign.building import build_model
    from diffalign.catalogue import shipped_configs
    from diffalign.data.images import to_pil
    from diffalign.evaluation import prompts_of
    from diffalign.models import ModelSpec
    from diffalign.recipes import TrainConfig, load
    from diffalign.sampling import generate
    from diffalign.shapes import judge
    from diffalign.shapes.second import second_judge

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/audit"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    settings = load(TrainConfig, shipped_configs()["shapes-dpo"]).evaluate.sampling
    prompts = prompts_of("shapes:test", COUNT, seed=200)
    pictures = to_pil(generate(build_model(ModelSpec(path="shapes-unet")), prompts, settings, seed=200)[:, 0])
    said = [p.text for p in prompts]
    first, second = judge(pictures, said), second_judge(pictures, said)
    for start in range(0, COUNT, PER_SHEET):
        sheet = Image.new("RGB", (COLUMNS * 190, PER_SHEET // COLUMNS * 250), "white")
        pen = ImageDraw.Draw(sheet)
        for n in range(start, start + PER_SHEET):
            x, y = (n - start) % COLUMNS * 190 + 8, (n - start) // COLUMNS * 250 + 4
            sheet.paste(pictures[n].resize((32 * SCALE, 32 * SCALE), Image.Resampling.NEAREST), (x, y))
            lines = textwrap.wrap(f"{n}: {said[n]}", 30)
            pen.text((x, y + 32 * SCALE + 2), "\n".join(lines), "black")
            denied = " ".join(k for k, ok in first[n].facts.items() if not ok) or "exact"
            differs = " ".join(k for k, ok in second[n].items() if ok != first[n].facts[k])
            pen.text((x, y + 32 * SCALE + 4 + 11 * len(lines)), f"not: {denied}" if denied != "exact" else denied, "red")
            pen.text((x, y + 32 * SCALE + 15 + 11 * len(lines)), f"second differs: {differs}" if differs else "", "blue")
        sheet.save(args.out / f"{start:03d}.png")
        print(args.out / f"{start:03d}.png")


if __name__ == "__main__":
    main()
