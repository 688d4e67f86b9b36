"""Every configuration file of a network builds; published models have their sizes to the last parameter."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from ldmscale.models.autoencoder import KLAutoencoder, VQAutoencoder
from ldmscale.models.denoiser import Denoiser
from ldmscale.models.discriminator import PatchDiscriminator
from ldmscale.models.first_stage import PixelAutoencoder
from ldmscale.models.text_encoder import TextTransformer
from ldmscale.models.unet import UNet

CONF = Path(__file__).parents[2] / "conf"
CLASSES = {"unet": UNet, "kl": KLAutoencoder, "vq": VQAutoencoder, "bert": TextTransformer}

# Parameters as counted in the released code (less the vocabulary head that nothing reads), latent's shape.
UNETS = {
    "text2img_1p45b": (872_300_484, (4, 32, 32)),
    "text2img_256": (403_623_939, (3, 64, 64)),
    "class_f8": (394_984_196, (4, 32, 32)),
    "class_f4": (400_920_579, (3, 64, 64)),
    "faces_f4": (274_056_163, (3, 64, 64)),
    "churches_f8": (294_966_916, (4, 32, 32)),
    "layout_f4": (246_277_379, (3, 64, 64)),
    "semantic_f4": (215_229_315, (3, 64, 64)),
    "superres_f4": (113_622_563, (3, 64, 64)),
    "inpainting_f4": (387_245_827, (3, 64, 64)),
    "retrieval_768": (1_335_480_400, (16, 48, 48)),
}
AUTOENCODERS = {
    "kl_f4": (55_312_063, (3, 64, 64)),
    "kl_f8": (83_653_863, (4, 32, 32)),
    "kl_f16": (69_610_963, (16, 16, 16)),
    "kl_f32": (103_880_131, (64, 8, 8)),
    "vq_f4": (55_322_782, (3, 64, 64)),
    "vq_f4_noattn": (53_219_486, (3, 64, 64)),
    "vq_f8": (67_717_295, (4, 32, 32)),
    "vq_f8_n256": (67_652_783, (4, 32, 32)),
    "vq_f16": (69_593_371, (8, 16, 16)),
}
TEXT_ENCODERS = {
    "bert_1p45b": 581_994_042 - 39_098_682,
    "bert_256": 186_154_682 - 19_564_602,
    "bert_layout": 58_858_496 - 4_202_496,
}


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def read(group: str, name: str) -> dict[str, Any]:
    keys: dict[str, Any] = yaml.safe_load((CONF / group / f"{name}.yaml").read_text())
    return keys


def build(group: str, keys: dict[str, Any]) -> nn.Module:
    """The network of a file, which holds constructor arguments and what only other packages read."""
    if group == "pixels":
        return PixelAutoencoder()  # has no sizes: the file fills in what autoencoders must have
    keys = {key: value for key, value in keys.items() if key not in ("kind", "tokenizer")}
    return CLASSES[group](**keys)


def check_count(group: str, name: str, network: nn.Module, count: int | None) -> None:
    found = parameters(network)
    assert count in (None, found)
    said = re.search(r"([\d,]{5,}) parameters", (CONF / group / f"{name}.yaml").read_text())
    assert said is None or int(said[1].replace(",", "")) == found, "the file's comment names another count"


def others(group: str, published: dict[str, Any]) -> list[tuple[str, str]]:
    """Configurations of our own that stand alone: neither a difference to another file nor weights from elsewhere."""
    files = [path for path in (CONF / group).glob("*.yaml") if path.stem not in published]
    alone = [
        path for path in files if "defaults" not in (keys := read(group, path.stem)) and "path" not in keys
    ]
    return sorted((group, path.stem) for path in alone)


@pytest.mark.parametrize("name", UNETS)
def test_unet_has_its_published_size_and_keeps_the_shape_of_the_latent(name: str) -> None:
    count, (channels, height, width) = UNETS[name]
    keys = read("unet", name)
    with torch.device("meta"):
        network = build("unet", keys)
        x = torch.empty(2, channels, height, width)
        extra = keys["in_channels"] - channels
        concat = torch.empty(2, extra, height, width) if extra else None
        context = torch.empty(2, 5, keys["context_dim"]) if "context_dim" in keys else None
        out = network(x, torch.empty(2), context, concat)
    check_count("unet", name, network, count)
    assert out.shape == x.shape


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_autoencoder_has_its_published_size_and_latent(name: str) -> None:
    count, latent = AUTOENCODERS[name]
    keys = read("autoencoder", name)
    with torch.device("meta"):
        network = build(keys["kind"], keys)
        images = torch.empty(1, 3, 256, 256)
        encoded = network.encode(images)
        decoded = network.decode(encoded[0])
    check_count("autoencoder", name, network, count)
    assert encoded[0].shape[1:] == latent
    assert decoded.shape == images.shape


@pytest.mark.parametrize("name", TEXT_ENCODERS)
def test_text_encoder_has_its_published_size(name: str) -> None:
    with torch.device("meta"):
        network = build("bert", read("text_encoder", name))
    check_count("text_encoder", name, network, TEXT_ENCODERS[name])


@pytest.mark.parametrize(
    ("group", "name"),
    others("unet", UNETS) + others("autoencoder", AUTOENCODERS) + others("text_encoder", TEXT_ENCODERS),
)
def test_the_small_ones_build(group: str, name: str) -> None:
    keys = read(group, name)
    with torch.device("meta"):
        network = build(keys.get("kind", group), keys)
    check_count(group, name, network, None)


def test_the_1p45b_model_is_its_unet_and_text_encoder() -> None:
    with torch.device("meta"):
        unet = build("unet", read("unet", "text2img_1p45b"))
        text = build("bert", read("text_encoder", "bert_1p45b"))
        network = Denoiser(unet, text, torch.zeros(77, dtype=torch.int64))
    assert parameters(network) + 39_098_682 == 1_454_294_526


def test_discriminators_have_their_published_sizes() -> None:
    with torch.device("meta"):
        assert parameters(PatchDiscriminator()) == 2_765_633
        assert parameters(PatchDiscriminator(layers=2)) == 663_361
        assert PatchDiscriminator()(torch.empty(2, 3, 256, 256)).shape == (2, 1, 30, 30)
        assert sum(b.numel() for b in PatchDiscriminator().buffers()) == 1_795
