"""The typed configuration: what every key of conf/ means, in which unit, and what it defaults to.

Hydra composes plain YAML; `validate.read` turns it into these frozen dataclasses. Nothing here imports torch.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

_strict = ConfigDict(extra="forbid")
Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, config=_strict)
class RunConfig:
    """Where one run lives."""

    name: str  # names the folder and the W&B run
    dir: str  # the run folder; runs/<name> unless given


@dataclass(frozen=True, config=_strict)
class DataConfig:
    """Which shards are read, and how a sample of theirs becomes a training item."""

    shards: str | tuple[str, ...]  # brace pattern, glob, URL, or a list of them
    kind: Literal["images", "latents"] = "images"  # what the tars hold
    # never trained on: pictures while training are of these
    heldout_shards: str | tuple[str, ...] | None = None
    image_size: Positive | None = None  # pixels of the square that the short side is resized to
    crop: Literal["center", "random"] = "center"
    flip: bool = False  # mirror half of the images (never where captions say left and right)
    caption: str = "txt"  # "txt", or "json:KEY"
    workers: NotNegative = 2  # loading processes a rank; 0 loads in the training process
    shuffle_block_shards: Positive = 16  # samples are shuffled within blocks of so many shards
    max_pixels: Positive = 89_000_000  # larger images are refused by their header, before decoding
    max_bad_share: Share = 0.01  # a larger share of unreadable samples stops the run
    allow_pipe: bool = False  # pipe: URLs run a shell command
    check: Literal["headers", "decode"] = "headers"  # how closely `ldmscale index` looks


@dataclass(frozen=True, config=_strict)
class SourceConfig:
    """Where the quickstart takes its captioned images from."""

    source: Literal["sprites", "folder"]
    root: str | None = None  # folder: of images; sprites: a wheel or folder that is here already
    image_size: Positive = 32  # pixels
    heldout_share: Share = 0.08  # share of the images that are kept from training


@dataclass(frozen=True, config=_strict)
class AutoencoderConfig:
    """First stage: the constructor arguments of KLAutoencoder or VQAutoencoder (paper, section 3.1, tables 8 and 9)."""

    kind: Literal["kl", "vq"]
    latent_channels: int
    channels: int  # width of the first level
    channel_mult: tuple[int, ...]  # width of each level, times `channels`; f = 2^(levels-1)
    blocks_per_level: int
    attention_levels: tuple[int, ...] = ()  # level numbers, 0 = full resolution
    mid_attention: bool = True
    dropout: float = 0.0
    image_channels: int = 3
    codebook_size: int | None = None  # vq only
    commitment: float = 0.25  # vq only
    # of every normalisation; narrow networks need fewer, or a group is a single channel
    norm_groups: int = 32
    checkpointing: Literal["off", "full"] = "off"

    @property
    def factor(self) -> int:
        """Pixels along one side of a latent position."""
        return int(2 ** (len(self.channel_mult) - 1))


@dataclass(frozen=True, config=_strict)
class UNetConfig:
    """Constructor arguments of the U-Net (paper, tables 12 to 15)."""

    in_channels: int  # of the latent, with concatenated conditions
    out_channels: int
    channels: int  # width of the first level
    channel_mult: tuple[int, ...]
    blocks_per_level: int
    attention_levels: tuple[int, ...]  # level numbers, 0 = full latent resolution
    heads: int | None = None  # either the number of heads ...
    head_channels: int | None = None  # ... or the channels of one
    context_dim: int | None = None  # width of the cross-attended condition; null: plain self-attention blocks
    transformer_depth: int = 1
    residual_updown: bool = False
    scale_shift_norm: bool = False  # the time vector scales and shifts, instead of being added
    num_classes: int | None = None
    dropout: float = 0.0
    norm_groups: int = 32
    checkpointing: Literal["off", "full"] = "off"


@dataclass(frozen=True, config=_strict)
class TextEncoderConfig:
    """The text transformer that is trained jointly with the U-Net (CompVis' BERTEmbedder)."""

    kind: Literal["bert"]
    tokenizer: (
        str  # a hub name, a folder, or "train": a WordPiece of the shards' captions, stored with the run
    )
    max_tokens: int
    width: int
    layers: int
    heads: int
    head_channels: int
    vocab_size: int
    feedforward_mult: int = 4
    dropout: float = 0.0
    checkpointing: Literal["off", "full"] = "off"


@dataclass(frozen=True, config=_strict)
class AutoencoderLossConfig:
    """Terms of the first stage's loss (CompVis' contperceptual and vqperceptual)."""

    perceptual: Literal[
        "lpips_vgg16", "efficientnet_lite0", "none"
    ]  # the frozen network that compares images
    perceptual_weights: str | None = None  # file of the backbone (and `perceptual_heads` for LPIPS)
    perceptual_heads: str | None = None
    perceptual_min_side: int = 64  # efficientnet_lite0 sees smaller images enlarged to this many pixels
    # of the reconstruction term over an image: kl sums, vq averages
    reduction: Literal["sum", "mean"] = "sum"
    pixel_weight: float = 1.0
    perceptual_weight: float = 1.0
    kl_weight: float = 1.0e-6
    codebook_weight: float = 1.0
    gan: Literal["hinge", "vanilla"] = "hinge"
    gan_weight: float = 0.5  # times the adaptive weight
    gan_start_step: NotNegative = 50_001  # the adversarial term is off before
    discriminator_channels: int = 64
    discriminator_layers: int = 3
    discriminator_norm: Literal["batch", "group"] = "batch"
    discriminator_lr_scale: float = 1.0


@dataclass(frozen=True, config=_strict)
class FirstStageConfig:
    """The trained autoencoder that the diffusion model works behind."""

    path: str | None = None  # its run folder
    average: bool = True  # use its averaged weights where it has them
    # latents times one factor (paper), or by mean and std of a channel
    scale: Literal["factor", "channel"] = "factor"
    fixed_factor: float | None = None  # published factor in place of the measured one (0.18215)


@dataclass(frozen=True, config=_strict)
class DiffusionConfig:
    """The denoising objective (paper, section 3.2)."""

    timesteps: Annotated[int, Field(ge=2)] = 1000
    schedule: Literal["scaled_linear", "linear", "cosine"] = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    prediction: Literal["eps", "v", "x0"] = "eps"
    loss: Literal["l2", "l1"] = "l2"
    caption_dropout: Share = 0.1  # share of captions replaced by the null condition while training
    null_condition: Literal["tokens", "learned"] = "tokens"  # the empty caption, or a trained context


@dataclass(frozen=True, config=_strict)
class OptimConfig:
    """AdamW and its learning-rate curve."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1.0e-8
    weight_decay: float = 0.01
    gradient_clip_norm: float | None = 1.0
    curve: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: NotNegative = 0
    final_lr_share: Share = 0.0  # of lr, reached at train.max_steps by linear and cosine


@dataclass(frozen=True, config=_strict)
class EmaConfig:
    """Averaged weights, kept in the shards of the fp32 masters."""

    enabled: bool = True
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.9999
    warmup: bool = True  # min(decay, (1+n)/(10+n)), as published


@dataclass(frozen=True, config=_strict)
class ZeroConfig:
    """What DeepSpeed shards over the ranks."""

    stage: Literal[0, 1, 2, 3]
    persistence_threshold: int = 100_000  # parameters with fewer elements stay whole at stage 3
    bucket_elements: int = 50_000_000  # of one reduction
    prefetch_elements: int = 50_000_000
    overlap_communication: bool = True


@dataclass(frozen=True, config=_strict)
class TrainConfig:
    """How long, how large, how exact."""

    max_steps: int
    global_batch: int  # samples of one optimiser step, over all ranks and accumulation
    rank_micro_batch: int  # samples of one forward pass on one rank
    precision: Literal["bf16", "fp32"] = "bf16"
    log_every_steps: NotNegative = 50
    attention: Literal["auto", "xformers", "sdpa", "plain"] = "auto"
    # Python's cycle collector runs at these steps on all ranks, and at no other time
    garbage_every_steps: NotNegative = 100


@dataclass(frozen=True, config=_strict)
class PreviewConfig:
    """Pictures drawn while training, by all ranks together."""

    every_steps: NotNegative = 5000  # 0: never
    prompts: tuple[str, ...] = ()  # diffusion; none: captions of the held-out shards, or of the first samples
    images: Positive = 8  # how many pictures (reconstructions, or prompts where none are given)
    sampler_steps: int = 50
    guidance: float = 5.0
    seed: int = 0


@dataclass(frozen=True, config=_strict)
class CheckpointConfig:
    """When the training state is saved and how much of it is kept."""

    save_every_steps: NotNegative = 1000
    keep_last: Annotated[int, Field(ge=2)] = 2  # complete checkpoints


@dataclass(frozen=True, config=_strict)
class TrackingConfig:
    """Where metrics go besides the console and metrics.jsonl."""

    wandb: Literal["auto", "off", "offline", "online"] = "auto"
    project: str = "ldmscale"
    entity: str | None = None
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, config=_strict)
class EncoderConfig:
    """The trained autoencoder that makes latents."""

    path: str  # its run folder
    average: bool = True  # use its averaged weights where it has them


@dataclass(frozen=True, config=_strict)
class LatentsConfig:
    """How shards of images become shards of latents."""

    path: str  # folder that receives them
    dtype: Literal["fp16", "fp32"] = "fp16"
    rank_batch: Positive = 16  # images encoded at a time


@dataclass(frozen=True, config=_strict)
class SampleConfig:
    """What is drawn from a trained model."""

    model: str  # run folder
    prompts: str | tuple[str, ...]  # a prompt, a list, a file of one prompt a line, or "-" for standard input
    out: str | None  # folder for PNGs and the grid; the samples/drawn of the model unless given
    steps: Positive = 50
    sampler: Literal["ddim"] = "ddim"
    eta: float = 0.0
    guidance: float = 5.0
    images_per_prompt: Positive = 1
    first_seed: NotNegative = 0
    ema: bool = True
    rank_batch: Positive = 16
    precision: Literal["bf16", "fp32"] = "fp32"


@dataclass(frozen=True, config=_strict)
class ScoreConfig:
    """How the quickstart measures what it trained."""

    sampler_steps: Positive = 50
    guidance: float = 3.0
    nearest: Positive = 5  # an image counts as found when it is among so many nearest ones
    # Drawn and scored, evenly chosen: a large folder has more captions than a CPU can draw.
    max_captions: Positive = 1000
    grid_prompts: Annotated[int, Field(ge=2)] = 12


@dataclass(frozen=True, config=_strict)
class StageOverrides:
    """Overrides of the jobs that the quickstart starts, on top of experiment=quickstart."""

    autoencoder: tuple[str, ...] = ()
    diffusion: tuple[str, ...] = ()


@dataclass(frozen=True, config=_strict)
class IndexJob:
    job: Literal["index"]
    data: DataConfig


@dataclass(frozen=True, config=_strict)
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
    scale_samples: Positive = 10_000  # images over which the latent scale is measured at the end


@dataclass(frozen=True, config=_strict)
class LatentsJob:
    job: Literal["latents"]
    data: DataConfig
    first_stage: EncoderConfig
    latents: LatentsConfig


@dataclass(frozen=True, config=_strict)
class DiffusionJob:
    job: Literal["diffusion"]
    run: RunConfig
    seed: int
    data: DataConfig
    autoencoder: AutoencoderConfig
    first_stage: FirstStageConfig
    unet: UNetConfig
    text_encoder: TextEncoderConfig
    diffusion: DiffusionConfig
    optim: OptimConfig
    ema: EmaConfig
    zero: ZeroConfig
    train: TrainConfig
    preview: PreviewConfig
    checkpoint: CheckpointConfig
    tracking: TrackingConfig


@dataclass(frozen=True, config=_strict)
class SampleJob:
    job: Literal["sample"]
    sample: SampleConfig


@dataclass(frozen=True, config=_strict)
class QuickstartJob:
    """The pipeline, whose stages are the jobs `autoencoder`, `latents` and `diffusion`, started as a user would."""

    job: Literal["quickstart"]
    run: RunConfig
    seed: int
    data: SourceConfig
    ranks: Positive | None  # null: one a GPU, two without
    overrides: StageOverrides
    score: ScoreConfig


TrainingJob = AutoencoderJob | DiffusionJob
Job = IndexJob | AutoencoderJob | LatentsJob | DiffusionJob | SampleJob | QuickstartJob
JOBS: dict[str, type[Job]] = {
    "quickstart": QuickstartJob,
    "index": IndexJob,
    "autoencoder": AutoencoderJob,
    "latents": LatentsJob,
    "diffusion": DiffusionJob,
    "sample": SampleJob,
}
