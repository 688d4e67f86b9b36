"""Latents go to an S3 store, and a model is trained from there, by the real commands."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from object_store import ObjectStore

pytestmark = pytest.mark.distributed

ENCODE = [
    "latents",
    "data=shards",
    "data.shards='ae/data/*.tar'",
    "data.image_size=32",
    "first_stage.path=ae",
]
TRAIN = ["diffusion", "experiment=smoke", "data=latents", "data.workers=0", "train.max_steps=2", "first_stage.path=ae",
         "train.rank_micro_batch=8", "preview.every_steps=0", "tracking.wandb=off", "safety.dry_run=false"]  # fmt: skip


def test_a_set_in_a_store_is_that_of_a_folder_and_a_model_trains_from_it(
    small_place: Any, object_store: ObjectStore
) -> None:
    folder: Path = small_place.folder
    url = object_store.bucket("encoded") + f"/set-{time.time_ns()}/latents"

    def run(*command: str, ranks: int = 1, **environment: str) -> int:
        small_place.host.folder = folder
        reach = object_store.environment() | environment
        return small_place.host.run(list(command), folder / "keys.jsonl", ranks=ranks, environment=reach)

    small_place.run(*ENCODE, "latents.path=in_folder", ranks=2)
    # Workers are forked beside the threads of the store's client.
    assert run(*ENCODE, "data.workers=1", f"latents.path={url}/", ranks=2) == 0, small_place.log[-6000:]
    fs = object_store.filesystem()
    stored = {name.rpartition("/")[2]: fs.cat_file(name) for name in fs.find(url)}
    written = {path.name: path.read_bytes() for path in (folder / "in_folder").glob("[0ms]*")}
    assert stored == written and {"00000.tar", "00000.json", "manifest.json"} <= set(stored)
    beside = folder / "runs" / "latents" / url.removeprefix("s3://")
    assert (beside / "logs" / "rank_00001.log").exists()
    # A second start does nothing.
    before = fs.find(url, detail=True)
    assert run(*ENCODE, f"latents.path={url}", ranks=2) == 0, small_place.log[-6000:]
    fs.invalidate_cache()
    assert fs.find(url, detail=True) == before
    # Another transform is refused, as in a folder.
    assert run(*ENCODE, f"latents.path={url}", "latents.dtype=fp32") == 2
    assert "was made in another way (dtype: float16 there, float32 now)" in small_place.log
    assert run("index", f"data.shards='{url}/*.tar'", "data.kind=latents") == 0, small_place.log[-6000:]
    for place, name in ((f"{url}/*.tar", "from_store"), ("in_folder/*.tar", "from_folder")):
        assert run(*TRAIN, f"data.shards='{place}'", f"run.dir={name}") == 0, small_place.log[-6000:]
    losses = [
        [json.loads(line).get("loss/total") for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("from_store", "from_folder")
    ]  # fmt: skip
    assert len(losses[0]) >= 2 and losses[0] == losses[1]


def test_a_store_that_cannot_be_written_to_is_a_fault_of_the_configuration(
    small_place: Any, object_store: ObjectStore
) -> None:
    def told(*command: str, **environment: str) -> str:
        small_place.host.folder = small_place.folder
        before = len(small_place.log)
        reach = object_store.environment() | environment
        keys = small_place.folder / "keys.jsonl"
        brief = "data.storage.patience_seconds=1"
        assert small_place.host.run([*ENCODE, brief, *command], keys, ranks=1, environment=reach) == 2
        return str(small_place.log[before:])

    absent = "latents.path=s3://nobody-made-this/latents"
    assert "there is no such bucket" in told(absent)
    here = f"latents.path={object_store.bucket('encoded')}/closed"
    nowhere = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9"}
    assert f"{here} cannot be written" in (text := told(here, **nowhere)) and "no success in 1 s" in text
    assert "the store refuses access" in told(here, AWS_SECRET_ACCESS_KEY="another")
    assert "give a folder without ://" in told("latents.path=https://example.org/latents")
