"""Which attention a process uses: wanted, probed at the model's own head sizes, recorded.

xformers on CUDA, PyTorch's SDPA elsewhere. A backend is compared with SDPA in fp32, forward and backward, before
the first step, because some fail at some sizes, and some silently. What was found goes to the log and
to run.json.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch

from ldmscale.config import AutoencoderConfig, DiffusionJob, TextEncoderConfig, TrainConfig, UNetConfig
from ldmscale.distributed.collectives import any_true
from ldmscale.errors import ConfigError
from ldmscale.models.attention import Backend, Probe, operators_of, probe, set_backend

log = logging.getLogger(__name__)

PREFERRED: dict[str, Backend] = {"cuda": "xformers"}  # by device type; SDPA elsewhere
FALLBACK: Backend = "sdpa"


@dataclass(frozen=True)
class AttentionChoice:
    """What was chosen, and what the probe found."""

    wanted: str  # as configured
    backend: Backend  # in force
    differences: dict[str, Probe]  # from SDPA in fp32, by head size and type: "40 bfloat16"
    fault: str | None = None  # why the preferred backend was not taken

    def plain(self) -> dict[str, Any]:
        """For run.json."""
        found = {
            where: {"forward": result.forward, "backward": result.backward}
            for where, result in self.differences.items()
        }
        return {
            "wanted": self.wanted,
            "backend": self.backend,
            "fault": self.fault,
            "largest_difference": found,
        }


def wanted_attention(train: TrainConfig) -> str:
    """train.attention; SDPA rather than xformers where blocks are compiled, since the two were never run together."""
    if train.compile == "blocks" and train.attention == "auto":
        log.info("train.compile=blocks: attention by SDPA, which is compiled with the block; xformers is not")
        return "sdpa"
    return train.attention


@dataclass(frozen=True)
class UsableAttention:
    """What the preferred backend of a device does there."""

    line: str  # the operators that ran
    fault: str | None = None  # why SDPA takes its place


def usable_attention(device: torch.device, head_channels: int = 64) -> UsableAttention:
    """Runs the preferred backend of `device` forward and backward in bf16, on a GPU."""
    backend = PREFERRED.get(device.type, FALLBACK)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    found, fault = _probed(backend, {dtype: [head_channels]}, device)
    if fault is not None:
        return UsableAttention(FALLBACK, f"{backend} {fault}: attention uses {FALLBACK}")
    worst = max(max(result.forward, result.backward) for result in found.values())
    names = f" ({operators})" if (operators := operators_of(backend, head_channels, device, dtype)) else ""
    return UsableAttention(f"{backend}{names}, within {worst:.1e} of SDPA in fp32")


def choose_attention(
    wanted: str, head_channels: Mapping[torch.dtype, Sequence[int]], device: torch.device
) -> AttentionChoice:
    """Settle the attention backend for this process. Collective: all ranks use the same one.

    Args:
        wanted: "auto" or a backend. Only "auto" may fall back to SDPA, which is then said; a backend that was asked
            for by name must work.
        head_channels: the head sizes of all networks that will run, by the type that they compute in.

    Raises:
        ConfigError: the backend that was asked for fails its probe here or on another rank.
    """
    backends = {name: name for name in get_args(Backend)}
    candidate: Backend = PREFERRED.get(device.type, FALLBACK) if wanted == "auto" else backends[wanted]
    differences, fault = _probed(candidate, head_channels, device)
    if any_true(fault is not None):
        fault = f"{candidate} {fault or 'fails on another rank'}"
        if wanted != "auto" or candidate == FALLBACK:
            raise ConfigError(
                f"train.attention={wanted}: {fault}; give train.attention=auto, or another backend"
            )
        log.warning("%s: attention uses %s instead", fault, FALLBACK)
        candidate = FALLBACK
        differences, _ = _probed(candidate, head_channels, device)
    set_backend(candidate)
    worst = max((max(d.forward, d.backward) for d in differences.values()), default=0.0)
    log.info(
        "attention by %s, within %.1e of SDPA in fp32 at head sizes %s",
        candidate,
        worst,
        ", ".join(differences) or "(none)",
    )
    return AttentionChoice(wanted, candidate, differences, fault)


def _probed(
    backend: Backend, head_channels: Mapping[torch.dtype, Sequence[int]], device: torch.device
) -> tuple[dict[str, Probe], str | None]:
    """What was measured for each head size and type, and the first fault."""
    found: dict[str, Probe] = {}
    for dtype, sizes in head_channels.items():
        # Rounding alone makes 2e-2 in bf16 and 2e-6 in fp32.
        bound = (64 if dtype in (torch.float32, torch.float64) else 4) * torch.finfo(dtype).eps
        for size in sorted(set(sizes)):
            where = f"{size} {str(dtype).removeprefix('torch.')}"
            try:
                result = probe(backend, size, device, dtype)
            except ModuleNotFoundError as error:
                return found, f"is not installed ({error})"
            except (AssertionError, ImportError, NotImplementedError, RuntimeError, ValueError) as error:
                reason = next(iter(str(error).splitlines()), "") or type(error).__name__
                return found, f"fails at head size {where} ({reason})"
            found[where] = result
            if max(result.forward, result.backward) > bound:
                return found, (
                    f"differs from SDPA at head size {where} by {result.forward:.1e} (forward) and "
                    f"{result.backward:.1e} (backward) of its largest value, more than {bound:.1e}"
                )
    return found, None


def diffusion_head_channels(config: DiffusionJob, dtype: torch.dtype) -> dict[torch.dtype, list[int]]:
    """Head sizes of U-Net and text transformer, which compute in `dtype`, and of the first stage, which is fp32."""
    sizes = unet_head_channels(config.unet)
    if isinstance(config.text_encoder, TextEncoderConfig):  # a frozen one has an attention of its own
        sizes.append(config.text_encoder.head_channels)
    found = {dtype: sizes}
    if config.first_stage.path is not None:
        found[torch.float32] = [*found.get(torch.float32, []), *autoencoder_head_channels(config.autoencoder)]
    return found


def unet_head_channels(config: UNetConfig) -> list[int]:
    """Head sizes of the attention layers of a U-Net."""
    widths = [round(config.channels * config.channel_mult[level]) for level in config.attention_levels]
    widths.append(round(config.channels * config.channel_mult[-1]))  # the middle block
    return [config.head_channels or width // (config.heads or 1) for width in widths]


def autoencoder_head_channels(config: AutoencoderConfig) -> list[int]:
    """Head sizes of the attention layers of an autoencoder: one head as wide as its level, 512 in the published ones."""
    levels = [*config.attention_levels, *([-1] if config.mid_attention else [])]
    return [round(config.channels * config.channel_mult[level]) for level in levels]
