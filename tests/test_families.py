"""Every model family against its stock pipeline, on tiny random weights."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file
from side_by_side import PROMPTS, RANK_2, T5, disturb, open_stock, our_images, our_latents, run, same, stock_images
from tiny_families import FAMILIES

from diffalign import models
from diffalign.cli import main
from diffalign.data.examples import of_pair
from diffalign.data.images import frame, to_uint8
from diffalign.data.pairs import read_pairs
from diffalign.errors import ModelError
from diffalign.models import LoRA, ModelSpec, load_model
from diffalign.objectives import Sigmoid, pair_metrics
from diffalign.path import add_noise
from diffalign.report import write_report
from diffalign.timesteps import Uniform
from diffalign.train.feeds import Offline

BOTH = frozenset({"loser", "reference"})
FLOW = [name for name in FAMILIES if name.startswith(("sd3", "flux"))]

every_family = pytest.mark.parametrize("name", FAMILIES)


def inputs(model: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
    x = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    return x, model.timestep(torch.tensor([0.1, 0.9])), model.encode_prompts(PROMPTS)


# --- against the stock pipeline -------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@every_family
def test_our_images_are_the_stock_pipelines(load: Any, stock: Any, name: str, guidance: float) -> None:
    model, pipe = load(name, lora=None), stock(name)
    theirs = stock_images(pipe, our_latents(model), guidance)
    same(our_images(model, guidance), theirs, guidance)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "pixart-sigma"])
def test_negative_prompts_are_the_stock_pipelines(load: Any, stock: Any, name: str) -> None:
    model, negative = load(name, lora=None), ["a green cross", "a white background"]
    theirs = stock_images(stock(name), our_latents(model, negative), 2.5, negative)
    same(our_images(model, 2.5, negative), theirs, 2.5)


def test_sdxl_without_a_negative_prompt_is_guided_from_zeros_beside_one_that_has_one(load: Any, stock: Any) -> None:
    """The pipeline's force_zeros_for_empty_prompt; what a neighbour in the batch asks for changes nothing."""
    model = load("sdxl", lora=None)
    mixed = our_images(model, 2.5, ["a green cross", None])
    alone = stock_images(stock("sdxl"), our_latents(model), 2.5)
    assert torch.equal(mixed[1], alone[1])
    assert not torch.equal(mixed[0], alone[0])
    cond = model.encode_prompts([None, ""])
    assert not cond.embeds[0].any()
    assert not cond.pooled[0].any()
    assert cond.embeds[1].any()


@every_family
def test_a_lora_gives_the_same_images_in_the_stock_pipeline(load: Any, stock: Any, tmp_path: Path, name: str) -> None:
    model, pipe = load(name), stock(name)
    base = our_images(model, 2.5)
    disturb(model)
    model.export(tmp_path)
    ours = our_images(model, 2.5)
    if name.startswith("pixart"):
        from peft import PeftModel

        PeftModel.from_pretrained(pipe.transformer, tmp_path)
    else:
        pipe.load_lora_weights(tmp_path)
    same(ours, stock_images(pipe, our_latents(model), 2.5), 2.5)
    assert not torch.equal(ours, base)

    restored = load(name)
    restored.restore(tmp_path)
    assert torch.equal(our_images(restored, 2.5), ours)
    started = load(name, lora=RANK_2.model_copy(update={"path": str(tmp_path)}))
    assert torch.equal(our_images(started, 2.5), ours)
    with started.weights("reference"):
        assert torch.equal(our_images(started, 2.5), ours)


@every_family
def test_trained_weights_give_the_same_images_in_the_stock_pipeline(load: Any, tmp_path: Path, name: str) -> None:
    model = load(name, lora=None)
    base = our_images(model, 2.5)
    disturb(model)
    model.export(tmp_path)
    ours = our_images(model, 2.5)
    same(ours, stock_images(open_stock(tmp_path), our_latents(model), 2.5), 2.5)
    assert not torch.equal(ours, base)
    restored = load(name, lora=None)
    restored.restore(tmp_path)
    assert torch.equal(our_images(restored, 2.5), ours)


@every_family
def test_another_resolution_gives_the_stock_pipelines_images_of_that_size(load: Any, stock: Any, name: str) -> None:
    model, native = load(name, lora=None, resolution=(16, 32)), load(name, lora=None)
    assert model.resolution == (16, 32) != native.resolution
    ours = our_images(model, 2.5)
    assert ours.shape[-2:] == (16, 32)
    same(ours, stock_images(stock(name), our_latents(model), 2.5), 2.5)
    assert load(name, lora=None, resolution=16).resolution == (16, 16)
    if model.encode_prompts(["a"]).frame is not None:  # it is told of the size, so what it reads may not be kept for both
        assert model.fingerprint() != native.fingerprint()


@pytest.mark.parametrize(
    ("name", "resolution", "says"),
    [("sdxl", 18, "18 pixels.*multiple of 4 .such as 16"), ("sd3", (16, 20), "20 pixels.*of 8"), ("sd3", 4096, "beyond 64")],
)
def test_a_resolution_that_the_model_cannot_make_is_refused(load: Any, name: str, resolution: Any, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        load(name, resolution=resolution)


@every_family
def test_latents_are_the_stock_vaes(load: Any, stock: Any, name: str) -> None:
    """Decoding what was encoded is the VAE's own round trip, whatever the shift and scale between."""
    model, vae = load(name), stock(name).vae
    pixels = torch.rand(2, 3, *model.resolution, generator=torch.Generator().manual_seed(0))
    latents = model.encode_images(pixels)
    assert latents.shape == (2, *model.latent_shape)
    with torch.no_grad():
        z = vae.encode(pixels * 2 - 1).latent_dist.mean
        torch.testing.assert_close(model.decode(latents), (vae.decode(z).sample / 2 + 0.5).clamp(0, 1))
    wanted = (z - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
    torch.testing.assert_close(latents, wanted)


@every_family
def test_the_tiny_models_listen_to_all_they_are_told(load: Any, name: str) -> None:
    """Or the comparisons of this file would be blind to it."""
    model = load(name)
    x, t, cond = inputs(model)
    told = {"t": t.flip(0)} | {part: tensor.flip(0) for part, tensor in cond.parts().items() if part != "mask"}
    if "frame" in told:
        told["frame"] = torch.tensor([[48.0, 64, 0, 5, 32, 32], [16, 16, 0, 0, 32, 32]])
    if name == "pixart-sigma":  # as the large ones, it is told no size
        del told["frame"]
    with torch.no_grad():
        plain = model.predict(x, t, cond)
        for part, other in told.items():
            changed = model.predict(x, other, cond) if part == "t" else model.predict(x, t, replace(cond, **{part: other}))
            assert (changed - plain).abs().mean() > 1e-3 * plain.abs().mean(), part


# --- times ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FLOW)
def test_flow_noise_is_the_schedulers(load: Any, name: str) -> None:
    """At the scheduler's own times our x_t is its ``scale_noise``."""
    model = load(name)
    scheduler = model.solver(4)
    x0, eps = torch.randn(2, 4, *model.latent_shape).unbind()
    t = scheduler.timesteps
    ours = add_noise(x0, eps, model.coeffs(t))
    torch.testing.assert_close(ours, scheduler.scale_noise(x0, t, eps))


def test_sd3_trains_at_shifted_times(load: Any) -> None:
    model = load("sd3")
    u = torch.arange(1, 1001) / 1000
    torch.testing.assert_close(model.timestep(u), model.scheduler.timesteps.flip(0))  # the scheduler's training times
    assert model.timestep(torch.tensor([0.0])).item() == 0
    assert model.timestep(torch.tensor([0.5])).item() == pytest.approx(750)  # 3 u / (1 + 2 u)


@pytest.mark.parametrize("side", [8, 64, 128])
def test_flux_dev_shifts_times_by_the_number_of_tokens(load: Any, side: int) -> None:
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    model = load("flux-dev")
    scheduler = copy.deepcopy(model.scheduler)
    u = torch.tensor([0.9, 0.5, 0.1])
    scheduler.set_timesteps(sigmas=u.tolist(), mu=calculate_shift((side // 2) ** 2))
    torch.testing.assert_close(model.timestep(u, (side, side)), scheduler.timesteps)


@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart-sigma"])
def test_noise_of_the_discrete_families_is_the_schedulers(load: Any, name: str) -> None:
    """DDPM's own, of the same configuration: Euler's and DPM's add_noise work in other units or after set_timesteps."""
    from diffusers import DDPMScheduler

    model = load(name)
    x0, eps = torch.randn(2, 4, *model.latent_shape).unbind()
    t = model.timestep(torch.tensor([0.0, 0.25, 0.75, 0.9999]))
    assert t.tolist() == [0, 250, 750, 999]
    stock = DDPMScheduler.from_config(model.scheduler.config)
    torch.testing.assert_close(add_noise(x0, eps, model.coeffs(t)), stock.add_noise(x0, eps, t), rtol=1e-4, atol=1e-5)


# --- training -------------------------------------------------------------------------------------------------------


@every_family
def test_gradients_reach_the_whole_adapter_and_nothing_else(load: Any, name: str) -> None:
    model = load(name)
    disturb(model)
    x, t, cond = inputs(model)
    out = model.predict(x, t, cond)
    assert out.shape == x.shape
    assert out.dtype == torch.float32
    out.square().mean().backward()
    trainable = model.named_weights.trainable()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trainable.values())
    modules = [m for m in model.pipeline.components.values() if isinstance(m, torch.nn.Module)]
    others = [p for m in modules for p in m.parameters() if not any(p is q for q in trainable.values())]
    assert others
    assert all(p.grad is None for p in others)


@pytest.mark.parametrize("lora", [RANK_2, None], ids=["lora", "full"])
@every_family
def test_the_reference_is_a_frozen_copy(load: Any, name: str, lora: LoRA | None) -> None:
    model, frozen = load(name, lora=lora), load(name, lora=None)
    x, t, cond = inputs(model)
    with torch.no_grad():
        before = frozen.predict(x, t, cond)
        assert torch.equal(model.predict(x, t, cond), before)
        disturb(model)
        after = model.predict(x, t, cond)
        assert not torch.allclose(after, before, atol=1e-3)
        with model.weights("reference"):
            assert torch.equal(model.predict(x, t, cond), before)
        assert torch.equal(model.predict(x, t, cond), after)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@every_family
def test_dpo_starts_at_ln_2(load: Any, pairs_csv: Path, tmp_path: Path, name: str, dtype: str) -> None:
    """In every precision of the frozen parts: margin exactly 0, a gradient, adapter and VAE in fp32."""
    model = load(name, dtype=dtype)
    assert next(iter(model.pipeline.text_encoder.parameters())).dtype == getattr(torch, dtype)
    assert {p.dtype for p in model.net.parameters() if not p.requires_grad} == {getattr(torch, dtype)}
    assert {p.dtype for p in model.named_weights.trainable().values()} == {torch.float32}
    assert {p.dtype for p in model.pipeline.vae.parameters()} == {torch.float32}
    feed = Offline(
        model, [of_pair(p) for p in read_pairs(pairs_csv, 2)], Uniform(), tmp_path, size=model.resolution, batch_size=2
    )
    (batch,) = feed.batches(0)
    terms = feed.terms(model, batch, BOTH)
    loss = Sigmoid(beta=5000)(terms, {}).loss
    assert loss.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-6)
    assert pair_metrics(terms)["margin"].tolist() == [0, 0]
    loss.mean().backward()
    grads = [p.grad for n, p in model.named_weights.trainable().items() if "lora_B" in n]
    assert all(g.isfinite().all() for g in grads)
    assert sum(g.abs().sum() for g in grads) > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@every_family
def test_half_precision_is_near_full_precision(load: Any, name: str, dtype: str) -> None:
    whole, half = load(name), load(name, dtype=dtype)
    x, t, cond = inputs(whole)
    t = torch.tensor([125, 250], dtype=t.dtype)  # bf16 holds them: FLUX's transformer rounds its times as its weights
    with torch.no_grad():
        want, got = whole.predict(x, t, cond), half.predict(x, t, half.encode_prompts(PROMPTS))
    assert got.dtype == torch.float32
    assert 0 < (got - want).abs().mean() < 0.03 * want.abs().mean()


def test_full_fine_tuning_keeps_fp32_weights_beside_half_encoders(load: Any) -> None:
    model = load("sd3", lora=None, dtype="bfloat16")
    assert {p.dtype for p in model.net.parameters()} == {torch.float32}
    assert {p.dtype for p in model.pipeline.text_encoder_3.parameters()} == {torch.bfloat16}
    assert model.predict(*inputs(model)).isfinite().all()


@every_family
def test_a_run_starts_at_ln_2_and_resumes_bit_for_bit(
    folder_of: Callable[[str], Path], pairs_csv: Path, tmp_path: Path, name: str
) -> None:
    args = (folder_of(name), name, pairs_csv)
    lines = run(*args, tmp_path / "whole", "train.max_steps=4")
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert lines[-1]["step"] == 4
    run(*args, tmp_path / "halves")
    run(*args, tmp_path / "halves", "train.max_steps=4", "resume_from=latest")
    whole, halves = (load_file(tmp_path / n / "checkpoint-4" / "weights.safetensors") for n in ("whole", "halves"))
    assert all(torch.equal(whole[k], halves[k]) for k in whole)
    assert any(w.any() for k, w in whole.items() if "lora_B" in k)


# --- text -----------------------------------------------------------------------------------------------------------

SCRIPTS = ["a red circle", "日本の赤い丸", "красный круг", "دائرة حمراء", "a 🙂 on a 🟥", "", "red " * 9]


@every_family
def test_prompts_of_any_length_and_script_batch_without_touching_each_other(load: Any, name: str) -> None:
    model = load(name)
    together = model.encode_prompts(SCRIPTS)
    assert len(together) == len(SCRIPTS)
    for i, text in enumerate(SCRIPTS):
        alone = model.encode_prompts([text])
        for part, tensor in alone.parts().items():
            torch.testing.assert_close(together.parts()[part][i : i + 1], tensor, msg=lambda m, t=text: f"{t}: {m}")
    x = torch.randn(len(SCRIPTS), *model.latent_shape)
    assert model.predict(x, model.timestep(torch.full((len(SCRIPTS),), 0.5)), together).isfinite().all()


@pytest.mark.parametrize(("name", "cut"), [("sd", 1), ("sdxl", 1), ("sd3-without-t5", 1), ("sd3", 0), ("pixart-sigma", 0)])
def test_cut_prompts_are_counted_where_nothing_reads_them_whole(load: Any, name: str, cut: int) -> None:
    assert load(name).truncated(["red", "red " * 30]) == cut


@pytest.mark.parametrize("name", T5)
def test_a_shorter_t5_is_the_stock_pipelines_at_that_length(load: Any, stock: Any, name: str) -> None:
    model, pipe = load(name, max_sequence_length=12), stock(name)
    arguments = {"do_classifier_free_guidance": False} if not name.startswith("flux") else {}
    if name.startswith("sd3"):
        arguments |= {"prompt_2": None, "prompt_3": None}
    stock_embeds = pipe.encode_prompt(PROMPTS, device=torch.device("cpu"), max_sequence_length=12, **arguments)[0]
    torch.testing.assert_close(model.encode_prompts(PROMPTS).embeds, stock_embeds)


def test_sd3_without_its_t5_takes_stock_zeros_if_asked(load: Any, stock: Any) -> None:
    """The images of the stock pipeline as it is called by default, with 256 zero tokens."""
    model, pipe = load("sd3-without-t5", max_sequence_length=256), stock("sd3-without-t5")
    theirs = pipe(PROMPTS, latents=our_latents(model), num_inference_steps=3, guidance_scale=1.0, output_type="pt").images
    assert torch.equal(our_images(model, 1.0), to_uint8(theirs))


def test_pixart_does_not_see_what_fills_up_its_prompt(load: Any) -> None:
    long, short = load("pixart-sigma", max_sequence_length=200), load("pixart-sigma", max_sequence_length=80)
    x, t, _ = inputs(long)
    with torch.no_grad():
        a, b = (m.predict(x, t, m.encode_prompts(PROMPTS)) for m in (long, short))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


LONG = "a red circle left of a blue square on a grey background , a green cross right of a pink circle on a navy background"


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_long_prompts_are_read_in_chunks(load: Any, stock: Any, name: str) -> None:
    """Each chunk is what the stock encoder makes of those words alone, and a prompt that fits is as ever."""
    model, pipe = load(name, long_prompts="chunk"), stock(name)
    words = LONG.split()
    assert len(words) == 25  # one token each, and 18 fit
    cond = model.encode_prompts([PROMPTS[0], LONG])
    assert model.truncated([PROMPTS[0], LONG]) == 0
    pieces = [PROMPTS[0], " ".join(words[:18]), " ".join(words[18:])]
    out = pipe.encode_prompt(pieces, device=torch.device("cpu"), num_images_per_prompt=1, do_classifier_free_guidance=False)
    torch.testing.assert_close(cond.embeds[0, :20], out[0][0])
    torch.testing.assert_close(cond.embeds[1], out[0][1:].flatten(0, 1))
    assert cond.mask.sum(1).tolist() == [20, 40]
    if name == "sdxl":
        torch.testing.assert_close(cond.pooled, out[2][:2])


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_short_prompt_does_not_notice_a_long_neighbour(load: Any, name: str) -> None:
    chunked, plain = load(name, long_prompts="chunk"), load(name)
    x, t, _ = inputs(plain)
    with torch.no_grad():
        alone = plain.predict(x, t, plain.encode_prompts([PROMPTS[0]] * 2), 2.0)
        beside = chunked.predict(x, t, chunked.encode_prompts([PROMPTS[0], LONG]), 2.0)
        cut = plain.predict(x, t, plain.encode_prompts([PROMPTS[0], LONG]), 2.0)
    torch.testing.assert_close(beside[0], alone[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(beside[1], cut[1], atol=1e-4)  # the rest of the long prompt is heard


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_long_and_short_prompts_train_together(load: Any, pairs_csv: Path, tmp_path: Path, name: str) -> None:
    lines = pairs_csv.read_text().splitlines()
    mixed = [lines[0], f'"{LONG}",0w.png,0l.png', lines[2]]
    csv = pairs_csv.parent / f"mixed-{name}.csv"
    csv.write_text("\n".join(mixed) + "\n")
    model = load(name, long_prompts="chunk")
    feed = Offline(model, [of_pair(p) for p in read_pairs(csv)], Uniform(), tmp_path, size=(32, 32), batch_size=2)
    (batch,) = feed.batches(0)
    assert sorted(batch.conds[0].mask.sum(1).tolist()) == [20, 40]
    assert pair_metrics(feed.terms(model, batch, BOTH))["margin"].tolist() == [0, 0]


def test_settings_of_text_that_do_not_apply_are_refused(load: Any) -> None:
    with pytest.raises(ModelError, match=r"model\.long_prompts does not apply to sd3"):
        load("sd3", long_prompts="chunk")
    with pytest.raises(ModelError, match=r"model\.max_sequence_length does not apply to sdxl"):
        load("sdxl", max_sequence_length=16)


# --- the picture's size ---------------------------------------------------------------------------------------------


def test_frames_say_how_a_picture_was_cut() -> None:
    wide, tall = Image.new("RGB", (100, 40)), Image.new("RGB", (30, 90))
    assert frame(wide, (20, 20)).tolist() == [40, 100, 0, 15, 20, 20]  # 50 x 20 once resized
    assert frame(tall, (30, 30)).tolist() == [90, 30, 30, 0, 30, 30]
    assert frame(Image.new("RGB", (32, 32)), (32, 32)).tolist() == [32, 32, 0, 0, 32, 32]


@pytest.mark.parametrize("name", ["sdxl", "pixart-alpha", "sd"])
def test_training_tells_the_size_of_each_picture(load: Any, tmp_path: Path, name: str) -> None:
    """Seen from outside: what the network is called with."""
    for file, size in (("w", (64, 48)), ("l", (16, 16))):
        Image.effect_noise(size, 80).convert("RGB").save(tmp_path / f"{file}.png")
    (tmp_path / "p.csv").write_text("prompt,chosen,rejected\na red circle,w.png,l.png\n")
    model = load(name)
    feed = Offline(
        model, [of_pair(p) for p in read_pairs(tmp_path / "p.csv")], Uniform(), tmp_path, size=model.resolution, batch_size=1
    )
    seen: list[dict[str, torch.Tensor]] = []
    model.net.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    (batch,) = feed.batches(0)
    feed.terms(model, batch, BOTH)
    for kwargs in seen:
        told = kwargs.get("added_cond_kwargs")
        if name == "sdxl":
            assert told["time_ids"].tolist() == [[48, 64, 0, 5, 32, 32], [16, 16, 0, 0, 32, 32]]
        elif name == "pixart-alpha":
            assert told["resolution"].tolist() == [[48, 64], [16, 16]]
            assert told["aspect_ratio"].tolist() == [[1], [1]]
        else:
            assert told is None
    assert len(seen) == 2


@pytest.mark.parametrize("name", ["sdxl", "pixart-alpha"])
def test_guidance_compares_prompts_at_the_same_size(load: Any, name: str) -> None:
    """The absent prompt is told the size that the prompt is told."""
    model = load(name)
    x, t, cond = inputs(model)
    frames = torch.tensor([[48.0, 64, 0, 5, 32, 32], [16, 16, 0, 0, 32, 32]])
    cond, none = model.sized(cond, frames), model.sized(model.encode_prompts([None, None]), frames)
    with torch.no_grad():
        low, high, native = model.predict(x, t, none), model.predict(x, t, cond), model.predict(*inputs(model))
        guided = model.predict(x, t, cond, 2.0)
    torch.testing.assert_close(guided, low + 2 * (high - low), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(high, native, atol=1e-4)


# --- around the model -----------------------------------------------------------------------------------------------


def test_what_is_cached_depends_on_how_text_is_read(load: Any) -> None:
    prints = [load("sd3", max_sequence_length=n).fingerprint() for n in (None, 256, 12)]
    assert prints[0] == prints[1] != prints[2]
    assert load("sd").fingerprint() != load("sd", long_prompts="chunk").fingerprint()


def test_weights_in_several_files_are_restored(load: Any, tmp_path: Path) -> None:
    """As diffusers saves what is above 10 GB."""
    model = load("sd3", lora=None)
    disturb(model)
    model.export(tmp_path)
    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    names = sorted(state)
    for i, part in enumerate((names[:9], names[9:])):
        save_file({k: state[k] for k in part}, file.with_name(f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors"))
    file.unlink()
    restored = load("sd3", lora=None)
    restored.restore(tmp_path)
    assert all(torch.equal(v, state[k]) for k, v in restored.net.state_dict().items())
    file.with_name("diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot load the trained weights"):
        restored.restore(tmp_path)


def test_families_are_listed_with_what_they_were_tested_with() -> None:
    result = CliRunner().invoke(main, ["list", "models"])
    lines = {line.split()[1].rstrip(":"): line for line in result.output.splitlines()}
    assert lines.keys() == models.FAMILIES.keys()
    built_in = {"StableDiffusionPipeline": "shapes-unet", "StableDiffusion3Pipeline": "shapes-dit"}
    for pipeline, line in lines.items():
        if pipeline in built_in:
            assert line.endswith(f"tested with trained weights: the built-in {built_in[pipeline]}")
        else:
            assert line.endswith("tested with tiny random weights of the stock classes")
        assert ("trains the unet" in line) == pipeline.startswith(("StableDiffusionP", "StableDiffusionXL"))
        assert ("flow" in line) == pipeline.startswith(("StableDiffusion3", "Flux"))


def test_the_card_says_how_the_adapter_loads(folder_of: Callable[[str], Path], pairs_csv: Path, tmp_path: Path) -> None:
    run(folder_of("pixart-sigma"), "pixart-sigma", pairs_csv, tmp_path / "run")
    write_report(tmp_path / "run")
    card = (tmp_path / "run" / "README.md").read_text()
    assert "PeftModel.from_pretrained(pipe.transformer" in card
    assert "load_lora_weights" not in card


# --- what cannot be done --------------------------------------------------------------------------------------------


def index(folder: Path, **entries: Any) -> Path:
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"} | entries))
    return folder


@pytest.mark.parametrize(
    "entries",
    [
        {"_class_name": "StableDiffusionXLImg2ImgPipeline"},
        {"requires_aesthetics_score": True, "text_encoder": ["transformers", "CLIPTextModel"]},
        {"text_encoder": [None, None]},
    ],
)
def test_the_refiner_is_refused(tmp_path: Path, entries: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"refiner.*train the base model"):
        load_model(index(tmp_path, **entries), ModelSpec(path="refiner"))


def test_distilled_guidance_takes_no_negative_prompt(load: Any) -> None:
    with pytest.raises(ModelError, match="takes no negative prompt"):
        our_images(load("flux-dev"), 2.5, ["a cross", None])


def test_a_scheduler_of_another_kind_is_refused(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    pipe = open_stock(folder_of("sd3"))
    pipe.scheduler = DDIMScheduler()
    pipe.save_pretrained(tmp_path / "sd3")
    with pytest.raises(ModelError, match="the scheduler DDIMScheduler is not supported"):
        load_model(tmp_path / "sd3", ModelSpec(path="x", lora=RANK_2))
    pipe = open_stock(folder_of("pixart-sigma"))
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    pipe.save_pretrained(tmp_path / "pixart")
    with pytest.raises(ModelError, match="the scheduler FlowMatchEulerDiscreteScheduler is not of noise"):
        load_model(tmp_path / "pixart", ModelSpec(path="x", lora=RANK_2))


@pytest.mark.parametrize("backend", ["xformers", "flash", "no-such-backend"])
@every_family
def test_attention_that_cannot_run_is_refused(load: Any, name: str, backend: str) -> None:
    if torch.cuda.is_available() and backend != "no-such-backend":
        pytest.skip("this machine may have it")
    with pytest.raises(ModelError, match=rf"model\.attention: {backend} cannot run here"):
        load(name, attention=backend)


@every_family
def test_native_attention_is_the_default(load: Any, name: str) -> None:
    x, t, cond = inputs(load(name))
    with torch.no_grad():
        assert torch.equal(load(name, attention="native").predict(x, t, cond), load(name).predict(x, t, cond))


def test_a_backend_is_used_by_its_own_model_alone(load: Any) -> None:
    from diffusers.models import attention_dispatch

    other = load("flux-dev")
    model = load("flux-dev", attention="_native_math")
    called: list[int] = []
    real = attention_dispatch._AttentionBackendRegistry._backends["_native_math"]
    attention_dispatch._AttentionBackendRegistry._backends["_native_math"] = lambda **k: called.append(1) or real(**k)
    try:
        x, t, cond = inputs(model)
        theirs = other.predict(x, t, cond)
        assert not called
        torch.testing.assert_close(model.predict(x, t, cond), theirs, rtol=1e-4, atol=1e-5)
        assert called
    finally:
        attention_dispatch._AttentionBackendRegistry._backends["_native_math"] = real
