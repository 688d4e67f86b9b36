"""What is drawn from a trained model, and how the quickstart scores it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from ldmscale.config.schema import STRICT, NotNegative, Positive, PositiveNumber, Prompt, Share


@dataclass(frozen=True, config=STRICT)
class SampleConfig:
    """What is drawn from a trained model."""

    model: str  # run folder
    # A prompt, a list, a file of one prompt a line, or "-" for standard input; null: the names of `condition`
    prompts: Prompt | tuple[Prompt, ...] | None
    out: str | None  # folder for PNGs and the grid; the samples/drawn of the model unless given
    # A folder, a file or a list of files, each the condition of one prompt (inference/condition_files.py)
    condition: str | tuple[str, ...] | None = None
    steps: Positive = 50
    sampler: Literal["ddim", "ddpm", "plms", "dpmpp_2m", "euler"] = "ddim"
    # Of the timesteps (Lin et al. 2023, table 2); null: the sampler's published one
    spacing: Literal["leading", "trailing", "linspace"] | None = None
    eta: Share = 0.0  # of ddim; 0: deterministic, 1: the noise of ddpm
    guidance: float = 5.0  # on the caption or class; 1: as trained
    # On what is joined to the latent (InstructPix2Pix, eq. 3), of models trained with diffusion.spatial_dropout; 1: as trained
    spatial_guidance: float = 1.0
    # Share of the guided prediction that gets back the conditional one's spread (Lin et al. 2023)
    guidance_rescale: Share = 0.0
    # What guidance moves away from: one for all, or a list or file of one for each prompt; null: the null condition
    negative_prompts: Prompt | tuple[Prompt, ...] | None = None
    height: Positive | None = None  # of the images in pixels; null: as trained
    width: Positive | None = None
    # Width over height: the nearest of the shapes that a model with aspect-ratio buckets was trained with, in place of both
    aspect_ratio: PositiveNumber | None = None
    image: str | None = None  # a file to start from (image-to-image), or to keep in part
    strength: float | None = None  # share of the steps that change `image`; null: 0.75, and 1 with a mask
    mask: str | None = None  # a file, white where `image` is drawn anew (inpainting)
    # Side of the tiles that an image with more pixels is decoded in (and encoded, where one is given); null: whole. Each tile
    # is read with some 50 to 100 pixels around it, so that smaller ones than 32 would never end
    decode_tile_pixels: Annotated[int, Field(ge=32)] | None = None
    images_per_prompt: Positive = 1
    first_seed: NotNegative = 0
    # Every image its own seed, as sets for metrics need; else the images of each prompt begin at first_seed
    distinct_seeds: bool = False
    ema: bool | str = True  # true, false, or another average by its name: ema_0.999, power_0.08
    rank_batch: Positive = 16
    precision: Literal["bf16", "fp32"] = "fp32"


@dataclass(frozen=True, config=STRICT)
class ScoreConfig:
    """How the quickstart measures what it trained."""

    sampler_steps: Positive = 50
    guidance: float = 3.0
    nearest: Positive = 5  # an image counts as found when it is among so many nearest ones
    # Drawn and scored, evenly chosen: a large folder has more captions than a CPU can draw.
    max_captions: Positive = 1000
    grid_prompts: Annotated[int, Field(ge=2)] = 12


@dataclass(frozen=True, config=STRICT)
class EvaluateConfig:
    """One evaluation. Every choice is written into its result."""

    model: str  # a run folder, one of its checkpoints, or an imported model
    kind: Literal["reconstruction"] = "reconstruction"  # of the images in data.shards by the autoencoder
    ema: bool = True  # averaged weights where the model has them
    samples: Positive | None = None  # the first so many of the shards; null: all
    out: str | None = None  # the result, JSON; <model>/evaluation/<kind>.json unless given
    rank_batch: Positive = 16
    precision: Literal["bf16", "fp32"] = "fp32"
    # the perceptual distance; its weights as in loss.perceptual_weights
    perceptual: Literal["lpips_vgg16", "efficientnet_lite0", "none"] = "none"
    perceptual_weights: str | None = None
    perceptual_weights_sha256: str | None = None
    perceptual_heads: str | None = None
    perceptual_min_side: int = 64
    # whose features the Frechet distance is of, and is named after
    features: Literal["efficientnet_lite0", "inception_fid", "none"] = "none"
    features_weights: str | None = None  # null: the installed package's; inception_fid: its file
    features_weights_sha256: str | None = None  # null: of the published file
