"""What is read and what is written: shards, captioned images, latents."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from ldmscale.config.values import STRICT, NotNegative, Positive, Share


@dataclass(frozen=True, config=STRICT)
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


@dataclass(frozen=True, config=STRICT)
class SourceConfig:
    """Where the quickstart takes its captioned images from."""

    source: Literal["sprites", "folder"]
    root: str | None = None  # folder: of images; sprites: a wheel or folder that is here already
    image_size: Positive = 32  # pixels
    heldout_share: Share = 0.08  # share of the images that are kept from training


@dataclass(frozen=True, config=STRICT)
class EncoderConfig:
    """The trained autoencoder that makes latents."""

    path: str  # its run folder
    average: bool = True  # use its averaged weights where it has them


@dataclass(frozen=True, config=STRICT)
class LatentsConfig:
    """How shards of images become shards of latents."""

    path: str  # folder that receives them
    dtype: Literal["fp16", "fp32"] = "fp16"
    rank_batch: Positive = 16  # images encoded at a time
