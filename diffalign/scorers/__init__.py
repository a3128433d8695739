"""Reward models over images and prompts. To add one: a class with a card, and its line in the table."""

from __future__ import annotations

import importlib
from typing import Any

from diffalign.scorers.base import Callback, Card, Reward, ScoreBatch, ScoreInput, Scorer, Weight, import_object, import_scorer

# name -> module:class
SCORERS = {
    "clip": "diffalign.scorers.clip:CLIPScore",
    "clip100": "diffalign.scorers.clip:CLIPScore100",
    "clipscore": "diffalign.scorers.clip:CLIPScoreHessel",
    "hpsv2": "diffalign.scorers.hps:HPSv2",
    "hpsv2.1": "diffalign.scorers.hps:HPSv21",
    "pickscore": "diffalign.scorers.clip:PickScore",
    "imagereward": "diffalign.scorers.blip:ImageReward",
    "cyclereward": "diffalign.scorers.blip:CycleReward",
    "mps": "diffalign.scorers.mps:MPS",
    "decomposed": "diffalign.scorers.clip:Decomposed",
    "aesthetic-v1": "diffalign.scorers.aesthetic:AestheticV1",
    "aesthetic-v2": "diffalign.scorers.aesthetic:AestheticV2",
    "aesthetic-v2.5": "diffalign.scorers.aesthetic:AestheticV25",
    "clip-i": "diffalign.scorers.subject:ClipI",
    "dino": "diffalign.scorers.subject:Dino",
    "safety": "diffalign.scorers.safety:SafetyChecker",
    "nsfw": "diffalign.scorers.safety:NSFW",
    "q16": "diffalign.scorers.safety:Q16",
    "compressibility": "diffalign.scorers.jpeg:Compressibility",
    "incompressibility": "diffalign.scorers.jpeg:Incompressibility",
    "ocr": "diffalign.scorers.ocr:OCR",
    "geneval": "diffalign.scorers.geneval:GenEval",
}


def scorer_class(name: str) -> Any:
    """The class behind a name of the table."""
    module, _, cls = SCORERS[name].partition(":")
    return getattr(importlib.import_module(module), cls)


__all__ = [
    "SCORERS",
    "Callback",
    "Card",
    "Reward",
    "ScoreBatch",
    "ScoreInput",
    "Scorer",
    "Weight",
    "import_object",
    "import_scorer",
    "scorer_class",
]
