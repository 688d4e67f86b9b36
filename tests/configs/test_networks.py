"""From configuration to networks: what is counted without building, and what is chosen for attention."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import ldmscale
from ldmscale.compose import compose_job
from ldmscale.config import DiffusionJob
from ldmscale.errors import ConfigError
from ldmscale.networks import (
    blank_conditions,
    build_denoiser,
    training_flops,
)
from ldmscale.validate import read


def smoke() -> DiffusionJob:
    return read(DiffusionJob, compose_job("diffusion", ["experiment=smoke", "unet.checkpointing=full"]))


def test_flops_counted_on_the_meta_device_are_those_of_a_real_step():
    config = smoke()
    network = build_denoiser(config)
    for block in network.modules():
        if hasattr(block, "checkpointing"):
            block.checkpointing = "off"
    with FlopCounterMode(display=False) as counter:
        conditions = blank_conditions(config, (4, 8, 8))
        network(torch.zeros(1, 4, 8, 8), torch.zeros(1, dtype=torch.int64), conditions).sum().backward()
    counted = training_flops(config, (4, 8, 8))
    # The backward kernels of attention are counted a little differently on the two devices.
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.05)
    assert training_flops(config, (4, 16, 16)) > 2 * counted


def test_the_published_model_needs_its_known_operations():
    config = read(
        DiffusionJob,
        compose_job("diffusion", ["data.shards=x", "train.global_batch=8", "train.rank_micro_batch=8"]),
    )
    flops = training_flops(config, (4, 32, 32))
    # About 6 operations a weight and position; the U-Net's widest maps are small, the text transformer has 77 positions.
    text = 6 * 542_895_360 * 77
    assert text < flops < 4 * text


def test_build_gives_the_untrained_parts_of_an_experiment():
    parts = ldmscale.build("ldm_text2img_1p45b")
    assert sum(p.numel() for p in parts.unet.parameters()) == 872_300_484
    assert sum(p.numel() for p in parts.autoencoder.parameters()) == 83_653_863
    assert sum(p.numel() for p in parts.text_encoder.parameters()) == 581_994_042 - 39_098_682
    with pytest.raises(ConfigError, match="choose one of"):
        ldmscale.build("ldm_text2img_1p45c")
