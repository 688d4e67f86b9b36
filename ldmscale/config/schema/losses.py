"""What the two trained stages minimise."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from ldmscale.config.schema import STRICT, NotNegative, NotNegativeFloat, Positive, Share


@dataclass(frozen=True, config=STRICT)
class AutoencoderLossConfig:
    """Terms of the first stage's loss (CompVis' contperceptual and vqperceptual)."""

    perceptual: Literal[
        "lpips_vgg16", "efficientnet_lite0", "none"
    ]  # the frozen network that compares images
    # of the backbone: a file, or hf://OWNER/REPO/FILE; null: the installed package's (efficientnet_lite0 only)
    perceptual_weights: str | None = None
    # sha256 of that file, or its first characters; null: of the published file. Another file is refused
    perceptual_weights_sha256: str | None = None
    perceptual_heads: str | None = None  # LPIPS' linear heads (the file vgg.pth of PyPI's lpips)
    perceptual_min_side: int = 64  # efficientnet_lite0 sees smaller images enlarged to this many pixels
    # of the reconstruction term over an image: kl sums, vq averages
    reduction: Literal["sum", "mean"] = "sum"
    pixel_weight: float = 1.0
    perceptual_weight: float = 1.0
    # s in rec / exp(s) + s: the published optimisers leave it out, so it stays where it starts; or it is trained
    logvar: Literal["fixed", "learned"] = "fixed"
    logvar_start: float = 0.0
    kl_weight: float = 1.0e-6
    codebook_weight: float = 1.0
    gan: Literal["hinge", "vanilla"] = "hinge"
    gan_weight: float = 0.5  # times the adaptive weight
    gan_adaptive: bool = True  # False: gan_weight alone
    gan_start_step: NotNegative = 50_001  # the adversarial term is off before
    discriminator_channels: int = 64
    discriminator_layers: int = 3
    discriminator_norm: Literal["batch", "group"] = "batch"
    discriminator_lr_scale: float = 1.0
    r1_weight: NotNegativeFloat = (
        0.0  # of |grad D|^2 / 2 at real images (Mescheder et al. 2018); 0: none, as published
    )
    r1_every_steps: Positive = 1  # the penalty is taken at every n-th step, n times as strong


@dataclass(frozen=True, config=STRICT)
class CodebookConfig:
    """How the table of a vq autoencoder starts and is kept alive."""

    start: Literal["uniform", "kmeans"] = (
        "uniform"  # uniform in +-1/size, as published; or centres of the first latents
    )
    kmeans_rounds: Positive = 10
    # rows that no latent chose in so many steps are put on present latents; 0: never, as published
    revive_after_steps: NotNegative = 0
    usage_window_steps: Positive = 100  # a row counts as used when it was chosen within so many steps
    alarm_usage: Share = 0.05  # a smaller share of used rows is told as collapse


@dataclass(frozen=True, config=STRICT)
class FirstStageConfig:
    """The trained autoencoder that the diffusion model works behind."""

    path: str | None = None  # its run folder
    average: bool = True  # use its averaged weights where it has them
    # latents times one factor (paper), or by mean and std of a channel
    scale: Literal["factor", "channel"] = "factor"
    fixed_factor: float | None = None  # published factor in place of the measured one (0.18215)


@dataclass(frozen=True, config=STRICT)
class DiffusionConfig:
    """The denoising objective (paper, section 3.2)."""

    timesteps: Annotated[int, Field(ge=2)] = 1000
    schedule: Literal["scaled_linear", "linear", "cosine"] = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    prediction: Literal["eps", "v", "x0"] = "eps"
    loss: Literal["l2", "l1"] = "l2"
    zero_terminal_snr: bool = False  # no signal is left at the last timestep (Lin et al. 2023); not with eps
    weighting: Literal["none", "min_snr"] = "none"  # of the timesteps' losses (Hang et al. 2023)
    min_snr_gamma: Annotated[float, Field(gt=0)] = 5.0
    # Times one more draw a channel, added to the noise (Guttenberg 2023); 0 is off, 0.05 to 0.1 usual
    offset_noise: Annotated[float, Field(ge=0)] = 0.0
    # Times one more draw, added to the noise of the input but not of the target (Ning et al. 2023); 0.1 in the paper
    input_perturbation: Annotated[float, Field(ge=0)] = 0.0
    loss_bins: Positive = 4  # loss/bin_1 ... in the metrics: losses by equal ranges of the timesteps
    caption_dropout: Share = 0.1  # share of captions replaced by the null condition while training
    # Share of the samples whose joined channels (spatial=) become zeros while training: sample.spatial_guidance needs it
    spatial_dropout: Share = 0.0
    null_condition: Literal["tokens", "learned"] = "tokens"  # the empty caption, or a trained context
