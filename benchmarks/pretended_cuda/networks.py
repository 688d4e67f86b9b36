"""Networks of ldmscale and of diffusers, with the same parameters, forward and backward on pretended CUDA in bf16."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import ldmscale
from benchmarks.pretended_cuda.counters import BLOCKING, WAIT, Totals
from benchmarks.pretended_cuda.mode import CUDA, PretendedCuda

OURS, DIFFUSERS = "ours", "diffusers"
RATIOS = ("kernels", "gib_moved", "peak_gib", "roofline_ms")
# Upper limits of our count over that of diffusers, at the default batch and side of each comparison.
LIMITS = {
    "unet": dict(zip(RATIOS, (0.90, 0.94, 0.85, 0.975), strict=True)),
    "autoencoder": dict(zip(RATIOS, (0.95, 0.95, 1.00, 0.97), strict=True)),
}
Made = tuple[nn.Module, Callable[[], Tensor]]  # a network, and its forward pass on a fixed input


@dataclass(frozen=True)
class Measured:
    """One network's forward and backward pass."""

    name: str
    parameters: int
    totals: Totals

    @property
    def waits(self) -> int:
        return self.totals.notes[WAIT] + self.totals.notes[BLOCKING]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Networks are built in their final type: torch cannot convert the parameters of a pretended module in place."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def compare_unets(
    batch: int, side: int, overrides: Sequence[str] = (), *, small: bool = False
) -> list[Measured]:
    """The U-Net of the 1.45B model (872 M parameters) without checkpointing. `small` narrows it to 64 channels.

    Args:
        batch: samples.
        side: height and width of the latents.
        overrides: further settings of ours, for instance "unet.checkpointing=full".
        small: 64 in place of 320 channels, for tests.
    """
    channels, context = (64, 128) if small else (320, 1280)
    heads = 8

    def ours() -> Made:
        settings = ["unet.checkpointing=off"]
        if small:
            settings += [
                f"unet.channels={channels}",
                f"unet.context_dim={context}",
                f"text_encoder.width={context}",
            ]
        net = ldmscale.build("ldm_text2img_1p45b", [*settings, *overrides], device=str(CUDA)).unet
        if net is None:
            raise AssertionError("the experiment has no U-Net")
        x, time, text = inputs()
        return net, lambda: net(x, time, text)

    def theirs() -> Made:
        from diffusers import UNet2DConditionModel

        with torch.device(CUDA):
            net: Any = UNet2DConditionModel(
                sample_size=side,
                in_channels=4,
                out_channels=4,
                block_out_channels=(channels, 2 * channels, 4 * channels, 4 * channels),
                layers_per_block=2,
                attention_head_dim=heads,
                cross_attention_dim=context,
                down_block_types=(*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
                up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
            )
        x, time, text = inputs()
        return net, lambda: net(x, time, text).sample

    def inputs() -> tuple[Tensor, Tensor, Tensor]:
        return (
            torch.randn(batch, 4, side, side, device=CUDA, dtype=torch.bfloat16),
            torch.zeros(batch, device=CUDA, dtype=torch.int64),
            torch.randn(batch, 77, context, device=CUDA, dtype=torch.bfloat16),
        )

    return [measure(OURS, ours), measure(DIFFUSERS, theirs)]


def compare_autoencoders(
    batch: int, side: int, overrides: Sequence[str] = (), *, small: bool = False
) -> list[Measured]:
    """The KL autoencoder of factor 8: encoder, posterior sample, decoder. `small` narrows it to 32 channels."""
    channels = 32 if small else 128

    def inputs() -> tuple[Tensor, Tensor]:
        return (
            torch.randn(batch, 3, side, side, device=CUDA, dtype=torch.bfloat16),
            torch.randn(batch, 4, side // 8, side // 8, device=CUDA, dtype=torch.bfloat16),
        )

    def ours() -> Made:
        settings = [f"autoencoder.channels={channels}"] if small else []
        net = ldmscale.build("autoencoder_kl_f8", [*settings, *overrides], device=str(CUDA)).autoencoder
        if net is None:
            raise AssertionError("the experiment has no autoencoder")
        image, noise = inputs()
        return net, lambda: net(image, noise)[0]

    def theirs() -> Made:
        from diffusers import AutoencoderKL

        with torch.device(CUDA):
            net: Any = AutoencoderKL(
                block_out_channels=(channels, 2 * channels, 4 * channels, 4 * channels),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
                latent_channels=4,
            )

        image, noise = inputs()

        def forward() -> Tensor:
            mean, logvar = net.encode(image).latent_dist.parameters.chunk(2, 1)
            decoded: Tensor = net.decode(mean + torch.exp(0.5 * logvar) * noise).sample
            return decoded

        return net, forward

    return [measure(OURS, ours), measure(DIFFUSERS, theirs)]


def measure(name: str, make: Callable[[], Made]) -> Measured:
    """Forward, mean square, backward of the network that `make` builds in bf16 inside of a fresh device."""
    with PretendedCuda() as gpu:
        with default_dtype(torch.bfloat16):
            network, forward = make()
        network.train()
        gpu.counters.reset()
        (forward().float() - 1).square().mean().backward()
        parameters = sum(p.numel() for p in network.parameters())
        return Measured(name, parameters, gpu.counters.totals())


def ratios(measured: Sequence[Measured]) -> dict[str, float]:
    """The first over the second."""
    ours, theirs = measured
    return {key: getattr(ours.totals, key) / getattr(theirs.totals, key) for key in RATIOS}


def above_limits(what: str, found: dict[str, float]) -> list[str]:
    """What of `ratios` is above `LIMITS`, in words."""
    return [
        f"{what}: {key} is {found[key]:.3f} of that of diffusers, the limit is {limit}"
        for key, limit in LIMITS[what].items()
        if found[key] > limit
    ]
