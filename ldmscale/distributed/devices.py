"""The device of this rank, whether its GPU can be used, and the settings of CUDA that hold for the whole process."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch

from ldmscale.distributed.environment import Ranks, in_slurm_step
from ldmscale.errors import ConfigError

_DRIVER = Path("/proc/driver/nvidia/version")
_FIRST_GPU = Path("/dev/nvidia0")
_NO_DEVICES = ("", "-1", "NoDevFiles", "none", "void")
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def choose_device(ranks: Ranks, env: Mapping[str, str] = os.environ) -> torch.device:
    """GPU number `local_rank`, or the CPU where there is no GPU or DS_ACCELERATOR=cpu asks for it.

    A Slurm task that sees one GPU of its own (--gpus-per-task=1) takes that one.

    Raises:
        ConfigError: this node has more ranks than GPUs, or a GPU is expected and cannot be used.
    """
    if env.get("DS_ACCELERATOR") == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        if (sign := sign_of_gpus(env)) is not None:
            raise ConfigError(
                f"{sign}, and torch {torch.__version__} cannot use a GPU: {why_no_gpu()}; install a build of torch for this "
                "driver (make install DEVICE=gpu), or set DS_ACCELERATOR=cpu to train on the CPU"
            )
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if ranks.local_size <= visible:
        return torch.device("cuda", ranks.local_rank)
    if visible == 1 and in_slurm_step(env):
        return torch.device("cuda", 0)
    # Every rank of the node says so, not only those for which no GPU is left: the others would wait for them.
    raise ConfigError(
        f"This node has {ranks.local_size} ranks and shows {visible} GPU(s): start at most {visible} ranks a "
        "node, or set DS_ACCELERATOR=cpu to train on the CPU."
    )


def sign_of_gpus(env: Mapping[str, str] = os.environ, first_gpu: Path = _FIRST_GPU) -> str | None:
    """What shows that this process is meant to use a GPU, as the beginning of a sentence; None: nothing does.

    A device file alone is no such sign for a build of torch without CUDA: who installed it wants the CPU.
    """
    accelerator = env.get("DS_ACCELERATOR")
    if accelerator is not None:
        return f"DS_ACCELERATOR={accelerator}" if accelerator == "cuda" else None
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        first = visible.split(",")[0].strip()
        return None if first in _NO_DEVICES else f"CUDA_VISIBLE_DEVICES={visible}"
    for name in ("SLURM_GPUS_ON_NODE", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS"):
        if (value := env.get(name, "")) and not (name == "SLURM_GPUS_ON_NODE" and value == "0"):
            return f"{name}={value}"
    if first_gpu.exists() and torch.version.cuda is not None:
        return f"{first_gpu} is there"
    return None


def why_no_gpu() -> str:
    """Torch's own reason, in one line."""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (AssertionError, RuntimeError) as error:
        return " ".join(str(error).split()) or type(error).__name__
    return "it finds no device"


def use_device(device: torch.device, env: MutableMapping[str, str] = os.environ) -> None:
    """Makes `device` the one of this process, and proves that it computes. Before anything else uses CUDA.

    Raises:
        ConfigError: a kernel of torch does not run on it.
    """
    if device.type != "cuda":
        return
    if not any(name in env for name in _ALLOCATOR):
        # Segments that grow: sizes that change (ZeRO-3's gathers, aspect-ratio buckets) leave no unusable gaps.
        env["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    torch.cuda.set_device(device)
    try:
        (torch.ones(1, device=device) + 1).item()
    except (
        RuntimeError
    ) as error:  # "no kernel image is available", ECC errors, a device that another process holds
        raise ConfigError(
            f"{device} ({torch.cuda.get_device_name(device)}) does not compute: {' '.join(str(error).split())}; torch "
            f"{torch.__version__} is built for {', '.join(torch.cuda.get_arch_list())}"
        ) from error
    fast_arithmetic(True)


def fast_arithmetic(allowed: bool) -> None:
    """The one place of the settings that trade digits of fp32 for speed on CUDA, or choose kernels by measuring them.

    TF32 (10 bits of mantissa) in matrix products and convolutions of fp32 tensors; cuDNN's choice among its kernels by
    trying them. bf16 is not touched by TF32, and CPUs by neither.
    """
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cudnn.benchmark = allowed


def arithmetic() -> dict[str, Any]:
    """The settings of `fast_arithmetic`, for results and run.json."""
    return {
        "tf32_products": torch.get_float32_matmul_precision() != "highest",
        "tf32_convolutions": bool(torch.backends.cudnn.allow_tf32),
        "cudnn_benchmark": bool(torch.backends.cudnn.benchmark),
    }


def describe(device: torch.device) -> str:
    """A line about the device: its name, how many there are, its memory, driver and CUDA."""
    if device.type != "cuda":
        return f"cpu, {torch.get_num_threads()} threads per rank"
    found = torch.cuda.get_device_properties(device)
    return (
        f"{device} of {torch.cuda.device_count()}, {found.name}, {found.total_memory / 2**30:.1f} GiB, compute capability "
        f"{found.major}.{found.minor}, driver {driver_version()}, torch {torch.__version__} for CUDA {torch.version.cuda}"
    )


def driver_version(path: Path = _DRIVER) -> str:
    """Version of the NVIDIA driver as its kernel module states it."""
    try:
        found = re.search(r"\b(\d{3}\.\d+(?:\.\d+)?)\b", path.read_text())
    except OSError:
        found = None
    return "of unknown version" if found is None else found.group(1)
