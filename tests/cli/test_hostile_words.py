"""Names that others chose, in terminal, logs and reports: escaped and cut, and no line or entry that a name forges."""

from __future__ import annotations

import io
import json
import logging
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from rich.console import Console
from safetensors.torch import save_file

from ldmscale import messages
from ldmscale.checkpoint.manager import CheckpointManager
from ldmscale.checkpoint.run_folder import RunFolder
from ldmscale.checkpoint.shards import Piece
from ldmscale.cli import main
from ldmscale.data.loading.skipped_samples import Ledger
from ldmscale.data.shards.report import check_shards
from ldmscale.distributed.environment import Ranks
from ldmscale.tracking.console import ProgressDisplay
from ldmscale.tracking.logs import set_up_logging

NAMES = {
    "window title": "\x1b]0;HACKED\x07\x1b[2J\x1b[31mkey",
    "c1": "k\x9b2Jkey",
    "forged line": "k\n18:00:00 ERROR all is lost",
    "forged entry": "k\n  - all is lost",
    "forged fault": "k\n  fault: all is lost",
    "carriage return": "k\r18:00:00 ERROR all is lost",
    "separator": "k\u2028\x8518:00:00 ERROR all is lost",
    "right to left": "k\u202egnp exe",
    "long": "k" * 60_000,
    "long in words": "k is lost " * 6000,
    "markup": "[red]k[/bold][link=http://a]",
}
UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def check(text: str, shows: str = "k") -> None:
    """Nothing in `text` obeys or forges, and it is no flood."""
    assert shows in text
    assert not UNSAFE.search(text), UNSAFE.search(text)
    assert len(text) < 30_000 and max(map(len, text.splitlines())) < 13_000
    for line in text.splitlines():
        assert not line.startswith(("18:00:00 ERROR", "  - all is lost", "  fault: all is lost")), line


@pytest.fixture(autouse=True)
def logging_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LDMSCALE_CACHE", str(tmp_path / "cache"))
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)
    logging.captureWarnings(False)


def tar(folder: Path, members: list[tuple[str, bytes]]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "00000.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return str(folder / "00000.tar")


def of_key(folder: Path, name: str) -> list[str]:
    return ["index", f"data.shards={tar(folder, [(f'{name}.jpg', b'none'), (f'{name}.txt', b'x')])}"]


def of_refused_member(folder: Path, name: str) -> list[str]:
    return ["index", f"data.shards={tar(folder, [(f'../{name}.jpg', b'none')])}"]


def of_extension(folder: Path, name: str) -> list[str]:
    return ["index", f"data.shards={tar(folder, [(f'a.{name}', b'none')])}"]


def of_json_key(folder: Path, name: str) -> list[str]:
    shard = tar(folder, [("a.jpg", b"none"), ("a.json", json.dumps({name: 1}).encode())])
    return ["index", f"data.shards={shard}", "data.caption=json:caption"]


def of_shard(folder: Path, name: str) -> list[str]:
    inner = folder / name.replace("/", "")[:200]
    tar(inner, [("a.jpg", b"none")])
    return ["index", f"data.shards={folder}/*/*.tar"]


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("words", [of_key, of_refused_member, of_extension, of_json_key, of_shard])
def test_index_shows_names_of_a_tar_escaped_and_cut(
    words: Callable[[Path, str], list[str]], name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    status = main([*words(tmp_path / "made", name), "data.check=decode"])
    told = capfd.readouterr()
    assert status == 2
    check(told.out + told.err)


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_reports_logs_and_the_ledger_hold_names_escaped_and_cut(name: str, tmp_path: Path) -> None:
    shard = tar(tmp_path / "made", [(f"{name}.jpg", b"none"), (f"{name}.txt", b"x")])
    (damage,) = check_shards([shard], "decode").damage
    check(f"{damage}\n{damage.key}")
    assert "\n" not in str(damage)
    # As ranks write them: each record begins a line of the file with its time.
    set_up_logging(tmp_path / "run", Ranks())
    logging.getLogger("ldmscale").warning("a sample cannot be used: %s", name)
    ledger = Ledger(tmp_path / "run" / "data_ledger.jsonl", rank=0)
    ledger.record(shard=shard, key=name, reason=f"no image: {name}", position=3)
    check((tmp_path / "run" / "logs" / "rank_00000.log").read_text())
    (line,) = [each for each in ledger.path.read_text().splitlines() if "no image" in each]
    check(line)


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_import_shows_names_of_tensors_escaped_and_cut(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save_file({name: torch.zeros(1)}, tmp_path / "model.safetensors", {name: name})
    assert main(["import", f"src={tmp_path}/model.safetensors", f"dst={tmp_path}/model"]) == 2
    told = capfd.readouterr()
    check(told.out + told.err)


FORGED: dict[str, Callable[[dict[str, Any], str], Any]] = {
    "file": lambda manifest, name: manifest["files"][0].update(name=name),
    "hash": lambda manifest, name: manifest["files"][0].update(xxh3_128=name),
    "state": lambda manifest, name: manifest.update(state=name),
    "key": lambda manifest, name: manifest["keys"].update({name: [name]}),
}


def run_with(folder: Path, name: str, forge: Callable[[dict[str, Any], str], Any]) -> RunFolder:
    """A run in whose files someone else has written a name."""
    run = RunFolder(folder)
    run.settle_config({"job": f"diffusion {name}", "train": {"max_steps": 4}})
    run.identity_file.write_text(json.dumps({"attempts": 1, "started": name, "finished_step": None}))
    (folder / "metrics.jsonl").write_text(json.dumps({"step": name}) + "\n")
    saving = CheckpointManager(run.checkpoints)
    saving.save(1, [Piece("net/master/w", (4,), 0, torch.zeros(4))], {"images_seen": 1})
    saving.finish()
    saved = run.checkpoints / "step_00000001"
    manifest = json.loads((saved / "manifest.json").read_text())
    forge(manifest, name)
    (saved / "manifest.json").write_text(json.dumps(manifest))
    (saved / "COMPLETE").write_text(xxhash.xxh3_128_hexdigest((saved / "manifest.json").read_bytes()) + "\n")
    (run.checkpoints / name.replace("/", "")[:200]).mkdir()
    for inner in ("logs", "lease", "submissions/0001"):
        (folder / inner).mkdir(parents=True)
    (folder / "logs" / "rank_00000.log").write_text(f"10:00:00 ERROR {name}\n")
    (folder / "logs" / "rank_other.log").write_text("10:00:00 ERROR other\n")
    (folder / "logs" / "slurm_1.out").write_text(f" ldmscale: {name}\n")
    (folder / "submissions" / "0001" / "submission.json").write_text(json.dumps({"slurm_job": name}))
    (folder / "lease" / "lease_00000001.json").write_text(json.dumps({"host": name, "since": name}))
    (folder / "bad_nodes.txt").write_text(name)
    run.ledger.write_text("{}\n" + json.dumps({"reason": name}) + "\n")
    return run


@pytest.mark.parametrize("forged", FORGED)
@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_doctor_shows_names_of_a_run_escaped_and_cut(
    name: str, forged: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_with(tmp_path / "run", name, FORGED[forged])
    main(["doctor", f"run.dir={tmp_path}/run"])
    told = capfd.readouterr()
    check(told.out + told.err)
    assert "Traceback (most" not in told.err


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_progress_bar_shows_its_title_escaped_and_cut(name: str, terminal: bool) -> None:
    stream = io.StringIO()
    display = ProgressDisplay(10, name, Console(file=stream, force_terminal=terminal, width=400))
    display.start(0)
    display.show(5, {"loss/total": 0.25})
    display.close()
    # The bar is drawn with colours and moves of the cursor; of the name nothing does.
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", stream.getvalue())
    check(shown)
    assert "HACKED" not in name or r"\x1b]0;HACKED\x07\x1b[2J" in shown
    assert "[red]" not in name or name in shown
    assert not any(line.startswith(("18:00", "  - all")) for line in shown.splitlines())


def test_entries_and_names_keep_to_themselves() -> None:
    assert messages.entry("a\n  - b\nc") == "  - a\n      - b\n    c"
    assert messages.name("a\n  b") == "a\\n  b"
    assert len(messages.name("k" * 60_000, 100)) < 150
