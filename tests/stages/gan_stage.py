"""The autoencoder stage of a case on this rank, and its share of the images."""

from __future__ import annotations

from collections.abc import Iterator

import gan_case as case
import torch
import torch.distributed as dist

from ldmscale.stages.autoencoder import AutoencoderStage, LogVariance, LossTerms
from ldmscale.stages.codebook import CodebookKeeper, CodebookOptions
from ldmscale.stages.gan import Adversary, AdversaryTerms, RealAndFake
from ldmscale.train.engine.ema import ShardedEma
from ldmscale.train.engine.engine import Engine, sharded_construction
from ldmscale.train.engine.options import EngineOptions
from ldmscale.train.stage import Batch

DEVICE = torch.device("cpu")
AS_PUBLISHED = CodebookOptions(24, False, 1, 0, 10, 0.0)


def stage_of(
    setting: case.Case, zero: int, table: CodebookOptions = AS_PUBLISHED, ema: float | None = None
) -> AutoencoderStage:
    options = EngineOptions(
        zero, "fp32", case.PASS // dist.get_world_size(), case.PASSES, learning_rate=case.RATE, betas=case.BETAS,
        eps=case.EPS[setting.kind], weight_decay=0.0, persistence_threshold=0,
    )  # fmt: skip
    torch.manual_seed(0)
    with sharded_construction(options):
        network = case.autoencoder(setting.kind, checkpointing="full")
        judge = RealAndFake(case.discriminator(setting.norm))
    generator = Engine("generator", network, options, DEVICE)
    terms = AdversaryTerms(
        "hinge" if setting.of_kl else "vanilla", case.GAN_WEIGHT, True, case.START,
        case.R1_WEIGHT if setting.of_kl else 0.0, case.R1_EVERY,
    )  # fmt: skip
    averages = [] if ema is None else [ShardedEma(generator.masters, ema)]
    keeper = CodebookKeeper(generator, averages, table, 0)
    return AutoencoderStage(
        generator,
        Adversary(Engine("discriminator", judge, options, DEVICE), network.last_layer, terms),
        averages,
        case.distance,
        LossTerms(setting.of_kl, 1.0, case.PERCEPTUAL, case.KL_WEIGHT, case.CODEBOOK_WEIGHT),
        LogVariance(
            0.0, learned=setting.of_kl, passes=case.PASSES, betas=case.BETAS, eps=case.EPS[setting.kind]
        ),
        None if setting.of_kl else keeper,
        0,
        scale_batches,
        {},
        None,
        DEVICE,
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
