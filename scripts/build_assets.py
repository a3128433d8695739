"""Build everything in assets/ from nothing: VAE, UNet pipeline, CLIP and preference pairs. Fixed seeds, resumable.

    python scripts/build_assets.py

Each stage keeps a checkpoint in the work folder every few minutes and goes on from it when started again.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from diffalign.shapes import build, second
from diffalign.shapes.render import draw, render, sample_layout, signed_distance
from diffalign.shapes.scene import BACKGROUNDS, COLOURS, INVERSE, PHRASINGS, RELATIONS, SHAPES, Scene, Thing, sample_scenes

SEED = 0
BATCH = 64
TRUE_STEPS, WEB_STEPS, OUTLINE_STEPS = 4500, 3000, 4000
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


@dataclass(frozen=True)
class Wrong:
    """How often a caption states each kind of fact wrongly."""

    colour: float = 0.0
    shape: float = 0.0
    count: float = 0.0
    relation: float = 0.0
    background: float = 0.0


# The base is to fail by chance, not by ignorance: it first learns the world, then that captions are not to be trusted.
TRUE, WEB = Wrong(), Wrong(colour=0.12, shape=0.04, count=0.05, relation=0.24, background=0.05)
WORSE = Wrong(colour=0.16, shape=0.12, count=0.07, relation=0.26, background=0.05)


def corrupt(scene: Scene, wrong: Wrong, rng: np.random.Generator) -> Scene:
    """State wrong facts now and then. A caption is never moved into another split: such a draw is made again."""

    def other(options: Iterable[str], now: str, share: float) -> str:
        return str(rng.choice([o for o in options if o != now])) if rng.random() < share else now

    while True:
        things = tuple(
            Thing(other(COLOURS, t.colour, wrong.colour), other(SHAPES, t.shape, wrong.shape)) for t in scene.things
        )
        relation = scene.relation and other(RELATIONS, scene.relation, wrong.relation)
        if rng.random() < wrong.count:
            if len(things) == 2:
                things, relation = (things[rng.integers(2)],), None
            else:
                things, relation = (
                    (*things, Thing(*(str(rng.choice(list(o))) for o in (COLOURS, SHAPES)))),
                    str(rng.choice(RELATIONS)),
                )
        out = Scene(things, other(BACKGROUNDS, scene.background, wrong.background), relation)
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


class Said(nn.Module):
    """A text encoder with a head that reads off its last tokens which object stands on which side.

    Order is hardly worth anything to a denoiser whose text does not tell it, and nothing teaches the text but the denoiser:
    without this head both wait for each other, and relations stay at chance.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.tok = tokenizer
        self.text = build.text_encoder(len(tokenizer))
        self.sides = nn.Linear(self.text.config.hidden_size, len(LAYOUT))

    def forward(self, captions: list[str], scenes: list[Scene]) -> tuple[Tensor, Tensor]:
        """The words (B, 20, D) and how badly the head reads the sides from them."""
        ids = self.tok(captions, padding="max_length", max_length=build.MAX_TOKENS, return_tensors="pt").input_ids
        words = self.text(ids)[0]
        wanted = torch.stack([layout_of(s) for s in scenes])[:, None].expand(-1, ids.shape[1], -1)
        miss = nn.functional.binary_cross_entropy_with_logits(self.sides(words), wanted, reduction="none").sum(-1)
        ended = (ids == self.tok.eos_token_id) & torch.tensor([bool(c) for c in captions])[:, None]
        return words, miss[ended].mean()


def told(scenes: Iterable[Scene], wrong: Wrong, rng: np.random.Generator) -> tuple[list[Scene], list[str]]:
    """What is said of pictures, from either side and in any wording; one caption in ten is dropped."""
    said = [corrupt(s.turned() if rng.random() < 0.5 else s, wrong, rng) for s in scenes]
    return said, ["" if rng.random() < 0.1 else s.caption(int(rng.integers(PHRASINGS))) for s in said]


def build_unet(work: Path) -> Any:
    from diffusers import AutoencoderKL

    autoencoder = AutoencoderKL.from_pretrained(work / "vae")
    torch.manual_seed(SEED)
    net = nn.ModuleDict({"unet": build.unet((48, 96)), "said": Said(build.tokenizer(work / "tokenizer"))})
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

    def words_only(step: int) -> Tensor:
        rng = np.random.default_rng((SEED, 6, step))
        miss: Tensor = net["said"](*reversed(told(sample_scenes(128, "train", rng, single=0.1), TRUE, rng)))[1]
        return miss

    def denoise(step: int, wrong: Wrong, layout: int, stream: int) -> Tensor:
        rng = np.random.default_rng((SEED, stream, step))
        rows = rng.integers(len(latents), size=BATCH)
        said, captions = told([scenes[i] for i in rows], wrong, rng)
        words, miss = net["said"](captions, said)
        # Which object goes where is decided at the highest noise, and x_t shows it soon after: the rows that teach layout
        # count errors of the clean image there (1 / abar). The plain noise error of the others draws the outlines.
        early = torch.arange(BATCH) < layout
        t = torch.where(early, torch.randint(700, 1000, (BATCH,)), torch.randint(0, 1000, (BATCH,)))
        x0 = latents[torch.from_numpy(rows)].float()
        eps = torch.randn_like(x0)
        out = net["unet"](noise.add_noise(x0, eps, t), t, words).sample
        error = (out - eps).square().mean(dim=(1, 2, 3))
        return (error * torch.where(early, 1 / abar[t], 1.0)).mean() + 0.05 * miss

    train("text", work, net["said"], words_only, steps=1500, lr=1e-3, ema=0.99)
    train("unet", work, net, lambda step: denoise(step, TRUE, BATCH // 2, 3), steps=TRUE_STEPS, lr=1e-3, ema=0.999)
    train("base", work, net, lambda step: denoise(step, WEB, BATCH // 4, 8), steps=WEB_STEPS, lr=8e-4, ema=0.998)
    # by now mistakes are made of crooked outlines; these are to become the rarer kind
    train("outlines", work, net, lambda step: denoise(step, WORSE, BATCH // 8, 11), steps=OUTLINE_STEPS, lr=8e-4, ema=0.999)
    return net


NEGATIVES = Wrong(colour=0.08, shape=0.10, count=0.05, relation=0.14, background=0.04)


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
        wrong = [corrupt(s, NEGATIVES, rng) for s in true]
        out = net(input_ids=ids(true + wrong, rng), pixel_values=pixels(images[rows]))
        target = torch.arange(128)
        hit = out.logits_per_image
        # a caption that the corruption left alone is no negative
        same = torch.tensor([a == b for a, b in zip(true, wrong, strict=True)])
        hit = hit.clone()
        hit[target, 128 + target] = hit[target, 128 + target].masked_fill(same, -1e4)
        return (nn.functional.cross_entropy(hit, target) + nn.functional.cross_entropy(out.logits_per_text[:128], target)) / 2

    train("clip", work, net, loss, steps=1500, lr=1e-3, ema=0.998)
    net.half().save_pretrained(ASSETS / "shapes-clip", safe_serialization=True)
    build.clip_processor(tok).save_pretrained(ASSETS / "shapes-clip")
    return net


def clutter(n: int, rng: np.random.Generator) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Pictures of up to four things, many of them between two shapes, and what is in each: arrays (n, 4).

    A thing between two shapes is called by the nearer one; one in seventeen is two outlines side by side and has no shape.
    """
    shape = np.where(rng.random((n, 4)) < 0.4, rng.integers(len(SHAPES), size=(n, 4)), -1)
    other = (np.maximum(shape, 0) + rng.integers(1, len(SHAPES), size=(n, 4))) % len(SHAPES)
    towards = np.where(rng.random((n, 4)) < 0.6, rng.uniform(0, 0.3, (n, 4)), 0).astype(np.float32)
    centre = np.array([[8, 8], [24, 8], [8, 24], [24, 24]], np.float32)
    at = (centre + rng.uniform(-2.5, 2.5, (n, 4, 2))).astype(np.float32)
    r = rng.uniform(3.2, 5.5, (n, 4)).astype(np.float32)
    rgb = np.array(list(COLOURS.values()), np.float32)[rng.integers(len(COLOURS), size=(n, 4))]
    rgb = np.clip(rgb + rng.normal(0, 10, rgb.shape), 0, 255).astype(np.float32)
    paper = np.array(list(BACKGROUNDS.values()), np.float32)[rng.integers(len(BACKGROUNDS), size=n)]
    odd = rng.random((n, 4)) < 0.06
    turn = rng.uniform(0, 2 * np.pi, (n, 4))
    aside = (1.1 * r[..., None] * np.stack([np.cos(turn), np.sin(turn)], -1)).astype(np.float32)
    grid = np.arange(32, dtype=np.float32) + 0.5
    out = np.broadcast_to(paper[:, None, None], (n, 32, 32, 3)).copy()
    for j in range(4):
        x, y = grid[None, None, :] - at[:, j, 0, None, None], grid[None, :, None] - at[:, j, 1, None, None]
        radius, mix = r[:, j, None, None], towards[:, j, None, None]
        away = odd[:, j, None, None]
        dx, dy = (np.where(away, aside[:, j, k, None, None], 0).astype(np.float32) for k in (0, 1))
        one = signed_distance(np.maximum(shape[:, j], 0)[:, None, None], x, y, radius)
        two = signed_distance(other[:, j][:, None, None], x - dx, y - dy, radius * np.where(away, 0.8, 1).astype(np.float32))
        distance = np.where(away, np.minimum(one, two), (1 - mix) * one + mix * two)
        ink = np.where(shape[:, j, None, None] >= 0, np.clip(0.5 - distance, 0, 1), 0)[..., None]
        out = out * (1 - ink) + rgb[:, j, None, None] * ink
    named = np.where(odd & (shape >= 0), len(SHAPES), shape)
    things = {"shape": named, "cx": at[..., 0], "cy": at[..., 1], "rgb": rgb, "background": paper}
    return np.round(out).astype(np.uint8), things


def damage(x: Tensor) -> Tensor:
    """Dents, blur and noise for pictures (B, 3, H, W) in [0, 1], of another strength each; a quarter stays clean."""
    n, strength = len(x), torch.rand(len(x), 1, 1, 1) * (torch.rand(len(x), 1, 1, 1) < 0.75)
    still = nn.functional.affine_grid(torch.eye(2, 3).expand(n, 2, 3), list(x.shape), align_corners=False)
    dent = nn.functional.interpolate(torch.randn(n, 2, 7, 7), x.shape[2:], mode="bicubic").permute(0, 2, 3, 1)
    x = nn.functional.grid_sample(x, still + 0.06 * strength * dent, padding_mode="border", align_corners=False)
    soft = nn.functional.avg_pool2d(nn.functional.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = x.lerp(soft, torch.rand(n, 1, 1, 1) * strength.sqrt())
    return (x + 0.08 * strength * torch.randn_like(x)).clamp(0, 1)


def softened(images: Tensor, work: Path) -> Tensor:
    """Pictures (N, 3, H, W) uint8 through the autoencoder with some noise on their latents, as a denoiser leaves it."""
    from diffusers import AutoencoderKL

    kept = work / "second-soft.pt"
    if not kept.exists():
        vae = AutoencoderKL.from_pretrained(ASSETS / "shapes-unet" / "vae").float().eval()
        out = []
        with torch.no_grad():
            for part in tqdm(images.split(500), desc="soften"):
                z = vae.encode(part.float() / 127.5 - 1).latent_dist.mean
                z = z + 0.3 * z.std() * torch.rand(len(z), 1, 1, 1) * torch.randn_like(z)
                out.append(((vae.decode(z).sample / 2 + 0.5).clamp(0, 1) * 255).round().byte())
        torch.save(torch.cat(out), kept)
    return torch.load(kept, weights_only=True)


def build_second(work: Path) -> Any:
    """The second judge: told the truth about damaged renders, one network of them alone and one also of decoded ones."""
    from safetensors.torch import save_file

    rng = np.random.default_rng((SEED, 10))
    neat = sample_layout(sample_scenes(20_000, "train", rng), rng)
    drawn, messy = clutter(30_000, rng)
    images = torch.from_numpy(np.concatenate([render(neat), drawn])).permute(0, 3, 1, 2)
    torch.manual_seed(SEED)
    nets = second.networks()
    soft = softened(images, work)
    palette, papers = (torch.tensor(list(c.values()), dtype=torch.float32) for c in (COLOURS, BACKGROUNDS))

    def joined(one: np.ndarray, other: np.ndarray, empty: float) -> Tensor:
        wide = np.full((len(one), 4, *one.shape[2:]), empty, one.dtype)
        wide[:, :2] = one
        return torch.from_numpy(np.concatenate([wide, other]))

    shape = joined(neat.shape, messy["shape"], -1)
    x, y = joined(neat.cx, messy["cx"], 0), joined(neat.cy, messy["cy"], 0)
    colour = torch.cdist(joined(neat.rgb, messy["rgb"], 0).flatten(0, 1), palette).argmin(1).view(-1, 4)
    paper = torch.cdist(torch.from_numpy(np.concatenate([neat.background, messy["background"]])), papers).argmin(1)
    there = nn.functional.one_hot(colour, len(COLOURS)) * (shape >= 0)[..., None]  # (N, things, colours)
    once = there.sum(1) == 1  # where and what a colour is can be asked where one thing has it

    def loss(net: nn.Module, share: float, step: int) -> Tensor:
        rows = torch.randint(len(images), (128,))
        decoded = (torch.rand(128) < share)[:, None, None, None]
        out = net(damage(torch.where(decoded, soft[rows], images[rows]).float() / 255))
        slot, ask = there[rows], once[rows]
        of = lambda v: (v[rows][..., None] * slot).sum(1)[ask]  # noqa: E731
        ce = nn.functional.cross_entropy
        return (
            nn.functional.binary_cross_entropy_with_logits(out["present"], slot.amax(1).float())
            + ce(out["shape"][ask], of(shape))
            + 0.02 * ((out["x"][ask] - of(x)).abs() + (out["y"][ask] - of(y)).abs()).mean()
            + 0.3 * ce(out["background"], paper[rows])
            + 0.3 * ce(out["count"], (shape[rows] >= 0).sum(1))
        )

    for name, net, share in zip(("second", "second-renders"), nets, (0.6, 0.0), strict=True):
        train(name, work, net, partial(loss, net, share), steps=3500, lr=2e-3)
    folder = ASSETS / "shapes-second"
    folder.mkdir(parents=True, exist_ok=True)
    half = {k: v.half() if v.is_floating_point() else v for k, v in nets.state_dict().items()}
    save_file(half, folder / "model.safetensors")
    return nets


def pack(work: Path) -> None:
    """Assemble the pipeline in half precision under assets/; from the last checkpoint where training still runs."""
    from diffusers import AutoencoderKL

    said, unet = Said(build.tokenizer(work / "tokenizer")), build.unet((48, 96))
    average = torch.load(work / "outlines.pt", weights_only=True)["avg"]
    for part, net in (("module.said.", said), ("module.unet.", unet)):
        net.load_state_dict({k.removeprefix(part): v for k, v in average.items() if k.startswith(part)})
    pipe = build.pipeline(unet, AutoencoderKL.from_pretrained(work / "vae"), said.text, said.tok).to(dtype=torch.float16)
    pipe.save_pretrained(ASSETS / "shapes-unet", safe_serialization=True)
    # transformers loads what the file says and diffusers float32: make them agree for a plain from_pretrained
    config = ASSETS / "shapes-unet" / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    print("shapes-unet", sum(f.stat().st_size for f in (ASSETS / "shapes-unet").rglob("*") if f.is_file()) / 1e6, "MB")


# Samples without guidance: to imitate guided ones is to distil the guidance, whatever the labels say, and the control
# "SFT on winners" would measure that. The winner is better by a fact at least.
PAIRS = {
    "num_prompts": 1600,
    "images_per_prompt": 6,
    "sampling": {"num_inference_steps": 10, "guidance_scale": 1.0, "batch_size": 100},
    "rule": {"type": "best_worst", "min_margin": 0.09},
}


def build_pairs(work: Path) -> None:
    """The preference pairs of the main job: the base's own samples on train prompts, best against worst."""
    from diffalign.own_pairs import PairsConfig, make_pairs
    from diffalign.spec import validate

    make_pairs(validate(PairsConfig, {**PAIRS, "output_dir": str(ASSETS / "shapes-pairs")}))


def build_flow(work: Path) -> None:
    """The flow world, which takes its autoencoder and its text encoder from the pipeline above."""
    import build_flow

    for stage in build_flow.STAGES.values():
        stage(work)


def main() -> None:
    stages: dict[str, Callable[[Path], Any]] = {
        "vae": build_vae,
        "decoder": build_decoder,
        "unet": build_unet,
        "pack": pack,
        "clip": build_clip,
        "second": build_second,
        "pairs": build_pairs,
        "flow": build_flow,
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
