"""Real data shapes, and what fits on one card: buckets, phases, quantisation, estimates, presets."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import SMALL_ROLLOUTS, SMALL_ROUNDS
from PIL import Image
from tiny_families import FAMILIES
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from diffalign.building import build_model
from diffalign.catalogue import catalogue, shipped_configs
from diffalign.cli import main
from diffalign.data.buckets import bucket_sizes, nearest
from diffalign.data.examples import of_pair
from diffalign.data.images import decode, dimensions, encode_png
from diffalign.data.pairs import Pair, Picture
from diffalign.errors import ConfigError, ModelError
from diffalign.estimate import (
    Estimator,
    blank_batch,
    measured_step,
    network_bytes,
    optimizer_bytes,
    parts_of,
    pictures_peak,
    sampling_peak,
    switches,
    tensors,
)
from diffalign.meter import Meter, size_of
from diffalign.models import LoRA, ModelSpec, pipeline
from diffalign.models.architectures import KNOWN, skeleton
from diffalign.models.quantize import quantized_bytes
from diffalign.objectives import pair_metrics
from diffalign.recipes import TrainConfig, train
from diffalign.sampling import Sampler, generate
from diffalign.seeds import generator_of
from diffalign.spec import load, validate, with_overrides
from diffalign.timesteps import Uniform
from diffalign.train.feeds import Offline
from diffalign.train.terms import Batch

ROOT = Path(__file__).parents[1]
BOTH = frozenset({"loser", "reference"})
T5 = [name for name in FAMILIES if name.startswith(("sd3", "flux", "pixart"))]
RANK_2 = LoRA(rank=2)

every_family = pytest.mark.parametrize("name", FAMILIES)


def spec_of(name: str, path: Path, **settings: Any) -> ModelSpec:
    short = {"max_sequence_length": 0 if name == "sd3-without-t5" else 16} if name in T5 else {}
    return ModelSpec(**{"path": str(path), "lora": RANK_2} | short | settings)


# --- buckets --------------------------------------------------------------------------------------------------------

# Podell et al. 2023, appendix I: (height, width) up to the square
SDXL_TABLE = [
    (512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664), (640, 1600), (640, 1536),
    (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280), (832, 1216), (832, 1152), (896, 1152), (896, 1088),
    (960, 1088), (960, 1024), (1024, 1024),
]  # fmt: skip


def test_buckets_are_those_of_sdxls_table_that_fit_the_area() -> None:
    sizes = bucket_sizes((1024, 1024), 64)
    assert set(sizes) <= {*SDXL_TABLE, *((w, h) for h, w in SDXL_TABLE)}
    assert all((w, h) in sizes for h, w in sizes)
    assert {w for h, w in sizes if w > h} == set(range(1088, 2049, 64))  # every length of the longer side


@pytest.mark.parametrize("side", [256, 512, 768, 1024])
def test_no_bucket_is_larger_than_the_native_size(side: int) -> None:
    sizes = bucket_sizes((side, side), 64)
    assert (side, side) in sizes
    assert all(h * w <= side * side and h % 64 == w % 64 == 0 and side // 2 <= min(h, w) for h, w in sizes)
    assert all(h * w > 0.7 * side * side for h, w in sizes) or side == 256


def test_the_nearest_bucket_is_by_ratio() -> None:
    sizes = bucket_sizes((1024, 1024), 64)
    assert nearest((300, 300), sizes) == (1024, 1024)
    assert nearest((1216, 832), sizes) == (1216, 832)
    assert nearest((10, 1000), sizes) == (512, 2048)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_header_tells_the_size_that_decoding_gives(tmp_path: Path, orientation: int) -> None:
    image = Image.new("RGB", (40, 24))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "x.jpg", exif=exif)
    decoded = decode(tmp_path / "x.jpg", "x")
    assert dimensions(tmp_path / "x.jpg", "x") == (decoded.height, decoded.width)


SHAPES = [(32, 32), (64, 16), (16, 64), (48, 30), (32, 33)]


@pytest.fixture(scope="session")
def shaped_pairs() -> list[Pair]:
    """23 pairs whose winners have five shapes and whose losers another one."""

    def picture(seed: int, size: tuple[int, int]) -> Picture:
        torch.manual_seed(seed)
        pixels = torch.randint(0, 256, (*size, 3), dtype=torch.uint8).numpy()
        return Picture(encode_png(Image.fromarray(pixels)), f"picture {seed}")

    return [Pair(f"picture {i}", picture(2 * i, SHAPES[i % 5]), picture(2 * i + 1, SHAPES[(i + 2) % 5])) for i in range(23)]


@pytest.fixture(scope="session")
def sdxl(folder_of: Any) -> Any:
    return build_model(spec_of("sdxl", folder_of("sdxl")))


@pytest.fixture
def feed(sdxl: Any, shaped_pairs: list[Pair], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Offline]:
    cache = tmp_path_factory.getbasetemp() / "bucket-cache"  # one for all, so that pictures are encoded once
    shared = {"size": (32, 32), "granularity": 8, "seed": 3}
    return lambda **more: Offline(sdxl, [of_pair(p) for p in shaped_pairs], Uniform(), cache, **{**shared, **more})


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("x0", "frames", "eps", "u"))


def test_both_members_of_a_pair_are_cut_to_the_winners_bucket(feed: Any, shaped_pairs: list[Pair]) -> None:
    source = feed(batch_size=2)
    assert source.sizes[:5] == [(32, 32), (64, 16), (16, 64), (40, 24), (32, 32)]
    for step in range(6):
        (batch,) = source.batches(step)
        height, width = (4 * side for side in batch.x0.shape[-2:])
        assert batch.x0.shape == batch.eps[:, :, 0].shape
        for frames in batch.frames.unbind(1):
            assert frames[:, 4:].tolist() == [[height, width]] * 2
        own = [list(s) for s in SHAPES if nearest(s, source.buckets) == (height, width)]
        assert all(f.tolist() in own for f in batch.frames[:, 0, :2])
    losers = {tuple(f) for s in range(6) for b in source.batches(s) for f in b.frames[:, 1, :2].tolist()}
    assert len(losers) > 2  # their own sizes are told, whatever they were cut to


def test_a_step_is_a_function_of_its_number(feed: Any) -> None:
    whole = feed(batch_size=2, accumulation=2)
    ordered = [list(whole.batches(step)) for step in range(30)]
    for step in (29, 3, 17):  # a fresh feed, in any order: nothing to resume
        again = list(feed(batch_size=2, accumulation=2).batches(step))
        assert all(same(a, b) for a, b in zip(ordered[step], again, strict=True))


def test_processes_and_accumulation_see_the_same_micro_batches(feed: Any) -> None:
    for step in (0, 11):
        one = list(feed(batch_size=2, accumulation=4).batches(step))
        ranks = [list(feed(batch_size=2, accumulation=2, rank=r, world=2).batches(step)) for r in (0, 1)]
        assert all(same(a, b) for a, b in zip(one, [ranks[0][0], ranks[1][0], ranks[0][1], ranks[1][1]], strict=True))


def test_every_pair_comes_up_equally_often(feed: Any, shaped_pairs: list[Pair]) -> None:
    """After as many micro-batches as there are pairs, each pair has been seen once for each place in a micro-batch."""
    source, seen = feed(batch_size=3), []
    source.batch = seen.extend
    for step in range(len(shaped_pairs)):
        list(source.batches(step))
    assert sorted(seen) == [(epoch, i) for epoch in range(3) for i in range(len(shaped_pairs))]


def test_held_out_pairs_are_seen_once_each_in_their_buckets(feed: Any, shaped_pairs: list[Pair]) -> None:
    source = feed(batch_size=4)
    batches = list(source.fixed())
    assert sum(map(len, batches)) == len(shaped_pairs)
    assert {tuple(4 * s for s in b.x0.shape[-2:]) for b in batches} == source.buckets.keys()


def test_without_buckets_the_stream_is_shuffled_epochs_cut_in_batches(feed: Any, shaped_pairs: list[Pair]) -> None:
    """As it was before there were buckets."""
    source, seen = feed(batch_size=4, granularity=None), []
    assert source.buckets == {(32, 32): len(shaped_pairs)}
    source.batch = seen.extend
    for step in range(12):
        list(source.batches(step))
    wanted = [
        (e, i) for e in range(3) for i in torch.randperm(len(shaped_pairs), generator=generator_of(3, "order", e)).tolist()
    ]
    assert seen == wanted[:48]


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux-dev", "pixart-sigma"])
def test_the_margin_is_0_at_any_shape(folder_of: Any, shaped_pairs: list[Pair], tmp_path: Path, name: str) -> None:
    model = build_model(spec_of(name, folder_of(name)))
    source = Offline(
        model, [of_pair(p) for p in shaped_pairs[:3]], Uniform(), tmp_path, size=(32, 32), granularity=8, batch_size=1
    )
    seen = []
    model.net.register_forward_pre_hook(lambda m, args, kw: seen.append(kw), with_kwargs=True)
    for step in range(3):
        (batch,) = source.batches(step)
        assert pair_metrics(source.terms(model, batch, BOTH))["margin"].tolist() == [0]
    shapes = [source.latents[z][source.keys[i][0]]["x0"].shape[-2:] for i, z in enumerate(source.sizes)]
    assert [tuple(s) for s in shapes] == [(8, 8), (16, 4), (4, 16)]
    if name == "sdxl":
        assert {tuple(k["added_cond_kwargs"]["time_ids"][0, 4:].tolist()) for k in seen} == {(32, 32), (64, 16), (16, 64)}


def test_flux_shifts_its_times_by_the_buckets_size(folder_of: Any) -> None:
    model, u = build_model(spec_of("flux-dev", folder_of("flux-dev"))), torch.tensor([0.5])
    assert model.timestep(u, (8, 8)) < model.timestep(u, (16, 16))
    assert model.timestep(u, (4, 16)).item() == model.timestep(u, (8, 8)).item()  # as many tokens


def small(overrides: list[str], *more: str) -> TrainConfig:
    base = {"objective": {"type": "sigmoid", "beta": 500}, "model": {"path": "below", "lora": {"rank": 2}}}
    return validate(TrainConfig, with_overrides(base, [*overrides, "evaluate.num_prompts=2", *more]))


def test_a_run_with_buckets_resumes_bit_for_bit(
    overrides: list[str], shaped_pairs: list[Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    monkeypatch.setattr(pipeline.PipelineModel, "granularity", 8)
    monkeypatch.setattr(Picture, "key", property(lambda self: self.where.replace(" ", "-")))
    common = ["evaluate.enabled=false", "data.buckets=true", "train.per_device_train_batch_size=2", "data.holdout=0.2"]

    def run(name: str, *more: str) -> None:
        train(small(overrides, *common, f"output_dir={tmp_path / name}", *more), shaped_pairs)

    run("whole", "train.max_steps=4")
    run("halves", "train.max_steps=2")
    run("halves", "train.max_steps=4", "resume_from=latest")
    a, b = (load_file(tmp_path / n / "checkpoint-4" / "weights.safetensors") for n in ("whole", "halves"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(w.any() for n, w in a.items() if "lora_B" in n)


# --- prompts --------------------------------------------------------------------------------------------------------


def test_cut_prompts_are_flagged_and_counted_in_every_run(
    overrides: list[str], shaped_pairs: list[Pair], caplog: pytest.LogCaptureFixture
) -> None:
    pairs = [*shaped_pairs[:4], *(replace(p, prompt="red " * 50 + p.prompt) for p in shaped_pairs[4:7]), shaped_pairs[7]]
    config = small(overrides, "evaluate.enabled=false", "train.max_steps=1")
    for again in ("first", "cached"):
        caplog.clear()
        run = train(config.model_copy(update={"output_dir": f"{config.output_dir}-{again}"}), pairs)
        assert run.metrics["truncated_prompts"] == 3
        assert "3 prompts are longer than the text encoder reads" in caplog.text


def test_negative_prompts_reach_the_evaluation(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from diffalign.train import evaluate

    asked: list[str | None] = []
    real = evaluate.generate

    def heard(model: Any, prompts: list[Any], *args: Any, **kwargs: Any) -> Any:
        asked.extend(p.negative for p in prompts)
        return real(model, prompts, *args, **kwargs)

    monkeypatch.setattr(evaluate, "generate", heard)
    train(small(overrides, "evaluate.negative_prompt=a green cross", "evaluate.sampling.guidance_scale=2"))
    assert asked == ["a green cross"] * 4  # two prompts, base and trained


def test_distilled_guidance_refuses_negative_prompts_before_training(folder_of: Any, overrides: list[str]) -> None:
    given = [o for o in overrides if not o.startswith("model.path")]
    given += [f"model.path={folder_of('flux-dev')}", "model.max_sequence_length=16", "evaluate.negative_prompt=blur"]
    config = small(given, "evaluate.sampling.guidance_scale=3.5")
    with pytest.raises(ConfigError, match=r"evaluate: .* takes no negative prompts"):
        train(config)
    assert not (Path(config.output_dir) / "metrics.jsonl").exists()


# --- phases ---------------------------------------------------------------------------------------------------------


def what_it_makes(model: Any) -> list[torch.Tensor]:
    from diffalign.data.prompts import Prompt

    pixels = torch.rand(2, 3, *model.resolution, generator=torch.Generator().manual_seed(0))
    cond = model.encode_prompts(["a red circle", None])
    images = generate(model, [Prompt("a cross")], Sampler(num_inference_steps=1, guidance_scale=2.0))
    return [model.encode_images(pixels), *cond.parts().values(), images]


@every_family
def test_what_leaves_in_training_comes_back_as_it_was(folder_of: Any, name: str) -> None:
    model = build_model(spec_of(name, folder_of(name), dtype="bfloat16"))
    before, key = what_it_makes(model), model.fingerprint()
    others = [m for m in model.pipeline.components.values() if isinstance(m, nn.Module) and m is not model.net]
    model.stage("train")
    assert all(t.is_meta for m in others for t in tensors(m))
    assert not any(t.is_meta for t in tensors(model.net))
    assert model.fingerprint() == key
    model.stage("sample")
    assert all(torch.equal(a, b) for a, b in zip(before, what_it_makes(model), strict=True))
    back = [m for m in model.pipeline.components.values() if isinstance(m, nn.Module) and m is not model.net]
    assert not any(p.requires_grad for m in back for p in m.parameters())


def test_training_holds_the_network_alone(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not while the data is encoded, nor while images are made between the steps and after them."""
    held: list[tuple[str, bool]] = []

    def spy(cls: Any, name: str, what: str) -> None:
        real = getattr(cls, name)

        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            model = args[0] if cls is Offline else self
            held.append((what, next(model.pipeline.vae.parameters()).is_meta))
            return real(self, *args, **kwargs)

        monkeypatch.setattr(cls, name, wrapped)

    spy(Offline, "terms", "step")
    spy(pipeline.PipelineModel, "decode", "image")
    more = ["train.metric_for_best=select/score", "train.eval_steps=1", "train.load_best=true", "data.holdout=0"]
    train(small(overrides, *more))
    assert [gone for what, gone in held if what == "step"] == [True] * 2
    assert {gone for what, gone in held if what == "image"} == {False}
    order = [what for what, _ in held]
    assert order.index("image") < len(order) - 1 - order[::-1].index("step")


def test_a_whole_pipeline_is_exported_with_what_had_left(overrides: list[str]) -> None:
    run = train(small(overrides, "model.lora=null", "evaluate.enabled=false"))
    again = build_model(ModelSpec(path=str(run.folder)))
    assert not any(t.is_meta for t in tensors(again.pipeline.vae))


def test_large_pictures_go_through_the_vae_one_by_one(sdxl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    together = sdxl.encode_images(pixels)
    images = sdxl.decode(together)
    assert not sdxl.pipeline.vae.use_slicing
    monkeypatch.setattr(pipeline, "LARGE", 32 * 32)
    seen: list[int] = []
    hook = sdxl.pipeline.vae.decoder.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
    torch.testing.assert_close(sdxl.encode_images(pixels), together)
    torch.testing.assert_close(sdxl.decode(together), images, rtol=1e-4, atol=1e-4)
    hook.remove()
    assert seen == [1, 1, 1]
    assert not sdxl.pipeline.vae.use_tiling
    sdxl.decode(torch.zeros(1, 4, 16, 16))
    assert sdxl.pipeline.vae.use_tiling
    monkeypatch.undo()
    assert torch.equal(sdxl.encode_images(pixels), together)


# --- quantisation ---------------------------------------------------------------------------------------------------


def test_quantised_weights_cannot_be_trained(overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"model: quantization int8 needs an adapter"):
        small(overrides, "model.quantization=int8", "model.lora=null")


@pytest.mark.parametrize(("name", "library"), [("int8", "torchao"), ("int4", "bitsandbytes")])
def test_a_missing_library_is_named(tiny: Path, name: str, library: str) -> None:
    if importlib.util.find_spec(library):
        pytest.skip(f"{library} is installed")
    with pytest.raises(ModelError, match=rf"model\.quantization: {name} needs {library}.*pip install {library}"):
        build_model(ModelSpec(path=str(tiny), lora=RANK_2, quantization=name))


def test_four_bits_without_cuda_are_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    monkeypatch.setattr("diffalign.models.quantize.find_spec", lambda name: name)
    with pytest.raises(ModelError, match=r"model\.quantization: int4 needs a CUDA device"):
        build_model(ModelSpec(path=str(tiny), lora=RANK_2, quantization="int4"))


def test_eight_bits_train(overrides: list[str], tiny: Path) -> None:
    pytest.importorskip("torchao")
    model = build_model(ModelSpec(path=str(tiny), lora=RANK_2, quantization="int8"))
    assert {p.dtype for p in model.named_weights.trainable().values()} == {torch.float32}
    train(small(overrides, "model.quantization=int8"))


def test_quantised_bytes() -> None:
    weight = torch.empty(96, 128, dtype=torch.bfloat16)
    assert quantized_bytes("int8", weight) == 96 * 128 + 96 * 2
    assert quantized_bytes("int4", weight) == 96 * 128 / 2 + 4 * 96 * 128 / 64


# --- the meter ------------------------------------------------------------------------------------------------------


def test_operations_of_known_layers() -> None:
    with Meter() as linear:
        nn.Linear(24, 40)(torch.ones(7, 24))
    assert linear.flops == 2 * 7 * 24 * 40
    with Meter() as conv:
        nn.Conv2d(3, 5, 3, padding=1)(torch.ones(2, 3, 8, 8))
    assert conv.flops == 2 * (2 * 8 * 8) * 5 * (3 * 3 * 3)


def test_bytes_live_until_they_are_freed() -> None:
    given = torch.ones(256)
    with Meter() as meter:
        a = given + 1
        view = a.view(16, 16)
        assert meter.live == 1024
        b = a * 2
        assert meter.live == 2048
        del b
        given.add_(1)
        assert (meter.live, meter.peak) == (1024, 2048)
        del a
        assert meter.live == 1024  # the view holds it
        del view
        assert meter.live == 0


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_what_lives_after_the_forward_pass_is_what_autograd_saved(folder_of: Any, overrides: list[str], name: str) -> None:
    """An independent count, by the hooks that see every tensor as it is saved."""
    model = build_model(spec_of(name, folder_of(name)))
    config = small(overrides)
    batch = blank_batch(model, 2, model.resolution, model.encode_prompts([""] * 2))
    given = [x for x in vars(batch).values() if isinstance(x, torch.Tensor)]
    outside = {
        id(t.untyped_storage()) for t in [*tensors(model.net), *given, *batch.conds[0].parts().values(), *batch.facts.values()]
    }
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in outside:
            saved[id(storage)] = storage
        return tensor

    from diffalign.train.terms import terms_of

    with (
        Meter() as meter,
        FlopCounterMode(display=False) as counted,
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
    ):
        terms = terms_of(model, batch, config.timesteps, BOTH)
    for result in vars(terms).values():
        if isinstance(result, torch.Tensor):
            pack(result)
    assert meter.live == sum(storage.nbytes() for storage in saved.values()) > 10_000
    assert meter.flops == counted.get_total_flops()


# --- estimates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@every_family
def test_parameters_and_bytes_are_those_of_the_real_model(folder_of: Any, name: str, dtype: str) -> None:
    spec = spec_of(name, folder_of(name), dtype=dtype)
    real, empty = build_model(spec), skeleton(*parts_of(spec.path), spec)
    for part, module in real.pipeline.components.items():
        if isinstance(module, nn.Module):
            theirs = {n: (t.shape, t.dtype) for n, t in module.state_dict().items()}
            assert {n: (t.shape, t.dtype) for n, t in getattr(empty.pipeline, part).state_dict().items()} == theirs
            assert all(t.is_meta for t in tensors(getattr(empty.pipeline, part)))
    frozen = [t for t in tensors(real.net) if not t.requires_grad]
    assert network_bytes(empty, "none") == size_of(frozen)
    assert (empty.latent_shape, empty.resolution, empty.kind) == (real.latent_shape, real.resolution, real.kind)


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["model.gradient_checkpointing=true"],
        ["model.gradient_checkpointing=true", "train.mixed_precision=bf16"],
        ["train.mixed_precision=bf16", "model.dtype=bfloat16"],
        ["model.lora=null", "train.gradient_accumulation_steps=2", "objective={type: sft}"],
        ["model.lora.text_encoders=true", "model.dtype=bfloat16"],
    ],
    ids=["plain", "checkpointing", "checkpointing-half", "half", "full", "texts"],
)
@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux-dev", "pixart-sigma"])
def test_the_estimate_is_what_the_real_model_takes(folder_of: Any, overrides: list[str], name: str, more: list[str]) -> None:
    """The same count on real tensors on the CPU, to the byte."""
    if "model.lora.text_encoders=true" in more and name not in ("sd", "sdxl"):
        pytest.skip("its text encoders are not adapted")
    given = spec_of(name, folder_of(name)).model_dump(mode="json")
    config = validate(TrainConfig, with_overrides({"objective": {"type": "sigmoid"}, "model": given}, [*overrides[1:], *more]))
    model = build_model(config.model)
    size = model.resolution
    real = measured_step(model, config, size)
    found = Estimator(config.model.path)(config)
    gradients = size_of(model.named_weights.trainable().values())
    part = found.phases["train"]
    frozen = [t for n in model.encoders for t in tensors(getattr(model.pipeline, n)) if not t.requires_grad]
    assert part.get("text encoders", 0) == (size_of(frozen) if model.trains_texts else 0)
    assert ("texts" in found.phases) == (not model.trains_texts)
    work = real.peak - (gradients if config.train.gradient_accumulation_steps == 1 else 0)
    assert part["activations"] == max(work, gradients)
    assert found.flops == real.flops * config.train.gradient_accumulation_steps
    model.net.zero_grad()
    assert found.phases["pictures"]["activations"] == pictures_peak(model, size)
    assert found.phases["sample"]["activations"] == sampling_peak(model, 6, config.evaluate.sampling.guidance_scale)


# published counts of the parameters, of the network and of all frozen parts
PUBLISHED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (859_520_964, [83_653_863, 123_060_480]),
    "stabilityai/stable-diffusion-xl-base-1.0": (2_567_463_684, [83_653_863, 123_060_480, 694_659_840]),
    "stabilityai/stable-diffusion-3.5-medium": (2_243_171_520, [83_819_683, 123_650_304, 694_659_840, 4_762_310_656]),
    "black-forest-labs/FLUX.1-dev": (11_901_408_320, [83_819_683, 123_060_480, 4_762_310_656]),
}


@pytest.mark.parametrize("path", KNOWN)
def test_known_models_have_their_published_parameters(path: str) -> None:
    model: Any = skeleton(*KNOWN[path], ModelSpec(path=path, lora=RANK_2, dtype="bfloat16"))
    net, others = PUBLISHED[path]
    assert sum(p.numel() for p in model.net.parameters() if not p.requires_grad) == net
    modules = [model.pipeline.vae, *(getattr(model.pipeline, n) for n in model.encoders)]
    assert [sum(p.numel() for p in m.parameters()) for m in modules] == others


def test_bytes_of_adam() -> None:
    p = [torch.empty(4096), torch.empty(100)]
    assert optimizer_bytes(p, "adamw") == 8 * 4196
    assert optimizer_bytes(p, "adamw_8bit") == 2 * 4096 + 2 * 4 * 16 + 8 * 100


def test_every_switch_does_what_it_is_for(folder_of: Any, overrides: list[str]) -> None:
    estimator = Estimator(str(folder_of("sd3")))
    given = [*overrides, f"model.path={folder_of('sd3')}", "model.max_sequence_length=16"]
    at = lambda *more: estimator(small(given, *more))  # noqa: E731
    base = at()
    train_sum = lambda e: sum(e.phases["train"].values())  # noqa: E731
    more_rows = at("train.per_device_train_batch_size=8")
    assert more_rows.phases["train"]["activations"] > 1.9 * base.phases["train"]["activations"]
    assert more_rows.flops == 2 * base.flops
    assert at("train.gradient_accumulation_steps=3").flops == 3 * base.flops
    checkpointed = at("model.gradient_checkpointing=true")
    assert checkpointed.phases["train"]["activations"] < base.phases["train"]["activations"]
    assert checkpointed.flops > base.flops
    frozen = [at(f"model.quantization={q}").phases["train"]["frozen network"] for q in ("none", "int8", "int4")]
    assert frozen == sorted(frozen, reverse=True)
    assert len(set(frozen)) == 3
    assert train_sum(at("model.dtype=bfloat16")) < train_sum(base)
    assert train_sum(at("train.optimizer=adamw_8bit")) <= train_sum(base)
    full = at("model.lora=null")
    assert full.trainable == sum(p.numel() for p in build_model(ModelSpec(path=str(folder_of("sd3")))).net.parameters())
    assert full.phases["train"]["copies of them"] == 4 * full.trainable == full.phases["train"]["gradients"]
    assert at("train.ema_decay=0.9").phases["train"]["copies of them"] == 4 * base.trainable
    assert at("objective={type: sft}").flops < base.flops  # winners alone, and no reference
    assert "sample" not in at("evaluate.enabled=false").phases

    many = "train.per_device_train_batch_size=64"  # or the pictures would take most
    config = small(given, many)
    overrides_, best = estimator.best_switch(config) or ([], base)
    totals = [at(many, *o).total for o in switches(config)]
    assert best.total == min(totals) < at(many).total
    assert at(many, *overrides_).total == best.total


@pytest.mark.slow
def test_the_command_tells(tiny: Path, overrides: list[str]) -> None:
    args = ["estimate", str(ROOT / "configs/shapes-dpo.yaml"), *overrides]
    done = CliRunner().invoke(main, args)
    assert done.exit_code == 0, done.output
    assert re.search(r"^sum( +\d+\.\d\d){4}$", done.output, re.M)
    assert re.search(r"^helps most: \w+\.", done.output, re.M)
    result = json.loads(CliRunner().invoke(main, [*args, "--json"]).output)
    assert result["total"] == max(sum(p.values()) for p in result["phases"].values())
    assert result["helps_most"]["total"] < result["total"]


def test_measuring_needs_a_device(overrides: list[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    done = CliRunner().invoke(main, ["estimate", str(ROOT / "configs/shapes-dpo.yaml"), *overrides, "--measure"])
    assert done.exit_code == 2
    assert "--measure needs a CUDA device" in done.output


@pytest.mark.gpu
def test_the_estimate_is_near_what_a_card_takes(overrides: list[str]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    path = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    config = small(overrides, f"model.path={path}", "model.dtype=bfloat16")
    from diffalign.estimate import estimate

    result = estimate(config, measure=True)
    assert result["measured_train"] == pytest.approx(sum(result["phases"]["train"].values()), rel=0.2)


# --- shipped configurations -----------------------------------------------------------------------------------------

STAND_INS = {**dict(zip(KNOWN, ["sd", "sdxl", "sd3", "flux-dev"], strict=True)), "shapes-dit": "sd3"}  # rules know their path


@pytest.mark.parametrize("name", [n for n in sorted(shipped_configs()) if "presets/" not in n or "/memory/" in n])
def test_every_shipped_configuration_trains_two_steps(name: str, folder_of: Any, overrides: list[str]) -> None:
    """On a tiny model of its family; what needs a library or a device that is not here is switched off."""
    config = load(TrainConfig, shipped_configs()[name])
    given = [o for o in overrides if config.evaluate.enabled or not o.startswith("evaluate.")]
    samples = config.direct is not None or config.online is not None
    given = [o for o in given if not (samples and o.startswith("data."))]
    given += ["evaluate.prompts=shapes:test", "evaluate.scorers=[shapes]", "train.gradient_accumulation_steps=1"]
    if config.model.path in STAND_INS:
        family = STAND_INS[config.model.path]
        given += [f"model.path={folder_of(family)}"] + ([] if samples else ["data.resolution=null"])
        given += ["model.max_sequence_length=16"] if family in T5 else []
    given += ["model.quantization=none", "train.optimizer=adamw", "train.per_device_train_batch_size=1"]
    given += SMALL_ROUNDS if config.rounds is not None else []
    given += SMALL_ROLLOUTS if config.online is not None else []
    steps = train(load(TrainConfig, shipped_configs()[name], given)).metrics["steps"]
    assert steps == 2 * (config.rounds.count if config.rounds is not None else 1)


MEMORY = [name for name in shipped_configs() if name.startswith("presets/memory/")]


@pytest.fixture(scope="session")
def estimator_of() -> Callable[[str], Estimator]:
    return cache(Estimator)


@pytest.mark.parametrize("name", [n if "sd15" in n else pytest.param(n, marks=pytest.mark.slow) for n in MEMORY])
def test_presets_fit_their_cards_by_the_estimate_that_they_state(name: str, estimator_of: Any) -> None:
    path = shipped_configs()[name]
    stated = re.fullmatch(r"# .+, (\d+) GB: ([\d.]+) GiB by `diffalign estimate`", path.read_text().splitlines()[0])
    assert stated is not None
    assert name.endswith(f"-{stated[1]}gb")
    config = load(TrainConfig, path)
    peak = estimator_of(config.model.path)(config).total / 2**30
    assert float(stated[2]) == pytest.approx(peak, abs=0.06)
    assert peak <= 0.9 * int(stated[1])


@pytest.mark.parametrize("section", ["direct={}", "online={}"])
def test_runs_that_sample_are_not_estimated(section: str) -> None:
    objective = "draft" if section.startswith("direct") else "ppo"
    done = CliRunner().invoke(main, ["estimate", section, f"objective.type={objective}", "output_dir=x"])
    assert done.exit_code == 2
    assert "stored examples" in done.output


def test_launch_files_are_no_presets_and_accelerate_reads_them() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    listed = {name for name, _ in catalogue("presets")}
    assert set(MEMORY) <= listed
    assert not any(name.startswith("accelerate") for name in listed)
    files = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
    assert files
    for file in files:
        config = load_config_from_file(str(file))
        assert config.distributed_type == "MULTI_GPU"
        assert config.mixed_precision == "no"  # the training configuration decides


# --- the benchmark --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def gpu() -> Any:
    source = importlib.util.spec_from_file_location("gpu", ROOT / "benchmarks" / "gpu.py")
    module = sys.modules["gpu"] = importlib.util.module_from_spec(source)  # type: ignore[arg-type]
    source.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def test_the_benchmark_measures_a_tiny_model_on_the_cpu(gpu: Any, folder_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KNOWN, "tiny", parts_of(str(folder_of("sd3"))))
    row = gpu.measure(gpu.Case("tiny", "tiny", 2), "cpu", steps=2)
    assert row["pairs_per_second"] > 0
    assert row["estimated_gib"] > 0
    assert set(row["shares"]) == {"encode", "reference", "policy forward", "backward", "optimizer"}
    assert sum(row["shares"].values()) == pytest.approx(1)
    table = gpu.table([row], "a device", "2026-01-01")
    assert "| tiny |" in table
    assert "a device" in table


def test_the_benchmark_needs_a_device(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert gpu.main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
