"""Switches a network to evaluation mode for a block of code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Disables dropout and batch statistics inside; restores the mode of every module afterwards, also after an exception.

    Modules that were in evaluation mode before (pretrained parts of a trained network) stay in it.
    """
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
