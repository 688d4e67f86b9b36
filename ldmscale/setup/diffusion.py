"""Stage 3: from a checked configuration to a running trainer."""

from __future__ import annotations

import logging

import torch

from ldmscale.builders.attention import choose_attention, diffusion_head_channels, wanted_attention
from ldmscale.builders.compile import compile_blocks
from ldmscale.builders.costs import training_flops
from ldmscale.builders.networks import build_denoiser, build_schedule
from ldmscale.config import (
    DiffusionConfig,
    DiffusionJob,
    TextEncoderConfig,
)
from ldmscale.data.loading.transforms import ImageItem, LatentItem
from ldmscale.diffusion.sample_latents import SamplerOptions
from ldmscale.distributed.environment import Ranks
from ldmscale.distributed.preemption import StopFlag
from ldmscale.setup.classes import settle_classes, settle_layout
from ldmscale.setup.dataloaders import generation_figures, held_out, preview_batch, training_data
from ldmscale.setup.engines import averages_of, engine_options, rate_curve
from ldmscale.setup.first_stage import open_first_stage
from ldmscale.setup.index import embeddings_reader, map_reader, shapes_of, spatial_reader
from ldmscale.setup.previews import preview_conditions, preview_of_samples
from ldmscale.setup.run import already_finished, open_run
from ldmscale.setup.text import open_frozen_text, settle_tokenizer
from ldmscale.setup.trainer import train
from ldmscale.stages.diffusion import DiffusionStage
from ldmscale.stages.objective import Objective
from ldmscale.train.engine.engine import Engine, sharded_construction

log = logging.getLogger(__name__)


def train_diffusion(config: DiffusionJob, ranks: Ranks, stop: StopFlag) -> int:
    if already_finished(config, ranks):
        return 0
    run = open_run(config, ranks, stop)
    text, layout = config.text_encoder, None
    if config.layout is not None:
        assert isinstance(text, TextEncoderConfig)
        layout = settle_layout(run, config.data, config.layout, text)
    tokenizer = None if text is None or layout is not None else settle_tokenizer(run, config, text)
    classes = None
    if config.class_embedder is not None:
        classes = settle_classes(run, config.data, config.class_embedder)
    options = engine_options(run, config.train, config.optim, config.zero)
    head_channels = diffusion_head_channels(config, options.compute_dtype)
    attention = choose_attention(wanted_attention(config.train), head_channels, run.device)
    run.note("attention", attention.plain())
    first_stage, latent_shape, stored = open_first_stage(config, run)
    frozen_text = open_frozen_text(run, config, tokenizer)
    torch.manual_seed(config.seed)
    null = None if tokenizer is None else torch.from_numpy(tokenizer.encode([""])[0])
    if layout is not None:
        null = torch.from_numpy(layout.encode([]))
    with sharded_construction(options):
        network = build_denoiser(config, null, frozen_text)
    if config.train.compile == "blocks":
        compile_blocks(network, run.device)
    engine = Engine("denoiser", network, options, run.device)
    log.info("denoiser of %s parameters, ZeRO-%d, %s, attention by %s", f"{engine.parameter_count():,}",
             config.zero.stage, config.train.precision, attention.backend)  # fmt: skip
    data = config.data
    caption = data.caption if tokenizer is not None else None
    make_item: ImageItem | LatentItem
    if stored is not None:
        make_item = LatentItem(stored, caption, tokenizer, classes, data.flip, config.seed, layout)
    else:
        assert data.image_size is not None
        make_item = ImageItem(
            data.image_size, config.seed, data.crop, data.flip, data.max_pixels, caption, tokenizer,
            shapes_of(data), data.decoder, classes, spatial_reader(config), map_reader(config),
            layout, embeddings_reader(config.embeddings),
        )  # fmt: skip
    _warn_of_untrained_null(config)
    preview = config.preview
    told = None
    if preview.every_steps and (config.spatial is not None or config.embeddings is not None):
        told = preview_of_samples(config, preview_batch(run, config, make_item), first_stage)
    elif preview.every_steps:
        told = preview_conditions(config, run, tokenizer, classes, layout)
    stage = DiffusionStage(
        engine,
        averages_of(engine, config.ema),
        first_stage,
        build_schedule(config.diffusion),
        build_objective(config.diffusion),
        SamplerOptions(preview.sampler_steps, preview.guidance, prediction=config.diffusion.prediction),
        told,
        latent_shape,
        config.seed,
        ranks,
        run.device,
        held_out(run, config, make_item),
        generation_figures(run, config, make_item, first_stage),
    )
    flops = None
    if run.device.type == "cuda":  # MFU is reported on GPUs only, and counting takes a second
        flops = training_flops(config, latent_shape)
    return train(
        run,
        config,
        stage,
        training_data(run, config, make_item),
        learning_rates={"denoiser": rate_curve(config.optim, config.train)},
        stop=stop,
        flops_per_image=flops,
    )


def _warn_of_untrained_null(config: DiffusionJob) -> None:
    """Guidance moves away from the null condition: where no condition is dropped, nothing has trained that."""
    reads = (config.text_encoder, config.class_embedder, config.embeddings)
    if config.diffusion.caption_dropout > 0 or all(reader is None for reader in reads):
        return
    for key, drawn in (("preview", config.preview), ("generation", config.generation)):
        if drawn.every_steps and drawn.guidance != 1:
            log.warning(
                "%s.guidance=%g moves away from a null condition that is never trained (diffusion.caption_dropout=0): give "
                "%s.guidance=1, or diffusion.caption_dropout=0.1",
                key, drawn.guidance, key,
            )  # fmt: skip


def build_objective(config: DiffusionConfig) -> Objective:
    """The objective that `config` describes."""
    if config.zero_terminal_snr and config.weighting == "min_snr":
        log.warning(
            "diffusion.weighting=min_snr gives the last timestep, where zero_terminal_snr leaves no signal, the weight 0: "
            "sampling begins at a timestep that is never trained; diffusion.weighting=none trains it"
        )
    return Objective(
        config.prediction,
        config.loss,
        config.caption_dropout,
        config.weighting,
        config.min_snr_gamma,
        config.offset_noise,
        config.input_perturbation,
        config.loss_bins,
        config.spatial_dropout,
    )
