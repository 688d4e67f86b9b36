"""Parameters, operations of a training step, and what the forward pass keeps for the backward; on the meta device.

Nothing is allocated, so a laptop can tell what the 1.45B model needs. The MFU metric divides by `training_flops`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from ldmscale.builders.networks import blank_conditions, build_denoiser, build_first_stage
from ldmscale.config import DiffusionJob, TextEncoderConfig
from ldmscale.models.layers import Checkpointing, Downsample, ResnetBlock, Upsample
from ldmscale.models.text_encoder import TextLayer
from ldmscale.models.transformer import SpatialAttention, SpatialTransformer

BLOCKS = (ResnetBlock, SpatialTransformer, SpatialAttention, TextLayer, Downsample, Upsample)


def parameters_by_part(config: DiffusionJob) -> dict[str, int]:
    """Parameters of every part of a diffusion job's model, those of its first stage among them."""
    with torch.device("meta"):
        parts = dict(build_denoiser(config).named_children())
        parts |= {
            f"autoencoder.{name}": part
            for name, part in build_first_stage(config.autoencoder).named_children()
        }
    return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}


def training_flops(config: DiffusionJob, latent_shape: Sequence[int]) -> int:
    """Floating-point operations of forward and backward of one image with its conditions.

    Matrix products, convolutions and attention count, as in MFU (Chowdhery et al. 2022); recomputation does not.
    """
    network = _meta_denoiser(config, torch.float32, checkpointing="off")
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(_forward(network, config, latent_shape, 1, torch.float32).sum())
    return int(counter.get_total_flops())


@dataclass(frozen=True)
class Activations:
    """Bytes of tensors that live from the forward to the backward pass, parameters not counted."""

    kept: dict[
        str, int
    ]  # by block, "" for what lies between the blocks; a tensor counts where it is met first
    recomputed: int  # the largest block that checkpointing computes once more during the backward

    @property
    def total(self) -> int:
        """Bytes at the worst moment of the backward pass, gradients not counted."""
        return sum(self.kept.values()) + self.recomputed


def activations(
    config: DiffusionJob, latent_shape: Sequence[int], rank_micro_batch: int, dtype: torch.dtype
) -> Activations:
    """What one forward pass of `rank_micro_batch` samples keeps, with a fused attention (SDPA, xformers).

    `dtype` is that of the weights and of the latent. With checkpointing a block keeps its input only.
    """
    whole = _kept(config, latent_shape, rank_micro_batch, dtype, checkpointing="off")
    modes = {
        config.unet.checkpointing,
        config.text_encoder.checkpointing if isinstance(config.text_encoder, TextEncoderConfig) else "off",
    }
    if modes == {"off"}:
        return Activations(whole, 0)
    kept = _kept(config, latent_shape, rank_micro_batch, dtype, checkpointing=None)
    return Activations(kept, max(whole[name] - kept.get(name, 0) for name in whole if name))


def _kept(
    config: DiffusionJob,
    latent_shape: Sequence[int],
    batch: int,
    dtype: torch.dtype,
    checkpointing: Checkpointing | None,
) -> dict[str, int]:
    network = _meta_denoiser(config, dtype, checkpointing)
    with _FusedAttention(), recorded_activations(network) as kept:
        _forward(network, config, latent_shape, batch, dtype)
    return kept


@contextmanager
def recorded_activations(network: nn.Module) -> Iterator[dict[str, int]]:
    """Inside, fills the dictionary with the bytes that each block of `network` keeps for its backward pass.

    Works on any device. Storages count once; parameters and buffers do not. The inputs of checkpointed blocks,
    which autograd's hooks do not see, are counted as well.
    """
    own = {_storage(tensor) for tensor in [*network.parameters(), *network.buffers()]}
    seen = set(own)
    kept: dict[str, int] = {"": 0}
    inside: list[str] = [""]

    def count(tensor: Tensor) -> Tensor:
        if (key := _storage(tensor)) not in seen:
            seen.add(key)
            alive.append(tensor)
            kept[inside[-1]] = kept.get(inside[-1], 0) + tensor.untyped_storage().nbytes()
        return tensor

    alive: list[Tensor] = []  # no storage may go and leave its address to another one
    handles = []
    for name, block in network.named_modules():
        if not isinstance(block, BLOCKS):
            continue
        handles.append(block.register_forward_pre_hook(_entering(name, inside, kept)))
        handles.append(block.register_forward_hook(_leaving(inside)))
        if _is_checkpointed(network, name) and not isinstance(block, (Downsample, Upsample)):
            handles.append(block.register_forward_pre_hook(_counting_inputs(count)))
    try:
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            yield kept
    finally:
        for handle in handles:
            handle.remove()


def _is_checkpointed(network: nn.Module, name: str) -> bool:
    """As the nearest network or level round the block says."""
    while name:
        name = name.rpartition(".")[0]
        if hasattr(network.get_submodule(name), "checkpointing"):
            return network.get_submodule(name).checkpointing == "full"
    return False


def _entering(name: str, inside: list[str], kept: dict[str, int]) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: Any) -> None:
        inside.append(name)
        kept.setdefault(name, 0)

    return hook


def _leaving(inside: list[str]) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        inside.pop()

    return hook


def _counting_inputs(count: Callable[[Tensor], Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: Any) -> None:
        for tensor in inputs:
            if isinstance(tensor, Tensor):
                count(tensor)

    return hook


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class _FusedAttention(TorchFunctionMode):
    """On the meta device SDPA is a chain of matrix products, which keeps the scores; on others it keeps its output."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args)[0]
        return func(*args, **(kwargs or {}))


def _meta_denoiser(
    config: DiffusionJob, dtype: torch.dtype, checkpointing: Checkpointing | None
) -> nn.Module:
    """The network without memory; `checkpointing` None leaves it as configured."""
    if checkpointing is not None:
        text = config.text_encoder
        config = replace(
            config,
            unet=replace(config.unet, checkpointing=checkpointing),
            text_encoder=replace(text, checkpointing=checkpointing)
            if isinstance(text, TextEncoderConfig)
            else text,
        )
    with torch.device("meta"):
        return build_denoiser(config).to(dtype)


def _forward(
    network: nn.Module, config: DiffusionJob, latent_shape: Sequence[int], batch: int, dtype: torch.dtype
) -> Tensor:
    with torch.device("meta"):
        x, t = torch.empty(batch, *latent_shape, dtype=dtype), torch.zeros(batch, dtype=torch.int64)
        result: Tensor = network(x, t, blank_conditions(config, latent_shape, batch))
    return result
