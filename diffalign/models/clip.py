"""Prompts longer than a CLIP text encoder reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class Chunks:
    """Prompts cut into pieces that fill the encoder, each between its own begin and end tokens.

    A prompt that fits is one piece, tokenised as ever. The outputs of a prompt's pieces stand one after another, and
    cross-attention reads them all.
    """

    def __init__(self, tokenizer: Any, texts: list[str]) -> None:
        length = tokenizer.model_max_length
        room = length - 2
        rows, self.counts = [], []
        for ids in tokenizer(texts, add_special_tokens=False, truncation=False, verbose=False).input_ids:
            pieces = [ids[i : i + room] for i in range(0, max(len(ids), 1), room)]
            for piece in pieces:
                row = [tokenizer.bos_token_id, *piece, tokenizer.eos_token_id]
                rows.append(row + [tokenizer.pad_token_id] * (length - len(row)))
            self.counts.append(len(pieces))
        self.ids = torch.tensor(rows)
        """(N, L) of all pieces, prompt by prompt."""

    def join(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(N, L, D) outputs of the pieces to (B, n L, D) and the mask (B, n L) that hides what the others have more."""
        prompts = [p.flatten(0, 1) for p in torch.split(hidden, self.counts)]
        mask = [p.new_ones(len(p), dtype=torch.long) for p in prompts]
        return pad_sequence(prompts, batch_first=True), pad_sequence(mask, batch_first=True)

    def first(self, pooled: Tensor) -> Tensor:
        """(N, P) to (B, P): the vector of a prompt's first piece, which says what the picture is of."""
        return torch.stack([p[0] for p in torch.split(pooled, self.counts)])
