"""Names of our weights in diffusers' UNet2DConditionModel, UNet2DModel, AutoencoderKL, VQModel and LDMBertModel.

Most names are the same on purpose; what differs is below, applied in order.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ldmscale.interop.slots import Slot

_NETWORK = (
    (r"^((?:encoder\.)?down_blocks\.\d+)\.resample\.", r"\1.downsamplers.0."),
    (r"^((?:decoder\.)?up_blocks\.\d+)\.resample\.", r"\1.upsamplers.0."),
    (r"\.to_out\.", ".to_out.0."),
    (r"\.ff\.proj_in\.", ".ff.net.0.proj."),
    (r"\.ff\.proj_out\.", ".ff.net.2."),
    (r"^quantize\.embedding$", "quantize.embedding.weight"),
)
# Attention blocks of files from before diffusers 0.17, which diffusers still reads.
_OLD_ATTENTION = (
    (r"\.to_q\.", ".query."),
    (r"\.to_k\.", ".key."),
    (r"\.to_v\.", ".value."),
    (r"\.to_out\.0\.", ".proj_attn."),
)
_TEXT = (
    (r"\.to_([qkv])\.", r".\1_proj."),
    (r"\.to_out\.", ".out_proj."),
    (r"^", "model."),
)


def network_slots(
    names: Sequence[str], linear_projection: bool = False, old_attention: bool = False
) -> list[Slot]:
    """The slots of a U-Net or an autoencoder. `linear_projection`: what use_linear_projection in config.json says."""
    rules = _NETWORK + (_OLD_ATTENTION if old_attention else ())
    slots = []
    for name in names:
        projection = re.search(r"\.attentions\.\d+\.proj_(in|out)\.weight$", name)
        convolution = projection is not None and not linear_projection
        slots.append(Slot(_renamed(name, rules), (name,), "conv2" if convolution else "same"))
    return slots


def text_slots(names: Sequence[str]) -> list[Slot]:
    """The slots of LDMBertModel."""
    return [Slot(_renamed(name, _TEXT), (name,)) for name in names]


def _renamed(name: str, rules: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
