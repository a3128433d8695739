"""Inception's features through torch-fidelity: those of the published FID and KID, and of no other network."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffalign.errors import ConfigError, ModelError
from diffalign.scorers.preprocess import as_tensor
from diffalign.scorers.weights import choose, digest_of

NAME = "inception-2048"
FILE = "weights-inception-2015-12-05-6726825d.pth"
DIGEST = "sha256:6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


class Inception:
    """(N, 2048) of pictures of any sizes, before the classifier, resized to 299 px as TensorFlow 1 did.

    torch-fidelity opens the weights as a pickle that may hold code, so none but the published file is given to it.

    Raises:
        ConfigError: torch-fidelity is not installed.
        ModelError: no such file, or another one than was published: its numbers would be no FID.
    """

    def __init__(self, path: Path, device: str = "cpu") -> None:
        found = choose(path, FILE)
        if (digest := digest_of(found, "sha256")) != DIGEST:
            raise ModelError(f"{found}: {digest}, not the published {DIGEST}", hint=f"give torch-fidelity's {FILE}")
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as e:
            raise ConfigError(f"Inception's features need torch-fidelity: {e}", hint="pip install 'diffalign[fid]'") from e
        self.net: Any = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(found)).to(device)
        self.device = device

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        out = []
        for _, same in groupby(images, key=lambda i: i.size):  # pictures of one size stand next to each other as a rule
            out.append(self.net(torch.stack([as_tensor(i) for i in same]).to(self.device))[0].float().cpu())
        return torch.cat(out)
