"""From pictures to what an image tower was trained on. Small deviations here change published numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from diffalign.errors import DataError, ModelError

THREADS = 4
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def as_tensor(image: Image.Image) -> Tensor:
    """(3, H, W) uint8, upright, alpha dropped as all published scorers do."""
    return torch.from_numpy(np.array(ImageOps.exif_transpose(image).convert("RGB"))).permute(2, 0, 1)


@dataclass(frozen=True)
class Preprocess:
    """Resize, fit into a square, normalise; the geometries are those of :class:`diffalign.scorers.Card`.

    ``exact`` goes through PIL's 8-bit resize as the published numbers did; ``smooth`` is the same in floats, with
    gradients. They differ by rounding alone: 1.1/255 at most and 0.32/255 in the mean, on noise (tests/test_scorers.py).
    """

    size: int = 224
    geometry: Literal["crop", "pad", "squash", "area"] = "crop"
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    edge: int | None = None
    """Shortest side before the crop; ``size`` if not given."""
    filter: Literal["bicubic", "bilinear"] = "bicubic"
    centre: Literal["round", "floor"] = "round"
    """Where an odd margin goes: torchvision (OpenAI's CLIP, BLIP) rounds to even, transformers rounds down."""
    eight_bit: bool = True
    """False: the published scorer itself resized floats, so ``exact`` is ``smooth``, and overshoots are kept."""

    def exact(self, images: Sequence[Image.Image]) -> Tensor:
        """(B, 3, S, S) of pictures of any sizes."""
        if not self.eight_bit or self.geometry == "area":
            return torch.stack([self.one(image) for image in images])
        for image in images:
            image.load()  # here: two threads could meet in one file
        with ThreadPoolExecutor(THREADS) as pool:  # resizing leaves Python's lock; floats are made of the whole batch at once
            return self._normalise(torch.stack(list(pool.map(self._cut, images))).float() / 255)

    def smooth(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) of pixels (B, 3, H, W) in [0, 1], with gradients."""
        height, width = self.resized(*x.shape[-2:])
        if self.eight_bit:  # PIL turns bytes into bytes twice, rows first: bicubic overshoots, bytes cannot
            x = self._resize(x, x.shape[-2], width).clamp(0, 1)
            x = self._resize(x, height, width).clamp(0, 1)
        else:
            x = self._resize(x, height, width)
        return self._normalise(self._fit(x))

    def _resize(self, x: Tensor, height: int, width: int) -> Tensor:
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.functional import resize

        if (height, width) == tuple(x.shape[-2:]):
            return x
        return resize(x, [height, width], InterpolationMode(self.filter), antialias=True)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """(H, W) after the resize, rounded as the published code of each geometry rounds."""
        if self.geometry == "squash":
            return self.size, self.size
        if self.geometry == "area":
            return _about(self.size**2, height, width)
        if self.geometry == "pad":
            scale = self.size / max(height, width)
            return max(1, round(height * scale)), max(1, round(width * scale))
        edge = self.edge or self.size
        if height <= width:
            return edge, int(edge * width / height)
        return int(edge * height / width), edge

    def one(self, image: Image.Image) -> Tensor:
        """(3, S, S) of a picture; (3, H, W) where the geometry is ``area``."""
        if not self.eight_bit:
            return self.smooth(as_tensor(image)[None].float() / 255)[0]
        return self._normalise(self._cut(image).float() / 255)

    def _cut(self, image: Image.Image) -> Tensor:
        """(3, S, S) uint8, before the floats: 1x1000 grows large on its way."""
        image = ImageOps.exif_transpose(image).convert("RGB")
        height, width = self.resized(image.height, image.width)
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling[self.filter.upper()])
        return self._fit(torch.from_numpy(np.array(image)).permute(2, 0, 1))

    def _fit(self, x: Tensor) -> Tensor:
        """Cut or pad with black to (..., S, S) about the centre."""
        height, width = x.shape[-2:]
        if self.geometry == "area":
            return x
        if self.geometry == "pad":
            top, left = (self.size - height) // 2, (self.size - width) // 2
            return torch.nn.functional.pad(x, (left, self.size - width - left, top, self.size - height - top))
        whole = round if self.centre == "round" else int
        top, left = whole((height - self.size) / 2), whole((width - self.size) / 2)
        return x[..., top : top + self.size, left : left + self.size]

    def _normalise(self, x: Tensor) -> Tensor:
        mean, std = (torch.tensor(v, dtype=x.dtype, device=x.device).view(3, 1, 1) for v in (self.mean, self.std))
        return (x - mean) / std


GRID = 28
"""Qwen2-VL's patches of 14 pixels, of which 2 x 2 are merged."""


def _about(area: int, height: int, width: int) -> tuple[int, int]:
    """Multiples of 28 of nearly the same shape whose product is ``area`` at most, as Qwen2-VL resizes when its smallest and
    its largest area are the same.

    Raises:
        DataError: the longer side is more than 200 times the shorter one.
    """
    if max(height, width) > 200 * min(height, width):
        raise DataError(f"a picture of {width} x {height} is too long for this scorer")
    new = tuple(max(GRID, round(n / GRID) * GRID) for n in (height, width))
    if new[0] * new[1] > area:  # divided here and multiplied below, as there: a whole quotient is floored
        scale = math.sqrt(height * width / area)
        new = tuple(max(GRID, math.floor(n / scale / GRID) * GRID) for n in (height, width))
    elif new[0] * new[1] < area:
        scale = math.sqrt(area / (height * width))
        new = tuple(math.ceil(n * scale / GRID) * GRID for n in (height, width))
    return new[0], new[1]


def of_folder(folder: Path, side: int, centre: Literal["round", "floor"]) -> Preprocess:
    """What the image processor saved in a transformers folder does; ``side`` is what the network takes.

    One that does not resize expects pictures of that side; others are cropped like everywhere.

    Raises:
        ModelError: there is none, or it does something else than resize, crop and normalise.
    """
    from transformers import AutoImageProcessor

    try:
        said: dict[str, Any] = AutoImageProcessor.from_pretrained(folder, local_files_only=True).to_dict()
    except (OSError, ValueError, KeyError) as e:
        raise ModelError(
            f"{folder}: no image processor: {' '.join(str(e).split())[:200]}", hint="add its preprocessor_config.json"
        ) from e
    filters = {3: "bicubic", 2: "bilinear"}
    if not said.get("do_resize", True):
        said |= {"size": {"shortest_edge": side}, "resample": 3}
    size, crop, resample = said.get("size") or {}, said.get("crop_size") or {}, int(said.get("resample") or 0)
    if not said.get("do_normalize", True) or resample not in filters:
        raise ModelError(f"{folder}: its image processor is none that resizes (bicubic, bilinear) and normalises")
    stats: Any = {"mean": tuple(said["image_mean"]), "std": tuple(said["image_std"]), "filter": filters[resample]}
    if edge := size.get("shortest_edge"):
        cut = crop.get("height", edge) if said.get("do_center_crop") else edge
        return Preprocess(cut, "crop", edge=edge, centre=centre, **stats)
    if size.get("height") != size.get("width"):
        raise ModelError(f"{folder}: its image processor makes pictures that are not square: {size}")
    return Preprocess(size["height"], "squash", **stats)
