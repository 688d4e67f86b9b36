"""From engines to pieces of a checkpoint and back, at any number of ranks and any ZeRO stage.

A snapshot needs no communication: each rank copies the elements that it owns. What all ranks hold alike is
cut into equal slices, one a rank; buffers are rank 0's. A restore reads only the ranges that this rank owns.

Kinds: "master" (fp32 weights), "exp_avg" and "exp_avg_sq" (AdamW's moments), "ema" and other averages' names,
"frozen" (parameters that are not trained), "buffer". The random state of each rank is "process/rng/...".
"""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ldmscale.checkpoint.shards import Piece, Reader
from ldmscale.distributed.pinning import host_memory
from ldmscale.errors import CheckpointError
from ldmscale.train.engine.ema import Averages, PowerEma, ShardedEma
from ldmscale.train.engine.engine import Engine
from ldmscale.train.engine.master_weights import Fragment

log = logging.getLogger(__name__)

_MOMENTS = ("exp_avg", "exp_avg_sq")


def snapshot(
    engines: Mapping[str, Engine],
    averages: Averages,
    copies: HostCopies | None = None,
    *,
    inside_window: bool = False,
) -> tuple[list[Piece], dict[str, Any]]:
    """Copy this rank's share of the training state to host memory, with what describes it as JSON's values.

    The copies lie in memory of `copies`, if that is given, until the next snapshot takes it. Raises
    RuntimeError inside `averaged_weights`, and between accumulation boundaries except with `inside_window`: then the
    state is that of the last update, and the training must end.
    """
    copies = copies or HostCopies()
    pieces: list[Piece] = []
    networks: dict[str, Any] = {}
    for name, engine in engines.items():
        engine.refuse_averaged("snapshot")
        if not (engine.at_boundary or inside_window):
            raise RuntimeError(
                f"snapshot of {name} inside an accumulation window: save after step() has updated"
            )
        found = averages.get(name, ())
        pieces += _pieces_of(name, engine, found, copies)
        networks[name] = {
            "zero_stage": engine.options.zero_stage,
            "precision": engine.options.precision,
            "updates": engine.updates,
            "skipped_updates": engine.skipped_updates,
            "parameters": engine.parameter_count(),
            "averages": {average.kind: average.description() for average in found},
        }
    copies.wait()
    for key, state in random_states().items():
        pieces.append(Piece(key, tuple(state.shape), 0, state))
    return pieces, {"networks": networks}


def snapshot_averages(
    engines: Mapping[str, Engine], averages: Averages
) -> tuple[list[Piece], dict[str, Any]]:
    """This rank's share of the power-function averages only, from which others are made after the training.

    Raises RuntimeError inside `averaged_weights`.
    """
    copies = HostCopies()
    pieces: list[Piece] = []
    networks: dict[str, Any] = {}
    for name, engine in engines.items():
        engine.refuse_averaged("snapshot")
        tracked = [average for average in averages.get(name, ()) if isinstance(average, PowerEma)]
        for average in tracked:
            pieces += _average_pieces(copies, name, engine, average)
        if tracked:
            networks[name] = {"averages": {average.kind: average.description() for average in tracked}}
    copies.wait()
    return pieces, {"networks": networks}


def restore(source: str | Path | Reader, engines: Mapping[str, Engine], averages: Averages) -> dict[str, Any]:
    """Bring engines and averages to a checkpoint's state; returns what was saved besides the tensors.

    Collective under ZeRO. The random state of each rank comes back if the number of ranks is the one that
    saved. An average that the checkpoint does not have starts from the restored weights. Raises
    CheckpointError, before anything is changed, if a network is missing, or its parameters have other names
    or shapes.
    """
    reader = source if isinstance(source, Reader) else Reader(source)
    faults = [fault for name, engine in engines.items() for fault in _differences(reader, name, engine)]
    if faults:
        raise CheckpointError(f"{reader.folder} does not fit this model:\n" + "\n".join(faults))
    for name, engine in engines.items():
        _restore_engine(reader, name, engine)
        for average in averages.get(name, ()):
            _restore_average(reader, name, engine, average)
    if reader.manifest.world_size == dist.get_world_size():
        restore_random_states(reader)
    return reader.state


def _pieces_of(
    name: str, engine: Engine, averages: Sequence[ShardedEma], copies: HostCopies
) -> Iterator[Piece]:
    states = engine.base_optimizer.state
    for fragment in engine.fragments():
        master = engine.masters[fragment.flat]
        yield from _piece(copies, name, "master", fragment, fragment.of(master))
        moments = states.get(master, {})
        for kind in _MOMENTS:
            if kind in moments:
                yield from _piece(copies, name, kind, fragment, fragment.of(moments[kind]))
    for average in averages:
        yield from _average_pieces(copies, name, engine, average)
    for fragment, values in engine.frozen_fragments():
        yield from _piece(copies, name, "frozen", fragment, values)
    if dist.get_rank() == 0:
        for buffer_name, buffer in engine.buffers():
            key = f"{name}/buffer/{buffer_name}"
            yield Piece(key, tuple(buffer.shape), 0, copies.take(key, buffer.reshape(-1)))


def _average_pieces(copies: HostCopies, name: str, engine: Engine, average: ShardedEma) -> Iterator[Piece]:
    for fragment in engine.fragments():
        yield from _piece(copies, name, average.kind, fragment, fragment.of(average.averages[fragment.flat]))


def _piece(
    copies: HostCopies, network: str, kind: str, fragment: Fragment, values: Tensor
) -> Iterator[Piece]:
    offset = fragment.offset
    if fragment.replicated:  # each rank writes its slice of what all hold
        rank, world = dist.get_rank(), dist.get_world_size()
        offset, end = fragment.numel * rank // world, fragment.numel * (rank + 1) // world
        values = values[offset:end]
    if values.numel():
        key = f"{network}/{kind}/{fragment.name}"
        yield Piece(key, fragment.shape, offset, copies.take(key, values))


def _differences(reader: Reader, name: str, engine: Engine) -> list[str]:
    """How the checkpoint's tensors of a network differ from the network's, in words."""
    if name not in reader.networks():
        return [f"it has no network {name!r}, only {reader.networks()}"]
    shapes = engine.shapes()
    wanted = {
        f"{name}/{'master' if parameter.requires_grad else 'frozen'}/{key}": shapes[key]
        for key, parameter in engine.network.named_parameters()
    } | {f"{name}/buffer/{key}": tuple(buffer.shape) for key, buffer in engine.buffers()}
    found = {
        f"{name}/{kind}/{key}": reader.entry(f"{name}/{kind}/{key}").shape
        for kind in ("master", "frozen", "buffer")
        for key in reader.names(name, kind)
    }
    faults = [f"{key} is missing from it" for key in wanted.keys() - found.keys()]
    faults += [f"{key} is not in the model" for key in found.keys() - wanted.keys()]
    faults += [
        f"{key} has shape {list(found[key])}, the model's has {list(wanted[key])}"
        for key in wanted.keys() & found.keys()
        if found[key] != wanted[key]
    ]
    return sorted(faults)


@torch.no_grad()
def _restore_engine(reader: Reader, name: str, engine: Engine) -> None:
    engine.refuse_averaged("restore")
    saved = reader.state["networks"][name]
    for fragment in engine.fragments():
        key = f"{name}/master/{fragment.name}"
        reader.fill(key, fragment.offset, fragment.of(engine.masters[fragment.flat]))
    moments = engine.resume_at(saved["updates"], saved["skipped_updates"])
    for fragment in engine.fragments() if moments else ():
        for kind in _MOMENTS:
            key = f"{name}/{kind}/{fragment.name}"
            reader.fill(key, fragment.offset, fragment.of(moments[fragment.flat][kind]))
    for fragment, values in engine.frozen_fragments():
        reader.fill(f"{name}/frozen/{fragment.name}", fragment.offset, values)
    for buffer_name, buffer in engine.buffers():
        buffer.copy_(reader.tensor(f"{name}/buffer/{buffer_name}"))
    engine.layout.sync_params_from_master()


@torch.no_grad()
def _restore_average(reader: Reader, name: str, engine: Engine, average: ShardedEma) -> None:
    saved = reader.state["networks"][name]["averages"].get(average.kind)
    if saved is None:
        log.info("the checkpoint has no average %r of %s: it starts from the weights", average.kind, name)
        average.reset()
        return
    average.updates = int(saved["updates"])
    for fragment in engine.fragments():
        key = f"{name}/{average.kind}/{fragment.name}"
        reader.fill(key, fragment.offset, fragment.of(average.averages[fragment.flat]))


class HostCopies:
    """Memory that every save uses again: once it is there, a copy costs no page faults.

    Beside a GPU it is page-locked, so that the copies of a save run together and one wait ends them all.
    What `take` gave holds until the next save takes the same key.
    """

    def __init__(self) -> None:
        self._boxes: dict[str, Tensor] = {}
        self._devices: set[torch.device] = set()

    def take(self, key: str, values: Tensor) -> Tensor:
        """A copy of a 1-D tensor, on its way until `wait`."""
        box = self._boxes.get(key)
        if box is None or box.shape != values.shape or box.dtype != values.dtype:
            box = host_memory(values.shape, values.dtype, pinned=values.is_cuda)
            self._boxes[key] = box
        box.copy_(values.detach(), non_blocking=True)
        if values.is_cuda:
            self._devices.add(values.device)
        return box

    def wait(self) -> None:
        """Return when every copy has arrived."""
        for device in self._devices:
            torch.cuda.synchronize(device)
        self._devices.clear()


# Of the output's root mean square; other kernels, ranks and orders of addition stay far below, lost weights far above.
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}
_DIRECTIONS = 6


def summary(output: Tensor) -> list[float]:
    """Root mean square of an output of any shape, and its components along fixed directions of the same length."""
    values = output.detach().double().cpu().flatten()
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(_DIRECTIONS, values.numel(), generator=generator, dtype=torch.float64)
    return [values.square().mean().sqrt().item(), *(directions @ values / math.sqrt(values.numel())).tolist()]


def verify(saved: Sequence[float], found: Sequence[float], precision: str, checkpoint: object) -> None:
    """Raise CheckpointError if restored weights answer otherwise than the saved ones did."""
    if not all(map(math.isfinite, saved)) or len(saved) != len(found):
        return
    limit = TOLERANCE[precision] * max(saved[0], 1e-6)
    worst = max(abs(one - other) for one, other in zip(saved, found, strict=True))
    if not worst <= limit:
        raise CheckpointError(
            f"{checkpoint} was restored, but the network does not answer as it did when it was saved: its answer to a "
            f"fixed input differs by {worst:.3g}, at most {limit:.3g} is rounding. Go back to the version of ldmscale "
            "and its libraries that wrote it, or to an older checkpoint"
        )


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
