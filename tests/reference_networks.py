"""Published layouts and forward passes of the reward models' networks, written from the formulas on bare tensors.

Nothing of diffalign, open_clip or transformers' modules is used: layouts are names and shapes, forwards are sums.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import conv2d, gelu, layer_norm, normalize

Layout = dict[str, tuple[int, ...]]
State = dict[str, Tensor]


class ClipSize(NamedTuple):
    width: int = 1280
    layers: int = 32
    heads: int = 16
    patch: int = 14
    image: int = 224
    text_width: int = 1024
    text_layers: int = 24
    text_heads: int = 16
    vocab: int = 49408
    context: int = 77
    dim: int = 1024


H14 = ClipSize()
L14 = ClipSize(1024, 24, 16, 14, 224, 768, 12, 12, 49408, 77, 768)


def both(name: str, shape: tuple[int, ...]) -> Layout:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def fill(layout: Layout, seed: int = 0) -> State:
    """Random weights; norms near one, so that nothing dies on the way."""
    g = torch.Generator().manual_seed(seed)
    out = {}
    for name, shape in layout.items():
        if name.endswith("position_ids"):
            out[name] = torch.arange(shape[-1])[None]
        elif name.endswith("inv_freq"):
            out[name] = 10000.0 ** (-torch.arange(0, 2 * shape[0], 2) / (2 * shape[0]))
        elif name.endswith("logit_scale"):
            out[name] = torch.tensor(3.0)
        else:
            x = torch.randn(shape, generator=g)
            norm = len(shape) == 1 and name.endswith("weight")
            fan = shape[-1] if len(shape) == 2 else math.prod(shape[1:]) if len(shape) == 4 else 16
            out[name] = 1 + 0.1 * x if norm else x / math.sqrt(fan) if len(shape) > 1 else 0.1 * x
    return out


# --- CLIP in the layout of open_clip --------------------------------------------------------------------------------


def open_clip_layout(s: ClipSize) -> Layout:
    def block(name: str, d: int) -> Layout:
        return {
            **both(f"{name}.ln_1", (d,)),
            f"{name}.attn.in_proj_weight": (3 * d, d),
            f"{name}.attn.in_proj_bias": (3 * d,),
            **both(f"{name}.attn.out_proj", (d, d)),
            **both(f"{name}.ln_2", (d,)),
            **both(f"{name}.mlp.c_fc", (4 * d, d)),
            **both(f"{name}.mlp.c_proj", (d, 4 * d)),
        }

    out: Layout = {
        "positional_embedding": (s.context, s.text_width),
        "text_projection": (s.text_width, s.dim),
        "logit_scale": (),
        "visual.class_embedding": (s.width,),
        "visual.positional_embedding": ((s.image // s.patch) ** 2 + 1, s.width),
        "visual.proj": (s.width, s.dim),
        "visual.conv1.weight": (s.width, 3, s.patch, s.patch),
        **both("visual.ln_pre", (s.width,)),
        **both("visual.ln_post", (s.width,)),
        "token_embedding.weight": (s.vocab, s.text_width),
        **both("ln_final", (s.text_width,)),
    }
    for i in range(s.layers):
        out |= block(f"visual.transformer.resblocks.{i}", s.width)
    for i in range(s.text_layers):
        out |= block(f"transformer.resblocks.{i}", s.text_width)
    return out


def hugging_layout(s: ClipSize) -> Layout:
    """The same network in the layout of transformers' CLIPModel, as its files have it."""

    def layer(name: str, d: int) -> Layout:
        out: Layout = {}
        for p in "qkv":
            out |= both(f"{name}.self_attn.{p}_proj", (d, d))
        return {
            **out,
            **both(f"{name}.self_attn.out_proj", (d, d)),
            **both(f"{name}.layer_norm1", (d,)),
            **both(f"{name}.layer_norm2", (d,)),
            **both(f"{name}.mlp.fc1", (4 * d, d)),
            **both(f"{name}.mlp.fc2", (d, 4 * d)),
        }

    out: Layout = {
        "logit_scale": (),
        "text_model.embeddings.token_embedding.weight": (s.vocab, s.text_width),
        "text_model.embeddings.position_embedding.weight": (s.context, s.text_width),
        **both("text_model.final_layer_norm", (s.text_width,)),
        "vision_model.embeddings.class_embedding": (s.width,),
        "vision_model.embeddings.patch_embedding.weight": (s.width, 3, s.patch, s.patch),
        "vision_model.embeddings.position_embedding.weight": ((s.image // s.patch) ** 2 + 1, s.width),
        **both("vision_model.pre_layrnorm", (s.width,)),
        **both("vision_model.post_layernorm", (s.width,)),
        "visual_projection.weight": (s.dim, s.width),
        "text_projection.weight": (s.dim, s.text_width),
    }
    for i in range(s.layers):
        out |= layer(f"vision_model.encoder.layers.{i}", s.width)
    for i in range(s.text_layers):
        out |= layer(f"text_model.encoder.layers.{i}", s.text_width)
    return out


def from_hugging(h: State) -> State:
    """transformers' names to open_clip's: q, k, v stacked, projections transposed."""
    out = {
        "positional_embedding": h["text_model.embeddings.position_embedding.weight"],
        "text_projection": h["text_projection.weight"].T,
        "logit_scale": h["logit_scale"],
        "visual.class_embedding": h["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": h["vision_model.embeddings.position_embedding.weight"],
        "visual.proj": h["visual_projection.weight"].T,
        "visual.conv1.weight": h["vision_model.embeddings.patch_embedding.weight"],
        "token_embedding.weight": h["text_model.embeddings.token_embedding.weight"],
    }
    names = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"}
    names |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for end in ("weight", "bias"):
        out[f"visual.ln_pre.{end}"] = h[f"vision_model.pre_layrnorm.{end}"]
        out[f"visual.ln_post.{end}"] = h[f"vision_model.post_layernorm.{end}"]
        out[f"ln_final.{end}"] = h[f"text_model.final_layer_norm.{end}"]
        for ours, theirs in (("visual.transformer.resblocks", "vision_model"), ("transformer.resblocks", "text_model")):
            for i in range(sum(k.startswith(f"{theirs}.encoder") and k.endswith("fc1.bias") for k in h)):
                layer = f"{theirs}.encoder.layers.{i}"
                out |= {f"{ours}.{i}.{a}.{end}": h[f"{layer}.{b}.{end}"] for a, b in names.items()}
                out[f"{ours}.{i}.attn.in_proj_{end}"] = torch.cat([h[f"{layer}.self_attn.{p}_proj.{end}"] for p in "qkv"])
    return out


def norm(x: Tensor, s: State, name: str, eps: float = 1e-5) -> Tensor:
    return layer_norm(x, x.shape[-1:], s[f"{name}.weight"], s[f"{name}.bias"], eps)


def linear(x: Tensor, s: State, name: str) -> Tensor:
    y = x @ s[f"{name}.weight"].T
    return y + s[f"{name}.bias"] if f"{name}.bias" in s else y


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | float = 0.0) -> Tensor:
    """softmax(q k / sqrt(d) + bias) v of (B, N, H D) and (B, M, H D)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    a = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias).softmax(-1)
    return (a @ v).transpose(1, 2).flatten(2)


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def resblocks(x: Tensor, s: State, prefix: str, layers: int, heads: int, act, bias: Tensor | float = 0.0) -> Tensor:
    for i in range(layers):
        p = f"{prefix}.{i}"
        y = norm(x, s, f"{p}.ln_1")
        q, k, v = (y @ s[f"{p}.attn.in_proj_weight"].T + s[f"{p}.attn.in_proj_bias"]).chunk(3, -1)
        x = x + linear(attention(q, k, v, heads, bias), s, f"{p}.attn.out_proj")
        x = x + linear(act(linear(norm(x, s, f"{p}.ln_2"), s, f"{p}.mlp.c_fc")), s, f"{p}.mlp.c_proj")
    return x


def clip_image_tokens(s: State, size: ClipSize, x: Tensor, act=gelu) -> Tensor:
    """(B, 1 + patches, width) before the last norm."""
    patches = conv2d(x, s["visual.conv1.weight"], stride=size.patch).flatten(2).transpose(1, 2)
    x = torch.cat([s["visual.class_embedding"].expand(len(x), 1, -1), patches], 1) + s["visual.positional_embedding"]
    return resblocks(norm(x, s, "visual.ln_pre"), s, "visual.transformer.resblocks", size.layers, size.heads, act)


def clip_image(s: State, size: ClipSize, x: Tensor, act=gelu) -> Tensor:
    return norm(clip_image_tokens(s, size, x, act)[:, 0], s, "visual.ln_post") @ s["visual.proj"]


def clip_text_tokens(s: State, size: ClipSize, ids: Tensor, act=gelu) -> Tensor:
    causal = torch.full((ids.shape[1],) * 2, -math.inf).triu(1)
    x = s["token_embedding.weight"][ids] + s["positional_embedding"][: ids.shape[1]]
    x = resblocks(x, s, "transformer.resblocks", size.text_layers, size.text_heads, act, causal)
    return norm(x, s, "ln_final") @ s["text_projection"]


def clip_text(s: State, size: ClipSize, ids: Tensor, act=gelu) -> Tensor:
    return clip_text_tokens(s, size, ids, act)[torch.arange(len(ids)), ids.argmax(-1)]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (normalize(a, dim=-1) * normalize(b, dim=-1)).sum(-1)


# --- a CLIP whose image tower knows the time (SPO), in the layout of transformers -------------------------------------


def timed_layout(s: ClipSize) -> Layout:
    """What the step-aware model has beside CLIP."""
    d = s.width
    out = both("t_embedder.mlp.0", (d, 256)) | both("t_embedder.mlp.2", (d, d))
    out |= both("vision_model.adaLN_modulation.1", (2 * d, d))
    for i in range(s.layers):
        out |= both(f"vision_model.encoder.layers.{i}.adaLN_modulation.1", (6 * d, d))
    return out


def timed_image(h: State, size: ClipSize, x: Tensor, times: list[float], act=gelu) -> Tensor:
    """(B, D): cosines before sines of t / 10000^(j / 128); each half of a layer is shifted, scaled and, before it is added,
    gated; the pooled token is shifted and scaled last.
    """
    s = from_hugging({k: v for k, v in h.items() if "adaLN" not in k and "t_embedder" not in k})
    angles = torch.tensor([[t / 10000 ** (j / 128) for j in range(128)] for t in times])
    c = linear(torch.cat([angles.cos(), angles.sin()], 1), h, "t_embedder.mlp.0")
    c = linear(c * c.sigmoid(), h, "t_embedder.mlp.2")
    c = c * c.sigmoid()
    patches = conv2d(x, s["visual.conv1.weight"], stride=size.patch).flatten(2).transpose(1, 2)
    x = torch.cat([s["visual.class_embedding"].expand(len(x), 1, -1), patches], 1) + s["visual.positional_embedding"]
    x = norm(x, s, "visual.ln_pre")
    for i in range(size.layers):
        p, said = f"visual.transformer.resblocks.{i}", linear(c, h, f"vision_model.encoder.layers.{i}.adaLN_modulation.1")
        a, b, gate, a2, b2, gate2 = said.view(len(x), 6, 1, -1).unbind(1)
        q, k, v = ((norm(x, s, f"{p}.ln_1") * (1 + b) + a) @ s[f"{p}.attn.in_proj_weight"].T).add(
            s[f"{p}.attn.in_proj_bias"]
        ).chunk(3, -1)  # fmt: skip
        x = x + gate * linear(attention(q, k, v, size.heads), s, f"{p}.attn.out_proj")
        y = norm(x, s, f"{p}.ln_2") * (1 + b2) + a2
        x = x + gate2 * linear(act(linear(y, s, f"{p}.mlp.c_fc")), s, f"{p}.mlp.c_proj")
    a, b = linear(c, h, "vision_model.adaLN_modulation.1").chunk(2, -1)
    return (norm(x[:, 0], s, "visual.ln_post") * (1 + b) + a) @ s["visual.proj"]


# --- BLIP in the layout of ImageReward ------------------------------------------------------------------------------


class BlipSize(NamedTuple):
    width: int = 1024
    layers: int = 24
    heads: int = 16
    patch: int = 16
    image: int = 224
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12
    vocab: int = 30524
    positions: int = 512


def blip_layout(s: BlipSize, mlp: tuple[int, ...]) -> Layout:
    """``mlp`` are the indices of the five linear layers behind the class token."""
    v, t = "blip.visual_encoder", "blip.text_encoder"
    out: Layout = {
        f"{v}.cls_token": (1, 1, s.width),
        f"{v}.pos_embed": (1, (s.image // s.patch) ** 2 + 1, s.width),
        **both(f"{v}.patch_embed.proj", (s.width, 3, s.patch, s.patch)),
        **both(f"{v}.norm", (s.width,)),
        f"{t}.embeddings.position_ids": (1, s.positions),
        f"{t}.embeddings.word_embeddings.weight": (s.vocab, s.text_width),
        f"{t}.embeddings.position_embeddings.weight": (s.positions, s.text_width),
        **both(f"{t}.embeddings.LayerNorm", (s.text_width,)),
        **both("blip.vision_proj", (256, s.width)),
        **both("blip.text_proj", (256, s.text_width)),
    }
    for i in range(s.layers):
        b = f"{v}.blocks.{i}"
        out |= both(f"{b}.norm1", (s.width,)) | both(f"{b}.norm2", (s.width,))
        out |= both(f"{b}.attn.qkv", (3 * s.width, s.width)) | both(f"{b}.attn.proj", (s.width, s.width))
        out |= both(f"{b}.mlp.fc1", (4 * s.width, s.width)) | both(f"{b}.mlp.fc2", (s.width, 4 * s.width))
    d = s.text_width
    for i in range(s.text_layers):
        b = f"{t}.encoder.layer.{i}"
        for kind, context in (("attention", d), ("crossattention", s.width)):
            out |= both(f"{b}.{kind}.self.query", (d, d))
            out |= both(f"{b}.{kind}.self.key", (d, context)) | both(f"{b}.{kind}.self.value", (d, context))
            out |= both(f"{b}.{kind}.output.dense", (d, d)) | both(f"{b}.{kind}.output.LayerNorm", (d,))
        out |= both(f"{b}.intermediate.dense", (4 * d, d)) | both(f"{b}.output.dense", (d, 4 * d))
        out |= both(f"{b}.output.LayerNorm", (d,))
    for i, (a, b) in zip(mlp, ((d, 1024), (1024, 128), (128, 64), (64, 16), (16, 1)), strict=True):
        out |= both(f"mlp.layers.{i}", (b, a))
    return out


def blip_image(s: State, size: BlipSize, x: Tensor) -> Tensor:
    v = "blip.visual_encoder"
    x = conv2d(x, s[f"{v}.patch_embed.proj.weight"], s[f"{v}.patch_embed.proj.bias"], stride=size.patch)
    x = torch.cat([s[f"{v}.cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1) + s[f"{v}.pos_embed"]
    for i in range(size.layers):
        b = f"{v}.blocks.{i}"
        q, k, w = linear(norm(x, s, f"{b}.norm1", 1e-6), s, f"{b}.attn.qkv").chunk(3, -1)
        x = x + linear(attention(q, k, w, size.heads), s, f"{b}.attn.proj")
        x = x + linear(gelu(linear(norm(x, s, f"{b}.norm2", 1e-6), s, f"{b}.mlp.fc1")), s, f"{b}.mlp.fc2")
    return norm(x, s, f"{v}.norm", 1e-6)


def blip_class(s: State, size: BlipSize, image: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The class token of BERT with cross-attention: post-norm layers, each self, across, feed-forward."""
    t = "blip.text_encoder"
    x = s[f"{t}.embeddings.word_embeddings.weight"][ids] + s[f"{t}.embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = norm(x, s, f"{t}.embeddings.LayerNorm", 1e-12)
    hidden = (1 - mask[:, None, None].float()) * -1e4
    for i in range(size.text_layers):
        b = f"{t}.encoder.layer.{i}"
        for kind, context, bias in (("attention", None, hidden), ("crossattention", image, 0.0)):
            c = x if context is None else context
            q, k, v = (linear(y, s, f"{b}.{kind}.self.{n}") for n, y in (("query", x), ("key", c), ("value", c)))
            y = linear(attention(q, k, v, size.text_heads, bias), s, f"{b}.{kind}.output.dense")
            x = norm(x + y, s, f"{b}.{kind}.output.LayerNorm", 1e-12)
        y = linear(gelu(linear(x, s, f"{b}.intermediate.dense")), s, f"{b}.output.dense")
        x = norm(x + y, s, f"{b}.output.LayerNorm", 1e-12)
    return x[:, 0]


# --- MPS ------------------------------------------------------------------------------------------------------------


def fusion_layout(d: int, heads: int, prefix: str = "cross_model", head: int = 64, layers: int = 4) -> Layout:
    out: Layout = {}
    for i in range(layers):
        a, b = f"{prefix}.layers.{i}.0.fn", f"{prefix}.layers.{i}.1.fn"
        out |= both(f"{a}.norm", (d,)) | both(f"{b}.norm", (d,))
        out |= {
            f"{a}.to_q.weight": (heads * head, d),
            f"{a}.to_kv.weight": (2 * head, d),
            f"{a}.to_out.weight": (d, heads * head),
            f"{a}.ff.0.weight": (8 * d, d),
            f"{a}.ff.2.weight": (d, 4 * d),
            f"{b}.rotary_emb.inv_freq": (head // 2,),
            f"{b}.fused_attn_ff_proj.weight": (heads * head + 2 * head + 8 * d, d),
            f"{b}.attn_out.weight": (d, heads * head),
            f"{b}.ff_out.1.weight": (d, 4 * d),
        }
    return out


def fuse(s: State, x: Tensor, text: Tensor, seen: Tensor, heads: int, layers: int = 4) -> Tensor:
    """(B, N, D) image tokens that looked at the seen (B, M) of (B, M, D) text tokens."""

    def swiglu(y: Tensor) -> Tensor:
        a, gate = y.chunk(2, -1)
        return gate * torch.sigmoid(gate) * a

    def multi_query(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float) -> Tensor:
        return attention(q, k.repeat(1, 1, heads), v.repeat(1, 1, heads), heads, bias)

    def rotary(y: Tensor, freq: Tensor, count: int) -> Tensor:
        """As complex numbers: the pair (y_j, y_{j + D/2}) is turned by position times frequency j."""
        parts = y.unflatten(-1, (count, 2, -1))
        z = torch.complex(parts[..., 0, :], parts[..., 1, :])
        z = z * torch.exp(1j * torch.arange(y.shape[1])[:, None] * freq)[:, None]
        return torch.stack([z.real, z.imag], -2).flatten(2)

    bias = torch.where(seen, 0.0, -math.inf)[:, None, None]
    for i in range(layers):
        a, b = f"cross_model.layers.{i}.0.fn", f"cross_model.layers.{i}.1.fn"
        y = norm(x, s, f"{a}.norm")
        k, v = linear(text, s, f"{a}.to_kv").chunk(2, -1)
        across = linear(multi_query(linear(y, s, f"{a}.to_q"), k, v, bias), s, f"{a}.to_out")
        x = x + across + linear(swiglu(linear(y, s, f"{a}.ff.0")), s, f"{a}.ff.2")
        freq = s[f"{b}.rotary_emb.inv_freq"]
        d = 2 * len(freq)
        q, k, v, ff = linear(norm(x, s, f"{b}.norm"), s, f"{b}.fused_attn_ff_proj").split(
            (heads * d, d, d, s[f"{b}.ff_out.1.weight"].shape[1] * 2), -1
        )
        own = multi_query(rotary(q, freq, heads), rotary(k, freq, 1), v, 0.0)
        x = x + linear(own, s, f"{b}.attn_out") + linear(swiglu(ff), s, f"{b}.ff_out.1")
    return x


# --- Qwen2-VL in the layout of HPSv3 ---------------------------------------------------------------------------------


class QwenSize(NamedTuple):
    width: int = 1280
    layers: int = 32
    heads: int = 16
    text_width: int = 3584
    text_layers: int = 28
    text_heads: int = 28
    groups: int = 4
    inner: int = 18944
    vocab: int = 151658
    sections: tuple[int, int, int] = (16, 24, 24)


def qwen_layout(s: QwenSize) -> Layout:
    d, kv = s.text_width, s.text_width // s.text_heads * s.groups
    out: Layout = {
        "visual.patch_embed.proj.weight": (s.width, 3, 2, 14, 14),
        **both("visual.merger.ln_q", (s.width,)),
        **both("visual.merger.mlp.0", (4 * s.width, 4 * s.width)),
        **both("visual.merger.mlp.2", (d, 4 * s.width)),
        "model.embed_tokens.weight": (s.vocab, d),
        "model.norm.weight": (d,),
        "lm_head.weight": (s.vocab, d),
    }
    for i in range(s.layers):
        b = f"visual.blocks.{i}"
        out |= both(f"{b}.norm1", (s.width,)) | both(f"{b}.norm2", (s.width,))
        out |= both(f"{b}.attn.qkv", (3 * s.width, s.width)) | both(f"{b}.attn.proj", (s.width, s.width))
        out |= both(f"{b}.mlp.fc1", (4 * s.width, s.width)) | both(f"{b}.mlp.fc2", (s.width, 4 * s.width))
    for i in range(s.text_layers):
        b = f"model.layers.{i}"
        out |= both(f"{b}.self_attn.q_proj", (d, d))
        out |= both(f"{b}.self_attn.k_proj", (kv, d)) | both(f"{b}.self_attn.v_proj", (kv, d))
        out |= {f"{b}.self_attn.o_proj.weight": (d, d), f"{b}.mlp.down_proj.weight": (d, s.inner)}
        out |= {f"{b}.mlp.{n}_proj.weight": (s.inner, d) for n in ("gate", "up")}
        out |= {f"{b}.{n}_layernorm.weight": (d,) for n in ("input", "post_attention")}
    for i, (a, b_) in zip((0, 3, 5), ((d, 1024), (1024, 16), (16, 2)), strict=True):
        out |= both(f"rm_head.{i}", (b_, a))
    return out


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary embedding: (..., N, d) and (N, d / 2)."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def rotated_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, angles: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Of (N, H d) and (N, G d): groups of heads share keys and values."""
    d = q.shape[-1] // heads
    q, k, v = (x.unflatten(-1, (-1, d)).transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(heads // len(x), 0) for x in (k, v))
    a = (turned(q, angles) @ turned(k, angles).transpose(-1, -2) / math.sqrt(d) + bias).softmax(-1)
    return (a @ v).transpose(0, 1).flatten(1)


def merged_order(height: int, width: int) -> list[tuple[int, int]]:
    """Rows and columns of patches, the four that are merged next to each other."""
    corners = [(y, x) for y in range(0, height, 2) for x in range(0, width, 2)]
    return [(y + dy, x + dx) for y, x in corners for dy in (0, 1) for dx in (0, 1)]


def qwen_image(s: State, size: QwenSize, image: Tensor) -> Tensor:
    """(patches / 4, text width) of normalised pixels (3, H, W)."""
    order = merged_order(image.shape[1] // 14, image.shape[2] // 14)
    kernel = s["visual.patch_embed.proj.weight"].sum(2)  # both frames are the picture
    grid = conv2d(image[None], kernel, stride=14)[0]
    x = torch.stack([grid[:, r, c] for r, c in order])
    d = size.width // size.heads
    speed = 10000.0 ** (-torch.arange(0, d // 2, 2) / (d // 2))
    angles = torch.stack([torch.cat([r * speed, c * speed]) for r, c in order])
    for i in range(size.layers):
        b = f"visual.blocks.{i}"
        q, k, v = linear(norm(x, s, f"{b}.norm1", 1e-6), s, f"{b}.attn.qkv").chunk(3, -1)
        x = x + linear(rotated_attention(q, k, v, size.heads, angles), s, f"{b}.attn.proj")
        x = x + linear(quick_gelu(linear(norm(x, s, f"{b}.norm2", 1e-6), s, f"{b}.mlp.fc1")), s, f"{b}.mlp.fc2")
    x = norm(x, s, "visual.merger.ln_q", 1e-6).reshape(-1, 4 * size.width)
    return linear(gelu(linear(x, s, "visual.merger.mlp.0")), s, "visual.merger.mlp.2")


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def hpsv3(s: State, size: QwenSize, image: Tensor, before: list[int], after: list[int], place: int) -> Tensor:
    """mu of ids before and after the picture, read at ``place``."""
    seen = qwen_image(s, size, image)
    rows, columns = image.shape[1] // 28, image.shape[2] // 28
    words = s["model.embed_tokens.weight"]
    x = torch.cat([words[before], seen, words[after]])
    first, then = len(before), len(before) + max(rows, columns)
    where = [(n,) * 3 for n in range(first)]
    where += [(first, first + r, first + c) for r in range(rows) for c in range(columns)]
    where += [(n,) * 3 for n in range(then, then + len(after))]
    d = size.text_width // size.text_heads
    speed = 1e6 ** (-torch.arange(0, d, 2) / d)
    axis = [a for a, n in enumerate(size.sections) for _ in range(n)]
    angles = torch.stack([torch.stack([p[a] * f for a, f in zip(axis, speed, strict=True)]) for p in where])
    causal = torch.full((len(x),) * 2, -math.inf).triu(1)
    for i in range(size.text_layers):
        b = f"model.layers.{i}"
        y = rms(x, s[f"{b}.input_layernorm.weight"])
        q, k, v = (linear(y, s, f"{b}.self_attn.{n}_proj") for n in "qkv")
        x = x + linear(rotated_attention(q, k, v, size.text_heads, angles, causal), s, f"{b}.self_attn.o_proj")
        y = rms(x, s[f"{b}.post_attention_layernorm.weight"])
        y = torch.nn.functional.silu(linear(y, s, f"{b}.mlp.gate_proj")) * linear(y, s, f"{b}.mlp.up_proj")
        x = x + linear(y, s, f"{b}.mlp.down_proj")
    y = rms(x, s["model.norm.weight"])[place]
    for i in (0, 3):
        y = linear(y, s, f"rm_head.{i}").relu()
    return linear(y, s, "rm_head.5")[0]
