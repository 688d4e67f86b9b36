"""Whatever an export refuses, its message says what to do instead."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ldmscale.config import (
    AutoencoderConfig,
    ClassEmbedderConfig,
    DiffusionConfig,
    ImportedUNetConfig,
    SpatialConfig,
    TextEncoderConfig,
)
from ldmscale.errors import ConfigError
from ldmscale.interop.compvis import unwritable
from ldmscale.interop.diffusers_folder import write_folder
from ldmscale.interop.model import Model, Part
from ldmscale.models.first_stage import LatentScale

UNET = ImportedUNetConfig(in_channels=4, out_channels=4, channels=32, channel_mult=(1,), blocks_per_level=1,
                          attention_levels=(), heads=1)  # fmt: skip
FIRST = AutoencoderConfig(kind="kl", latent_channels=4, channels=32, channel_mult=(1, 2), blocks_per_level=1)
TEXT = TextEncoderConfig(
    kind="bert", tokenizer="train", max_tokens=77, width=8, layers=1, heads=1, head_channels=8, vocab_size=9
)
ONE = LatentScale(torch.zeros(4), torch.full((4,), 0.5))
BY_CHANNEL = LatentScale(torch.zeros(4), torch.tensor([0.5, 0.6, 0.7, 0.8]))


def model(**changed) -> Model:
    parts = {"unet": UNET, "autoencoder": FIRST, **changed.pop("parts", {})}
    described = {name: Part(config, {}) for name, config in parts.items() if config is not None}
    return Model(parts=described, **{"diffusion": DiffusionConfig(), "scale": ONE, **changed})


REFUSED = {
    "groups": (model(parts={"unet": replace(UNET, norm_groups=16)}), "compvis", "unet.norm_groups=32"),
    "groups of the first stage": (
        model(parts={"autoencoder": replace(FIRST, norm_groups=8)}), "compvis", "autoencoder.norm_groups=32",
    ),
    "widths": (model(parts={"unet": replace(UNET, channel_mult=(1, 1.5))}), "compvis", "format=diffusers"),
    "velocity": (model(diffusion=DiffusionConfig(prediction="v")), "compvis", "format=diffusers"),
    "two readers": (
        model(parts={"text_encoder": TEXT, "spatial_rescaler": SpatialConfig(kind="map", channels=3, map_classes=2)}),
        "compvis", "parts=[unet,autoencoder]",
    ),
    "no unet": (model(parts={"unet": None, "text_encoder": TEXT}), "compvis", "parts="),
    "scale by channel, compvis": (model(scale=BY_CHANNEL), "compvis", "first_stage.scale=factor"),
    "scale by channel, diffusers": (model(scale=BY_CHANNEL), "diffusers", "first_stage.scale=factor"),
    "learned null, compvis": (model(learned_null=True), "compvis", "diffusion.null_condition=tokens"),
    "learned null, diffusers": (model(learned_null=True), "diffusers", "diffusion.null_condition=tokens"),
    "classes": (
        model(parts={"class_embedder": ClassEmbedderConfig(classes=2, width=8)}), "diffusers", "parts=[unet,autoencoder]",
    ),
    "resampling by blocks": (
        model(parts={"unet": replace(UNET, residual_updown=True, context_dim=8)}), "diffusers", "format=compvis",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_every_refusal_names_its_remedy(tmp_path: Path, case: str) -> None:
    refused, form, remedy = REFUSED[case]
    if form == "compvis":
        faults = unwritable(refused)
    else:
        with pytest.raises(ConfigError) as error:
            write_folder(refused, tmp_path, ema=True)
        faults = list(error.value.faults)
    assert (
        len(faults) == 1
        and remedy in faults[0]
        and ("give " in faults[0] or "train with" in faults[0] or "parts=" in faults[0])
    )
