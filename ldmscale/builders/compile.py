"""`train.compile=blocks`: the blocks of a network run through torch.compile, one by one.

Blocks are what repeats in these networks: those of equal shapes share one piece of compiled code. The rest of the
network, drawing and validation stay as they are, so no other batch size compiles anything again.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ldmscale.builders.networks import BLOCKS
from ldmscale.errors import ConfigError

log = logging.getLogger(__name__)

# Dynamo gives a function up that it has compiled for so many shapes. The blocks of one type share their function, and a
# large U-Net has some twenty shapes of each; pictures of several sizes multiply them.
_SHAPES = 256


def compile_blocks(network: nn.Module, device: torch.device, backend: str = "inductor") -> int:
    """Compile every block of `network` at its first call, for forward and backward; returns how many there are.

    Names of parameters and the state dict stay as they are. Without gradients a block runs as it was written.

    Raises:
        ConfigError: there is no compiler that could do it.
    """
    if backend == "inductor":
        _need_compiler(device)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _SHAPES)
    torch._dynamo.config.accumulated_recompile_limit = max(
        torch._dynamo.config.accumulated_recompile_limit, 4 * _SHAPES
    )
    blocks = [part for part in network.modules() if isinstance(part, BLOCKS)]
    for block in blocks:
        compiled = torch.compile(block.forward, fullgraph=True, dynamic=False, backend=backend)
        setattr(block, "forward", _training_only(compiled, block.forward))  # noqa: B010
    log.info("%d blocks are compiled at their first call, which takes minutes", len(blocks))
    return len(blocks)


def _training_only(compiled: Callable[..., Any], written: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*inputs: Any) -> Any:
        return compiled(*inputs) if torch.is_grad_enabled() else written(*inputs)

    return forward


def _need_compiler(device: torch.device) -> None:
    """Say before the first step what would otherwise fail inside it."""
    try:
        if device.type == "cpu":
            from torch._inductor.cpp_builder import get_cpp_compiler

            get_cpp_compiler()
        else:
            importlib.import_module("triton")
    except Exception as error:  # InvalidCxxCompiler, ImportError, and what finding them may raise
        what = "C++ compiler (g++)" if device.type == "cpu" else "triton"
        raise ConfigError(
            f"train.compile=blocks needs a {what} that works here ({error}): install it, or give train.compile=off"
        ) from error
