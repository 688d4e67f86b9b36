"""The ledger keeps every line of many processes."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

from ldmscale.data.loading.skipped_samples import Ledger, read_ledger


def _write(path: str, rank: int) -> None:
    ledger = Ledger(path, rank)
    for number in range(50):
        ledger.record(shard="s.tar", key=f"{rank}-{number}", reason="r" * 200, position=number)


def test_lines_of_several_processes_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "data_ledger.jsonl"
    processes = [
        multiprocessing.get_context("fork").Process(target=_write, args=(str(path), rank), daemon=True)
        for rank in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    entries = read_ledger(path)
    assert {entry["key"] for entry in entries} == {f"{rank}-{n}" for rank in range(4) for n in range(50)}
    assert len(entries) == 200 and entries[0]["time"].endswith("+00:00")


def test_an_absent_ledger_is_empty_and_a_cut_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "data_ledger.jsonl"
    assert read_ledger(path) == []
    Ledger(path).record(shard="s", key="k", reason="lone \udcff surrogate", position=None)
    with open(path, "a") as stream:
        stream.write('{"shard": "s", "ke')
    assert [entry["key"] for entry in read_ledger(path)] == ["k"]


def test_without_a_path_nothing_is_written(tmp_path: Path) -> None:
    Ledger(None).record(shard="s", key="k", reason="r", position=1)
    assert list(tmp_path.iterdir()) == []
