"""Stage 1: from a checked configuration to a running trainer."""

from __future__ import annotations

import logging

import torch

from ldmscale.builders.attention import autoencoder_head_channels
from ldmscale.builders.compile import compile_blocks
from ldmscale.builders.feature_networks import Distance, build_distance
from ldmscale.builders.networks import build_autoencoder, build_discriminator
from ldmscale.config import AutoencoderJob
from ldmscale.data.loading.draws import BatchDraws
from ldmscale.data.loading.transforms import ImageItem
from ldmscale.distributed.environment import Ranks
from ldmscale.distributed.preemption import StopFlag
from ldmscale.evaluation.held_out import HeldOut, ImageSet
from ldmscale.setup.dataloaders import preview_batch, training_data
from ldmscale.setup.engines import averages_of, engine_options, rate_curve, set_attention
from ldmscale.setup.foreign_models import check_stated_warm_start
from ldmscale.setup.index import open_index, shapes_of
from ldmscale.setup.node_checks import check_shared_memory
from ldmscale.setup.run import Run, already_finished, open_run
from ldmscale.setup.trainer import train
from ldmscale.stages.autoencoder import AutoencoderStage, LogVariance
from ldmscale.stages.codebook import CodebookMonitor
from ldmscale.stages.gan import Adversary, DiscriminatorOnPair
from ldmscale.train.engine.engine import Engine, sharded_construction

log = logging.getLogger(__name__)


def train_autoencoder(config: AutoencoderJob, ranks: Ranks, stop: StopFlag) -> int:
    """Train the autoencoder and return the exit status."""
    check_stated_warm_start(config)
    if already_finished(config, ranks):
        return 0
    run = open_run(config, ranks, stop)
    make_item = _item_maker(config)
    draws = draws_for(config)
    check_shared_memory(
        ranks, make_item, draws, batch=config.train.rank_micro_batch, workers=config.data.workers
    )
    loss, scale = config.loss, config.loss.discriminator_lr_scale
    options = engine_options(run, config.train, config.optim, config.zero)
    discriminator_options = engine_options(run, config.train, config.optim, config.zero, lr_scale=scale)
    attention = set_attention(
        run, config.train, {options.compute_dtype: autoencoder_head_channels(config.autoencoder)}
    )
    distance = build_distance(loss, run.device)

    # Right before the construction: the initial weights depend on the seed alone.
    torch.manual_seed(config.seed)
    with sharded_construction(options):
        generator_network = build_autoencoder(config.autoencoder)
        discriminator_network = DiscriminatorOnPair(build_discriminator(loss))
    if config.train.compile == "blocks":
        compile_blocks(generator_network, run.device)
    generator = Engine("generator", generator_network, options, run.device)
    discriminator = Engine("discriminator", discriminator_network, discriminator_options, run.device)
    log.info(
        "autoencoder of %s and discriminator of %s parameters, ZeRO-%d, %s, attention by %s",
        f"{generator.parameter_count():,}",
        f"{discriminator.parameter_count():,}",
        config.zero.stage,
        config.train.precision,
        attention.backend,
    )

    data = training_data(run, config, make_item, draws)
    averages = averages_of(generator, config.ema)
    codebook = None
    if (size := config.autoencoder.codebook_size) is not None:
        codebook = CodebookMonitor(
            generator, averages=averages, size=size, options=config.codebook, seed=config.seed
        )
    stage = AutoencoderStage(
        generator,
        averages=averages,
        loss=loss,
        distance=distance,
        adversary=Adversary(discriminator, generator_network.last_layer, loss),
        log_variance=LogVariance(loss, config.optim, accumulation_steps=run.accumulation_steps),
        codebook=codebook,
        scale_batches=lambda: data.first_samples(min(config.scale_samples, run.index.total)),
        preview_batch=preview_batch(run, config, make_item),
        held_out=_held_out(config, run, distance),
        seed=config.seed,
    )
    learning_rates = {
        "generator": rate_curve(config.optim, config.train),
        "discriminator": rate_curve(config.optim, config.train, scale),
    }
    return train(run, config, stage, data, learning_rates=learning_rates, stop=stop, flops_per_image=None)


def _item_maker(config: AutoencoderJob) -> ImageItem:
    data = config.data
    assert data.image_size is not None
    return ImageItem(
        data.image_size,
        config.seed,
        crop=data.crop,
        crop_shares=(data.min_crop_share, data.max_crop_share),
        flip=data.flip,
        max_pixels=data.max_pixels,
        shapes=shapes_of(data),
        decoder=data.decoder,
    )


def draws_for(config: AutoencoderJob) -> BatchDraws:
    """The random numbers that a micro-step reads."""
    network = config.autoencoder
    normal = ("posterior",) if network.kind == "kl" else ()
    return BatchDraws(config.seed, network.latent_width, network.factor, normal)


def _held_out(config: AutoencoderJob, run: Run, distance: Distance | None) -> HeldOut | None:
    """The held-out images of the validation metrics; None where there are none."""
    wanted, data = config.validation, config.data
    if not wanted.every_steps or data.heldout_shards is None:
        return None
    index = open_index(data.heldout_shards, data, run.ranks)
    images = ImageSet(index, data, min(wanted.images, index.total))
    return HeldOut(list(images.batches(wanted.rank_batch, run.ranks)), distance, run.device)
