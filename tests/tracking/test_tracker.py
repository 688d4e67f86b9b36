"""One dictionary to three places, on rank 0 only."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image

from ldmscale.distributed.environment import Ranks
from ldmscale.tracking.images import tile
from ldmscale.tracking.tracker import Tracker

sys.path.insert(0, str(Path(__file__).parent))
from wandb_file import read_wandb_file


@dataclass(frozen=True)
class Options:
    wandb: Literal["auto", "off", "offline", "online"] = "off"
    project: str = "tests"
    entity: str | None = None
    tags: tuple[str, ...] = ()
    wandb_images_per_hour: int = 2


def test_one_dictionary_reaches_console_file_and_wandb(tmp_path, capsys):
    tracker = Tracker(tmp_path, Ranks(), Options("offline"), 10, run_id="abcd1234", config={"seed": 1})
    tracker.resume_from(0)
    tracker.log(1, {"loss/total": 0.5, "images_seen": 8})
    tracker.close("finished")
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 1,
        "loss/total": 0.5,
        "images_seen": 8,
    }
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    (row,) = read_wandb_file(file).history
    assert (row["step"], row["loss/total"], row["images_seen"]) == (1, 0.5, 8)
    assert "1/10  loss 0.5000" in capsys.readouterr().err


def test_other_ranks_write_nothing(tmp_path):
    folder = tmp_path / "run"
    tracker = Tracker(folder, Ranks(rank=1, size=2, local_rank=1, local_size=2), Options("offline"), 10)
    tracker.resume_from(0)
    tracker.advance(1)
    tracker.log(1, {"loss/total": 0.5})
    tracker.images(1, "samples", np.zeros((2, 2, 3), dtype=np.uint8))
    tracker.close("finished")
    assert not folder.exists()


@pytest.mark.parametrize(
    ("name", "file"), [("samples", "step_00001000.png"), ("preview/ema", "preview_ema_step_00001000.png")]
)
def test_pictures_are_written_with_their_captions(tmp_path, name, file):
    tracker = Tracker(tmp_path, Ranks(), Options(), 10)
    images = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    tracker.images(1000, name, images, ["a räd card", "a tank"])
    tracker.close("finished")
    assert [path.name for path in (tmp_path / "samples").iterdir()] == [file]
    with Image.open(tmp_path / "samples" / file) as image:
        assert json.loads(image.text["captions"]) == ["a räd card", "a tank"]
        assert np.array_equal(np.asarray(image), tile(images))


def test_tiles_stand_row_by_row_on_white():
    images = np.stack([np.full((3, 4, 3), number, dtype=np.uint8) for number in range(3)])
    picture = tile(images)
    assert picture.shape == (8, 10, 3)
    assert [picture[0, 0, 0], picture[0, 6, 0], picture[5, 0, 0], picture[5, 6, 0]] == [0, 1, 2, 255]
    assert np.all(picture[3:5] == 255) and np.all(picture[:, 4:6] == 255)


def test_a_resumed_run_has_no_double_points_in_its_file_and_in_wandb(tmp_path):
    for start, loss in ((0, 1.0), (2, 2.0)):
        tracker = Tracker(tmp_path, Ranks(), Options("offline"), 10, run_id="abcd1234")
        tracker.resume_from(start)
        for step in range(start + 1, 5 + start):
            tracker.log(step, {"loss/total": loss})
        tracker.close("stopped")
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss/total"]) for line in found] == [
        (1, 1.0),
        (2, 1.0),
        *((s, 2.0) for s in (3, 4, 5, 6)),
    ]
    # W&B takes nothing back: it keeps what the first start sent of steps 3 and 4, and gets the rest from the second.
    sent = [
        row
        for file in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
        for row in read_wandb_file(file).history
    ]
    assert [(row["step"], row["loss/total"]) for row in sent] == [
        *((s, 1.0) for s in (1, 2, 3, 4)),
        (5, 2.0),
        (6, 2.0),
    ]


def test_pictures_beyond_the_budget_of_an_hour_stay_in_their_folder(tmp_path, caplog):
    tracker = Tracker(tmp_path, Ranks(), Options("offline"), 10, run_id="abcd1234")
    with caplog.at_level("INFO"):
        for step in (1, 2, 3):
            tracker.images(step, "samples", np.full((4, 4, 3), step, dtype=np.uint8))
    tracker.close("finished")
    assert len(list(tmp_path.glob("samples/*.png"))) == 3
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/*.png"))) == 2
    assert "wandb_images_per_hour" in caplog.text
