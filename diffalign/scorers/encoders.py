"""Frozen encoders. Scorers that stand on the same encoder share it, and one pass over the pictures serves them all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar
from weakref import WeakValueDictionary

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from diffalign.errors import ModelError
from diffalign.scorers.preprocess import Preprocess, of_folder
from diffalign.scorers.weights import load_pretrained


class Encoder:
    """An image tower and its preprocessing. The features of the last pictures are kept for the next scorer."""

    source: Path | None = None
    """The file or folder of the weights, where they hold nothing else."""

    def __init__(self, net: nn.Module, preprocess: Preprocess, device: str) -> None:
        self.net: Any = net.eval().requires_grad_(False).to(device)
        self.preprocess, self.device, self._home = preprocess, device, device
        self._seen: tuple[Image.Image, ...] = ()
        self._kept = torch.empty(0)

    def move(self, away: bool) -> None:
        """To main memory, or back to its device."""
        device = "cpu" if away else self._home
        if device != self.device:
            self.net.to(device)
            self.device = device

    def features(self, x: Tensor) -> Tensor:
        """Features fp32 of preprocessed pixels (B, 3, S, S); (B, D) where nothing else is said."""
        raise NotImplementedError

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """Features of pictures by the exact path, without gradients."""
        found = self.seen(images)
        if found is None:
            found = self._kept = self.look(images)
            self._seen = tuple(images)
        return found

    def seen(self, images: Sequence[Image.Image]) -> Tensor | None:
        """The features of these very pictures, if they were the last ones."""
        same = len(images) == len(self._seen) and all(a is b for a, b in zip(images, self._seen, strict=True))
        return self._kept if same else None

    @torch.no_grad()  # not inference_mode: its tensors could not meet gradients later
    def look(self, images: Sequence[Image.Image]) -> Tensor:
        """The same, not kept."""
        return self.features(self.preprocess.exact(images).to(self.device))

    def pixels(self, x: Tensor) -> Tensor:
        """Features of pixels (B, 3, H, W) in [0, 1], with gradients."""
        return self.features(self.preprocess.smooth(x.to(self.device, torch.float32)))


class TextEncoder(Encoder):
    """A tower for pictures and one for prompts, in one space. Embeddings of prompts are kept: groups repeat them."""

    max_tokens: int

    def __init__(self, net: nn.Module, preprocess: Preprocess, device: str) -> None:
        super().__init__(net, preprocess, device)
        self._texts: dict[str, Tensor] = {}

    def encode(self, prompts: list[str]) -> Tensor:
        """(B, D) embeddings of prompts, cut at ``max_tokens``."""
        raise NotImplementedError

    def count(self, prompt: str) -> int:
        """Tokens of a prompt before any is cut, start and end included."""
        raise NotImplementedError

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """(B, D) unit vectors of prompts."""
        if len(self._texts) > 4096:  # 1024 floats each: at most some 16 MB
            self._texts.clear()
        if new := [p for p in dict.fromkeys(prompts) if p not in self._texts]:
            self._texts.update(zip(new, normalize(self.encode(new).float(), dim=-1), strict=True))
        return torch.stack([self._texts[p] for p in prompts])

    def cosine(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,) cosines of features of pictures and their prompts."""
        return (normalize(features, dim=-1) * self.texts(prompts)).sum(-1)

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        """Which prompts are longer than ``max_tokens``."""
        return [self.count(p) > self.max_tokens for p in prompts]

    @property
    def scale(self) -> Tensor:
        """exp(logit_scale), about 100."""
        return self.net.logit_scale.exp()


def projected(output: Any) -> Tensor:
    """The projected embedding: transformers 5 returns an object around what transformers 4 returned."""
    found: Tensor = getattr(output, "pooler_output", output)
    return found.float()


def tokenizer_of(folder: Path, hint: str = "add its tokenizer.json", **more: Any) -> Any:
    """The tokenizer saved in a folder.

    Raises:
        ModelError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, **more)
    except (OSError, ValueError, KeyError) as e:
        raise ModelError(f"{folder}: no tokenizer: {' '.join(str(e).split())[:200]}", hint=hint) from e


class CLIPTexts(TextEncoder):
    """Prompts as the CLIP or SigLIP of transformers reads them."""

    tokenizer: Any

    def encode(self, prompts: list[str]) -> Tensor:
        # whole ids go in and the model finds the end itself: ids that are cut afterwards have lost it
        ids = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).input_ids
        return projected(self.net.get_text_features(input_ids=ids.to(self.device)))

    def count(self, prompt: str) -> int:
        return len(self.tokenizer(prompt, verbose=False).input_ids)


class TransformersCLIP(CLIPTexts):
    """A CLIP or SigLIP folder of transformers; features are the projected embeddings, not normalised."""

    def __init__(self, folder: Path, device: str = "cpu", centre: Literal["round", "floor"] = "round") -> None:
        from transformers import AutoModel

        net = load_pretrained(AutoModel, folder)
        if net.config.model_type not in ("clip", "siglip"):
            raise ModelError(f"{folder}: a {net.config.model_type} model, not CLIP or SigLIP")
        super().__init__(net, of_folder(folder, net.config.vision_config.image_size, centre), device)
        self.tokenizer = tokenizer_of(folder)
        self.max_tokens = net.config.text_config.max_position_embeddings

    def features(self, x: Tensor) -> Tensor:
        return projected(self.net.get_image_features(pixel_values=x))


class OpenCLIP(TextEncoder):
    """A model of open_clip with its preprocessing and tokenizer."""

    def __init__(self, net: nn.Module, preprocess: Preprocess, tokenizer: Any, device: str) -> None:
        super().__init__(net, preprocess, device)
        self.tokenizer, self.max_tokens = tokenizer, tokenizer.context_length

    @classmethod
    def of_folder(cls, folder: Path, device: str) -> OpenCLIP:
        """From a folder with ``open_clip_config.json``."""
        import open_clip

        try:
            net = open_clip.create_model(f"local-dir:{folder}", pretrained_text=False, require_pretrained=True)
            tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
        except Exception as e:  # open_clip and what it calls raise many kinds
            raise ModelError(f"{folder}: cannot load the open_clip model: {' '.join(str(e).split())[:300]}") from e
        said = open_clip.get_model_preprocess_cfg(net)
        side = said["size"] if isinstance(said["size"], int) else said["size"][0]
        geometry: Any = {"shortest": "crop", "longest": "pad", "squash": "squash"}[said.get("resize_mode", "shortest")]
        preprocess = Preprocess(
            side, geometry, tuple(said["mean"]), tuple(said["std"]), filter=said.get("interpolation", "bicubic")
        )
        return cls(net, preprocess, tokenizer, device)

    def features(self, x: Tensor) -> Tensor:
        found: Tensor = self.net.encode_image(x).float()
        return found

    def encode(self, prompts: list[str]) -> Tensor:
        found: Tensor = self.net.encode_text(self.tokenizer(prompts).to(self.device))
        return found

    def count(self, prompt: str) -> int:
        if hasattr(self.tokenizer, "encoder"):  # open_clip's own BPE: start and end are added by the call
            return len(self.tokenizer.encode(prompt)) + 2
        return len(self.tokenizer.tokenizer(prompt).input_ids)


class TransformersViT(Encoder):
    """A vision transformer of transformers (DINO, DINOv2); features are its class token."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        from transformers import AutoModel

        net = load_pretrained(AutoModel, folder, unused="pooler.")  # DINO was published without
        super().__init__(net, of_folder(folder, net.config.image_size, "floor"), device)

    def features(self, x: Tensor) -> Tensor:
        found: Tensor = self.net(pixel_values=x).last_hidden_state[:, 0].float()
        return found


E = TypeVar("E", bound=Encoder)
_alive: WeakValueDictionary[tuple[Any, ...], Encoder] = WeakValueDictionary()


def shared(make: Callable[..., E], folder: Path, device: str) -> E:
    """The encoder of ``folder``, the same object for as long as any scorer holds it."""
    key = (make, folder.resolve(), device)
    found = _alive.get(key)
    if found is None:
        found = _alive[key] = make(folder, device)
        found.source = key[1]
    return found  # type: ignore[return-value]


def clip_of(folder: Path, device: str) -> TextEncoder:
    """The shared CLIP or SigLIP of a folder, in the layout of transformers or of open_clip."""
    if (folder / "open_clip_config.json").exists() and not (folder / "config.json").exists():
        return shared(OpenCLIP.of_folder, folder, device)
    return shared(TransformersCLIP, folder, device)
