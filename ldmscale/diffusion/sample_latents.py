"""Drawing images by a denoiser: the same function in training (sharded, averaged weights), in `sample` and in notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ldmscale.diffusion import samplers
from ldmscale.diffusion.guidance import Denoise, guided
from ldmscale.diffusion.process import NoiseSchedule
from ldmscale.diffusion.samplers import FreshNoise, Keep
from ldmscale.diffusion.timesteps import Path, path_of
from ldmscale.distributed.rng import generator
from ldmscale.models.conditions import Conditions
from ldmscale.models.denoiser import Denoiser


@dataclass(frozen=True)
class SamplerOptions:
    """How an image is drawn."""

    steps: int = 50
    guidance: float = 5.0  # on the context: caption, class, embeddings
    eta: float = 0.0  # of ddim; 0: deterministic; 1: the variance of DDPM
    prediction: str = "eps"
    sampler: str = "ddim"  # one of diffusion.spacing.SAMPLERS
    spacing: str | None = None  # of the timesteps; None: the sampler's published one
    guidance_rescale: float = (
        0.0  # share of the guided prediction that gets back the conditional one's spread
    )
    spatial_guidance: float = 1.0  # on what is joined to the latent


@dataclass(frozen=True)
class Given:
    """Images to start from (image-to-image) or to keep in part (inpainting)."""

    latents: Tensor  # float32 [N,C,H,W], scaled
    strength: float = 1.0  # share of the steps that are followed, from the image with noise
    redraw: Tensor | None = None  # float32 [N,1,H,W], 1 where the image is drawn anew, 0 where it is kept


@dataclass(frozen=True)
class Negative:
    """What guidance moves away from."""

    conditions: Conditions  # of N samples
    null: Tensor  # bool [N], where the model's null condition takes their place


def starting_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Noise of each seed, float32 [N, *shape]: a function of the seed alone, whatever the batch or the rank."""
    drawn = [generator(seed, 0, "sample").standard_normal(tuple(shape), dtype=np.float32) for seed in seeds]
    return torch.from_numpy(np.stack(drawn))


def steps_of_strength(steps: int, strength: float) -> int:
    """How many of `steps` image-to-image follows: int(steps * strength).

    Raises ValueError where that is none, or `strength` is not within 0 to 1.
    """
    if not 0 < strength <= 1 or int(steps * strength) < 1:
        raise ValueError(
            f"strength {strength} of {steps} steps: expected more than 0 and at most 1, and one whole step"
        )
    return int(steps * strength)


@torch.no_grad()
def draw_latents(
    denoiser: Denoiser,
    conditions: Conditions,
    noise: Tensor,
    schedule: NoiseSchedule,
    options: SamplerOptions,
    dtype: torch.dtype,
    seeds: Sequence[int],
    negative: Negative | None = None,
    given: Given | None = None,
) -> Tensor:
    """Scaled latents for conditions.

    Args:
        conditions: of N samples, what this denoiser reads, on its device.
        noise: float32 [N,C,H,W] on the same device.
        dtype: of the network's weights; the sampler itself works in float32.
        seeds: of each image, for the noise that eta > 0 and ddpm add.
        negative: what guidance moves away from; the null condition unless given. given: images to start from, on the same device.

    Returns:
        float32 [N,C,H,W].
    """
    told = _Told(*_encoded(denoiser, conditions, negative, len(noise)))

    def denoise(x: Tensor, t: Tensor, numbers: Sequence[int]) -> Tensor:
        context, concat = told.batch(tuple(numbers))
        return denoiser.denoise(x.to(dtype), t, context, concat).float()

    def fresh_noise(step: int) -> Tensor:
        drawn = [
            generator(seed, step + 1, "sample").standard_normal(tuple(noise.shape[1:]), dtype=np.float32)
            for seed in seeds
        ]
        return torch.from_numpy(np.stack(drawn)).to(noise.device, non_blocking=True)

    ready = guided(denoise, told.scales(options), options.guidance_rescale)
    path = path_of(options.sampler, schedule, options.steps, options.spacing)
    start = path.start * noise
    keep: Keep = samplers.as_it_is
    if given is not None:
        path = path.last(steps_of_strength(options.steps, given.strength))
        start, keep = _started(given, noise, path)
    return follow(ready, start, path, options, fresh_noise, keep)


def follow(
    denoise: Denoise,
    x: Tensor,
    path: Path,
    options: SamplerOptions,
    fresh_noise: FreshNoise,
    keep: Keep = samplers.as_it_is,
) -> Tensor:
    """Follow a path from x [B,C,H,W] by the sampler that `options` names."""
    prediction = options.prediction
    if options.sampler == "ddim":
        return samplers.ddim(
            denoise, x, path, prediction=prediction, eta=options.eta, fresh_noise=fresh_noise, keep=keep
        )
    if options.sampler == "ddpm":
        return samplers.ddpm(denoise, x, path, prediction=prediction, fresh_noise=fresh_noise, keep=keep)
    if options.sampler == "euler":
        return samplers.euler(denoise, x, path, prediction=prediction, keep=keep)
    if options.sampler == "plms":
        return samplers.plms(denoise, x, path, prediction=prediction, keep=keep)
    if options.sampler == "dpmpp_2m":
        return samplers.dpmpp_2m(denoise, x, path, prediction=prediction, keep=keep)
    raise ValueError(f"sampler {options.sampler!r}: there is none of that name")


class _Told:
    """What the predictions of guidance are told: number 0 the least, each further one a condition more.

    What is joined to the latent comes before the context, as in InstructPix2Pix; dropped it is zeros. A model without one
    of them, or without a null condition, has a prediction less.
    """

    def __init__(self, context: Tensor | None, null_context: Tensor | None, concat: Tensor | None) -> None:
        self._context, self._null, self._concat = context, null_context, concat
        self._batches: dict[tuple[int, ...], tuple[Tensor | None, Tensor | None]] = {}

    def scales(self, options: SamplerOptions) -> list[float]:
        """Of each condition that can be dropped, in their order."""
        spatial = [] if self._concat is None else [options.spatial_guidance]
        return spatial + ([] if self._null is None else [options.guidance])

    def batch(self, numbers: tuple[int, ...]) -> tuple[Tensor | None, Tensor | None]:
        """Context [M N,L,D] and joined channels [M N,K,h,w] of M predictions; made once for all steps."""
        if numbers not in self._batches:
            contexts, joined = [], []
            for number in numbers:
                with_concat = number >= 1 or self._concat is None
                with_context = self._null is None or number >= 1 + (self._concat is not None)
                contexts.append(self._context if with_context else self._null)
                joined.append(
                    self._concat if with_concat or self._concat is None else torch.zeros_like(self._concat)
                )
            self._batches[numbers] = (_joined(contexts), _joined(joined))
        return self._batches[numbers]


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else None


def _started(given: Given, noise: Tensor, path: Path) -> tuple[Tensor, Keep]:
    """Where a path starts from given images, and what is kept of them at each level.

    The kept part is put back with the same noise at every level (as in RePaint, Lugmayr et al. 2022, but without
    resampling), so that a model that was never trained for inpainting sees it as noisy as the rest.
    """

    def at(level: float) -> Tensor:
        noisy: Tensor = level**0.5 * given.latents + (1 - level) ** 0.5 * noise
        return noisy

    redraw, bar = given.redraw, path.bars[0]
    if redraw is None:
        return at(bar), samplers.as_it_is

    def keep(x: Tensor, level: float) -> Tensor:
        return torch.lerp(at(level), x, redraw)

    # What is redrawn whole must not see what was there.
    start = path.start * noise if given.strength == 1 else at(bar)
    return keep(start, bar), keep


def _encoded(
    denoiser: Denoiser, conditions: Conditions, negative: Negative | None, count: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Context and null or negative context [N,L,D] and joined channels [N,K,h,w]; None what the model does not have."""
    if not denoiser.has_null:
        context, concat = denoiser.encode(conditions)
        return context, None, concat
    nothing = torch.zeros(count, dtype=torch.bool, device=next(p.device for p in conditions if p is not None))
    if negative is None:
        negative = Negative(conditions, ~nothing)
    # One pass of the text transformer for both: every rank must call each network equally often (ZeRO-3).
    pairs = zip(conditions, negative.conditions, strict=True)
    stacked = Conditions(*(None if a is None or b is None else torch.cat([a, b]) for a, b in pairs))
    both, joined = denoiser.encode(stacked, torch.cat([nothing, negative.null]))
    assert both is not None
    return both[:count], both[count:], None if joined is None else joined[:count]
