"""The published diffusion models as whole experiments: parameters of every part to the unit, settings value by value."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import nn

from ldmscale import build
from ldmscale.builders.networks import blank_conditions
from ldmscale.config import DiffusionJob
from ldmscale.config.checks import check
from ldmscale.config.compose import compose_job
from ldmscale.config.typed import read


class FirstStage(NamedTuple):
    encoder: int
    decoder: int
    quant_convs: int
    codebook: int
    total: int


VQ_F4 = FirstStage(22_337_411, 32_960_771, 24, 24_576, 55_322_782)
VQ_F4_NOATTN = FirstStage(21_285_763, 31_909_123, 24, 24_576, 53_219_486)
VQ_F8 = FirstStage(27_397_764, 40_253_955, 40, 65_536, 67_717_295)
KL_F8 = FirstStage(34_163_592, 49_490_179, 92, 0, 83_653_863)
KL_F16 = FirstStage(28_265_760, 41_343_875, 1_328, 0, 69_610_963)


class Published(NamedTuple):
    """One row: parameters as counted in the released code, latent's shape, betas, loss, rate at the batch."""

    unet: int
    first_stage: FirstStage
    condition: int  # with the released head over the vocabulary
    unread_head: int  # which no gradient reaches and which is left out here
    total: int
    latent: tuple[int, int, int]
    betas: tuple[float, float]
    loss: str
    rate: float


FACES = (274_056_163, VQ_F4, 0, 0, 329_378_945, (3, 64, 64), (0.0015, 0.0195), "l2")
MODELS = {
    "ldm_celebahq": Published(*FACES, 48 * 2e-6),
    "ldm_ffhq": Published(*FACES, 42 * 2e-6),
    "ldm_bedrooms": Published(*FACES, 48 * 2e-6),
    "ldm_churches": Published(294_966_916, KL_F8, 0, 0, 378_620_779, (4, 32, 32), (0.0015, 0.0155), "l1", 5e-5),
    "ldm_class_f4": Published(400_920_579, VQ_F4, 512_512, 0, 456_755_873, (3, 64, 64), (0.0015, 0.0195), "l2", 1e-4),
    "ldm_class_f8": Published(
        394_984_196, VQ_F8, 512_000, 0, 463_213_491, (4, 32, 32), (0.0015, 0.0195), "l2", 64e-6
    ),
    "ldm_text2img_1p45b": Published(
        872_300_484, KL_F8, 581_994_042, 39_098_682, 1_537_948_389, (4, 32, 32), (0.00085, 0.012), "l2", 5e-5
    ),
    "ldm_text2img_256": Published(
        403_623_939, VQ_F4, 186_154_682, 19_564_602, 645_101_403, (3, 64, 64), (0.0015, 0.0195), "l2", 28 * 2e-6
    ),
    "ldm_layout_openimages": Published(
        246_277_379, VQ_F4, 58_858_496, 4_202_496, 360_458_657, (3, 64, 64), (0.0015, 0.0205), "l1", 24 * 2e-6
    ),
    "ldm_semantic_256": Published(
        215_229_315, VQ_F4, 546, 0, 270_552_643, (3, 64, 64), (0.0015, 0.0205), "l1", 48e-6
    ),
    "ldm_semantic_512": Published(
        215_229_315, VQ_F4, 546, 0, 270_552_643, (3, 128, 128), (0.0015, 0.0205), "l1", 8e-6
    ),
    "ldm_superres_x4": Published(113_622_563, VQ_F4, 0, 0, 168_945_345, (3, 64, 64), (0.0015, 0.0155), "l2", 64e-6),
    "ldm_inpainting_big": Published(
        387_245_827, VQ_F4_NOATTN, 0, 0, 440_465_313, (3, 64, 64), (0.0015, 0.0205), "l1", 48e-7
    ),
    "ldm_retrieval_768": Published(
        1_335_480_400, KL_F16, 0, 0, 1_405_091_363, (16, 48, 48), (0.0015, 0.015), "l2", 1e-4
    ),
}  # fmt: skip
CONDITIONS = {
    "ldm_class_f4": {"labels"},
    "ldm_class_f8": {"labels"},
    "ldm_text2img_1p45b": {"token_ids"},
    "ldm_text2img_256": {"token_ids"},
    "ldm_layout_openimages": {"token_ids"},
    "ldm_semantic_256": {"spatial"},
    "ldm_semantic_512": {"spatial"},
    "ldm_superres_x4": {"spatial"},
    "ldm_inpainting_big": {"spatial"},
    "ldm_retrieval_768": {"embeddings"},
}


def count(*networks: nn.Module | None) -> int:
    return sum(p.numel() for network in networks if network is not None for p in network.parameters())


def composed(name: str, *overrides: str) -> DiffusionJob:
    given = [f"experiment={name}", "data.shards=x.tar", *overrides]
    return read(DiffusionJob, compose_job("diffusion", given))


@pytest.mark.parametrize("name", MODELS)
def test_every_part_has_its_published_parameters_and_reads_its_condition(name: str) -> None:
    row = MODELS[name]
    parts = build(name)
    first, denoiser = parts.autoencoder, parts.denoiser
    assert parts.unet is not None and first is not None and denoiser is not None
    assert count(parts.unet) == row.unet
    found = FirstStage(
        count(first.encoder),
        count(first.decoder),
        count(first.quant_conv, first.post_quant_conv),
        count(getattr(first, "quantize", None)),
        count(first),
    )
    assert found == row.first_stage
    readers = count(parts.text_encoder, parts.class_embedder, parts.spatial_rescaler)
    assert readers == row.condition - row.unread_head
    assert count(denoiser, first) + row.unread_head == row.total
    if row.unread_head:  # rows of the vocabulary by the width, and a bias
        table = denoiser.text_encoder.embed_tokens.weight  # type: ignore[union-attr]
        assert row.unread_head == table.numel() + table.shape[0]
    with torch.device("meta"):
        conditions = blank_conditions(composed(name), row.latent, batch=2)
        prediction = denoiser(torch.empty(2, *row.latent), torch.zeros(2), conditions)
    assert prediction.shape == (2, *row.latent)
    assert {k for k, part in conditions._asdict().items() if part is not None} == CONDITIONS.get(name, set())


@pytest.mark.parametrize("name", MODELS)
def test_settings_are_the_published_ones(name: str) -> None:
    row, config = MODELS[name], composed(name)
    diffusion, optim, train = config.diffusion, config.optim, config.train
    assert (diffusion.schedule, diffusion.timesteps, diffusion.prediction) == ("scaled_linear", 1000, "eps")
    assert (diffusion.beta_start, diffusion.beta_end) == row.betas
    assert diffusion.loss == row.loss
    assert (optim.betas, optim.eps, optim.weight_decay) == ((0.9, 0.999), 1e-8, 0.01)
    assert optim.rate(train.global_batch) == pytest.approx(row.rate)
    assert config.autoencoder.latent_width == row.latent[0]
    if name != "ldm_text2img_1p45b":
        assert optim.gradient_clip_norm is None
        assert config.data.image_size == row.latent[1] * config.autoencoder.factor
    faults = [
        fault for fault in check(config, 1) if not fault.startswith(("data.shards", "first_stage.path"))
    ]
    assert faults == []


def test_the_churches_and_inpainting_rates_are_those_of_their_schedulers() -> None:
    churches, inpainting = composed("ldm_churches").optim, composed("ldm_inpainting_big")
    assert (churches.curve, churches.warmup_steps) == ("constant", 10_000)
    optim = inpainting.optim
    assert (optim.curve, optim.warmup_steps, optim.final_lr_share) == ("cosine", 1000, 0.001)
    assert inpainting.train.max_steps == 50_000
