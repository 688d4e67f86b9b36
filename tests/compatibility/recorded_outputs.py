"""Outputs of load, build and sample on fixed inputs, in one form for the commit that is recorded and the one that is tested.

Only the stable Python interface is used, so that the same file runs on both. Run folders refer to each other by relative
paths: the working directory must be the folder that holds them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ldmscale

PROMPTS = ["a red square", "a green bar"]
# Sizes of published models. Meta tensors: nothing is allocated.
COUNTED = ("ldm_text2img_1p45b", "ldm_class_f4", "ldm_semantic_256", "autoencoder_kl_f8", "autoencoder_vq_f8")


def wave(*shape: int) -> Tensor:
    """Values in [-1, 1] that need no random generator. float32 of `shape`."""
    numbers = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(numbers * 0.7 + 0.1).reshape(shape).float()


def listed(values: Tensor, every: int = 1) -> list[float]:
    """Each value, or one of `every`, with seven significant digits."""
    return [float(f"{value:.7g}") for value in values.detach().flatten()[::every].tolist()]


@torch.no_grad()
def of_autoencoder(run: Path) -> dict[str, Any]:
    """Posterior and reconstruction by the autoencoder of a run folder."""
    parts = ldmscale.load(run)
    assert parts.autoencoder is not None
    posterior = parts.autoencoder.encode(wave(1, 3, 16, 16))
    return {
        "mean": listed(posterior.mean),
        "logvar": listed(posterior.logvar),
        "decoded": listed(parts.autoencoder.decode(posterior.mean), every=7),
    }


@torch.no_grad()
def of_diffusion(run: Path) -> dict[str, Any]:
    """Token ids, text vectors, predictions by averaged and raw weights, and two images of a diffusion run."""
    parts, raw = ldmscale.load(run, ema=True), ldmscale.load(run, ema=False)
    assert parts.unet is not None and raw.unet is not None
    assert parts.text_encoder is not None and parts.tokenizer is not None and parts.latent_shape is not None
    x, t, context = wave(1, *parts.latent_shape), torch.tensor([321]), wave(1, 6, 8)
    token_ids = parts.tokenizer.encode(PROMPTS)
    return {
        "token_ids": torch.as_tensor(token_ids).tolist(),
        "text": listed(parts.text_encoder(torch.as_tensor(token_ids))[0]),
        "averaged": listed(parts.unet(x, t, context=context)),
        "raw": listed(raw.unet(x, t, context=context)),
        "images": listed(ldmscale.sample(parts, PROMPTS, steps=3, guidance=2.0, seeds=[3, 4]), every=7),
    }


@torch.no_grad()
def of_build() -> dict[str, Any]:
    """Parameter counts of published models, and a prediction of the smoke test's U-Net with weights made from their names."""
    counts = {}
    for experiment in COUNTED:
        parts = ldmscale.build(experiment=experiment)
        networks = {"autoencoder": parts.autoencoder, "denoiser": parts.denoiser, "unet": parts.unet}
        counts[experiment] = {
            name: sum(p.numel() for p in network.parameters())
            for name, network in networks.items()
            if isinstance(network, nn.Module)
        }
    parts = ldmscale.build(experiment="smoke", device="cpu")
    assert parts.unet is not None
    for name, parameter in parts.unet.named_parameters():
        parameter.copy_(wave(*parameter.shape) * (0.05 + 0.01 * (len(name) % 5)))
    prediction = parts.unet.eval()(wave(1, 4, 8, 8), torch.tensor([321]), context=wave(1, 16, 64))
    return {"parameters": counts, "smoke": listed(prediction)}
