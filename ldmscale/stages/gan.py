"""The adversarial half of stage 1: its pull on the reconstruction, how strongly it counts, and the discriminator's step.

The generator's loss needs a weight that balances two gradients of the decoder's last layer (Esser et al. 2021, eq. 7).
Under ZeRO-3 that layer's weight is an empty shard and a graph can be walked back only once, so the graph is cut at the
reconstruction: both gradients are taken there, the layer's weight gradient is formed from them and its captured input
(it is linear in both), averaged over the ranks, and one backward carries their weighted sum on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from ldmscale.distributed.collectives import mean_tensor_over_ranks
from ldmscale.models.discriminator import PatchDiscriminator
from ldmscale.train.engine.engine import Engine


@dataclass(frozen=True)
class AdversaryTerms:
    """`config.AutoencoderLossConfig` tells their meaning."""

    gan: str
    weight: float
    adaptive: bool
    start_step: int
    r1_weight: float
    r1_every_steps: int


class RealAndFake(nn.Module):
    """The discriminator on both halves of its batch, in one forward of its engine, each with its own batch statistics.

    With a `direction` it also gives the derivative of the real logits along it.
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

    def __init__(self, engine: Engine, last_layer: nn.Conv2d, terms: AdversaryTerms) -> None:
        self.engine, self.last_layer, self.terms = engine, last_layer, terms
        network = engine.network
        assert isinstance(network, RealAndFake)
        self.network = network
        self._captured: Tensor | None = None
        last_layer.register_forward_hook(self._capture)

    def active(self, step: int) -> bool:
        return step >= self.terms.start_step

    def pull(self, reconstruction: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient of -mean(D(x')) at the reconstruction, and that value."""
        adversarial = -self._frozen(reconstruction).mean()
        (direction,) = torch.autograd.grad(adversarial, reconstruction)
        self.network.requires_grad_(True)
        return direction, adversarial.detach()

    def weight(self, fit: Tensor, adversarial: Tensor) -> Tensor:
        """What the adversarial direction counts against that of the fit; a scalar, equal on all ranks."""
        if not self.terms.adaptive:
            return fit.new_tensor(self.terms.weight)
        ratio = self._length(fit) / (self._length(adversarial) + 1e-4)
        return ratio.clamp(0, 1e4) * self.terms.weight

    def train(self, images: Tensor, reconstruction: Tensor, step: int) -> dict[str, Tensor]:
        """Forward and backward of the discriminator on one pass; its metrics."""
        dtype = self.engine.compute_dtype
        penalised = self.terms.r1_weight > 0 and step % self.terms.r1_every_steps == 0
        inputs = [images.to(dtype), reconstruction.to(dtype)]
        if penalised:
            inputs.append(self._slope_at(images).to(dtype))
        outputs = [out.float() for out in self.engine(*inputs)]
        real, fake = outputs[:2]
        if self.terms.gan == "hinge":
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
            loss = loss + self.terms.r1_weight * self.terms.r1_every_steps * along
        self.engine.backward(loss)
        return metrics

    def forget(self) -> None:
        """Let go of the captured input."""
        self._captured = None

    def _frozen(self, images: Tensor) -> Tensor:
        """Logits by the frozen module, until someone thaws it: its engine must see one forward a pass."""
        self.network.requires_grad_(False)
        logits: Tensor = self.network.discriminator(images.to(self.engine.compute_dtype))
        return logits.float()

    def _slope_at(self, images: Tensor) -> Tensor:
        """Gradient of each image's mean logit at the image, [B,3,H,W] float32."""
        held = images.detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(self._frozen(held).mean() * len(images), held)
        self.network.requires_grad_(True)
        return slope

    def _length(self, direction: Tensor) -> Tensor:
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
