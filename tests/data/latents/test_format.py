"""Latent shards: whole or absent, read by plain webdataset and by our loader, never mixed with another
set."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ldmscale.data.latents.format import LatentFormat, LatentManifest, read_latent
from ldmscale.data.latents.writer import LatentShardWriter, finish_set, is_finished
from ldmscale.data.loading.loader import Loader
from ldmscale.data.loading.transforms import LatentItem
from ldmscale.data.shards.index import ShardIndex
from ldmscale.data.shards.report import check_shards
from ldmscale.data.tokenizers.bert import Tokenizer, train_wordpiece
from ldmscale.errors import DataError

MOMENTS = LatentFormat("a" * 16, "moments", "float32", (4, 2, 3), {"size": 16, "crop": "center"})
HALF = replace(MOMENTS, dtype="float16", kind="latent")
NAMES = ["00000.tar", "00001.tar"]


def moments(number: int) -> np.ndarray:
    return np.random.default_rng(number).normal(0.3, 1.5, (8, 2, 3)).astype(np.float32)


def write(folder: Path, format: LatentFormat = MOMENTS, counts: tuple[int, ...] = (5, 3)) -> LatentManifest:
    number = 0
    for name, count in zip(NAMES, counts, strict=True):
        with LatentShardWriter(folder, name, format) as writer:
            for _ in range(count):
                latent = moments(number)[: format.stored_shape[0]]
                writer.write(f"{number:04d}", latent, f"caption {number} ü", {"width": 20, "number": number})
                number += 1
            writer.skipped = 1
    return finish_set(folder, NAMES, format)


@pytest.mark.parametrize("format", [MOMENTS, HALF])
def test_plain_webdataset_reads_our_shards(tmp_path: Path, format: LatentFormat) -> None:
    import webdataset

    manifest = write(tmp_path, format)
    found = list(
        webdataset.WebDataset([str(tmp_path / name) for name in manifest.shards], shardshuffle=False).decode()
    )
    assert [sample["__key__"] for sample in found] == [f"{number:04d}" for number in range(8)]
    for number, sample in enumerate(found):
        wanted = moments(number)[: format.stored_shape[0]].astype(format.dtype)
        assert sample["latent.npy"].dtype == wanted.dtype and np.array_equal(sample["latent.npy"], wanted)
        assert sample["txt"] == f"caption {number} ü" and sample["json"] == {"width": 20, "number": number}


def test_our_loader_reads_them_with_tokens(tmp_path: Path) -> None:
    manifest = write(tmp_path)
    train_wordpiece([f"caption {number}" for number in range(8)], 60, tmp_path / "tokenizer")
    index = ShardIndex.build([str(tmp_path / name) for name in manifest.shards], check="decode")
    assert index is not None
    item = LatentItem(manifest.format, tokenizer=Tokenizer.load(tmp_path / "tokenizer", 6))
    for workers in (0, 1):
        loader = Loader(
            index, item, seed=0, rank=0, world=1, global_batch=8, rank_micro_batch=4, workers=workers
        )
        for batch in itertools.islice(loader, 2):
            assert batch["latent"].shape == (4, 8, 2, 3) and batch["latent"].dtype == torch.float32
            assert batch["tokens"].shape == (4, 6)
            for key, latent, caption in zip(batch["key"], batch["latent"], batch["caption"], strict=True):
                assert (
                    np.array_equal(latent.numpy(), moments(int(key))) and caption == f"caption {int(key)} ü"
                )
        loader.close()


def test_the_loader_takes_mirrored_latents_by_position(tmp_path: Path) -> None:
    form = replace(MOMENTS, dtype="float16", flips=True, tokenizer="b" * 16)
    with LatentShardWriter(tmp_path, NAMES[0], form) as writer:
        for number in range(8):
            one = moments(number)
            ids = np.arange(6) + number
            writer.write(f"{number}", one, f"caption {number}", {}, flipped=one[:, :, ::-1], tokens=ids)
    index = ShardIndex.build([str(tmp_path / NAMES[0])])
    assert index is not None
    item = LatentItem(form, flip=True, seed=3)
    loader = Loader(index, item, seed=0, rank=0, world=1, global_batch=8, rank_micro_batch=8, workers=0)
    batch = next(loader)
    flips = 0
    for key, position, latent in zip(batch["key"], batch["position"].tolist(), batch["latent"], strict=True):
        mirrored = item.member(position) == "latent_flipped.npy"
        flips += mirrored
        expected = moments(int(key))[:, :, ::-1] if mirrored else moments(int(key))
        assert np.array_equal(latent.numpy(), expected.astype(np.float16))
    assert 0 < flips < 8


def test_scale_and_channel_statistics_are_those_of_posterior_samples(tmp_path: Path) -> None:
    manifest = write(tmp_path)
    every = np.stack([moments(number) for number in range(8)]).astype(np.float64)
    draws = np.random.default_rng(0).standard_normal((4000, 8, 4, 2, 3))
    samples = every[:, :4] + np.exp(0.5 * every[:, 4:]) * draws
    assert manifest.scale_factor == pytest.approx(1 / samples.std(), rel=5e-3)
    assert manifest.channel_mean == pytest.approx(every[:, :4].mean(axis=(0, 2, 3)), abs=1e-9)
    assert manifest.channel_std == pytest.approx(samples.std(axis=(0, 1, 3, 4)), rel=2e-2)
    plain = write(tmp_path / "latent", replace(HALF, dtype="float32"))
    assert plain.scale_factor == pytest.approx(1 / every[:, :4].std(), rel=1e-9)
    assert plain.channel_std == pytest.approx(every[:, :4].std(axis=(0, 2, 3)), rel=1e-9)


def test_the_manifest_comes_back_and_counts(tmp_path: Path) -> None:
    manifest = write(tmp_path)
    assert LatentManifest.load(tmp_path) == manifest
    assert replace(MOMENTS, transform={"box": (1, 2)}) == replace(MOMENTS, transform={"box": [1, 2]})
    assert (manifest.samples, manifest.skipped, manifest.shards) == (8, 2, tuple(NAMES))
    record = json.loads((tmp_path / "manifest.json").read_text())["shard_records"]["00001.tar"]
    assert record["samples"] == 3 and len(record["sha256"]) == 64
    assert record["bytes"] == (tmp_path / "00001.tar").stat().st_size


def test_equal_latents_make_equal_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write(tmp_path / folder)
    for name in [*NAMES, "00000.json", "manifest.json"]:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_shard_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), LatentShardWriter(tmp_path, NAMES[0], MOMENTS) as writer:
        writer.write("a", moments(0), "caption", {})
        assert not (tmp_path / NAMES[0]).exists()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == [] and not is_finished(tmp_path, NAMES[0], MOMENTS)
    with pytest.raises(DataError, match=r"2 latent shards .* not finished"):
        finish_set(tmp_path, NAMES, MOMENTS)
    with pytest.raises(DataError, match="no finished set"):
        LatentManifest.load(tmp_path)


def test_finished_shards_are_known_and_cut_ones_are_not(tmp_path: Path) -> None:
    write(tmp_path)
    assert is_finished(tmp_path, NAMES[0], MOMENTS)
    with open(tmp_path / NAMES[0], "r+b") as stream:
        stream.truncate(1000)
    assert not is_finished(tmp_path, NAMES[0], MOMENTS)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (replace(MOMENTS, autoencoder="b" * 16), "autoencoder: aaaaaaaaaaaaaaaa there, bbbbbbbbbbbbbbbb now"),
        (replace(MOMENTS, transform={"size": 16, "crop": "random"}), "transform"),
        (replace(MOMENTS, dtype="float16"), "dtype: float32 there, float16 now"),
    ],
)
def test_a_set_of_another_make_is_refused(tmp_path: Path, other: LatentFormat, said: str) -> None:
    manifest = write(tmp_path)
    with pytest.raises(DataError, match=said):
        is_finished(tmp_path, NAMES[0], other)
    manifest.check_autoencoder("a" * 16, tmp_path)
    with pytest.raises(DataError, match="made by autoencoder aaaa"):
        manifest.check_autoencoder("b" * 16, tmp_path)


def test_wrong_shapes_and_values_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with LatentShardWriter(tmp_path, NAMES[0], HALF) as writer:
        with pytest.raises(DataError, match=r"shape \(8, 2, 3\), the set's is \(4, 2, 3\)"):
            writer.write("a", moments(0), "c", {})
        for wrong in (np.nan, 1e6):
            with pytest.raises(DataError, match="not finite in float16"):
                writer.write("a", np.full((4, 2, 3), wrong), "c", {})
        assert writer.samples == 0
    with pytest.raises(ValueError, match="kind must be"):
        replace(MOMENTS, kind="mean")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no array"),
        (b"\x93NUMPY junk", "no array"),
        (None, r"no latent\.npy"),
        (np.zeros((4, 2, 3)), "shape"),
    ],
)
def test_damaged_latents_give_the_reason(data: bytes | np.ndarray | None, reason: str) -> None:
    members = {} if data is None else {"latent.npy": data if isinstance(data, bytes) else npy(data)}
    with pytest.raises(DataError, match=reason):
        read_latent(members, MOMENTS)


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    trap = np.array([{"code": 1}], dtype=object)
    with pytest.raises(DataError, match="no array that can be read"):
        read_latent({"latent.npy": npy(trap)}, MOMENTS)


def test_check_decode_finds_damaged_latents(tmp_path: Path, write_tar: Callable[..., str]) -> None:
    path = write_tar(tmp_path / "a.tar", [("k.latent.npy", b"junk"), ("k.txt", b"c")])
    (item,) = check_shards([path], "decode").damage
    assert (item.key, item.kind) == ("k", "bad_latent")


def npy(array: np.ndarray) -> bytes:
    import io

    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()
