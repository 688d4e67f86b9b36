"""Faults that need more than one key, or a look at the disk, to be seen. Nothing here touches a device or a process group.

Each check returns sentences: what was found, what was expected, what to do.
"""

from __future__ import annotations

from ldmscale.config import (
    AutoencoderJob,
    DiffusionJob,
    DoctorJob,
    EvaluateJob,
    ExportJob,
    ImportJob,
    IndexJob,
    Job,
    LatentsJob,
    QuickstartJob,
    SampleJob,
    SubmitJob,
    TextEncoderConfig,
    WandbSyncJob,
)
from ldmscale.config.checks.autoencoder import (
    check_evaluation,
    check_loss,
    check_perceptual,
    check_rate,
    check_validation,
)
from ldmscale.config.checks.cluster import check_cluster, check_doctor, check_replay
from ldmscale.config.checks.data import (
    check_fixed_view,
    check_image_size,
    check_run,
    check_shards,
    check_source,
    check_writable,
)
from ldmscale.config.checks.networks import check_autoencoder, check_class_names, check_conditions, check_unet
from ldmscale.config.checks.pretrained_text import check_text_encoder
from ldmscale.config.checks.sampling import check_export, check_import, check_sample
from ldmscale.config.checks.stages import (
    check_averages,
    check_batch,
    check_compile,
    check_denoising_validation,
    check_first_stage,
    check_generation,
    check_latents,
    check_model,
    check_objective,
    check_preview,
    check_same_autoencoder,
    check_stored_text,
)
from ldmscale.config.checks.warm_start import check_warm_start
from ldmscale.config.inherit import check_inherited_size


def check(config: Job, world_size: int) -> list[str]:
    """Every fault of a job's configuration, for a run on `world_size` ranks."""
    if isinstance(config, AutoencoderJob):
        return [
            *check_shards(config.data, needs="images"),
            *check_batch(config.train, world_size),
            *check_rate(config.optim, config.train),
            *check_compile(
                config.train, config.zero, {"autoencoder.checkpointing": config.autoencoder.checkpointing}
            ),
            *check_averages(config.ema),
            *check_run(config.run),
            *check_warm_start(config),
            *check_autoencoder(config.autoencoder),
            *check_loss(config),
            *check_image_size(config.data, config.autoencoder),
            *check_perceptual(config),
            *check_validation(config),
        ]
    if isinstance(config, DiffusionJob):
        return [
            *check_shards(config.data, needs=None),
            *check_batch(config.train, world_size),
            *check_rate(config.optim, config.train),
            *check_compile(config.train, config.zero, _checkpointing(config)),
            *check_averages(config.ema),
            *check_run(config.run),
            *check_warm_start(config),
            *check_unet(config.unet),
            *check_conditions(config),
            *check_class_names(config),
            *check_text_encoder(config.text_encoder),
            *check_latents(config),
            *check_objective(config.diffusion),
            *check_first_stage(config.first_stage.path),
            *check_same_autoencoder(config),
            *check_denoising_validation(config),
            *check_generation(config),
            *check_preview(
                config.preview, config.diffusion.timesteps, config.first_stage, config.autoencoder.kind
            ),
        ]
    if isinstance(config, LatentsJob):
        return [
            *check_shards(config.data, needs="images", sized=False),
            *(check_first_stage(config.first_stage.path) or check_inherited_size(config)),
            *check_fixed_view(config.data),
            *check_text_encoder(config.text_encoder),
            *check_stored_text(config),
            *check_writable("latents.path", config.latents.path),
        ]
    if isinstance(config, SampleJob):
        return check_sample(config.sample)
    if isinstance(config, ImportJob):
        return check_import(config)
    if isinstance(config, ExportJob):
        return check_export(config)
    if isinstance(config, EvaluateJob):
        return [
            *check_shards(config.data, needs="images", sized=False),
            *check_fixed_view(config.data),
            *(check_model(config.evaluate.model, "evaluate.model") or check_inherited_size(config)),
            *check_evaluation(config),
        ]
    if isinstance(config, IndexJob):
        return check_shards(config.data, needs=None, absent=True)
    if isinstance(config, SubmitJob):
        return check_cluster(config.cluster)
    if isinstance(config, WandbSyncJob):
        return check_replay(config)
    if isinstance(config, DoctorJob):
        return check_doctor(config)
    assert isinstance(config, QuickstartJob)
    return check_source(config)


def _checkpointing(config: DiffusionJob) -> dict[str, str]:
    """What each trained network of the job keeps for the backward pass, by its key."""
    found = {"unet.checkpointing": str(config.unet.checkpointing)}
    if isinstance(config.text_encoder, TextEncoderConfig):
        found["text_encoder.checkpointing"] = str(config.text_encoder.checkpointing)
    return found
