"""The random states of this process as tensors, for checkpoints: torch on CPU and GPU, numpy, Python.

Nothing that is learnt depends on them across ranks (draws of a sample are functions of its position), except
dropout; so they come back only at the number of ranks that saved them.
"""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ldmscale.checkpoint.storage import Reader


def random_states() -> dict[str, Tensor]:
    """1-D uint8 tensors by their keys in a checkpoint."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    states["python"] = _packed(random.getstate())
    name, words, position, has_gauss, gauss = np.random.get_state()
    states["numpy"] = _packed([name, np.asarray(words).tolist(), position, has_gauss, gauss])
    return {_key(kind): state for kind, state in states.items()}


def restore_random_states(reader: Reader) -> None:
    """Take back what this rank saved; what the checkpoint does not have stays as it is."""
    torch.set_rng_state(reader.tensor(_key("cpu")))
    if torch.cuda.is_available() and _key("cuda") in reader.manifest.keys:
        torch.cuda.set_rng_state(reader.tensor(_key("cuda")))
    if _key("python") in reader.manifest.keys:
        version, words, gauss = _unpacked(reader.tensor(_key("python")))
        random.setstate((version, tuple(words), gauss))
    if _key("numpy") in reader.manifest.keys:
        np.random.set_state(tuple(_unpacked(reader.tensor(_key("numpy")))))


def _key(kind: str) -> str:
    return f"process/rng/{kind}_{dist.get_rank():05d}"


def _packed(state: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)


def _unpacked(packed: Tensor) -> Any:
    return json.loads(packed.numpy().tobytes())
