"""The networks: constructor arguments, as the published configurations give them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from ldmscale.config.schema import STRICT, NotNegative, Positive, Share

# What is kept for the backward pass: everything; inputs of blocks and results of attention; inputs of blocks
Checkpointing = Literal["off", "selective", "full"]


@dataclass(frozen=True, config=STRICT)
class AutoencoderConfig:
    """First stage: the constructor arguments of KLAutoencoder or VQAutoencoder (paper, section 3.1, tables 8 and 9)."""

    # pixels: no autoencoder, the diffusion model works on images (LDM-1); only the channels are read then
    kind: Literal["kl", "vq", "pixels"]
    latent_channels: int
    channels: int  # width of the first level
    channel_mult: tuple[int | float, ...]  # width of each level, times `channels`; f = 2^(levels-1)
    blocks_per_level: int
    attention_levels: tuple[int, ...] = ()  # level numbers, 0 = full resolution
    mid_attention: bool = True
    dropout: float = 0.0
    image_channels: int = 3
    codebook_size: int | None = None  # vq only
    codebook_dim: int | None = (
        None  # vq only: width of a row; null: latent_channels, as in every published model
    )
    commitment: float = 0.25  # vq only
    # of every normalisation; narrow networks need fewer, or a group is a single channel
    norm_groups: int = 32
    checkpointing: Checkpointing = "off"

    @property
    def latent_width(self) -> int:
        """Channels of what the diffusion model sees."""
        return self.latent_channels if self.codebook_dim is None else self.codebook_dim

    @property
    def factor(self) -> int:
        """Pixels along one side of a latent position."""
        return int(2 ** (len(self.channel_mult) - 1))


@dataclass(frozen=True, config=STRICT)
class UNetConfig:
    """Constructor arguments of the U-Net (paper, tables 12 to 15)."""

    in_channels: int  # of the latent, with concatenated conditions
    out_channels: int
    channels: int  # width of the first level
    channel_mult: tuple[int | float, ...]
    blocks_per_level: int
    attention_levels: tuple[int, ...]  # level numbers, 0 = full latent resolution
    heads: int | None = None  # either the number of heads ...
    head_channels: int | None = None  # ... or the channels of one
    context_dim: int | None = None  # width of the cross-attended condition; null: plain self-attention blocks
    transformer_depth: int = 1
    residual_updown: bool = False
    scale_shift_norm: bool = False  # the time vector scales and shifts, instead of being added
    dropout: float = 0.0
    norm_groups: int = 32
    checkpointing: Checkpointing = "off"


@dataclass(frozen=True, config=STRICT)
class ImportedUNetConfig(UNetConfig):
    """A U-Net of a model that was imported. No training of ours gives labels to the time vector."""

    num_classes: int | None = None  # classes whose vectors are added to the time vector


@dataclass(frozen=True, config=STRICT)
class TextEncoderConfig:
    """The text transformer that is trained jointly with the U-Net (CompVis' BERTEmbedder). It reads captions or layouts."""

    kind: Literal["bert"]
    tokenizer: str  # a hub name, a folder, "train": a WordPiece of the shards' captions, stored with the run; or "layout"
    max_tokens: int
    width: int
    layers: int
    heads: int
    head_channels: int
    vocab_size: int
    feedforward_mult: int = 4
    dropout: float = 0.0
    checkpointing: Checkpointing = "off"


@dataclass(frozen=True, config=STRICT)
class FrozenTextConfig:
    """A pretrained text encoder that is read and not trained, with its own tokenizer, through the transformers library."""

    kind: Literal["clip", "t5"]
    path: str  # a hub name, or a folder that holds model and tokenizer
    width: Positive  # of its vectors: config.json's hidden_size (CLIP) or d_model (T5)
    max_tokens: Positive  # of a caption, which is filled up or cut
    dtype: Literal["fp32", "bf16"] = "fp32"  # that it computes in, whatever train.precision is
    # Encode every caption once, before the first step, into the run's text_embeddings/, and train without the encoder:
    # for sets whose distinct captions take little room (4 x max_tokens x width bytes each)
    precompute: bool = False
    precompute_max_gib: Annotated[float, Field(gt=0)] = 16.0


@dataclass(frozen=True, config=STRICT)
class ClassEmbedderConfig:
    """One vector a class, read by cross-attention (CompVis' ClassEmbedder)."""

    classes: Positive
    width: Positive
    # null: labels are numbers. "found": names, as many as the shards have, in alphabetical order. Or a file of one name a
    # line. Stored with the run.
    names: str | None = None
    null_class: bool = True  # one row more, for "no class": guidance needs it, or a learned null condition


@dataclass(frozen=True, config=STRICT)
class LayoutConfig:
    """Boxes with classes, which a text transformer reads as tokens (text_encoder.tokenizer=layout)."""

    classes: Positive
    names: str | None = None  # as of class_embedder


@dataclass(frozen=True, config=STRICT)
class EmbeddingsConfig:
    """A context that comes with the data: embeddings of neighbours in retrieval-augmented models."""

    width: Positive
    max_tokens: Positive  # embeddings of one sample, at most
    member: str = "embeddings.npy"  # of a sample: floats [embeddings, width]


@dataclass(frozen=True, config=STRICT)
class SpatialConfig:
    """A condition that is joined to the latent as channels (paper, section 3.3)."""

    # a map of classes; a small image; the image with a hole, encoded, and the hole's mask
    kind: Literal["map", "image", "masked"]
    channels: Positive  # joined: unet.in_channels is the latent's and these
    map_classes: Positive | None = None  # map: classes, brought to `channels` by a 1x1 convolution
    halvings: NotNegative = 0  # map: of height and width, until it has the latent's size
    map_member: str = "map.png"  # map: member of a sample, a grey or palette PNG of class numbers
    # image: how the small image is made of the one that is trained on (data/conditions/spatial.py)
    degradation: Literal["bicubic", "blind"] = "bicubic"
    # image: strength of the noise that is added to it, drawn from 0 to this, in units of [-1, 1]; released: none
    noise: Share = 0.0
    # masked: holes that are drawn, each kind as often (data/conditions/spatial.py)
    masks: tuple[Literal["thin", "medium", "thick"], ...] = ("thin", "medium", "thick")
