"""Version 2 of the latent format: what is stored of each sample, and the index that the writer makes."""

from __future__ import annotations

import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset

from ldmscale.data.latents.format import LatentFormat, LatentManifest
from ldmscale.data.latents.index import open_latents
from ldmscale.data.latents.sample_record import SampleView, read_record
from ldmscale.data.latents.store import place_of
from ldmscale.data.latents.writer import LatentShardWriter, finish_set, is_finished
from ldmscale.data.shards.index import ShardIndex
from ldmscale.data.shards.reader import SampleReader
from ldmscale.data.shards.selection import Selection
from ldmscale.errors import DataError
from ldmscale.setup.latents import stored_version

PLAIN = LatentFormat("a" * 16, "latent", "float16", (2, 4, 4), {"size": 32})
SHAPES = ((2, 4, 4), (2, 2, 8), (2, 8, 2))
BUCKETED = replace(PLAIN, shapes=SHAPES)
NAMES = ["00000.tar", "00001.tar", "00002.tar"]
COUNTS = ((3, 0, 2), (0, 4, 1), (1, 1, 1))  # samples of each bucket
VIEW = SampleView(original=(1000, 500), offset=(250, 0), part=(500, 500), size=(32, 32))


def write(folder: Path, form: LatentFormat = BUCKETED) -> list[str]:
    """Three shards; the latent of a sample is full of its number, which is its key."""
    number = 0
    for name, counts in zip(NAMES, COUNTS, strict=True):
        with LatentShardWriter(folder, name, form) as writer:
            for bucket, count in enumerate(counts):
                for _ in range(count):
                    used = bucket if form.shapes else 0
                    key = f"{'long/' * 40 if number == 2 else ''}{number:04d}"
                    latent, caption = (
                        np.full(form.shape_of(used), float(number)),
                        "word " * 300 * (number % 2),
                    )
                    writer.write(
                        key, latent, f"caption {caption}", {"n": number}, bucket=used, view=VIEW,
                        captions={"txt": f"caption {number}", "blip.txt": f"a {number} ü"},
                    )  # fmt: skip
                    number += 1
    finish_set(folder, NAMES, form)
    return [str(folder / name) for name in NAMES]


def spans(index: ShardIndex) -> list[list[tuple[int, int]]]:
    return [[index.span(s, i) for i in range(int(n))] for s, n in enumerate(index.counts)]


@pytest.mark.parametrize("form", [PLAIN, BUCKETED])
def test_the_index_of_the_writer_is_that_of_a_scan_of_the_shards(tmp_path: Path, form: LatentFormat) -> None:
    paths = write(tmp_path / "set", form)
    written = open_latents(paths)
    assert not (tmp_path / "set" / ".ldmscale_index").exists()  # no shard was looked through
    scanned = ShardIndex.open(paths, build_missing=True)
    assert spans(written) == spans(scanned)
    assert (written.total, written.sizes.tolist()) == (13, scanned.sizes.tolist())
    if form.shapes:
        assert written.bucket_counts.tolist() == [list(counts) for counts in COUNTS]
    else:
        assert written.fingerprint == scanned.fingerprint  # a run that was scanned for goes on


def test_the_index_reads_only_the_sizes_of_the_shards(tmp_path: Path) -> None:
    paths = write(tmp_path)
    for path in paths:
        size = Path(path).stat().st_size
        Path(path).write_bytes(b"\0" * size)  # a reader finds no sample
    assert open_latents(paths).total == 13
    Path(paths[1]).write_bytes(b"\0" * 5)
    with pytest.raises(DataError, match=r"00001\.tar has 5 bytes, and was written with \d+"):
        open_latents(paths)
    Path(paths[1]).unlink()
    with pytest.raises(DataError, match=r"00001\.tar cannot be found"):
        open_latents(paths)


def test_some_shards_of_several_sets_are_put_together(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    chosen = [second[2], first[0], first[2]]
    with pytest.raises(DataError, match="no index yet"):
        open_latents(chosen)
    found = open_latents(chosen, build_missing=True)
    scanned = ShardIndex.open(chosen, build_missing=True)
    assert spans(found) == spans(scanned) and found.bucket_counts.tolist() == [
        [1, 1, 1],
        [3, 0, 2],
        [1, 1, 1],
    ]
    assert SampleReader(found).read(0, 2).key == "0012"
    again = open_latents(chosen)
    assert again.path == found.path and again.fingerprint == found.fingerprint


def test_with_a_filter_the_buckets_are_those_of_the_stored_shapes(tmp_path: Path) -> None:
    paths = write(tmp_path)
    index = open_latents(paths, build_missing=True, selection=Selection(filter="n >= 4"))
    assert index.bucket_counts.tolist() == [[0, 0, 1], [0, 4, 1], [1, 1, 1]]
    (tmp_path / "samples.idx").unlink()  # by hand
    whole = open_latents(paths, build_missing=True)
    assert whole.bucket_counts.tolist() == [list(counts) for counts in COUNTS]


def test_a_damaged_index_is_refused(tmp_path: Path) -> None:
    paths = write(tmp_path)
    path = tmp_path / "samples.idx"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"samples\.idx is damaged .* for 13 samples"):
        open_latents(paths)
    path.write_bytes(b"[" * 5000)
    with pytest.raises(DataError, match=r"samples\.idx is damaged"):
        open_latents(paths)


def test_plain_webdataset_reads_samples_and_their_records(tmp_path: Path) -> None:
    paths = write(tmp_path)
    rows = list(webdataset.WebDataset(paths, shardshuffle=False).decode())
    assert len(rows) == 13 and rows[2]["__key__"] == "long/" * 40 + "0002"
    buckets = [bucket for counts in COUNTS for bucket, count in enumerate(counts) for _ in range(count)]
    for number, (row, bucket) in enumerate(zip(rows, buckets, strict=True)):
        assert row["latent.npy"].shape == SHAPES[bucket] and (row["latent.npy"] == number).all()
        assert row["sample.json"]["captions"] == {"txt": f"caption {number}", "blip.txt": f"a {number} ü"}
        # 1000x500 scaled as its middle square of 500 is scaled to 32: 64x32, cut at 16.
        assert row["sample.json"]["view"] == {
            "original": [1000, 500], "offset": [250, 0], "part": [500, 500], "size": [32, 32],
            "resized": [64, 32], "crop": [16, 0],
        }  # fmt: skip
    with tarfile.open(paths[0]) as tar:
        assert tar.getnames()[-1] == "__index__"


def test_views_come_back_and_are_mirrored() -> None:
    view = SampleView((300, 200), (90, 0), (200, 200), (64, 64))
    assert view.mirrored().offset == (10, 0) and view.mirrored().mirrored() == view
    with pytest.raises(DataError, match="version 1"):
        read_record({})
    with pytest.raises(DataError, match="damaged"):
        read_record({"sample.json": b'{"view": {"original": [-1, 2]}, "captions": {}}'})


def test_equal_latents_make_equal_sets(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b")
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["00000.json", "00000.tar", "00001.json", "00001.tar", "00002.json", "00002.tar",
                     "manifest.json", "samples.idx"]  # fmt: skip
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_samples_out_of_their_order_and_of_other_shapes_are_refused(tmp_path: Path) -> None:
    with LatentShardWriter(tmp_path, NAMES[0], BUCKETED) as writer:
        writer.write("a", np.zeros((2, 2, 8)), "c", {}, bucket=1)
        with pytest.raises(ValueError, match="a later one"):
            writer.write("b", np.zeros((2, 4, 4)), "c", {}, bucket=0)
        with pytest.raises(DataError, match=r"shape \(2, 2, 8\), the set's is \(2, 8, 2\)"):
            writer.write("b", np.zeros((2, 2, 8)), "c", {}, bucket=2)
    with pytest.raises(ValueError, match="must begin with"):
        replace(BUCKETED, shape=(2, 8, 2))
    with pytest.raises(ValueError, match="version 1"):
        replace(BUCKETED, version=1)


def test_sets_of_other_buckets_do_not_mix(tmp_path: Path) -> None:
    paths = [*write(tmp_path / "a"), *write(tmp_path / "b", PLAIN)]
    with pytest.raises(DataError, match=r"same data\.bucket_\* settings"):
        open_latents(paths, build_missing=True)


def test_a_set_of_version_1_stays_one_and_mixes_with_version_2(tmp_path: Path) -> None:
    old = replace(PLAIN, version=1)
    paths = write(tmp_path / "old", old)
    record = json.loads((tmp_path / "old" / "00000.json").read_text())
    assert record["version"] == "ldmscale-latents-1" and "shapes" not in record["format"]
    manifest = LatentManifest.load(tmp_path / "old")
    assert manifest.format == old and old.mixes_with(PLAIN) and not old.mixes_with(BUCKETED)
    with tarfile.open(paths[0]) as tar:
        assert {name.partition(".")[2] for name in tar.getnames()} == {"latent.npy", "txt", "json"}
    with pytest.raises(DataError, match="version: ldmscale-latents-1 there, ldmscale-latents-2 now"):
        is_finished(tmp_path / "old", NAMES[0], PLAIN)
    both = [*paths, *write(tmp_path / "new", PLAIN)]
    assert open_latents(both, build_missing=True).total == 26


def test_a_copied_set_needs_no_index_of_its_own(tmp_path: Path) -> None:
    paths = write(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")  # other times of change
    copied = open_latents([path.replace("/a/", "/b/") for path in paths])
    assert copied.fingerprint == open_latents(paths).fingerprint


def test_a_folder_goes_on_in_the_version_that_it_has(tmp_path: Path) -> None:
    write(tmp_path / "old", replace(PLAIN, version=1))
    write(tmp_path / "new", PLAIN)
    for folder, version in (("old", 1), ("new", 2), ("empty", 2)):
        assert stored_version(place_of(tmp_path / folder), PLAIN) == version
    with pytest.raises(DataError, match="version 1, which have neither aspect-ratio buckets"):
        stored_version(place_of(tmp_path / "old"), BUCKETED)
    assert (
        stored_version(place_of(tmp_path / "new"), BUCKETED) == 2
    )  # refused shard by shard, with the difference
