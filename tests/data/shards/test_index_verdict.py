"""`ldmscale index` and training judge the same set alike: the limit, the setting that helps, and what a selection leaves out."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from ldmscale.cli import main

EMPTY = 24  # of 60: more than the samples that are free, and more than data.max_bad_share


@pytest.fixture
def shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As img2dataset writes it: an empty .txt where there is no caption."""
    monkeypatch.setenv("LDMSCALE_CACHE", str(tmp_path / "cache"))
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (9, 99, 199)).save(buffer, "PNG")
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for number in range(60):
            caption = b"" if number < EMPTY else b"a blue square"
            record = json.dumps({"caption": caption.decode(), "key": number}).encode()
            for extension, data in (("png", buffer.getvalue()), ("txt", caption), ("json", record)):
                info = tarfile.TarInfo(f"{number:04d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return tmp_path / "00000.tar"


def index(shard: Path, capfd: pytest.CaptureFixture[str], *more: str) -> tuple[int, str]:
    status = main(["index", f"data.shards={shard}", *more])
    return status, "".join(capfd.readouterr())


def test_the_verdict_is_that_of_training(shard: Path, capfd: pytest.CaptureFixture[str]) -> None:
    status, out = index(shard, capfd)
    assert status == 2
    assert (
        "training stops, since 40.0% of the samples cannot be used, more than data.max_bad_share=1.0%" in out
    )
    assert "data.min_caption_words=1 leaves out those without a caption" in out
    status, out = index(shard, capfd, "data.max_bad_share=0.5")
    assert status == 2 and "training skips such samples" in out


def test_a_sample_with_two_damages_counts_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """25 of 3,000 samples have neither image nor caption: 0.83 %, below the limit of 1 %."""
    monkeypatch.setenv("LDMSCALE_CACHE", str(tmp_path / "cache"))
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number in range(3000):
            good = [("png", buffer.getvalue()), ("txt", b"a square")]
            for extension, data in good if number >= 25 else [("bin", b"x")]:
                info = tarfile.TarInfo(f"{number:04d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    status, out = index(tmp_path / "0.tar", capfd)
    assert status == 2 and "training skips such samples" in out and '"damaged": 50' in out


def test_what_a_selection_leaves_out_is_no_damage(shard: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):  # looked through now, and read from the record
        status, out = index(shard, capfd, "data.min_caption_words=1")
        assert status == 0, out
        assert '"selected": 36' in out and '"damaged": 0' in out
    status, out = index(shard, capfd)  # the record still knows of them
    assert status == 2 and f'"damaged": {EMPTY}' in out


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        (b'{"caption": "cut emoji \\ud83d"}', "surrogates not allowed"),
        (b'{"caption": ' + b"[" * 5000 + b"]" * 5000 + b"}", "nested more than 64 deep"),
        (b'{"caption": "a', "no valid json"),
    ],
)
def test_json_that_is_none_is_named_though_the_caption_is_elsewhere(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    record: bytes,
    fault: str,
) -> None:
    monkeypatch.setenv("LDMSCALE_CACHE", str(tmp_path / "cache"))
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, "PNG")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for extension, data in (("png", buffer.getvalue()), ("txt", b"a square"), ("json", record)):
            info = tarfile.TarInfo(f"0.{extension}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    status, out = index(tmp_path / "0.tar", capfd)
    assert status == 2 and "bad_json" in out and fault in out
