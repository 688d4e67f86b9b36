"""Faults that users of other projects reported of buckets, crops and keys, tried on sets of latents."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import webdataset

from ldmscale.data.latents.format import LatentFormat
from ldmscale.data.latents.index import open_latents
from ldmscale.data.latents.sample_record import SampleView
from ldmscale.data.latents.writer import LatentShardWriter, finish_set
from ldmscale.data.loading.loader import Loader
from ldmscale.data.loading.transforms import LatentItem

FORMAT = LatentFormat("a" * 16, "latent", "float32", (1, 4, 4), {"size": 32}, shapes=((1, 4, 4), (1, 2, 8)))


def write(folder: Path, form: LatentFormat, keys: list[list[str]]) -> list[str]:
    with LatentShardWriter(folder, "00000.tar", form) as writer:
        for bucket, of_bucket in enumerate(keys):
            for key in of_bucket:
                writer.write(key, np.ones(form.shape_of(bucket)), f"caption of {key}", {}, bucket=bucket)
    finish_set(folder, ["00000.tar"], form)
    return [str(folder / "00000.tar")]


def test_a_bucket_smaller_than_the_batch_is_trained_on(tmp_path: Path) -> None:
    """sorryhyun/anima_lora#87, bmaltais/kohya_ss#3457: images of a bucket that fills no batch were never trained on."""
    keys = [[f"square{n:02d}" for n in range(30)], ["wide0", "wide1"]]
    index = open_latents(write(tmp_path, FORMAT, keys))
    loader = Loader(
        index, LatentItem(FORMAT), seed=0, rank=0, world=1, global_batch=8, rank_micro_batch=8, workers=0
    )
    drawn: Counter[str] = Counter()
    for batch in itertools.islice(loader, 40):  # 320 draws of 32 samples
        assert len({key[:4] for key in batch["key"]}) == 1
        drawn.update(batch["key"])
    assert set(drawn) == {*keys[0], *keys[1]}
    # Ten times each, to within one batch of the bucket.
    assert all(abs(drawn[key] - 10) <= 8 / 2 for key in keys[1])
    assert all(abs(drawn[key] - 10) <= 1 for key in keys[0])


def test_the_crop_of_a_mirrored_image_is_counted_in_the_whole_image() -> None:
    """huggingface/diffusers#6547: the offset of a mirrored crop was counted in the cropped image."""
    picture = np.arange(20 * 12).reshape(12, 20)
    view = SampleView(original=(20, 12), offset=(3, 2), part=(8, 6), size=(8, 6))

    def cut(pixels: np.ndarray, seen: SampleView) -> np.ndarray:
        (left, top), (width, height) = seen.offset, seen.part
        return pixels[top : top + height, left : left + width]

    assert np.array_equal(cut(picture[:, ::-1], view.mirrored()), cut(picture, view)[:, ::-1])


def test_keys_in_folders_with_dots_stay_whole(tmp_path: Path) -> None:
    """huggingface/datasets#7150: a dot in a folder's name was taken for the begin of the extension."""
    form = replace(FORMAT, shapes=())
    keys = ["v1.0/22/a", "v1.0/22/b", "plain"]
    paths = write(tmp_path, form, [keys])
    rows = webdataset.WebDataset(paths, shardshuffle=False).decode()
    assert [(row["__key__"], row["txt"]) for row in rows] == [(key, f"caption of {key}") for key in keys]
    loader = Loader(
        open_latents(paths), LatentItem(form), seed=0, rank=0, world=1, global_batch=3, rank_micro_batch=3
    )
    batch = next(loader)
    assert dict(zip(batch["key"], batch["caption"], strict=True)) == {
        key: f"caption of {key}" for key in keys
    }
