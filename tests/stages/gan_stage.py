"""The autoencoder stage of a case on this rank, and its share of the images."""

from __future__ import annotations

from collections.abc import Iterator

import gan_case as case
import torch
import torch.distributed as dist

from ldmscale.config.schema.losses import AutoencoderLossConfig, CodebookConfig
from ldmscale.config.schema.training import OptimConfig
from ldmscale.stages.autoencoder import AutoencoderStage, LogVariance
from ldmscale.stages.codebook import CodebookMonitor
from ldmscale.stages.gan import Adversary, DiscriminatorOnPair
from ldmscale.train.engine.ema import ShardedEma
from ldmscale.train.engine.engine import Engine, sharded_construction
from ldmscale.train.engine.options import EngineOptions
from ldmscale.train.stage import Batch

DEVICE = torch.device("cpu")
AS_PUBLISHED = CodebookConfig(usage_window_steps=10, alarm_usage=0.0)


def stage_of(
    setting: case.Case, zero: int, table: CodebookConfig = AS_PUBLISHED, ema: float | None = None
) -> AutoencoderStage:
    options = EngineOptions(
        zero, "fp32", case.PASS // dist.get_world_size(), case.PASSES, learning_rate=case.RATE, betas=case.BETAS,
        eps=case.EPS[setting.kind], weight_decay=0.0, persistence_threshold=0,
    )  # fmt: skip
    torch.manual_seed(0)
    with sharded_construction(options):
        network = case.autoencoder(setting.kind, checkpointing="full")
        judge = DiscriminatorOnPair(case.discriminator(setting.norm))
    generator = Engine("generator", network, options, DEVICE)
    loss = AutoencoderLossConfig(
        perceptual="none",  # the stage is given case.distance
        reduction="sum" if setting.of_kl else "mean",
        perceptual_weight=case.PERCEPTUAL,
        logvar="learned" if setting.of_kl else "fixed",
        kl_weight=case.KL_WEIGHT,
        codebook_weight=case.CODEBOOK_WEIGHT,
        gan="hinge" if setting.of_kl else "vanilla",
        gan_weight=case.GAN_WEIGHT,
        gan_start_step=case.START,
        r1_weight=case.R1_WEIGHT if setting.of_kl else 0.0,
        r1_every_steps=case.R1_EVERY,
    )
    optim = OptimConfig(lr=case.RATE, betas=case.BETAS, eps=case.EPS[setting.kind])
    averages = [] if ema is None else [ShardedEma(generator.masters, ema)]
    codebook = CodebookMonitor(generator, averages=averages, size=24, options=table, seed=0)
    return AutoencoderStage(
        generator,
        averages=averages,
        loss=loss,
        distance=case.distance,
        adversary=Adversary(Engine("discriminator", judge, options, DEVICE), network.last_layer, loss),
        log_variance=LogVariance(loss, optim, accumulation_steps=case.PASSES),
        codebook=None if setting.of_kl else codebook,
        scale_batches=scale_batches,
        preview_batch={},
        held_out=None,
        seed=0,
    )


def scale_batches() -> Iterator[Batch]:
    """SCALED images that count, and those that fill up the last pass."""
    for number in range(-(-case.SCALED // case.PASS)):
        found = batch(0, number)
        yield found | {"counts": found["position"] < case.SCALED}


def batch(step: int, number: int) -> Batch:
    pixels, positions = case.images(step, number)
    rank, share = dist.get_rank(), case.PASS // dist.get_world_size()
    mine = slice(rank * share, (rank + 1) * share)
    return {"image": pixels[mine], "position": torch.tensor(positions[mine])}
