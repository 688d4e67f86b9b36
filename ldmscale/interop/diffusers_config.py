"""config.json of diffusers' networks, both ways. A setting that our networks cannot follow is refused by name.

Historic names there: `attention_head_dim` is the number of heads in UNet2DConditionModel and the size of a head in
UNet2DModel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from ldmscale.config import AutoencoderConfig, ImportedUNetConfig, TextEncoderConfig
from ldmscale.errors import ConfigError, DataError
from ldmscale.interop.compvis_shapes import multiples

Values = Mapping[str, Any]

# Settings that say nothing of the network's mathematics.
_FREE = {
    "sample_size", "force_upcast", "scaling_factor", "use_cache", "init_std", "classifier_dropout",
    "encoder_layerdrop", "attention_dropout", "activation_dropout", "num_train_timesteps", "torch_dtype", "dtype",
    "architectures", "model_type", "transformers_version", "num_hidden_layers", "tie_word_embeddings",
}  # fmt: skip
_UNET_NEUTRAL: dict[str, Sequence[Any]] = {
    "center_input_sample": (False,), "flip_sin_to_cos": (True,), "freq_shift": (0,), "downsample_padding": (1,),
    "mid_block_scale_factor": (1,), "act_fn": ("silu", "swish"), "norm_eps": (1e-5,), "only_cross_attention": (False,),
    "conv_in_kernel": (3,), "conv_out_kernel": (3,), "time_embedding_type": ("positional",), "attention_type": ("default",),
    "resnet_out_scale_factor": (1,), "addition_embed_type_num_heads": (64,), "add_attention": (True,),
    "downsample_type": ("conv",), "upsample_type": ("conv",), "upcast_attention": (False, True), "num_attention_heads": (None,),
}  # fmt: skip
_AUTOENCODER_NEUTRAL: dict[str, Sequence[Any]] = {
    "act_fn": ("silu", "swish"), "use_quant_conv": (True,), "use_post_quant_conv": (True,), "norm_type": ("group",),
    "lookup_from_codebook": (False,),
}  # fmt: skip
_TEXT_NEUTRAL: dict[str, Sequence[Any]] = {
    "activation_function": ("gelu",), "scale_embedding": (False,), "pad_token_id": (0, None), "is_encoder_decoder": (False,),
}  # fmt: skip


def unet_config(values: Values) -> ImportedUNetConfig:
    """Of UNet2DConditionModel or UNet2DModel. Raises DataError naming each setting that our U-Net cannot follow."""
    conditional = values["_class_name"] == "UNet2DConditionModel"
    read = {
        "in_channels", "out_channels", "down_block_types", "up_block_types", "mid_block_type", "block_out_channels",
        "layers_per_block", "dropout", "norm_num_groups", "attention_head_dim", "resnet_time_scale_shift", "num_class_embeds",
        "cross_attention_dim", "transformer_layers_per_block", "use_linear_projection", "attn_norm_num_groups",
    }  # fmt: skip
    faults = _foreign_settings(values, read, _UNET_NEUTRAL)
    for key in ("block_out_channels", "down_block_types", "up_block_types"):
        if key not in values:
            raise DataError(f"config.json has no {key}: it is not whole")
    widths = list(values["block_out_channels"])
    down, up = list(values["down_block_types"]), list(values["up_block_types"])
    plain, attending = (
        ("DownBlock2D", "CrossAttnDownBlock2D") if conditional else ("DownBlock2D", "AttnDownBlock2D")
    )
    residual = set(down) == {"ResnetDownsampleBlock2D"} and set(up) == {"ResnetUpsampleBlock2D"}
    levels = [level for level, kind in enumerate(down) if kind == attending]
    mirrored = [kind.replace("Down", "Up") for kind in reversed(down)]
    if not residual and (wrong := sorted(set(down) - {plain, attending})):
        faults.append(f"down_block_types has {', '.join(wrong)}: only {plain} and {attending} can be read")
    elif not residual and up != mirrored:
        faults.append(f"up_block_types={up}: expected the mirror of down_block_types, {mirrored}")
    middle = values.get("mid_block_type", "UNetMidBlock2DCrossAttn" if conditional else "UNetMidBlock2D")
    if middle != ("UNetMidBlock2DCrossAttn" if conditional else "UNetMidBlock2D"):
        faults.append(f"mid_block_type={middle!r} cannot be read")
    context = _uniform(
        values.get("cross_attention_dim", 1280) if conditional else None, "cross_attention_dim", faults
    )
    depth = _uniform(values.get("transformer_layers_per_block", 1), "transformer_layers_per_block", faults)
    blocks = _uniform(values.get("layers_per_block", 2), "layers_per_block", faults)
    groups = values.get("norm_num_groups", 32)
    shift = values.get("resnet_time_scale_shift", "default")
    if not conditional and values.get("attn_norm_num_groups") != groups and (
        shift != "default" or values.get("attn_norm_num_groups") is not None
    ):  # fmt: skip
        faults.append(
            f"attn_norm_num_groups={values.get('attn_norm_num_groups')}: the attention of the middle needs {groups} groups"
        )
    heads, size = _heads(values.get("attention_head_dim", 8), widths, levels, conditional, faults)
    if faults:
        raise DataError(faults)
    return ImportedUNetConfig(
        in_channels=values.get("in_channels", 4 if conditional else 3),
        out_channels=values.get("out_channels", 4 if conditional else 3),
        channels=widths[0],
        channel_mult=multiples([widths[0], *widths]),
        blocks_per_level=cast(int, blocks),
        attention_levels=tuple(levels),
        heads=heads,
        head_channels=size,
        context_dim=context,
        transformer_depth=cast(int, depth) if conditional else 1,
        residual_updown=residual,
        scale_shift_norm=shift == "scale_shift",
        num_classes=values.get("num_class_embeds"),
        dropout=values.get("dropout", 0.0),
        norm_groups=groups,
    )


def _heads(
    given: Any, widths: Sequence[int], levels: Sequence[int], conditional: bool, faults: list[str]
) -> tuple[int | None, int | None]:
    """(number of heads, size of a head), one of them None, for what attention_head_dim says of the levels that attend."""
    used = sorted({*levels, len(widths) - 1})
    if not conditional:
        size = given
        if size is None:
            return 1, None
        if wrong := [widths[level] for level in used if widths[level] % size]:
            faults.append(f"attention_head_dim={size} does not divide the {wrong[0]} channels of a level")
        return None, size
    counts = [given] * len(widths) if isinstance(given, int) else list(given)
    if len({counts[level] for level in used}) == 1:
        return counts[used[0]], None
    sizes = {widths[level] / counts[level] for level in used}
    if len(sizes) == 1 and (size := sizes.pop()) == int(size):
        return None, int(size)
    faults.append(
        f"attention_head_dim={counts}: neither the number nor the size of the heads is the same at all levels that attend"
    )
    return 1, None


def unet_values(config: ImportedUNetConfig, sample_size: int | None) -> dict[str, Any]:
    """config.json of the class that can hold this U-Net. Raises ConfigError naming what neither class can express."""
    levels = len(config.channel_mult)
    widths = [round(config.channels * m) for m in config.channel_mult]
    attending = set(config.attention_levels)
    used = sorted({*attending, levels - 1})
    counts = [config.heads or w // (config.head_channels or 1) for w in widths]
    values: dict[str, Any] = {
        "sample_size": sample_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": widths,
        "layers_per_block": config.blocks_per_level,
        "dropout": config.dropout,
        "norm_num_groups": config.norm_groups,
        "norm_eps": 1e-5,
        "act_fn": "silu",
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "downsample_padding": 1,
        "center_input_sample": False,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift_norm else "default",
        "num_class_embeds": config.num_classes,
    }
    if config.context_dim is not None:
        if config.residual_updown:
            raise ConfigError(
                "unet.residual_updown: UNet2DConditionModel cannot express it together with cross-attention; give format=compvis"
            )
        down = ["CrossAttnDownBlock2D" if i in attending else "DownBlock2D" for i in range(levels)]
        # Levels without attention never use their count; a divisor of their width keeps the list valid.
        heads: Any = config.heads if config.heads else [max(1, count) for count in counts]
        return {
            "_class_name": "UNet2DConditionModel",
            **values,
            "down_block_types": down,
            "mid_block_type": "UNetMidBlock2DCrossAttn",
            "up_block_types": [kind.replace("Down", "Up") for kind in reversed(down)],
            "attention_head_dim": heads,
            "cross_attention_dim": config.context_dim,
            "transformer_layers_per_block": config.transformer_depth,
            "use_linear_projection": False,
        }
    if config.residual_updown and attending:
        raise ConfigError(
            "unet.residual_updown with unet.attention_levels: UNet2DModel has no block that attends and resamples by "
            "residual blocks; give format=compvis"
        )
    sizes = {widths[level] // counts[level] for level in used}
    if len(sizes) > 1:
        raise ConfigError(
            f"unet.heads={config.heads} at levels of {[widths[i] for i in used]} channels: UNet2DModel has one size of a head "
            "for all levels; give format=compvis"
        )
    down = ["AttnDownBlock2D" if i in attending else "DownBlock2D" for i in range(levels)]
    if config.residual_updown:
        down = ["ResnetDownsampleBlock2D"] * levels
    return {
        "_class_name": "UNet2DModel",
        **values,
        "down_block_types": down,
        "mid_block_type": "UNetMidBlock2D",
        "up_block_types": ["ResnetUpsampleBlock2D"] * levels
        if config.residual_updown
        else [kind.replace("Down", "Up") for kind in reversed(down)],
        "attention_head_dim": sizes.pop(),
        "attn_norm_num_groups": config.norm_groups if config.scale_shift_norm else None,
        "add_attention": True,
    }


def autoencoder_config(values: Values) -> AutoencoderConfig:
    """Of AutoencoderKL or VQModel. Raises DataError naming each setting that our autoencoders cannot follow."""
    vq = values["_class_name"] == "VQModel"
    read = {
        "in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels", "layers_per_block",
        "latent_channels", "norm_num_groups", "mid_block_add_attention", "num_vq_embeddings", "vq_embed_dim",
    }  # fmt: skip
    faults = _foreign_settings(values, read, _AUTOENCODER_NEUTRAL)
    widths = list(values.get("block_out_channels", (64,)))
    down = list(values.get("down_block_types", ("DownEncoderBlock2D",)))
    up = list(values.get("up_block_types", ("UpDecoderBlock2D",)))
    if wrong := sorted({*down} - {"DownEncoderBlock2D", "AttnDownEncoderBlock2D"}):
        faults.append(f"down_block_types has {', '.join(wrong)}: only (Attn)DownEncoderBlock2D can be read")
    mirrored = [kind.replace("DownEncoder", "UpDecoder") for kind in reversed(down)]
    if up != mirrored:
        faults.append(f"up_block_types={up}: expected the mirror of down_block_types, {mirrored}")
    channels = values.get("in_channels", 3)
    if values.get("out_channels", 3) != channels:
        faults.append(
            f"out_channels={values.get('out_channels', 3)} and in_channels={channels}: expected the same"
        )
    if faults:
        raise DataError(faults)
    latent = values.get("latent_channels", 3 if vq else 4)
    width = values.get("vq_embed_dim")
    return AutoencoderConfig(
        kind="vq" if vq else "kl",
        latent_channels=latent,
        channels=widths[0],
        channel_mult=multiples([widths[0], *widths]),
        blocks_per_level=values.get("layers_per_block", 1),
        attention_levels=tuple(i for i, kind in enumerate(down) if kind.startswith("Attn")),
        mid_attention=values.get("mid_block_add_attention", True),
        image_channels=channels,
        codebook_size=values.get("num_vq_embeddings", 256) if vq else None,
        codebook_dim=width if vq and width != latent else None,
        norm_groups=values.get("norm_num_groups", 32),
    )


def autoencoder_values(
    config: AutoencoderConfig, scaling_factor: float | None, sample_size: int
) -> dict[str, Any]:
    """config.json of AutoencoderKL or VQModel; `scaling_factor` None where it is not known."""
    attending = set(config.attention_levels)
    down = [
        "AttnDownEncoderBlock2D" if i in attending else "DownEncoderBlock2D"
        for i in range(len(config.channel_mult))
    ]
    values: dict[str, Any] = {
        "_class_name": "VQModel" if config.kind == "vq" else "AutoencoderKL",
        "sample_size": sample_size,
        "in_channels": config.image_channels,
        "out_channels": config.image_channels,
        "down_block_types": down,
        "up_block_types": [kind.replace("DownEncoder", "UpDecoder") for kind in reversed(down)],
        "block_out_channels": [round(config.channels * m) for m in config.channel_mult],
        "layers_per_block": config.blocks_per_level,
        "latent_channels": config.latent_channels,
        "act_fn": "silu",
        "norm_num_groups": config.norm_groups,
        "mid_block_add_attention": config.mid_attention,
        "scaling_factor": scaling_factor,
    }
    if config.kind == "vq":
        values |= {"num_vq_embeddings": config.codebook_size, "vq_embed_dim": config.codebook_dim}
    return values


def text_config(values: Values) -> TextEncoderConfig:
    """Of LDMBertModel. Raises DataError naming each setting that our text transformer cannot follow."""
    read = {
        "vocab_size", "max_position_embeddings", "encoder_layers", "encoder_ffn_dim", "encoder_attention_heads", "head_dim",
        "d_model", "dropout", "num_attention_heads", "hidden_size",
    }  # fmt: skip
    faults = _foreign_settings(values, read, _TEXT_NEUTRAL)
    width, inner = values.get("d_model", 1280), values.get("encoder_ffn_dim", 5120)
    if inner % width:
        faults.append(f"encoder_ffn_dim={inner}: expected a multiple of d_model={width}")
    if faults:
        raise DataError(faults)
    return TextEncoderConfig(
        kind="bert",
        tokenizer="bert-base-uncased",
        vocab_size=values.get("vocab_size", 30522),
        max_tokens=values.get("max_position_embeddings", 77),
        width=width,
        layers=values.get("encoder_layers", 32),
        heads=values.get("encoder_attention_heads", 8),
        head_channels=values.get("head_dim", 64),
        feedforward_mult=inner // width,
        dropout=values.get("dropout", 0.1),
    )


def text_values(config: TextEncoderConfig) -> dict[str, Any]:
    """config.json of LDMBertModel."""
    return {
        "architectures": ["LDMBertModel"],
        "model_type": "ldmbert",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_tokens,
        "encoder_layers": config.layers,
        "num_hidden_layers": config.layers,
        "encoder_ffn_dim": config.feedforward_mult * config.width,
        "encoder_attention_heads": config.heads,
        "head_dim": config.head_channels,
        "d_model": config.width,
        "dropout": config.dropout,
        "activation_function": "gelu",
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "pad_token_id": 0,
        "scale_embedding": False,
    }


READERS: dict[str, tuple[str, Callable[[Values], Any]]] = {
    "UNet2DConditionModel": ("unet", unet_config),
    "UNet2DModel": ("unet", unet_config),
    "AutoencoderKL": ("autoencoder", autoencoder_config),
    "VQModel": ("autoencoder", autoencoder_config),
    "LDMBertModel": ("text_encoder", text_config),
}


def class_of(values: Values) -> str | None:
    """The class that a config.json is of: diffusers' own key, or that of transformers."""
    found = values.get("_class_name") or (values.get("architectures") or [None])[0]
    return str(found) if found else ("LDMBertModel" if values.get("model_type") == "ldmbert" else None)


def _uniform(value: Any, name: str, faults: list[str]) -> int | None:
    items = [value] if not isinstance(value, (list, tuple)) else list(value)
    if len({str(item) for item in items}) > 1 or isinstance(items[0], (list, tuple)):
        faults.append(f"{name}={value}: our U-Net has one for all levels")
    return cast("int | None", items[0])


def _foreign_settings(values: Values, read: set[str], neutral: Mapping[str, Sequence[Any]]) -> list[str]:
    """Settings that are neither read, nor free, nor of a value that changes nothing."""
    faults = []
    for key, value in values.items():
        if key.startswith("_") or key in read:
            continue
        if key in neutral:
            if value not in neutral[key]:
                faults.append(f"{key}={value!r}: only {' or '.join(map(repr, neutral[key]))} can be read")
        elif key not in _FREE and value not in (None, False, 0, 0.0, [], {}, ""):
            faults.append(f"{key}={value!r} is not known, so it cannot be followed")
    return faults
