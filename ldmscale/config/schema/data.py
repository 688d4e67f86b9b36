"""What is read and what is written: shards, captioned images, latents."""

from __future__ import annotations

from dataclasses import field
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from ldmscale.config.schema import STRICT, NotNegative, Positive, PositiveNumber, Share


@dataclass(frozen=True, config=STRICT)
class WeightedShardsConfig:
    """One set of a mixture."""

    shards: str | tuple[str, ...]  # as data.shards
    weight: PositiveNumber | None = (
        None  # share of the samples drawn, before normalising; null: by number of samples
    )


@dataclass(frozen=True, config=STRICT)
class StorageConfig:
    """How s3://, gs:// and http(s):// URLs are reached: shards, latents.path and checkpoint.url. Credentials: best left to
    each backend's environment.
    """

    endpoint: str | None = None  # URL of an S3- or GCS-compatible store
    options: dict[str, Any] = field(default_factory=dict)  # of fsspec's filesystem; written into config.yaml
    patience_seconds: PositiveNumber = 120.0  # a read without success for so long stops the run
    request_seconds: PositiveNumber = 20.0  # limit of one try


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """Which shards are read, and how a sample of theirs becomes a training item."""

    # brace pattern, glob, URL, a list of them, or a mixture: a list of {shards: ..., weight: ...}
    shards: str | tuple[str, ...] | tuple[WeightedShardsConfig, ...]
    kind: Literal["images", "latents"] = "images"  # what the tars hold
    # of latents that have them: read the frozen text encoder's stored outputs in place of running it
    stored_text: bool = True
    # never trained on: pictures while training are of these
    heldout_shards: str | tuple[str, ...] | None = None
    # pixels of the square that the short side is resized to; null: of latents and evaluate, that of the model that they read
    image_size: Positive | None = None
    crop: Literal["center", "random"] = "center"
    # least and most of the sides of the largest crop that a crop takes; 0.5 and 1: a random zoom of up to two
    min_crop_share: Share = 1.0
    max_crop_share: Share = 1.0
    flip: bool = False  # mirror half of the images (never where captions say left and right)
    decoder: Literal["pillow", "turbo"] = "pillow"  # of JPEGs; turbo is faster and needs ldmscale[fast]
    caption: str = "txt"  # "txt", or "json:KEY"
    label: str = "json:label"  # "cls", or "json:KEY"; read where there is a class_embedder
    boxes: str = "json:boxes"  # "json:KEY"; read where there is a layout
    filter: str | None = None  # condition on keys of the json: "similarity > 0.3 and punsafe < 0.5"
    min_caption_words: NotNegative = 0
    max_caption_words: Positive | None = None
    min_image_side: NotNegative = 0  # pixels of the short side, by the image's header
    bucket_step: Positive | None = (
        None  # pixels; sides of aspect-ratio buckets are multiples of it; null: squares
    )
    bucket_max_ratio: PositiveNumber = 2.0  # widest and tallest bucket
    workers: NotNegative = 2  # loading processes a rank; 0 loads in the training process
    shuffle_block_shards: Positive = 16  # samples are shuffled within blocks of so many shards
    max_pixels: Positive = 89_000_000  # larger images are refused by their header, before decoding
    max_bad_share: Share = 0.01  # a larger share of unreadable samples, over all ranks, stops the run
    max_bad_in_a_row: Positive = 100  # more unreadable samples one after another on a rank stop the run
    allow_pipe: bool = False  # pipe: URLs run a shell command
    storage: StorageConfig = field(default_factory=StorageConfig)
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

    path: str  # folder that receives them, or s3://BUCKET/PREFIX
    dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    kind: Literal["moments", "sample"] = (
        "moments"  # of a KL autoencoder: its posterior, or one draw from it for ever
    )
    flips: bool = False  # the mirrored images' latents, too, so that training may flip
    tokenizer: str | None = None  # its folder or name: token ids are stored, too
    max_tokens: Positive = 77  # of a caption, with the tokenizer
    # What the frozen text_encoder makes of the captions, so that training need not run it: 2 x max_tokens x width bytes a sample
    text: bool = False
    rank_batch: Positive = 16  # images encoded at a time
    claim_timeout_seconds: PositiveNumber = (
        120.0  # a claim of another host without a sign of life for so long is void
    )
