"""Training from Python, in the shape that users of TRL know. Thin: a config, and the same run as ``diffalign train``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from diffalign.building import ready_model
from diffalign.evaluation import EvaluateSpec
from diffalign.models import LoRA, ModelSpec
from diffalign.objectives import SFT, MaPO, Objective, Sigmoid
from diffalign.objectives.reference_free import CPO, ORPO, SimPO
from diffalign.objectives.unpaired import KTO
from diffalign.recipes import Run, TrainConfig, evaluate_run, train
from diffalign.sampling import Sampler
from diffalign.spec import validate
from diffalign.timesteps import TIMESTEPS, TimestepPolicy, Uniform
from diffalign.train.state import TrainSettings
from diffalign.training_data import DataSpec

if TYPE_CHECKING:
    from PIL.Image import Image

Rows = Iterable[Mapping[str, Any]]


class TrainerConfig(TrainSettings):
    """What every trainer can be told; the fields of the ``train`` section of a config file are here too."""

    output_dir: str
    lora: LoRA | None = LoRA()
    """Train an adapter; None trains all weights of the denoiser."""
    timesteps: Annotated[TimestepPolicy, TIMESTEPS] = Uniform()
    holdout: float = Field(default=0.1, ge=0, lt=1)
    """Share of prompts kept out of training, for held-out loss and accuracy."""
    resolution: int | None = Field(default=None, ge=8)
    """Side in pixels; the model's own if not given."""
    buckets: bool = False
    """Cut each pair to the size that its winner's shape is nearest to, instead of to a square."""
    evaluate: EvaluateSpec = EvaluateSpec(enabled=False)
    """What is measured after training, base against trained."""
    resume_from: str | None = None
    """``latest``, ``auto`` or a checkpoint folder."""

    @abstractmethod
    def objective(self) -> Objective | tuple[Objective, ...]:
        """The loss, or losses that are summed."""

    def data(self) -> dict[str, Any]:
        """Settings of the ``data`` section that are this trainer's own."""
        return {}


class DPOConfig(TrainerConfig):
    """Diffusion-DPO (Wallace et al. 2023, eq. 14)."""

    beta: float = Field(default=5000.0, gt=0)
    """Strength of the pull to the reference; not comparable across resolutions, latent sizes or prediction types."""
    kappa: float = Field(default=0.5, gt=0)
    """1/2 in the authors' code and in diffusers' SDXL script, 1 in diffusers' SD script."""

    def objective(self) -> Objective:
        return Sigmoid(beta=self.beta, kappa=self.kappa)


class MaPOConfig(TrainerConfig):
    """Margin-aware preference optimisation, without a reference (Hong et al. 2024)."""

    beta: float = Field(default=0.1, gt=0)
    """Weight of the margin beside the winner's error."""

    def objective(self) -> Objective:
        return MaPO(beta=self.beta)


class KTOConfig(TrainerConfig):
    """Diffusion-KTO (Li et al. 2024): single images, good or bad."""

    beta: float = Field(default=5000.0, gt=0)
    """Strength of the pull to the reference."""
    kappa: float = Field(default=1.0, gt=0)
    """1 in the authors' code."""
    desirable_weight: float = Field(default=1.0, ge=0)
    undesirable_weight: float = Field(default=1.0, ge=0)
    positive_share: float | None = Field(default=None, gt=0, lt=1)
    """Weigh labels so that good images carry this share; 0.8 in the paper."""

    def objective(self) -> Objective:
        names = ("beta", "kappa", "desirable_weight", "undesirable_weight")
        return KTO(**{name: getattr(self, name) for name in names})

    def data(self) -> dict[str, Any]:
        return {"positive_share": self.positive_share}


class CPOConfig(TrainerConfig):
    """Contrastive PO (Xu et al. 2024) and, by ``loss_type``, SimPO (Meng et al. 2024), without a reference."""

    loss_type: Literal["sigmoid", "simpo"] = "sigmoid"
    beta: float = Field(default=500.0, gt=0)
    """Scale of the errors' difference, times 1/2; it does not transfer between models."""
    cpo_alpha: float = Field(default=1.0, ge=0)
    """Weight of the winner's error; 0 with ``simpo`` is SimPO alone."""
    simpo_gamma: float = Field(default=0.5, ge=0)
    """The margin that ``simpo`` asks for."""

    def objective(self) -> Objective | tuple[Objective, ...]:
        if self.loss_type == "sigmoid":
            return CPO(beta=self.beta, cpo_alpha=self.cpo_alpha)
        simpo = SimPO(beta=self.beta, simpo_gamma=self.simpo_gamma)
        return (simpo, SFT(weight=self.cpo_alpha)) if self.cpo_alpha else simpo


class ORPOConfig(TrainerConfig):
    """Odds-ratio PO (Hong et al. 2024), without a reference."""

    beta: float = Field(default=0.1, gt=0)
    """Weight of the odds beside the winner's error: the paper's lambda, as in TRL."""
    scale: float = Field(default=10.0, gt=0)
    """An image's probability is exp(-scale e / 2) of its error."""

    def objective(self) -> Objective:
        return ORPO(beta=self.scale, orpo_lambda=self.beta)


class SFTConfig(TrainerConfig):
    """Fine-tuning on the winners: the control of every preference method."""

    def objective(self) -> Objective:
        return SFT()


class Trainer:
    """Trains a model on preference pairs.

    Args:
        model: a folder in the diffusers layout, a hub id, ``shapes-unet``, or a :class:`ModelSpec`; the adapter is
            ``args.lora``.
        args: the configuration.
        train_dataset: a dataset folder, table or hub id; or rows with ``prompt``, ``chosen`` and ``rejected``, such as a
            ``datasets.Dataset`` or a list, whose images are PIL images, encoded bytes, or ``{"bytes": ...}``.

    Raises:
        ConfigError: settings that contradict each other, or an output directory that holds a run.
        DataError: a row without prompt, winner or loser, or an image that cannot be read; names the row.
        ModelError: the model cannot be loaded.
    """

    config_class: ClassVar[type[TrainerConfig]]

    def __init__(self, model: str | Path | ModelSpec, args: TrainerConfig, train_dataset: str | Path | Rows) -> None:
        from diffalign.data.examples import labels_in
        from diffalign.data.pairs import pairs_of
        from diffalign.errors import ConfigError

        if not isinstance(args, self.config_class):
            raise ConfigError(f"args: {type(self).__name__} needs a {self.config_class.__name__}, got {type(args).__name__}")
        spec = model if isinstance(model, ModelSpec) else ModelSpec(path=str(model))
        path = str(train_dataset) if isinstance(train_dataset, str | Path) else "rows in memory"
        objective = args.objective()
        parts = objective if isinstance(objective, tuple) else (objective,)
        read = labels_in if parts[0].data == "labels" else pairs_of
        self.rows = None if isinstance(train_dataset, str | Path) else read(train_dataset)
        settings = {name: getattr(args, name) for name in TrainSettings.model_fields}
        sections = {
            "model": spec.model_copy(update={"lora": args.lora}),
            "data": DataSpec(path=path, holdout=args.holdout, resolution=args.resolution, buckets=args.buckets, **args.data()),
            "objective": parts,
            "timesteps": args.timesteps,
            "train": TrainSettings(**settings),
            "evaluate": args.evaluate,
            "output_dir": args.output_dir,
            "resume_from": args.resume_from,
        }
        self.config = validate(TrainConfig, sections, "args")

    def train(self) -> Run:
        """Train, export and, if asked, evaluate; returns the run's folder and metrics."""
        return train(self.config, self.rows)


class DPOTrainer(Trainer):
    """``DPOTrainer(model="shapes-unet", args=DPOConfig(output_dir="out"), train_dataset="shapes-pairs").train()``."""

    config_class = DPOConfig


class MaPOTrainer(Trainer):
    """Like :class:`DPOTrainer`, without a reference model."""

    config_class = MaPOConfig


class KTOTrainer(Trainer):
    """On single images: rows with ``prompt``, ``image`` and ``label`` (1 good, 0 bad), or pairs, which are taken apart."""

    config_class = KTOConfig


class CPOTrainer(Trainer):
    """Like :class:`DPOTrainer`, without a reference model: CPO or SimPO."""

    config_class = CPOConfig


class ORPOTrainer(Trainer):
    """Like :class:`DPOTrainer`, without a reference model."""

    config_class = ORPOConfig


class SFTTrainer(Trainer):
    """Like :class:`DPOTrainer`, on the winners alone."""

    config_class = SFTConfig


def generate(
    model: str | Path | ModelSpec,
    prompts: Sequence[str],
    *,
    adapter: str | Path | None = None,
    num_images_per_prompt: int = 1,
    num_inference_steps: int = 20,
    guidance_scale: float = 1.0,
    negative_prompt: str | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> list[list[Image]]:
    """PIL images, one list per prompt. The seed belongs to (prompt, number of the image), whatever the batch.

    Args:
        model: a folder, a hub id, ``shapes-unet`` or a :class:`ModelSpec`.
        prompts: P texts.
        adapter: the folder of a finished run whose trained weights are used.
        num_images_per_prompt: K images each.
        num_inference_steps: steps of the model's own scheduler.
        guidance_scale: 1 for none, above 1 for classifier-free guidance.
        negative_prompt: for all prompts.
        batch_size: images at a time.
        seed: makes another set of images.

    Raises:
        ModelError: the model or the adapter cannot be loaded.
    """
    from diffalign.data.images import to_pil
    from diffalign.data.prompts import Prompt
    from diffalign.sampling import generate as draw

    spec = model if isinstance(model, ModelSpec) else ModelSpec(path=str(model))
    loaded = ready_model(trained_spec(spec, adapter))
    if adapter is not None:
        loaded.restore(Path(adapter))
    settings = Sampler(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, batch_size=batch_size)
    asked = [Prompt(p, negative_prompt) for p in prompts]
    return [to_pil(row) for row in draw(loaded, asked, settings, per_prompt=num_images_per_prompt, seed=seed)]


def trained_spec(spec: ModelSpec, run: str | Path | None) -> ModelSpec:
    """The model's spec with the adapter of a finished run, so that its weights fit in."""
    from diffalign.spec import load

    if run is None:
        return spec
    config = load(TrainConfig, Path(run) / "config.resolved.yaml")
    return spec.model_copy(update={"lora": config.model.lora})


def evaluate(run: str | Path, **settings: Any) -> dict[str, Any]:
    """Measure a finished run again, base against trained: what ``diffalign evaluate RUN key=value`` prints.

    Args:
        run: the run's folder.
        settings: fields of the ``evaluate`` section, such as ``num_prompts=512`` or ``scorers=["shapes"]``.

    Raises:
        ConfigError: the folder is not a run, or a setting is wrong.
    """
    import json

    return evaluate_run(str(run), [f"{key}={json.dumps(value)}" for key, value in settings.items()])[1]
