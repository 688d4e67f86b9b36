"""Makes latents_2.tar.xz, a small set of version 2 as its first release wrote it: `python make_latents_2.py` in its folder.

It was made once. It is not made again when the format grows: later releases must read what is in it.
"""

from __future__ import annotations

import io
import lzma
import tarfile
import tempfile
from pathlib import Path

import numpy as np

from ldmscale.data.latents.format import LatentFormat, TextFormat
from ldmscale.data.latents.sample_record import SampleView
from ldmscale.data.latents.writer import LatentShardWriter, finish_set

ARCHIVE = Path(__file__).with_name("latents_2.tar.xz")
SHAPES = ((2, 4, 4), (2, 6, 2), (2, 2, 6))
FORMAT = LatentFormat(
    "0123456789abcdef",
    "moments",
    "bfloat16",
    SHAPES[0],
    {"size": 32, "crop": "center", "bucket_step": 16, "bucket_max_ratio": 3.0},
    flips=True,
    tokenizer="fedcba9876543210",
    shapes=SHAPES,
    text=TextFormat("00112233aabbccdd", "ddccbbaa33221100", 3, 5, "float16"),
)
BUCKETS = ((0, 0, 1, 2), (0, 2, 2))  # of the samples of each shard
VIEWS = (
    SampleView((100, 80), (10, 0), (80, 80), (32, 32)),
    SampleView((60, 200), (0, 10), (60, 180), (16, 48)),
    SampleView((200, 60), (10, 0), (180, 60), (48, 16)),
)


def moments(number: int) -> np.ndarray:
    """Values that bfloat16 holds exactly."""
    _, height, width = SHAPES[[b for shard in BUCKETS for b in shard][number]]
    count = 4 * height * width
    return (np.arange(count, dtype=np.float32) - count // 2).reshape(4, height, width) / 16 + number / 8


def text(number: int) -> np.ndarray:
    """Values that float16 holds exactly."""
    return np.arange(15, dtype=np.float32).reshape(3, 5) / 4 - number


def write(folder: Path) -> None:
    """The set, in a folder."""
    number, names = 0, [f"{shard:05d}.tar" for shard in range(len(BUCKETS))]
    for name, buckets in zip(names, BUCKETS, strict=True):
        source = {"name": name, "size": 7, "version": "1", "samples": len(buckets)}
        with LatentShardWriter(folder, name, FORMAT, source) as writer:
            for bucket in buckets:
                writer.write(
                    f"{number:04d}", moments(number), f"caption {number} ü", {"label": number, "alt": f"alt {number}"},
                    flipped=moments(number)[:, :, ::-1], tokens=np.array([1, number, 2]), bucket=bucket,
                    view=VIEWS[bucket], captions={"txt": f"caption {number} ü", "blip.txt": f"a picture of {number}"},
                    text=text(number), text_tokens=2,
                )  # fmt: skip
                number += 1
    finish_set(folder, names, FORMAT)


if __name__ == "__main__":
    stream = io.BytesIO()
    with tempfile.TemporaryDirectory() as made, tarfile.open(fileobj=stream, mode="w") as archive:
        write(Path(made))
        for path in sorted(Path(made).iterdir()):
            member = tarfile.TarInfo(path.name)
            member.size = path.stat().st_size
            archive.addfile(member, io.BytesIO(path.read_bytes()))
    ARCHIVE.write_bytes(lzma.compress(stream.getvalue()))
