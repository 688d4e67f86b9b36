"""Metrics of a run: means over micro-batches and ranks, and the file metrics.jsonl that keeps them.

Keys are paths such as "loss/total". Values on a GPU are summed there; only `MetricSums.mean` waits for the device.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ldmscale.distributed.collectives import gather_lists
from ldmscale.storage.atomic import write_file
from ldmscale.storage.lost_lines import LostLines, append_whole
from ldmscale.storage.plain_values import Count, checked, parsed_object


@dataclass(frozen=True)
class PartialMean:
    """A metric that not every sample of a micro-batch has a part in: the mean over `samples` of them."""

    value: Tensor  # one element
    samples: int


Metric = Tensor | float | PartialMean


class MetricSums:
    """Weighted sums of metrics since the last `mean`."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}
        self._weights: dict[str, float] = {}

    def add(self, values: Mapping[str, Metric], weight: float = 1.0) -> None:
        """Add the values of one micro-batch; `weight` is the number of samples (or steps) that they are means
        of. A PartialMean counts as its own number of samples.

        Tensors have one element; they are detached and stay on their device.
        """
        for key, given in values.items():
            value: Tensor | float
            if isinstance(given, PartialMean):
                value, own = given.value, float(given.samples)
            else:
                value, own = given, weight
            if isinstance(value, Tensor):
                # fp32 for the sum of bf16 losses; reshape lets shapes [] and [1] mix
                part: Tensor | float = value.detach().float().reshape(()) * own
            else:
                part = float(value) * own
            before = self._sums.get(key)
            self._sums[key] = part if before is None else before + part
            self._weights[key] = self._weights.get(key, 0.0) + own

    def mean(self) -> dict[str, float]:
        """Weighted means over everything added on all ranks, the same on all ranks; then start anew.

        Collective.

        Ranks may have different keys. Empty if no rank added anything.
        """
        local = [(key, total, self._weights[key]) for key, total in self._on_host().items()]
        self._sums.clear()
        self._weights.clear()
        sums: dict[str, float] = {}
        weights: dict[str, float] = {}
        for key, total, weight in gather_lists(local):
            sums[key] = sums.get(key, 0.0) + total
            weights[key] = weights.get(key, 0.0) + weight
        return {key: sums[key] / weights[key] for key in sums if weights[key] > 0}

    def _on_host(self) -> dict[str, float]:
        keys = [key for key, total in self._sums.items() if isinstance(total, Tensor)]
        tensors = [total for total in self._sums.values() if isinstance(total, Tensor)]
        # One copy for all tensors of a device: each copy is a wait.
        values: dict[str, float] = {}
        for device in {tensor.device for tensor in tensors}:
            names = [key for key, tensor in zip(keys, tensors, strict=True) if tensor.device == device]
            stacked = torch.stack([tensor for tensor in tensors if tensor.device == device])
            values.update(zip(names, stacked.tolist(), strict=True))
        return {key: total if isinstance(total, float) else values[key] for key, total in self._sums.items()}


class MetricsFile:
    """metrics.jsonl: one JSON object per line, {"step": ..., "images_seen": ..., "loss/total": ...}.

    One process writes a file. Each line is one write, and no step appears twice after a resume.
    """

    def __init__(self, path: Path) -> None:
        self._path, self.lost = path, LostLines(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_tail(path)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - open for the whole run, closed by close()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line, which a reader sees at once and whole.

        Values that JSON has no number for become "nan", "inf", "-inf". A line that the disk does not take is lost: logged
        and counted in `lost`.
        """
        values = {key: value if math.isfinite(value) else str(float(value)) for key, value in metrics.items()}
        try:
            append_whole(self._file.fileno(), (json.dumps({"step": step, **values}) + "\n").encode())
        except OSError as error:
            self.lost.add(error)

    def resume_from(self, step: int) -> int:
        """Forget what was written after `step`, because these steps will be taken again; returns the last step that the
        file told of until now (0: none).

        Replaces the file atomically.
        """
        lines = self._path.read_bytes().splitlines(keepends=True)
        steps = [_step_of(line) for line in lines]
        kept = [line for line, at in zip(lines, steps, strict=True) if at <= step]
        write_file(self._path, kept)
        self._file.close()
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115
        return int(max((at for at in steps if math.isfinite(at)), default=0))

    def close(self) -> None:
        """Bring everything to the disk and close."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()


def _step_of(line: bytes) -> float:
    """The step of a line; infinity for a line that is damaged, which is never kept."""
    try:
        return checked(Count, parsed_object(line).get("step"))
    except ValueError:
        return math.inf


def _drop_torn_tail(path: Path) -> None:
    """Cut off a last line without its end, which a killed run may leave: the next would be glued to it."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
