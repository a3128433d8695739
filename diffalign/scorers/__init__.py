"""Reward models over images and prompts. To add one: a class with a card, and its line in the table."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import Any

from diffalign.errors import ConfigError
from diffalign.scorers.base import (
    Callback,
    Card,
    Reward,
    ScoreBatch,
    ScoreInput,
    Scorer,
    Weight,
    import_object,
    import_scorer,
    isolated,
)

# name -> module:class
SCORERS = {
    "clip": "diffalign.scorers.clip:CLIPScore",
    "clip100": "diffalign.scorers.clip:CLIPScore100",
    "clipscore": "diffalign.scorers.clip:CLIPScoreHessel",
    "hpsv2": "diffalign.scorers.hps:HPSv2",
    "hpsv2.1": "diffalign.scorers.hps:HPSv21",
    "hpsv3": "diffalign.scorers.hpsv3:HPSv3",
    "pickscore": "diffalign.scorers.clip:PickScore",
    "step-aware": "diffalign.scorers.step_aware:StepAware",
    "step-aware-sdxl": "diffalign.scorers.step_aware:StepAwareSDXL",
    "imagereward": "diffalign.scorers.blip:ImageReward",
    "cyclereward": "diffalign.scorers.blip:CycleReward",
    "mps": "diffalign.scorers.mps:MPS",
    "decomposed": "diffalign.scorers.clip:Decomposed",
    "aesthetic-v1": "diffalign.scorers.aesthetic:AestheticV1",
    "aesthetic-v2": "diffalign.scorers.aesthetic:AestheticV2",
    "aesthetic-v2.5": "diffalign.scorers.aesthetic:AestheticV25",
    "clip-i": "diffalign.scorers.subject:ClipI",
    "dino": "diffalign.scorers.subject:Dino",
    "harmonic": "diffalign.scorers.harmonic:Harmonic",
    "lpips": "diffalign.scorers.lpips:LPIPS",
    "safety": "diffalign.scorers.safety:SafetyChecker",
    "nsfw": "diffalign.scorers.safety:NSFW",
    "q16": "diffalign.scorers.safety:Q16",
    "compressibility": "diffalign.scorers.jpeg:Compressibility",
    "incompressibility": "diffalign.scorers.jpeg:Incompressibility",
    "ocr": "diffalign.scorers.ocr:OCR",
    "geneval": "diffalign.scorers.geneval:GenEval",
}


def table() -> dict[str, str]:
    """``SCORERS``, and what other packages offer as entry points of the group ``diffalign.scorers``; our names win."""
    return {**{e.name: e.value for e in entry_points(group="diffalign.scorers")}, **SCORERS}


def scorer_class(name: str) -> Any:
    """The class behind a name of the table; of another package it may be a callable as well."""
    module, _, cls = table()[name].partition(":")
    try:
        return getattr(importlib.import_module(module), cls)
    except (ImportError, AttributeError) as e:
        raise ConfigError(f"cannot import the scorer {name} ({table()[name]}): {e}") from e


def card_of(name: str) -> Card | None:
    """The card of a name of the table, if it has both."""
    return getattr(scorer_class(name), "card", None) if name in table() else None


__all__ = [
    "SCORERS",
    "Callback",
    "Card",
    "Reward",
    "ScoreBatch",
    "ScoreInput",
    "Scorer",
    "Weight",
    "card_of",
    "import_object",
    "import_scorer",
    "isolated",
    "scorer_class",
    "table",
]
