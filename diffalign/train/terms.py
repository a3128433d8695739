"""From a batch of encoded examples to the errors that objectives read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffalign.models import Cond, Model
from diffalign.objectives import Data, GroupTerms, ImageTerms, LabelTerms, Need, PairTerms, Terms
from diffalign.path import Coeffs, add_noise, denoise_error, split, target
from diffalign.timesteps import TimestepPolicy
from diffalign.train.coupling import Coupling, invert
from diffalign.train.replay import replay

Texts = tuple[str | None, ...]


@dataclass(frozen=True)
class Batch:
    """B encoded examples of K pictures with their noise, at S times each.

    The frames (B, K, 6) say how each picture was cut: see :meth:`diffalign.models.Model.sized`.
    """

    x0: Tensor
    """(B, K, C, H, W)"""
    frames: Tensor
    eps: Tensor
    """(B, K, S, C, H, W)"""
    u: Tensor
    """(B, K, S) fractions of the schedule"""
    conds: tuple[Cond | Texts, ...]
    """Encoded prompts, or the prompts themselves where the text encoders are trained: for all pictures, or for each."""
    weight: Tensor
    data: Data = "pairs"
    facts: dict[str, Tensor] = field(default_factory=dict)
    """What is known of the examples: p_win (B,), good (B,), advantage (B,), scores (B, K), kind (B,)."""
    maps: Tensor | None = None
    """(B, H, W) weights of the latents' places in every error; 1 everywhere if not given."""

    def __len__(self) -> int:
        return len(self.u)


def weigh(model: Model, timesteps: TimestepPolicy, c: Coeffs) -> Tensor:
    """lambda of the times of ``c``, (B,).

    Raises:
        ConfigError: the model's schedule has no such weights.
    """
    return timesteps.weight(c, model.kind, model.coeffs(model.timestep(torch.tensor([1 - 2**-24]))))


@dataclass(frozen=True)
class View:
    """What the network sees of a batch: N = S * K * B rows, draw by draw and picture by picture."""

    x0: Tensor
    """(N, C, H, W), as are ``x`` and ``wanted``, what is to be predicted there. Of a replay x0 is the winners' alone."""
    x: Tensor
    wanted: Tensor
    u: Tensor
    """(N,) fractions of the schedule; of a replay the winners' alone."""
    t: Tensor
    c: Coeffs
    cond: Callable[[], Cond]
    """Read anew for every set of weights: text encoders may be among them."""
    pictures: int
    """K, of those that are seen."""
    cost: int
    """Denoiser passes that it took to make."""


def view(model: Model, batch: Batch, coupling: Coupling, needs: frozenset[Need]) -> View:
    """Noise a batch. Of pairs whose objective does not ask for the loser, only the winners are seen."""
    (b, k), draws = batch.x0.shape[:2], batch.u.shape[2]
    k = 1 if batch.data == "pairs" and "loser" not in needs else k
    device = model.timestep(batch.u[:, 0, 0]).device

    def flat(x: Tensor) -> Tensor:
        """(B, K, S, ...) to rows."""
        return x[:, :k].transpose(0, 2).flatten(0, 2)

    def cond(n: int) -> Cond:
        """Of the first n pictures."""
        said = batch.conds * n if len(batch.conds) == 1 else batch.conds[:n]
        read = [x if isinstance(x, Cond) else model.encode_prompts(x) for x in said]
        frames = batch.frames.expand(-1, n, -1) if batch.frames.shape[1] == 1 else batch.frames
        return Cond.cat([model.sized(x, frames[:, i]) for i, x in enumerate(read)] * draws).to(device)

    x0 = flat(batch.x0[:, :, None].expand(-1, -1, draws, *batch.x0.shape[2:])).to(device)
    eps, u = flat(batch.eps).to(device), flat(batch.u)
    t = model.timestep(u, (x0.shape[-2], x0.shape[-1]))
    c, cost = model.coeffs(t), 0
    if coupling.noise == "inverted":
        eps = invert(model, x0, u.to(device), cond(k), coupling.inversion_steps, coupling.renoise)
        cost = b * k * draws * coupling.inversion_steps * (1 + coupling.renoise)
    x, wanted = add_noise(x0, eps, c), target(model.kind, x0, eps, c)
    if coupling.noise == "replay" and "loser" in needs:  # of winners alone: the second half is made here
        own, said_there, cost = replay(model, eps, batch.u[:, 0, 0], cond(k), coupling.replay_steps)
        k, x, wanted = 2, torch.cat([x, own]), torch.cat([wanted, said_there])
        t, c = torch.cat([t, t]), Coeffs(torch.cat([c.alpha, c.alpha]), torch.cat([c.sigma, c.sigma]))
    return View(x0, x, wanted, u.to(device), t, c, lambda: cond(k), k, cost)


def terms_of(
    model: Model,
    batch: Batch,
    timesteps: TimestepPolicy,
    needs: frozenset[Need],
    coupling: Coupling | None = None,
    reference: str = "reference",
    old: str = "old",
    average: str = "average",
    guidance: float = 1.0,
) -> Terms:
    """Errors of all pictures in one forward pass per set of weights; ``reference`` names the weights to compare with, ``old``
    those that sampled, and ``average`` those to stay near; ``guidance`` is what a model that was distilled on it is told.
    """
    v = view(model, batch, coupling or Coupling(), needs)
    scale, k, b, draws = weigh(model, timesteps, v.c), v.pictures, len(batch), batch.u.shape[2]
    maps = None if batch.maps is None else batch.maps.to(v.x.device)[:, None]
    place = None if maps is None else maps.repeat(draws * k, 1, 1, 1)

    def by_picture(e: Tensor) -> tuple[Tensor, ...]:
        """Means over the draws, (B,) for each picture."""
        return e.view(draws, k, b).mean(0).unbind(0)

    def errors_of(prediction: Tensor, of: Tensor) -> tuple[Tensor, ...]:
        return by_picture(scale * denoise_error(prediction, of, place))

    def under(name: str) -> Tensor:
        with torch.no_grad(), model.weights(name):
            return model.predict(v.x, v.t, v.cond(), guidance)

    def residual(prediction: Tensor) -> Tensor:
        return (split(model.kind, prediction, v.x, v.c)[0] - v.x0).flatten(1)

    there = under(reference) if "reference" in needs else None
    before = under(old) if "old" in needs else None
    amid = under(average) if "average" in needs else None
    here = model.predict(v.x, v.t, v.cond(), guidance)
    facts = {name: value.to(v.x.device) for name, value in batch.facts.items()}
    found: dict[str, Any] = {
        "t": batch.u[:, 0].mean(-1).to(v.x.device),
        "weight": batch.weight.to(v.x.device),
        "images": b * k,
        "cost": b * k * draws * (3 + len(needs & {"reference", "old", "average"})) + v.cost,
        "group": facts.get("group"),
    }
    if batch.data == "images":
        found["time"] = by_picture(v.c.sigma if model.kind == "flow" else v.u)[0]
    if before is not None:
        found["old"] = errors_of(before, v.wanted)[0]
    if there is not None and "distance" in needs:
        found["distance"] = errors_of(here, there)[0]
    if amid is not None:
        found["distance_average"] = errors_of(here, amid)[0]
    if "residual" in needs:
        found |= {"residual": residual(here)} | ({} if before is None else {"residual_old": residual(before)})
    if "overlap" in needs:
        rho = (here.detach().float() - v.wanted.float()).view(draws, 2, b, *v.x0.shape[1:])
        product = rho[:, 0] * rho[:, 1] if maps is None else rho[:, 0] * rho[:, 1] * maps
        found["overlap"] = (scale.view(draws, 2, b)[:, 0] * product.flatten(2).mean(-1)).mean(0)
    errors, ref = errors_of(here, v.wanted), () if there is None else errors_of(there, v.wanted)
    return as_read(batch.data, errors, ref, facts, found)


def as_read(
    data: Data, errors: Sequence[Tensor], ref: Sequence[Tensor], facts: dict[str, Tensor], found: dict[str, Any]
) -> Terms:
    """Errors (B,) of each picture, and those of the reference where there are any, under the names that objectives read."""
    first = ref[0] if ref else None
    match data:
        case "labels":
            return LabelTerms(errors[0], facts["good"], first, **found)
        case "images":
            return ImageTerms(errors[0], facts["advantage"], ref=first, **found)
        case "groups":
            return GroupTerms(
                torch.stack(list(errors), 1), facts["scores"], torch.stack(list(ref), 1) if ref else None, **found
            )
    found |= {name: facts[name] for name in ("p_win", "kind") if name in facts}
    if "scores" in facts:
        found |= {"score_winner": facts["scores"][:, 0], "score_loser": facts["scores"][:, 1]}
    both = len(errors) == 2
    return PairTerms(errors[0], errors[1] if both else None, first, ref[1] if ref and both else None, **found)
