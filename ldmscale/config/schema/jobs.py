"""The jobs: which settings each has."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from ldmscale.config.schema import STRICT, Positive
from ldmscale.config.schema.cluster import ClusterConfig, DoctorConfig
from ldmscale.config.schema.data import DataConfig, EncoderConfig, LatentsConfig, SourceConfig
from ldmscale.config.schema.losses import (
    AutoencoderLossConfig,
    CodebookConfig,
    DiffusionConfig,
    FirstStageConfig,
)
from ldmscale.config.schema.models import (
    AutoencoderConfig,
    ClassEmbedderConfig,
    EmbeddingsConfig,
    FrozenTextConfig,
    ImportedUNetConfig,
    LayoutConfig,
    SpatialConfig,
    TextEncoderConfig,
    UNetConfig,
)
from ldmscale.config.schema.sampling import EvaluateConfig, SampleConfig, ScoreConfig
from ldmscale.config.schema.training import (
    CheckpointConfig,
    DenoisingValidationConfig,
    EmaConfig,
    GenerationConfig,
    OptimConfig,
    PreviewConfig,
    RunConfig,
    SafetyConfig,
    TrackingConfig,
    TrainConfig,
    ValidationConfig,
    WarmStartConfig,
    ZeroConfig,
)


@dataclass(frozen=True, config=STRICT)
class StageOverrides:
    """Overrides of the jobs that the quickstart starts, on top of experiment=quickstart."""

    autoencoder: tuple[str, ...] = ()
    diffusion: tuple[str, ...] = ()


@dataclass(frozen=True, config=STRICT)
class IndexJob:
    job: Literal["index"]
    data: DataConfig
    # Conditions that are looked at, too, given as to the training job.
    class_embedder: ClassEmbedderConfig | None = None
    layout: LayoutConfig | None = None
    embeddings: EmbeddingsConfig | None = None
    spatial: SpatialConfig | None = None


@dataclass(frozen=True, config=STRICT)
class AutoencoderJob:
    job: Literal["autoencoder"]
    run: RunConfig
    seed: int
    data: DataConfig
    autoencoder: AutoencoderConfig
    loss: AutoencoderLossConfig
    optim: OptimConfig
    ema: EmaConfig
    zero: ZeroConfig
    train: TrainConfig
    preview: PreviewConfig
    checkpoint: CheckpointConfig
    tracking: TrackingConfig
    safety: SafetyConfig = SafetyConfig()
    warm_start: WarmStartConfig = WarmStartConfig()
    codebook: CodebookConfig = CodebookConfig()
    validation: ValidationConfig = ValidationConfig()
    scale_samples: Positive = 10_000  # images over which the latent scale is measured at the end


@dataclass(frozen=True, config=STRICT)
class LatentsJob:
    job: Literal["latents"]
    data: DataConfig
    first_stage: EncoderConfig
    latents: LatentsConfig
    # Frozen; read with latents.text=true.
    text_encoder: Annotated[TextEncoderConfig | FrozenTextConfig, Field(discriminator="kind")] | None = None


@dataclass(frozen=True, config=STRICT)
class DiffusionJob:
    job: Literal["diffusion"]
    run: RunConfig
    seed: int
    data: DataConfig
    autoencoder: AutoencoderConfig
    first_stage: FirstStageConfig
    unet: UNetConfig
    diffusion: DiffusionConfig
    optim: OptimConfig
    ema: EmaConfig
    zero: ZeroConfig
    train: TrainConfig
    preview: PreviewConfig
    checkpoint: CheckpointConfig
    tracking: TrackingConfig
    safety: SafetyConfig = SafetyConfig()
    warm_start: WarmStartConfig = WarmStartConfig()
    validation: DenoisingValidationConfig = DenoisingValidationConfig()
    generation: GenerationConfig = GenerationConfig()
    # What the U-Net is told; of the first three at most one. None of them: unconditional.
    text_encoder: Annotated[TextEncoderConfig | FrozenTextConfig, Field(discriminator="kind")] | None = None
    class_embedder: ClassEmbedderConfig | None = None
    embeddings: EmbeddingsConfig | None = None
    spatial: SpatialConfig | None = None
    layout: LayoutConfig | None = None  # what a text_encoder with tokenizer=layout reads


@dataclass(frozen=True, config=STRICT)
class SampleJob:
    job: Literal["sample"]
    sample: SampleConfig


@dataclass(frozen=True, config=STRICT)
class EvaluateJob:
    job: Literal["evaluate"]
    data: DataConfig
    evaluate: EvaluateConfig


@dataclass(frozen=True, config=STRICT)
class QuickstartJob:
    """The pipeline, whose stages are the jobs `autoencoder`, `latents` and `diffusion`, started as a user would."""

    job: Literal["quickstart"]
    run: RunConfig
    seed: int
    data: SourceConfig
    ranks: Positive | None  # null: one a GPU, two without
    overrides: StageOverrides
    score: ScoreConfig


PartName = Literal["unet", "autoencoder", "text_encoder", "class_embedder", "spatial_rescaler"]


@dataclass(frozen=True, config=STRICT)
class HeadsConfig:
    """What the shapes of a checkpoint do not tell."""

    heads: Positive | None = None  # number of heads at every level, or
    head_channels: Positive | None = None  # size of one


@dataclass(frozen=True, config=STRICT)
class ImportJob:
    job: Literal["import"]
    src: str  # .ckpt, .safetensors or a diffusers folder
    dst: str  # the folder of the imported model
    unet: ImportedUNetConfig | HeadsConfig
    text_encoder: TextEncoderConfig | HeadsConfig
    class_embedder: ClassEmbedderConfig | None = None
    spatial: SpatialConfig | None = None
    diffusion: DiffusionConfig | None = None
    config: str | None = None
    tokenizer: str | None = None
    scale_factor: Annotated[float, Field(gt=0)] | None = None
    latent_size: Positive | None = None
    overwrite: bool = False


@dataclass(frozen=True, config=STRICT)
class ExportJob:
    job: Literal["export"]
    src: str
    dst: str
    format: Literal["diffusers", "compvis"]
    ema: bool | str = True  # or the name of an average that a run keeps
    parts: tuple[PartName, ...] | None = None
    overwrite: bool = False


@dataclass(frozen=True, config=STRICT)
class RunToExamine:
    dir: str | None = None  # null: look at this machine


@dataclass(frozen=True, config=STRICT)
class DoctorJob:
    job: Literal["doctor"]
    run: RunToExamine
    doctor: DoctorConfig


@dataclass(frozen=True, config=STRICT)
class RunToSend:
    dir: str


@dataclass(frozen=True, config=STRICT)
class WandbSyncJob:
    """A run's metrics, sent to W&B once more, from metrics.jsonl."""

    job: Literal["wandb-sync"]
    run: RunToSend
    tracking: TrackingConfig
    run_id: str | None = None  # of the new W&B run; one of W&B's own making unless given


@dataclass(frozen=True, config=STRICT)
class SubmitJob:
    """Only what `submit` itself reads; the rest of its command line belongs to the job that is queued."""

    job: Literal["submit"]
    cluster: ClusterConfig


TrainingJob = AutoencoderJob | DiffusionJob
Job = (
    IndexJob
    | EvaluateJob
    | AutoencoderJob
    | LatentsJob
    | DiffusionJob
    | SampleJob
    | QuickstartJob
    | SubmitJob
    | ImportJob
    | ExportJob
    | DoctorJob
    | WandbSyncJob
)
JOBS: dict[str, type[Job]] = {
    "quickstart": QuickstartJob,
    "index": IndexJob,
    "autoencoder": AutoencoderJob,
    "latents": LatentsJob,
    "diffusion": DiffusionJob,
    "sample": SampleJob,
    "submit": SubmitJob,
    "import": ImportJob,
    "export": ExportJob,
    "doctor": DoctorJob,
    "wandb-sync": WandbSyncJob,
    "evaluate": EvaluateJob,
}
