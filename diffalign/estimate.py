"""What a training run will take, from shapes alone: memory of the device by phase, and floating-point operations."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.data.cache import BATCH
from diffalign.errors import ConfigError
from diffalign.hub import resolve
from diffalign.meter import Meter, cuda_precision, size_of
from diffalign.models import Cond, Model, Phase
from diffalign.models.architectures import KNOWN, Parts, read_parts, skeleton
from diffalign.models.quantize import quantized_bytes
from diffalign.objectives import Data
from diffalign.recipes import TrainConfig
from diffalign.rounds import round_config
from diffalign.scoring import quiet
from diffalign.spec import validate, with_overrides
from diffalign.train.feeds import pictures_at_once
from diffalign.train.state import make_optimizer
from diffalign.train.terms import Batch, terms_of


@dataclass(frozen=True)
class Estimate:
    """Bytes by phase and part, and the operations of one optimizer step on one device."""

    phases: dict[Phase, dict[str, int]]
    flops: int
    trainable: int
    """Parameters that are trained."""

    @property
    def total(self) -> int:
        """Bytes at the highest point of the run."""
        return max(sum(parts.values()) for parts in self.phases.values())


class Estimator:
    """Estimates of one model under several configurations. A phase that a change does not touch is not computed again.

    Not counted: the CUDA context, what kernels take while they run (cuDNN's and the optimizer's work is), what the
    allocator cannot use, other processes' copies in DDP.
    """

    def __init__(self, path: str, revision: str | None = None) -> None:
        quiet()
        self.pipeline, self.parts = parts_of(path, revision)
        self._memo: dict[str, Any] = {}

    def __call__(self, config: TrainConfig) -> Estimate:
        s, spec = config.train, config.model
        bare = spec.model_copy(update={"quantization": "none", "path": "", "attention": None})
        model = self._once(lambda: skeleton(self.pipeline, self.parts, bare), bare)
        size = (config.data.resolution,) * 2 if config.data.resolution else model.resolution

        def on_fake(work: Callable[[Model], Any], *key: object) -> Any:
            def run() -> Any:
                mode, fake = self._once(lambda: _fake_weights(skeleton(self.pipeline, self.parts, bare)), "fake", bare)
                with mode:
                    return work(fake)

            return self._once(run, bare, size, *key)

        trainable = model.named_weights.trainable()
        frozen = network_bytes(model, spec.quantization)
        weights = size_of(trainable.values())
        reference = config.reference if config.rounds is None else round_config(config, config.rounds.count).reference
        lagged = config.coupling.noise == "replay" and config.coupling.replay_every > 1
        copies = len(model.named_weights.snapshots) + (s.ema_decay > 0) + s.load_best + reference.copies + lagged
        adam = optimizer_bytes(trainable.values(), s.optimizer)
        vae, *encoders = (size_of(t for t in tensors(m) if not t.requires_grad) for m in encoders_of(model))
        step: Meter = on_fake(
            lambda m: measured_step(m, config, size),
            "train", config.total, config.coupling, config.timesteps, s.per_device_train_batch_size,
            s.gradient_accumulation_steps > 1, s.mixed_precision,
        )  # fmt: skip
        work = step.peak - (weights if s.gradient_accumulation_steps == 1 else 0)
        if s.optimizer == "adamw":
            work = max(work, weights)  # PyTorch's default on CUDA updates all tensors at once, through a copy of them
        net = {"frozen network": frozen, "trained weights": weights, "copies of them": copies * weights, "optimizer": adam}
        texts = {"text encoders": sum(encoders)}
        phases: dict[Phase, dict[str, int]] = {
            "pictures": {"VAE": vae, "activations": on_fake(lambda m: pictures_peak(m, size), "pictures")},
            "texts": texts | {"activations": on_fake(texts_peak, "texts")},
            "train": net | {"gradients": weights, "activations": work},
        }
        if model.trains_texts:  # they stay, and nothing is encoded before
            phases["train"] |= texts
            del phases["texts"]
        asked = [(e.sampling, e.num_prompts * e.images_per_prompt, net)] if (e := config.evaluate).enabled else []
        if config.rounds is not None:  # images of a round are made before anything of training is there
            alone = {"frozen network": frozen, "trained weights": weights}
            asked.append((config.rounds.sampling, config.rounds.sampling.batch_size, alone))
        for sampling, images, there in asked:
            rows = min(sampling.batch_size, images)
            peak = on_fake(partial(sampling_peak, rows=rows, guidance=sampling.guidance_scale), "sample", rows, sampling)
            found = there | {"VAE": vae, "activations": peak} | texts
            if sum(found.values()) > sum(phases.get("sample", {}).values()):
                phases["sample"] = found
        flops = step.flops * s.gradient_accumulation_steps
        return Estimate(phases, flops, sum(p.numel() for p in trainable.values()))

    def _once(self, make: Callable[[], Any], *key: object) -> Any:
        name = repr(key)
        if name not in self._memo:
            self._memo[name] = make()
        return self._memo[name]

    def best_switch(self, config: TrainConfig) -> tuple[list[str], Estimate] | None:
        """The one change among :func:`switches` that lowers the total most, if any does."""
        plain = config.model_dump(mode="json")
        tried = [(o, self(validate(TrainConfig, with_overrides(plain, o)))) for o in switches(config)]
        best = min(tried, key=lambda t: t[1].total, default=None)
        return best if best and best[1].total < self(config).total else None


def switches(config: TrainConfig) -> list[list[str]]:
    """Overrides that may save memory, each of them one decision that this configuration has not taken."""
    m, s, e = config.model, config.train, config.evaluate
    rows, accumulation = s.per_device_train_batch_size, s.gradient_accumulation_steps
    halves = [
        f"train.per_device_train_batch_size={rows // 2}",
        f"train.gradient_accumulation_steps={accumulation * rows // (rows // 2 or 1)}",
    ]
    wanted = {
        "model.lora={rank: 16}": m.lora is None,
        "model.gradient_checkpointing=true": not m.gradient_checkpointing,
        "model.lora.text_encoders=false": m.lora is not None and m.lora.text_encoders,
        "model.dtype=bfloat16": m.dtype == "float32",
        "train.mixed_precision=bf16": s.mixed_precision == "no",
        "train.optimizer=adamw_8bit": s.optimizer == "adamw",
        "model.quantization=int8": m.lora is not None and m.quantization == "none",
        "model.quantization=int4": m.lora is not None and m.quantization != "int4",
        "evaluate.sampling.batch_size=1": e.enabled and e.sampling.batch_size > 1,
    }
    return [[one] for one, possible in wanted.items() if possible] + ([halves] if rows > 1 else [])


def parts_of(path: str, revision: str | None = None) -> tuple[str, Parts]:
    """The pipeline class and configurations of a folder, or of a large model that is known here by its hub id."""
    return KNOWN[path] if path in KNOWN and not Path(path).exists() else read_parts(resolve(path, revision))


def encoders_of(model: Any) -> list[nn.Module]:
    """The VAE, and the text encoders."""
    return [m for name in ("vae", *model.encoders) if (m := getattr(model.pipeline, name)) is not None]


def tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return [*module.parameters(), *module.buffers()]


def network_bytes(model: Model, quantization: str) -> int:
    """Bytes of the network's weights that are not trained; the weights of its linear layers as they are quantised."""
    net = model.named_weights.net
    frozen = [t for t in tensors(net) if not t.requires_grad]
    total: float = size_of(frozen)
    if quantization != "none":
        for module in net.modules():
            if isinstance(module, nn.Linear) and not (w := module.weight).requires_grad:
                total += quantized_bytes(quantization, w) - size_of([w])
    return int(total)


def optimizer_bytes(parameters: Iterable[Tensor], name: str) -> int:
    """Both moments of Adam. bitsandbytes leaves tensors below 4096 in fp32 and scales each 256 values of the others."""
    if name == "adamw":
        return sum(8 * p.numel() for p in parameters)
    return sum(8 * n if (n := p.numel()) < 4096 else 2 * (n + 4 * -(-n // 256)) for p in parameters)


def _fake_weights(model: Any) -> tuple[Any, Model]:
    """The model on CPU tensors that know their shape and hold nothing, and the mode in which such tensors are made."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    empty: Callable[[Tensor], Tensor] = lambda t: torch.empty(t.shape, dtype=t.dtype, device="cpu")  # noqa: E731
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for module in [m for m in model.pipeline.components.values() if isinstance(m, nn.Module)]:
            module._apply(empty)  # type: ignore[no-untyped-call]
        for snapshot in model.named_weights.snapshots.values():
            snapshot.update({name: empty(t) for name, t in snapshot.items()})
        return mode, model.to(torch.device("cpu"))


def blank_batch(
    model: Model,
    rows: int,
    size: tuple[int, int],
    cond: Cond | tuple[str, ...],
    data: Data = "pairs",
    pictures: int = 2,
    draws: int = 1,
) -> Batch:
    """Examples that show nothing, of pictures of ``size`` pixels."""
    channels, height, width = model.latent_shape
    shape = (channels, height * size[0] // model.resolution[0], width * size[1] // model.resolution[1])
    x0, eps = torch.zeros(rows, pictures, *shape), torch.ones(rows, pictures, draws, *shape)
    frames = torch.tensor([*size, 0, 0, *size], dtype=torch.float32).repeat(rows, pictures, 1)
    facts = {"p_win": torch.ones(rows), "good": torch.arange(rows) % 2 == 0, "scores": torch.rand(rows, pictures)}
    return Batch(x0, frames, eps, torch.full((rows, pictures, draws), 0.5), (cond,), torch.ones(rows), data, facts)


def batch_of(model: Model, config: TrainConfig, size: tuple[int, int]) -> Batch:
    """A micro-batch of the kind that the configuration trains on."""
    rows, data = config.train.per_device_train_batch_size, config.total.data
    pictures = {"pairs": 1 if config.coupling.noise == "replay" else 2, "labels": 1, "groups": config.data.group_size}[data]
    return blank_batch(model, rows, size, blank_texts(model, rows), data, pictures, config.coupling.draws)


def blank_texts(model: Model, rows: int) -> Cond | tuple[str, ...]:
    """Empty prompts, encoded if training encodes them before."""
    return ("",) * rows if model.trains_texts else model.encode_prompts([""] * rows)


def forward_backward(model: Model, config: TrainConfig, batch: Batch, device: str = "cpu") -> None:
    """A micro-batch as the loop takes it."""
    precision = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.train.mixed_precision]
    objective = config.total
    with torch.autocast(device, precision or torch.bfloat16, enabled=precision is not None):
        terms = terms_of(model, batch, config.timesteps, objective.needs, config.coupling)
    objective(terms, {}).loss.mean().backward()  # type: ignore[no-untyped-call]


def measured_step(model: Model, config: TrainConfig, size: tuple[int, int]) -> Meter:
    """What a micro-batch takes. Gradients count where this is the first and only one of its step."""
    batch = batch_of(model, config, size)
    for p in model.named_weights.trainable().values():
        p.grad = torch.zeros_like(p) if config.train.gradient_accumulation_steps > 1 else None
    model.net.train()
    with Meter() as meter, cuda_precision():
        forward_backward(model, config, batch)
    return meter


def pictures_peak(model: Model, size: tuple[int, int]) -> int:
    """Bytes at the highest point of encoding the data's pictures."""
    pixels = torch.zeros(pictures_at_once(size), 3, *size)
    with Meter() as meter:
        model.encode_images(pixels)
    return meter.peak + size_of([pixels])


def texts_peak(model: Model) -> int:
    """Bytes at the highest point of encoding the data's prompts."""
    with Meter() as meter:
        model.encode_prompts([""] * BATCH)
    return meter.peak


@torch.no_grad()
def sampling_peak(model: Model, rows: int, guidance: float) -> int:
    """Bytes at the highest point of making ``rows`` images at once."""
    model.stage("sample")  # forgets the empty prompt
    x, u = torch.zeros(rows, *model.latent_shape), torch.full((rows,), 0.5)
    with Meter() as meter:
        cond = model.encode_prompts([""] * rows)
        model.predict(x, model.timestep(u), cond, guidance)
        model.decode(x)
    return meter.peak


def measured_on_cuda(config: TrainConfig) -> int:
    """Bytes that PyTorch has allocated at the highest point of two real steps, with the folder's weights or random ones.

    Raises:
        ConfigError: there is no CUDA device, or there are no weights to quantise.
    """
    if not torch.cuda.is_available():
        raise ConfigError("--measure needs a CUDA device", hint="without it, the estimate needs none")
    from diffalign.building import build_model

    spec, device = config.model, torch.device("cuda")
    if spec.path in KNOWN and not Path(spec.path).exists():
        if spec.quantization != "none":
            raise ConfigError("--measure: random weights are not quantised", hint="give the folder of the model")
        model = skeleton(*KNOWN[spec.path], spec, "cuda")
    else:
        model = build_model(spec)
    model.stage("texts", device)
    size = (config.data.resolution,) * 2 if config.data.resolution else model.resolution
    batch = batch_of(model, config, size)
    model.stage("train")
    model.net.train()
    optimizer = make_optimizer(list(model.named_weights.trainable().values()), config.train)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):  # the optimizer's state is there from the second on
        for _ in range(config.train.gradient_accumulation_steps):
            forward_backward(model, config, batch, "cuda")
        optimizer.step()
        optimizer.zero_grad()
    return torch.cuda.max_memory_allocated()


def summary(estimate: Estimate, switch: tuple[list[str], Estimate] | None, measured: int | None = None) -> dict[str, Any]:
    """What ``--json`` prints: bytes, and the change that helps most."""
    out: dict[str, Any] = {
        "total": estimate.total,
        "phases": estimate.phases,
        "flops_per_step": estimate.flops,
        "trainable_parameters": estimate.trainable,
        "helps_most": switch and {"overrides": switch[0], "total": switch[1].total},
    }
    return out if measured is None else out | {"measured_train": measured}


def estimate(config: TrainConfig, measure: bool = False) -> dict[str, Any]:
    """The whole of ``diffalign estimate``; see :func:`summary`.

    Raises:
        ConfigError: the run samples its own images, of which nothing is known here.
    """
    if config.online is not None or config.direct is not None:
        raise ConfigError(
            "estimate counts training on stored examples alone", hint="run train.max_steps=2, which logs its peak"
        )
    estimator = Estimator(config.model.path, config.model.revision)
    measured = measured_on_cuda(config) if measure else None
    return summary(estimator(config), estimator.best_switch(config), measured)


def lines(result: dict[str, Any]) -> list[str]:
    """The table for people, in GiB."""
    parts = list(dict.fromkeys(name for phase in result["phases"].values() for name in phase))
    width = max(map(len, parts))
    out = [f"{'GiB':<{width}}" + "".join(f"{phase:>10}" for phase in result["phases"])]
    for name in parts:
        out.append(f"{name:<{width}}" + "".join(_gib(p[name]) if name in p else " " * 10 for p in result["phases"].values()))
    out.append(f"{'sum':<{width}}" + "".join(_gib(sum(p.values())) for p in result["phases"].values()))
    out.append(f"peak: {result['total'] / 2**30:.2f} GiB; leave a tenth of the card free for what is not counted")
    if "measured_train" in result:
        estimated, measured = sum(result["phases"]["train"].values()), result["measured_train"]
        out.append(f"measured in training: {measured / 2**30:.2f} GiB, {measured / estimated:.2f} of the estimate")
    flops, trainable = result["flops_per_step"] / 1e12, result["trainable_parameters"] / 1e6
    out.append(f"{flops:.4g} TFLOP an optimizer step; {trainable:.4g} million trained parameters")
    if helps := result["helps_most"]:
        out.append(f"helps most: {' '.join(helps['overrides'])} ({helps['total'] / 2**30:.2f} GiB)")
    return out


def _gib(size: int) -> str:
    return f"{size / 2**30:10.2f}"
