"""HPSv3: Qwen2-VL reads picture, rubric and prompt; a head reads the mean of a Gaussian at one token of its own."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffalign.errors import DataError, ModelError
from diffalign.scorers.base import Card, Reward, ScoreBatch, ScoreInput, Weight, require, scored
from diffalign.scorers.encoders import Encoder, tokenizer_of
from diffalign.scorers.preprocess import Preprocess
from diffalign.scorers.weights import choose, differences, read_weights

REWARD, IMAGE = "<|Reward|>", "<|image_pad|>"
SLOTS = ("{text_prompt}", "{prompt}")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "chat_template.*")


def instruction_of(path: Path) -> str:
    """The text around the prompt: a text file, or the constants of the published ``data_collator_qwen.py``, which is not run.

    Raises:
        ModelError: it cannot be read, or has no place for the prompt, or none for the reward after it.
    """
    file = choose(path, "data_collator_qwen.py", "*.txt")
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".py":
            found = {}
            for node in ast.parse(text).body:
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    found[node.targets[0].id] = node.value
            text = "".join(ast.literal_eval(found[name]) for name in ("INSTRUCTION", "prompt_with_special_token"))
    except (OSError, ValueError, SyntaxError, KeyError) as e:
        raise ModelError(f"{file}: no instruction of HPSv3: {e}", hint="give data_collator_qwen.py, or a text file") from e
    for slot in SLOTS:
        before, found_slot, after = text.partition(slot)
        if found_slot and REWARD in after and REWARD not in before:
            return f"{before}{SLOTS[-1]}{after}"
    raise ModelError(f"{file}: no {SLOTS[-1]} with {REWARD} after it", hint="give the published text")


def patches(x: Tensor, size: int = 14, merge: int = 2) -> Tensor:
    """(N, 6 * size * size) of normalised pixels (3, H, W): two equal frames, patches to be merged next to each other."""
    height, width = (n // size for n in x.shape[1:])
    blocks = x.reshape(3, height // merge, merge, size, width // merge, merge, size).permute(1, 4, 2, 5, 0, 3, 6)
    return blocks[:, :, :, :, :, None].expand(-1, -1, -1, -1, -1, 2, -1, -1).reshape(height * width, -1)


class HPSv3(Reward):
    """mu of N(mu, sigma), read at the token ``<|Reward|>``. Unbounded, and known to be over-confident on broken pictures."""

    vision: ClassVar[dict[str, Any]] = {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16}
    text: ClassVar[dict[str, Any]] = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    }
    side: ClassVar[int] = 448
    dtype: ClassVar[torch.dtype] = torch.bfloat16  # as published; fp32 would be 33 GB
    card: ClassVar[Card] = Card(
        name="hpsv3",
        summary="mu of Qwen2-VL-7B with a head, tuned on HPDv3",
        unit="unbounded; -2 to 15",
        citation="Ma et al. 2025, arXiv 2508.03789",
        licence="Apache-2.0",
        weights=(
            Weight("MizzenAI/HPSv3", ("HPSv3.safetensors",)),
            Weight("Qwen/Qwen2-VL-7B-Instruct", TOKENIZER),
            Weight("github.com/MizzenAI/HPSv3/blob/master/hpsv3/dataset/data_collator_qwen.py", ("data_collator_qwen.py",)),
        ),
        geometry="area",
        size=448,
        max_tokens=32768,
        differentiable=True,
    )

    @classmethod
    def config(cls, vocabulary: int) -> Any:
        """Of Qwen2-VL-7B, but for the vocabulary: training added a token."""
        from transformers import Qwen2VLConfig

        return Qwen2VLConfig(text_config={**cls.text, "vocab_size": vocabulary}, vision_config=dict(cls.vision))

    @classmethod
    def network(cls, vocabulary: int) -> nn.ModuleDict:
        """The empty network, without the layer that would predict words."""
        from transformers import Qwen2VLModel

        head = nn.Sequential(
            nn.Linear(cls.text["hidden_size"], 1024),
            nn.ReLU(),
            nn.Dropout(0.05),
            nn.Linear(1024, 16),
            nn.ReLU(),
            nn.Linear(16, 2),
        )
        return nn.ModuleDict({"model": Qwen2VLModel(cls.config(vocabulary)), "rm_head": head})

    @staticmethod
    def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The published names, which are those of transformers before 4.52, to today's."""
        out = {}
        for key, value in state.items():
            if key.startswith("visual."):
                key = f"model.{key}"
            elif key.startswith("model.") and not key.startswith(("model.visual.", "model.language_model.")):
                key = "model.language_model." + key.removeprefix("model.")
            if key != "lm_head.weight":
                out[key] = value
        return out

    def __init__(self, path: Path, tokenizer: Path, instruction: Path, device: str = "cpu") -> None:
        self.instruction = instruction_of(instruction)
        self.tokenizer = tokenizer_of(tokenizer, "that of Qwen2-VL", padding_side="right")
        self.tokenizer.add_special_tokens({"additional_special_tokens": [REWARD]})
        self.reward, self.image = self.tokenizer.convert_tokens_to_ids([REWARD, IMAGE])
        file = choose(path, *self.card.weights[0].files, "*.safetensors")
        self.encoder = Encoder(self._filled(self.renamed(read_weights(file)), file), Preprocess(self.side, "area"), device)

    def _filled(self, state: dict[str, Tensor], file: Path) -> nn.Module:
        from transformers import Qwen2VLModel

        words = state.get("model.language_model.embed_tokens.weight", torch.empty(0)).shape[0]
        with torch.device("meta"):
            net = self.network(words)
        if words <= self.reward:
            raise ModelError(f"{file}: {words} tokens, but the tokenizer has more", hint="give that of Qwen2-VL-7B-Instruct")
        if said := differences(net, state):
            raise ModelError(f"{file}: not the weights of this scorer: {said}", hint="check the file with `diffalign verify`")
        inner = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
        config = self.config(words)
        config.image_token_id = self.image
        net["model"] = Qwen2VLModel.from_pretrained(None, config=config, state_dict=inner, dtype=self.dtype)
        head = {k.removeprefix("rm_head."): v.float() for k, v in state.items() if k.startswith("rm_head.")}
        net["rm_head"].load_state_dict(head, assign=True)
        return net

    @torch.no_grad()
    def __call__(self, batch: ScoreInput) -> ScoreBatch:
        require(self.card, batch)
        pixels = [self.encoder.preprocess.one(image) for image in batch.images]
        return scored(self.name, self._mu(pixels, batch.prompts), [False] * len(batch))

    def score_pixels(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        x = self.encoder.preprocess.smooth(pixels.to(self.encoder.device, torch.float32))
        return self._mu(list(x), prompts)

    def _mu(self, pixels: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """(B,) of normalised pictures (3, H, W) of any sizes; the rows of one batch are packed, and do not see each other."""
        net, device = self.encoder.net, self.encoder.device
        grids = [(1, x.shape[1] // 14, x.shape[2] // 14) for x in pixels]
        texts = [self._text(p, h * w // 4) for p, (_, h, w) in zip(prompts, grids, strict=True)]
        words = self.tokenizer(texts, padding=True, return_tensors="pt").to(device)
        hidden = net["model"](
            input_ids=words.input_ids,
            attention_mask=words.attention_mask,
            mm_token_type_ids=(words.input_ids == self.image).int(),
            pixel_values=torch.cat([patches(x.to(device)) for x in pixels]).to(self.dtype),
            image_grid_thw=torch.tensor(grids, device=device),
            use_cache=False,
        ).last_hidden_state
        place = words.input_ids.eq(self.reward).int().cumsum(1).argmax(1)  # the last one: a prompt may hold the word itself
        return net["rm_head"](hidden[torch.arange(len(place)), place].float())[:, 0]

    def _text(self, prompt: str, tokens: int) -> str:
        content = [{"type": "image"}, {"type": "text", "text": self.instruction.replace(SLOTS[-1], prompt, 1)}]
        try:
            text: str = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
        except ValueError as e:
            raise ModelError(f"the tokenizer has no chat template: {e}", hint="take that of Qwen2-VL-7B-Instruct") from e
        if IMAGE in prompt:
            raise DataError(f"the prompt holds {IMAGE}, which stands for a picture")
        return text.replace(IMAGE, IMAGE * tokens, 1)
