"""Tiny members of every published family, as models with random weights, and CompVis' checkpoints of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ldmscale.builders.networks import build_autoencoder, build_text_encoder, build_unet
from ldmscale.config import (
    AutoencoderConfig,
    ClassEmbedderConfig,
    DiffusionConfig,
    ImportedUNetConfig,
    SpatialConfig,
    TextEncoderConfig,
)
from ldmscale.data.tokenizers.bert import SPECIAL
from ldmscale.interop.compvis import to_state
from ldmscale.interop.model import Model, Part
from ldmscale.models.conditions import ClassEmbedder, SpatialRescaler


def unet(**changes) -> ImportedUNetConfig:
    values = dict(
        in_channels=4,
        out_channels=4,
        channels=32,
        channel_mult=(1, 2),
        blocks_per_level=1,
        attention_levels=(0,),
    )
    return ImportedUNetConfig(**(values | changes))


def first_stage(**changes) -> AutoencoderConfig:
    values = dict(kind="kl", latent_channels=4, channels=32, channel_mult=(1, 2, 2, 2), blocks_per_level=1)
    return AutoencoderConfig(**(values | changes))


TEXT = TextEncoderConfig(
    kind="bert",
    tokenizer="bert-base-uncased",
    vocab_size=40,
    max_tokens=77,
    width=32,
    layers=2,
    heads=8,
    head_channels=64,
)
VQ4 = first_stage(kind="vq", latent_channels=3, channel_mult=(1, 2, 2), codebook_size=16)


@dataclass
class Family:
    unet: ImportedUNetConfig | None = None
    autoencoder: AutoencoderConfig | None = None
    text_encoder: TextEncoderConfig | None = None
    class_embedder: ClassEmbedderConfig | None = None
    spatial: SpatialConfig | None = None
    # What CompVis' shapes leave open, as settings of the job.
    given: list[str] = field(default_factory=list)
    diffusers: bool = True  # whether diffusers can express it


FAMILIES = {
    "text2img": Family(unet(heads=8, context_dim=32), first_stage(), TEXT, given=["unet.heads=8"]),
    "text2img_256": Family(
        unet(in_channels=3, out_channels=3, head_channels=16, context_dim=32, blocks_per_level=2), VQ4, TEXT,
        given=["unet.head_channels=16"],
    ),
    "class_conditional": Family(
        unet(heads=1, context_dim=24, attention_levels=(1,)), first_stage(), None, ClassEmbedderConfig(10, 24, null_class=True),
        given=["unet.heads=1"], diffusers=False,
    ),
    "faces": Family(
        unet(in_channels=3, out_channels=3, channel_mult=(1, 2, 3), attention_levels=(1, 2), head_channels=16), VQ4,
        given=["unet.head_channels=16"],
    ),
    "churches": Family(
        unet(heads=4, attention_levels=(0, 1), residual_updown=True, scale_shift_norm=True, blocks_per_level=2),
        first_stage(), given=["unet.heads=4"], diffusers=False,
    ),
    "layout": Family(
        unet(in_channels=3, out_channels=3, head_channels=32, context_dim=32, transformer_depth=3), VQ4, TEXT,
        given=["unet.head_channels=32"],
    ),
    "semantic": Family(
        unet(in_channels=6, out_channels=3, attention_levels=(), heads=8), VQ4, None, None,
        SpatialConfig("map", 3, 12, 2), given=["unet.heads=8"], diffusers=False,
    ),
    "superres": Family(
        unet(in_channels=6, out_channels=3, channel_mult=(1, 2, 2), attention_levels=(2,), head_channels=16), VQ4,
        given=["unet.head_channels=16"],
    ),
    "class_table": Family(unet(heads=2, context_dim=24, num_classes=5), given=["unet.heads=2"]),
    "kl_f4": Family(None, first_stage(latent_channels=3, channel_mult=(1, 2, 2))),
    "kl_f8": Family(None, first_stage(blocks_per_level=2)),
    "kl_f16": Family(None, first_stage(latent_channels=16, channel_mult=(1, 1, 2, 2, 3), attention_levels=(4,))),
    "kl_f32": Family(None, first_stage(latent_channels=8, channel_mult=(1, 1, 1, 2, 2, 2), attention_levels=(4, 5))),
    "vq_f4": Family(None, VQ4),
    "vq_f4_noattn": Family(
        None, first_stage(kind="vq", latent_channels=3, channel_mult=(1, 2, 2), codebook_size=16, mid_attention=False)
    ),
    "vq_f8": Family(None, first_stage(kind="vq", codebook_size=16, attention_levels=(3,))),
    "vq_f16": Family(
        None,
        first_stage(
            kind="vq", latent_channels=8, channel_mult=(1, 1, 2, 2, 2), attention_levels=(4,), codebook_size=16, codebook_dim=6
        ),
    ),
}  # fmt: skip


def randomised(network: torch.nn.Module, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random tensors of a network's names and shapes; outputs of order one."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, tensor in network.state_dict().items():
        drawn = torch.randn(tensor.shape, generator=generator)
        if tensor.dim() > 1:
            drawn = drawn / tensor[0].numel() ** 0.5
        else:
            drawn = 1 + 0.2 * drawn if name.endswith("weight") else 0.2 * drawn
        made[name] = drawn.to(dtype)
    return made


def model_of(family: Family, dtype: torch.dtype = torch.float32, seed: int = 0) -> Model:
    """The family's model, as if it had been read from somewhere."""
    with torch.device("meta"):
        built = {
            "unet": family.unet and (family.unet, build_unet(family.unet)),
            "autoencoder": family.autoencoder and (family.autoencoder, build_autoencoder(family.autoencoder)),
            "text_encoder": family.text_encoder and (family.text_encoder, build_text_encoder(family.text_encoder)),
            "class_embedder": family.class_embedder
            and (family.class_embedder, ClassEmbedder(classes=10, width=24, null_class=True)),
            "spatial_rescaler": family.spatial
            and (family.spatial, SpatialRescaler(in_channels=12, out_channels=3, halvings=2)),
        }  # fmt: skip
    model = Model(diffusion=DiffusionConfig() if family.unet else None, latent_size=8)
    for number, (name, made) in enumerate(built.items()):
        if made:
            config, network = made
            model.parts[name] = Part(config, randomised(network, seed + number, dtype))
    return model


def buffers(start: float = 0.00085, end: float = 0.012) -> dict[str, Tensor]:
    """Some of the buffers that CompVis saves with a diffusion model."""
    betas = torch.linspace(start**0.5, end**0.5, 1000, dtype=torch.float64) ** 2
    bars = torch.cumprod(1 - betas, 0)
    return {
        "betas": betas.float(),
        "alphas_cumprod": bars.float(),
        "sqrt_alphas_cumprod": bars.sqrt().float(),
    }


def averages(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Averaged copies of a diffusion model as LitEma names them, with its counters."""
    copies = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): tensor * 0.5
        for name, tensor in state.items()
        if name.startswith("model.diffusion_model.")
    }
    return copies | {
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(7, dtype=torch.int32),
    }


def compvis_state(
    family: Family, dtype: torch.dtype = torch.float32, with_extras: bool = True
) -> dict[str, Tensor]:
    """A checkpoint's tensors under CompVis' names, with everything that a published one has around the model."""
    state = to_state(model_of(family, dtype))
    if not with_extras:
        return state
    prefix = "first_stage_model." if family.unet else ""
    generator = torch.Generator().manual_seed(5)
    if family.autoencoder:
        state[prefix + "loss.discriminator.main.0.weight"] = torch.randn(4, 3, 4, 4, generator=generator)
        state[prefix + "loss.discriminator.main.3.num_batches_tracked"] = torch.tensor(12)
        state[prefix + "loss.logvar"] = torch.tensor(0.0)
    if family.text_encoder:
        rows, width = family.text_encoder.vocab_size, family.text_encoder.width
        state["cond_stage_model.transformer.to_logits.weight"] = torch.randn(rows, width, generator=generator)
        state["cond_stage_model.transformer.to_logits.bias"] = torch.randn(rows, generator=generator)
    if family.unet:
        state |= buffers() | averages(state)
    return state


def bert_words(folder: Path) -> Path:
    """A tokenizer of a few words, as a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [
        *SPECIAL,
        "a",
        "red",
        "blue",
        "dragon",
        "tank",
        "castle",
        "on",
        "the",
        "hill",
        ".",
        ",",
        "of",
        "two",
        "three",
    ]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return folder
