"""Stage 3: from a checked configuration to a running trainer."""

from __future__ import annotations

import logging

import torch

from ldmscale.builders.attention import diffusion_head_channels
from ldmscale.builders.compile import compile_blocks
from ldmscale.builders.costs import training_flops
from ldmscale.builders.networks import build_denoiser, build_schedule
from ldmscale.config import DiffusionJob
from ldmscale.data.latents.format import LatentFormat
from ldmscale.data.loading.draws import BatchDraws
from ldmscale.data.loading.transforms import LatentItem
from ldmscale.data.tokenizers.pretrained import EncoderTokenizer
from ldmscale.distributed.environment import Ranks
from ldmscale.distributed.preemption import StopFlag
from ldmscale.setup.conditions import item_maker, open_condition_readers
from ldmscale.setup.dataloaders import generation_figures, held_out, training_data
from ldmscale.setup.engines import averages_of, engine_options, rate_curve, set_attention
from ldmscale.setup.first_stage import open_first_stage
from ldmscale.setup.foreign_models import check_stated_warm_start, with_stated_first_stage
from ldmscale.setup.node_checks import check_shared_memory
from ldmscale.setup.previews import open_preview
from ldmscale.setup.run import already_finished, open_run
from ldmscale.setup.text import check_stored_text, open_frozen_text
from ldmscale.setup.trainer import train
from ldmscale.stages.diffusion import DiffusionStage
from ldmscale.train.engine.engine import Engine, sharded_construction

log = logging.getLogger(__name__)


def train_diffusion(config: DiffusionJob, ranks: Ranks, stop: StopFlag) -> int:
    """Train the conditional model and return the exit status."""
    config, stated = with_stated_first_stage(config)
    check_stated_warm_start(config)
    if already_finished(config, ranks):
        return 0
    run = open_run(config, ranks, stop)
    for change in stated:
        log.warning("%s", change)
    warn_of_untrained(config)
    readers = open_condition_readers(run, config)
    options = engine_options(run, config.train, config.optim, config.zero)
    attention = set_attention(run, config.train, diffusion_head_channels(config, options.compute_dtype))
    first_stage, latent_shapes, stored = open_first_stage(config, run)
    make_item = item_maker(config, readers, stored)
    draws = draws_of(config, latent_shapes[0][0], stored)
    check_shared_memory(
        ranks, make_item, draws, batch=config.train.rank_micro_batch, workers=config.data.workers
    )
    pretrained_text = open_frozen_text(run, config, readers.tokenizer)
    if isinstance(make_item, LatentItem) and make_item.text is not None:
        assert pretrained_text is not None and isinstance(readers.tokenizer, EncoderTokenizer)
        check_stored_text(config, make_item.text, pretrained_text, readers.tokenizer)
        log.info(
            "text encodings are read with the latents: the text encoder runs for previews and the null condition alone"
        )

    # Right before the construction: the initial weights depend on the seed alone.
    torch.manual_seed(config.seed)
    with sharded_construction(options):
        network = build_denoiser(config, readers.null_tokens(), pretrained_text)
    if config.train.compile == "blocks":
        compile_blocks(network, run.device)
    engine = Engine("denoiser", network, options, run.device)
    log.info(
        "denoiser of %s parameters, ZeRO-%d, %s, attention by %s",
        f"{engine.parameter_count():,}",
        config.zero.stage,
        config.train.precision,
        attention.backend,
    )

    stage = DiffusionStage(
        engine,
        averages=averages_of(engine, config.ema),
        first_stage=first_stage,
        latent_shapes=latent_shapes,
        schedule=build_schedule(config.diffusion),
        objective=config.diffusion,
        seed=config.seed,
        ranks=ranks,
        preview=open_preview(run, config, readers, make_item, first_stage, latent_shapes),
        held_out=held_out(run, config, make_item),
        generation=generation_figures(run, config, make_item, first_stage),
    )
    # Counting takes a second; the peak of a CPU is not known.
    counted = run.device.type == "cuda" or config.tracking.peak_tflops is not None
    flops = training_flops(config, latent_shapes[0]) if counted else None
    return train(
        run,
        config,
        stage,
        training_data(run, config, make_item, draws),
        learning_rates={"denoiser": rate_curve(config.optim, config.train)},
        stop=stop,
        flops_per_image=flops,
    )


def draws_of(config: DiffusionJob, channels: int, stored: LatentFormat | None) -> BatchDraws:
    """The random numbers that a micro-step reads, of latents with `channels` channels."""
    chosen = config.diffusion
    normal = ["noise"]
    if (stored.kind == "moments") if stored is not None else (config.autoencoder.kind == "kl"):
        normal.append("posterior")
    if chosen.input_perturbation > 0:
        normal.append("perturbation")
    return BatchDraws(
        config.seed,
        channels,
        config.autoencoder.factor,
        normal=tuple(normal),
        per_channel=("offset",) if chosen.offset_noise > 0 else (),
        uniform=("timestep", "drop"),
    )


def warn_of_untrained(config: DiffusionJob) -> None:
    """Log a warning where sampling would use a timestep or a null condition that is never trained."""
    if config.diffusion.zero_terminal_snr and config.diffusion.weighting == "min_snr":
        log.warning(
            "diffusion.weighting=min_snr gives the last timestep, where zero_terminal_snr leaves no signal, the weight 0: "
            "sampling begins at a timestep that is never trained; diffusion.weighting=none trains it"
        )
    conditions = (config.text_encoder, config.class_embedder, config.embeddings)
    if config.diffusion.caption_dropout > 0 or all(condition is None for condition in conditions):
        return
    for key, sampled in (("preview", config.preview), ("generation", config.generation)):
        if sampled.every_steps and sampled.guidance != 1:
            log.warning(
                "%s.guidance=%g moves away from a null condition that is never trained (diffusion.caption_dropout=0): give "
                "%s.guidance=1, or diffusion.caption_dropout=0.1",
                key,
                sampled.guidance,
                key,
            )
