"""How pictures look, whatever they show: what a reward that is being exploited moves first."""

from __future__ import annotations

import torch
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in brightness, ITU-R BT.601."""
DARK = 0.15
"""A pixel of less brightness is dark."""
EDGE = 0.1
"""A pixel is on an edge where brightness changes by more than this to the next pixel."""
LEVELS = 8
"""Of each channel in the histogram of colours."""
NAMES = ("saturation", "colour_entropy", "edge_density", "brightness", "dark_share")


def appearance(images: Tensor) -> dict[str, Tensor]:
    """``NAMES`` to (B,) fp64, of images (B, 3, H, W) in [0, 1].

    saturation      mean of (max - min) / max over the channels of each pixel, 0 of black ones (that of HSV)
    colour_entropy  bits of the histogram of colours, 8 levels a channel: 0 of one colour, 9 at most
    edge_density    share of pixels whose brightness differs from the right or the lower neighbour, in Euclidean length, by
                    more than 0.1; the last row and column have no neighbours and are left out
    brightness      mean luma
    dark_share      share of pixels of brightness below 0.15
    """
    x = images.double()
    high, low = x.amax(1), x.amin(1)
    luma = torch.einsum("c,bchw->bhw", torch.tensor(LUMA, dtype=x.dtype, device=x.device), x)
    right, down = luma[:, :-1, 1:] - luma[:, :-1, :-1], luma[:, 1:, :-1] - luma[:, :-1, :-1]
    found = (
        torch.where(high > 0, (high - low) / high.clamp(min=1e-12), 0.0).mean((1, 2)),
        torch.stack([_entropy(one) for one in x]),
        ((right.square() + down.square()).sqrt() > EDGE).double().mean((1, 2)),
        luma.mean((1, 2)),
        (luma < DARK).double().mean((1, 2)),
    )
    return dict(zip(NAMES, found, strict=True))


def _entropy(image: Tensor) -> Tensor:
    """Bits of the colours of (3, H, W)."""
    red, green, blue = (image * LEVELS).long().clamp(0, LEVELS - 1)
    counts = torch.bincount(((red * LEVELS + green) * LEVELS + blue).flatten(), minlength=LEVELS**3).double()
    share = counts[counts > 0] / counts.sum()
    return -(share * share.log2()).sum()
