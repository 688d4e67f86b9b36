"""Names of our weights in CompVis' checkpoints (reference: the state dicts of UNetModel, AutoencoderKL, VQModel, BERTEmbedder).

The U-Net there numbers its blocks in order of execution: input_blocks 0 is the first convolution, then residual blocks
and downsamplings; output_blocks are residual blocks, the last one of a level with the upsampling at its end.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ldmscale.config import AutoencoderConfig, ImportedUNetConfig
from ldmscale.interop.tensors import Slot
from ldmscale.models.unet import heads_of

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
TRANSFORMER = (
    (".to_out.", ".to_out.0."),
    (".ff.proj_in.", ".ff.net.0.proj."),
    (".ff.proj_out.", ".ff.net.2."),
)
_STEM = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding": "label_emb",
    "conv_in": "input_blocks.0.0",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet_slots(config: ImportedUNetConfig, names: Sequence[str]) -> list[Slot]:
    """The slots of a U-Net whose tensors have `names`, without CompVis' prefix `model.diffusion_model.`."""
    modules = _unet_modules(config)
    slots: dict[str, Slot] = {}
    for name in names:
        # The longest module path that is a beginning of the name.
        module = max((m for m in modules if name.startswith(m + ".")), key=len)
        there, rest = modules[module], name[len(module) + 1 :]
        if "attentions" in module:
            slot = _attention_slot(config, module, there, rest)
        else:
            first, _, last = rest.rpartition(".")
            slot = Slot(".".join(filter(None, (there, RESNET.get(first, first), last))), (name,))
        slots.setdefault(slot.foreign, slot)
    return list(slots.values())


def _unet_modules(config: ImportedUNetConfig) -> dict[str, str]:
    """Modules of ours (blocks, attentions, resamplings) to theirs."""
    modules = dict(_STEM)
    levels, number = len(config.channel_mult), 1
    for level in range(levels):
        for block in range(config.blocks_per_level):
            modules[f"down_blocks.{level}.resnets.{block}"] = f"input_blocks.{number}.0"
            modules[f"down_blocks.{level}.attentions.{block}"] = f"input_blocks.{number}.1"
            number += 1
        if level < levels - 1:
            there = f"input_blocks.{number}.0"
            here = f"down_blocks.{level}.resample"
            modules |= {here: there} if config.residual_updown else {f"{here}.conv": f"{there}.op"}
            number += 1
    number = 0
    for order, level in enumerate(reversed(range(levels))):
        for block in range(config.blocks_per_level + 1):
            modules[f"up_blocks.{order}.resnets.{block}"] = f"output_blocks.{number}.0"
            modules[f"up_blocks.{order}.attentions.{block}"] = f"output_blocks.{number}.1"
            number += 1
        place = f"output_blocks.{number - 1}.{2 if level in config.attention_levels else 1}"
        here = f"up_blocks.{order}.resample"
        modules |= {here: place} if config.residual_updown else {f"{here}.conv": f"{place}.conv"}
    return modules


def _attention_slot(config: ImportedUNetConfig, module: str, there: str, rest: str) -> Slot:
    name = f"{module}.{rest}"
    if config.context_dim is not None:
        for ours, theirs in TRANSFORMER:
            rest = ("." + rest).replace(ours, theirs)[1:]
        return Slot(
            f"{there}.{rest}", (name,), "conv2" if re.match(r"proj_(in|out)\.weight", rest) else "same"
        )
    first, last = rest.split(".")
    if first == "group_norm":
        return Slot(f"{there}.norm.{last}", (name,))
    if first == "to_out":
        return Slot(f"{there}.proj_out.{last}", (name,), "conv1" if last == "weight" else "same")
    heads, _ = heads_of(_width(config, module), config.heads, config.head_channels)
    three = tuple(f"{module}.to_{part}.{last}" for part in "qkv")
    return Slot(f"{there}.qkv.{last}", three, "qkv", heads)


def _width(config: ImportedUNetConfig, module: str) -> int:
    """Channels of an attention's level."""
    side, _, rest = module.partition(".")
    order = -1 if side == "mid_block" else int(rest.split(".")[0])
    level = len(config.channel_mult) - 1 - order if side == "up_blocks" else order
    return round(config.channels * config.channel_mult[level])


_AUTOENCODER = (
    (r"\.resnets\.(\d+)\.", r".block.\1."),
    (r"\.attentions\.(\d+)\.", r".attn.\1."),
    (r"\.mid_block\.block\.0\.", ".mid.block_1."),
    (r"\.mid_block\.attn\.0\.", ".mid.attn_1."),
    (r"\.mid_block\.block\.1\.", ".mid.block_2."),
    (r"^encoder\.down_blocks\.(\d+)\.resample\.", r"encoder.down.\1.downsample."),
    (r"^encoder\.down_blocks\.", "encoder.down."),
    (r"\.resample\.", ".upsample."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.", ".proj_out."),
    (r"^quantize\.embedding$", "quantize.embedding.weight"),
)


def autoencoder_slots(config: AutoencoderConfig, names: Sequence[str]) -> list[Slot]:
    """The slots of an autoencoder, without the prefix `first_stage_model.`; `decoder.up` counts from full resolution."""
    last = len(config.channel_mult) - 1
    slots = []
    for name in names:
        there = name
        for pattern, replacement in _AUTOENCODER:
            there = re.sub(pattern, replacement, there)
        there = re.sub(r"^decoder\.up_blocks\.(\d+)", lambda m: f"decoder.up.{last - int(m[1])}", there)
        linear = re.search(r"attentions\.\d+\.to_(q|k|v|out)\.weight$", name)
        slots.append(Slot(there, (name,), "conv2" if linear else "same"))
    return slots


_TEXT = (
    ("embed_tokens.", "token_emb."),
    ("embed_positions.", "pos_emb.emb."),
    ("layer_norm.", "norm."),
)
_TEXT_LAYER = {
    "self_attn_layer_norm": (0, "0"),
    "self_attn.to_q": (0, "1.to_q"),
    "self_attn.to_k": (0, "1.to_k"),
    "self_attn.to_v": (0, "1.to_v"),
    "self_attn.to_out": (0, "1.to_out"),
    "final_layer_norm": (1, "0"),
    "fc1": (1, "1.net.0.0"),
    "fc2": (1, "1.net.2"),
}


def text_slots(names: Sequence[str], nested_norms: bool = False) -> list[Slot]:
    """The slots of the text transformer, without the prefix `cond_stage_model.transformer.`.

    `nested_norms`: later versions of the x-transformers library keep a layer's norms in a list of their own.
    """
    slots = []
    for name in names:
        if match := re.match(r"layers\.(\d+)\.(.+)\.(weight|bias)$", name):
            odd, rest = _TEXT_LAYER[match[2]]
            rest += ".0" if nested_norms and rest == "0" else ""
            there = f"attn_layers.layers.{2 * int(match[1]) + odd}.{rest}.{match[3]}"
        else:
            ours, theirs = next(pair for pair in _TEXT if name.startswith(pair[0]))
            there = theirs + name[len(ours) :]
        slots.append(Slot(there, (name,)))
    return slots


# Further tensors of the text transformer's file, which our network leaves out: the head over the vocabulary.
TEXT_HEAD = ("to_logits.weight", "to_logits.bias")


def ema_name(parameter: str) -> str:
    """What an averaged copy is called, below `model_ema.`: the parameter's name without its dots."""
    return parameter.replace(".", "")


# A block's number may have two digits, the number of a layer in it has one.
_EMA_BLOCK = re.compile(
    r"diffusion_model(?:((?:in|out)put_blocks)(\d+)(\d)|(middle_block|time_embed|out)(\d)|(label_emb))(?=\D)(.+)"
)
_EMA_WORDS = re.compile(
    r"(?:in|out|emb)_layers|skip_connection|transformer_blocks|attn[12]|to_(?:out|[qkv])|ff|net|proj_in|proj_out|proj|"
    r"norm[123]?|qkv|op|conv|\d+|weight|bias"
)


def unet_name_of_average(average: str) -> str | None:
    """The U-Net's parameter, below `model.diffusion_model.`, whose averaged copy has a name; None if there is none."""
    found = _EMA_BLOCK.fullmatch(average)
    if found is None:
        return None
    *place, rest = (group for group in found.groups() if group is not None)
    words = _EMA_WORDS.findall(rest)
    return ".".join([*place, *words]) if "".join(words) == rest else None
