"""Cosine similarity of image and prompt under a CLIP model of transformers."""

from __future__ import annotations

from pathlib import Path

import torch

from diffalign.errors import ModelError
from diffalign.scorers.base import ScoreBatch, ScoreInput


class CLIPScore:
    """cos(image, prompt), between -1 and 1, with the model's own preprocessing (Hessel et al. 2021, unscaled).

    Raises:
        ModelError: the folder holds no CLIP model.
    """

    def __init__(self, folder: Path, name: str = "clip", device: str = "cpu") -> None:
        from transformers import CLIPModel, CLIPProcessor

        self.name = name
        try:
            self.model = CLIPModel.from_pretrained(folder, local_files_only=True).eval().to(device)
            self.processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as e:
            raise ModelError(f"cannot load the CLIP model {folder}: {' '.join(str(e).split())[:300]}") from e

    @torch.no_grad()
    def __call__(self, batch: ScoreInput) -> ScoreBatch:
        inputs = self.processor(
            text=list(batch.prompts), images=list(batch.images), return_tensors="pt", padding="max_length", truncation=True
        ).to(self.model.device)
        out = self.model(**inputs)
        cosine = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds)
        return ScoreBatch({self.name: cosine.float().cpu()})
