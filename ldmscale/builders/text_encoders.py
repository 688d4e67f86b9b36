"""Opens frozen text encoders (CLIP, T5) through the transformers library; outside every engine and `zero.Init`."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from ldmscale.config import FrozenTextConfig
from ldmscale.errors import ConfigError
from ldmscale.models.frozen_text import FrozenTextEncoder
from ldmscale.storage.hub import cached_first

log = logging.getLogger(__name__)

_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def open_text_encoder(config: FrozenTextConfig) -> FrozenTextEncoder:
    """The encoder with its weights, on the CPU, in the number format of `config`.

    Raises ConfigError where it is not to be had, lacks weights, or has other sizes than `config` says.
    """
    from transformers.utils import logging as chatter

    # It reports the weights of CLIP's other half; what is missing is refused below.
    chatter.set_verbosity_error()  # type: ignore[no-untyped-call]
    chatter.disable_progress_bar()  # type: ignore[no-untyped-call]
    network, report = _from_pretrained(_network_class(config.kind), config)
    if missing := sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"])):
        raise ConfigError(
            f"text_encoder.path={config.path} lacks {len(missing)} weights of a {config.kind} text encoder, {missing[0]} "
            f"among them: is text_encoder.kind={config.kind} right?"
        )
    return _wrapped(network, config)


def bare_text_encoder(config: FrozenTextConfig) -> FrozenTextEncoder:
    """The encoder without its weights, on the current default device: for counting and for `build`.

    Raises ConfigError where its config.json is not to be had.
    """
    kind = _network_class(config.kind)
    try:
        settings = kind.config_class.from_pretrained(config.path, trust_remote_code=False)
    except Exception as error:  # no network, no such name, no access: the hub's client raises many kinds
        raise _unavailable(config, error) from error
    return _wrapped(kind(settings).to(_TYPES[config.dtype]), config)


def _network_class(kind: str) -> Any:
    # transformers takes seconds to import, and runs with another condition do not need it.
    from transformers import CLIPTextModel, T5EncoderModel

    return {"clip": CLIPTextModel, "t5": T5EncoderModel}[kind]


def _from_pretrained(kind: Any, config: FrozenTextConfig) -> tuple[nn.Module, dict[str, Any]]:
    # Neither code of the folder nor a pickle that calls functions.
    wanted = {"dtype": _TYPES[config.dtype], "output_loading_info": True, "weights_only": True}
    try:
        network, report = cached_first(
            lambda local: kind.from_pretrained(
                config.path, trust_remote_code=False, local_files_only=local, **wanted
            )
        )
    except Exception as error:
        raise _unavailable(config, error) from error
    return network, report


def _unavailable(config: FrozenTextConfig, error: Exception) -> ConfigError:
    return ConfigError(
        f"text_encoder.path={config.path} cannot be opened as a {config.kind} text encoder ({type(error).__name__}: "
        f"{str(error).splitlines()[0] if str(error) else 'no reason given'}): give a hub name, or the folder of "
        "model and tokenizer"
    )


def _wrapped(network: nn.Module, config: FrozenTextConfig) -> FrozenTextEncoder:
    width = int(network.config.hidden_size)  # type: ignore[union-attr, arg-type]
    if width != config.width:
        raise ConfigError(
            f"text_encoder.width={config.width}, but {config.path} has {width}: give text_encoder.width={width}"
        )
    return FrozenTextEncoder(network, max_tokens=config.max_tokens, width=config.width)
