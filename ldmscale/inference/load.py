"""`load` and `build`: a model as its parts, for notebooks, sampling and other tools."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmscale.builders.networks import (
    build_autoencoder,
    build_denoiser,
    build_first_stage,
    build_schedule,
    open_text_encoder,
)
from ldmscale.checkpoint.manager import newest_checkpoint
from ldmscale.checkpoint.run_folder import RunFolder, is_foreign
from ldmscale.checkpoint.shards import Reader, state_of
from ldmscale.config import AutoencoderJob, DiffusionJob, FrozenTextConfig, TextEncoderConfig
from ldmscale.config.compose import compose_job
from ldmscale.config.folders import config_folder
from ldmscale.config.typed import read
from ldmscale.data.conditions.annotations import ClassLabels
from ldmscale.data.conditions.boxes import LayoutTokens
from ldmscale.data.tokenizers.bert import Tokenizer
from ldmscale.data.tokenizers.pretrained import EncoderTokenizer
from ldmscale.errors import CheckpointError, ConfigError
from ldmscale.inference.averages import average_taken, chosen_weights
from ldmscale.inference.parts import Parts
from ldmscale.models.first_stage import LatentScale, digest

log = logging.getLogger(__name__)


def build(experiment: str, overrides: Sequence[str] = (), device: str = "meta") -> Parts:
    """The untrained parts of conf/experiment/<experiment>.yaml, on `device`.

    Raises ConfigError where there is no such experiment, or where an override cannot be applied.
    """
    text = config_folder() / "experiment" / f"{experiment}.yaml"
    jobs = [
        job for job in ("diffusion", "autoencoder") if (text.parent / f"{experiment}_{job}.yaml").is_file()
    ]
    if text.is_file():
        jobs = ["diffusion" if "/unet:" in text.read_text() else "autoencoder"]
    if not jobs:
        names = sorted(p.stem for p in text.parent.glob("*.yaml"))
        raise ConfigError(f"there is no experiment {experiment!r}: choose one of {', '.join(names)}")
    values = compose_job(jobs[0], [f"experiment={experiment}", *overrides])
    with torch.device(device):
        if jobs[0] == "autoencoder":
            return Parts(autoencoder=build_autoencoder(read(AutoencoderJob, _lenient(values)).autoencoder))
        config = read(DiffusionJob, _lenient(values))
        denoiser = build_denoiser(config)
        return Parts(
            unet=denoiser.unet,
            autoencoder=build_first_stage(config.autoencoder),
            text_encoder=denoiser.reads_text,
            class_embedder=denoiser.class_embedder,
            spatial_rescaler=denoiser.spatial_rescaler,
            schedule=build_schedule(config.diffusion),
            denoiser=denoiser,
            prediction=config.diffusion.prediction,
            spatial=None if config.spatial is None else config.spatial.kind,
            spatial_dropout=config.diffusion.spatial_dropout,
            caption_dropout=config.diffusion.caption_dropout,
        )


def load(path: str | Path, ema: bool | str = True, dtype: torch.dtype = torch.float32) -> Parts:
    """The parts of a run folder, by its newest complete checkpoint, of one checkpoint, or of a foreign model; on the CPU.

    Args:
        path: the folder of an autoencoder or diffusion run, or one of its checkpoints/step_*; an imported model's folder;
            a diffusers folder; a CompVis .ckpt or .safetensors with its yaml beside it.
        ema: averaged weights where the run kept them, raw ones otherwise; or the name of another average: "ema_0.999"
            of ema.decays, or "power_0.08" of any relative width, made from the stored power-function averages.
        dtype: of the weights; the autoencoder of a diffusion run stays in float32 (half precision blurs and overflows),
            a frozen text encoder in the format that it was trained with.

    Raises:
        ConfigError: the folder is no run, and no model of another format.
        DataError: a model of another format is not whole, or cannot be followed.
        CheckpointError: the run has no complete checkpoint, or it does not fit the configuration.
    """
    given = Path(path)
    if is_foreign(given):
        from ldmscale.inference.load_foreign import load_model

        return load_model(given, ema, dtype)
    checkpoint = given if (given / "manifest.json").is_file() and given.name.startswith("step_") else None
    folder = RunFolder(given if checkpoint is None else given.parent.parent)
    values = folder.config()
    checkpoint = checkpoint or newest_checkpoint(folder.checkpoints)
    if checkpoint is None:
        raise CheckpointError(f"{folder.path} has no complete checkpoint yet: wait for the run's first save")
    reader = Reader(checkpoint)
    if values.get("job") == "autoencoder":
        autoencoder = read(AutoencoderJob, values)
        with state_of(checkpoint):
            return _load_autoencoder(autoencoder, reader, ema, dtype)
    diffusion = read(DiffusionJob, values)
    with state_of(checkpoint):
        return _load_diffusion(diffusion, folder, reader, ema, dtype)


def _load_autoencoder(config: AutoencoderJob, reader: Reader, ema: bool | str, dtype: torch.dtype) -> Parts:
    autoencoder = build_autoencoder(config.autoencoder)
    _fill(autoencoder, chosen_weights(reader, "generator", ema))
    autoencoder.requires_grad_(False).eval().to(dtype)
    return Parts(
        autoencoder=autoencoder,
        autoencoder_average=average_taken(reader, "generator", ema),
        latent_statistics=reader.state["stage"]["latent_statistics"],
    )


def _load_diffusion(
    config: DiffusionJob, folder: RunFolder, reader: Reader, ema: bool | str, dtype: torch.dtype
) -> Parts:
    stage, text = reader.state["stage"], config.text_encoder
    frozen = None
    if isinstance(text, FrozenTextConfig):
        # Where the last start found it: the folder may have moved since config.yaml was written.
        noted = folder.identity().get("text_encoder", {})
        frozen = open_text_encoder(replace(text, path=noted.get("path", text.path)))
    if frozen is not None and frozen.digest() != stage["text_encoder"]:
        raise CheckpointError(
            f"{folder.path} was trained with the text encoder {stage['text_encoder']}, and the one that its run.json names "
            f"now holds {frozen.digest()}: give it its files of then back"
        )
    denoiser = build_denoiser(config, frozen_text=frozen)
    _fill(denoiser, chosen_weights(reader, "denoiser", ema))
    denoiser.requires_grad_(False).eval().to(dtype)
    first_stage = Parts()
    if config.autoencoder.kind == "pixels":
        first_stage = Parts(autoencoder=build_first_stage(config.autoencoder))
    elif config.first_stage.path:
        first_stage = load(config.first_stage.path, config.first_stage.average)
    if first_stage.autoencoder is not None and digest(first_stage.autoencoder) != stage["autoencoder"]:
        raise CheckpointError(
            f"{folder.path} was trained behind the autoencoder {stage['autoencoder']}, and {config.first_stage.path} "
            f"now holds {digest(first_stage.autoencoder)}: was it trained on? Give it back its checkpoint of then"
        )
    channels, height, width = stage["latent_shape"]
    tokenizer: Tokenizer | EncoderTokenizer | None = None
    if isinstance(text, FrozenTextConfig):
        tokenizer = EncoderTokenizer.load(folder.tokenizer, text.max_tokens)
    elif text is not None and config.layout is None:
        tokenizer = Tokenizer.load(folder.tokenizer, text.max_tokens)
    layout = None
    if isinstance(text, TextEncoderConfig) and config.layout is not None:
        layout = LayoutTokens(ClassLabels.load(folder.classes), text.max_tokens, text.vocab_size)
    return Parts(
        unet=denoiser.unet,
        autoencoder=first_stage.autoencoder,
        autoencoder_average=first_stage.autoencoder_average,
        text_encoder=denoiser.reads_text,
        class_embedder=denoiser.class_embedder,
        spatial_rescaler=denoiser.spatial_rescaler,
        classes=None if config.class_embedder is None else ClassLabels.load(folder.classes),
        layout=layout,
        tokenizer=tokenizer,
        schedule=build_schedule(config.diffusion),
        denoiser=denoiser,
        scale=LatentScale.from_plain(stage["latent_scale"]),
        latent_shape=(channels, height, width),
        latent_shapes=tuple((c, h, w) for c, h, w in stage.get("latent_shapes", ())),
        prediction=config.diffusion.prediction,
        spatial=None if config.spatial is None else config.spatial.kind,
        spatial_dropout=config.diffusion.spatial_dropout,
        caption_dropout=config.diffusion.caption_dropout,
    )


def _fill(network: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    missing, unknown = network.load_state_dict(weights, strict=False)
    if missing or unknown:
        raise CheckpointError(
            f"the checkpoint does not fit config.yaml: it lacks {missing[:3]} and has {unknown[:3]} besides; "
            "was config.yaml changed by hand?"
        )


def _lenient(values: dict[str, Any]) -> dict[str, Any]:
    """Without the values that only a run needs (shards, weights of the perceptual network)."""
    settled: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            settled[key] = _lenient(value)
        else:
            settled[key] = "" if value == "???" else value
    return settled
