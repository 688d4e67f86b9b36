"""Files of the index that a forger wrote, or that do not fit on the disk: a message each, and never a damaged shard."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldmscale import cli
from ldmscale.data.shards.index import ShardIndex
from ldmscale.data.shards.reader import SampleReader
from ldmscale.data.shards.records import FOLDER, IndexWriteError
from ldmscale.data.shards.report import check_shards
from ldmscale.data.shards.scan import SPAN
from ldmscale.data.shards.selection import Selection
from ldmscale.errors import DataError

WriteShards = Callable[..., list[str]]


def forge(
    file: Path, change: Callable[[dict[str, Any]], object], spans: list[tuple[int, int]] | None = None
) -> None:
    """Change the first line of a file of the index, and the numbers behind it."""
    line, _, behind = file.read_bytes().partition(b"\n")
    values = json.loads(line)
    change(values)
    if spans is not None:
        behind = np.array(spans, dtype=SPAN).tobytes()
    file.write_bytes(json.dumps(values).encode() + b"\n" + behind)


def only(folder: Path, pattern: str) -> Path:
    (found,) = (folder / FOLDER).glob(pattern)
    return found


def nothing(values: dict[str, Any]) -> None:
    return None


def setting(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda values: values.update(changes)


def statistics(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda values: values["statistics"].update(changes)


RECORDS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no samples": (lambda values: values.pop("samples"), "samples: .*Field required"),
    "samples a text": (setting(samples="2"), "samples: found '2'"),
    "samples below 0": (setting(samples=-1), "samples: found -1"),
    "size": (setting(size=[1]), r"size: found \[1\]"),
    "version": (setting(version={}), "version.*: found {}"),
    "check": (setting(check="all"), "check: found 'all'"),
    "caption": (setting(caption=None), "caption: found None"),
    "pixels": (setting(max_pixels="x"), "max_pixels: found 'x'"),
    "damage": (setting(damage=[5]), "damage.0: found 5"),
    "damage without a kind": (setting(damage=[{"key": "a", "detail": "b"}]), "damage.0.kind"),
    "counts of damage": (setting(damage_counts={"a": "b"}), "damage_counts.a: found 'b'"),
    "statistics": (setting(statistics=[]), r"statistics: found \[\]"),
    "captions": (statistics(captions="many"), "statistics.captions: found 'many'"),
    "words": (statistics(words={"x": 1}), "statistics.words.x"),
    "counts of words": (statistics(words={"3": None}), "statistics.words.3: found None"),
    "smallest": (statistics(smallest=[1]), "statistics.smallest"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_forged_record_does_not_count_and_is_made_anew(
    tmp_path: Path, write_shards: WriteShards, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    shards = write_shards(tmp_path, [2])
    check_shards(shards)
    change, words = RECORDS[name]
    file = only(tmp_path, "00000.tar.idx")
    before = file.read_bytes()
    forge(file, change)
    with pytest.raises(DataError, match="has no index; run `ldmscale index"):
        ShardIndex.open(shards)
    assert re.search(f"the index {file} is damaged .*{words}", caplog.text)
    assert check_shards(shards).looked_through == 1 and file.read_bytes() == before


@pytest.mark.parametrize(
    ("spans", "words"),
    [
        ([(0, 512), (2**40, 512)], "sample 1 has 512 bytes at offset 1099511627776, the shard has"),
        ([(0, 2**32 - 1), (512, 512)], "sample 0 has 4294967295 bytes at offset 0"),
        ([(2**64 - 1, 512), (512, 512)], "sample 0 has 512 bytes at offset 18446744073709551615"),
        ([(0, 512)], "found 12 bytes for 2 samples, expected 24"),
    ],
)
def test_spans_outside_their_shard_are_refused(
    tmp_path: Path, write_shards: WriteShards, spans: list[tuple[int, int]], words: str
) -> None:
    shards = write_shards(tmp_path, [2])
    check_shards(shards)
    forge(only(tmp_path, "00000.tar.idx"), nothing, spans)
    with pytest.raises(DataError, match=words):
        ShardIndex.open(shards)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (setting(counts=[1]), "found 48 bytes for 1 samples|2 shards have 1 counts"),
        (setting(counts=[3, 2]), "found 48 bytes for 5 samples"),
        (setting(counts=["2", 2]), "counts.0: found '2'"),
        (setting(sizes=[10**4]), "2 shards have 1 sizes"),
        (setting(urls=5), "urls: found 5"),
        (setting(buckets=[[1, 1], [2]]), "do not add up"),
        (setting(buckets=[[1], [2]]), "do not add up"),
        (setting(selection=[]), r"selection: found \[\]"),
        (lambda values: values.pop("counts"), "counts: .*Field required"),
    ],
)
def test_a_forged_index_of_a_list_of_shards_is_refused(
    tmp_path: Path, write_shards: WriteShards, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    shards = write_shards(tmp_path, [2, 2])
    assert ShardIndex.build(shards) is not None
    forge(only(tmp_path, "set-*.idx"), change)
    with pytest.raises(DataError, match=words) as error:
        ShardIndex.open(shards)
    assert "delete it, and start the same command again" in str(error.value)


@pytest.mark.parametrize("span", [(2**40, 512), (0, 2**32 - 1), (2**64 - 1, 4)])
def test_a_forged_span_in_the_index_of_a_list_is_refused_where_it_is_read(
    tmp_path: Path, write_shards: WriteShards, span: tuple[int, int]
) -> None:
    shards = write_shards(tmp_path, [2])
    index = ShardIndex.build(shards)
    assert index is not None
    forge(index.path, nothing, [index.span(0, 0), span])
    index = ShardIndex.open(shards)
    assert index.spans(np.array([0]), np.array([0]))[0].tolist() == [0]
    for read in (
        lambda: SampleReader(index).read(0, 1),
        lambda: index.spans(np.array([0, 0]), np.array([0, 1])),
    ):
        with pytest.raises(DataError, match=f"sample 1 of .* has {span[1]} bytes at offset {span[0]}"):
            read()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (setting(buckets="x"), "has no index for these filters"),
        (setting(buckets=[7]), "its counts by bucket are not those of its samples"),
        (setting(dropped=[]), "has no index for these filters"),
        (lambda values: values.pop("buckets"), "has no index for these filters"),
    ],
)
def test_a_forged_selection_is_refused(
    tmp_path: Path, write_shards: WriteShards, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    shards, selection = write_shards(tmp_path, [3]), Selection(min_image_side=1)
    assert ShardIndex.build(shards, selection=selection) is not None
    only(tmp_path, "set-*.idx").unlink()
    forge(only(tmp_path, "*.sel"), change)
    with pytest.raises(DataError, match=words):
        ShardIndex.open(shards, selection=selection)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        pytest.skip(f"a small disk can be made by root only: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True, timeout=60)


def test_a_full_disk_is_the_folders_fault_and_no_damage_of_a_shard(
    small_disk: Path, write_shards: WriteShards, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = write_shards(small_disk, [4])
    (small_disk / FOLDER).mkdir()
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space left"), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(512))
    with pytest.raises(IndexWriteError, match=r"No space left on device.*the shards are not damaged"):
        check_shards(shards)
    with pytest.raises(IndexWriteError, match="free room there"):
        ShardIndex.open(shards, build_missing=True)
    assert cli.main(["index", f"data.shards={shards[0]}"]) == 1
    told = capsys.readouterr().err
    assert "No space left on device" in told and "free room there" in told
    assert "unreadable_shard" not in told and "make the shards anew" not in told and "Traceback" not in told
    assert [path.name for path in (small_disk / FOLDER).iterdir()] == []
    filler.unlink()
    assert cli.main(["index", f"data.shards={shards[0]}"]) == 0
