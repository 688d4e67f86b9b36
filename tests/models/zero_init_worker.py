"""One rank of test_zero_init.py: builds each network plainly and under zero.Init, and compares gradients."""

from __future__ import annotations

import os
from collections.abc import Callable

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn

from ldmscale.models.autoencoder import KLAutoencoder, VQAutoencoder
from ldmscale.models.conditions import ClassEmbedder, Conditions, SpatialRescaler
from ldmscale.models.denoiser import Denoiser
from ldmscale.models.discriminator import PatchDiscriminator
from ldmscale.models.text_encoder import TextTransformer
from ldmscale.models.unet import UNet

CONFIG = {
    "train_batch_size": 2,
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
}


def unet(joined: int) -> UNet:
    return UNet(
        in_channels=4 + joined,
        out_channels=4,
        channels=32,
        channel_mult=(1, 2),
        blocks_per_level=1,
        attention_levels=(0, 1),
        heads=2,
        context_dim=16,
        checkpointing="full",
    )


def denoiser() -> nn.Module:
    text = TextTransformer(vocab_size=9, max_tokens=5, width=16, layers=2, heads=2, head_channels=8)
    return Denoiser(unet(0), text, torch.tensor([1, 2, 0, 0, 0]), null_condition="learned")


def class_and_map() -> nn.Module:
    return Denoiser(
        unet(3),
        class_embedder=ClassEmbedder(classes=5, width=16),
        spatial_rescaler=SpatialRescaler(in_channels=7, out_channels=3, halvings=1),
    )


def kl() -> nn.Module:
    return KLAutoencoder(latent_channels=4, channels=32, channel_mult=(1, 2), blocks_per_level=1)


def vq() -> nn.Module:
    return VQAutoencoder(
        latent_channels=3, channels=32, channel_mult=(1, 2), blocks_per_level=1, codebook_size=16
    )


def discriminator() -> nn.Module:
    return PatchDiscriminator(channels=32, layers=2, norm="group")


def loss_of(name: str, network: nn.Module, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    if name in ("denoiser", "class_and_map"):
        x = torch.randn(1, 4, 8, 8, generator=generator)
        conditions, drop = Conditions(token_ids=torch.tensor([[1, 5, 6, 2, 0]])), torch.tensor([rank == 1])
        if name == "class_and_map":
            classes = torch.randint(0, 7, (1, 16, 16), generator=generator)
            conditions = Conditions(labels=torch.tensor([rank]), spatial=classes)
        prediction: Tensor = network(x, torch.tensor([7 + rank]), conditions, drop)
        return (prediction - x).square().mean()
    images = torch.rand(1, 3, 16, 16, generator=generator) * 2 - 1
    if name == "discriminator":
        logits: Tensor = network(images)
        return (1 - logits).relu().mean()
    reconstruction, bottleneck = network(images, torch.randn(1, 4, 8, 8, generator=generator))
    regular = bottleneck.kl().mean() if name == "kl" else bottleneck.loss
    return (reconstruction - images).abs().mean() + 1e-3 * regular


def check(name: str, build: Callable[[], nn.Module]) -> None:
    rank = dist.get_rank()
    torch.manual_seed(3)
    plain = build()
    torch.manual_seed(3)
    with deepspeed.zero.Init(config_dict_or_path=CONFIG):
        sharded = build()
    parameters = dict(sharded.named_parameters())
    assert parameters.keys() == dict(plain.named_parameters()).keys()
    for key, expected in plain.named_parameters():
        assert parameters[key].numel() == 0, f"{name}.{key} was not cut into shards"
        with deepspeed.zero.GatheredParameters([parameters[key]]):
            assert torch.equal(parameters[key].data, expected.data), f"{name}.{key} has other weights"

    # A U-Net starts with zero layers that hide everything before them: move all weights, alike on both sides.
    for key, expected in plain.named_parameters():
        expected.data.add_(
            0.05 * torch.randn(expected.shape, generator=torch.Generator().manual_seed(len(key)))
        )
        with deepspeed.zero.GatheredParameters([parameters[key]], modifier_rank=0):
            parameters[key].data.copy_(expected.data)
    engine, *_ = deepspeed.initialize(model=sharded, config=CONFIG)
    loss = loss_of(name, engine, rank)
    engine.backward(loss)
    mean = sum(loss_of(name, plain, r) for r in range(dist.get_world_size())) / dist.get_world_size()
    assert isinstance(mean, Tensor)
    mean.backward()
    largest = max(float(p.grad.norm()) for p in plain.parameters() if p.grad is not None)
    for key, p in plain.named_parameters():
        found = safe_get_full_grad(parameters[key])
        assert p.grad is not None and found is not None, f"{name}.{key} got no gradient"
        error = float((found - p.grad).norm()) / largest
        assert error < 1e-5, f"gradient of {name}.{key} differs by {error:.1e}"


def main() -> None:
    # Its operator for shared memory is compiled for a minute on first use, and gloo alone is enough here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    torch.set_num_threads(1)
    for build in (denoiser, class_and_map, kl, vq, discriminator):
        check(build.__name__, build)
        if dist.get_rank() == 0:
            print(f"{build.__name__}: equal", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
