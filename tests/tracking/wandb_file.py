"""Reads a .wandb file back, for tests: W&B ships no reader that works without its server.

The file is a 7-byte header and then a LevelDB log: blocks of 32 KiB that hold chunks of checksum (u32),
length (u16) and kind (u8: 1 whole record, 2 first part, 3 middle, 4 last), each record a protobuf `Record`.
"""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from wandb.proto.wandb_internal_pb2 import Record

_HEADER, _BLOCK, _CHUNK_HEADER = 7, 32 * 1024, 7


class WandbFile(NamedTuple):
    history: list[dict[str, Any]]
    config: dict[str, Any]
    run_id: str
    project: str
    step_metrics: dict[str, str]  # metric (or glob): its step metric
    exit_code: int | None
    preempting: bool


def read_wandb_file(path: Path, seconds: float = 20.0) -> WandbFile:
    """Everything that the tests look at, once the run has ended: W&B's service writes on while `finish`
    returns.
    """
    end = time.monotonic() + seconds
    while (found := _read(path)).exit_code is None:
        assert time.monotonic() < end, f"{path} has no end of the run: {found}"
        time.sleep(0.02)
    return found


def _read(path: Path) -> WandbFile:
    history: list[dict[str, Any]] = []
    config: dict[str, Any] = {}
    step_metrics: dict[str, str] = {}
    run_id = project = ""
    exit_code, preempting = None, False
    for data in _records(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            history.append(_items(record.history.item))
        elif kind == "run":
            run_id, project = record.run.run_id, record.run.project
            config.update(_items(record.run.config.update))
        elif kind == "metric":
            step_metrics[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "exit":
            exit_code = record.exit.exit_code
        elif kind == "preempting":
            preempting = True
    return WandbFile(history, config, run_id, project, step_metrics, exit_code, preempting)


def _items(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def _records(content: bytes) -> Iterator[bytes]:
    assert content[:4] == b":W&B", content[:8]
    place, parts = _HEADER, b""
    while place + _CHUNK_HEADER <= len(content):
        left = _BLOCK - place % _BLOCK
        _, length, kind = struct.unpack_from("<IHB", content, place)
        if left < _CHUNK_HEADER or (kind == 0 and length == 0):  # the padded end of a block
            place += left
            continue
        if place + _CHUNK_HEADER + length > len(content):  # is being written
            return
        place += _CHUNK_HEADER
        parts += content[place : place + length]
        place += length
        if kind in (1, 4):
            yield parts
            parts = b""
