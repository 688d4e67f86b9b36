"""Pieces go into files, and any range of any tensor comes out of whatever files hold it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from ldmscale.checkpoint.manifest import merge, write_manifest
from ldmscale.checkpoint.shards import Piece, Reader, mark_complete, write_pieces
from ldmscale.errors import CheckpointError

Save = Callable[..., Path]
KEY = "denoiser/master/w"
WHOLE = torch.arange(35, dtype=torch.float32).view(5, 7)


def checkpoint_of(folder: Path, cuts: list[tuple[int, int]], shape: tuple[int, ...] = (5, 7)) -> Reader:
    """A checkpoint of one tensor whose ranks hold the given ranges."""
    folder.mkdir()
    parts = []
    for rank, (low, high) in enumerate(cuts):
        values = WHOLE.view(-1)[low:high].clone()
        piece = [Piece(KEY, shape, low, values)] if high > low else []
        parts.append(write_pieces(folder / f"rank_{rank:05d}.safetensors", rank, piece))
    write_manifest(folder, merge(parts, step=3, state={"images_seen": 9}))
    mark_complete(folder)
    return Reader(folder)


def test_every_range_of_an_unevenly_cut_tensor_is_read(tmp_path: Path) -> None:
    reader = checkpoint_of(tmp_path / "c", [(0, 12), (12, 24), (24, 35), (35, 35)])
    assert torch.equal(reader.tensor(KEY), WHOLE)
    for low in range(36):
        for high in range(low, 36):
            out = torch.full((high - low,), -1.0)
            reader.fill(KEY, low, out)
            assert torch.equal(out, WHOLE.view(-1)[low:high])
    assert reader.manifest.images_seen == 9 and reader.manifest.world_size == 4


def test_ranges_outside_and_unknown_keys_are_refused(tmp_path: Path) -> None:
    reader = checkpoint_of(tmp_path / "c", [(0, 35)])
    with pytest.raises(CheckpointError, match=r"has 35 elements; 30\.\.36"):
        reader.fill(KEY, 30, torch.empty(6))
    with pytest.raises(CheckpointError, match="no tensor denoiser/master/v"):
        reader.tensor("denoiser/master/v")


@pytest.mark.parametrize(
    ("cuts", "shape"),
    [
        ([(0, 12), (13, 35)], (5, 7)),
        ([(0, 12), (11, 35)], (5, 7)),
        ([(0, 12), (12, 34)], (5, 7)),
        ([(1, 35)], (5, 7)),
    ],
)
def test_holes_and_overlaps_are_refused_when_a_checkpoint_is_put_together(
    tmp_path: Path, cuts: list[tuple[int, int]], shape: tuple[int, ...]
) -> None:
    with pytest.raises(CheckpointError, match=r"denoiser/master/w: 35 elements, but the ranks wrote"):
        checkpoint_of(tmp_path / "c", cuts, shape)


def test_ranks_that_disagree_or_are_missing_are_refused(tmp_path: Path) -> None:
    parts = [
        write_pieces(tmp_path / "a", 0, [Piece(KEY, (4,), 0, torch.zeros(2))]),
        write_pieces(tmp_path / "b", 1, [Piece(KEY, (2, 2), 2, torch.zeros(2))]),
    ]
    with pytest.raises(CheckpointError, match="ranks disagree"):
        merge(parts, step=0, state={})
    with pytest.raises(CheckpointError, match=r"files of ranks \[1\]"):
        merge(parts[1:], step=0, state={})
    with pytest.raises(CheckpointError, match="two pieces with the key"):
        write_pieces(
            tmp_path / "c", 0, [Piece(KEY, (2,), 0, torch.zeros(1)), Piece(KEY, (2,), 1, torch.zeros(1))]
        )


def test_weights_are_whole_float32_with_frozen_ones_and_buffers(save: Save) -> None:
    reader = Reader(save(7))
    weights = reader.weights("denoiser")
    assert sorted(weights) == ["conv.weight", "count", "scale"]
    assert weights["conv.weight"].shape == (3, 4) and weights["conv.weight"][2, 3] == 711.0
    assert weights["scale"].dtype == torch.float32 and weights["scale"].shape == ()
    assert weights["count"].dtype == torch.int64 and weights["count"].item() == 7
    assert reader.weights("denoiser", "ema")["conv.weight"][2, 3] == 355.5
    assert reader.networks() == ["denoiser"]
    with pytest.raises(
        CheckpointError, match=r"no 'ema' weights of 'generator'; it has denoiser: buffer ema frozen master"
    ):
        reader.weights("generator", "ema")


def test_torchs_own_reader_reads_the_pieces(tmp_path: Path) -> None:
    reader = checkpoint_of(tmp_path / "c", [(0, 12), (12, 35)], shape=(35,))
    state = {KEY: torch.zeros(35)}
    dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(reader.folder)), no_dist=True)
    assert torch.equal(state[KEY], WHOLE.view(-1))


def test_reading_needs_no_deepspeed() -> None:
    code = "import sys, ldmscale.checkpoint; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=240).returncode == 0
