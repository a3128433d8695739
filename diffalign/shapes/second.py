"""A second judge, built differently, to guard the first.

The first subtracts the background, finds blobs and redraws them. These are two small convolutional networks, trained on
renders with noise, blur, dents and objects of no shape, and one of them also on renders that a noisy autoencoder drew
(``scripts/build_assets.py second``). They know no outline, no area and no palette: for each colour they learnt to say whether
something of it is there, where, and of what shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from diffalign.shapes.assets import asset
from diffalign.shapes.judge import Blob, Images, Sight, as_array, compare
from diffalign.shapes.render import SIDE
from diffalign.shapes.scene import BACKGROUNDS, COLOURS, SHAPES, Scene, parse_caption

if TYPE_CHECKING:
    from torch import Tensor, nn

MOST = 4
"""The network counts 0, 1, 2, 3 or at least this many objects."""


def network(width: int = 48) -> nn.Module:
    """(B, 3, 32, 32) in [0, 1] to what :func:`read_out` explains; colours are slots that attend to their own place."""
    import torch
    from torch import nn

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()

            def block(i: int, o: int, stride: int = 1) -> nn.Module:
                return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())

            self.body = nn.Sequential(
                block(3, width // 2),
                block(width // 2, width, 2),
                block(width, width),
                block(width, width),
                block(width, width),
            )
            self.deep = nn.Sequential(block(width, 2 * width, 2), block(2 * width, 2 * width))
            self.heat = nn.Conv2d(width, len(COLOURS), 1)
            self.shape = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, len(SHAPES) + 1))
            self.background = nn.Linear(2 * width, len(BACKGROUNDS))
            self.count = nn.Sequential(nn.Linear(4 * width, 2 * width), nn.ReLU(), nn.Linear(2 * width, MOST + 1))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            near = self.body(x - 0.5)
            far = self.deep(near)
            heat = self.heat(near)
            mean, most = far.mean((2, 3)), far.amax((2, 3))
            return {
                "heat": heat,
                "near": near,
                "present": heat.amax((2, 3)),
                **self.thing(heat, near),
                "background": self.background(mean),
                "count": self.count(torch.cat([mean, most], 1)),
            }

        def thing(self, heat: Tensor, near: Tensor) -> dict[str, Tensor]:
            """Where the heat (B, C, 16, 16) points, and the shape there."""
            place = heat.flatten(2).softmax(-1)
            grid = (torch.arange(16, device=heat.device, dtype=heat.dtype) + 0.5) * (SIDE / 16)
            at = place.view_as(heat)
            return {
                "x": (at.sum(2) * grid).sum(-1),
                "y": (at.sum(3) * grid).sum(-1),
                "shape": self.shape(place @ near.flatten(2).transpose(1, 2)),
            }

    return Reader()


def networks() -> nn.ModuleList:
    """Two, whose opinions are averaged."""
    from torch import nn

    return nn.ModuleList([network(), network()])


@cache
def _readers() -> Any:
    from safetensors.torch import load_file

    nets = networks()
    weights = load_file(asset("shapes-second") / "model.safetensors")
    nets.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in weights.items()})
    return nets.eval()


def look(images: Images, batch: int = 500) -> list[Sight]:
    """What the networks see in each picture of 32 x 32; an object that they count but cannot name has no colour or shape."""
    import torch
    from scipy import ndimage

    backgrounds, colours = list(BACKGROUNDS), list(COLOURS)
    x = torch.from_numpy(as_array(images)).permute(0, 3, 1, 2)
    sights = []
    for part in torch.split(x, batch):
        with torch.no_grad():  # each looks twice, the second time in a mirror: what is seen must not depend on it
            plain, mirrored = ([net(p.float() / 255) for net in _readers()] for p in (part, part.flip(3)))
        near = [torch.stack([p["near"], m["near"].flip(3)]) for p, m in zip(plain, mirrored, strict=True)]
        heat = torch.stack([o["heat"] for o in plain] + [o["heat"].flip(3) for o in mirrored]).mean(0)
        background, counted = (sum(o[k] for o in (*plain, *mirrored)) for k in ("background", "count"))
        for i in range(len(part)):
            blobs = []
            for c in (heat[i].amax((1, 2)) > 0).nonzero().flatten().tolist():
                # two things of one colour are two islands of its heat
                islands, count = ndimage.label((heat[i, c] > 0).numpy(), np.ones((3, 3)))
                for n in range(1, count + 1):
                    island = heat[i, c].masked_fill(~torch.from_numpy(islands == n), float("-inf"))
                    with torch.no_grad():
                        seen = [
                            net.thing(island.expand(2, 1, 16, 16), f[:, i]) for net, f in zip(_readers(), near, strict=True)
                        ]
                    s = int(torch.cat([v["shape"] for v in seen]).sum(0).argmax())
                    where = float(seen[0]["x"][0]), float(seen[0]["y"][0])
                    blobs.append(Blob(colours[c], SHAPES[s] if s < len(SHAPES) else None, *where, 0.0, (0.0, 0.0, 0.0), 0.0))
            unnamed = int(counted[i].argmax()) - len(blobs)
            blobs += [Blob(None, None, SIDE / 2, SIDE / 2, 0.0, (0.0, 0.0, 0.0), 0.0)] * unnamed
            sights.append(Sight(backgrounds[int(background[i].argmax())], tuple(blobs), float("nan")))
    return sights


def second_judge(images: Images, prompts: Sequence[str | Scene]) -> list[dict[str, bool]]:
    """The facts of each prompt that hold in its picture, keyed as by the first judge."""
    scenes = [p if isinstance(p, Scene) else parse_caption(p) for p in prompts]
    return [compare(sight, scene) for sight, scene in zip(look(images), scenes, strict=True)]


def second_score(images: Images, prompts: Sequence[str | Scene]) -> list[float]:
    """The share of facts that hold for the second judge, as a scorer: ``diffalign.shapes.second:second_score``."""
    return [sum(facts.values()) / len(facts) for facts in second_judge(images, prompts)]
