"""Drawing images by a denoiser: the same function in training (sharded, averaged weights), in `sample` and in notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ldmscale.diffusion.guidance import guided
from ldmscale.diffusion.samplers import ddim
from ldmscale.diffusion.schedule import NoiseSchedule
from ldmscale.distributed.seeds import generator
from ldmscale.models.conditions import Conditions
from ldmscale.models.denoiser import Denoiser


@dataclass(frozen=True)
class SamplerOptions:
    """How an image is drawn."""

    steps: int = 50
    guidance: float = 5.0
    eta: float = 0.0  # 0: deterministic DDIM; 1: the variance of DDPM
    prediction: str = "eps"


def starting_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Noise of each seed, float32 [N, *shape]: a function of the seed alone, whatever the batch or the rank."""
    drawn = [generator(seed, 0, "sample").standard_normal(tuple(shape), dtype=np.float32) for seed in seeds]
    return torch.from_numpy(np.stack(drawn))


@torch.no_grad()
def draw_latents(
    denoiser: Denoiser,
    conditions: Conditions,
    noise: Tensor,
    schedule: NoiseSchedule,
    options: SamplerOptions,
    dtype: torch.dtype,
    seeds: Sequence[int],
) -> Tensor:
    """Scaled latents for conditions.

    Args:
        conditions: of N samples, what this denoiser reads, on its device.
        noise: float32 [N,C,H,W] on the same device.
        dtype: of the network's weights; the sampler itself works in float32.
        seeds: of each image, for the noise that eta > 0 adds.

    Returns:
        float32 [N,C,H,W].
    """
    context, null_context, concat = _encoded(denoiser, conditions, len(noise))

    def denoise(x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        # Guidance asks for both halves at once; what is joined to the latent is the same in both.
        joined = concat if concat is None or len(x) == len(concat) else torch.cat([concat, concat])
        return denoiser.denoise(x.to(dtype), t, condition, joined).float()

    def fresh_noise(step: int) -> Tensor:
        drawn = [
            generator(seed, step + 1, "sample").standard_normal(tuple(noise.shape[1:]), dtype=np.float32)
            for seed in seeds
        ]
        return torch.from_numpy(np.stack(drawn)).to(noise.device)

    if context is None or null_context is None:
        step = lambda x, t: denoise(x, t, context)  # noqa: E731
    else:
        step = guided(denoise, context, null_context, options.guidance)
    return ddim(
        step,
        noise,
        schedule,
        options.steps,
        prediction=options.prediction,
        eta=options.eta,
        fresh_noise=fresh_noise,
    )


def _encoded(
    denoiser: Denoiser, conditions: Conditions, count: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Context and null context [N,L,D] and joined channels [N,K,h,w]; None what the model does not have."""
    if not denoiser.has_null:
        context, concat = denoiser.encode(conditions)
        return context, None, concat
    # One pass of the text transformer for both: every rank must call each network equally often (ZeRO-3).
    nothing = torch.zeros(count, dtype=torch.bool, device=next(p.device for p in conditions if p is not None))
    both, joined = denoiser.encode(
        conditions.changed(lambda part: torch.cat([part, part])), torch.cat([nothing, ~nothing])
    )
    assert both is not None
    return both[:count], both[count:], None if joined is None else joined[:count]
