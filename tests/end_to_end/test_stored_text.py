"""Outputs of a frozen text encoder, stored with the latents: those of the library, read in place of running the encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import text_folders
import torch
import webdataset
from transformers import AutoTokenizer, CLIPTextModel

pytestmark = pytest.mark.distributed

SIZES = ["text_encoder.width=64", "text_encoder.max_tokens=16"]
CLIP = ["text_encoder=clip_l", "text_encoder.path=clip", *SIZES]
ENCODE = [
    "latents",
    "first_stage.path=ae",
    "data.shards='ae/data/*.tar'",
    "data.workers=0",
    "latents.dtype=fp32",
]
TRAIN = [
    "diffusion", "experiment=smoke", "data.workers=0", "first_stage.path=ae", "train.max_steps=4", "optim.lr=1e-2",
    "diffusion.caption_dropout=0.3", "preview.sampler_steps=2", "preview.images=3", "preview.every_steps=4",
    "train.rank_micro_batch=4", "validation.every_steps=4", "validation.samples=9",
]  # fmt: skip
ON_LATENTS = ["data=latents", "data.shards='latents/*.tar'", "data.heldout_shards='latents/00001.tar'"]
ON_IMAGES = ["data=shards", "data.shards='ae/data/*.tar'", "data.heldout_shards='ae/data/00001.tar'", "data.image_size=32",
             "data.workers=0"]  # fmt: skip


@pytest.fixture(scope="module")
def place(small_place: Any) -> Any:
    folder = small_place.folder / "stored_text"
    folder.mkdir()
    (folder / "ae").symlink_to(small_place.folder / "ae")
    text_folders.make("clip", folder / "clip")
    text_folders.make("clip", folder / "other", seed=1)
    made = type(small_place)(small_place.host, folder)
    made.run(*ENCODE, *CLIP, "latents.text=true", "latents.path=latents", "latents.rank_batch=5", ranks=2)
    made.run(*ENCODE, *CLIP, "latents.text=true", "latents.path=alone", "latents.rank_batch=3")
    return made


def lines(run: Path, key: str) -> list[float]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in found if key in line]


def refused(place: Any, *command: str) -> str:
    place.host.folder = place.folder
    assert place.host.run(list(command), place.folder / "keys.jsonl") == 2
    return str(place.log)


def test_what_is_stored_is_what_the_library_makes_of_the_captions(place: Any) -> None:
    files = {path.name: path.read_bytes() for path in place.folder.glob("latents/[0ms]*")}
    assert files == {path.name: path.read_bytes() for path in place.folder.glob("alone/[0ms]*")}
    tokenizer, network = (
        AutoTokenizer.from_pretrained(place.folder / "clip"),
        CLIPTextModel.from_pretrained(place.folder / "clip").eval(),
    )
    for row in webdataset.WebDataset(
        str(place.folder / "latents" / "00000.tar"), shardshuffle=False
    ).decode():
        told = tokenizer(
            row["txt"], padding="max_length", max_length=16, truncation=True, return_tensors="pt"
        )
        with torch.no_grad():
            expected = network(input_ids=told.input_ids).last_hidden_state[0]
        assert row["text.npy"].shape == (16, 64)
        np.testing.assert_allclose(row["text.npy"], expected.numpy(), atol=1e-5)
        assert row["sample.json"]["text_tokens"] == int(told.attention_mask.sum())


def test_training_with_stored_text_is_training_with_the_encoder(place: Any) -> None:
    place.run(*TRAIN, *CLIP, *ON_LATENTS, "run.dir=stored", ranks=2)
    assert "text encodings are read with the latents" in place.log
    place.run(*TRAIN, *CLIP, *ON_LATENTS, "run.dir=run_encoder", "data.stored_text=false")
    place.run(*TRAIN, *CLIP, *ON_IMAGES, "run.dir=online")
    for key in ("loss/total", "validation/raw/loss"):
        expected = lines(place.folder / "online", key)
        assert expected and lines(place.folder / "stored", key) == pytest.approx(expected, rel=1e-4)
        assert lines(place.folder / "run_encoder", key) == pytest.approx(expected, rel=1e-4)


def test_text_of_another_encoder_or_caption_is_refused(place: Any) -> None:
    other = ["text_encoder=clip_l", "text_encoder.path=other", *SIZES]
    told = refused(place, *TRAIN, *other, *ON_LATENTS, "run.dir=refused")
    assert "made with the text encoder" in told and "data.stored_text=false" in told
    told = refused(place, *TRAIN, *CLIP, *ON_LATENTS, "data.caption=json:caption", "run.dir=refused_too")
    assert "give data.caption=txt" in told
    told = refused(place, *ENCODE, *other, "latents.text=true", "latents.path=latents")
    assert "was made in another way (text: " in told


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        (["latents.text=true"], "text_encoder is not set: give a frozen one"),
        (["latents.text=true", "text_encoder=tiny"], "is one that is trained"),
        (CLIP, "give latents.text=true"),
    ],
)
def test_settings_that_store_no_text_name_their_remedy(place: Any, settings: list[str], remedy: str) -> None:
    assert remedy in refused(place, *ENCODE, *settings, "latents.path=none")
