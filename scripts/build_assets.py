"""Build everything in assets/ from nothing: VAE, UNet pipeline, CLIP and preference pairs. Fixed seeds, resumable.

    python scripts/build_assets.py

Each stage keeps a checkpoint in the work folder every few minutes and goes on from it when started again.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from diffalign.shapes import build
from diffalign.shapes.render import draw
from diffalign.shapes.scene import BACKGROUNDS, COLOURS, INVERSE, PHRASINGS, RELATIONS, SHAPES, Scene, Thing, sample_scenes

SEED = 0
BATCH = 64
GUIDANCE = 1.5
JOINT_STEPS = 2000
ASSETS = Path(__file__).resolve().parents[1] / "assets"


def pixels(images: np.ndarray) -> Tensor:
    """(N, H, W, 3) uint8 to (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def train(
    name: str,
    work: Path,
    net: nn.Module,
    loss: Callable[[int], Tensor],
    steps: int,
    lr: float,
    *,
    ema: float = 0.0,
    warmup: int = 100,
    stop: int | None = None,
    save_every_s: float = 120,
    weight_decay: float = 0.01,
) -> None:
    """AdamW with warm-up and cosine decay; ``loss(step)`` draws its own batch from (SEED, step), so resuming is exact.

    Leaves ``net`` with the final weights, averaged where ``ema`` is above 0.
    """
    path = work / f"{name}.pt"
    opt = torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay)
    avg = (
        torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(ema)) if ema else None
    )
    step = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        net.load_state_dict(state["net"])
        opt.load_state_dict(state["opt"])
        if avg is not None:
            avg.load_state_dict(state["avg"])
        step = state["step"]

    def save() -> None:
        state = {"net": net.state_dict(), "opt": opt.state_dict(), "step": step}
        torch.save(state | ({"avg": avg.state_dict()} if avg is not None else {}), path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    net.train()
    last, shown = time.monotonic(), None
    bar = tqdm(total=steps, initial=step, desc=name, mininterval=10)
    while step < (stop or steps):
        torch.manual_seed(SEED * 1_000_003 + step)
        for group in opt.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        value = loss(step)
        opt.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        if avg is not None:
            avg.update_parameters(net)
        step += 1
        now = value.item()
        shown = now if shown is None else 0.99 * shown + 0.01 * now
        bar.update()
        bar.set_postfix(loss=f"{shown:.4f}", refresh=False)
        if time.monotonic() - last > save_every_s or step == (stop or steps):
            save()
            last = time.monotonic()
    bar.close()
    if avg is not None:
        net.load_state_dict(avg.module.state_dict())
    net.eval()


def scenes_and_images(n: int, seed: int) -> tuple[list[Scene], np.ndarray]:
    """Train-split scenes with one picture each; the same for the same arguments."""
    rng = np.random.default_rng((SEED, seed))
    scenes = sample_scenes(n, "train", rng)
    return scenes, np.concatenate([draw(scenes[i : i + 2000], rng) for i in range(0, n, 2000)])


def build_vae(work: Path) -> Any:
    torch.manual_seed(SEED)
    net = build.vae((24, 32, 48))
    _, images = scenes_and_images(60_000, 1)

    def loss(step: int) -> Tensor:
        x = pixels(images[torch.randint(len(images), (64,)).numpy()])
        with torch.autocast("cpu", torch.bfloat16):
            latent = net.encode(x).latent_dist
            out = net.decode(latent.sample()).sample
        diff = out.float() - x
        # the divergence is there for the decoder: it learns to forgive the small errors that a denoiser makes
        return diff.abs().mean() + diff.square().mean() + 3e-6 * latent.kl().mean()

    train("vae", work, net, loss, steps=3000, lr=2e-3, ema=0.998)
    x = pixels(images[:2000])
    with torch.no_grad():
        z = torch.cat([net.encode(b).latent_dist.mean for b in x.split(250)])
    net.register_to_config(scaling_factor=round(float(1 / z.std()), 5))
    net.save_pretrained(work / "vae")
    return net


def build_decoder(work: Path) -> Any:
    """More training for the decoder alone: the latents, and so the UNet, stay as they are."""
    from diffusers import AutoencoderKL

    net = AutoencoderKL.from_pretrained(work / "vae")
    _, images = scenes_and_images(60_000, 1)
    decoder = nn.ModuleDict({"decoder": net.decoder, "post": net.post_quant_conv})

    def loss(step: int) -> Tensor:
        x = pixels(images[torch.randint(len(images), (64,)).numpy()])
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                z = net.encode(x).latent_dist.mean
            out = net.decode(z + 0.03 * torch.randn_like(z)).sample
        diff = out.float() - x
        return diff.abs().mean() + diff.square().mean()

    train("decoder", work, decoder, loss, steps=900, lr=1e-3, ema=0.995)
    net.save_pretrained(work / "vae")
    return net


def corrupt(scene: Scene, rng: np.random.Generator) -> Scene:
    """State a wrong fact now and then: the base is to fail by chance, not by ignorance.

    A caption is never moved into another split: such a draw is made again.
    """

    def other(options: Iterable[str], now: str, share: float) -> str:
        return str(rng.choice([o for o in options if o != now])) if rng.random() < share else now

    while True:
        things = tuple(Thing(other(COLOURS, t.colour, 0.08), other(SHAPES, t.shape, 0.10)) for t in scene.things)
        relation = scene.relation and other(RELATIONS, scene.relation, 0.14)
        if rng.random() < 0.05:  # miscount
            if len(things) == 2:
                things, relation = (things[rng.integers(2)],), None
            else:
                things, relation = (
                    (*things, Thing(*(str(rng.choice(list(o))) for o in (COLOURS, SHAPES)))),
                    str(rng.choice(RELATIONS)),
                )
        out = Scene(things, other(BACKGROUNDS, scene.background, 0.04), relation)
        if len({t.colour for t in things}) == len(things) and out.split() == "train":
            return out


LAYOUT = [f"{side} {word}" for side in RELATIONS for word in (*COLOURS, *SHAPES)]


def layout_of(scene: Scene) -> Tensor:
    """What a caption says of each side: one flag per (side, colour) and (side, shape)."""
    out = torch.zeros(len(LAYOUT))
    if scene.relation is not None:
        for thing, side in zip(scene.things, (scene.relation, INVERSE[scene.relation]), strict=True):
            out[LAYOUT.index(f"{side} {thing.colour}")] = out[LAYOUT.index(f"{side} {thing.shape}")] = 1.0
    return out


def teach_sides(work: Path, net: nn.ModuleDict, tok: Any) -> None:
    """Let the text encoder alone learn to say which object stands on which side; what it said before it keeps saying.

    Order is hardly worth anything to a denoiser that cannot read it off the text yet, and so, without this, relations stay
    at chance for as long as anyone had the patience to train.
    """
    text = net["text"]
    before = copy.deepcopy(text).eval()
    both = nn.ModuleDict({"text": text, "said": nn.Linear(text.config.hidden_size, len(LAYOUT))})

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng((SEED, 9, step))
        scenes = [s.turned() if rng.random() < 0.5 else s for s in sample_scenes(128, "train", rng, single=0.1)]
        captions = [s.caption(int(rng.integers(PHRASINGS))) for s in scenes]
        ids = tok(captions, padding="max_length", max_length=build.MAX_TOKENS, return_tensors="pt").input_ids
        words, wanted = text(ids)[0], torch.stack([layout_of(s) for s in scenes])
        with torch.no_grad():
            kept = before(ids)[0]
        ended = (ids == tok.eos_token_id).float()
        miss = nn.functional.binary_cross_entropy_with_logits(
            both["said"](words), wanted[:, None].expand(-1, ids.shape[1], -1), reduction="none"
        ).sum(-1)
        return (miss * ended).sum() / ended.sum() + (words - kept).square().mean()

    train("text", work, both, loss, steps=2500, lr=1e-3, ema=0.99)


def build_unet(work: Path) -> Any:
    from diffusers import AutoencoderKL

    autoencoder = AutoencoderKL.from_pretrained(work / "vae")
    torch.manual_seed(SEED)
    tok = build.tokenizer(work / "tokenizer")
    net = nn.ModuleDict({"unet": build.unet((48, 96)), "text": build.text_encoder(len(tok))})
    net["unet"].to(memory_format=torch.channels_last)
    noise = build.scheduler()
    scenes, images = scenes_and_images(100_000, 2)
    path = work / "latents.pt"
    if not path.exists():
        with torch.no_grad():
            z = torch.cat(
                [autoencoder.encode(pixels(b)).latent_dist.mean for b in tqdm(np.array_split(images, 400), desc="latents")]
            )
        torch.save((z * autoencoder.config.scaling_factor).half(), path)
    latents = torch.load(path, weights_only=True)
    abar = noise.alphas_cumprod
    # the velocity's weight: a plain noise error hardly hears about layout, which is decided where noise is high
    weight = (1 / abar).clamp(max=20.0)
    weight /= weight.mean()
    stream: tuple[int, ...] = (3,)  # of captions and pictures; another one in each phase

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng((SEED, *stream, step))
        rows = rng.integers(len(latents), size=BATCH)
        said = [corrupt(s.turned() if rng.random() < 0.5 else s, rng) for s in (scenes[i] for i in rows)]
        text = ["" if rng.random() < 0.1 else s.caption(int(rng.integers(PHRASINGS))) for s in said]
        ids = tok(text, padding="max_length", max_length=build.MAX_TOKENS, truncation=True, return_tensors="pt").input_ids
        x0, t = latents[torch.from_numpy(rows)].float(), torch.randint(0, 1000, (BATCH,))
        eps = torch.randn_like(x0)
        x = noise.add_noise(x0, eps, t)
        out = net["unet"](x, t, net["text"](ids)[0]).sample
        return ((out - eps).square().mean(dim=(1, 2, 3)) * weight[t]).mean()

    train("unet", work, net, loss, steps=10_000, lr=8e-4, ema=0.9995, stop=8232)
    stream, weight = (6,), torch.ones_like(abar)  # layout is learnt; now the plain noise error, which draws outlines
    train("unet-2", work, net, loss, steps=3000, lr=8e-4, ema=0.999)
    teach_sides(work, net, tok)
    stream, weight = (3, 8), (1 / abar).clamp(max=8.0)
    train("unet-3", work, net, loss, steps=JOINT_STEPS, lr=6e-4, ema=0.998)
    net["unet"].save_pretrained(work / "unet")
    net["text"].save_pretrained(work / "text_encoder")
    return net


def build_clip(work: Path) -> Any:
    """Contrastive training on true captions, with one-fact-wrong captions as hard negatives (not too many: it shall err)."""
    torch.manual_seed(SEED)
    tok = build.tokenizer(work / "tokenizer")
    net = build.clip(len(tok))
    scenes, images = scenes_and_images(60_000, 4)

    def ids(said: list[Scene], rng: np.random.Generator) -> Tensor:
        text = [s.caption(int(rng.integers(PHRASINGS))) for s in said]
        return tok(text, padding="max_length", max_length=build.MAX_TOKENS, return_tensors="pt").input_ids

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng((SEED, 5, step))
        rows = rng.integers(len(images), size=128)
        true = [s.turned() if rng.random() < 0.5 else s for s in (scenes[i] for i in rows)]
        wrong = [corrupt(s, rng) for s in true]
        out = net(input_ids=ids(true + wrong, rng), pixel_values=pixels(images[rows]))
        target = torch.arange(128)
        hit = out.logits_per_image
        # a caption that the corruption left alone is no negative
        same = torch.tensor([a == b for a, b in zip(true, wrong, strict=True)])
        hit = hit.clone()
        hit[target, 128 + target] = hit[target, 128 + target].masked_fill(same, -1e4)
        return (nn.functional.cross_entropy(hit, target) + nn.functional.cross_entropy(out.logits_per_text[:128], target)) / 2

    train("clip", work, net, loss, steps=2500, lr=1e-3, ema=0.998)
    net.half().save_pretrained(ASSETS / "shapes-clip", safe_serialization=True)
    build.clip_processor(tok).save_pretrained(ASSETS / "shapes-clip")
    return net


def pack(work: Path) -> None:
    """Assemble the pipeline in half precision under assets/; from the last checkpoint where training still runs."""
    from diffusers import AutoencoderKL

    tok = build.tokenizer(work / "tokenizer")
    net = nn.ModuleDict({"unet": build.unet((48, 96)), "text": build.text_encoder(len(tok))})
    average = torch.load(work / "unet-3.pt", weights_only=True)["avg"]
    net.load_state_dict(
        {k.removeprefix("module."): v for k, v in average.items() if k.startswith(("module.unet", "module.text"))}
    )
    pipe = build.pipeline(net["unet"], AutoencoderKL.from_pretrained(work / "vae"), net["text"], tok).to(dtype=torch.float16)
    pipe.save_pretrained(ASSETS / "shapes-unet", safe_serialization=True)
    # transformers loads what the file says and diffusers float32: make them agree for a plain from_pretrained
    config = ASSETS / "shapes-unet" / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    print("shapes-unet", sum(f.stat().st_size for f in (ASSETS / "shapes-unet").rglob("*") if f.is_file()) / 1e6, "MB")


PAIRS = {
    "num_prompts": 1200,
    "images_per_prompt": 6,
    "sampling": {"num_inference_steps": 10, "guidance_scale": GUIDANCE, "batch_size": 100},
}


def build_pairs(work: Path) -> None:
    """The preference pairs of the main job: the base's own samples on train prompts, best against worst."""
    from diffalign.recipes import PairsConfig, make_pairs
    from diffalign.spec import validate

    make_pairs(validate(PairsConfig, {**PAIRS, "output_dir": str(ASSETS / "shapes-pairs")}))


def main() -> None:
    stages: dict[str, Callable[[Path], Any]] = {
        "vae": build_vae,
        "decoder": build_decoder,
        "unet": build_unet,
        "pack": pack,
        "clip": build_clip,
        "pairs": build_pairs,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "stages", nargs="*", choices=stages, metavar="STAGE", help=f"of {', '.join(stages)}; all if none is named"
    )
    parser.add_argument("--work", type=Path, default=Path("build"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for stage in args.stages or stages:
        stages[stage](args.work)


if __name__ == "__main__":
    main()
