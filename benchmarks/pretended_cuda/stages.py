"""The steps of the real stages, engine (ZeRO-0), averages and samplers on pretended CUDA, as one of several pretended ranks.

The counts say how often a step makes the host wait. Wanted in a micro-step: no wait and no blocking copy.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.pretended_cuda import experiment
from benchmarks.pretended_cuda.counters import Totals
from benchmarks.pretended_cuda.mode import CUDA, PretendedCuda
from benchmarks.pretended_cuda.networks import default_dtype
from benchmarks.pretended_cuda.ranks import PretendedRanks
from ldmscale.builders.networks import build_autoencoder, build_denoiser, build_discriminator, build_schedule
from ldmscale.config import AutoencoderJob, DiffusionJob
from ldmscale.diffusion.sample_latents import SamplerOptions, draw_latents
from ldmscale.diffusion.timesteps import SAMPLERS
from ldmscale.distributed.environment import Ranks
from ldmscale.models.conditions import Conditions
from ldmscale.models.first_stage import LatentScale
from ldmscale.models.perceptual import LPIPS, VGG16_STAGES
from ldmscale.setup.autoencoder import draws_for
from ldmscale.setup.diffusion import draws_of
from ldmscale.stages.autoencoder import AutoencoderStage, LogVariance
from ldmscale.stages.codebook import CodebookMonitor
from ldmscale.stages.diffusion import DiffusionStage
from ldmscale.stages.first_stage import FirstStage
from ldmscale.stages.gan import Adversary, DiscriminatorOnPair
from ldmscale.tracking.metrics import MetricSums
from ldmscale.train.engine.ema import ShardedEma
from ldmscale.train.engine.engine import Engine, EngineOptions
from ldmscale.train.stage import Batch

Stage = DiffusionStage | AutoencoderStage


@dataclass(frozen=True)
class Phase:
    """What one part of a step counted, and its collectives."""

    name: str
    totals: Totals
    collectives: dict[str, int] = field(default_factory=dict)  # of the default group, per name
    host_collectives: dict[str, int] = field(default_factory=dict)  # of the group of host tensors
    host_tensors: list[str] = field(default_factory=list)  # CPU tensors that NCCL would refuse


def step(gpu: PretendedCuda, ranks: PretendedRanks, stage: Stage, batch: Batch, at: int = 0) -> list[Phase]:
    """One micro-step, the update with averages, and the mean of the metrics, as the trainer makes them."""

    def phase(name: str, work: Callable[[], Any]) -> Any:
        gpu.counters.reset()
        ranks.reset()
        result = work()
        totals = gpu.counters.totals()
        found.append(Phase(name, totals, dict(ranks.calls), dict(ranks.host_calls), list(ranks.host_tensors)))
        return result

    def update() -> None:
        for name in stage.active(at):
            engine = stage.engines[name]
            engine.step()
            for average in stage.averages.get(name, ()):
                average.update()
            sums.add({f"{name}/gradient_norm": engine.gradient_norm()})
        sums.add({"loss/total": loss, **metrics})

    found: list[Phase] = []
    sums = MetricSums()
    loss, metrics = phase("micro-step", lambda: stage.micro_step(batch, at))
    phase("update", update)
    phase("metrics, once per log interval", sums.mean)
    return found


def diffusion_stage(ranks: PretendedRanks, config: DiffusionJob, precision: str = "bf16") -> DiffusionStage:
    """The stage that trains on stored latents: no autoencoder."""
    with default_dtype(_dtype(precision)), torch.device(CUDA):
        denoiser = build_denoiser(config)
    denoiser.null_token_ids = torch.zeros(77, dtype=torch.int64, device=CUDA)
    _stay(denoiser)
    engine = Engine("denoiser", denoiser, _options(precision), CUDA)
    return DiffusionStage(
        engine,
        averages=[ShardedEma(engine.masters, 0.9999)],
        first_stage=FirstStage(None, LatentScale(torch.zeros(4), torch.full((4,), 0.18)), CUDA),
        latent_shapes=[(4, 32, 32)],
        schedule=build_schedule(config.diffusion),
        objective=config.diffusion,
        seed=0,
        ranks=Ranks(0, ranks.world, 0, ranks.world),
    )


def diffusion_batch(gpu: PretendedCuda, config: DiffusionJob, batch: int, side: int = 32) -> Batch:
    """A batch of latents, captions and draws as the loader of a GPU run gives it: in page-locked memory."""
    made = {
        "latent": torch.randn(batch, 8, side, side).half(),
        "tokens": torch.zeros(batch, 77, dtype=torch.int64),
        "position": torch.arange(batch),
    }
    made |= draws_of(config, 4, None).of(made)
    return {name: gpu.pin(tensor) for name, tensor in made.items()} | {"key": ["key"] * batch}


def autoencoder_stage(config: AutoencoderJob, perceptual: LPIPS, precision: str = "bf16") -> AutoencoderStage:
    """The stage with the discriminator from step 0 on, the adaptive weight, and the codebook of a VQ model.

    `perceptual` is moved to the device.
    """
    loss = replace(config.loss, gan_start_step=0)
    with default_dtype(_dtype(precision)), torch.device(CUDA):
        network = build_autoencoder(config.autoencoder)
        judge = DiscriminatorOnPair(build_discriminator(loss))
    _stay(network)
    _stay(judge)
    generator = Engine("generator", network, _options(precision), CUDA)
    discriminator = Engine("discriminator", judge, _options(precision), CUDA)
    averages = [ShardedEma(generator.masters, 0.999)]
    codebook = None
    if (size := config.autoencoder.codebook_size) is not None:
        # The table starts as it is: k-means would read values.
        table = replace(config.codebook, start="uniform", revive_after_steps=0)
        codebook = CodebookMonitor(generator, averages=averages, size=size, options=table, seed=0)
    return AutoencoderStage(
        generator,
        averages=averages,
        loss=loss,
        distance=_on_device(perceptual),
        adversary=Adversary(discriminator, network.last_layer, loss),
        log_variance=LogVariance(loss, config.optim, accumulation_steps=1),
        codebook=codebook,
        scale_batches=lambda: iter(()),
        preview_batch={},
        held_out=None,
        seed=0,
    )


def autoencoder_batch(gpu: PretendedCuda, config: AutoencoderJob, batch: int, size: int = 256) -> Batch:
    """A batch of images and draws as the loader of a GPU run gives it: in page-locked memory."""
    made = {
        "image": torch.zeros(batch, 3, size, size, dtype=torch.uint8),
        "position": torch.arange(batch),
    }
    made |= draws_for(config).of(made)
    return {name: gpu.pin(tensor) for name, tensor in made.items()} | {"key": ["key"] * batch}


def samplers(gpu: PretendedCuda, stage: DiffusionStage, batch: int = 2, steps: int = 3) -> list[Phase]:
    """Latents of `batch` captions by every sampler, with guidance."""
    found = []
    engine = stage.engines["denoiser"]
    network: Any = engine.network
    network.eval()
    for sampler in SAMPLERS:
        conditions = Conditions(token_ids=torch.zeros(batch, 77, dtype=torch.int64, device=CUDA))
        noise = torch.randn(batch, *stage.latent_shapes[0], device=CUDA)
        options = SamplerOptions(steps=steps, sampler=sampler, guidance_rescale=0.7)
        gpu.counters.reset()
        draw_latents(network, conditions, noise, stage.schedule, options, engine.compute_dtype, range(batch))
        found.append(Phase(f"{sampler}, {steps} steps", gpu.counters.totals()))
    network.train()
    return found


def measure(
    what: str,
    batch: int,
    *,
    ranks: int = 8,
    side: int | None = None,
    overrides: Sequence[str] = (),
    checkpointing: str = "off",
    precision: str = "bf16",
    small: bool = False,
) -> list[Phase]:
    """The phases of one step of `what`: "diffusion" or "autoencoder", or "samplers". Once per process.

    Args:
        batch: samples per rank.
        ranks: pretended ranks.
        side: of the latents, or of the images; the default is 32 or 256.
        overrides: settings of the job, for instance "diffusion.loss_bins=0".
        small: a narrow network.
    """
    group = PretendedRanks(ranks, on_device=True)
    perceptual = empty_lpips() if what == "autoencoder" else None
    with PretendedCuda() as gpu:
        if perceptual is not None:
            narrow: Sequence[str] = experiment.SMALL_AUTOENCODER if small else ()
            of_images = experiment.autoencoder([*narrow, *overrides])
            trainer = autoencoder_stage(of_images, perceptual, precision)
            return step(gpu, group, trainer, autoencoder_batch(gpu, of_images, batch, side or 256))
        narrow = experiment.SMALL if small else ()
        config = experiment.diffusion([*narrow, *overrides], checkpointing=checkpointing)
        stage = diffusion_stage(group, config, precision)
        if what == "samplers":
            return samplers(gpu, stage, batch)
        return step(gpu, group, stage, diffusion_batch(gpu, config, batch, side or 32))


def _dtype(precision: str) -> torch.dtype:
    return EngineOptions(0, precision, 1).compute_dtype


def _options(precision: str) -> EngineOptions:
    return EngineOptions(0, precision, 1, accumulation_steps=1, gradient_clip_norm=1.0, learning_rate=5e-5)


def _stay(network: nn.Module) -> None:
    """Makes `network.to(...)` return the network: it is on the device in its final type, and torch cannot convert it there."""
    setattr(network, "to", lambda *_, **__: network)  # noqa: B010


def empty_lpips() -> LPIPS:
    """LPIPS with weights of zero, read from files as the real ones are. Outside of `PretendedCuda`, which reads no values."""
    with tempfile.TemporaryDirectory() as folder:
        weights, heads = Path(folder) / "vgg.pth", Path(folder) / "heads.pth"
        tensors: dict[str, Tensor] = {}
        number, channels = 0, 3
        for widths in VGG16_STAGES:
            for width in widths:
                tensors[f"features.{number}.weight"] = torch.zeros(width, channels, 3, 3)
                tensors[f"features.{number}.bias"] = torch.zeros(width)
                number, channels = number + 2, width  # a ReLU follows
            number += 1  # and a pooling layer
        torch.save(tensors, weights)
        of_heads = {f"lin{k}.model.1.weight": torch.zeros(1, s[-1], 1, 1) for k, s in enumerate(VGG16_STAGES)}
        torch.save(of_heads, heads)
        return LPIPS(weights, heads, weights_sha256=None, heads_sha256=None)


def _on_device(network: LPIPS) -> LPIPS:
    """Puts pretended tensors in the place of all parameters and buffers."""
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            moved = nn.Parameter(torch.empty_like(parameter, device=CUDA), requires_grad=False)
            module.register_parameter(name, moved)
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.empty_like(buffer, device=CUDA), persistent=False)
    return network
