"""The adversarial terms of stage 1: gradient of the generator loss, adaptive weight, and the discriminator's step.

The generator's loss needs a weight that balances two gradients of the decoder's last layer (Esser et al. 2021, eq. 7).
Under ZeRO-3 that layer's weight is an empty shard and a graph can be walked back only once, so the graph is cut at the
reconstruction: both gradients are taken there, the layer's weight gradient is formed from them and its captured input
(it is linear in both), averaged over the ranks, and one backward carries their weighted sum on.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from ldmscale.distributed.collectives import mean_tensor_over_ranks
from ldmscale.models.discriminator import PatchDiscriminator
from ldmscale.train.engine.engine import Engine


class GanOptions(Protocol):
    """The `loss` section of the configuration, as far as the adversarial terms read it."""

    @property
    def gan(self) -> Literal["hinge", "vanilla"]: ...
    @property
    def gan_weight(self) -> float: ...
    @property
    def gan_adaptive(self) -> bool: ...
    @property
    def gan_start_step(self) -> int: ...
    @property
    def r1_weight(self) -> float: ...
    @property
    def r1_every_steps(self) -> int: ...


class DiscriminatorOnPair(nn.Module):
    """The discriminator on real and fake images in one forward of its engine, each with its own batch statistics.

    With a `direction` it also returns the derivative of the real logits along it.
    """

    def __init__(self, discriminator: PatchDiscriminator) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(self, real: Tensor, fake: Tensor, direction: Tensor | None = None) -> tuple[Tensor, ...]:
        """real, fake, direction [B,3,H,W] -> logits [B,1,h,w] of real and fake, and the derivative."""
        if direction is None:
            return self.discriminator(real), self.discriminator(fake)
        logits, slope = self.discriminator(real, direction)
        return logits, self.discriminator(fake), slope


class Adversary:
    """The discriminator's engine, and the decoder's last layer, whose input is captured in every training forward."""

    def __init__(self, engine: Engine, last_layer: nn.Conv2d, options: GanOptions) -> None:
        self.engine, self.last_layer, self.options = engine, last_layer, options
        network = engine.network
        assert isinstance(network, DiscriminatorOnPair)
        self.network = network
        self._captured: Tensor | None = None
        last_layer.register_forward_hook(self._capture)

    def active(self, step: int) -> bool:
        return step >= self.options.gan_start_step

    def generator_loss_grad(self, reconstruction: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of the generator loss -mean(D(x')) at the reconstruction, and the loss."""
        loss = -self._logits_without_weight_grads(reconstruction).mean()
        (direction,) = torch.autograd.grad(loss, reconstruction)
        self.network.requires_grad_(True)
        return direction, loss.detach()

    def adaptive_weight(self, grad_rec: Tensor, grad_gan: Tensor) -> Tensor:
        """The weight of the adversarial gradient against that of the reconstruction; a scalar, equal on all ranks."""
        if not self.options.gan_adaptive:
            return grad_rec.new_tensor(self.options.gan_weight)
        ratio = self._last_layer_norm(grad_rec) / (self._last_layer_norm(grad_gan) + 1e-4)
        return ratio.clamp(0, 1e4) * self.options.gan_weight

    def train(self, images: Tensor, reconstruction: Tensor, step: int) -> dict[str, Tensor]:
        """Forward and backward of the discriminator on one pass; its metrics."""
        dtype = self.engine.compute_dtype
        penalised = self.options.r1_weight > 0 and step % self.options.r1_every_steps == 0
        inputs = [images.to(dtype), reconstruction.to(dtype)]
        if penalised:
            inputs.append(self._grad_penalty_direction(images).to(dtype))
        outputs = [out.float() for out in self.engine(*inputs)]
        real, fake = outputs[:2]
        if self.options.gan == "hinge":
            loss = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
        else:
            loss = (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2
        metrics = {
            "gan/discriminator": loss.detach(),
            "gan/logit_real": real.detach().mean(),
            "gan/logit_fake": fake.detach().mean(),
            "gan/right_share": ((real.detach() > 0).float().mean() + (fake.detach() < 0).float().mean()) / 2,
        }
        if penalised:
            # With g = grad D held, d|grad D|^2/2 is the derivative along g: its value is |g|^2, its gradient the penalty's.
            along = outputs[2].mean()
            metrics["gan/r1"] = along.detach() / 2
            loss = loss + self.options.r1_weight * self.options.r1_every_steps * along
        self.engine.backward(loss)
        return metrics

    def clear_cache(self) -> None:
        """Release the captured input."""
        self._captured = None

    def _logits_without_weight_grads(self, images: Tensor) -> Tensor:
        """Discriminator logits with gradients to its weights disabled; the caller enables them again.

        Called on the module, not the engine, which must run exactly one forward per backward.
        """
        self.network.requires_grad_(False)
        logits: Tensor = self.network.discriminator(images.to(self.engine.compute_dtype))
        return logits.float()

    def _grad_penalty_direction(self, images: Tensor) -> Tensor:
        """Gradient of each image's mean logit at the image, [B,3,H,W] float32."""
        held = images.detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(self._logits_without_weight_grads(held).mean() * len(images), held)
        self.network.requires_grad_(True)
        return slope

    def _last_layer_norm(self, direction: Tensor) -> Tensor:
        """Norm of the last weight's gradient, averaged over ranks, for a gradient [B,3,H,W] at the reconstruction."""
        layer, kept = self.last_layer, self._captured
        assert kept is not None
        shape = (layer.out_channels, layer.in_channels, *layer.kernel_size)
        gradient: Tensor = conv2d_weight(  # type: ignore[no-untyped-call]
            kept.float(), shape, direction.float(), layer.stride, layer.padding
        )
        length: Tensor = torch.linalg.vector_norm(mean_tensor_over_ranks(gradient))
        return length

    def _capture(self, _: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
        if torch.is_grad_enabled():
            self._captured = inputs[0].detach()
