"""Scorers: published layouts, independent forwards, preprocessing, gradients, combinators, errors. No weights are fetched."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import reference_networks as ref
import torch
from click.testing import CliRunner
from conftest import picture
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import gelu, normalize
from torchvision import transforms as T
from torchvision.transforms import functional as TF

from diffalign.cli import main
from diffalign.errors import ConfigError, DataError, ModelError
from diffalign.scorers import SCORERS, ScoreInput, combine, scorer_class
from diffalign.scorers.aesthetic import Aesthetic, AestheticV1, AestheticV2, AestheticV25, folded
from diffalign.scorers.blip import CycleReward, ImageReward
from diffalign.scorers.clip import PickScore
from diffalign.scorers.encoders import TransformersCLIP, shared
from diffalign.scorers.geneval import evaluate, relations
from diffalign.scorers.hps import HPSv2, HPSv21
from diffalign.scorers.hpsv3 import HPSv3, instruction_of, patches
from diffalign.scorers.mps import MPS, OVERALL
from diffalign.scorers.ocr import levenshtein, similarity
from diffalign.scorers.preprocess import CLIP_MEAN, CLIP_STD, Preprocess, of_folder
from diffalign.scorers.safety import NSFW, SafetyChecker
from diffalign.scorers.step_aware import StepAware, StepAwareSDXL
from diffalign.scorers.weights import differences
from diffalign.scoring import make_scorer, make_scorers, verify_scorer
from diffalign.shapes import build
from diffalign.shapes.detect import Found

PROMPTS = ["a red circle on a grey background", "a blue cross", "a green square left of a red circle on a white background"]
SMALL = ref.ClipSize(16, 2, 2, 14, 28, 16, 2, 2, 0, 77, 8)
PAGE = Path(__file__).parents[1] / "docs" / "scorers.md"


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


PICTURES = [noise(62, 56, 1), noise(28, 28, 2), noise(50, 90, 3)]  # the first leaves 3 pixels to cut: 2 + 1, or 1 + 2


def torchvision_crop(side: int) -> Callable[[list[Image.Image]], Tensor]:
    """What OpenAI's CLIP and ImageReward publish."""
    steps = [T.Resize(side, T.InterpolationMode.BICUBIC), T.CenterCrop(side), T.ToTensor(), T.Normalize(CLIP_MEAN, CLIP_STD)]
    return lambda images: torch.stack([T.Compose(steps)(i) for i in images])


def transformers_crop(side: int) -> Callable[[list[Image.Image]], Tensor]:
    """What PickScore and MPS publish: the PIL processor of transformers."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return lambda images: processor(images, return_tensors="pt").pixel_values


# --- twins: narrow networks with random weights, saved as the published files are ------------------------------------


def hugging_folder(
    folder: Path, size: ref.ClipSize = SMALL, act: str = "quick_gelu", seed: int = 0
) -> tuple[ref.State, ref.ClipSize]:
    """A CLIP folder of transformers; returns its tensors in open_clip's names."""
    tok = build.tokenizer(folder)
    size = size._replace(vocab=len(tok))
    state = ref.fill(ref.hugging_layout(size), seed)
    text, vision = (
        {"hidden_size": w, "intermediate_size": 4 * w, "num_hidden_layers": n, "num_attention_heads": h, "hidden_act": act}
        for w, n, h in ((size.text_width, size.text_layers, size.text_heads), (size.width, size.layers, size.heads))
    )
    ids = {"eos_token_id": tok.eos_token_id, "bos_token_id": tok.bos_token_id, "pad_token_id": tok.pad_token_id}
    text |= {"vocab_size": size.vocab, "max_position_embeddings": size.context, "projection_dim": size.dim, **ids}
    vision |= {"image_size": size.image, "patch_size": size.patch, "projection_dim": size.dim}
    config = {"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": size.dim}
    (folder / "config.json").write_text(json.dumps({**config, "text_config": text, "vision_config": vision}))
    side = {"height": size.image, "width": size.image}
    shape = {"size": {"shortest_edge": size.image}, "crop_size": side, "do_center_crop": True, "resample": 3}
    stats = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD, "image_processor_type": "CLIPImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps({**shape, **stats}))
    tok.model_max_length = size.context
    tok.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return ref.from_hugging(state), size


def world_ids(folder: Path, prompts: list[str], length: int = 77) -> Tensor:
    """Ids written out: start, a word each, end, and the end again to fill."""
    vocab = json.loads((folder / "vocab.json").read_text())
    start, end = vocab["<|startoftext|>"], vocab["<|endoftext|>"]
    rows = [[start, *(vocab[f"{w}</w>"] for w in p.split()), end] for p in prompts]
    return torch.tensor([r + [end] * (length - len(r)) for r in rows])


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("openai")
    hugging_folder(folder)
    return folder


def clip_cosine(folder: Path, prompts: list[str], see: Callable | None = None, act=ref.quick_gelu, seed: int = 0) -> Tensor:
    """Cosines of the pictures and their prompts."""
    vocab = len(json.loads((folder / "vocab.json").read_text()))
    size = SMALL._replace(vocab=vocab)
    state = ref.from_hugging(ref.fill(ref.hugging_layout(size), seed))
    image = ref.clip_image(state, size, (see or torchvision_crop(28))(PICTURES), act)
    return ref.cosine(image, ref.clip_text(state, size, world_ids(folder, prompts), act))


def image_features(folder: Path) -> Tensor:
    size = SMALL._replace(vocab=len(json.loads((folder / "vocab.json").read_text())))
    state = ref.from_hugging(ref.fill(ref.hugging_layout(size)))
    return ref.clip_image(state, size, torchvision_crop(28)(PICTURES), ref.quick_gelu)


class NarrowHPS(HPSv21):
    size = SMALL._replace(vocab=49408)

    @classmethod
    def architecture(cls) -> dict:
        s = cls.size
        vision = {
            "image_size": s.image,
            "layers": s.layers,
            "width": s.width,
            "head_width": s.width // s.heads,
            "patch_size": s.patch,
        }
        text = {
            "context_length": 77,
            "vocab_size": s.vocab,
            "width": s.text_width,
            "heads": s.text_heads,
            "layers": s.text_layers,
        }
        return {"embed_dim": s.dim, "vision_cfg": vision, "text_cfg": text}


def max_size(image: Image.Image, side: int) -> Tensor:
    """HPSv2's published preprocessing, with its two bugs mended."""
    x = TF.to_tensor(image.convert("RGB"))
    height, width = x.shape[1:]
    scale = side / max(height, width)
    new = [max(1, round(d * scale)) for d in (height, width)]
    x = TF.resize(x, new, T.InterpolationMode.BICUBIC, antialias=True) if new != [height, width] else x
    down, right = side - new[0], side - new[1]
    return TF.normalize(TF.pad(x, [right // 2, down // 2, right - right // 2, down - down // 2]), CLIP_MEAN, CLIP_STD)


def hps_twin(folder: Path) -> tuple[NarrowHPS, Tensor]:
    import open_clip

    state = ref.fill(ref.open_clip_layout(NarrowHPS.size))
    torch.save({"epoch": 1, "state_dict": state}, folder / "HPS_v2.1_compressed.pt")
    ids = open_clip.SimpleTokenizer()(PROMPTS)
    image = ref.clip_image(state, NarrowHPS.size, torch.stack([max_size(i, 28) for i in PICTURES]))
    return NarrowHPS(folder), ref.cosine(image, ref.clip_text(state, NarrowHPS.size, ids))


BLIP = ref.BlipSize(16, 2, 2, 16, 32, 16, 2, 2, 40, 512)


def blip_sizes(size: ref.BlipSize) -> dict:
    v = {"hidden_size": size.width, "intermediate_size": 4 * size.width, "num_hidden_layers": size.layers}
    t = {"hidden_size": size.text_width, "intermediate_size": 4 * size.text_width, "num_hidden_layers": size.text_layers}
    v |= {"num_attention_heads": size.heads, "image_size": size.image, "patch_size": size.patch, "layer_norm_eps": 1e-6}
    t |= {"num_attention_heads": size.text_heads, "vocab_size": size.vocab, "encoder_hidden_size": size.width}
    return {"vision": v, "text": t | {"max_position_embeddings": size.positions, "is_decoder": True}}


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *dict.fromkeys(w for p in PROMPTS for w in p.split())]


def blip_twin(
    folder: Path, cls: type[ImageReward] | type[CycleReward], limit: int
) -> tuple[ImageReward | CycleReward, Tensor]:
    """Also checks that ids, mask and limit are BERT's: [CLS] words [SEP] padding."""
    linears = (0, 2, 4, 6, 8) if cls is CycleReward else (0, 2, 4, 6, 7)
    state = ref.fill(ref.blip_layout(BLIP, linears))
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    if cls is CycleReward:
        save_file(state, folder / "model.safetensors")
    else:
        torch.save(state, folder / "ImageReward.pt")
    narrow = type(cls.__name__, (cls,), blip_sizes(BLIP))
    rows = [[2, *(WORDS.index(w) for w in p.split()), 3] for p in PROMPTS]
    ids = torch.tensor([r + [0] * (limit - len(r)) for r in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (limit - len(r)) for r in rows])
    image = ref.blip_image(state, BLIP, torchvision_crop(32)(PICTURES))
    x = ref.blip_class(state, BLIP, image, ids, mask)
    for n, i in enumerate(linears):
        x = ref.linear(x, state, f"mlp.layers.{i}")
        x = gelu(x) if cls is CycleReward and n < 4 else x
    x = x[:, 0] if cls is CycleReward else (x[:, 0] - 0.16717362830052426) / 1.0333394966054072
    return narrow(folder, folder), x


def mps_twin(folder: Path, threshold: float = 0.3) -> tuple[MPS, Tensor]:
    """With a condition of words of the world, so that ids can be written out."""
    tok = build.tokenizer(folder)
    tok.model_max_length = 77
    tok.save_pretrained(folder)
    size = SMALL._replace(vocab=len(tok), dim=16)
    heads, condition = 2, "red blue circle"
    layout = {f"model.{k}": v for k, v in ref.hugging_layout(size).items()} | ref.fusion_layout(size.dim, heads)
    layout |= {"model.text_model.embeddings.position_ids": (1, 77)}
    state = ref.fill(layout)
    save_file({f"mps.{k}": v for k, v in state.items()}, folder / "model.safetensors")
    ids = {"eos_token_id": tok.eos_token_id, "bos_token_id": tok.bos_token_id, "pad_token_id": tok.pad_token_id}
    narrow = type("Narrow", (MPS,), {"config": clip_sizes(size, ids), "heads": heads, "condition": condition})

    clip = ref.from_hugging(
        {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.") and "ids" not in k}
    )
    said, about = (world_ids(folder, p) for p in (PROMPTS, [condition]))
    tokens = ref.clip_text_tokens(clip, size, said)
    match = torch.einsum("bid,jd->bij", tokens, ref.clip_text_tokens(clip, size, about)[0]).amax(-1)
    seen = torch.stack([row / row.max() > threshold for row in match])
    assert 0 < seen.float().mean() < 1  # the mask decides something
    image = ref.clip_image_tokens(clip, size, transformers_crop(28)(PICTURES)) @ clip["visual.proj"]
    fused = ref.fuse(state, image, tokens, seen, heads)[:, 0]
    return narrow(folder, folder), math.exp(3) * ref.cosine(fused, ref.clip_text(clip, size, said))


def clip_sizes(size: ref.ClipSize, ids: dict[str, int]) -> dict[str, object]:
    """The configuration of transformers for a narrow CLIP."""
    text, vision = (
        {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "gelu"}
        for _ in range(2)
    )
    text |= {"vocab_size": size.vocab, "projection_dim": size.dim, **ids}
    vision |= {"image_size": 28, "patch_size": 14, "projection_dim": size.dim}
    return {"projection_dim": size.dim, "text_config": text, "vision_config": vision}


def spo_crop(side: int) -> Callable[[list[Image.Image]], Tensor]:
    """What SPO's code does with what the decoder gives, in [-1, 1]."""

    def one(image: Image.Image) -> Tensor:
        x = 2 * TF.to_tensor(image)[None] - 1
        scale = side / min(x.shape[-2:])
        size = [int(n * scale + 0.5) for n in x.shape[-2:]]
        x = torch.nn.functional.interpolate(x, size, mode="bicubic", align_corners=False)
        return T.Normalize(CLIP_MEAN, CLIP_STD)((T.CenterCrop(side)(x)[0] / 2 + 0.5).clamp(0, 1))

    return lambda images: torch.stack([one(i) for i in images])


TIMES = [0.0, 501.0, 951.0]


def timed_twin(
    folder: Path, cls: type[StepAware] = StepAware, times: list[float] | None = None, still: bool = False
) -> tuple[StepAware, Tensor]:
    """``still``: nothing is shifted or scaled, whatever the time."""
    tok = build.tokenizer(folder)
    tok.model_max_length = 77
    tok.save_pretrained(folder)
    size = SMALL._replace(vocab=len(tok))
    state = ref.fill(ref.hugging_layout(size) | ref.timed_layout(size), 6)
    if still:
        one, none = torch.ones(size.width), torch.zeros(2 * size.width)
        state |= {k: torch.zeros_like(v) for k, v in state.items() if "adaLN" in k}
        gates = torch.cat([none, one, none, one])
        state |= {f"vision_model.encoder.layers.{i}.adaLN_modulation.1.bias": gates for i in range(size.layers)}
    old = {"vision_model.embeddings.position_ids": torch.arange(5)[None]}
    torch.save({f"model.{k}": v for k, v in (state | old).items()}, folder / cls.card.weights[0].files[0])
    ids = {"eos_token_id": tok.eos_token_id, "bos_token_id": tok.bos_token_id, "pad_token_id": tok.pad_token_id}
    narrow = type("Narrow", (cls,), {"config": clip_sizes(size, ids)})
    image = ref.timed_image(state, size, spo_crop(28)(PICTURES), times or [0.0] * 3)
    clip = ref.from_hugging({k: v for k, v in state.items() if "adaLN" not in k and "t_embedder" not in k})
    if still:
        torch.testing.assert_close(image, ref.clip_image(clip, size, spo_crop(28)(PICTURES)))
    text = ref.clip_text(clip, size, world_ids(folder, PROMPTS))
    return narrow(folder, folder), math.exp(3) * ref.cosine(image, text)


QWEN = ref.QwenSize(32, 2, 2, 32, 2, 4, 2, 48, 0, (1, 1, 2))
CHAT = (
    "{% for m in messages %}<|im_start|>{% for c in m.content %}{% if c.type == 'image' %}<|image_pad|>{% else %}{{ c.text }}"
)
CHAT += "{% endif %}{% endfor %}<|im_end|>{% endfor %}"


def hpsv3_tokenizer(folder: Path) -> list[str]:
    """Bytes are words of their own; returns the special tokens, whose ids follow."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tok = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<pad>", "<|im_start|>", "<|im_end|>", "<|image_pad|>"]
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="<pad>", additional_special_tokens=special[1:])
    fast.chat_template = CHAT
    fast.save_pretrained(folder)
    return letters + special + ["<|Reward|>"]


def hpsv3_twin(folder: Path) -> tuple[HPSv3, Tensor]:
    words = hpsv3_tokenizer(folder)
    size = QWEN._replace(vocab=len(words))
    state = ref.fill(ref.qwen_layout(size))
    save_file(state, folder / "HPSv3.safetensors")
    (folder / "data_collator_qwen.py").write_text(
        'import nothing\nINSTRUCTION = """of {text_prompt}:\n"""\nprompt_with_special_token = "rate <|Reward|>\\nEND"\n'
    )
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2}
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1e6}
    text |= {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    narrow = type("Narrow", (HPSv3,), {"vision": vision, "text": text, "side": 84, "dtype": torch.float32})

    def ids(text: str) -> list[int]:
        return [words.index({" ": "\u0120", "\n": "\u010a"}.get(c, c)) for c in text]

    reward = words.index("<|Reward|>")
    expected = []
    for image, prompt in zip(PICTURES, PROMPTS, strict=True):
        height, width = Preprocess(84, "area").resized(image.height, image.width)
        x = TF.to_tensor(image.resize((width, height), Image.Resampling.BICUBIC))
        before = [words.index("<|im_start|>")]
        after = [*ids(f"of {prompt}:\nrate "), reward, *ids("\nEND"), words.index("<|im_end|>")]
        place = 1 + width * height // 28**2 + after.index(reward)
        expected.append(ref.hpsv3(state, size, TF.normalize(x, CLIP_MEAN, CLIP_STD), before, after, place))
    return narrow(folder, folder, folder), torch.stack(expected)


def layers_file(path: Path, widths: tuple[int, ...], names: list[str]) -> ref.State:
    layout: ref.Layout = {}
    for name, (a, b) in zip(names, pairwise(widths), strict=True):
        layout |= {f"{name}weight": (b, a), f"{name}bias": (b,)}
    state = ref.fill(layout, 5)
    torch.save(state, path)
    return state


def aesthetic_twin(folder: Path, clip: Path, cls: type[Aesthetic]) -> tuple[Aesthetic, Tensor]:
    """Layer by layer, as published."""
    widths = (8, *cls.widths[1:])
    names = {1: [""], 5: [f"{'scoring_head' if cls is AestheticV25 else 'layers'}.{i}." for i in (0, 2, 4, 6, 7)]}[
        len(widths) - 1
    ]
    state = layers_file(folder / "head.pth", widths, names)
    x = normalize(image_features(clip), dim=-1)
    for name in names:
        x = x @ state[f"{name}weight"].T + state[f"{name}bias"]
    narrow = type("Narrow", (cls,), {"widths": widths})
    return narrow(folder / "head.pth", clip), x[:, 0]


def nsfw_twin(folder: Path, clip: Path) -> tuple[NSFW, Tensor]:
    widths = (8, 16, 12)
    layout: ref.Layout = {}
    for i, (a, b) in zip((0, 3, 6, 7), ((8, 16), (16, 12), (12, 16), (16, 1)), strict=True):
        layout |= {f"layers.{i}.weight": (b, a), f"layers.{i}.bias": (b,)}
    state = ref.fill(layout, 6)
    torch.save(state, folder / "h14_nsfw.pth")
    x = normalize(image_features(clip), dim=-1)
    for i in (0, 3, 6, 7):
        x = ref.linear(x, state, f"layers.{i}")
        x = x.relu() if i < 6 else x
    return type("Narrow", (NSFW,), {"widths": widths})(folder, clip), -x[:, 0]


def q16_twin(folder: Path, clip: Path) -> tuple[object, Tensor]:
    g = torch.Generator().manual_seed(7)
    prompts = torch.randn(1, 8, generator=g) + 0.02 * torch.randn(2, 8, generator=g)  # close, so that nothing saturates
    save_file({"prompts": prompts.half()}, folder / "prompts.safetensors")
    logits = 100 * normalize(image_features(clip), dim=-1) @ normalize(prompts.half().float(), dim=-1).T
    return scorer_class("q16")(folder, clip), -1 / (1 + (logits[:, 0] - logits[:, 1]).exp())


def safety_twin(folder: Path) -> tuple[SafetyChecker, Tensor]:
    full = ref.fill(ref.hugging_layout(SMALL._replace(vocab=9)), 8)
    g = torch.Generator().manual_seed(9)
    state = {f"vision_model.{k}": v for k, v in full.items() if k.startswith("vision_model.")}
    state["visual_projection.weight"] = full["visual_projection.weight"]
    state["vision_model.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    for name, n in (("concept_embeds", 17), ("special_care_embeds", 3)):
        state[name] = torch.randn(n, 8, generator=g)
        state[f"{name}_weights"] = torch.full((n,), 0.6)
    save_file(state, folder / "model.safetensors")
    vision = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"hidden_act": "quick_gelu", "image_size": 28, "patch_size": 14}
    (folder / "config.json").write_text(json.dumps({"projection_dim": 8, "vision_config": vision}))
    image = ref.clip_image(ref.from_hugging(full), SMALL, transformers_crop(28)(PICTURES), ref.quick_gelu)
    values = []
    for x in normalize(image, dim=-1).tolist():
        bad, special = (
            [sum(a * b for a, b in zip(x, normalize(c, dim=0).tolist(), strict=True)) for c in state[name]]
            for name in ("concept_embeds", "special_care_embeds")
        )
        care = 0.01 if any(round(c - 0.6, 3) > 0 for c in special) else 0.0
        values.append(-max(c - 0.6 + care for c in bad))
    return SafetyChecker(folder), torch.tensor(values)


Twin = tuple[object, Tensor]


def similarity_twin(folder: Path, name: str) -> Twin:
    if name == "pickscore":
        hugging_folder(folder, act="gelu", seed=4)
        return PickScore(folder), math.exp(3) * clip_cosine(folder, PROMPTS, transformers_crop(28), gelu, 4)
    hugging_folder(folder)
    scorer = make_scorer(f"{name}:{folder}")
    if name == "clipscore":  # "A photo depicts" is no word of the world: ids from the folder's own tokenizer
        from transformers import AutoTokenizer

        size = SMALL._replace(vocab=len(json.loads((folder / "vocab.json").read_text())))
        state = ref.from_hugging(ref.fill(ref.hugging_layout(size)))
        ids = AutoTokenizer.from_pretrained(folder)([f"A photo depicts {p}" for p in PROMPTS], padding="max_length").input_ids
        text = ref.clip_text(state, size, torch.tensor(ids), ref.quick_gelu)
        return scorer, 2.5 * ref.cosine(image_features(folder), text).clamp(min=0)
    cos = clip_cosine(folder, PROMPTS)
    return scorer, (100 * cos).clamp(min=0) if name == "clip100" else cos


def decomposed_twin(folder: Path) -> Twin:
    hugging_folder(folder)
    size = SMALL._replace(vocab=len(json.loads((folder / "vocab.json").read_text())))
    state = ref.from_hugging(ref.fill(ref.hugging_layout(size)))
    text = normalize(ref.clip_text(state, size, world_ids(folder, PROMPTS), ref.quick_gelu), dim=-1)
    v = normalize(text.mean(0), dim=0)
    rows = [t - 0.7 * torch.dot(t, v) * v for t in text]
    image = normalize(image_features(folder), dim=-1)
    return make_scorer(f"decomposed:{folder}"), torch.stack([torch.dot(a, b) for a, b in zip(rows, image, strict=True)])


TWINS: dict[str, Callable[[Path, Path], Twin]] = {
    **{n: lambda f, c, n=n: similarity_twin(f, n) for n in ("clip", "clip100", "clipscore", "pickscore")},
    "hpsv2.1": lambda f, c: hps_twin(f),
    "hpsv3": lambda f, c: hpsv3_twin(f),
    "imagereward": lambda f, c: blip_twin(f, ImageReward, 35),
    "cyclereward": lambda f, c: blip_twin(f, CycleReward, 128),
    "mps": lambda f, c: mps_twin(f),
    "step-aware": lambda f, c: timed_twin(f),
    "step-aware-sdxl": lambda f, c: timed_twin(f, StepAwareSDXL),
    "decomposed": lambda f, c: decomposed_twin(f),
    "aesthetic-v1": lambda f, c: aesthetic_twin(f, c, AestheticV1),
    "aesthetic-v2": lambda f, c: aesthetic_twin(f, c, AestheticV2),
    "aesthetic-v2.5": lambda f, c: aesthetic_twin(f, c, AestheticV25),
    "safety": lambda f, c: safety_twin(f),
    "nsfw": lambda f, c: nsfw_twin(f, c),
    "q16": lambda f, c: q16_twin(f, c),
}


@pytest.mark.parametrize("name", TWINS)
def test_scores_equal_an_independent_forward(name: str, tmp_path: Path, clip_folder: Path) -> None:
    """From published files to numbers, for pictures of three shapes; then one by one, and with gradients."""
    scorer, expected = TWINS[name](tmp_path, clip_folder)
    assert scorer.name == name
    got = scorer(ScoreInput(PICTURES, PROMPTS)).values[name]
    assert expected.std() > 1e-4  # the pictures differ
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=2e-4)
    if name != "decomposed":
        alone = torch.cat([scorer(ScoreInput([i], [p])).values[name] for i, p in zip(PICTURES, PROMPTS, strict=True)])
        torch.testing.assert_close(alone, got, atol=1e-4, rtol=1e-4)
    if not scorer.card.differentiable:
        with pytest.raises(ConfigError, match="gives no gradients"):
            scorer.score_pixels(torch.rand(1, 3, 28, 28), PROMPTS[:1])
        return
    side = scorer.encoder.preprocess.size
    same = [noise(side, side, s) for s in range(3)]  # nothing to resize: both paths are one
    x = torch.stack([TF.to_tensor(i) for i in same]).requires_grad_()
    smooth = scorer.score_pixels(x, PROMPTS)
    torch.testing.assert_close(smooth.detach(), scorer(ScoreInput(same, PROMPTS)).values[name], atol=1e-4, rtol=1e-4)
    (slope,) = torch.autograd.grad(smooth.sum(), x)
    step = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    up, down = (scorer.score_pixels(x.detach() + s * step, PROMPTS).sum().item() for s in (1, -1))
    expected_slope = 2 * (slope * step).sum().item()
    assert up - down == pytest.approx(expected_slope, rel=0.05, abs=2e-4 * (1 + smooth.detach().abs().max().item()))


# --- full architectures, without weights -----------------------------------------------------------------------------


def meta(layout: ref.Layout) -> ref.State:
    return {k: torch.empty(v, device="meta") for k, v in layout.items()}


def test_hps_has_every_tensor_of_the_published_file() -> None:
    import open_clip

    layout = ref.open_clip_layout(ref.H14)
    assert len(layout) == 686  # as counted in the published checkpoint
    assert sum(math.prod(s) for s in layout.values()) == pytest.approx(986.1e6, rel=1e-4)
    with torch.device("meta"):
        net = open_clip.CLIP(**HPSv2.architecture())
    assert differences(net, meta(layout)) is None


@pytest.mark.parametrize(("cls", "linears"), [(ImageReward, (0, 2, 4, 6, 7)), (CycleReward, (0, 2, 4, 6, 8))])
def test_blip_has_every_tensor_of_the_published_file(cls: type[ImageReward], linears: tuple[int, ...]) -> None:
    with torch.device("meta"):
        net = cls.network()
    layout = ref.blip_layout(ref.BlipSize(), linears)
    assert differences(net, cls.renamed(meta(layout))) is None
    extra = cls.renamed(meta({**layout, "blip.visual_encoder.blocks.24.norm1.bias": (1024,), "itm_head.bias": (2,)}))
    assert "2 unexpected" in str(differences(net, extra))
    del layout["blip.text_encoder.encoder.layer.3.crossattention.self.key.bias"]
    assert "1 missing (text.encoder.layer.3.crossattention.self.key.bias)" in str(differences(net, cls.renamed(meta(layout))))
    assert net["vision"].post_layernorm.eps == 1e-6


def test_mps_has_every_tensor_of_the_published_file() -> None:
    with torch.device("meta"):
        net = MPS.network()
    layout = {f"model.{k}": v for k, v in ref.hugging_layout(ref.H14).items()} | ref.fusion_layout(1024, 16)
    old = {"model.text_model.embeddings.position_ids": (1, 77), "model.vision_model.embeddings.position_ids": (1, 257)}
    assert differences(net, MPS.renamed(meta({f"mps.{k}": v for k, v in {**layout, **old}.items()}))) is None
    assert differences(net, MPS.renamed(meta(layout))) is None
    assert MPS.condition == OVERALL
    assert len(OVERALL.split(", ")) == 22


@pytest.mark.parametrize("still", [False, True])
def test_the_step_aware_score_is_of_the_time_of_each_preview(still: bool, tmp_path: Path) -> None:
    """Told the times it equals an independent forward at them; where nothing is shifted or scaled it is a plain CLIP."""
    scorer, expected = timed_twin(tmp_path, times=TIMES, still=still)
    whole = ScoreInput(PICTURES, PROMPTS, times=torch.tensor(TIMES))
    got = scorer(whole).values["step-aware"]
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(scorer(whole.part(slice(1, 3))).values["step-aware"], got[1:], atol=1e-4, rtol=1e-4)
    finished = scorer(ScoreInput(PICTURES, PROMPTS)).values["step-aware"]
    assert finished[0].item() == pytest.approx(got[0].item(), abs=1e-4)
    moved = (finished - got)[1:].abs()
    assert moved.max() < 1e-4 if still else moved.min() > 1e-2


def test_the_step_aware_model_has_every_tensor_of_the_published_file() -> None:
    """CLIP H/14, a time's embedding, and six and two modulations a layer: 32 x 9.8 million, 3.3 and 2 million more."""
    with torch.device("meta"):
        net = StepAware.network()
    layout = ref.hugging_layout(ref.H14) | ref.timed_layout(ref.H14)
    assert differences(net, meta(layout)) is None
    assert "2 missing (t_embedder.mlp.0.bias" in str(
        differences(net, meta({k: v for k, v in layout.items() if "mlp.0" not in k}))
    )


def test_hpsv3_has_every_tensor_of_the_published_file() -> None:
    layout = ref.qwen_layout(ref.QwenSize())
    with torch.device("meta"):
        net = HPSv3.network(ref.QwenSize().vocab)
    assert differences(net, HPSv3.renamed(meta(layout))) is None
    today = {re.sub("^visual", "model.visual", k): v for k, v in layout.items()}
    today = {re.sub("^model.layers", "model.language_model.layers", k): v for k, v in today.items()}
    assert differences(net, HPSv3.renamed(meta(today))) is None
    assert "1 unexpected (model.language_model.layers.28.mlp.up_proj.weight)" in str(
        differences(net, HPSv3.renamed(meta({**layout, "model.layers.28.mlp.up_proj.weight": (1, 1)})))
    )


@given(st.integers(28, 4000), st.integers(28, 4000))
def test_hpsv3_resizes_as_qwen_does(height: int, width: int) -> None:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    if max(height, width) > 200 * min(height, width):
        return
    theirs = smart_resize(height, width, 28, 448**2, 448**2)
    assert Preprocess(448, "area").resized(height, width) == theirs


def test_hpsv3_cuts_patches_as_qwen_does() -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    theirs = Qwen2VLImageProcessorPil(size={"shortest_edge": 448**2, "longest_edge": 448**2})
    for size in ((224, 112), (640, 480), (300, 301)):
        said = theirs([noise(*size)], return_tensors="pt")
        x = Preprocess(448, "area").one(noise(*size))
        assert said["image_grid_thw"].tolist() == [[1, x.shape[1] // 14, x.shape[2] // 14]]
        torch.testing.assert_close(patches(x), said["pixel_values"], atol=1e-4, rtol=0)


def test_hpsv3_refuses_what_it_cannot_read(tmp_path: Path) -> None:
    scorer, _ = hpsv3_twin(tmp_path)
    with pytest.raises(DataError, match="1 x 1000 is too long"):
        scorer(ScoreInput([noise(1, 1000)], ["p"]))
    with pytest.raises(DataError, match=r"the prompt holds <\|image_pad\|>"):
        scorer(ScoreInput([PICTURES[0]], ["<|image_pad|>"]))
    # a prompt that holds the reward token is read at the rubric's own
    assert scorer(ScoreInput([PICTURES[0]], ["<|Reward|>"])).values["hpsv3"].isfinite().all()
    (tmp_path / "t.txt").write_text("of {prompt} rate <|Reward|>")
    assert instruction_of(tmp_path / "t.txt") == "of {prompt} rate <|Reward|>"
    for text in ("{prompt}", "<|Reward|> {prompt}"):
        (tmp_path / "t.txt").write_text(text)
        with pytest.raises(ModelError, match=r"no \{prompt\} with <\|Reward\|> after it"):
            instruction_of(tmp_path / "t.txt")
    (tmp_path / "c.py").write_text("INSTRUCTION = open('x').read()")
    with pytest.raises(ModelError, match="no instruction of HPSv3"):
        instruction_of(tmp_path / "c.py")


def test_pickscore_has_every_tensor_of_the_published_file() -> None:
    from transformers import CLIPConfig, CLIPModel

    with torch.device("meta"):
        net = CLIPModel(CLIPConfig(**MPS.config))
    layout = ref.hugging_layout(ref.H14)
    assert sum(math.prod(s) for s in layout.values()) == pytest.approx(986.1e6, rel=1e-4)
    assert differences(net, meta(layout)) is None


def test_the_safety_checker_has_every_tensor_of_the_published_file() -> None:
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    with torch.device("meta"):
        net = SafetyChecker.network({"projection_dim": 768, "vision_config": {**vision, "image_size": 224, "patch_size": 14}})
    layout = {f"vision_model.{k}": v for k, v in ref.hugging_layout(ref.L14).items() if k.startswith("vision_model.")}
    layout |= {"visual_projection.weight": (768, 1024), "concept_embeds": (17, 768), "special_care_embeds": (3, 768)}
    layout |= {"concept_embeds_weights": (17,), "special_care_embeds_weights": (3,)}
    layout |= {"vision_model.vision_model.embeddings.position_ids": (1, 257)}
    assert differences(net, SafetyChecker.renamed(meta(layout))) is None


def test_the_nsfw_head_has_every_tensor_of_the_published_file() -> None:
    widths = ((1024, 1024), (1024, 2048), (2048, 1024), (1024, 256), (256, 128), (128, 16), (16, 1))
    layout: ref.Layout = {}
    for i, (a, b) in zip((0, 3, 6, 9, 12, 15, 16), widths, strict=True):
        layout |= {f"layers.{i}.weight": (b, a), f"layers.{i}.bias": (b,)}
    with torch.device("meta"):
        net = NSFW.network()
    assert differences(net, meta(layout)) is None


def test_heads_fold_to_what_they_are_and_refuse_others() -> None:
    for cls, prefix, indices in ((AestheticV2, "layers", (0, 2, 4, 6, 7)), (AestheticV25, "scoring_head", (0, 2, 4, 6, 8))):
        layout: ref.Layout = {}
        for i, (a, b) in zip(indices, pairwise(cls.widths), strict=True):
            layout |= {f"{prefix}.{i}.weight": (b, a), f"{prefix}.{i}.bias": (b,)}
        state = {k: v.double() for k, v in ref.fill(layout).items()}
        weight, bias = folded(state, cls.widths, "file")
        x = torch.randn(5, cls.widths[0], dtype=torch.double)
        y = x
        for i in indices:
            y = ref.linear(y, state, f"{prefix}.{i}")
        torch.testing.assert_close(x @ weight + bias, y[:, 0], atol=1e-12, rtol=1e-12)
        del state[f"{prefix}.2.bias"]
        with pytest.raises(ModelError, match="file: not the layers of this scorer"):
            folded(state, cls.widths, "file")
    assert AestheticV1.widths == (768, 1)


# --- preprocessing ---------------------------------------------------------------------------------------------------

SIZES = [(1000, 1), (1, 1000), (224, 112), (112, 224), (300, 301), (301, 227), (640, 227), (224, 224), (17, 9), (1024, 768)]
STD = torch.tensor(CLIP_STD).view(3, 1, 1)


def rotated() -> Image.Image:
    """A JPEG that says: turn me by a quarter."""
    tags = Image.Exif()
    tags[0x0112] = 6
    buffer = io.BytesIO()
    noise(60, 40).save(buffer, "JPEG", exif=tags)
    return Image.open(buffer)


def odd_modes() -> dict[str, Image.Image]:
    alpha = noise(50, 40)
    alpha.putalpha(Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 50), np.uint8)))
    return {
        "RGBA": alpha,
        "P": noise(50, 40).quantize(17),
        "L": noise(50, 40).convert("L"),
        "CMYK": noise(50, 40).convert("CMYK"),
    }


@pytest.mark.parametrize("size", SIZES)
def test_crop_and_pad_are_those_of_torchvision(size: tuple[int, int]) -> None:
    """Equal, not close: OpenAI's CLIP, LAION, ImageReward (crop) and HPSv2 (pad)."""
    image = noise(*size)
    steps = [T.Resize(224, T.InterpolationMode.BICUBIC), T.CenterCrop(224), T.ToTensor(), T.Normalize(CLIP_MEAN, CLIP_STD)]
    torch.testing.assert_close(Preprocess().exact([image])[0], T.Compose(steps)(image), atol=1e-6, rtol=0)
    hps = Preprocess(224, "pad", eight_bit=False)
    torch.testing.assert_close(hps.exact([image])[0], max_size(image, 224), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [s for s in SIZES if max(s) / min(s) < 100])
def test_crop_and_squash_are_those_of_transformers(size: tuple[int, int]) -> None:
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    image = noise(*size)
    torch.testing.assert_close(Preprocess(centre="floor").exact([image]), transformers_crop(224)([image]), atol=1e-5, rtol=0)
    processor = SiglipImageProcessorPil(size={"height": 384, "width": 384})
    squash = Preprocess(384, "squash", (0.5,) * 3, (0.5,) * 3)
    torch.testing.assert_close(squash.exact([image]), processor([image], return_tensors="pt").pixel_values, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_pad_is_that_of_open_clip_up_to_rounding(size: tuple[int, int]) -> None:
    """open_clip resizes bytes where HPSv2 resized floats: equal in bytes; in floats as near as was measured elsewhere."""
    from open_clip.transform import image_transform

    theirs = image_transform(224, is_train=False, resize_mode="longest", interpolation="bicubic", fill_color=0)
    image = noise(*size)
    if 1 not in size:  # where open_clip has nothing left after rounding
        torch.testing.assert_close(Preprocess(224, "pad").exact([image])[0], theirs(image), atol=1e-6, rtol=0)
        soft = image.filter(ImageFilter.GaussianBlur(1))  # noise overshoots, which bytes cut off and floats keep
        off = ((Preprocess(224, "pad", eight_bit=False).exact([soft])[0] - theirs(soft)) * STD * 255).abs()
        assert off.max() < 2.5
        assert off.mean() < 0.32


@pytest.mark.parametrize(
    ("model", "said", "expected"),
    [
        # as published: OpenAI's CLIP L/14, CLIP H/14 of LAION, SigLIP so400m, DINO ViT-S/16, DINOv2
        ("clip", {"size": 224, "crop_size": 224, "feature_extractor_type": "CLIPFeatureExtractor"}, (224, "crop", 224)),
        ("clip", {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}, (224, "crop", 224)),
        ("siglip", {"size": {"height": 384, "width": 384}, "do_center_crop": None}, (384, "squash", None)),
        ("vit", {"size": 224, "do_center_crop": None}, (224, "squash", None)),
        ("dinov2", {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}, (224, "crop", 256)),
    ],
)
def test_processors_as_published(model: str, said: dict, expected: tuple, tmp_path: Path) -> None:
    kinds = {"clip": "CLIPImageProcessor", "siglip": "SiglipImageProcessor", "dinov2": "BitImageProcessor"}
    kind = {"image_processor_type": kinds[model]} if model in kinds and "feature_extractor_type" not in said else {}
    all_ = {"do_resize": True, "do_normalize": True, "do_center_crop": True, "image_mean": CLIP_MEAN, "image_std": CLIP_STD}
    config = {**all_, "resample": 3, **kind, **said}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model}))
    p = of_folder(tmp_path, 224, "floor")
    assert (p.size, p.geometry, p.edge) == expected
    assert (p.mean, p.std, p.filter) == (CLIP_MEAN, CLIP_STD, "bicubic")
    # what transformers itself does with that file
    from transformers import AutoImageProcessor

    theirs = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")([PICTURES[0]], return_tensors="pt").pixel_values
    torch.testing.assert_close(p.exact([PICTURES[0]]), theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("geometry", ["crop", "pad", "squash"])
@pytest.mark.parametrize("size", [(100, 1), *(s for s in SIZES if 1 not in s)])
def test_the_differentiable_path_is_the_exact_one_up_to_rounding(geometry: str, size: tuple[int, int]) -> None:
    p = Preprocess(224, geometry)
    image = noise(*size)
    x = TF.to_tensor(image)[None].requires_grad_()
    smooth = p.smooth(x)
    off = ((smooth - p.exact([image])) * STD * 255).abs()
    assert off.max() < 1.2
    assert off.mean() < 0.35
    (slope,) = torch.autograd.grad(smooth.sum(), x)
    assert slope.isfinite().all()
    assert slope.any()


def test_modes_and_orientation() -> None:
    for image in odd_modes().values():
        torch.testing.assert_close(Preprocess().exact([image]), Preprocess().exact([image.convert("RGB")]))
        assert Preprocess(224, "pad", eight_bit=False).exact([image]).shape == (1, 3, 224, 224)
    turned = rotated()
    upright = Image.fromarray(np.array(turned)).transpose(Image.Transpose.ROTATE_270)
    for p in (Preprocess(), Preprocess(224, "pad", eight_bit=False), Preprocess(64, "squash")):
        torch.testing.assert_close(p.exact([turned]), p.exact([upright]))


@given(st.integers(1, 2000), st.integers(1, 2000), st.sampled_from(["crop", "pad", "squash"]))
def test_every_size_fits(height: int, width: int, geometry: str) -> None:
    p = Preprocess(224, geometry)
    new = p.resized(height, width)
    assert {"crop": min(new) == 224, "pad": max(new) == 224 and min(new) >= 1, "squash": new == (224, 224)}[geometry]
    if geometry != "squash" and min(height, width) > 50:
        assert new[0] / new[1] == pytest.approx(height / width, rel=0.05)


# --- encoders --------------------------------------------------------------------------------------------------------


def test_scorers_on_one_encoder_share_one_pass(clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AestheticV1, "widths", (8, 1))
    monkeypatch.setattr(AestheticV2, "widths", (8, 1024, 128, 64, 16, 1))
    layers_file(tmp_path / "v1.pth", (8, 1), [""])
    layers_file(tmp_path / "v2.pth", AestheticV2.widths, [f"layers.{i}." for i in (0, 2, 4, 6, 7)])
    names = [
        f"clip:{clip_folder}",
        f"aesthetic-v1:{tmp_path}/v1.pth,{clip_folder}",
        f"aesthetic-v2:{tmp_path}/v2.pth,{clip_folder}",
    ]
    scorers = make_scorers(names)
    encoder = scorers[0].encoder
    assert all(s.encoder is encoder for s in scorers)
    passes = []
    real = encoder.features
    monkeypatch.setattr(encoder, "features", lambda x: passes.append(len(x)) or real(x))
    for images in (PICTURES, list(PICTURES), PICTURES[:2]):
        for scorer in scorers:
            scorer(ScoreInput(images, PROMPTS[: len(images)]))
    assert passes == [3, 2]  # the same pictures in another list are the same pictures
    texts = []
    encode = encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda prompts: texts.extend(prompts) or encode(prompts))
    scorers[0](ScoreInput(PICTURES, ["a blue circle", PROMPTS[0], "a blue circle"]))
    assert texts == ["a blue circle"]


def test_an_encoder_lives_as_long_as_its_scorers(clip_folder: Path) -> None:
    import gc
    import weakref

    first = shared(TransformersCLIP, clip_folder, "cpu")
    assert shared(TransformersCLIP, clip_folder, "cpu") is first
    gone = weakref.ref(first)
    del first
    gc.collect()
    assert gone() is None


def test_cut_prompts_are_flagged_and_keep_their_end(tmp_path: Path, clip_folder: Path) -> None:
    long = " ".join(["red"] * 75)
    clip = make_scorer(f"clip:{clip_folder}")
    given_ = ScoreInput(PICTURES, [long, f"{long} blue", "red"])
    assert clip(given_).truncated == [False, True, False]
    values = clip(given_).values["clip"]
    same = clip(ScoreInput([PICTURES[0]] * 2, [long, f"{long} blue"])).values["clip"]
    torch.testing.assert_close(same[0], same[1])  # what is behind the limit is not read, and the end is kept
    assert values.isfinite().all()
    hps, _ = hps_twin(tmp_path)
    assert hps(given_).truncated == [False, True, False]
    for cls, limit in ((ImageReward, 35), (CycleReward, 128)):
        blip, _ = blip_twin(tmp_path, cls, limit)
        words = [" ".join(["red"] * n) for n in (limit - 2, limit - 1, 1)]
        assert blip(ScoreInput(PICTURES, words)).truncated == [False, True, False]
        (tmp_path / "model.safetensors").unlink(missing_ok=True)
    mps, _ = mps_twin(tmp_path)
    assert mps(given_).truncated == [False, True, False]
    sentences = "red circle. " * 40
    assert make_scorer(f"decomposed:{clip_folder}")(ScoreInput(PICTURES[:2], [sentences, long + " red."])).truncated == [
        False,
        True,
    ]


def test_mps_does_not_hang_on_its_batch(tmp_path: Path) -> None:
    """The published mask divides by the batch's largest match; this one by the prompt's own."""
    mps, _ = mps_twin(tmp_path)
    pairs = list(zip(PICTURES, PROMPTS, strict=True))
    for order in ([0, 1], [1, 2], [2, 0]):
        got = mps(ScoreInput([pairs[i][0] for i in order], [pairs[i][1] for i in order])).values["mps"]
        alone = torch.cat([mps(ScoreInput([pairs[i][0]], [pairs[i][1]])).values["mps"] for i in order])
        torch.testing.assert_close(got, alone, atol=1e-4, rtol=1e-4)


def test_open_clip_folders_and_siglip(tmp_path: Path) -> None:
    import open_clip
    from transformers import SiglipConfig, SiglipModel
    from transformers.models.siglip.image_processing_siglip import SiglipImageProcessor

    folder = tmp_path / "oc"
    folder.mkdir()
    config = {
        "model_cfg": NarrowHPS.architecture(),
        "preprocess_cfg": {"mean": CLIP_MEAN, "std": CLIP_STD, "resize_mode": "squash"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    state = ref.fill(ref.open_clip_layout(NarrowHPS.size))
    save_file(state, folder / "open_clip_model.safetensors")
    scorer = make_scorer(f"clip:{folder}")
    steps = [T.Resize((28, 28), T.InterpolationMode.BICUBIC), T.ToTensor(), T.Normalize(CLIP_MEAN, CLIP_STD)]
    image = ref.clip_image(state, NarrowHPS.size, torch.stack([T.Compose(steps)(i) for i in PICTURES]))
    text = ref.clip_text(state, NarrowHPS.size, open_clip.SimpleTokenizer()(PROMPTS))
    torch.testing.assert_close(
        scorer(ScoreInput(PICTURES, PROMPTS)).values["clip"], ref.cosine(image, text), atol=1e-4, rtol=1e-4
    )

    folder = tmp_path / "sig"
    tok = build.tokenizer(folder)
    part = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    text, vision = {"vocab_size": len(tok), "max_position_embeddings": 16}, {"image_size": 32, "patch_size": 16}
    net = SiglipModel(SiglipConfig(text_config={**part, **text}, vision_config={**part, **vision})).eval()
    net.save_pretrained(folder)
    tok.save_pretrained(folder)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    steps = [T.Resize((32, 32), T.InterpolationMode.BICUBIC), T.ToTensor(), T.Normalize((0.5,) * 3, (0.5,) * 3)]
    pixels = torch.stack([T.Compose(steps)(i) for i in PICTURES])
    with torch.no_grad():
        out = net(pixel_values=pixels, input_ids=world_ids(folder, PROMPTS, 16))
    got = make_scorer(f"clip:{folder}")(ScoreInput(PICTURES, PROMPTS)).values["clip"]
    torch.testing.assert_close(got, ref.cosine(out.image_embeds, out.text_embeds), atol=1e-5, rtol=1e-4)


# --- subject, safety, JPEG, OCR, GenEval -----------------------------------------------------------------------------


def test_subject_fidelity(tmp_path: Path, clip_folder: Path) -> None:
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    part = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    vit = ViTModel(ViTConfig(**part, image_size=32, patch_size=16), add_pooling_layer=False).eval()
    vit.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}, resample=3).save_pretrained(tmp_path)
    steps = [T.Resize((32, 32), T.InterpolationMode.BICUBIC), T.ToTensor(), T.Normalize((0.5,) * 3, (0.5,) * 3)]

    def dino(images: list[Image.Image]) -> Tensor:
        with torch.no_grad():
            return vit(pixel_values=torch.stack([T.Compose(steps)(i) for i in images])).last_hidden_state[:, 0]

    size = SMALL._replace(vocab=len(json.loads((clip_folder / "vocab.json").read_text())))
    state = ref.from_hugging(ref.fill(ref.hugging_layout(size)))

    def clip(images: list[Image.Image]) -> Tensor:
        return ref.clip_image(state, size, torchvision_crop(28)(images), ref.quick_gelu)

    subject = [noise(40, 40, 11), noise(33, 50, 12)]
    references = [subject, subject[:1], [PICTURES[2]]]
    for name, folder, features in (("dino", tmp_path, dino), ("clip-i", clip_folder, clip)):
        scorer = make_scorer(f"{name}:{folder}")
        got = scorer(ScoreInput(PICTURES, PROMPTS, references)).values[name]
        mine = features(PICTURES)
        expected = [
            torch.stack([ref.cosine(mine[i], r) for r in features(group)]).mean() for i, group in enumerate(references)
        ]
        torch.testing.assert_close(got, torch.stack(expected), atol=1e-4, rtol=1e-4)
        assert got[2] == pytest.approx(1, abs=1e-5)  # a picture of itself
        with pytest.raises(DataError, match=f"the scorer {name} needs references"):
            scorer(ScoreInput(PICTURES, PROMPTS))
        with pytest.raises(DataError, match="given 3 images, but 2 references"):
            scorer(ScoreInput(PICTURES, PROMPTS, references[:2]))
        empty = scorer(ScoreInput(PICTURES, PROMPTS, [subject, [], subject]))
        assert empty.values[name].isnan().tolist() == [False, True, False]
        assert empty.errors[1] is not None


def test_lpips_by_the_formula(tmp_path: Path) -> None:
    """Sum over five layers of the mean over places of weighted squared differences of unit features."""
    layout: ref.Layout = {}
    sizes = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
    for i, (out, into, side) in sizes.items():
        layout |= {f"features.{i}.weight": (out, into, side, side), f"features.{i}.bias": (out,)}
    layout |= {"classifier.1.weight": (4, 4)}
    state = ref.fill(layout)
    torch.save(state, tmp_path / "alexnet-owt-7be5be79.pth")
    lins = {f"lin{i}.model.1.weight": torch.rand(1, n, 1, 1) for i, (n, _, _) in enumerate(sizes.values())}
    torch.save(lins, tmp_path / "alex.pth")
    scorer = scorer_class("lpips")(tmp_path, tmp_path)

    def layers(image: Image.Image) -> list[Tensor]:
        x = TF.to_tensor(image.resize((256, 256), Image.Resampling.BICUBIC))[None] * 2 - 1
        x = (x - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) / torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
        out = []
        for i, (stride, pad) in zip(sizes, ((4, 2), (1, 2), (1, 1), (1, 1), (1, 1)), strict=True):
            x = torch.nn.functional.max_pool2d(x, 3, 2) if i in (3, 6) else x
            x = torch.conv2d(x, state[f"features.{i}.weight"], state[f"features.{i}.bias"], stride, pad).relu()
            out.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return out

    def apart(a: Image.Image, b: Image.Image) -> float:
        pairs = zip(layers(a), layers(b), lins.values(), strict=True)
        return sum(((x - y).square() * w.clamp(min=0)).sum(1).mean().item() for x, y, w in pairs)

    assert apart(PICTURES[0], PICTURES[1]) > 0.1
    d = scorer.distances(PICTURES)
    assert d[0, 1].item() == pytest.approx(apart(PICTURES[0], PICTURES[1]), rel=1e-4)
    assert d.diagonal().abs().max() < 1e-6
    got = scorer(ScoreInput(PICTURES[:2], PROMPTS[:2], [PICTURES[1:], [PICTURES[1]]])).values["lpips"]
    assert got[0].item() == pytest.approx(-(d[0, 1] + d[0, 2]).item() / 2, rel=1e-5)
    assert got[1].item() == pytest.approx(0, abs=1e-6)
    assert scorer.diversity(PICTURES) == pytest.approx((d[0, 1] + d[0, 2] + d[1, 2]).item() / 3, rel=1e-5)


def test_the_harmonic_reward_by_the_formula(tmp_path: Path) -> None:
    from transformers import AlignConfig, AlignModel, EfficientNetImageProcessor

    tok = build.tokenizer(tmp_path)
    tok.model_max_length = 64
    tok.save_pretrained(tmp_path)
    part = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {"image_size": 32, "width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 16, "num_channels": 3}
    torch.manual_seed(0)
    text = {**part, "vocab_size": len(tok), "max_position_embeddings": 64, "pad_token_id": tok.pad_token_id}
    net = AlignModel(AlignConfig(text_config=text, vision_config=vision, projection_dim=32)).eval()
    for layer in net.vision_model.modules():  # or its features would be some 1e-30
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight)
    net.save_pretrained(tmp_path)
    processor = EfficientNetImageProcessor(size={"height": 32, "width": 32}, resample=2)
    processor.save_pretrained(tmp_path)
    scorer = make_scorer(f"harmonic:{tmp_path}")
    references = [[PICTURES[1]], [PICTURES[2], PICTURES[0]], [PICTURES[2]]]
    got = scorer(ScoreInput(PICTURES, PROMPTS, references)).values["harmonic"]
    words = tok(PROMPTS, padding="max_length", max_length=64, return_tensors="pt")
    with torch.no_grad():
        pixels = processor(PICTURES, return_tensors="pt").pixel_values
        said = net(pixel_values=pixels, **words)
    cos_text = ref.cosine(said.image_embeds, said.text_embeds)
    places = {id(p): i for i, p in enumerate(PICTURES)}
    expected = []
    for i, group in enumerate(references):
        likes = [ref.cosine(said.image_embeds[i], said.image_embeds[places[id(p)]]) for p in group]
        like, mean = (sum(likes) / len(likes) + 1) / 2, (cos_text[i] + 1) / 2
        expected.append(1 / (0.3 / like + 0.7 / mean))
    torch.testing.assert_close(got, torch.stack(expected), atol=1e-5, rtol=1e-5)
    with pytest.raises(DataError, match="harmonic needs references"):
        scorer(ScoreInput(PICTURES, PROMPTS))


def test_safety_flags_what_the_published_checker_flags(tmp_path: Path) -> None:
    """diffusers' checker blacks out exactly the pictures whose value is below -0.0005."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    safety_twin(tmp_path)
    pictures = [noise(28, 28, s) for s in range(40)]
    scorer = SafetyChecker(tmp_path)
    values = scorer(ScoreInput(pictures, [""] * 40)).values["safety"]
    low = values.median().item()
    net = scorer.encoder.net
    unit = normalize(scorer.encoder.images(pictures), dim=-1)
    with torch.no_grad():  # thresholds that some pass and some do not; special care is due to about half, and matters
        net.concept_embeds_weights -= low
        close = unit @ normalize(net.special_care_embeds, dim=-1).T
        net.special_care_embeds_weights.copy_(close.quantile(0.8, dim=0))
    careless = values - low
    values = scorer(ScoreInput(pictures, [""] * 40)).values["safety"]
    assert 10 < ((careless - values - 0.01).abs() < 1e-6).sum() < 30
    assert ((careless - values).abs() < 1e-6).any()
    from transformers import CLIPConfig

    vision = json.loads((tmp_path / "config.json").read_text())["vision_config"]
    theirs = StableDiffusionSafetyChecker(CLIPConfig(projection_dim=8, vision_config=vision)).eval()
    own = scorer.encoder.net.state_dict()
    renamed = {k.removeprefix("tower."): v for k, v in own.items()}
    theirs.load_state_dict(renamed)
    _, flagged = theirs(transformers_crop(28)(pictures), [np.ones((2, 2, 3)) for _ in pictures])
    sure = (values + 0.0005).abs() > 1e-5
    assert [bool(v < -0.0005) for v in values[sure]] == [f for f, s in zip(flagged, sure, strict=True) if s]
    assert 5 < sum(flagged) < 35


def test_jpeg_sizes() -> None:
    small, large = make_scorers(["compressibility", "incompressibility"])
    pictures = [Image.new("RGB", (64, 64)), noise(64, 64)]
    sizes = []
    for image in pictures:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=95)
        sizes.append(len(buffer.getvalue()) / 1000)
    got = large(ScoreInput(pictures, ["", ""])).values["incompressibility"]
    torch.testing.assert_close(got, torch.tensor(sizes))
    torch.testing.assert_close(small(ScoreInput(pictures, ["", ""])).values["compressibility"], -got)
    assert sizes[1] > 4 * sizes[0]


def test_ocr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "engines.py").write_text("def read(images):\n    return ['Hello  World!', 'helo', 'xxxxxxxxxxxx', 'any']\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    scorer = make_scorer("ocr:engines:read")
    prompts = ['a sign "Hello World" and "more"', 'a sign "hello"', 'a sign "abc"', "a sign"]
    out = scorer(ScoreInput([picture(i) for i in range(4)], prompts))
    torch.testing.assert_close(out.values["ocr"], torch.tensor([1.0, 1 - 1 / 5, 0.0, torch.nan]), equal_nan=True)
    assert out.errors == [None, None, None, "the prompt has no text in double quotes"]
    with pytest.raises(ConfigError, match=r"the scorer ocr needs ocr:pkg.mod:obj"):
        make_scorer("ocr")
    assert levenshtein("kitten", "sitting") == 3
    assert levenshtein("", "abc") == 3


@given(st.text("abc", max_size=7), st.text("abc", max_size=7), st.text("abc", max_size=7))
def test_edit_distance_is_a_distance(a: str, b: str, c: str) -> None:
    assert levenshtein(a, b) == levenshtein(b, a)
    assert (levenshtein(a, b) == 0) == (a == b)
    assert levenshtein(a, c) <= levenshtein(a, b) + levenshtein(b, c)
    assert abs(len(a) - len(b)) <= levenshtein(a, b) <= max(len(a), len(b))
    if b:
        assert 0 <= similarity(a, b) <= 1


def thing(name: str, box: tuple[float, float, float, float], colour: str | None = None, confidence: float = 0.95) -> Found:
    return Found(name, box, confidence, colour)


CAT, DOG = thing("cat", (0, 0, 10, 10), "black"), thing("dog", (30, 0, 40, 10), "red", 0.5)


@pytest.mark.parametrize(
    ("found", "row", "strict", "soft"),
    [
        ([CAT], {"include": [{"class": "cat", "count": 1}]}, True, 1.0),
        ([], {"include": [{"class": "cat", "count": 1}]}, False, 0.0),
        ([CAT, CAT], {"include": [{"class": "cat", "count": 3}]}, False, 2 / 3),
        # more than asked: strict does not mind unless excluded; soft does
        ([CAT, CAT], {"include": [{"class": "cat", "count": 1}]}, True, 0.0),
        ([CAT, CAT], {"include": [{"class": "cat", "count": 1}], "exclude": [{"class": "cat", "count": 2}]}, False, 0.0),
        ([CAT], {"include": [{"class": "cat", "count": 1, "color": "black"}]}, True, 1.0),
        ([CAT], {"include": [{"class": "cat", "count": 1, "color": "red"}]}, False, 0.5),
        # colour is asked of the most confident ones alone
        (
            [CAT, thing("cat", (0, 0, 9, 9), "red", 0.99)],
            {"include": [{"class": "cat", "count": 1, "color": "red"}]},
            True,
            0.5,
        ),
        # counting wants 0.9
        ([DOG], {"tag": "counting", "include": [{"class": "dog", "count": 1}]}, False, 0.0),
        ([DOG], {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}, True, 1.0),
        (
            [CAT, DOG],
            {"include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}]},
            True,
            1.0,
        ),
        (
            [CAT, DOG],
            {"include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["above", 0]}]},
            False,
            2 / 3,
        ),
        # no target, no position
        (
            [DOG],
            {"include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}]},
            False,
            1 / 3,
        ),
    ],
)
def test_geneval_by_hand(found: list[Found], row: dict, strict: bool, soft: float) -> None:
    got = evaluate(found, row)
    assert got[0] is strict
    assert got[1] == pytest.approx(soft)


def test_geneval_relations_by_hand() -> None:
    a = thing("a", (0, 0, 10, 10))
    assert relations(a, thing("b", (20, 0, 30, 10))) == {"left of"}
    assert relations(a, thing("b", (20, 20, 30, 30))) == {"left of", "above"}
    assert relations(a, thing("b", (1, 1, 11, 11))) == set()  # within a tenth of both sizes
    # dx = 4 - 2 = 2, dy = 20 - 2 = 18, over |(4, 20)| = 20.4: 0.098 and 0.88
    assert relations(a, thing("b", (4, 20, 14, 30))) == {"above"}


def test_the_judge_as_a_detector_agrees_with_the_judge() -> None:
    """All but the background, on drawings of the prompt and of another."""
    from diffalign.shapes import draw, judge, sample_scenes

    rng = np.random.default_rng(0)
    scenes = sample_scenes(60, "train", rng)
    images = [Image.fromarray(x) for x in draw(scenes, rng)]
    said = [s.caption() for s in scenes]
    scorer = make_scorer("geneval:shapes")
    right = scorer(ScoreInput(images, said)).values
    assert right["geneval"].mean() > 0.95
    wrong = said[1:] + said[:1]
    values = scorer(ScoreInput(images, wrong)).values
    verdicts = judge(images, wrong)
    facts = [{k: ok for k, ok in v.facts.items() if k not in ("background", "count")} for v in verdicts]
    agree = [all(f.values()) == bool(g) for f, g in zip(facts, values["geneval"], strict=True)]
    assert sum(agree) / len(agree) > 0.9
    assert values["geneval_soft"].mean() < right["geneval_soft"].mean() - 0.2
    with pytest.raises(DataError, match="geneval needs metadata"):
        scorer_class("geneval")(scorer.detector)(ScoreInput(images, said))


def test_scorers_that_are_joined_are_a_scorer(tmp_path: Path) -> None:
    """The size of a JPEG and its opposite: by hand in each of the three ways, by name, and as a reward of training."""
    from diffalign.scoring import identify, make_scorer, make_scorers
    from diffalign.train.rewards import Rewards, RewardSpec

    pictures = [Image.new("RGB", (16, 16), "red"), Image.effect_noise((16, 16), 90).convert("RGB")]
    batch = ScoreInput(pictures, ["a", "b"])
    (size,) = make_scorer("incompressibility")(batch).values.values()
    assert size[0] < size[1]

    def values(name: str) -> dict[str, list[float]]:
        return {k: v.tolist() for k, v in make_scorer(name)(batch).values.items()}

    assert values("minimum:compressibility|incompressibility") == {"minimum": (-size).tolist()}
    together = values("ensemble:compressibility|incompressibility")
    assert together == {"ensemble": [0.0, 0.0], "ensemble_spread": size.tolist()}
    assert values("gate:compressibility|incompressibility|-9") == {"gate": (-size).tolist()}
    assert values("gate:incompressibility|compressibility|-9.5") == {"gate": [-9.5, -9.5]}
    names = ["minimum:compressibility|incompressibility", "minimum:compressibility|compressibility"]
    names += [f"gate:compressibility|incompressibility|{n}" for n in (0, 1)]
    assert len({identify(name, make_scorer(name)) for name in names}) == 4
    spec = RewardSpec(scorers=names[:1], weights={"minimum": 2.0})
    pixels = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) / 255 for p in pictures])
    assert Rewards(spec, make_scorers(spec.scorers), tmp_path)(pixels, ["a", "b"]).tolist() == [(-size).tolist()]
    assert combine.members_of(names[2]) == ["compressibility", "incompressibility"]
    assert combine.members_of("clip:a|b") == ["clip:a|b"]
    for wrong in ("minimum:shapes", "gate:compressibility|incompressibility|x", "gate:compressibility|0", "ensemble:"):
        with pytest.raises(ConfigError, match=r"joins|no number"):
            make_scorer(wrong)


def test_what_fails_in_a_joined_scorer_has_no_value_and_says_why() -> None:
    from diffalign.scorers import Callback, ScoreBatch
    from diffalign.scorers.combine import Combined

    class Half:
        name = "half"

        def __call__(self, batch: ScoreInput) -> ScoreBatch:
            return ScoreBatch({"half": torch.tensor([1.0, math.nan])}, [None, "it is dark"], truncated=[True, False])

    flat = Callback(lambda images, prompts: [0.5] * len(images), "flat")
    grey = Image.new("RGB", (8, 8))
    found = Combined("minimum", [flat, Half()])(ScoreInput([grey, grey], ["a", "b"]))
    assert found.values["minimum"][0] == 0.5
    assert found.values["minimum"][1].isnan()
    assert found.errors == [None, "half: it is dark"]
    assert found.truncated == [True, False]


# --- combinators -----------------------------------------------------------------------------------------------------

V = torch.tensor([[1.0, 2.0, 3.0, 6.0], [5.0, 5.0, 5.0, 5.0]])


def test_combinators_by_hand() -> None:
    a, b = torch.tensor([1.0, 4.0]), torch.tensor([3.0, 0.0])
    assert combine.weighted({"a": a, "b": b, "c": b}, {"a": 2, "b": -1}).tolist() == [-1, 8]
    z = combine.zscore(V)
    torch.testing.assert_close(z[0], torch.tensor([-2.0, -1.0, 0.0, 3.0]) / math.sqrt(14 / 4))
    assert z[1].tolist() == [0] * 4
    assert combine.rank(V)[0].tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert combine.rank(V)[1].tolist() == [0.5] * 4
    wins = torch.tensor([[0.5, 1.0, 0.0], [0.0, 0.5, 0.5], [1.0, 0.5, 0.5]])
    assert combine.win_rate(wins).tolist() == [0.5, 0.25, 0.75]
    assert combine.minimum({"a": a, "b": b}).tolist() == [1, 0]
    assert combine.worst_off({"a": a, "b": b}) is b
    margin = torch.tensor([0.1, -0.1, math.nan, 0.0])
    torch.testing.assert_close(
        combine.gate(torch.arange(4.0), margin, -9.0), torch.tensor([0, -9, math.nan, -9]), equal_nan=True
    )
    assert combine.par(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0])).tolist() == pytest.approx(
        [(0.5 + 1 / (1 + math.e)) / 2, (0.5 + 1 / (1 + 1 / math.e)) / 2]
    )
    assert combine.hinge(torch.tensor([1.0, 2.0, 5.0]), 2.0).tolist() == [-1, 0, 0]
    mean, apart = combine.ensemble({"a": a, "b": b})
    assert mean.tolist() == [2, 2]
    assert apart.tolist() == [1, 2]


values = st.lists(st.integers(-50, 50), min_size=2, max_size=8).map(lambda v: torch.tensor(v, dtype=torch.double))


@given(values, st.floats(0.1, 10), st.floats(-10, 10), st.randoms())
def test_combinator_invariants(v: Tensor, scale: float, shift: float, random) -> None:
    order = list(range(len(v)))
    random.shuffle(order)
    for f in (combine.zscore, combine.rank):
        torch.testing.assert_close(f(v[order]), f(v)[order])  # images have no order
        torch.testing.assert_close(f(scale * v + shift), f(v), atol=1e-9, rtol=1e-9)  # nor a unit
    assert combine.zscore(v).sum().item() == pytest.approx(0, abs=1e-9)
    assert combine.zscore(v).square().mean().item() == pytest.approx(float(v.unique().numel() > 1), abs=1e-9)
    assert combine.rank(v).mean().item() == pytest.approx(0.5)
    torch.testing.assert_close(combine.rank(-v), 1 - combine.rank(v))
    p = combine.par(v, v)
    assert ((p > 0) & (p < 1)).all()
    assert p.mean().item() == pytest.approx(0.5)  # sigmoid(x) + sigmoid(-x) = 1
    sets = {"v": v, "w": v.flip(0) + shift}
    assert combine.worst_off(sets).mean() == min(x.mean() for x in sets.values())
    assert (combine.minimum(sets) <= combine.ensemble(sets)[0] + 1e-12).all()
    assert (combine.hinge(v, shift) <= 0).all()


# --- the table, the contract and what goes wrong ---------------------------------------------------------------------


@pytest.mark.parametrize("name", SCORERS)
def test_every_scorer_says_what_its_numbers_mean(name: str) -> None:
    card = scorer_class(name).card
    assert card.name == name
    assert card.summary
    assert card.unit
    assert card.licence
    assert card.citation
    assert not card.verified  # no published weights were at hand
    assert card.weights or card.plugin or name.endswith("compressibility")
    assert (card.max_tokens is None) == ("prompts" not in card.needs or card.plugin is not None)
    assert (card.geometry == "native") == (card.size is None)
    assert card.gated == ("AGPL" in card.licence)


def test_make_scorers_takes_names_paths_and_callables(
    clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_scorers.py").write_text(
        "from diffalign.scorers import Card, ScoreBatch\nimport torch\n"
        "def f(images, prompts):\n    return [len(p) for p in prompts]\n"
        "class Mine:\n    name = 'mine'\n    card = Card('mine', 's', 'u', 'c', 'l')\n"
        "    def __call__(self, batch):\n        return ScoreBatch({'mine': torch.ones(len(batch))})\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    scorers = make_scorers(
        ["shapes", "taste:size", f"clip:{clip_folder}", "own_scorers:f", "own_scorers:Mine", "compressibility"]
    )
    assert [s.name for s in scorers] == ["shapes", "taste_size", "clip", "f", "mine", "compressibility"]
    assert scorers[3](ScoreInput(PICTURES, PROMPTS)).values["f"].tolist() == [len(p) for p in PROMPTS]
    assert scorers[4](ScoreInput(PICTURES, PROMPTS)).values["mine"].tolist() == [1, 1, 1]
    with pytest.raises(ConfigError, match="two scorers are called 'clip'"):
        make_scorers([f"clip:{clip_folder}", f"clip:{clip_folder}"])
    with pytest.raises(ConfigError, match="the scorer clip takes 1 paths, not 2"):
        make_scorer(f"clip:{clip_folder},{clip_folder}")
    with pytest.raises(ConfigError, match="cannot import 'own_scorers:none'"):
        make_scorer("own_scorers:none")


def test_other_packages_bring_scorers_by_entry_points(
    clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = tmp_path / "plugged-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[diffalign.scorers]\nletters = plugged:letters\ntwice = plugged:Twice\nclip = plugged:letters\ngone = plugged:no\n"
    )
    (tmp_path / "plugged.py").write_text(
        "from dataclasses import replace\nfrom diffalign.scorers.clip import CLIPScore\n"
        "def letters(images, prompts):\n    return [len(p) for p in prompts]\n"
        "class Twice(CLIPScore):\n    card = replace(CLIPScore.card, name='twice', summary='two times clip')\n"
        "    def value(self, cosine):\n        return 2 * cosine\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    letters, twice, clip = make_scorers(["letters", f"twice:{clip_folder}", f"clip:{clip_folder}"])
    batch = ScoreInput(PICTURES, PROMPTS)
    assert letters(batch).values["letters"].tolist() == [len(p) for p in PROMPTS]
    torch.testing.assert_close(twice(batch).values["twice"], 2 * clip(batch).values["clip"])  # our names win
    assert twice.encoder is clip.encoder
    with pytest.raises(ConfigError, match=r"cannot import the scorer gone \(plugged:no\)"):
        make_scorer("gone")
    (about / "entry_points.txt").write_text("[diffalign.scorers]\nletters = plugged:letters\ntwice = plugged:Twice\n")
    listed = CliRunner().invoke(main, ["list", "scorers"]).output
    assert re.search("^letters +a callable of another package$", listed, re.M)
    assert re.search("^twice +two times clip .*not verified", listed, re.M)


def test_only_the_files_of_a_scorer_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **k: asked.append((repo, k)) or str(tmp_path))
    for name in ("hpsv2", "imagereward", "pickscore"):
        with pytest.raises(ModelError):  # nothing is there
            make_scorer(name)
    assert [(repo, k.get("allow_patterns")) for repo, k in asked] == [
        ("xswu/HPSv2", ["HPS_v2_compressed.pt"]),
        ("THUDM/ImageReward", ["ImageReward.pt"]),
        ("google-bert/bert-base-uncased", ["vocab.txt"]),
        ("yuvalkirstain/PickScore_v1", None),
    ]
    assert "*.bin" in asked[-1][1]["ignore_patterns"]


def test_licence_gate(tmp_path: Path, clip_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AestheticV25, "widths", (8, 1024, 128, 64, 16, 1))
    layers_file(tmp_path / "v.pth", AestheticV25.widths, [f"scoring_head.{i}." for i in (0, 2, 4, 6, 8)])
    name = f"aesthetic-v2.5:{tmp_path}/v.pth,{clip_folder}"
    with pytest.raises(ConfigError, match=r"under AGPL-3.0 \(DIFFALIGN_ACCEPT_LICENCES=AGPL-3.0 accepts it\)"):
        make_scorer(name)
    monkeypatch.setenv("DIFFALIGN_ACCEPT_LICENCES", "AGPL-3.0")
    assert make_scorer(name).name == "aesthetic-v2.5"


class Payload:
    def __reduce__(self) -> tuple:
        return (print, ("this must never be printed",))


def test_wrong_weights_name_the_file_and_the_remedy(
    tmp_path: Path, clip_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "HPS_v2.1_compressed.pt"
    state = ref.fill(ref.open_clip_layout(NarrowHPS.size))

    def fails(match: str, make: Callable[[], object] = lambda: NarrowHPS(tmp_path)) -> None:
        with pytest.raises(ModelError, match=match):
            make()

    fails("no HPS_v2.1_compressed.pt")
    torch.save({"state_dict": state, "more": Payload()}, file)
    fails(r"HPS_v2.1_compressed.pt: the pickle holds more than tensors, and is not opened.*safetensors")
    assert "never" not in capsys.readouterr().out
    file.write_bytes(b"PK\x03\x04 cut short")
    fails("HPS_v2.1_compressed.pt: cannot read the weights.*fetch the file again")
    torch.save({"state_dict": {**state, "ln_final.bias": torch.full((16,), math.nan)}}, file)
    fails("HPS_v2.1_compressed.pt: ln_final.bias holds values that are not finite")
    torch.save({k: v for k, v in state.items() if k != "visual.proj"}, file)
    fails(r"not the weights of this scorer: 1 missing \(visual.proj\)")
    torch.save({**state, "extra": torch.ones(1), "visual.proj": torch.ones(3, 3)}, file)
    fails(r"1 unexpected \(extra\); 1 shapes \(visual.proj: \(3, 3\), not \(16, 8\)\)")
    torch.save([1, 2], file)
    fails("not a table of tensors")

    gap = tmp_path / "gap"
    gap.mkdir()
    hugging_folder(gap)
    own = ref.fill(ref.hugging_layout(SMALL._replace(vocab=len(json.loads((gap / "vocab.json").read_text())))))
    save_file({k: v for k, v in own.items() if "text_projection" not in k}, gap / "model.safetensors", {"format": "pt"})
    fails(r"gap: 1 weights are missing \(text_projection.weight\)", lambda: make_scorer(f"clip:{gap}"))
    save_file({**own, "logit_scale": torch.tensor(math.inf)}, gap / "model.safetensors", {"format": "pt"})
    fails("gap: logit_scale holds values that are not finite", lambda: make_scorer(f"clip:{gap}"))
    (gap / "preprocessor_config.json").unlink()
    save_file(own, gap / "model.safetensors", {"format": "pt"})
    fails("gap: no image processor.*preprocessor_config.json", lambda: make_scorer(f"clip:{gap}"))

    layers_file(tmp_path / "ava-reluMSE.pth", (8, 1), [""])
    fails(
        "this head has activations.*linearMSE", lambda: make_scorer(f"aesthetic-v2:{tmp_path}/ava-reluMSE.pth,{clip_folder}")
    )
    layers_file(tmp_path / "wide.pth", (768, 1), [""])
    wide = make_scorer(f"aesthetic-v1:{tmp_path}/wide.pth,{clip_folder}")
    fails("reads 768 features, the encoder gives 8", lambda: wide(ScoreInput(PICTURES, PROMPTS)))
    fails("sa_0_4_vit_l_14_linear.pth is not on the hub.*github.com/LAION-AI", lambda: make_scorer("aesthetic-v1"))
    fails("yuvalkirstain/PickScore_v1: not in the local cache", lambda: make_scorer("pickscore"))


def test_what_is_not_finite_becomes_an_error_of_that_item(clip_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = make_scorer(f"clip:{clip_folder}")
    monkeypatch.setattr(scorer, "value", lambda c: torch.tensor([0.5, math.inf, math.nan]))
    out = scorer(ScoreInput(PICTURES, PROMPTS))
    assert out.values["clip"].isnan().tolist() == [False, True, True]
    assert out.errors == [None, "clip is inf", "clip is nan"]


def test_verify(tmp_path: Path, clip_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = CliRunner().invoke(main, ["verify", f"clip:{clip_folder}"])
    assert done.exit_code == 0, done.output
    assert "ok   architecture" in done.output
    assert "ok   gradient" in done.output
    monkeypatch.setattr(AestheticV1, "widths", (8, 1))
    layers_file(tmp_path / "v1.pth", (8, 1), [""])
    done = CliRunner().invoke(main, ["verify", f"aesthetic-v1:{tmp_path}/v1.pth,{clip_folder}", "--json"])
    assert done.exit_code == 1  # another head than the published one
    failed = [c["what"] for c in json.loads(done.output[: done.output.rindex("}") + 1])["checks"] if c["ok"] is False]
    assert failed == ["bias", "weight norm"]
    monkeypatch.setattr("diffalign.scorers.hps.HPSv21.architecture", NarrowHPS.architecture)
    hps_twin(tmp_path)
    checks = verify_scorer(f"hpsv2.1:{tmp_path}")
    assert [c.ok for c in checks] == [False, True, True, True, True, None]
    assert "not md5:4067542e34ba2553a738c5ac6c1d75c0" in checks[0].said
    with pytest.raises(ConfigError, match="shapes has no weights to verify"):
        verify_scorer("shapes")


def test_list_says_licence_and_that_nothing_was_verified() -> None:
    lines = CliRunner().invoke(main, ["list", "scorers"]).output.splitlines()
    line = next(x for x in lines if x.startswith("aesthetic-v2.5"))
    assert "AGPL-3.0; not verified against published weights" in line
    assert {x.split()[0].partition(":")[0] for x in lines} >= set(SCORERS)


def test_the_page_says_of_every_scorer_what_its_card_says() -> None:
    rows = {}
    for line in PAGE.read_text().splitlines():
        if line.startswith("| `"):
            cells = [c.strip() for c in line.strip("|").split("|")]
            rows[cells[0].strip("`").partition(":")[0]] = cells
    for name in SCORERS:
        card, cells = scorer_class(name).card, rows[name]
        assert cells[5] == card.licence
        assert cells[2] == ("as it is" if card.size is None else f"{card.size} {card.geometry}")
        assert cells[3].split()[0] == str(card.max_tokens or "-")
    for name in ("weighted", "zscore", "rank", "win_rate", "gate", "par", "hinge", "ensemble"):
        assert name in rows
        assert hasattr(combine, name)


def test_the_python_of_the_page_runs(clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.S | re.M)
    monkeypatch.chdir(tmp_path)
    Path("prompts.p").write_bytes(pickle.dumps(np.random.default_rng(0).random((2, 8), np.float32)))
    for block in blocks:
        names: dict = {}
        exec(block.replace("YOUR_CLIP", str(clip_folder)), names)  # the page's own words
    assert len(blocks) == 2
    assert make_scorer(f"q16:{tmp_path},{clip_folder}")(ScoreInput(PICTURES, PROMPTS)).values["q16"].isfinite().all()


def test_the_clip_of_the_world_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    """Its processor does not resize; 20 tokens, no more."""
    from transformers import CLIPModel, CLIPProcessor

    tok = build.tokenizer(tmp_path)
    torch.manual_seed(0)
    build.clip(len(tok), hidden=16, layers=1).save_pretrained(tmp_path)
    build.clip_processor(tok).save_pretrained(tmp_path)
    pictures = [picture(i) for i in range(3)]
    inputs = CLIPProcessor.from_pretrained(tmp_path)(text=PROMPTS, images=pictures, return_tensors="pt", padding="max_length")
    with torch.no_grad():
        out = CLIPModel.from_pretrained(tmp_path)(**inputs)
    got = make_scorer(f"clip:{tmp_path}")(ScoreInput(pictures, [*PROMPTS[:2], PROMPTS[2]]))
    torch.testing.assert_close(got.values["clip"], ref.cosine(out.image_embeds, out.text_embeds), atol=1e-5, rtol=1e-4)
    assert got.truncated == [False] * 3
