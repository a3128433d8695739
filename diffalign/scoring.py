"""From a name to a scorer: the only place that gives scorers their weights, the built-in judge, a device and an identity."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from diffalign.errors import ConfigError, ModelError
from diffalign.hub import resolve

if TYPE_CHECKING:
    from diffalign.scorers import Card, Scorer
    from diffalign.scorers.verify import Check

NONE: Mapping[str, Scorer] = MappingProxyType({})
DECODING = "1"
"""Rises whenever the same file is decoded to other pixels."""


class ShapesScorer:
    """The exact judge as a scorer: exact, score (the share of facts that hold), cleanliness, and each kind of fact."""

    name = "shapes"
    summary = ("score", "exact", "cleanliness")
    kinds = ("colour", "shape", "count", "relation", "background")

    def __call__(self, batch: Any) -> Any:
        import torch

        from diffalign.scorers import ScoreBatch
        from diffalign.shapes.judge import judge

        verdicts = judge(batch.images, batch.prompts)
        values = {
            "score": [v.score for v in verdicts],
            "exact": [float(v.exact) for v in verdicts],
            "cleanliness": [v.cleanliness for v in verdicts],
        }
        for kind in self.kinds:
            held = [[ok for fact, ok in v.facts.items() if fact.startswith(kind)] for v in verdicts]
            values[kind] = [sum(h) / len(h) if h else float("nan") for h in held]
        return ScoreBatch({k: torch.tensor(v) for k, v in values.items()}, partial=frozenset({"relation"}))


def make_scorers(
    names: Sequence[str], away: bool = False, made: Mapping[str, Scorer] = NONE, together: bool = False
) -> list[Scorer]:
    """Scorers by name; see :attr:`EvaluateSpec.scorers`. ``away`` leaves their encoders in main memory, and ``made`` are
    there already. ``together`` says that all pictures of a prompt come in one batch, which some compare with each other.

    Raises:
        ConfigError: two scorers would give a value of the same name, or one cannot be built as it is written, or compares
            pictures that do not come together.
    """
    from diffalign.scorers.wins import comparing

    if not together and (among := comparing(names)):
        raise ConfigError(
            f"{among[0]} compares the pictures of a prompt with each other, which only online.reward has together",
            hint="use vlm or unifiedreward, which see one picture",
        )
    out = []
    for name in names:
        out.append(made[name] if name in made else make_scorer(name))
        for scorer in [out[-1], *getattr(out[-1], "members", ())] if away else ():
            if hasattr(encoder := getattr(scorer, "encoder", None), "move"):
                encoder.move(True)  # type: ignore[union-attr]
    called = [scorer.name for scorer in out]
    if twice := [name for name in called if called.count(name) > 1]:
        raise ConfigError(f"two scorers are called {twice[0]!r}", hint="score with one of them at a time")
    return out


def make_scorer(name: str) -> Scorer:
    """One scorer: ``shapes``, ``taste:KIND``, ``NAME`` or ``NAME:PATH[,PATH]`` of the table, ``http:URL``,
    ``vlm:URL,MODEL``, ``pkg.mod:obj``, or several as one, ``minimum:A|B``, ``ensemble:A|B``, ``gate:A|B|BLOCKED``.

    Paths stand for the weights of the scorer's card, in order; those not given are fetched from where they are published.
    """
    from diffalign.scorers import Callback, import_object, import_scorer, scorer_class, table

    kind, _, rest = name.partition(":")
    if name == "shapes":
        return ShapesScorer()
    if kind == "taste":
        from diffalign.shapes.taste import Taste

        taste = Taste(rest)  # type: ignore[arg-type]
        return Callback(taste, taste.name)
    if name == "geneval:shapes":
        from diffalign.shapes.detect import detect, requirements

        made: Scorer = scorer_class(kind)(detect, requirements)
        return made
    if kind in ("http", "https"):
        from diffalign.scorers.http import Address, HTTPScorer

        return HTTPScorer(Address(rest if rest.startswith("http") else name))
    if kind.startswith(("vlm", "unifiedreward")):
        from diffalign.scorers.vlm import judges, make_judge

        if kind in judges():
            return make_judge(kind, rest)
    if kind not in table():
        from diffalign.scorers.combine import COMBINED

        return _combined(kind, rest) if kind in COMBINED else import_scorer(name)
    cls = scorer_class(kind)
    if not hasattr(cls, "card"):  # of another package
        return Callback(cls() if isinstance(cls, type) else cls, kind)
    card = cls.card
    if card.plugin is not None:
        if not rest:
            raise ConfigError(f"the scorer {kind} needs {kind}:pkg.mod:obj", hint=f"obj is {card.plugin}")
        made = cls(import_object(rest))
        return made
    _consent(card)
    if card.weights:
        quiet()
    paths = weights_of(card, [p for p in rest.split(",") if p])
    made = cls(*paths, device=device()) if paths else cls()
    return made


def _combined(kind: str, rest: str) -> Scorer:
    """Its version is that of all its members."""
    from diffalign.scorers.combine import Combined, members_of

    names, blocked = members_of(f"{kind}:{rest}"), None
    if kind == "gate" and names:
        try:
            blocked = float(rest.rpartition("|")[2])
        except ValueError as e:
            raise ConfigError(f"gate:{rest}: the last part is no number", hint="write gate:SCORER|SCORER|NUMBER") from e
    members = [make_scorer(name) for name in names]
    marks = [identify(name, member) for name, member in zip(names, members, strict=True)]
    return Combined(kind, members, blocked, hashlib.sha256(repr((blocked, marks)).encode()).hexdigest()[:12])


def weights_of(card: Card, given: Sequence[str]) -> list[Path]:
    """A local path for each of the card's weights: the given ones, then the published ones."""
    if len(given) > len(card.weights):
        raise ConfigError(f"the scorer {card.name} takes {len(card.weights)} paths, not {len(given)}")
    out = [resolve(path) for path in given]
    for weight in card.weights[len(given) :]:
        if not weight.on_hub:
            raise ModelError(
                f"{card.name}: {weight.files[0]} is not on the hub",
                hint=f"fetch it from {weight.source}, write {card.name}:PATH",
            )
        out.append(resolve(weight.source, files=weight.files))
    return out


def _consent(card: Card) -> None:
    """Refuse weights whose licence binds what is made with them, unless it was accepted by name."""
    accepted = [x.strip() for x in os.environ.get("DIFFALIGN_ACCEPT_LICENCES", "").split(",")]
    if card.gated and card.licence not in accepted:
        raise ConfigError(
            f"the weights of {card.name} are under {card.licence}", hint=f"DIFFALIGN_ACCEPT_LICENCES={card.licence} accepts it"
        )


def device() -> str:
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def verify_scorer(name: str) -> list[Check]:
    """The whole of ``diffalign verify``. Loading refuses weights of another architecture."""
    from diffalign.scorers import card_of
    from diffalign.scorers.verify import Check, check_files, check_scores

    kind, _, rest = name.partition(":")
    card = card_of(kind)
    if card is None or not card.weights:
        raise ConfigError(f"{name} has no weights to verify", hint="`diffalign list scorers` names those that have")
    checks = check_files(card, weights_of(card, [p for p in rest.split(",") if p]))
    scorer = make_scorer(name)
    return [*checks, Check("architecture", True, "every tensor of the network is there"), *check_scores(scorer, card)]


def quiet() -> None:
    """Leave the terminal to our own progress bars; truncated prompts are counted and reported by ourselves."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()


@dataclass(frozen=True)
class Identity:
    """What makes two numbers the same measurement: the middle of the key of the scores table."""

    scorer: str
    version: str
    preprocess: str


def identify(name: str, scorer: Scorer) -> Identity:
    """The version of the card and of the very weights, and of everything that happens to a picture before them."""
    from diffalign.scorers import table

    kind, _, rest = name.partition(":")
    card: Card | None = getattr(scorer, "card", None)
    version = str(getattr(scorer, "version", card.version if card else "1"))
    if card is not None and card.weights and kind in table():
        version += "-" + _digest(weights_of(card, [p for p in rest.split(",") if p]))
    preprocess = str(getattr(scorer, "preprocess_version", DECODING))
    steps = getattr(getattr(scorer, "encoder", None), "preprocess", None)
    if steps is not None:
        preprocess += f"-{_mark(steps)}"
    return Identity(scorer.name, version, preprocess)


def embedder(scorer: Scorer) -> str | None:
    """A name for the encoder of a scorer that reads one embedding a picture, the same for all scorers that share it.

    None for all others: references and whole token sequences are no embeddings.
    """
    from diffalign.scorers import Reward
    from diffalign.scorers.encoders import TextEncoder

    encoder = getattr(scorer, "encoder", None)
    if not isinstance(scorer, Reward) or not isinstance(encoder, TextEncoder) or encoder.source is None:
        return None
    if "references" in scorer.card.needs:
        return None
    return f"{_digest([encoder.source])}-{DECODING}-{_mark(encoder.preprocess)}"


def _mark(steps: Any) -> str:
    return hashlib.sha256(repr(steps).encode()).hexdigest()[:8]


def _digest(paths: Sequence[Path]) -> str:
    """Of all files at ``paths``: two trainings of one network have the same names and sizes."""
    digest = hashlib.sha256()
    for path in paths:
        for file in [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file()):
            about = file.stat()
            digest.update(_digest_of(file, about.st_size, about.st_mtime_ns))
    return digest.hexdigest()[:12]


@cache
def _digest_of(file: Path, size: int, time: int) -> bytes:
    """Gigabytes are read once, for the scorer and for its encoder."""
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").digest()
