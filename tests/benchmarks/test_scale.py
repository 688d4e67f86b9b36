"""What benchmarks/scale counts, at small numbers of ranks and shards: sizes, descriptors, file calls and requests, not times.

The growth that is asserted is today's. Where it is too steep, the docstring says so, and a later change tightens it.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def rows(tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    """What `python -m benchmarks.scale` writes as JSON."""
    path = tmp_path / "rows.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scale", *arguments, "--json", str(path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(path.read_text())
    return found


@pytest.mark.slow
def test_the_manifest_at_zero_3_holds_a_piece_for_each_tensor_kind_and_rank(tmp_path: Path) -> None:
    """Records today's law: pieces = tensors x kinds x ranks, but for tensors with fewer elements than ranks.

    It is too steep: 3.5 million pieces for the 1.45B model at 1024 ranks. A manifest that stores the rule of the partition
    has a size that does not depend on the ranks.
    """
    from benchmarks.pretended_cuda.experiment import SMALL
    from benchmarks.scale.manifest import KINDS, shapes

    counts = [math.prod(shape) for _, shape in shapes(SMALL)]
    found = rows(tmp_path, "manifest", "--small", "--ranks", "8", "64", "256")
    assert [row["ranks"] for row in found] == [8, 64, 256]
    for row in found:
        ranks = row["ranks"]
        assert row["tensors"] == len(counts) and row["parameters"] == sum(counts)
        assert row["pieces"] == len(KINDS) * sum(math.ceil(n / math.ceil(n / ranks)) for n in counts)
    # Eight times the ranks write nearly eight times the pieces; at 256 biases of 64 elements have a piece per element.
    assert found[1]["pieces"] > 7.5 * found[0]["pieces"] and found[2]["pieces"] > 2.5 * found[1]["pieces"]
    assert found[1]["manifest_mb"] > 3 * found[0]["manifest_mb"]
    assert found[2]["manifest_mb"] > 2 * found[1]["manifest_mb"]


def test_the_manifest_at_zero_1_hardly_grows_with_the_ranks(tmp_path: Path) -> None:
    """Each rank adds one cut per kind at most, and one record of its file."""
    few, many = rows(tmp_path, "manifest", "--small", "--zero", "1", "--ranks", "8", "64")
    kinds = 4
    assert few["pieces"] <= kinds * (few["tensors"] + 7) and many["pieces"] <= kinds * (many["tensors"] + 63)
    assert many["manifest_mb"] < 1.2 * few["manifest_mb"]


def test_ranges_of_all_ranks_hold_each_element_once() -> None:
    from benchmarks.scale.manifest import ranges

    tensors = [("a", (3, 5)), ("b", (2,)), ("c", (7, 11))]
    for stage in (0, 1, 2, 3):
        held: dict[str, list[int]] = {name: [] for name, _ in tensors}
        for rank in range(4):
            for name, _, offset, numel in ranges(stage, rank, 4, tensors):
                held[name] += range(offset, offset + numel)
        assert held == {"a": list(range(15)), "b": list(range(2)), "c": list(range(77))}


def test_a_start_looks_every_shard_up(tmp_path: Path) -> None:
    """Records today's law: 3 calls of stat per shard and look-up on every rank, where the shards are listed by braces."""
    few, many = rows(tmp_path, "index", "--shards", "10", "60")
    assert few["samples"] == 20 and many["samples"] == 120
    assert many["stats"] - few["stats"] <= 3 * 50
    assert few["opens"] == many["opens"] <= 2  # the index itself, whatever the number of shards


def test_the_order_covers_its_blocks_and_shares_out_its_positions(tmp_path: Path) -> None:
    (found,) = rows(tmp_path, "order", "--shards", "64", "--ranks", "32")
    assert found["block_is_covered"] and found["ranks_are_disjoint"] and found["shards_at_once"] == 16
    assert 64 * 9_000 < found["samples"] < 64 * 11_000


@pytest.mark.slow
@pytest.mark.distributed
def test_gloo_opens_descriptors_for_every_other_rank(tmp_path: Path) -> None:
    """Records today's law: each rank more is one descriptor more on every rank, unless connections are lazy."""
    two, six = rows(tmp_path, "exchange", "--ranks", "2", "6")
    assert six["descriptors"] - two["descriptors"] == 4
    assert six["store_bytes"] > two["store_bytes"] and six["all_reduce_ms"] > 0


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("s3fs") is None, reason="s3fs (extra s3) is not installed")
def test_requests_to_a_store_are_counted(tmp_path: Path) -> None:
    """Records today's law: one GET per sample read, one per shard for the index; a start lists, and reads no shard."""
    found = {row["what"]: row for row in rows(tmp_path, "requests", "--shards", "4", "--reads", "8")}
    assert found["read 8 samples"]["requests"] == {"GET": 8}
    assert found["make the index"]["requests"]["GET"] == 4
    start = found["open the index, per rank and start"]["requests"]
    assert start.get("GET", 0) == 0 and start.get("LIST", 0) <= 1


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("s3fs") is None, reason="s3fs (extra s3) is not installed")
def test_requests_of_the_latents_job_are_counted(tmp_path: Path) -> None:
    """Records today's law: about 37 requests per shard made, and two per finished shard at a start (wanted: none)."""
    made, again, idle, _ = rows(tmp_path, "latents", "--finished", "3", "--held", "1")
    assert 3 * 10 < made["total"] < 3 * 45
    assert again["total"] <= 2 * 3 + 2 and "PUT" not in again["requests"]
    assert idle["total"] > 0
