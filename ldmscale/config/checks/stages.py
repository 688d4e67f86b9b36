"""Faults of a stage as a whole: batch, loss, first stage, latents, pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ldmscale.checkpoint.run_folder import RunFolder, is_foreign
from ldmscale.config import (
    DiffusionConfig,
    DiffusionJob,
    EmaConfig,
    FirstStageConfig,
    FrozenTextConfig,
    LatentsJob,
    PreviewConfig,
    TrainConfig,
    ZeroConfig,
)
from ldmscale.config.checks.autoencoder import check_features
from ldmscale.config.checks.data import check_image_size
from ldmscale.config.typed import differences, plain_part
from ldmscale.errors import ConfigError


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


def batch_of_all(train: Mapping[str, object], world_sizes: Sequence[int]) -> str | None:
    """The fault of a global batch that does not divide by every one of `world_sizes`, with the nearest that does."""
    given, micro = train.get("global_batch"), train.get("rank_micro_batch")
    if not isinstance(given, int) or not isinstance(micro, int) or given < 1 or micro < 1:
        return None
    step = math.lcm(*(micro * size for size in world_sizes))
    if given % step == 0:
        return None
    below, above = given // step * step, (given // step + 1) * step
    near = f"{above}" if below == 0 else f"{below} or {above}"
    return (
        f"train.global_batch={given} is no multiple of train.rank_micro_batch={micro} times each number of ranks that the "
        f"job may start with ({', '.join(map(str, world_sizes))}): give train.global_batch={near}, another "
        "train.rank_micro_batch, or another cluster.min_nodes"
    )


def check_compile(train: TrainConfig, zero: ZeroConfig, checkpointing: Mapping[str, str]) -> list[str]:
    """Where torch.compile of blocks is known to break. `checkpointing` of each trained network, by its key."""
    if train.compile == "off":
        return []
    faults = []
    if zero.stage == 3:
        faults.append(
            "train.compile=blocks with zero.stage=3: the hooks that gather weights cannot be compiled; give zero=0, 1 or 2, "
            "or train.compile=off"
        )
    if train.attention == "xformers":
        faults.append(
            "train.compile=blocks with train.attention=xformers has never been run: give train.attention=sdpa, or "
            "train.compile=off"
        )
    faults += [
        f"train.compile=blocks with {key}=selective: what is kept is chosen among operations that compiled blocks do not show; "
        f"give {key}=full or off, or train.compile=off"
        for key, value in checkpointing.items()
        if value == "selective"
    ]
    return faults


def check_averages(ema: EmaConfig) -> list[str]:
    """Ranges are in the types; what is left is how the settings stand to each other."""
    further = {"ema.decays": ema.decays, "ema.power_widths": ema.power_widths}
    if not ema.enabled:
        return [
            f"{key} is set, but ema.enabled=false keeps no averages: give {key}=[], or ema.enabled=true"
            for key, values in further.items()
            if values
        ]
    faults = []
    for key, values in further.items():
        # Six digits are what an average is called by in checkpoints.
        names = [f"{value:g}" for value in values]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            faults.append(f"{key} has {', '.join(twice)} more than once (six digits count): give each once")
    if f"{ema.decay:g}" in [f"{decay:g}" for decay in ema.decays]:
        faults.append(
            f"ema.decays has {ema.decay:g}, which is ema.decay: that average is kept already; leave it out"
        )
    if ema.store_every_steps and not ema.power_widths:
        faults.append(
            f"ema.store_every_steps={ema.store_every_steps}, but there are no power-function averages to store: give "
            "ema.power_widths=[0.05,0.1], or ema.store_every_steps=0"
        )
    return faults


def check_objective(diffusion: DiffusionConfig) -> list[str]:
    faults = []
    if diffusion.zero_terminal_snr and diffusion.prediction == "eps":
        faults.append(
            "diffusion.zero_terminal_snr=true with prediction=eps: without signal at the last timestep the noise says nothing "
            "about the image; give diffusion.prediction=v (or x0), or diffusion.zero_terminal_snr=false"
        )
    if diffusion.weighting == "min_snr" and diffusion.loss == "l1":
        faults.append(
            "diffusion.weighting=min_snr with diffusion.loss=l1: its weights are those of squared errors (Hang et al. 2023, "
            "equation 8); give diffusion.loss=l2, or diffusion.weighting=none"
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
    if diffusion.caption_dropout / 2 + diffusion.spatial_dropout > 1:
        faults.append(
            f"diffusion.caption_dropout={diffusion.caption_dropout} and spatial_dropout={diffusion.spatial_dropout}: half of "
            "the one and the other together are more than all samples; give less, such as 0.1 and 0.1"
        )
    return faults


def check_latents(config: DiffusionJob) -> list[str]:
    faults = []
    with_images = [] if config.embeddings is None else ["embeddings"]
    if config.spatial is not None:
        with_images.append(f"spatial.kind={config.spatial.kind}")
    for condition in with_images:
        if config.data.kind == "latents":
            faults.append(
                f"{condition} goes with the images, and data.kind=latents has none: give data=shards, data.image_size= and the "
                "shards of images, which are then encoded online"
            )
        if config.preview.prompts:
            faults.append(
                f"preview.prompts is set, but a model with {condition} draws pictures of held-out samples: give "
                "preview.prompts=[]"
            )
    if config.data.kind == "images":
        faults += check_image_size(config.data, config.autoencoder)
        whole = config.autoencoder.factor * 2 ** (len(config.unet.channel_mult) - 1)
        if config.data.bucket_step is not None and config.data.bucket_step % whole:
            faults.append(
                f"data.bucket_step={config.data.bucket_step}: the latents' sides must halve evenly through the U-Net; give "
                f"a multiple of {whole}"
            )
        if config.first_stage.path is None and config.autoencoder.kind != "pixels":
            faults.append(
                "first_stage.path is not set: images need an autoencoder; give the folder of an autoencoder run, or data=latents"
            )
    if config.autoencoder.kind == "pixels":
        faults += [
            f"{key}={value}, but autoencoder.kind=pixels works on the images of shards: give {instead}"
            for key, value, instead in (
                ("first_stage.path", config.first_stage.path, "first_stage.path=null"),
                ("data.kind", config.data.kind, "data=shards and data.image_size="),
            )
            if value not in (None, "images")
        ]
    if config.data.kind == "latents" and (config.data.crop == "random" or config.data.min_crop_share < 1):
        faults.append(
            "data.crop=random or data.min_crop_share below 1: latents are one crop of an image; give data.crop=center "
            "data.min_crop_share=1 data.max_crop_share=1, or data=shards to encode online"
        )
    return faults


def check_stored_text(config: LatentsJob) -> list[str]:
    text = config.text_encoder
    if config.latents.text and not isinstance(text, FrozenTextConfig):
        found = "is not set" if text is None else "is one that is trained, whose outputs change"
        return [
            f"latents.text=true, but text_encoder {found}: give a frozen one, such as text_encoder=clip_l, or latents.text=false"
        ]
    if text is not None and not config.latents.text:
        return [
            "text_encoder is set, but latents.text=false stores none of its outputs: give latents.text=true"
        ]
    return []


def check_first_stage(path: str | None) -> list[str]:
    """The folder of a run, or a model of another format; whether that has an autoencoder is known when it is opened."""
    return [] if path is None or is_foreign(Path(path)) else check_run(path, "first_stage.path")


def check_same_autoencoder(config: DiffusionJob) -> list[str]:
    """The first stage that was trained must be the one that this configuration describes.

    That of a model of another format is compared when it is opened.
    """
    path = config.first_stage.path
    if config.autoencoder.kind == "pixels" or path is None or is_foreign(Path(path)) or check_run(path, ""):
        return []
    trained = RunFolder(path).config().get("autoencoder", {})
    free = ("dropout", "checkpointing")
    found = differences(trained, plain_part(config.autoencoder))
    return [
        f"autoencoder.{key}={here!r}, but {path} was trained with {there!r}: give the autoencoder= of that run"
        for key, (there, here) in found.items()
        if key not in free
    ]


def check_model(path: str, key: str) -> list[str]:
    """A run, one of its checkpoints, or a model in one of the formats that can be imported."""
    known = is_foreign(Path(path)) or (Path(path) / "COMPLETE").is_file()
    return [] if known else check_run(path, key)


def check_run(path: str, key: str) -> list[str]:
    try:
        RunFolder(path).config()
    except ConfigError as error:
        return [f"{key}: {fault}" for fault in error.faults]
    if not any(RunFolder(path).checkpoints.glob("step_*/COMPLETE")):
        return [f"{key}={path}: the run has no complete checkpoint yet; wait for its first save"]
    return []


def check_denoising_validation(config: DiffusionJob) -> list[str]:
    if config.validation.every_steps and config.data.heldout_shards is None:
        return [
            "data.heldout_shards is not set, but validation.every_steps asks for the loss on them: give shards that are not "
            "trained on, or validation.every_steps=0"
        ]
    return []


def check_generation(config: DiffusionJob) -> list[str]:
    chosen = config.generation
    if not chosen.every_steps:
        return []
    faults = [
        f"{key} is not set, but generation.every_steps asks for figures of drawn images{why}: give {what}, or "
        "generation.every_steps=0"
        for key, value, why, what in (
            (
                "data.heldout_shards",
                config.data.heldout_shards,
                " beside held-out ones",
                "shards that are not trained on",
            ),
            (
                "first_stage.path",
                config.first_stage.path,
                ", which the autoencoder decodes",
                "the folder of its run",
            ),
        )
        if value is None
    ]
    if not 1 <= chosen.sampler_steps < config.diffusion.timesteps:
        faults.append(
            f"generation.sampler_steps={chosen.sampler_steps}: expected 1 to {config.diffusion.timesteps - 1}"
        )
    return faults + check_features("generation", chosen.features, chosen.features_weights)


def check_preview(
    preview: PreviewConfig, timesteps: int, first_stage: FirstStageConfig, kind: str
) -> list[str]:
    faults = []
    if preview.every_steps and not 1 <= preview.sampler_steps < timesteps:
        faults.append(f"preview.sampler_steps={preview.sampler_steps}: expected 1 to {timesteps - 1}")
    if preview.every_steps and first_stage.path is None and kind != "pixels":
        faults.append(
            "first_stage.path is not set, but preview.every_steps asks for pictures, which the autoencoder decodes: "
            "give the folder of the autoencoder's run, or preview.every_steps=0"
        )
    return faults
