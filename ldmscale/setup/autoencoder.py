"""Stage 1: from a checked configuration to a running trainer."""

from __future__ import annotations

import logging

import torch

from ldmscale.builders.attention import autoencoder_head_channels, choose_attention, wanted_attention
from ldmscale.builders.compile import compile_blocks
from ldmscale.builders.feature_networks import Distance, build_distance
from ldmscale.builders.networks import build_autoencoder, build_discriminator
from ldmscale.config import AutoencoderJob
from ldmscale.data.loading.transforms import ImageItem
from ldmscale.distributed.environment import Ranks
from ldmscale.distributed.preemption import StopFlag
from ldmscale.evaluation.held_out import HeldOut, ImageSet
from ldmscale.setup.dataloaders import preview_batch, training_data
from ldmscale.setup.engines import averages_of, engine_options, rate_curve
from ldmscale.setup.index import open_index, shapes_of
from ldmscale.setup.run import Run, already_finished, open_run
from ldmscale.setup.trainer import train
from ldmscale.stages.autoencoder import AutoencoderStage, LogVariance, LossTerms
from ldmscale.stages.codebook import CodebookKeeper, CodebookOptions
from ldmscale.stages.gan import Adversary, AdversaryTerms, RealAndFake
from ldmscale.train.engine.engine import Engine, sharded_construction

log = logging.getLogger(__name__)


def train_autoencoder(config: AutoencoderJob, ranks: Ranks, stop: StopFlag) -> int:
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
    make_item = ImageItem(
        data.image_size, config.seed, data.crop, data.flip, data.max_pixels,
        shapes=shapes_of(data), decoder=data.decoder,
    )  # fmt: skip
    samples = training_data(run, config, make_item)
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
        lambda: samples.first_samples(min(config.scale_samples, run.index.total)),
        preview_batch(run, config, make_item),
        _held_out(config, run, distance),
        run.device,
    )
    rates = {
        "generator": rate_curve(config.optim, config.train),
        "discriminator": rate_curve(config.optim, config.train, loss.discriminator_lr_scale),
    }
    return train(run, config, stage, samples, learning_rates=rates, stop=stop, flops_per_image=None)


def _held_out(config: AutoencoderJob, run: Run, distance: Distance | None) -> HeldOut | None:
    """The held-out images that figures are taken of while training; None where nobody asks for figures."""
    wanted, data = config.validation, config.data
    if not wanted.every_steps or data.heldout_shards is None:
        return None
    index = open_index(data.heldout_shards, data, run.ranks)
    images = ImageSet(index, data, min(wanted.images, index.total))
    return HeldOut(list(images.batches(wanted.rank_batch, run.ranks)), distance, run.device)
