"""metrics.jsonl, the truth about a run: one JSON object a line, one write a line, no double points after a
resume.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from ldmscale.storage.atomic import write_file


class MetricsFile:
    """Appends lines {"step": ..., "images_seen": ..., "loss/total": ...}; one process writes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_tail(path)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - open for the whole run, closed by close()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line, which a reader sees at once and whole.

        Values that JSON has no number for become "nan", "inf", "-inf".
        """
        values = {key: value if math.isfinite(value) else str(float(value)) for key, value in metrics.items()}
        self._file.write((json.dumps({"step": step, **values}) + "\n").encode())

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
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _drop_torn_tail(path: Path) -> None:
    """Cut off a last line without its end, which a killed run may leave: the next would be glued to it."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
