"""`ldmscale autoencoder`: fit the KL or VQ autoencoder; ends by measuring the latent scale."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ldmscale.config import AutoencoderJob
from ldmscale.distributed.environment import Ranks
from ldmscale.distributed.stop import StopFlag
from ldmscale.jobs.start import configured

if TYPE_CHECKING:
    from ldmscale.evaluation.held_out import HeldOut
    from ldmscale.frozen import Distance
    from ldmscale.jobs.open_run import Run

log = logging.getLogger(__name__)


def main(overrides: Sequence[str]) -> int:
    """Train as configured; see `cli` for the exit status."""
    config, ranks = configured(AutoencoderJob, overrides)
    with StopFlag().install() as stop:  # before the slow imports: a signal may come at any time
        return _run(config, ranks, stop)


def _run(config: AutoencoderJob, ranks: Ranks, stop: StopFlag) -> int:
    import torch

    from ldmscale.attention_choice import autoencoder_head_channels, choose_attention, wanted_attention
    from ldmscale.compilation import compile_blocks
    from ldmscale.data.budget import next_for_all
    from ldmscale.data.items import ImageItem
    from ldmscale.data.loader import Batch
    from ldmscale.frozen import build_distance
    from ldmscale.jobs.engines import averages_of, engine_options, rate_curve
    from ldmscale.jobs.loaders import make_loader, picture_batch
    from ldmscale.jobs.open_index import shapes_of
    from ldmscale.jobs.open_run import already_finished, open_run
    from ldmscale.jobs.training import train
    from ldmscale.networks import build_autoencoder, build_discriminator
    from ldmscale.stages.adversary import Adversary, AdversaryTerms, RealAndFake
    from ldmscale.stages.autoencoder import AutoencoderStage, LossTerms
    from ldmscale.stages.codebook import CodebookKeeper, CodebookOptions
    from ldmscale.stages.log_variance import LogVariance
    from ldmscale.train.engine import Engine, sharded_construction

    if already_finished(config, ranks):
        return 0
    run = open_run(config, ranks, stop)
    loss, data = config.loss, config.data
    assert data.image_size is not None
    options = engine_options(run, config.train, config.optim, config.zero)
    discriminator_options = engine_options(
        run, config.train, config.optim, config.zero, lr_scale=loss.discriminator_lr_scale
    )
    head_channels = {options.compute_dtype: autoencoder_head_channels(config.autoencoder)}
    attention = choose_attention(wanted_attention(config.train), head_channels, run.device)
    run.note("attention", attention.plain())
    distance = build_distance(loss, run.device)
    torch.manual_seed(config.seed)
    with sharded_construction(options):
        generator_network = build_autoencoder(config.autoencoder)
        discriminator_network = RealAndFake(build_discriminator(loss))
    if config.train.compile == "blocks":
        compile_blocks(generator_network, run.device)
    generator = Engine("generator", generator_network, options, run.device)
    discriminator = Engine("discriminator", discriminator_network, discriminator_options, run.device)
    log.info("autoencoder of %s and discriminator of %s parameters, ZeRO-%d, %s, attention by %s",
             f"{generator.parameter_count():,}", f"{discriminator.parameter_count():,}", config.zero.stage,
             config.train.precision, attention.backend)  # fmt: skip
    reader = ImageItem(
        data.image_size, config.seed, data.crop, data.flip, data.max_pixels,
        shapes=shapes_of(data), decoder=data.decoder,
    )  # fmt: skip

    def measure_batches() -> Iterator[Batch]:
        loader = make_loader(run, config, reader, 0, workers=0)
        wanted = min(config.scale_samples, run.index.total)
        for _ in range(-(-wanted // config.train.global_batch) * run.accumulation_steps):
            batch = next_for_all(loader)
            yield batch | {"counts": batch["position"] < wanted}

    averages = averages_of(generator, config.ema)
    adversary = Adversary(
        discriminator,
        generator_network.last_layer,
        AdversaryTerms(
            loss.gan,
            loss.gan_weight,
            loss.gan_adaptive,
            loss.gan_start_step,
            loss.r1_weight,
            loss.r1_every_steps,
        ),
    )
    codebook, options_of = None, config.codebook
    if config.autoencoder.codebook_size is not None:
        kept = CodebookOptions(
            config.autoencoder.codebook_size,
            options_of.start == "kmeans",
            options_of.kmeans_rounds,
            options_of.revive_after_steps,
            options_of.usage_window_steps,
            options_of.alarm_usage,
        )
        codebook = CodebookKeeper(generator, averages, kept, config.seed)
    stage = AutoencoderStage(
        generator,
        adversary,
        averages,
        distance,
        LossTerms(
            sum_over_image=loss.reduction == "sum",
            pixel_weight=loss.pixel_weight,
            perceptual_weight=loss.perceptual_weight,
            kl_weight=loss.kl_weight,
            codebook_weight=loss.codebook_weight,
        ),
        LogVariance(
            loss.logvar_start,
            learned=loss.logvar == "learned",
            passes=run.accumulation_steps,
            betas=config.optim.betas,
            eps=config.optim.eps,
        ),
        codebook,
        config.seed,
        measure_batches,
        picture_batch(run, config, reader),
        _held_out(config, run, distance),
        run.device,
    )
    rates = {
        "generator": rate_curve(config.optim, config.train),
        "discriminator": rate_curve(config.optim, config.train, loss.discriminator_lr_scale),
    }
    return train(run, config, stage, reader, rates, stop, flops_per_image=None)


def _held_out(config: AutoencoderJob, run: Run, distance: Distance | None) -> HeldOut | None:
    """The held-out images that figures are taken of while training; None where nobody asks for figures."""
    from ldmscale.evaluation.held_out import HeldOut
    from ldmscale.jobs.held_out import ImageSet
    from ldmscale.jobs.open_index import open_index

    wanted, data = config.validation, config.data
    if not wanted.every_steps or data.heldout_shards is None:
        return None
    index = open_index(data.heldout_shards, data, run.ranks)
    images = ImageSet(index, data, min(wanted.images, index.total))
    return HeldOut(list(images.batches(wanted.rank_batch, run.ranks)), distance, run.device)
