"""Held-out samples: each once, in the shape of its own bucket, whatever the number of ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldmscale.data.images.buckets import bucket_shapes
from ldmscale.data.latents.format import LatentFormat
from ldmscale.data.latents.index import open_latents
from ldmscale.data.latents.writer import LatentShardWriter, finish_set
from ldmscale.data.loading.held_out import bucket_quotas, fixed_runs, rank_batches
from ldmscale.data.loading.transforms import ImageItem, LatentItem
from ldmscale.data.shards.index import ShardIndex
from ldmscale.data.shards.mixture import Mixture
from ldmscale.data.shards.selection import Selection

SIZES = [(40, 40), (64, 32), (32, 64), (40, 38), (40, 41)]  # of image n: SIZES[n % 5]
OWN = [(32, 32), (40, 24), (24, 40), (32, 32), (32, 32)]  # the nearest of the buckets, by hand
COUNT = 43


def of_images(folder: Path, write_tar: Callable[..., str], make_image: Callable[..., bytes]) -> Any:
    paths = []
    for shard, numbers in enumerate([range(20), range(20, COUNT)]):
        members = []
        for number in numbers:
            image = make_image(*SIZES[number % 5], seed=number, format="PNG")
            members += [(f"{number:03d}.png", image), (f"{number:03d}.txt", b"t")]
        paths.append(write_tar(folder / f"{shard}.tar", members))
    shapes = bucket_shapes(32, 8, 2.0)
    index = ShardIndex.open(paths, build_missing=True, selection=Selection(shapes=shapes))
    return index, ImageItem(32, 0, shapes=shapes), lambda batch: tuple(batch["image"].shape[:-3:-1])


def of_latents(folder: Path) -> Any:
    form = LatentFormat(
        "a", "latent", "float16", (1, 32, 32), {}, shapes=((1, 32, 32), (1, 24, 40), (1, 40, 24))
    )
    names = ["00000.tar", "00001.tar"]
    for name, numbers in zip(names, [range(20), range(20, COUNT)], strict=True):
        with LatentShardWriter(folder, name, form) as writer:
            for bucket, (_, height, width) in enumerate(form.shapes):
                for number in (n for n in numbers if OWN[n % 5] == (width, height)):
                    writer.write(f"{number:03d}", np.ones((1, height, width)), "t", {}, bucket=bucket)
    finish_set(folder, names, form)
    index = open_latents([str(folder / name) for name in names])
    return index, LatentItem(form), lambda batch: tuple(batch["latent"].shape[:-3:-1])


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("kind", ["images", "latents"])
def test_every_held_out_sample_is_used_once_in_its_own_shape(
    kind: str, world: int, tmp_path: Path, write_tar: Callable[..., str], make_image: Callable[..., bytes]
) -> None:
    index, item, size_of = (
        of_images(tmp_path, write_tar, make_image) if kind == "images" else of_latents(tmp_path)
    )
    index = Mixture.of(index)
    ranks = [rank_batches(index, item, COUNT, 4, rank=rank, world=world) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1  # they call the network equally often
    found = {}
    for batches in ranks:
        for batch in batches:
            for key, position in zip(batch["key"], batch["position"].tolist(), strict=True):
                if position < COUNT:
                    assert position not in found
                    found[position] = key
                    assert size_of(batch) == OWN[int(key) % 5]
    assert sorted(found) == list(range(COUNT)) and Counter(found.values()) == Counter(
        f"{number:03d}" for number in range(COUNT)
    )


def test_of_fewer_samples_each_shape_has_its_share(
    tmp_path: Path, write_tar: Callable[..., str], make_image: Callable[..., bytes]
) -> None:
    index, item, _ = of_images(tmp_path, write_tar, make_image)
    batches = rank_batches(Mixture.of(index), item, 10, 4, rank=0, world=1)
    keys = [key for batch in batches for key in batch["key"]]
    # Of 43 images 9 are wide and 9 tall (one in five), 25 square.
    assert len(set(keys)) == 10
    assert Counter(OWN[int(key) % 5] for key in keys) == {(32, 32): 6, (40, 24): 2, (24, 40): 2}


@given(counts=st.lists(st.integers(0, 10**6), min_size=1, max_size=9).filter(any), data=st.data())
def test_quotas_add_up_and_no_bucket_gives_more_than_it_has(counts: list[int], data: st.DataObject) -> None:
    wanted = data.draw(st.integers(1, sum(counts)))
    quotas = bucket_quotas(counts, wanted)
    assert sum(quotas) == wanted and all(
        0 <= quota <= count for quota, count in zip(quotas, counts, strict=True)
    )
    assert all(abs(q - c * wanted / sum(counts)) < 1 for q, c in zip(quotas, counts, strict=True))


def test_without_buckets_samples_come_in_their_order(tmp_path: Path, write_tar: Callable[..., str]) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{n}.txt", b"t") for n in range(10)])
    runs = fixed_runs(Mixture.of(ShardIndex.open([path], build_missing=True)), 7, 3)
    assert [tuple(run) for run in runs] == [(0, 0, 0, 3), (3, 0, 3, 3), (6, 0, 6, 1)]
