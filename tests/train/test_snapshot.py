"""A network's answer tells weights that are its own from weights that are not."""

from __future__ import annotations

import pytest
import torch

from ldmscale.errors import CheckpointError
from ldmscale.train.snapshot import summary, verify


def test_rounding_passes_and_other_weights_do_not() -> None:
    torch.manual_seed(0)
    network, x = torch.nn.Conv2d(3, 4, 3), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        saved = summary(network(x))
        verify(saved, summary(network.double()(x.double())), "fp32", "step_1")
        verify(saved, summary(network.bfloat16()(x.bfloat16())), "bf16", "step_1")
        network.float().weight[0, 0] = 0  # a small part that was not restored
        with pytest.raises(CheckpointError, match="step_1 was restored, but the network does not answer"):
            verify(saved, summary(network(x)), "fp32", "step_1")
        with pytest.raises(CheckpointError):
            verify(saved, [float("nan")] * len(saved), "fp32", "step_1")
