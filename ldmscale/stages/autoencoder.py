"""Stage 1: fit the autoencoder by reconstruction, bottleneck, perceptual and adversarial terms (paper, appendix G).

The generator's loss needs a weight that balances two gradients of the decoder's last layer (Esser et al. 2021, eq. 7).
Under ZeRO-3 that layer's weight is an empty shard and a graph can be walked back only once, so the graph is cut at the
reconstruction: both gradients are taken there, the layer's weight gradient is formed from them and its captured input
(it is linear in both), averaged over the ranks, and one backward carries their weighted sum on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from ldmscale.distributed.collectives import mean_tensor_over_ranks
from ldmscale.models.autoencoder import KLAutoencoder, VQAutoencoder
from ldmscale.models.bottleneck import Codes, Posterior
from ldmscale.stages import draws
from ldmscale.stages.latent_scale import ScaleMeter
from ldmscale.stages.pictures import side_by_side, to_uint8
from ldmscale.train.ema import Averages, ShardedEma, main_average
from ldmscale.train.engine import Engine
from ldmscale.train.stage import Batch, Picture

log = logging.getLogger(__name__)
Distance = Callable[[Tensor, Tensor], Tensor]  # two images [B,3,H,W] in [-1,1] -> [B]


@dataclass(frozen=True)
class LossTerms:
    """Weights of the terms; `config.AutoencoderLossConfig` tells their meaning."""

    sum_over_image: bool
    pixel_weight: float
    perceptual_weight: float
    kl_weight: float
    codebook_weight: float
    gan: str
    gan_weight: float
    gan_start_step: int


class RealAndFake(nn.Module):
    """The discriminator on both halves of its batch, in one forward of its engine, each with its own batch statistics."""

    def __init__(self, discriminator: nn.Module) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        return self.discriminator(real), self.discriminator(fake)


class AutoencoderStage:
    """Trains "generator" (the autoencoder) and, from `gan_start_step` on, "discriminator"."""

    def __init__(
        self,
        generator: Engine,
        discriminator: Engine,
        averages: Sequence[ShardedEma],
        distance: Distance | None,
        terms: LossTerms,
        seed: int,
        measure_batches: Callable[[], Iterator[Batch]],
        picture_batch: Batch,
        device: torch.device,
    ) -> None:
        self.engines = {"generator": generator, "discriminator": discriminator}
        self.averages: Averages = {"generator": averages}
        self.distance, self.terms, self.seed, self.device = distance, terms, seed, device
        self.measure_batches, self.picture_batch = measure_batches, picture_batch
        self.latent_statistics: dict[str, Any] | None = None
        network = generator.network
        assert isinstance(network, (KLAutoencoder, VQAutoencoder))
        self.autoencoder: KLAutoencoder | VQAutoencoder = network
        self.last_layer_input: Tensor | None = None
        network.last_layer.register_forward_hook(self._keep_input)

    def active(self, step: int) -> Sequence[str]:
        return ("generator", "discriminator") if step >= self.terms.gan_start_step else ("generator",)

    def micro_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        generator = self.engines["generator"]
        images = self._images(batch)  # [B,3,H,W]
        noise = self._posterior_noise(batch, images)
        reconstruction, bottleneck = generator(
            images.to(generator.compute_dtype), noise.to(generator.compute_dtype)
        )
        cut = reconstruction.detach().float().requires_grad_(True)  # [B,3,H,W]
        fit, metrics = self._reconstruction_loss(images, cut)
        (direction,) = torch.autograd.grad(fit, cut)
        adversarial = step >= self.terms.gan_start_step
        if adversarial:
            gan_direction, metrics["gan/generator"] = self._adversarial_direction(cut)
            weight = self._adaptive_weight(direction, gan_direction) * self.terms.gan_weight
            metrics["gan/adaptive_weight"] = weight
            direction = direction + weight * gan_direction
        regular, regular_metrics = self._bottleneck_loss(bottleneck)
        generator.backward((reconstruction.float() * direction.detach()).sum() + regular)
        metrics |= regular_metrics
        metrics["loss/total"] = fit.detach() + regular.detach()
        if adversarial:
            metrics["loss/total"] = (
                metrics["loss/total"] + metrics["gan/adaptive_weight"] * metrics["gan/generator"]
            )
            metrics |= self._train_discriminator(images, cut.detach())
        self.last_layer_input = None
        return metrics

    def pictures(self) -> Iterator[Picture]:
        images = self._images(self.picture_batch)
        with self._evaluating() as engine:
            reconstruction, _ = engine.network(images.to(engine.compute_dtype), None)
        yield Picture("reconstruction", side_by_side(to_uint8(images), to_uint8(reconstruction)))

    def finish(self) -> dict[str, float]:
        """Measure the scale of latents: nothing later has to guess it (pain 13)."""
        meter = None
        with self._evaluating() as engine:
            for batch in self.measure_batches():
                encoded = self.autoencoder.encode(self._images(batch).to(engine.compute_dtype))
                mean, logvar = (
                    (encoded.mean, encoded.logvar)
                    if isinstance(encoded, Posterior)
                    else (encoded.latent, None)
                )
                meter = meter or ScaleMeter(mean.shape[1])
                meter.add(mean, logvar)
        assert meter is not None, "the scale is measured over at least one batch"
        self.latent_statistics = meter.measured()
        log.info(
            "latent scale: factor %.5f over %d positions",
            self.latent_statistics["factor"],
            self.latent_statistics["positions"],
        )
        return {"latent/factor": self.latent_statistics["factor"]}

    def state(self) -> dict[str, Any]:
        return {"latent_statistics": self.latent_statistics}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.latent_statistics = state["latent_statistics"]

    @contextmanager
    def _evaluating(self) -> Iterator[Engine]:
        """The generator without gradients and dropout, with its averaged weights where it has them."""
        engine = self.engines["generator"]
        engine.network.eval()
        try:
            with torch.no_grad(), engine.averaged_weights(main_average(self.averages, "generator")):
                yield engine
        finally:
            engine.network.train()

    def _keep_input(self, _: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
        if torch.is_grad_enabled():
            self.last_layer_input = inputs[0].detach()

    def _images(self, batch: Batch) -> Tensor:
        """uint8 [B,3,H,W] of a batch -> float32 in [-1,1] on the device."""
        images: Tensor = batch["image"]
        pixels = images.to(self.device, non_blocking=True).float() / 127.5 - 1
        # Convolutions of the first stage are faster so, on GPUs and CPUs; the layout passes on from layer to layer.
        return pixels.contiguous(memory_format=torch.channels_last)

    def _posterior_noise(self, batch: Batch, images: Tensor) -> Tensor:
        network = self.autoencoder
        height, width = (side // network.downsampling for side in images.shape[-2:])
        shape = (network.latent_channels, height, width)
        return draws.normal(self.seed, batch["position"].tolist(), "posterior", shape).to(self.device)

    def _reconstruction_loss(
        self, images: Tensor, reconstruction: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """|x - x'| + perceptual distance, the latter at every pixel as published; summed or averaged over an image."""
        pixels = (images - reconstruction).abs().mean()
        loss = self.terms.pixel_weight * pixels
        metrics = {"loss/pixel": pixels.detach()}
        if self.distance is not None:
            perceptual = self.distance(images, reconstruction).mean()
            loss = loss + self.terms.perceptual_weight * perceptual
            metrics["loss/perceptual"] = perceptual.detach()
        return (loss * images[0].numel() if self.terms.sum_over_image else loss), metrics

    def _bottleneck_loss(self, bottleneck: Posterior | Codes) -> tuple[Tensor, dict[str, Tensor]]:
        if isinstance(bottleneck, Posterior):
            kl = bottleneck.kl().mean()
            return self.terms.kl_weight * kl, {"loss/kl": kl.detach()}
        codebook = bottleneck.loss
        return self.terms.codebook_weight * codebook, {"loss/codebook": codebook.detach()}

    def _adversarial_direction(self, reconstruction: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient of -mean(D(x')) at the reconstruction, by the frozen module: its engine must see one forward a step."""
        engine = self.engines["discriminator"]
        network = engine.network
        assert isinstance(network, RealAndFake)
        network.requires_grad_(False)
        adversarial = -network.discriminator(reconstruction.to(engine.compute_dtype)).float().mean()
        (direction,) = torch.autograd.grad(adversarial, reconstruction)
        network.requires_grad_(True)
        return direction, adversarial.detach()

    def _adaptive_weight(self, fit: Tensor, adversarial: Tensor) -> Tensor:
        """||grad of fit|| / (||grad of adversarial|| + 1e-4) at the last layer's weight, equal on all ranks."""
        layer, kept = self.autoencoder.last_layer, self.last_layer_input
        assert kept is not None
        shape = (layer.out_channels, layer.in_channels, *layer.kernel_size)

        def norm(direction: Tensor) -> Tensor:
            stride, padding = layer.stride, layer.padding
            gradient: Tensor = conv2d_weight(kept.float(), shape, direction.float(), stride, padding)  # type: ignore[no-untyped-call]
            length: Tensor = torch.linalg.vector_norm(mean_tensor_over_ranks(gradient))
            return length

        return (norm(fit) / (norm(adversarial) + 1e-4)).clamp(0, 1e4)

    def _train_discriminator(self, images: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
        engine = self.engines["discriminator"]
        real, fake = engine(images.to(engine.compute_dtype), reconstruction.to(engine.compute_dtype))
        real, fake = real.float(), fake.float()
        if self.terms.gan == "hinge":
            loss = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
        else:
            loss = (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2
        engine.backward(loss)
        return {
            "gan/discriminator": loss.detach(),
            "gan/logit_real": real.detach().mean(),
            "gan/logit_fake": fake.detach().mean(),
        }
