"""Bytes to pictures and pictures to tensors."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from diffalign.errors import DataError


def decode(source: bytes | str | Path, where: str) -> Image.Image:
    """An RGB picture from encoded bytes or a file. CMYK, palettes and 16 bits are converted, alpha goes on white.

    Raises:
        DataError: the picture is missing, damaged or cut short; names ``where``.
    """
    with _reading(source, where) as opened:
        opened.load()
        image: Image.Image = ImageOps.exif_transpose(opened)
    if image.mode in ("I", "I;16", "I;16B", "I;16L"):
        image = Image.fromarray((np.asarray(image, np.float32) / 257).round().clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


def fingerprint(image: Image.Image) -> str:
    """16 hex digits of a difference hash (64 bits: is a pixel of 9 x 8 brighter than the one to its right?), or "blank".

    Copies at other sizes or qualities differ in a few bits. A picture is blank where no channel spans more than 8 levels.
    """
    extrema = image.getextrema()
    if all(high - low <= 8 for low, high in extrema):  # type: ignore[operator, misc]
        return "blank"
    small = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    return np.packbits(small[:, :-1] > small[:, 1:]).tobytes().hex()


def dimensions(source: bytes | str | Path, where: str) -> tuple[int, int]:
    """(height, width) that :func:`decode` would give, read from the header alone.

    Raises:
        DataError: as :func:`decode`, as far as the header tells.
    """
    with _reading(source, where) as opened:
        turned = opened.getexif().get(ExifTags.Base.Orientation, 1) >= 5  # 5 to 8 lie on their side
        return (opened.width, opened.height) if turned else (opened.height, opened.width)


@contextmanager
def _reading(source: bytes | str | Path, where: str) -> Iterator[Image.Image]:
    try:
        if not isinstance(source, bytes):
            source = Path(source).read_bytes()
        yield Image.open(io.BytesIO(source))
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as e:
        reason = f"{type(e).__name__}: {e}"
        if isinstance(e, FileNotFoundError):
            reason = "no such file"
        elif isinstance(
            e, UnidentifiedImageError
        ):  # whose words name an address in memory: the same failure must read the same
            reason = "cannot identify its format"
        raise DataError(f"{where}: cannot read the image: {reason[:200]}", hint="remove the row or mend the file") from e


def encode_png(image: Image.Image) -> bytes:
    """Lossless bytes, the same for the same pixels."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=False)
    return buffer.getvalue()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def to_tensor(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """(3, H, W) in [0, 1] at ``size`` (H, W): resized to cover it, then cut at the centre."""
    height, width = size
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def frame(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """(6,) fp32: what :func:`to_tensor` does to a picture, in the order of SDXL's micro-conditioning.

    Its original height and width, top and left of the cut once resized, and the height and width of ``size``. Podell et
    al. 2023, section 2.2.
    """
    (height, width), (h, w) = size, (image.height, image.width)
    scale = max(height / h, width / w)
    top, left = round((h * scale - height) / 2), round((w * scale - width) / 2)
    return torch.tensor([h, w, top, left, height, width], dtype=torch.float32)


def to_uint8(pixels: Tensor) -> Tensor:
    """(..., 3, H, W) in [0, 1] to uint8, rounded."""
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8)


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) uint8 to pictures."""
    return [Image.fromarray(x) for x in pixels.permute(0, 2, 3, 1).cpu().numpy()]
