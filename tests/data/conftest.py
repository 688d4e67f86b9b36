"""Real tars of real images, made for each test."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

MakeImage = Callable[..., bytes]
WriteTar = Callable[..., str]
WriteShards = Callable[..., list[str]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("LDMSCALE_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def make_image() -> MakeImage:
    def make(
        width: int = 20, height: int = 16, *, seed: int = 0, format: str = "PNG", mode: str = "RGB"
    ) -> bytes:
        channels = len(mode) if mode in ("RGB", "RGBA", "LA") else 1
        draws = np.random.default_rng(seed)
        pixels = draws.integers(0, 256, (height, width, channels), dtype=np.uint8)
        image = Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels)
        buffer = io.BytesIO()
        image.save(buffer, format=format)
        return buffer.getvalue()

    return make


@pytest.fixture(scope="session")
def write_tar() -> WriteTar:
    def write(path: Path, members: Sequence[tuple[str, bytes]], *, format: int = tarfile.USTAR_FORMAT) -> str:
        """Writes (name, bytes) one after another, with Python's own tarfile."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w", format=format) as tar:
            for name, data in members:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        return str(path)

    return write


@pytest.fixture(scope="session")
def write_shards(make_image: MakeImage, write_tar: WriteTar) -> WriteShards:
    def write(folder: Path, counts: Sequence[int], bad: Mapping[str, bytes] | None = None) -> list[str]:
        """Writes shards of so many samples: KEY.png of 20x16, KEY.txt, KEY.json; `bad` replaces images by
        key."""
        shards = []
        for shard, count in enumerate(counts):
            members = []
            for number in range(count):
                key = f"{shard:03d}{number:04d}"
                image = (bad or {}).get(key, make_image(seed=shard * 1000 + number))
                record = json.dumps({"key": key, "width": 20, "height": 16, "alt": f"alt of {key}"}).encode()
                members += [
                    (f"{key}.png", image),
                    (f"{key}.txt", f"caption {key}".encode()),
                    (f"{key}.json", record),
                ]
            shards.append(write_tar(folder / f"{shard:05d}.tar", members))
        return shards

    return write
