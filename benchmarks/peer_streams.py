"""Streams of peers that live in virtual environments of their own, as a program that `data_streams` talks to.

    PEER_PYTHON -m benchmarks.peer_streams energon|streaming images|latents FOLDER SAMPLES BATCH

It prepares FOLDER's shards in the peer's own way (not timed), and passes once through all samples for each line of its
input: to `check` it answers with a checksum of each sample, to anything else with the processor's seconds.
Decoding is by the same functions as webdataset's.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import subprocess
import sys
import tarfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

SIZE = 256  # px

Rows = Iterator[tuple[list[str], np.ndarray]]


def pillow(data: bytes) -> np.ndarray:
    """What users of these libraries write: decode, resize the short side, crop the centre. uint8 [3, SIZE, SIZE]."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = SIZE / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - SIZE) // 2, (image.height - SIZE) // 2
    array = np.asarray(image.crop((left, top, left + SIZE, top + SIZE)))
    return np.ascontiguousarray(array.transpose(2, 0, 1))


def array(data: bytes) -> np.ndarray:
    found: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
    return found


MEMBERS: dict[str, tuple[str, Callable[[bytes], np.ndarray]]] = {
    "images": ("jpg", pillow),
    "latents": ("latent.npy", array),
}
"""Member that is decoded, and how."""


def energon(kind: str, folder: Path, samples: int, batch: int) -> Callable[[], Rows]:
    """megatron-energon: crude samples, cooked by our functions, shuffled as its documentation does."""
    from megatron import energon

    member, decode = MEMBERS[kind]
    subprocess.run(
        [
            *(Path(sys.executable).with_name("energon"), "prepare", "--non-interactive"),
            *("--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset", folder),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )

    @energon.edataclass
    class One(energon.Sample):  # type: ignore[misc]
        values: torch.Tensor
        caption: str

    @energon.edataclass
    class Several(energon.Batch):  # type: ignore[misc]
        values: torch.Tensor
        caption: list[str]

    def cook(sample: Any) -> Any:
        return One(
            **energon.basic_sample_keys(sample),
            values=torch.from_numpy(decode(sample[member])),
            caption=sample["txt"].decode("utf-8"),
        )

    class Encoder(energon.DefaultTaskEncoder):  # type: ignore[misc]
        cookers = (energon.Cooker(energon.stateless(cook)),)
        decoder = None

        def batch(self, rows: list[Any]) -> Any:
            values = torch.stack([row.values for row in rows])  # its own way would pad, too
            return Several.from_samples(rows, values=values, caption=[row.caption for row in rows])

    def work() -> Rows:
        data = energon.get_train_dataset(
            folder,
            worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=0),
            batch_size=batch,
            shuffle_buffer_size=1000,
            max_samples_per_sequence=100,
            task_encoder=Encoder(),
            repeat=False,
        )
        for rows in energon.get_loader(data):
            yield [Path(key).name for key in rows.__key__], rows.values.numpy()

    return work


def streaming(kind: str, folder: Path, samples: int, batch: int) -> Callable[[], Rows]:
    """mosaicml-streaming: the same bytes in its own shards."""
    # Its top package imports torchvision for data sets that are not asked for here.
    found = importlib.util.find_spec("streaming")
    assert found is not None and found.submodule_search_locations is not None
    package = types.ModuleType("streaming")
    package.__path__ = list(found.submodule_search_locations)
    sys.modules["streaming"] = package
    from streaming.base import MDSWriter, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    member, decode = MEMBERS[kind]
    clean_stale_shared_memory()
    converted = folder / "mds"
    columns = {"key": "str", "data": "bytes", "caption": "str"}
    with MDSWriter(out=str(converted), columns=columns) as writer:
        for key, members in _samples(folder):
            writer.write({"key": key, "data": members[member], "caption": members["txt"].decode("utf-8")})
    data = StreamingDataset(local=str(converted), shuffle=True, shuffle_seed=0, batch_size=batch)

    def together(rows: list[dict[str, Any]]) -> tuple[list[str], torch.Tensor, list[str]]:
        values = torch.from_numpy(np.stack([decode(row["data"]) for row in rows]))
        return [row["key"] for row in rows], values, [row["caption"] for row in rows]

    def work() -> Rows:
        for keys, values, _ in torch.utils.data.DataLoader(data, batch_size=batch, collate_fn=together):
            yield keys, values.numpy()

    return work


def _samples(folder: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    for path in sorted(folder.glob("*.tar")):
        found: dict[str, dict[str, bytes]] = {}
        with tarfile.open(path) as tar:
            for entry in tar:
                key, _, extension = entry.name.partition(".")
                content = tar.extractfile(entry)
                assert content is not None
                found.setdefault(key, {})[extension] = content.read()
        yield from found.items()


def checksum(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def main() -> None:
    peer, kind, folder, samples, batch = sys.argv[1:]
    torch.set_num_threads(1)
    work = {"energon": energon, "streaming": streaming}[peer](kind, Path(folder), int(samples), int(batch))
    answers = sys.stdout
    sys.stdout = sys.stderr  # some libraries print
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        if line.strip() == "check":
            sums = {key: checksum(row) for keys, rows in work() for key, row in zip(keys, rows, strict=True)}
            print(json.dumps(sums), file=answers, flush=True)
            continue
        began, count = time.process_time(), 0
        for keys, rows in work():
            count += sum(1 for _ in zip(keys, rows, strict=True))
        assert count == int(samples), (count, samples)
        print(json.dumps({"seconds": time.process_time() - began}), file=answers, flush=True)


if __name__ == "__main__":
    main()
