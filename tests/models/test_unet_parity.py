"""Our U-Net equals diffusers' on the same random weights, forward and backward."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from parity import assert_parity, draw
from torch import Tensor

from ldmscale.models.unet import UNet

TYPES = [torch.float32, torch.float64]
STEPS = torch.tensor([3, 981])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("depth", [1, 2])
def test_text_to_image_family_with_heads_by_number(dtype: torch.dtype, depth: int) -> None:
    ours = UNet(
        in_channels=4,
        out_channels=4,
        channels=32,
        channel_mult=(1, 2, 4, 4),
        blocks_per_level=2 if depth == 1 else 1,
        attention_levels=(0, 1, 2),
        heads=8,
        context_dim=48,
        transformer_depth=depth,
    )
    reference = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=2 if depth == 1 else 1,
        block_out_channels=(32, 64, 128, 128),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        attention_head_dim=8,  # the number of heads, in this class
        cross_attention_dim=48,
        transformer_layers_per_block=depth,
    )
    assert_parity(
        ours,
        reference,
        lambda x, c: ours(x, STEPS, c),
        lambda x, c: reference(x, STEPS, c).sample,
        [draw(2, 4, 16, 16), draw(2, 7, 48, seed=2)],
        dtype,
    )


@pytest.mark.parametrize("dtype", TYPES)
def test_heads_by_size_with_concatenated_image(dtype: torch.dtype) -> None:
    ours = UNet(
        in_channels=7,
        out_channels=3,
        channels=32,
        channel_mult=(1, 2, 3),
        blocks_per_level=1,
        attention_levels=(1, 2),
        head_channels=16,
        context_dim=24,
    )
    reference = UNet2DConditionModel(
        sample_size=16,
        in_channels=7,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(32, 64, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4, 6),
        cross_attention_dim=24,
    )
    mask = draw(2, 4, 16, 16, seed=3)

    def call_ours(x: Tensor, c: Tensor) -> Tensor:
        return ours(x, STEPS, c, concat=mask.to(x.dtype))

    def call_reference(x: Tensor, c: Tensor) -> Tensor:
        return reference(torch.cat([x, mask.to(x.dtype)], 1), STEPS, c).sample

    inputs = [draw(2, 3, 16, 16), draw(2, 5, 24, seed=2)]
    assert_parity(ours, reference, call_ours, call_reference, inputs, dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_unconditional_family_with_plain_attention(dtype: torch.dtype) -> None:
    ours = UNet(
        in_channels=3,
        out_channels=3,
        channels=32,
        channel_mult=(1, 2, 3),
        blocks_per_level=2,
        attention_levels=(1, 2),
        head_channels=16,
    )
    reference = UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=(32, 64, 96),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16,  # the size of a head, in this class
        norm_eps=1e-5,
        flip_sin_to_cos=True,
        freq_shift=0,
        downsample_padding=1,
    )
    assert_parity(
        ours,
        reference,
        lambda x: ours(x, STEPS),
        lambda x: reference(x, STEPS).sample,
        [draw(2, 3, 16, 16)],
        dtype,
    )


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shift", [False, True], ids=["added time", "scale and shift"])
def test_residual_resampling_with_attention_in_the_middle(dtype: torch.dtype, shift: bool) -> None:
    ours = UNet(
        in_channels=4,
        out_channels=4,
        channels=32,
        channel_mult=(1, 2, 2),
        blocks_per_level=2,
        attention_levels=(),
        heads=2,
        residual_updown=True,
        scale_shift_norm=shift,
    )
    reference = UNet2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=2,
        block_out_channels=(32, 64, 64),
        down_block_types=("ResnetDownsampleBlock2D",) * 3,
        up_block_types=("ResnetUpsampleBlock2D",) * 3,
        attention_head_dim=32,
        norm_eps=1e-5,
        flip_sin_to_cos=True,
        freq_shift=0,
        attn_norm_num_groups=32,
        resnet_time_scale_shift="scale_shift" if shift else "default",
    )
    assert_parity(
        ours,
        reference,
        lambda x: ours(x, STEPS),
        lambda x: reference(x, STEPS).sample,
        [draw(2, 4, 16, 16)],
        dtype,
    )


def test_class_numbers_are_added_to_the_time_vector() -> None:
    ours = UNet(
        in_channels=4,
        out_channels=4,
        channels=32,
        channel_mult=(1, 2),
        blocks_per_level=1,
        attention_levels=(0,),
        heads=2,
        context_dim=24,
        num_classes=10,
    )
    reference = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=24,
        num_class_embeds=10,
    )
    labels = torch.tensor([2, 7])
    assert_parity(
        ours,
        reference,
        lambda x, c: ours(x, STEPS, c, labels=labels),
        lambda x, c: reference(x, STEPS, c, class_labels=labels).sample,
        [draw(2, 4, 8, 8), draw(2, 5, 24, seed=2)],
        torch.float64,
    )
