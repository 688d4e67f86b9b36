"""What is counted on the meta device is what a real step does: operations, kept tensors, parameters."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from ldmscale.builders.costs import activations, parameters_by_part, recorded_activations, training_flops
from ldmscale.builders.networks import blank_conditions, build_denoiser
from ldmscale.config import DiffusionJob
from ldmscale.config.compose import compose_job
from ldmscale.config.typed import read
from ldmscale.models.attention import current_backend, set_backend

LATENT = (4, 16, 16)
RNG_STATE = torch.get_rng_state().nbytes
NO_TEXT = ["text_encoder=null", "unet.context_dim=null"]
CLASSES = ["text_encoder=null", "class_embedder=imagenet", "class_embedder.width=64"]
MAPS = ["spatial=semantic", "unet.in_channels=7"]
KINDS = {
    "text": [],
    "unconditional": NO_TEXT,
    "residual resampling": [*NO_TEXT, "unet.residual_updown=true", "unet.scale_shift_norm=true"],
    "class": CLASSES,
    "embeddings": ["text_encoder=null", "embeddings=clip_768", "embeddings.width=64"],
    "small image": [*NO_TEXT, "spatial=superres", "unet.in_channels=7"],
    "masked image": [*NO_TEXT, "spatial=inpainting", "spatial.channels=5", "unet.in_channels=9"],
    "map": [*NO_TEXT, *MAPS],
    "text and map": MAPS,
}
FULL = ["unet.checkpointing=full"]


def small(*overrides: str) -> DiffusionJob:
    return read(DiffusionJob, compose_job("diffusion", ["experiment=smoke", *overrides]))


def forward(network: nn.Module, config: DiffusionJob, batch: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.ones(batch, *LATENT, dtype=dtype)
    result: torch.Tensor = network(
        x, torch.zeros(batch, dtype=torch.int64), blank_conditions(config, LATENT, batch)
    )
    return result


@pytest.fixture
def plain_attention() -> Iterator[None]:
    """Matrix products, which the counter knows; it passes over the CPU's own fused attention."""
    before = current_backend()
    set_backend("plain")
    yield
    set_backend(before)


@pytest.mark.parametrize("kind", KINDS)
def test_operations_are_those_of_a_real_step(kind: str, plain_attention: None) -> None:
    config = small(*KINDS[kind])
    network = build_denoiser(config)
    with FlopCounterMode(display=False) as counter:
        forward(network, config, 1, torch.float32).sum().backward()
    assert training_flops(config, LATENT) == counter.get_total_flops()


def test_recomputation_is_no_operation() -> None:
    assert training_flops(small(*FULL), LATENT) == training_flops(small(), LATENT)


def test_the_published_model_needs_its_known_operations() -> None:
    given = ["data.shards=x", "train.global_batch=8", "train.rank_micro_batch=8"]
    flops = training_flops(read(DiffusionJob, compose_job("diffusion", given)), (4, 32, 32))
    # About 6 operations a weight and position; the U-Net's widest maps are small, the text transformer has 77 positions.
    text = 6 * 542_895_360 * 77
    assert text < flops < 4 * text


def saved_by_autograd(network: nn.Module, config: DiffusionJob, batch: int, dtype: torch.dtype) -> int:
    """Bytes of all storages that autograd saves, each once, less those of the network itself."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*network.parameters(), *network.buffers()]}
    found: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        found.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward(network, config, batch, dtype)
    return sum(tensor.untyped_storage().nbytes() for pointer, tensor in found.items() if pointer not in own)


@pytest.mark.parametrize(
    ("kind", "dtype"), [*((kind, torch.float32) for kind in KINDS), ("text and map", torch.bfloat16)]
)
def test_kept_bytes_are_those_that_autograd_saves(kind: str, dtype: torch.dtype) -> None:
    config = small(*KINDS[kind])
    network = build_denoiser(config).to(dtype)
    planned = activations(config, LATENT, 3, dtype)
    assert planned.recomputed == 0
    assert planned.total == saved_by_autograd(network, config, 3, dtype)
    with recorded_activations(network) as measured:
        forward(network, config, 3, dtype)
    assert planned.kept == measured
    assert sum(size > 0 for size in measured.values()) > 10


@pytest.mark.parametrize(
    ("overrides", "blocks"),
    [
        ([], 0),
        (FULL, 15),
        ([*FULL, "text_encoder.checkpointing=full"], 17),
        ([*KINDS["residual resampling"], *FULL], 17),
    ],
)
def test_kept_bytes_are_what_the_allocator_still_holds(overrides: list[str], blocks: int) -> None:
    """The profiler sees every allocation, also the inputs of checkpointed blocks, which autograd does not save."""
    config = small(*overrides)
    network = build_denoiser(config)
    forward(network, config, 3, torch.float32)  # warm
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        out = forward(network, config, 3, torch.float32)
    held = sum(event.self_cpu_memory_usage for event in profiler.key_averages())
    planned = activations(config, LATENT, 3, torch.float32)
    kept = sum(planned.kept.values()) + out.nbytes
    # Each checkpointed block also remembers the state of the random generator.
    assert held == kept + blocks * RNG_STATE


def test_checkpointing_keeps_less_and_computes_its_largest_block_again() -> None:
    off, full = (
        activations(small(*o), LATENT, 3, torch.float32)
        for o in ([], [*FULL, "text_encoder.checkpointing=full"])
    )
    assert full.total < 0.5 * off.total
    assert full.recomputed >= max(size for name, size in off.kept.items() if name) - max(
        size for name, size in full.kept.items() if name
    )


def test_parameters_are_counted_by_part() -> None:
    config = small(*KINDS["class"])
    found = parameters_by_part(config)
    network = build_denoiser(config)
    assert found["class_embedder"] == 1001 * 64
    inside = {name: size for name, size in found.items() if not name.startswith("autoencoder.")}
    assert sum(inside.values()) == sum(p.numel() for p in network.parameters())
    assert sum(found.values()) - sum(inside.values()) == 699_207
