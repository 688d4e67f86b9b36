"""The typed configuration: what every key of conf/ means, in which unit, and what it defaults to.

Hydra composes plain YAML; `validate.read` turns it into these frozen dataclasses. Nothing here imports torch.
"""

from ldmscale.config.cluster import ClusterConfig
from ldmscale.config.data import DataConfig, EncoderConfig, LatentsConfig, SourceConfig
from ldmscale.config.doctor import DoctorConfig
from ldmscale.config.drawing import SampleConfig, ScoreConfig
from ldmscale.config.evaluation import EvaluateConfig
from ldmscale.config.interop import ExportJob, HeadsConfig, ImportJob
from ldmscale.config.jobs import (
    JOBS,
    AutoencoderJob,
    DiffusionJob,
    DoctorJob,
    EvaluateJob,
    IndexJob,
    Job,
    LatentsJob,
    QuickstartJob,
    SampleJob,
    StageOverrides,
    SubmitJob,
    TrainingJob,
    WandbSyncJob,
)
from ldmscale.config.networks import (
    AutoencoderConfig,
    ClassEmbedderConfig,
    EmbeddingsConfig,
    FrozenTextConfig,
    LayoutConfig,
    SpatialConfig,
    TextEncoderConfig,
    UNetConfig,
)
from ldmscale.config.objectives import (
    AutoencoderLossConfig,
    CodebookConfig,
    DiffusionConfig,
    FirstStageConfig,
)
from ldmscale.config.run import RunConfig, TrackingConfig
from ldmscale.config.safety import SafetyConfig
from ldmscale.config.training import (
    CheckpointConfig,
    EmaConfig,
    GenerationConfig,
    OptimConfig,
    PreviewConfig,
    TrainConfig,
    ValidationConfig,
    WarmStartConfig,
    ZeroConfig,
)

__all__ = [
    "JOBS",
    "AutoencoderConfig",
    "AutoencoderJob",
    "AutoencoderLossConfig",
    "CheckpointConfig",
    "ClassEmbedderConfig",
    "ClusterConfig",
    "CodebookConfig",
    "DataConfig",
    "DiffusionConfig",
    "DiffusionJob",
    "DoctorConfig",
    "DoctorJob",
    "EmaConfig",
    "EmbeddingsConfig",
    "EncoderConfig",
    "EvaluateConfig",
    "EvaluateJob",
    "ExportJob",
    "FirstStageConfig",
    "FrozenTextConfig",
    "GenerationConfig",
    "HeadsConfig",
    "ImportJob",
    "IndexJob",
    "Job",
    "LatentsConfig",
    "LatentsJob",
    "LayoutConfig",
    "OptimConfig",
    "PreviewConfig",
    "QuickstartJob",
    "RunConfig",
    "SafetyConfig",
    "SampleConfig",
    "SampleJob",
    "ScoreConfig",
    "SourceConfig",
    "SpatialConfig",
    "StageOverrides",
    "SubmitJob",
    "TextEncoderConfig",
    "TrackingConfig",
    "TrainConfig",
    "TrainingJob",
    "UNetConfig",
    "ValidationConfig",
    "WandbSyncJob",
    "WarmStartConfig",
    "ZeroConfig",
]
