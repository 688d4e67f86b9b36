"""Bad data on one rank alone end all ranks, alike and soon; nobody waits for ever."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ldmscale.data.loading.skipped_samples import read_ledger
from ldmscale.data.shards.index import ShardIndex

WriteShards = Callable[..., list[str]]


@pytest.mark.distributed
def test_all_ranks_stop_alike_when_one_meets_bad_data(tmp_path: Path, write_shards: WriteShards) -> None:
    ShardIndex.open(write_shards(tmp_path, [40, 40]), build_missing=True)
    program = Path(__file__).with_name("program_budget.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(program.parents[3])}
    done = subprocess.run(
        [*command, str(program), str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    # Where one rank has its batch and the other has not, their loaders stand apart: the trainer's position counts.
    assert [{case: told[:4] for case, told in rank.items()} for rank in ranks] == [
        {case: told[:4] for case, told in ranks[0].items()}
    ] * 2
    assert set(ranks[0]) == {"hard", "share", "row", "killed"}
    kind, shared, taken, message, position = ranks[0]["hard"]
    assert (kind, shared, taken, position) == ("DataError", True, 12, 48)  # two micro-batches a step of 8
    assert message.startswith("rank 1: position 5") and "16 stand-ins" in message and "planted" in message
    kind, shared, _, message, _ = ranks[0]["share"]
    assert (kind, shared) == ("DataError", True) and "max_bad_share=0.05" in message
    kind, shared, _, message, _ = ranks[0]["row"]
    assert (kind, shared) == ("DataError", True) and message.startswith("rank 1: 6 samples one after another")
    kind, shared, _, message, _ = ranks[0]["killed"]
    assert (kind, shared) == ("LdmscaleError", True) and message.startswith("rank 1: ")
    assert {entry["rank"] for entry in read_ledger(tmp_path / "share.jsonl")} == {1}
    assert len(read_ledger(tmp_path / "hard.jsonl")) >= 17


@pytest.mark.distributed
@pytest.mark.slow
def test_a_run_on_bad_data_ends_with_one_message_its_state_saved_and_status_2(
    tmp_path: Path,
    write_shards: WriteShards,
    ldmscale: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    bad = {f"{shard:03d}{number:04d}": b"bad" for shard in range(2) for number in range(0, 48, 2)}
    write_shards(tmp_path / "set", [48, 48], bad)
    done = ldmscale(
        "autoencoder", "experiment=smoke", f"data.shards={tmp_path / 'set'}", "train.max_steps=60",
        "checkpoint.save_every_steps=1000", "run.name=bad", cwd=tmp_path, ranks=2,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 2, said
    assert said.count("ldmscale cannot do this, 1 fault") == 1 and "data.max_bad_share=0.01" in said
    (saved,) = (tmp_path / "runs/bad/checkpoints").glob("step_*/COMPLETE")
    assert saved.parent.name != "step_00000000"
    assert len(read_ledger(tmp_path / "runs/bad/data_ledger.jsonl")) > 20
