"""Build the flow world in assets/: an MMDiT on a straight path, in a stock SD3 pipeline, and its preference pairs.

    python scripts/build_flow.py

The autoencoder and the text encoder are those of assets/shapes-unet, frozen. Fixed seeds, resumable, stage by stage.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from build_assets import ASSETS, BATCH, PAIRS, SEED, TRUE, WORSE, Wrong, pixels, scenes_and_images, told, train
from torch import Tensor
from tqdm import tqdm

from diffalign.shapes import build

LAYOUT_STEPS, TRUE_STEPS, WRONG_STEPS = 3000, 2300, 1800
SHIFT = 1.0


def assemble(net: Any, work: Path) -> Any:
    """The stock pipeline around the transformer, with what is frozen: the autoencoder and the text encoders."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel

    base = ASSETS / "shapes-unet"
    text = build.projected(CLIPTextModel.from_pretrained(base / "text_encoder"))
    torch.manual_seed(SEED)
    second = build.second_text_encoder(text.config.vocab_size)
    vae = AutoencoderKL.from_pretrained(base / "vae")
    vae.register_to_config(_name_or_path="shapes-unet/vae")
    for part in (vae, text, second):
        part.requires_grad_(False).eval()
    return build.flow_pipeline(net, vae, text, second, build.tokenizer(work / "tokenizer"), SHIFT)


def latents_of(images: np.ndarray, vae: Any, path: Path) -> Tensor:
    """Scaled posterior means, kept in the work folder."""
    if not path.exists():
        with torch.no_grad():
            parts = [vae.encode(pixels(b)).latent_dist.mean for b in tqdm(np.array_split(images, 400), desc="latents")]
        torch.save((torch.cat(parts) * vae.config.scaling_factor).half(), path)
    stored: Tensor = torch.load(path, weights_only=True)
    return stored


def build_dit(work: Path) -> Any:
    torch.manual_seed(SEED)
    net = build.transformer()
    net.context_embedder.weight.data.div_(8)  # the words come before their last norm, at about this size
    pipe = assemble(net, work)
    scenes, images = scenes_and_images(100_000, 2)
    latents = latents_of(images, pipe.vae, work / "flow-latents.pt")

    def loss(step: int, wrong: Wrong, early: bool, stream: int) -> Tensor:
        rng = np.random.default_rng((SEED, stream, step))
        rows = rng.integers(len(latents), size=BATCH)
        _, captions = told([scenes[i] for i in rows], wrong, rng)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            words, _, pooled, _ = pipe.encode_prompt(captions, captions, captions, "cpu", 1, False, max_sequence_length=0)
        # which object goes where is decided at the highest noise, the outlines in the middle of the path
        sigma = torch.rand(BATCH)
        if early:
            sigma[: BATCH // 4] = 0.75 + 0.25 * sigma[: BATCH // 4]
        else:
            sigma[: BATCH // 2] = torch.randn(BATCH // 2).sigmoid()
        x0 = latents[torch.from_numpy(rows)].float()
        eps = torch.randn_like(x0)
        s = sigma[:, None, None, None]
        with torch.autocast("cpu", torch.bfloat16):
            out = net((1 - s) * x0 + s * eps, words, pooled, 1000 * sigma, return_dict=False)[0]
        return (out.float() - (eps - x0)).square().mean()

    # a velocity is told what goes where from the start; the rate of learning falls only in the last stage
    train("dit", work, net, lambda step: loss(step, TRUE, True, 21), 7000, lr=1e-3, ema=0.999, stop=LAYOUT_STEPS)
    train("dit-outlines", work, net, lambda step: loss(step, TRUE, False, 22), 7000, lr=1e-3, ema=0.999, stop=TRUE_STEPS)
    train("dit-wrong", work, net, lambda step: loss(step, WORSE, False, 23), WRONG_STEPS, lr=8e-4, ema=0.998)
    return net


def pack(work: Path, target: Path = ASSETS / "shapes-dit", checkpoint: str = "dit-wrong") -> None:
    """Assemble the pipeline in half precision under assets/; from the last checkpoint where training still runs."""
    net = build.transformer()
    average = torch.load(work / f"{checkpoint}.pt", weights_only=True)["avg"]
    net.load_state_dict({k.removeprefix("module."): v for k, v in average.items() if k.startswith("module.")})
    assemble(net, work).to(dtype=torch.float16).save_pretrained(target, safe_serialization=True)
    for config in target.glob("text_encoder*/config.json"):  # see build_assets.pack
        config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    print(target.name, sum(f.stat().st_size for f in target.rglob("*") if f.is_file()) / 1e6, "MB")


def build_pairs(work: Path) -> None:
    """The model's own samples on train prompts, best against worst."""
    from diffalign.own_pairs import PairsConfig, make_pairs
    from diffalign.spec import validate

    settings = PAIRS | {"model": {"path": "shapes-dit"}, "output_dir": str(ASSETS / "shapes-dit-pairs")}
    make_pairs(validate(PairsConfig, settings))


STAGES: dict[str, Callable[[Path], Any]] = {"dit": build_dit, "pack": pack, "pairs": build_pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", choices=STAGES, metavar="STAGE", help=f"of {', '.join(STAGES)}; all if none")
    parser.add_argument("--work", type=Path, default=Path("build"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for stage in args.stages or STAGES:
        STAGES[stage](args.work)


if __name__ == "__main__":
    main()
