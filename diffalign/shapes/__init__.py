"""The built-in world: procedural pictures, captions, an exact judge and the builders of the shipped models."""

from __future__ import annotations

from diffalign.shapes.assets import asset
from diffalign.shapes.judge import Verdict, judge, see
from diffalign.shapes.render import draw, render, sample_layout
from diffalign.shapes.scene import Scene, Split, Thing, all_scenes, parse_caption, sample_prompts, sample_scenes
from diffalign.shapes.taste import Taste

__all__ = [
    "Scene",
    "Split",
    "Taste",
    "Thing",
    "Verdict",
    "all_scenes",
    "asset",
    "draw",
    "judge",
    "parse_caption",
    "render",
    "sample_layout",
    "sample_prompts",
    "sample_scenes",
    "see",
]
