"""Faults of networks: widths, levels, heads, parts that do not fit each other."""

from __future__ import annotations

from ldmscale.config import AutoencoderConfig, TextEncoderConfig, UNetConfig


def check_widths(name: str, network: AutoencoderConfig | UNetConfig) -> list[str]:
    groups, channels = network.norm_groups, network.channels
    return [
        f"{name}.channels={channels} times {mult} is no multiple of {name}.norm_groups={groups}: "
        f"give {name}.channels={max(1, round(channels / groups)) * groups}"
        for mult in network.channel_mult
        if groups < 1 or channels * mult % groups
    ][:1]


def check_autoencoder(autoencoder: AutoencoderConfig) -> list[str]:
    faults = check_widths("autoencoder", autoencoder)
    levels = len(autoencoder.channel_mult)
    if wrong := [level for level in autoencoder.attention_levels if not 0 <= level < levels]:
        faults.append(
            f"autoencoder.attention_levels has {wrong}: this autoencoder's levels are 0 to {levels - 1}"
        )
    if autoencoder.kind == "vq" and autoencoder.codebook_size is None:
        faults.append(
            "autoencoder.codebook_size is not set: a vq autoencoder needs it; give autoencoder.codebook_size=8192"
        )
    if autoencoder.kind == "kl" and autoencoder.codebook_size is not None:
        faults.append(
            "autoencoder.codebook_size is set, but a kl autoencoder has no codebook: remove it or give autoencoder.kind=vq"
        )
    if autoencoder.kind == "kl" and autoencoder.codebook_dim is not None:
        faults.append(
            "autoencoder.codebook_dim is set, but a kl autoencoder has no codebook: give autoencoder.codebook_dim=null"
        )
    return faults


def check_unet(unet: UNetConfig) -> list[str]:
    faults = check_widths("unet", unet)
    if (unet.heads is None) == (unet.head_channels is None):
        faults.append(
            f"unet.heads={unet.heads} and unet.head_channels={unet.head_channels}: give exactly one of them, the other null"
        )
    levels = len(unet.channel_mult)
    if wrong := [level for level in unet.attention_levels if not 0 <= level < levels]:
        faults.append(f"unet.attention_levels has {wrong}: this U-Net's levels are 0 to {levels - 1}")
    for level in unet.attention_levels:
        width = unet.channels * unet.channel_mult[level] if level < levels else 0
        for name, divisor in (("heads", unet.heads), ("head_channels", unet.head_channels)):
            if divisor and width % divisor:
                faults.append(
                    f"unet.{name}={divisor} does not divide the {width} channels of level {level}: choose a divisor"
                )
    return faults


def check_condition(unet: UNetConfig, text: TextEncoderConfig) -> list[str]:
    faults = []
    if unet.context_dim != text.width:
        faults.append(
            f"unet.context_dim={unet.context_dim}, but text_encoder.width={text.width}: the U-Net attends to the text "
            f"encoder's output; give unet.context_dim={text.width}"
        )
    return faults
