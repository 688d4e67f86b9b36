"""A checkpoint is there whole or not at all; the newest whole one is found; old ones go."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ldmscale.checkpoint.folders import Retention
from ldmscale.checkpoint.manager import CheckpointManager, newest_checkpoint
from ldmscale.checkpoint.shards import COMPLETE, Piece, Reader, mark_complete
from ldmscale.errors import CheckpointError

Save = Callable[..., Path]


def names(manager: CheckpointManager) -> list[str]:
    return sorted(path.name for path in manager.folder.iterdir())


def value(folder: Path | None) -> float:
    assert folder is not None
    return float(Reader(folder).tensor("denoiser/master/conv.weight")[0, 0])


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 3)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


def test_a_checkpoint_has_the_documented_files(save: Save, manager: CheckpointManager) -> None:
    folder = save(1000, wandb="abc")
    assert folder.name == "step_00001000"
    assert sorted(path.name for path in folder.iterdir()) == [
        COMPLETE,
        "manifest.json",
        "rank_00000.safetensors",
    ]
    assert (manager.folder / "latest").read_text() == "step_00001000\n"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["format"] == 1 and manifest["step"] == 1000 and manifest["images_seen"] == 4000
    assert manifest["files"][0]["size"] == (folder / "rank_00000.safetensors").stat().st_size
    assert manifest["libraries"]["torch"] and manifest["world_size"] == 1
    assert manifest["keys"]["denoiser/master/conv.weight"] == {
        "dtype": "float32",
        "shape": [3, 4],
        "shards": [[0, 12, 0]],
    }
    assert Reader(folder).state["wandb"] == "abc"


def test_no_checkpoint_is_none(manager: CheckpointManager) -> None:
    assert manager.newest() is None
    assert newest_checkpoint(manager.folder) is None


@pytest.mark.parametrize("damage", [truncate, flip, os.unlink])
@pytest.mark.parametrize("file", ["rank_00000.safetensors", "manifest.json", COMPLETE])
def test_a_torn_file_leads_to_the_checkpoint_before_with_a_word_about_it(
    file: str,
    damage: Callable[[Path], None],
    save: Save,
    manager: CheckpointManager,
    caplog: pytest.LogCaptureFixture,
) -> None:
    save(1)
    save(2)
    assert value(manager.newest()) == 200.0
    target = manager.folder / "step_00000002" / file
    damage(target)
    with caplog.at_level(logging.WARNING):
        assert value(manager.newest()) == 100.0
    if file != COMPLETE or damage is not os.unlink:  # what lacks COMPLETE was never there
        assert "step_00000002 cannot be used" in caplog.text
    if damage is not flip or file != "rank_00000.safetensors":  # a reader of one process looks at sizes only
        assert value(newest_checkpoint(manager.folder)) == 100.0
    # The run goes on and saves the step again over the torn one.
    save(2)
    assert value(manager.newest()) == 200.0
    assert names(manager) == ["latest", "step_00000001", "step_00000002"]


def test_damage_to_all_is_an_error_and_never_a_start_from_nothing(
    save: Save, manager: CheckpointManager
) -> None:
    truncate(save(1) / "rank_00000.safetensors")
    (save(2) / "manifest.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"every complete checkpoint .* is damaged(.|\n)*manifest(.|\n)*bytes"
    ):
        manager.newest()


def test_another_format_is_refused_by_number(save: Save) -> None:
    path = save(1) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    mark_complete(path.parent)
    with pytest.raises(CheckpointError, match="has format 2, this version reads 1"):
        Reader(path.parent)


def test_a_failed_save_leaves_everything_as_it_was(save: Save, manager: CheckpointManager) -> None:
    save(1)
    hole = [Piece("denoiser/master/conv.weight", (3, 4), 0, torch.zeros(11))]
    with pytest.raises(CheckpointError, match=r"12 elements, but the ranks wrote 0\.\.11"):
        manager.save(2, hole, {})
    with pytest.raises(CheckpointError, match="could not commit"):
        save(2, unserialisable=object())
    assert names(manager) == ["latest", "step_00000001"]
    assert (manager.folder / "latest").read_text() == "step_00000001\n"


def test_an_unwritable_folder_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="could not write its file"):
        CheckpointManager(tmp_path / "file" / "checkpoints").save(1, [], {})


def test_the_last_ones_are_kept_and_never_fewer_than_two(save: Save, manager: CheckpointManager) -> None:
    for step in range(1, 6):
        save(step)
    assert names(manager) == ["latest", "step_00000003", "step_00000004", "step_00000005"]
    stingy = CheckpointManager(manager.folder, retention=Retention(keep_last=0))
    stingy.save(6, [], {})
    assert names(stingy) == ["latest", "step_00000005", "step_00000006"]


def test_leavings_of_a_killed_save_are_no_checkpoints_and_are_cleared(
    save: Save, manager: CheckpointManager
) -> None:
    save(1)
    for name in ("step_00000002.00004.tmp", "step_00000003"):
        (manager.folder / name).mkdir()
        (manager.folder / name / "rank_00000.safetensors").write_bytes(b"half")
    assert value(manager.newest()) == 100.0
    save(4)
    assert names(manager) == ["latest", "step_00000001", "step_00000004"]


def test_saving_a_step_again_replaces_it(save: Save, manager: CheckpointManager) -> None:
    save(1)
    save(2, attempt=1)
    save(2, attempt=2)
    assert Reader(manager.newest() or Path()).state["attempt"] == 2
    assert names(manager) == ["latest", "step_00000001", "step_00000002"]


def test_a_save_killed_between_its_renamings_loses_nothing(save: Save, manager: CheckpointManager) -> None:
    folder = save(2)
    folder.rename(
        folder.with_name("step_00000002.replaced")
    )  # and the new content is still step_00000002.00001.tmp
    assert manager.newest() == folder
    assert value(folder) == 200.0


def test_going_back_sets_later_checkpoints_aside_until_the_run_has_passed_them(
    save: Save, manager: CheckpointManager
) -> None:
    for step in (10, 20, 30):
        save(step)
    save(15)  # after a return to step 10
    newest = manager.newest()
    assert newest is not None and newest.name == "step_00000015"
    assert names(manager) == [
        "latest",
        "step_00000010",
        "step_00000015",
        "step_00000020.abandoned",
        "step_00000030.abandoned",
    ]
    save(25)
    assert names(manager) == [
        "latest",
        "step_00000010",
        "step_00000015",
        "step_00000025",
        "step_00000030.abandoned",
    ]
