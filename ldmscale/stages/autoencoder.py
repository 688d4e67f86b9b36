"""Stage 1: fit the autoencoder by reconstruction, bottleneck, perceptual and adversarial terms (paper, appendix G).

The graph is cut at the reconstruction x_hat: the gradients of all terms are taken there, weighted against each other
(`adversary`), and one backward of their sum goes through the generator, as ZeRO-3 requires.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ldmscale.data.loading.draws import Draws
from ldmscale.distributed import rng as draws
from ldmscale.distributed.collectives import mean_over_ranks, sum_over_ranks, sums_over_ranks
from ldmscale.evaluation.held_out import HeldOut
from ldmscale.models.autoencoder import KLAutoencoder, VQAutoencoder
from ldmscale.models.bottleneck import Bottleneck, Codes
from ldmscale.models.evaluation_mode import evaluation_mode
from ldmscale.models.layers import has_dropout
from ldmscale.stages.codebook import CodebookMonitor
from ldmscale.stages.gan import Adversary
from ldmscale.tracking.images import side_by_side, to_uint8
from ldmscale.train.engine.ema import Averages, ShardedEma, main_average
from ldmscale.train.engine.engine import Engine
from ldmscale.train.stage import Batch, Picture

log = logging.getLogger(__name__)
Distance = Callable[[Tensor, Tensor], Tensor]  # two images [B,3,H,W] in [-1,1] -> [B]


class LossOptions(Protocol):
    """Weights of the terms: the `loss` section of the configuration, as far as this stage reads it."""

    @property
    def reduction(self) -> Literal["sum", "mean"]: ...
    @property
    def pixel_weight(self) -> float: ...
    @property
    def perceptual_weight(self) -> float: ...
    @property
    def kl_weight(self) -> float: ...
    @property
    def codebook_weight(self) -> float: ...


class LogVarianceOptions(Protocol):
    """The `loss` section of the configuration, as far as it is read here."""

    @property
    def logvar(self) -> Literal["fixed", "learned"]: ...
    @property
    def logvar_start(self) -> float: ...


class AdamOptions(Protocol):
    """The `optim` section of the configuration, as far as it is read here."""

    @property
    def betas(self) -> tuple[float, float]: ...
    @property
    def eps(self) -> float: ...


class LogVariance:
    """The number s that weighs reconstruction against the other terms, rec / exp(s) + s.

    It lives outside the engines: one number is the same on every rank as long as its gradient is averaged over them, and
    needs no shards. Where it is trained, it has Adam's two moments (Kingma & Ba 2015) and no weight decay. The published
    configurations never train it (no optimiser holds it), so that is off by default.
    """

    def __init__(self, options: LogVarianceOptions, optim: AdamOptions, *, accumulation_steps: int) -> None:
        self.value, self.learned = options.logvar_start, options.logvar == "learned"
        self.betas, self.eps, self.accumulation_steps = optim.betas, optim.eps, accumulation_steps
        self.mean = self.square = 0.0
        self.updates = 0
        self._gradients: list[Tensor] = []

    def collect(self, gradient: Tensor, rate: float) -> None:
        """Add the gradient of one micro-batch (a scalar); the last one of a step updates s, which is collective."""
        if not self.learned:
            return
        self._gradients.append(gradient.detach())
        if len(self._gradients) < self.accumulation_steps:
            return
        here = float(torch.stack(self._gradients).double().mean())
        self._gradients = []
        found = mean_over_ranks({"gradient": here})["gradient"]
        if not math.isfinite(found):
            return  # the engine skips such a step, too
        self.updates += 1
        first, second = self.betas
        self.mean = first * self.mean + (1 - first) * found
        self.square = second * self.square + (1 - second) * found * found
        width = math.sqrt(self.square / (1 - second**self.updates)) + self.eps
        self.value -= rate * self.mean / (1 - first**self.updates) / width

    def state(self) -> dict[str, Any]:
        return {"value": self.value, "mean": self.mean, "square": self.square, "updates": self.updates}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.value, self.updates = float(state["value"]), int(state["updates"])
        self.mean, self.square = float(state["mean"]), float(state["square"])


class ScaleMeter:
    """Sums over the latents of this rank; `measured` adds up all ranks and returns the scale (paper, section G).

    The statistics come from the moments of the posterior by the law of total variance, so that no draws are needed:
    Var[z] = E[mean^2 + exp(logvar)] - E[mean]^2.
    """

    def __init__(self, channels: int) -> None:
        self.count = 0  # latent positions
        self.sums = torch.zeros(channels, dtype=torch.float64)
        self.squares = torch.zeros(channels, dtype=torch.float64)

    def add(self, mean: Tensor, logvar: Tensor | None) -> None:
        """Posterior means [B,C,H,W] and log-variances of the same shape (None: a point, as VQ gives)."""
        mean = mean.detach().double().cpu()
        second = mean.square() if logvar is None else mean.square() + logvar.detach().double().cpu().exp()
        self.count += mean.numel() // mean.shape[1]
        self.sums += mean.sum((0, 2, 3))
        self.squares += second.sum((0, 2, 3))

    def measured(self) -> dict[str, Any]:
        """Mean and std of each channel, the single factor 1/std of all values, and the count. Collective."""
        count = sum_over_ranks(self.count)
        mean = torch.tensor(sums_over_ranks(self.sums.tolist()), dtype=torch.float64) / count
        second = torch.tensor(sums_over_ranks(self.squares.tolist()), dtype=torch.float64) / count
        std = (second - mean.square()).clamp(min=0).sqrt()
        overall = (second.mean() - mean.mean().square()).sqrt()
        return {
            "channel_mean": mean.tolist(),
            "channel_std": std.tolist(),
            "factor": 1 / float(overall),
            "positions": int(count),
        }


class AutoencoderStage:
    """Trains "generator" (the autoencoder) and, from the adversary's start on, "discriminator"."""

    def __init__(
        self,
        generator: Engine,
        *,
        averages: Sequence[ShardedEma],
        loss: LossOptions,
        distance: Distance | None,
        adversary: Adversary,
        log_variance: LogVariance,
        codebook: CodebookMonitor | None,
        scale_batches: Callable[[], Iterator[Batch]],
        preview_batch: Batch,
        held_out: HeldOut | None,
        seed: int,
    ) -> None:
        """`distance`: the perceptual one. `scale_batches`: the samples that `finish` measures the latent scale on."""
        self.engines = {"generator": generator, "discriminator": adversary.engine}
        self.averages: Averages = {"generator": averages}
        self.adversary, self.log_variance, self.codebook = adversary, log_variance, codebook
        self.distance, self.loss, self.seed, self.device = distance, loss, seed, generator.device
        self.scale_batches, self.preview_batch, self.held_out = scale_batches, preview_batch, held_out
        self.latent_statistics: dict[str, Any] | None = None
        network = generator.network
        assert isinstance(network, (KLAutoencoder, VQAutoencoder))
        self.autoencoder: KLAutoencoder | VQAutoencoder = network
        self._dropout = has_dropout(network)

    def active(self, step: int) -> Sequence[str]:
        return ("generator", "discriminator") if self.adversary.active(step) else ("generator",)

    def micro_step(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        generator = self.engines["generator"]
        images = self._images(batch)  # [B,3,H,W]
        if self.codebook is not None and generator.at_boundary and not generator.rehearsing:
            self.codebook.prepare(step, batch["position"].tolist(), lambda: self._latents(images))
        noise = self._posterior_noise(batch, images)
        if self._dropout:
            draws.seed_torch(self.seed, int(batch["position"][0]), "dropout")
        reconstruction, bottleneck = generator(
            images.to(generator.compute_dtype), None if noise is None else noise.to(generator.compute_dtype)
        )
        x_hat = reconstruction.detach().float().requires_grad_(True)  # [B,3,H,W]
        rec_loss, parts, metrics = self._reconstruction_loss(images, x_hat)
        (grad_xhat,) = torch.autograd.grad(rec_loss, x_hat)
        adversarial = self.adversary.active(step)
        if adversarial:
            gan_grad, metrics["gan/generator"] = self.adversary.generator_loss_grad(x_hat)
            weight = self.adversary.adaptive_weight(grad_xhat, gan_grad)
            metrics["gan/adaptive_weight"] = weight
            parts["gan"] = weight * metrics["gan/generator"]
            grad_xhat = grad_xhat + weight * gan_grad
        reg_loss = self._regularisation(bottleneck, parts, metrics, step)
        generator.backward((reconstruction.float() * grad_xhat.detach()).sum() + reg_loss)
        loss = rec_loss.detach() + reg_loss.detach() + parts.get("gan", 0)
        if adversarial:
            metrics |= self.adversary.train(images, x_hat.detach(), step)
        self.adversary.clear_cache()
        self._learn_log_variance(rec_loss, images)
        return loss, metrics | _fractions(parts)

    @torch.no_grad()
    def answer(self, batch: Batch) -> Tensor:
        engine = self.engines["generator"]
        with evaluation_mode(engine.network):
            output, _ = engine.network(self._images(batch).to(engine.compute_dtype), None)
        assert isinstance(output, Tensor)
        return output

    def pictures(self) -> Iterator[Picture]:
        images = self._images(self.preview_batch)
        with self._evaluating() as engine:
            reconstruction, _ = engine.network(images.to(engine.compute_dtype), None)
        yield Picture("reconstruction", side_by_side(to_uint8(images), to_uint8(reconstruction)))

    def validate(self) -> dict[str, float]:
        if self.held_out is None:
            return {}
        with self._evaluating() as engine:
            return self.held_out.measure(
                lambda images: engine.network(images.to(engine.compute_dtype), None)[0]
            )

    def generate(self) -> dict[str, float]:
        return {}

    def finish(self) -> dict[str, float]:
        """Measures the latent scale factor; it is stored in the checkpoint."""
        meter = None
        with self._evaluating() as engine:
            for batch in self.scale_batches():
                encoded = self.autoencoder.encode(self._images(batch).to(engine.compute_dtype))
                mean, logvar = encoded.spread()
                meter = meter or ScaleMeter(mean.shape[1])
                # [B]; the last batch may hold more than was asked for
                counts = batch["counts"].to(mean.device)
                meter.add(mean[counts], None if logvar is None else logvar[counts])
        assert meter is not None, "the scale is measured over at least one batch"
        self.latent_statistics = meter.measured()
        log.info(
            "latent scale: factor %.5f over %d positions",
            self.latent_statistics["factor"],
            self.latent_statistics["positions"],
        )
        return {"latent/factor": self.latent_statistics["factor"]}

    def state(self) -> dict[str, Any]:
        return {
            "latent_statistics": self.latent_statistics,
            "log_variance": self.log_variance.state(),
            "codebook": None if self.codebook is None else self.codebook.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.latent_statistics = state["latent_statistics"]
        if state.get("log_variance") is not None:
            self.log_variance.restore(state["log_variance"])
        if self.codebook is not None and state.get("codebook") is not None:
            self.codebook.restore(state["codebook"])

    @contextmanager
    def _evaluating(self) -> Iterator[Engine]:
        """The generator without gradients and dropout, with its averaged weights where it has them."""
        engine = self.engines["generator"]
        average = main_average(self.averages, "generator")
        with torch.no_grad(), evaluation_mode(engine.network), engine.averaged_weights(average):
            yield engine

    def _latents(self, images: Tensor) -> Tensor:
        """Latents [B,C,h,w] by the present weights, through the whole network, as an engine of ZeRO-3 expects."""
        engine = self.engines["generator"]
        with torch.no_grad(), evaluation_mode(engine.network):
            encoded: Bottleneck = engine.network(images.to(engine.compute_dtype), None)[1]
        return encoded.spread()[0]

    def _images(self, batch: Batch) -> Tensor:
        """uint8 [B,3,H,W] of a batch -> float32 in [-1,1] on the device."""
        images: Tensor = batch["image"]
        pixels = images.to(self.device, non_blocking=True).float() / 127.5 - 1
        if (
            pixels.is_cuda
        ):  # the first group norm would bring every map back to the layout that CUDA's kernel takes
            return pixels
        # Convolutions of CPUs are faster so; the layout passes on from layer to layer.
        return pixels.contiguous(memory_format=torch.channels_last)

    def _posterior_noise(self, batch: Batch, images: Tensor) -> Tensor | None:
        network = self.autoencoder
        if isinstance(network, VQAutoencoder):
            return None
        height, width = (side // network.downsampling for side in images.shape[-2:])
        shape = (network.latent_channels, height, width)
        drawn = Draws.of(batch, self.seed).normal("posterior", shape)
        return drawn.to(self.device, non_blocking=True)

    def _reconstruction_loss(
        self, images: Tensor, reconstruction: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """(|x - x'| + perceptual distance) / exp(s) + s at every pixel, summed or averaged over an image.

        The perceptual distance counts at every pixel, as published. Returns the loss, its weighted terms, and metrics.
        """
        scale = images[0].numel() if self.loss.reduction == "sum" else 1
        s = self.log_variance.value
        pixels = (images - reconstruction).abs().mean()
        weighted_rec = self.loss.pixel_weight * pixels
        metrics = {"loss/pixel": pixels.detach()}
        parts = {"pixel": weighted_rec.detach()}
        if self.distance is not None:
            perceptual = self.distance(images, reconstruction).mean()
            parts["perceptual"] = (self.loss.perceptual_weight * perceptual).detach()
            weighted_rec = weighted_rec + self.loss.perceptual_weight * perceptual
            metrics["loss/perceptual"] = perceptual.detach()
        parts = {name: part * math.exp(-s) * scale for name, part in parts.items()}
        if self.log_variance.learned:
            metrics["loss/log_variance"] = torch.tensor(s)
        return (weighted_rec * math.exp(-s) + s) * scale, parts, metrics

    def _learn_log_variance(self, rec_loss: Tensor, images: Tensor) -> None:
        """d rec_loss / d s = scale - (rec_loss - scale s) = scale (1 + s) - rec_loss."""
        if self.log_variance.learned and not self.engines["generator"].rehearsing:
            scale = images[0].numel() if self.loss.reduction == "sum" else 1
            rate = float(self.engines["generator"].base_optimizer.param_groups[0]["lr"])
            self.log_variance.collect(scale * (1 + self.log_variance.value) - rec_loss.detach(), rate)

    def _regularisation(
        self, bottleneck: Bottleneck, parts: dict[str, Tensor], metrics: dict[str, Tensor], step: int
    ) -> Tensor:
        """The weighted regularisation term of the bottleneck; adds to parts and metrics."""
        term = bottleneck.regulariser()
        if isinstance(bottleneck, Codes):
            name, weight = "codebook", self.loss.codebook_weight
            if self.codebook is not None and not self.engines["generator"].rehearsing:
                metrics |= self.codebook.count(bottleneck.indices, step)
        else:
            name, weight = "kl", self.loss.kl_weight
        mean, logvar = bottleneck.spread()
        metrics[f"loss/{name}"] = term.detach()
        metrics["latent/std"] = mean.detach().float().std()
        if logvar is not None:
            metrics["posterior/std"] = (0.5 * logvar.detach().float()).exp().mean()
        parts[name] = (weight * term).detach()
        return weight * term


def _fractions(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The absolute value of each weighted term as a fraction of the sum over all terms."""
    total = torch.stack([part.abs() for part in parts.values()]).sum().clamp(min=1e-30)
    return {f"loss_share/{name}": part.abs() / total for name, part in parts.items()}
