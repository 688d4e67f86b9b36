"""How a network is trained: optimiser, averages, sharding, length, pictures, checkpoints."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from ldmscale.config.schema import STRICT, NotNegative, Positive, PositiveNumber, Prompt, Share


@dataclass(frozen=True, config=STRICT)
class OptimConfig:
    """AdamW and its learning-rate curve."""

    lr: float
    # sgd has no momentum and no state: for checks of memory, where the moments of AdamW would not fit
    kind: Literal["adamw", "sgd"] = "adamw"
    # published: lr is for one sample; the rate is lr x accumulation x ranks x rank_micro_batch = lr x global_batch
    lr_scaling: Literal["none", "published"] = "none"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1.0e-8
    weight_decay: float = 0.01
    gradient_clip_norm: float | None = 1.0
    curve: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: NotNegative = 0
    final_lr_share: Share = 0.0  # of lr, reached at train.max_steps by linear and cosine

    def rate(self, global_batch: int) -> float:
        """The learning rate of a run with so many samples a step."""
        return self.lr * global_batch if self.lr_scaling == "published" else self.lr


Decay = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True, config=STRICT)
class EmaConfig:
    """Averaged weights, kept in the shards of the fp32 masters."""

    enabled: bool = True
    decay: Decay = 0.9999  # of the one that pictures are drawn by, and that `load` takes
    warmup: bool = True  # min(decay, (1+n)/(10+n)), as published
    decays: tuple[Decay, ...] = ()  # of further ones, kept beside it
    # Relative widths (sigma_rel) of power-function averages (Karras et al. 2024). From two, and their stored states,
    # the average of any other width is made after the training: ema.power_widths=[0.05,0.1].
    power_widths: tuple[Annotated[float, Field(gt=0, le=0.288)], ...] = ()
    store_every_steps: NotNegative = 0  # how often their state is stored in averages/; 0: never


@dataclass(frozen=True, config=STRICT)
class ZeroConfig:
    """What DeepSpeed shards over the ranks."""

    stage: Literal[0, 1, 2, 3]
    persistence_threshold: int = 100_000  # parameters with fewer elements stay whole at stage 3
    bucket_elements: int = 50_000_000  # of one reduction
    prefetch_elements: int = 50_000_000
    # Stage 3: elements of gathered weights that stay for their next use; fewer take less memory and more gathers
    live_elements: NotNegative = 1_000_000_000
    overlap_communication: bool = True
    # Stage 3 (no effect at others): all parameters of a residual, attention or text block are gathered at once, not by layer
    leaf_blocks: bool = False


@dataclass(frozen=True, config=STRICT)
class TrainConfig:
    """How long, how large, how exact."""

    max_steps: int
    global_batch: int  # samples of one optimiser step, over all ranks and accumulation
    rank_micro_batch: int  # samples of one forward pass on one rank
    precision: Literal["bf16", "fp32"] = "bf16"
    log_every_steps: NotNegative = 50
    attention: Literal["auto", "xformers", "sdpa", "plain"] = "auto"
    # blocks: residual, attention and text blocks run through torch.compile; not at ZeRO-3, not with selective checkpointing
    compile: Literal["off", "blocks"] = "off"
    # Python's cycle collector runs at these steps on all ranks, and at no other time
    garbage_every_steps: NotNegative = 100


@dataclass(frozen=True, config=STRICT)
class ValidationConfig:
    """Figures of held-out images (data.heldout_shards) while training, by all ranks together."""

    every_steps: NotNegative = 0  # 0: never
    images: Positive = 256  # the first so many, kept in memory
    rank_batch: Positive = 8


@dataclass(frozen=True, config=STRICT)
class PreviewConfig:
    """Pictures drawn while training, by all ranks together."""

    every_steps: NotNegative = 5000  # 0: never
    # Diffusion; none: captions of the held-out shards, or of the first samples
    prompts: tuple[Prompt, ...] = ()
    images: Positive = 8  # how many pictures (reconstructions, or prompts where none are given)
    sampler_steps: int = 50
    guidance: float = 5.0
    seed: int = 0


@dataclass(frozen=True, config=STRICT)
class DenoisingValidationConfig:
    """The loss on data.heldout_shards with fixed noise and timesteps, by raw and averaged weights."""

    every_steps: NotNegative = 0  # 0: never
    samples: Positive = 256
    timestep_bins: Positive = 10  # the loss is also told by so many equal ranges of the timesteps


@dataclass(frozen=True, config=STRICT)
class GenerationConfig:
    """Figures of images that are drawn while training, one for each held-out sample, by the averaged weights."""

    every_steps: NotNegative = 0  # 0: never
    samples: Annotated[int, Field(ge=2)] = 256  # the first so many of data.heldout_shards
    rank_batch: Positive = 8
    sampler_steps: int = 50
    guidance: float = 5.0
    seed: int = 0
    # whose features the Frechet distance is of, and is named after
    features: Literal["efficientnet_lite0", "inception_fid"] = "efficientnet_lite0"
    features_weights: str | None = None  # null: the installed package's; inception_fid needs its file
    features_weights_sha256: str | None = None  # null: of the published file


@dataclass(frozen=True, config=STRICT)
class CheckpointConfig:
    """When the training state is saved and how much of it is kept."""

    save_every_steps: NotNegative = 1000
    keep_last: Annotated[int, Field(ge=2)] = 2  # complete checkpoints, without ephemeral ones
    keep_every_steps: NotNegative = 0  # checkpoints of these steps stay for ever; 0: none
    keep_best: NotNegative = 0  # so many stay for their value of best_metric
    best_metric: str | None = None  # a key of metrics.jsonl
    best_is: Literal["lowest", "highest"] = "lowest"
    # saves in between, which go as soon as there are newer ones; 0: none
    ephemeral_every_steps: NotNegative = 0
    url: str | None = None  # fsspec URL of a folder that gets a copy of every checkpoint
    max_failed_saves: NotNegative = 3  # in a row; after more the run stops


@dataclass(frozen=True, config=STRICT)
class WarmStartConfig:
    """Weights that a new run begins with; its optimiser, averages and data position are new."""

    path: str | None = None  # a run folder, one of its checkpoints, or a model of another format
    weights: Literal["ema", "raw"] = "ema"  # averaged ones, where there are any


@dataclass(frozen=True, config=STRICT)
class RunConfig:
    """Where one run lives."""

    name: str  # names the folder and the W&B run
    dir: str  # the run folder; runs/<name> unless given
    max_hours: Annotated[float, Field(gt=0)] | None = None  # then it saves and ends with 75; null: no limit
    # the same so long before the end of the Slurm allocation, where Slurm tells it
    margin_minutes: Annotated[float, Field(ge=0)] = 5.0
    wait: bool = False  # wait while another start holds the run folder, instead of ending with 2
    lease_seconds: Annotated[float, Field(ge=1)] = 60.0  # a start without a sign of life for so long is over


@dataclass(frozen=True, config=STRICT)
class TrackingConfig:
    """Where metrics go besides the console and metrics.jsonl."""

    wandb: Literal["auto", "off", "offline", "online"] = "auto"
    project: str = "ldmscale"
    entity: str | None = None
    tags: tuple[str, ...] = ()
    wandb_images_per_hour: NotNegative = 120  # pictures beyond that stay in samples/ only
    # TFLOP/s of one device, dense, in train.precision, for throughput/mfu of diffusion; null: as the maker states it for bf16
    peak_tflops: PositiveNumber | None = None


@dataclass(frozen=True, config=STRICT)
class SafetyConfig:
    """Updates with a loss or gradient that is not finite are always skipped by all ranks and written down."""

    # So many skipped updates in a row: back to the newest checkpoint, and on behind the samples that led there; 0: never.
    skips_before_rollback: NotNegative = 5
    max_rollbacks: NotNegative = 3  # without getting any further; then the run ends
    # Losses far above those of before: "log" tells, "skip" treats them like those that are not finite.
    spike: Literal["off", "log", "skip"] = "off"
    spike_window: Annotated[int, Field(ge=10)] = 200  # steps that a loss is compared with
    # in standard deviations above the median, estimated by the median of distances to it
    spike_threshold: Annotated[float, Field(gt=0)] = 10.0
    # Forward and backward of one micro-batch before the first step, without an update; "only": and nothing after it.
    dry_run: bool | Literal["only"] = True
    # of a collective: up to the end of the first step, which fetches, compiles and allocates, and from then on
    first_step_timeout_minutes: Annotated[float, Field(gt=0)] = 30.0
    step_timeout_minutes: Annotated[float, Field(gt=0)] = 15.0
    # each rank says what it does so often; at 0.8 of the timeouts above the watchdog names the rank that differs
    heartbeat_seconds: Annotated[float, Field(gt=0)] = 15.0
