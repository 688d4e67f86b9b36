"""Models in the formats of others."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from ldmscale.config.schema.losses import DiffusionConfig
from ldmscale.config.schema.models import ClassEmbedderConfig, SpatialConfig, TextEncoderConfig, UNetConfig
from ldmscale.config.schema.values import STRICT, Positive

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
    unet: UNetConfig | HeadsConfig
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
