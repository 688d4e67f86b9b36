"""One weight for one name: each contender draws its own weights, and all have the same.

A weight is drawn from a generator that its name seeds, so that processes need not send each other networks. The
names are those of diffusers; ours and those of compvis.py, which are ours, are brought to them.
"""

from __future__ import annotations

import re
import zlib

import torch
from torch import nn

_RULES = (
    (r"^((?:encoder\.)?down_blocks\.\d+)\.resample\.", r"\1.downsamplers.0."),
    (r"^((?:decoder\.)?up_blocks\.\d+)\.resample\.", r"\1.upsamplers.0."),
    (r"\.to_out\.(weight|bias)$", r".to_out.0.\1"),
    (r"\.ff\.proj_in\.", ".ff.net.0.proj."),
    (r"\.ff\.proj_out\.", ".ff.net.2."),
)
_TEXT_RULES = ((r"\.to_([qkv])\.", r".\1_proj."), (r"\.to_out\.", ".out_proj."), (r"^(?!model\.)", "model."))


def canonical(name: str) -> str:
    """The name in diffusers of a parameter of one of the networks, or of `text.` and `unet.` in a joint one."""
    part, _, rest = name.partition(".")
    if part in ("text", "unet"):
        return f"{part}.{_renamed(rest, _TEXT_RULES if part == 'text' else _RULES)}"
    return _renamed(name, _RULES)


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


@torch.no_grad()
def draw_weights(network: nn.Module) -> None:
    """Norms near one, biases near zero, matrices with outputs of order one; nothing is left at zero."""
    for name, parameter in network.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(canonical(name).encode()))
        drawn = torch.randn(parameter.numel(), generator=generator).view(parameter.shape)
        if parameter.dim() > 1:
            drawn = drawn / parameter[0].numel() ** 0.5
        elif name.endswith("weight"):
            drawn = 1 + 0.2 * drawn
        else:
            drawn = 0.2 * drawn
        parameter.copy_(drawn)
