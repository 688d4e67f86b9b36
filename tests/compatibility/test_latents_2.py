"""A set of latents as the first release of version 2 wrote it is read for ever."""

from __future__ import annotations

import itertools
import tarfile
from pathlib import Path

import make_latents_2 as made
import numpy as np
import pytest
import torch
import webdataset

from ldmscale.data.latents.format import LatentManifest
from ldmscale.data.latents.index import open_latents
from ldmscale.data.latents.sample_record import read_record
from ldmscale.data.latents.writer import is_finished
from ldmscale.data.loading.held_out import fixed_batches
from ldmscale.data.loading.loader import Loader
from ldmscale.data.loading.transforms import LatentItem
from ldmscale.data.shards.mixture import Mixture
from ldmscale.data.shards.reader import SampleReader

OF_NUMBER = [bucket for shard in made.BUCKETS for bucket in shard]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with tarfile.open(made.ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def test_manifest_and_statistics(folder: Path) -> None:
    manifest = LatentManifest.load(folder)
    assert manifest.format == made.FORMAT and manifest.shards == ("00000.tar", "00001.tar")
    assert (manifest.samples, manifest.skipped) == (7, 0)
    every = [made.moments(number).astype(np.float64) for number in range(7)]
    mean = np.mean([each[:2].mean(axis=(1, 2)) for each in every], axis=0)
    second = np.mean(
        [(each[:2] ** 2 + np.exp(np.clip(each[2:], -30, 20))).mean(axis=(1, 2)) for each in every], axis=0
    )
    assert manifest.channel_mean == pytest.approx(mean)
    assert manifest.channel_std == pytest.approx(np.sqrt(second - mean**2))
    assert manifest.scale_factor == pytest.approx((second.mean() - mean.mean() ** 2) ** -0.5)
    assert all(is_finished(folder, name, made.FORMAT) for name in manifest.shards)


def test_every_member_by_the_loader(folder: Path) -> None:
    index = open_latents([str(folder / "00000.tar"), str(folder / "00001.tar")])
    assert not list(folder.rglob(".ldmscale_index"))
    assert index.bucket_counts.tolist() == [[2, 1, 1], [1, 0, 2]]
    item = LatentItem(
        made.FORMAT, caption_source="captions:blip.txt", flip=True, seed=1, text=made.FORMAT.text
    )
    seen, mirrored = set(), 0
    for batch in fixed_batches(Mixture.of(index), item, 7, 2):
        rows = zip(
            batch["key"],
            batch["position"].tolist(),
            batch["latent"],
            batch["caption"],
            batch["text"],
            strict=True,
        )
        for key, position, latent, caption, text in rows:
            number = int(key)
            flipped = item.member(position) == "latent_flipped.npy"
            expected = made.moments(number)[:, :, ::-1] if flipped else made.moments(number)
            assert np.array_equal(latent.float().numpy(), expected) and caption == f"a picture of {number}"
            assert text.dtype == torch.float16 and np.array_equal(text.float().numpy(), made.text(number))
            seen.add(number)
            mirrored += flipped
    assert seen == set(range(7)) and 0 < mirrored < 7


def test_sizes_and_captions(folder: Path) -> None:
    reader = SampleReader(open_latents([str(folder / "00000.tar"), str(folder / "00001.tar")]))
    for number, (shard, at) in enumerate([(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2)]):
        view, captions = read_record(reader.read(shard, at).members)
        assert view == made.VIEWS[OF_NUMBER[number]]
        assert captions == {"txt": f"caption {number} ü", "blip.txt": f"a picture of {number}"}
    # 100x80 pixels, whose middle square of 80 became 32: the whole became 40x32, cut at 4.
    assert (made.VIEWS[0].resized, made.VIEWS[0].crop) == ((40, 32), (4, 0))


def test_the_order_of_a_run(folder: Path) -> None:
    """Recorded when the set was made: a run that began then goes on with the same samples."""
    index = open_latents([str(folder / "00000.tar"), str(folder / "00001.tar")])
    assert index.fingerprint == "534dcdcc4cb93823"
    loader = Loader(
        index, LatentItem(made.FORMAT), seed=0, rank=0, world=1, global_batch=2, rank_micro_batch=2
    )
    assert [int(key) for batch in itertools.islice(loader, 7) for key in batch["key"]] == [
        5,
        3,
        1,
        0,
        2,
        2,
        4,
        1,
        6,
        6,
        4,
        0,
        5,
        3,
    ]


def test_plain_webdataset(folder: Path) -> None:
    paths = [str(folder / "00000.tar"), str(folder / "00001.tar")]
    rows = list(webdataset.WebDataset(paths, shardshuffle=False).decode())
    assert [row["__key__"] for row in rows] == [f"{number:04d}" for number in range(7)]
    for number, row in enumerate(rows):
        values = (row["latent.npy"].astype("uint32") << 16).view("float32")
        assert np.array_equal(values, made.moments(number)) and row["tokens.npy"].tolist() == [1, number, 2]
        assert row["txt"] == f"caption {number} ü" and row["json"] == {
            "label": number,
            "alt": f"alt {number}",
        }
        assert np.array_equal(row["text.npy"], made.text(number)) and row["sample.json"]["text_tokens"] == 2
