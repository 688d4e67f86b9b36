"""Configurations of the measured networks: those of the published experiments, or narrow ones for quick runs."""

from __future__ import annotations

from collections.abc import Sequence

from ldmscale.config import AutoencoderJob, DiffusionJob
from ldmscale.config.compose import compose_job
from ldmscale.config.typed import read

# A tenth of the width: every module and every tensor of the 1.45B model is there, and arithmetic is nothing.
NARROW = (
    "unet.channels=32",
    "unet.context_dim=128",
    "text_encoder.width=128",
    "text_encoder.heads=2",
    "text_encoder.head_channels=26",
    "text_encoder.vocab_size=3052",
)
# Two levels, one block per level and one text layer: the same calls per module, of which there are few.
SMALL = (
    "unet.channels=64",
    "unet.context_dim=64",
    "unet.channel_mult=[1,2]",
    "unet.attention_levels=[0,1]",
    "unet.blocks_per_level=1",
    "text_encoder.width=64",
    "text_encoder.heads=2",
    "text_encoder.head_channels=32",
    "text_encoder.layers=1",
    "text_encoder.vocab_size=1000",
)
SMALL_AUTOENCODER = ("autoencoder.channels=32",)


def diffusion(
    overrides: Sequence[str] = (), *, experiment: str = "ldm_text2img_1p45b", checkpointing: str = "off"
) -> DiffusionJob:
    """The job `diffusion` of an experiment that reads text, with one `checkpointing` for U-Net and text encoder."""
    kept = [f"{part}.checkpointing={checkpointing}" for part in ("unet", "text_encoder")]
    needed = ["data.shards=none", "first_stage.path=none"]
    return read(
        DiffusionJob, compose_job("diffusion", [f"experiment={experiment}", *needed, *kept, *overrides])
    )


def autoencoder(overrides: Sequence[str] = (), *, experiment: str = "autoencoder_kl_f8") -> AutoencoderJob:
    """The job `autoencoder` of an experiment."""
    needed = ["data.shards=none", "loss.perceptual_weights=none", "loss.perceptual_heads=none"]
    return read(AutoencoderJob, compose_job("autoencoder", [f"experiment={experiment}", *needed, *overrides]))
