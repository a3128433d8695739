"""LPIPS: distance of AlexNet's features, weighed by channel; to references as a scorer, within a prompt as diversity."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from diffalign.scorers.base import Card, Reward, ScoreBatch, ScoreInput, Weight, require, scored
from diffalign.scorers.encoders import Encoder
from diffalign.scorers.preprocess import Preprocess
from diffalign.scorers.weights import choose, fit, read_weights

MEAN, STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Of pixels in [-1, 1], as published."""
TAPS = {1: 64, 4: 192, 7: 384, 9: 256, 11: 256}
"""The layers of torchvision's AlexNet behind whose ReLU features are taken, and their channels."""


class AlexFeatures(Encoder):
    """Unit features of five layers; (B, sum of C x H x W), so that the squared distance is LPIPS."""

    def features(self, x: Tensor) -> Tensor:
        parts = []
        for i, layer in enumerate(self.net["alex"]):
            x = layer(x)
            if i in TAPS:
                lin = self.net[f"lin{list(TAPS).index(i)}"]
                # a weighted mean over places of squared differences is the distance of features scaled by the roots
                scale = (lin.weight.clamp(min=0) / (x.shape[2] * x.shape[3])).sqrt()
                parts.append((normalize(x, dim=1, eps=1e-10) * scale).flatten(1))
        return torch.cat(parts, 1).float()


class LPIPS(Reward):
    """-(mean LPIPS to the references), under AlexNet, version 0.1. All pictures are squashed to 256 x 256 before."""

    card: ClassVar[Card] = Card(
        name="lpips",
        summary="-(mean LPIPS to the references), AlexNet, version 0.1",
        unit="distance, its sign turned; -1 to 0",
        citation="Zhang et al. 2018, arXiv 1801.03924",
        licence="BSD-2-Clause (heads); BSD-3-Clause (AlexNet)",
        weights=(
            Weight("download.pytorch.org/models/alexnet-owt-7be5be79.pth", ("alexnet-owt-*.pth",)),
            Weight("github.com/richzhang/PerceptualSimilarity/lpips/weights/v0.1", ("alex.pth",)),
        ),
        geometry="squash",
        size=256,
        needs=frozenset({"images", "references"}),
        direction=-1,
        across_prompts=True,
    )

    @staticmethod
    def network() -> nn.ModuleDict:
        """The empty network."""
        from torchvision.models import alexnet

        heads = {f"lin{i}": nn.Conv2d(channels, 1, 1, bias=False) for i, channels in enumerate(TAPS.values())}
        layers = list(alexnet(weights=None).features)[: max(TAPS) + 1]
        for layer in layers:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False  # features behind a layer are kept
        return nn.ModuleDict({"alex": nn.Sequential(*layers), **heads})

    def __init__(self, alexnet: Path, heads: Path, device: str = "cpu") -> None:
        net = self.network()
        body = choose(alexnet, *self.card.weights[0].files, "*.safetensors")
        top = choose(heads, *self.card.weights[1].files, "*.safetensors")
        state: dict[str, Any] = {
            k.replace("features.", "alex."): v for k, v in read_weights(body).items() if k.startswith("features.")
        }
        state |= {k.replace(".model.1.", "."): v for k, v in read_weights(top).items()}
        fit(net, state, top)
        # pixels in [0, 1]: 2 x - 1 comes first
        mean, std = (tuple(v) for v in ([(m + 1) / 2 for m in MEAN], [s / 2 for s in STD]))
        self.encoder = AlexFeatures(net, Preprocess(256, "squash", mean, std), device)

    @torch.no_grad()
    def distances(self, images: Sequence[Image.Image]) -> Tensor:
        """(N, N) LPIPS of all pairs."""
        return torch.cdist(*(self.encoder.look(images).double()[None],) * 2)[0].square().float().cpu()

    def diversity(self, images: Sequence[Image.Image]) -> float:
        """Mean LPIPS of the pairs of one prompt's pictures, at least two."""
        d = self.distances(images)
        return torch.stack([d[i, j] for i, j in combinations(range(len(images)), 2)]).mean().item()

    def __call__(self, batch: ScoreInput) -> ScoreBatch:
        require(self.card, batch)
        values = [
            -self.distances([image, *group])[0, 1:].mean() if len(group) else torch.tensor(torch.nan)
            for image, group in zip(batch.images, batch.references or (), strict=True)
        ]
        return scored(self.name, torch.stack(values) if values else torch.empty(0))
