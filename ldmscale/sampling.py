"""`sample`: images for prompts, the same image for the same prompt and seed whatever the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldmscale.errors import ConfigError
from ldmscale.models.conditions import Conditions
from ldmscale.parts import Parts
from ldmscale.stages.drawing import SamplerOptions, draw_latents, starting_noise


@torch.no_grad()
def sample(
    parts: Parts,
    prompts: Sequence[str],
    steps: int = 50,
    sampler: str = "ddim",
    guidance: float = 5.0,
    seeds: Sequence[int] | None = None,
    noise: Tensor | None = None,
    eta: float = 0.0,
    conditions: Conditions | None = None,
) -> Tensor:
    """Draw one image for each prompt.

    Args:
        parts: a diffusion model (`load`), all parts on one device.
        steps: of the sampler. sampler: "ddim".
        guidance: 1 follows the caption as trained; more follows it more closely (Ho and Salimans 2022).
        seeds: one for each prompt; 0, 1, 2 ... unless given.
        noise: float32 [N,C,h,w] to start from, in place of the seeds'.
        eta: 0 is deterministic; 1 adds the noise of DDPM.
        conditions: of as many samples, for a model that reads other things than captions; the prompts are then not read.

    Returns:
        float32 [N,3,H,W] in [-1,1] on the CPU.

    Raises:
        ConfigError: the model has no part that sampling needs, or there is no such sampler.
    """
    if sampler != "ddim":
        raise ConfigError(f"sampler={sampler!r}: expected ddim")
    wanted = ["denoiser", "autoencoder", "schedule", "scale", "latent_shape"]
    if parts.text_encoder is not None and conditions is None:
        wanted.append("tokenizer")
    if missing := [name for name in wanted if getattr(parts, name) is None]:
        raise ConfigError(
            f"the model has no {', '.join(missing)}: sampling needs a diffusion run with its first stage"
        )
    assert parts.denoiser and parts.autoencoder
    assert parts.schedule and parts.scale and parts.latent_shape
    weight = next(parts.denoiser.parameters())
    seeds = list(range(len(prompts))) if seeds is None else list(seeds)
    start = starting_noise(seeds, parts.latent_shape) if noise is None else noise
    if conditions is None:
        conditions = Conditions()
        if parts.tokenizer is not None:
            conditions = Conditions(torch.from_numpy(parts.tokenizer.encode(list(prompts))))
    latents = draw_latents(
        parts.denoiser,
        conditions.to(weight.device),
        start.to(weight.device),
        parts.schedule,
        SamplerOptions(steps, guidance, eta, parts.prediction),
        weight.dtype,
        seeds,
    )
    images = parts.autoencoder.decode(
        parts.scale.unscale(latents).to(next(parts.autoencoder.parameters()).dtype)
    )
    return images.float().clamp(-1, 1).cpu()
