"""Names and shapes of our weights as diffusers has them. Most names are the same on purpose.

Written apart from `ldmscale.interop.diffusers_names`, which says the same: the parity of the networks must not stand or fall
with the exchange of weights, nor a fault there be taken over into what it is judged by.
"""

from __future__ import annotations

import re

from torch import Tensor

# Applied in order to every name of ours.
RULES = (
    (r"^((?:encoder\.)?down_blocks\.\d+)\.resample\.", r"\1.downsamplers.0."),
    (r"^((?:decoder\.)?up_blocks\.\d+)\.resample\.", r"\1.upsamplers.0."),
    (r"\.to_out\.", ".to_out.0."),
    (r"\.ff\.proj_in\.", ".ff.net.0.proj."),
    (r"\.ff\.proj_out\.", ".ff.net.2."),
    (r"^quantize\.embedding$", "quantize.embedding.weight"),
)
TEXT_RULES = (
    (r"\.to_([qkv])\.", r".\1_proj."),
    (r"\.to_out\.", ".out_proj."),
    (r"^", "model."),
)
# 1x1 convolutions there, linear layers here.
POINTWISE = re.compile(r"\.attentions\.\d+\.proj_(in|out)\.weight$")


def key_of(ours: str, *, text: bool = False) -> str:
    """The name that diffusers' U-Nets and autoencoders (with `text`: LDMBertModel) give to one of ours."""
    for pattern, replacement in TEXT_RULES if text else RULES:
        ours = re.sub(pattern, replacement, ours)
    return ours


def ours_from(reference: dict[str, Tensor], names: list[str], *, text: bool = False) -> dict[str, Tensor]:
    """Our state from diffusers'. `names` are ours; all of the reference but the vocabulary head is taken."""
    taken = {key_of(name, text=text) for name in names}
    left = set(reference) - taken - {"to_logits.weight", "to_logits.bias"}
    assert not left, f"not taken: {sorted(left)[:5]}"
    return {name: _our_shape(name, reference[key_of(name, text=text)]) for name in names}


def _our_shape(name: str, tensor: Tensor) -> Tensor:
    return tensor.flatten(1) if POINTWISE.search(name) and tensor.dim() == 4 else tensor
