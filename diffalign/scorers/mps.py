"""MPS: image tokens look at those prompt tokens that speak of a condition, and the fused class token meets the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, silu

from diffalign.scorers.base import Card, Reward, Weight
from diffalign.scorers.encoders import Encoder, tokenizer_of
from diffalign.scorers.preprocess import Preprocess
from diffalign.scorers.weights import choose, fit, read_weights, stripped

OVERALL = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, texture, "
    "quantity, attributes, position, number, location, word, things."
)
"""The condition of the one checkpoint that was released."""

THRESHOLD = 0.3
"""Of the published evaluations; the model's own code says 0.01."""

VIT_H: dict[str, Any] = {
    "projection_dim": 1024,
    "text_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
        "projection_dim": 1024,
        "eos_token_id": 49407,
        "bos_token_id": 49406,
        "pad_token_id": 1,
    },
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
        "projection_dim": 1024,
        "patch_size": 14,
        "image_size": 224,
    },
}
"""CLIP H/14 of LAION, which PickScore and MPS were tuned from."""
H14_TOKENIZER = Weight("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", ("*.json", "merges.txt"))


class Gated(nn.Module):
    """SwiGLU: the second half of the channels gates the first."""

    def forward(self, x: Tensor) -> Tensor:
        x, gate = x.chunk(2, dim=-1)
        return silu(gate) * x


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Attention of several query heads (B, N, heads D) to one head of keys and values (B, M, D) (Shazeer 2019)."""
    b, n, _ = q.shape
    q = q.view(b, n, heads, -1).transpose(1, 2)
    k, v = (x[:, None].expand(-1, heads, -1, -1) for x in (k, v))
    out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).reshape(b, n, -1)


class Cross(nn.Module):
    """x + attention to the prompt + feed-forward, side by side on the normed x."""

    def __init__(self, dim: int, heads: int, head: int = 64) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * head, bias=False)
        self.to_out = nn.Linear(heads * head, dim, bias=False)
        self.ff = nn.Sequential(nn.Linear(dim, 8 * dim, bias=False), Gated(), nn.Linear(4 * dim, dim, bias=False))

    def forward(self, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        y = self.norm(x)
        k, v = self.to_kv(context).chunk(2, dim=-1)
        return x + self.to_out(attend(self.to_q(y), k, v, self.heads, mask)) + self.ff(y)


class Parallel(nn.Module):
    """x + rotary self-attention + feed-forward, all from one projection of the normed x (PaLM)."""

    def __init__(self, dim: int, heads: int, head: int = 64) -> None:
        super().__init__()
        self.heads, self.widths = heads, (heads * head, head, head, 8 * dim)
        self.norm = nn.LayerNorm(dim)
        self.rotary_emb = nn.Module()
        self.rotary_emb.register_buffer("inv_freq", 10000.0 ** (-torch.arange(0, head, 2).float() / head))
        self.fused_attn_ff_proj = nn.Linear(dim, sum(self.widths), bias=False)
        self.attn_out = nn.Linear(heads * head, dim, bias=False)
        self.ff_out = nn.Sequential(Gated(), nn.Linear(4 * dim, dim, bias=False))

    def rotate(self, x: Tensor) -> Tensor:
        """Turn (B, N, ..., D) by its position N (Su et al. 2021, halves paired)."""
        frequency: Any = self.rotary_emb.inv_freq
        angle = torch.outer(torch.arange(x.shape[1], device=x.device, dtype=frequency.dtype), frequency)
        angle = angle.view(1, x.shape[1], *(1,) * (x.dim() - 3), -1)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, ff = self.fused_attn_ff_proj(self.norm(x)).split(self.widths, dim=-1)
        q = self.rotate(q.unflatten(-1, (self.heads, -1))).flatten(2)
        return x + self.attn_out(attend(q, self.rotate(k), v, self.heads)) + self.ff_out(ff)


class Fusion(nn.Module):
    """Four times cross and parallel."""

    def __init__(self, dim: int, heads: int, layers: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleList([Cross(dim, heads), Parallel(dim, heads)]) for _ in range(layers)])

    def forward(self, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        pair: Any
        for pair in self.layers:
            x = pair[1](pair[0](x, context, mask))
        return x


class TokenEncoder(Encoder):
    """All projected image tokens (B, 257, D), from before the last layer norm, as MPS was trained."""

    def features(self, x: Tensor) -> Tensor:
        clip = self.net.model
        found: Tensor = clip.visual_projection(clip.vision_model(pixel_values=x).last_hidden_state)
        return found


class MPS(Reward):
    """exp(logit_scale) cos(text, fused class token).

    A prompt token counts where its largest product with a token of the condition is above 0.3 of the prompt's own
    largest. The published code divides by the largest of the batch, so its numbers hang on what else is in it; published
    evaluations had batches of one, which is what this gives for any batch.
    """

    config: ClassVar[dict[str, Any]] = VIT_H
    heads: ClassVar[int] = 16
    condition: str = OVERALL
    card: ClassVar[Card] = Card(
        name="mps",
        summary="exp(logit_scale) cos(text, image fused with the prompt tokens that match the condition), overall",
        unit="100 x cosine; 5 to 15",
        citation="Zhang et al. 2024, arXiv 2405.14705",
        licence="MIT",
        weights=(
            Weight("RE-N-Y/mpsv1", ("*.safetensors", "MPS_overall.pth")),
            H14_TOKENIZER,
        ),
        geometry="crop",
        size=224,
        max_tokens=77,
        differentiable=True,
    )

    @classmethod
    def network(cls) -> nn.ModuleDict:
        """The empty network."""
        from transformers import CLIPConfig, CLIPModel

        return nn.ModuleDict({
            "model": CLIPModel(CLIPConfig(**cls.config)),
            "cross_model": Fusion(cls.config["projection_dim"], cls.heads),
        })  # fmt: skip

    @staticmethod
    def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Published names to ours: the residual wrappers and the position ids are gone."""
        state = stripped(state, "mps.")
        return {k.replace(".fn.", "."): v for k, v in state.items() if not k.endswith("position_ids")}

    def __init__(self, path: Path, tokenizer: Path, device: str = "cpu", condition: str | None = None) -> None:
        """``condition`` are the words of another dimension; the published weights are those of ``OVERALL``."""
        self.condition = condition or type(self).condition

        found = choose(path, *self.card.weights[0].files)
        net = self.network()
        fit(net, self.renamed(read_weights(found)), found)
        self.encoder = TokenEncoder(net, Preprocess(self.config["vision_config"]["image_size"], centre="floor"), device)
        self.tokenizer = tokenizer_of(tokenizer)

    @torch.no_grad()
    def _text(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Projected tokens (B, 77, D) and their pooled end (B, D)."""
        clip = self.encoder.net.model
        ids = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self.card.max_tokens, return_tensors="pt"
        ).input_ids
        out = clip.text_model(input_ids=ids.to(self.encoder.device))
        return clip.text_projection(out.last_hidden_state), clip.text_projection(out.pooler_output)

    def head(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        net = self.encoder.net
        text, end = self._text(prompts)
        condition, _ = self._text([self.condition])
        match = (text @ condition[0].T).amax(-1)
        seen = match / match.amax(-1, keepdim=True) > THRESHOLD
        fused = net.cross_model(features, text, seen[:, None, None, :])[:, 0]
        return net.model.logit_scale.exp() * (normalize(end, dim=-1) * normalize(fused, dim=-1)).sum(-1)

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        limit = self.card.max_tokens or 0
        return [len(self.tokenizer(p, verbose=False).input_ids) > limit for p in prompts]
