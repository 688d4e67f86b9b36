"""Faults of networks: widths, levels, heads, parts that do not fit each other."""

from __future__ import annotations

import math
from pathlib import Path

from ldmscale.checkpoint.run_folder import RunFolder
from ldmscale.config import AutoencoderConfig, DiffusionJob, TextEncoderConfig, UNetConfig


def check_widths(name: str, network: AutoencoderConfig | UNetConfig) -> list[str]:
    groups, channels = network.norm_groups, network.channels
    return [
        f"{name}.channels={channels} times {mult} is no multiple of {name}.norm_groups={groups}: "
        f"give {name}.channels={max(1, round(channels / groups)) * groups}"
        for mult in network.channel_mult
        if groups < 1 or round(channels * mult) % groups
    ][:1]


def check_autoencoder(autoencoder: AutoencoderConfig) -> list[str]:
    if autoencoder.kind == "pixels":
        return [
            "autoencoder.kind=pixels has no weights, so there is nothing to train: start the diffusion job with "
            "autoencoder=pixels, or give an autoencoder of kind kl or vq"
        ]
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
        width = round(unet.channels * unet.channel_mult[level]) if level < levels else 0
        for name, divisor in (("heads", unet.heads), ("head_channels", unet.head_channels)):
            if divisor and width % divisor:
                faults.append(
                    f"unet.{name}={divisor} does not divide the {width} channels of level {level}: choose a divisor"
                )
    return faults


def check_class_names(config: DiffusionJob) -> list[str]:
    """A file of class names, which is read when the run begins and kept with it."""
    if RunFolder(config.run.dir).classes.is_file():
        return []
    return [
        f"{section}.names={part.names}: there is no such file; give one, found, or null"
        for section, part in (("class_embedder", config.class_embedder), ("layout", config.layout))
        if part is not None and part.names not in (None, "found") and not Path(str(part.names)).is_file()
    ]


def check_conditions(config: DiffusionJob) -> list[str]:
    """What the U-Net is told must come from one reader of its width, and fill its input channels."""
    unet, latent = config.unet, config.autoencoder.latent_width
    readers = {
        "text_encoder": config.text_encoder,
        "class_embedder": config.class_embedder,
        "embeddings": config.embeddings,
    }
    widths = {name: reader.width for name, reader in readers.items() if reader is not None}
    faults = [
        f"unet.context_dim={unet.context_dim}, but {name}.width={width}: the U-Net attends to it; give "
        f"unet.context_dim={width}"
        for name, width in widths.items()
        if unet.context_dim != width
    ]
    if len(widths) > 1:
        faults.append(
            f"{' and '.join(widths)} would both give the context that the U-Net attends to: give "
            + " or ".join(f"{name}=null" for name in widths)
        )
    if not widths and unet.context_dim is not None:
        faults.append(
            f"unet.context_dim={unet.context_dim}, but nothing gives a context: give text_encoder=, class_embedder= or "
            "embeddings=, or unet.context_dim=null"
        )
    joined = 0 if config.spatial is None else config.spatial.channels
    if unet.out_channels != latent or unet.in_channels != latent + joined:
        reason = f" and spatial.channels={joined}" if joined else ""
        faults.append(
            f"unet.in_channels={unet.in_channels} and out_channels={unet.out_channels}, but the autoencoder's "
            f"latents have {latent} channels{reason}: give unet.in_channels={latent + joined} unet.out_channels={latent}"
        )
    return [*faults, *_check_layout(config), *_check_spatial(config), *_check_null(config)]


def _check_layout(config: DiffusionJob) -> list[str]:
    text, layout = config.text_encoder, config.layout
    reads = isinstance(text, TextEncoderConfig) and text.tokenizer == "layout"
    if layout is None or not isinstance(text, TextEncoderConfig) or not reads:
        if reads == (layout is not None):
            return []
        return [
            "text_encoder.tokenizer=layout, but layout is not set: boxes have classes; give layout=found or layout=openimages"
            if reads
            else "layout is set, but no text_encoder reads it: give text_encoder=bert_layout, or layout=null"
        ]
    faults = []
    if (text.max_tokens - 2) % 3 or text.max_tokens < 5:
        near = max(1, round((text.max_tokens - 2) / 3))
        faults.append(
            f"text_encoder.max_tokens={text.max_tokens}: a layout has 3 tokens for each object and 2 more; give "
            f"text_encoder.max_tokens={3 * near + 2} for {near} objects (published: 92)"
        )
    if layout.classes > text.vocab_size - 1 or math.isqrt(text.vocab_size - 1) < 2:
        most = max(layout.classes, 4) + 1
        faults.append(
            f"text_encoder.vocab_size={text.vocab_size}: it must hold layout.classes={layout.classes}, a grid of positions, and "
            f"one id for no object; give text_encoder.vocab_size={most} or more (published: 8192)"
        )
    if config.preview.prompts:
        faults.append(
            "preview.prompts is set, but a model that reads layouts draws those of held-out samples: give preview.prompts=[]"
        )
    return faults


def _check_spatial(config: DiffusionJob) -> list[str]:
    spatial, latent = config.spatial, config.autoencoder.latent_width
    if spatial is None and config.diffusion.spatial_dropout:
        return [
            f"diffusion.spatial_dropout={config.diffusion.spatial_dropout}, but nothing is joined to the latent: give "
            "diffusion.spatial_dropout=0, or spatial=superres, semantic or inpainting"
        ]
    if spatial is None:
        return []
    faults = []
    if spatial.kind == "map" and spatial.map_classes is None:
        faults.append(
            "spatial.map_classes is not set: a map needs the number of its classes; give spatial.map_classes=182"
        )
    if spatial.kind != "map" and (spatial.map_classes is not None or spatial.halvings):
        faults.append(
            f"spatial.map_classes or spatial.halvings is set, but spatial.kind={spatial.kind}: remove them, or give "
            "spatial.kind=map"
        )
    for name, given, default, kind in (
        ("map_member", spatial.map_member, "map.png", "map"),
        ("degradation", spatial.degradation, "bicubic", "image"),
        ("noise", spatial.noise, 0.0, "image"),
        ("masks", spatial.masks, ("thin", "medium", "thick"), "masked"),
    ):
        if spatial.kind != kind and given != default:
            faults.append(
                f"spatial.{name} is set, but spatial.kind={spatial.kind} does not read it: remove it, or give "
                f"spatial.kind={kind}"
            )
    if spatial.kind == "masked" and not spatial.masks:
        faults.append("spatial.masks=[] draws no hole: give spatial.masks=[thin,medium,thick]")
    if spatial.kind == "image" and spatial.channels != config.autoencoder.image_channels:
        faults.append(
            f"spatial.channels={spatial.channels}, but a small image has {config.autoencoder.image_channels}: give "
            f"spatial.channels={config.autoencoder.image_channels}"
        )
    if spatial.kind == "masked" and spatial.channels != latent + 1:
        faults.append(
            f"spatial.channels={spatial.channels}, but a masked image's latent and its mask have {latent + 1}: give "
            f"spatial.channels={latent + 1}"
        )
    return faults


def _check_null(config: DiffusionJob) -> list[str]:
    classes, diffusion = config.class_embedder, config.diffusion
    if classes is None or classes.null_class or diffusion.null_condition == "learned":
        return []
    return [
        f"{key} needs a null condition, and class_embedder.null_class=false has none: give {key}={off}, "
        "class_embedder.null_class=true or diffusion.null_condition=learned"
        for key, asked, off in (
            ("diffusion.caption_dropout", diffusion.caption_dropout > 0, 0),
            ("preview.guidance", config.preview.every_steps and config.preview.guidance != 1, 1),
        )
        if asked
    ]
