"""The text transformer equals diffusers' LDMBertModel on the same random weights."""

from __future__ import annotations

import pytest
import torch
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from parity import assert_parity
from torch import Tensor

from ldmscale.models.text_encoder import TextTransformer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [12, 7], ids=["full length", "shorter"])
def test_equals_ldmbert_in_values_and_gradients(dtype: torch.dtype, length: int) -> None:
    ours = TextTransformer(vocab_size=50, max_tokens=12, width=48, layers=3, heads=4, head_channels=16)
    reference = LDMBertModel(
        LDMBertConfig(
            vocab_size=50,
            max_position_embeddings=12,
            encoder_layers=3,
            d_model=48,
            encoder_ffn_dim=192,
            encoder_attention_heads=4,
            head_dim=16,
            dropout=0.0,
        )
    )
    ids = torch.randint(0, 50, (2, length), generator=torch.Generator().manual_seed(4))
    scale = torch.ones(
        1
    )  # token ids have no gradient: scaling the result gives assert_parity an input to differentiate

    def call_ours(s: Tensor) -> Tensor:
        return ours(ids) * s

    def call_reference(s: Tensor) -> Tensor:
        return reference(ids)[0] * s

    assert_parity(ours, reference, call_ours, call_reference, [scale], dtype, text=True)


def test_captions_longer_than_the_position_table_are_refused() -> None:
    network = TextTransformer(vocab_size=9, max_tokens=4, width=16, layers=1, heads=1, head_channels=16)
    with pytest.raises(ValueError, match="5 tokens, this text encoder takes 4"):
        network(torch.zeros(1, 5, dtype=torch.int64))
