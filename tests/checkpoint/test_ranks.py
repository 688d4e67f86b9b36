"""Two ranks agree on what was saved, what failed and what is damaged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from ldmscale.checkpoint.shards import Reader

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks") / "checkpoints"


@pytest.fixture(scope="module")
def found(folder: Path) -> Mapping[str, Any]:
    path = folder.with_name("found.json")
    program = Path(__file__).with_name("program_save.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    root = Path(__file__).parent.parent.parent
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [*command, str(program), str(path), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result: Mapping[str, Any] = json.loads(path.read_text())
    return result


def test_both_ranks_find_the_same_newest(found: Mapping[str, Any]) -> None:
    assert found["newest"] == ["step_00000002"] * 2


def test_a_hole_is_the_same_error_on_both_ranks(found: Mapping[str, Any]) -> None:
    one, other = found["hole"]
    assert one == other
    assert "denoiser/master/w: 10 elements, but the ranks wrote 0..5, 5..9" in one


def test_a_failure_of_one_rank_is_named_on_both_and_leaves_no_trace(found: Mapping[str, Any]) -> None:
    one, other = found["twice"]
    assert one == other
    assert "rank 1 could not write its file" in one
    assert found["left"] == [["latest", "step_00000001", "step_00000002"]] * 2


def test_a_flipped_bit_in_one_file_leads_both_ranks_to_the_checkpoint_before(
    found: Mapping[str, Any],
) -> None:
    assert found["newest_after_flip"] == ["step_00000001"] * 2


def test_damage_to_all_stops_both_ranks_alike(found: Mapping[str, Any]) -> None:
    one, other = found["all_damaged"]
    assert one == other
    assert "rank_00001.safetensors has the hash" in one and "rank_00000.safetensors is missing" in one


def test_a_later_save_of_both_ranks_is_whole(found: Mapping[str, Any], folder: Path) -> None:
    assert found["newest_in_the_end"] == ["step_00000003"] * 2
    reader = Reader(folder / "step_00000003")
    assert torch.equal(reader.tensor("denoiser/master/w"), torch.arange(10.0) + 300)
    assert reader.manifest.world_size == 2 and reader.manifest.images_seen == 30
