"""Every published configuration is seen again from the names and shapes of its tensors, on the meta device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import yaml

from ldmscale.builders.networks import build_autoencoder, build_text_encoder, build_unet
from ldmscale.config import AutoencoderConfig, ImportedUNetConfig, TextEncoderConfig
from ldmscale.config.folders import config_folder
from ldmscale.interop import compvis_names as names_there
from ldmscale.interop import compvis_shapes as shapes_there
from ldmscale.interop import diffusers_config
from ldmscale.interop.reading import published_unets
from ldmscale.interop.tensors import Slot


def configs(group: str, kind: type) -> dict:
    files = sorted((config_folder() / group).glob("*.yaml"))
    read = {path.stem: yaml.safe_load(path.read_text()) for path in files}
    # Files that are differences to others, and encoders that come with weights of their own, are left out.
    alone = {name: values for name, values in read.items() if not {"defaults", "path"} & set(values)}
    return {name: kind(**values) for name, values in alone.items()}


UNETS = {n: c for n, c in configs("unet", ImportedUNetConfig).items() if c.norm_groups == 32}
AUTOENCODERS = {
    n: c
    for n, c in configs("autoencoder", AutoencoderConfig).items()
    if c.norm_groups == 32 and c.kind != "pixels"
}
TEXTS = configs("text_encoder", TextEncoderConfig)


def foreign(slots: list[Slot], weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    made = {slot.foreign: slot.to_foreign(weights) for slot in slots}
    assert len(made) == len(slots)  # no two of ours under one name
    assert sum(t.numel() for t in made.values()) == sum(t.numel() for t in weights.values())
    return made


@pytest.mark.parametrize("name", UNETS)
def test_a_unet_is_seen_from_its_tensors(name):
    config = UNETS[name]
    with torch.device("meta"):
        weights = build_unet(config).state_dict()
    found = foreign(names_there.unet_slots(config, list(weights)), weights)
    assert shapes_there.infer_unet(found, config.heads, config.head_channels) == config
    # Its name is proposed to those who do not know the heads, and no other.
    assert published_unets(replace(config, heads=1, head_channels=None)) == [name]
    for key in ("input_blocks.0.0.weight", "time_embed.2.bias", "middle_block.1.norm.weight", "out.2.weight"):
        assert key in found
    # One averaged name for each: LitEma removes the dots, and no two names may become one.
    assert len({names_there.ema_name(key) for key in found}) == len(found)


@pytest.mark.parametrize("name", [n for n, c in UNETS.items() if not c.residual_updown])
def test_a_unet_is_seen_from_diffusers_settings(name):
    config = UNETS[name]
    seen = diffusers_config.unet_config(diffusers_config.unet_values(config, 32))
    with torch.device("meta"):
        ours, again = build_unet(config), build_unet(seen)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in again.state_dict().items()
    }
    heads = [[m.heads for m in network.modules() if hasattr(m, "heads")] for network in (ours, again)]
    assert heads[0] == heads[1]


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_an_autoencoder_is_seen_from_its_tensors_and_from_diffusers_settings(name):
    config = replace(AUTOENCODERS[name], checkpointing="off")
    with torch.device("meta"):
        weights = build_autoencoder(config).state_dict()
    found = foreign(names_there.autoencoder_slots(config, list(weights)), weights)
    assert shapes_there.infer_autoencoder(found) == config
    values = diffusers_config.autoencoder_values(config, 0.18215, 256)
    assert diffusers_config.autoencoder_config(values) == config


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_encoder_is_seen_from_its_tensors_and_from_diffusers_settings(name):
    config = replace(TEXTS[name], tokenizer="bert-base-uncased")
    with torch.device("meta"):
        weights = build_text_encoder(config).state_dict()
    for nested in (False, True):
        found = foreign(names_there.text_slots(list(weights), nested), weights)
        known = (
            (None, None)
            if config.heads * config.head_channels == 512
            else (config.heads, config.head_channels)
        )
        assert shapes_there.infer_text_encoder(found, *known) == config
    assert diffusers_config.text_config(diffusers_config.text_values(config)) == config
