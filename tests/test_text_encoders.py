"""Adapters of the text encoders: trained with the network, off in the reference, exported, read again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from side_by_side import PROMPTS, disturb, open_stock, our_images, our_latents, run, same, stock_images
from tiny_families import FAMILIES

from diffalign.errors import ModelError
from diffalign.estimate import blank_batch
from diffalign.exporting import export_run
from diffalign.models import LoRA
from diffalign.models.lora import KOHYA_FILE
from diffalign.timesteps import Uniform
from diffalign.train.terms import terms_of

TEXTS = LoRA(rank=2, alpha=4, text_encoders=True)
with_texts = pytest.mark.parametrize("name", ["sd", "sdxl"])


def terms(model: Any) -> Any:
    batch = blank_batch(model, 2, model.resolution, tuple(PROMPTS))
    g = torch.Generator().manual_seed(0)
    winner, loser, eps = (torch.randn(batch.x0[:, 0].shape, generator=g) for _ in range(3))
    batch = replace(batch, x0=torch.stack([winner, loser], 1), eps=torch.stack([eps, eps], 1)[:, :, None])
    return terms_of(model, batch, Uniform(), frozenset({"loser", "reference"}))


@with_texts
def test_the_reference_is_the_base_with_its_own_texts(load: Any, name: str) -> None:
    base, model = terms(load(name)), load(name, lora=TEXTS)
    start = terms(model)
    assert torch.equal(start.winner, start.ref_winner)
    assert torch.equal(start.loser, start.ref_loser)
    with torch.no_grad():
        for part, weight in model.named_weights.trainable().items():
            weight.add_(0.3 if part.startswith("text_encoder.") else 0)
    moved = terms(model)
    assert torch.equal(moved.ref_winner, base.ref_winner)
    assert not torch.allclose(moved.winner, base.winner)
    with model.weights("reference"):
        absent = model.encode_prompts(PROMPTS).embeds
    assert torch.equal(absent, load(name).encode_prompts(PROMPTS).embeds)
    assert not torch.allclose(model.encode_prompts(PROMPTS).embeds, absent)


@with_texts
def test_every_trained_weight_gets_a_gradient(load: Any, name: str) -> None:
    """A weight without one would stop data-parallel training."""
    model = load(name, lora=TEXTS)
    disturb(model)  # or one factor of each product is zero
    terms(model).winner.sum().backward()
    weights = model.named_weights.trainable()
    assert {n.partition(".")[0] for n in weights} >= set(model.encoders)
    assert [n for n, p in weights.items() if p.grad is None or not p.grad.any()] == []
    assert {id(p) for p in model.net.parameters() if p.requires_grad} == {id(p) for p in weights.values()}


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
@with_texts
def test_stock_diffusers_reads_both_and_so_do_we(load: Any, stock: Any, tmp_path: Path, name: str, format: Any) -> None:
    model, pipe = load(name, lora=TEXTS), stock(name)
    disturb(model)
    ours = our_images(model, 2.5)
    assert not torch.equal(ours, our_images(load(name), 2.5))
    file = model.export(tmp_path, format)
    keys, parts = list(load_file(file)), len(model.encoders)
    names = {"kohya": ["te"] if parts == 1 else ["te1", "te2"], "diffusers": model.encoders}[format]
    begin = {"kohya": "lora_{}_text_model_encoder_layers_0", "diffusers": "{}.text_model.encoder.layers.0"}[format]
    assert all(any(k.startswith(begin.format(n)) for k in keys) for n in names)

    pipe.load_lora_weights(tmp_path, weight_name=file.name)
    same(ours, stock_images(pipe, our_latents(model), 2.5), 2.5)
    assert torch.equal(our_images(load(name, lora=LoRA(path=str(file), text_encoders=True)), 2.5), ours)
    if format == "diffusers":
        again = load(name, lora=TEXTS)
        again.restore(tmp_path)
        assert torch.equal(our_images(again, 2.5), ours)


@with_texts
def test_a_file_for_the_network_alone_leaves_the_texts_to_a_new_adapter(load: Any, tmp_path: Path, name: str) -> None:
    model = load(name)
    disturb(model)
    file = model.export(tmp_path)
    both = load(name, lora=LoRA(path=str(file), text_encoders=True, rank=3))
    assert torch.equal(our_images(both, 2.5), our_images(model, 2.5))
    ranks = {len(p) for n, p in both.named_weights.trainable().items() if n.startswith("text_encoder") and "lora_A" in n}
    assert ranks == {3}


def test_texts_in_a_file_are_refused_where_they_are_not_adapted(load: Any, tmp_path: Path) -> None:
    file = load("sd", lora=TEXTS).export(tmp_path, "kohya")
    with pytest.raises(ModelError, match=r"text_encoder\.\S+ is no part of the unet.*model\.lora\.text_encoders"):
        load("sd", lora=LoRA(path=str(file)))


@with_texts
def test_a_merged_pipeline_has_both_folded_in(load: Any, tmp_path: Path, name: str) -> None:
    model = load(name, lora=TEXTS)
    disturb(model)
    ours, latents = our_images(model, 2.5).int(), our_latents(model)
    model.export(tmp_path, "merged")
    theirs = stock_images(open_stock(tmp_path), latents, 2.5).int()
    assert (ours - theirs).abs().float().mean() < 0.1  # of 255: folding in rounds
    assert not any("lora" in n for n, _ in model.pipeline.text_encoder.named_parameters())


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"sd", "sdxl"}))
def test_other_families_refuse(load: Any, name: str) -> None:
    with pytest.raises(ModelError, match=r"model\.lora\.text_encoders does not apply to"):
        load(name, lora=TEXTS)


@with_texts
def test_a_run_moves_the_texts_caches_none_and_resumes(
    folder_of: Any, pairs_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("DIFFALIGN_CACHE", str(tmp_path / "cache"))
    texts = "model.lora.text_encoders=true"
    first, *_ = run(folder_of(name), name, pairs_csv, tmp_path / "whole", texts)
    assert first["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert list((tmp_path / "cache").glob("pictures-*"))
    assert not list((tmp_path / "cache").glob("texts-*"))
    run(folder_of(name), name, pairs_csv, tmp_path / "halves", texts, "train.max_steps=1")
    run(folder_of(name), name, pairs_csv, tmp_path / "halves", texts, "resume_from=latest")
    a, b = (load_file(tmp_path / n / "pytorch_lora_weights.safetensors") for n in ("whole", "halves"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    moved = {k.partition(".")[0] for k, w in a.items() if "lora_B" in k and w.any()}
    assert moved == {"unet", "text_encoder"} | ({"text_encoder_2"} if name == "sdxl" else set())


def test_a_run_exports_both_to_kohyas_format(folder_of: Any, pairs_csv: Path, tmp_path: Path) -> None:
    run(folder_of("sd"), "sd", pairs_csv, tmp_path, "model.lora.text_encoders=true")
    state = load_file(export_run(tmp_path, "kohya") / KOHYA_FILE)
    assert {k.split("_")[1] for k in state} == {"unet", "te"}
