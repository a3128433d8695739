"""HPSv2.0 and HPSv2.1: a ViT-H/14 tuned on HPD v2, with a geometry of its own (longest side and black)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from diffalign.scorers.base import Card, Weight
from diffalign.scorers.clip import Similarity
from diffalign.scorers.encoders import OpenCLIP, shared
from diffalign.scorers.preprocess import Preprocess
from diffalign.scorers.weights import choose, fit, read_weights, stripped


class HPSv2(Similarity):
    """cos(image, prompt) without the logit scale. The published benchmark prints 100 times this.

    The published code leaves a picture whose longest side is 224 already without its black, and fails; here it is padded.
    """

    card: ClassVar[Card] = Card(
        name="hpsv2",
        summary="cos(image, prompt) of a ViT-H/14 tuned on HPD v2, version 2.0",
        unit="cosine; 0.25 to 0.29",
        citation="Wu et al. 2023, arXiv 2306.09341",
        licence="Apache-2.0",
        weights=(Weight("xswu/HPSv2", ("HPS_v2_compressed.pt",), "md5:fd9180de357abf01fdb4eaad64631db4"),),
        geometry="pad",
        size=224,
        max_tokens=77,
        differentiable=True,
    )

    @classmethod
    def architecture(cls) -> dict[str, Any]:
        """Arguments of open_clip's CLIP."""
        import open_clip

        found: dict[str, Any] = open_clip.get_model_config("ViT-H-14")
        return found

    def __init__(self, path: Path, device: str = "cpu") -> None:
        found = choose(path, *self.card.weights[0].files, "*.safetensors")
        self.encoder = shared(self._encoder, found, device)

    @classmethod
    def _encoder(cls, path: Path, device: str) -> OpenCLIP:
        import open_clip

        arch = cls.architecture()
        net = open_clip.CLIP(**arch)
        fit(net, stripped(read_weights(path), "model."), path)
        text, image = arch["text_cfg"], arch["vision_cfg"]
        tokenizer = open_clip.SimpleTokenizer(context_length=text["context_length"])
        return OpenCLIP(net, Preprocess(image["image_size"], "pad", eight_bit=False), tokenizer, device)


class HPSv21(HPSv2):
    """The same with the weights of version 2.1, whose values spread about five times as far."""

    card: ClassVar[Card] = Card(
        name="hpsv2.1",
        summary="cos(image, prompt) of a ViT-H/14 tuned on HPD v2, version 2.1",
        unit="cosine; 0.22 to 0.34",
        citation="Wu et al. 2023, arXiv 2306.09341",
        licence="Apache-2.0",
        weights=(Weight("xswu/HPSv2", ("HPS_v2.1_compressed.pt",), "md5:4067542e34ba2553a738c5ac6c1d75c0"),),
        geometry="pad",
        size=224,
        max_tokens=77,
        differentiable=True,
    )
