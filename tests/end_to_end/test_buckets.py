"""Aspect-ratio buckets from images through latents to a trained model: one shape per step, exact on any number of ranks."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from ldmscale.data.latents.format import LatentManifest

pytestmark = pytest.mark.distributed

SIZES = {"square": (40, 40), "wide": (80, 48), "tall": (48, 80)}
LATENTS = {
    "square": (8, 8),
    "wide": (6, 10),
    "tall": (10, 6),
}  # height and width: 32, 40x24 and 24x40 pixels, factor 4
OF_NUMBER = ["square", "wide", "square", "tall", "square"]
BUCKETS = ["data.image_size=32", "data.bucket_step=8"]
ENCODE = [
    "latents",
    "first_stage.path=ae",
    "data.shards=images",
    *BUCKETS,
    "data.workers=0",
    "latents.dtype=fp32",
]
BATCH, STEPS = 6, 8
TRAIN = [
    "diffusion", "experiment=smoke", "data.workers=0", "first_stage.path=ae", "preview.every_steps=4", "preview.images=5",
    "preview.sampler_steps=2", "checkpoint.save_every_steps=2", "train.garbage_every_steps=0", "safety.dry_run=false",
    "optim.curve=constant", "optim.lr=1e-3", f"train.global_batch={BATCH}", "validation.every_steps=4",
    "validation.samples=99", "generation.every_steps=8", "generation.samples=99", "generation.rank_batch=4",
    "generation.sampler_steps=2",
]  # fmt: skip
ON_LATENTS = [
    *TRAIN,
    "data=latents",
    "data.shards='latents/0000[01].tar'",
    "data.heldout_shards='latents/00002.tar'",
]
ON_IMAGES = [
    *TRAIN, "data=shards", "data.shards='images/[01].tar'", "data.heldout_shards='images/2.tar'", *BUCKETS,
    "data.workers=0",
]  # fmt: skip


def write_images(folder: Path) -> None:
    folder.mkdir()
    for shard, count in enumerate((17, 22, 13)):
        with webdataset.TarWriter(str(folder / f"{shard}.tar"), mtime=0) as tar:
            for number in range(count):
                kind = OF_NUMBER[number % 5]
                width, height = SIZES[kind]
                pixels = np.full(
                    (height, width, 3), (number * 9, 255 - number * 9, shard * 80), dtype=np.uint8
                )
                pixels[: height // 2, : number + 2] = 255 - pixels[0, 0]
                stream = io.BytesIO()
                Image.fromarray(pixels).save(stream, "PNG")
                key = f"{shard}_{number:02d}_{kind}"
                tar.write(
                    {
                        "__key__": key,
                        "png": stream.getvalue(),
                        "txt": f"a {kind} {number}",
                        "json": {"n": number},
                    }
                )


@pytest.fixture(scope="module")
def place(small_place: Any) -> Any:
    folder = small_place.folder / "buckets"
    folder.mkdir()
    (folder / "ae").symlink_to(small_place.folder / "ae")
    write_images(folder / "images")
    made = type(small_place)(small_place.host, folder)
    made.run(*ENCODE, "latents.path=latents", "latents.rank_batch=5", ranks=2)
    made.run(*ENCODE, "latents.path=alone", "latents.rank_batch=3", ranks=1)
    return made


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [line["loss/total"] for line in lines(run) if "loss/total" in line]


def measured(run: Path, prefix: str) -> list[dict[str, float]]:
    found = [{key: value for key, value in line.items() if key.startswith(prefix)} for line in lines(run)]
    return [line for line in found if line]


def train(
    place: Any, run: str, ranks: int, steps: int, *settings: str, on: list[str] = ON_LATENTS
) -> dict[int, str]:
    """Trains, and returns the key of each position that the run has trained on."""
    keys = place.folder / f"{run}.jsonl"
    place.host.folder = place.folder
    place.host.finish([*on, f"run.dir={run}", f"train.max_steps={steps}", *settings], keys, ranks=ranks)
    entries = [json.loads(line) for line in keys.read_text().splitlines()]
    return {entry["position"]: entry["key"] for entry in entries}


def kind_of(key: str) -> str:
    return key.rpartition("_")[2]


def test_latents_have_the_shapes_of_their_images_whoever_makes_them(place: Any) -> None:
    files = {path.name: path.read_bytes() for path in place.folder.glob("latents/[0ms]*")}
    assert files == {path.name: path.read_bytes() for path in place.folder.glob("alone/[0ms]*")}
    assert len(files) == 8
    manifest = LatentManifest.load(place.folder / "latents")
    assert (manifest.samples, manifest.skipped) == (52, 0)
    rows = webdataset.WebDataset(
        [str(place.folder / "latents" / name) for name in manifest.shards], shardshuffle=False
    ).decode()
    for row in rows:
        kind = kind_of(row["__key__"])
        (width, height), (high, wide) = SIZES[kind], LATENTS[kind]
        assert row["latent.npy"].shape == (8, high, wide)
        view = row["sample.json"]["view"]
        assert view["original"] == [width, height] and view["size"] == [4 * wide, 4 * high]
        # The largest part of the image with the shape's ratio, in its middle.
        ratio = wide / high
        part = [min(width, round(height * ratio)), min(height, round(width / ratio))]
        assert view["part"] == part
        assert view["offset"] == [(width - part[0]) // 2, (height - part[1]) // 2]
        assert row["sample.json"]["captions"]["txt"] == row["txt"]


def test_a_shard_that_is_lost_is_made_again_to_the_same_bytes(place: Any) -> None:
    before = {path.name: path.read_bytes() for path in place.folder.glob("alone/[0ms]*")}
    for name in ("00001.tar", "00001.json", "samples.idx", "manifest.json"):
        (place.folder / "alone" / name).unlink()
    of_model = [
        word for word in ENCODE if not word.startswith("data.image_size")
    ]  # the autoencoder's own size
    place.run(*of_model, "latents.path=alone", "latents.rank_batch=4", "data.workers=1", ranks=2)
    assert {path.name: path.read_bytes() for path in place.folder.glob("alone/[0ms]*")} == before


@pytest.fixture(scope="module")
def straight(place: Any) -> dict[int, str]:
    return train(place, "straight", 2, STEPS, "train.rank_micro_batch=3")


def test_each_step_has_one_shape_on_all_ranks(straight: dict[int, str]) -> None:
    assert sorted(straight) == list(range(BATCH * STEPS))
    kinds = [{kind_of(straight[BATCH * step + k]) for k in range(BATCH)} for step in range(STEPS)]
    assert all(len(found) == 1 for found in kinds)
    assert len(set.union(*kinds)) > 1


def test_a_run_moved_between_ranks_has_the_losses_and_samples_of_one_that_stayed(
    place: Any, straight: dict[int, str]
) -> None:
    for ranks, until, micro in ((1, 2, 6), (3, 6, 1), (2, STEPS, 1)):
        moved = train(
            place,
            "moved",
            ranks,
            until,
            f"train.rank_micro_batch={micro}",
            f"data.workers={ranks % 2}",
            "zero=1" if ranks == 3 else "zero=0",
        )
    assert moved == straight
    assert losses(place.folder / "moved") == pytest.approx(losses(place.folder / "straight"), rel=1e-5)


def test_training_on_latents_is_training_on_the_images(place: Any, straight: dict[int, str]) -> None:
    """With the latents in float32 both see the same samples, shapes and held-out set."""
    online = train(place, "online", 1, STEPS, "train.rank_micro_batch=6", on=ON_IMAGES)
    assert online == straight
    assert losses(place.folder / "online") == pytest.approx(losses(place.folder / "straight"), rel=1e-4)
    for prefix in ("validation/", "generation/"):
        one, other = (measured(place.folder / run, prefix) for run in ("online", "straight"))
        assert len(one) == len(other) == (2 if prefix == "validation/" else 1)
        for found, expected in zip(one, other, strict=True):
            assert found == pytest.approx(expected, rel=2e-3), prefix


def test_held_out_images_of_a_run_on_latents_are_encoded_in_their_shapes(
    place: Any, straight: dict[int, str]
) -> None:
    train(place, "mixed", 1, STEPS, "train.rank_micro_batch=6", "data.heldout_shards='images/2.tar'")
    one, other = (measured(place.folder / run, "validation/") for run in ("mixed", "straight"))
    for found, expected in zip(one, other, strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


def test_previews_are_sampled_in_the_shapes_of_the_training_data(
    place: Any, straight: dict[int, str]
) -> None:
    picture = np.asarray(
        Image.open(place.folder / "straight" / "samples" / "step_00000008.png").convert("RGB")
    )
    # Five images on equal canvases of 40x40: in two rows of three, two pixels apart.
    assert picture.shape == (82, 124, 3)
    cells = [picture[y : y + 40, x : x + 40] for y in (0, 42) for x in (0, 42, 84)][:5]

    def white(part: np.ndarray) -> bool:
        return bool((part == 255).all())

    shapes = [
        ("tall" if white(cell[:, :8]) and white(cell[:, -8:]) else "")
        + ("wide" if white(cell[:8]) and white(cell[-8:]) else "")
        + ("square" if white(cell[:4]) and white(cell[:, :4]) and not white(cell[4:8]) else "")
        for cell in cells
    ]
    # Of 39 training images 24 are squares.
    assert sorted(shapes) == ["square", "square", "square", "tall", "wide"]


def test_an_autoencoder_trains_and_is_validated_in_the_shapes(place: Any) -> None:
    train = [
        "autoencoder", "experiment=smoke", "data=shards", "data.shards='images/[01].tar'", "data.heldout_shards='images/2.tar'",
        *BUCKETS, "data.workers=0", "train.max_steps=4", "train.global_batch=6", "train.rank_micro_batch=3",
        "validation.every_steps=4", "validation.images=99", "validation.rank_batch=4",
        "preview.every_steps=4", "preview.images=6",
    ]  # fmt: skip
    place.run(*train, "run.dir=ae_two", ranks=2)
    place.run(*train, "run.dir=ae_one")
    two, one = (measured(place.folder / run, "validation/") for run in ("ae_two", "ae_one"))
    assert len(one) == 1 and one[0] == pytest.approx(two[0], rel=1e-3, abs=1e-4)
    assert list((place.folder / "ae_two" / "samples").glob("*.png"))


def test_the_autoencoder_is_evaluated_in_the_shapes(place: Any) -> None:
    place.run("evaluate", "evaluate.model=ae", "data.shards=images", *BUCKETS, "evaluate.out=found.json",
              "evaluate.rank_batch=4", "evaluate.perceptual=none", "evaluate.features=none", ranks=2)  # fmt: skip
    found = json.loads((place.folder / "found.json").read_text())
    assert found["protocol"]["images"] == 52 and [40, 24] in found["protocol"]["shapes"]
    place.run("evaluate", "evaluate.model=ae", "data.shards=images", *BUCKETS, "evaluate.out=one.json",
              "evaluate.rank_batch=4", "evaluate.perceptual=none", "evaluate.features=none")  # fmt: skip
    one = json.loads((place.folder / "one.json").read_text())
    assert one["metrics"] == pytest.approx(found["metrics"], rel=1e-6)


def test_sample_draws_the_trained_shape_nearest_to_a_ratio(place: Any, straight: dict[int, str]) -> None:
    sample = ["sample", "sample.model=straight", "sample.prompts=[a wide 3]", "sample.steps=2"]
    for ratio, size in (("1.4", (40, 24)), ("0.5", (24, 40)), ("1.1", (32, 32))):
        place.run(*sample, f"sample.aspect_ratio={ratio}", f"sample.out=drawn_{ratio}")
        (image,) = (place.folder / f"drawn_{ratio}").glob("0*.png")
        assert Image.open(image).size == size
    place.host.folder = place.folder
    wrong = [*sample, "sample.aspect_ratio=1.4", "sample.height=32", "sample.out=wrong"]
    assert place.host.run(wrong, place.folder / "keys.jsonl") == 2
    assert "sample.aspect_ratio=1.4 and sample.height both give the shape" in place.log


def test_held_out_latents_of_another_make_are_refused(place: Any) -> None:
    plain = [word for word in ENCODE if not word.startswith("data.bucket_step")]
    place.run(*plain, "latents.path=plain")
    train = [
        *ON_LATENTS,
        "data.heldout_shards='plain/00002.tar'",
        "run.dir=refused",
        "train.rank_micro_batch=3",
    ]
    place.host.folder = place.folder
    assert place.host.run(train, place.folder / "keys.jsonl") == 2
    assert "give held-out latents that the same autoencoder made in the same way" in place.log


def test_a_ratio_is_refused_by_a_model_of_one_shape(place: Any) -> None:
    train = [
        *TRAIN,
        "data=latents",
        "data.shards='plain/*.tar'",
        "validation.every_steps=0",
        "generation.every_steps=0",
    ]
    place.run(*train, "run.dir=square", "train.max_steps=1", "train.rank_micro_batch=3")
    place.host.folder = place.folder
    sample = [
        "sample",
        "sample.model=square",
        "sample.prompts=[a]",
        "sample.steps=2",
        "sample.aspect_ratio=1.4",
    ]
    assert place.host.run(sample, place.folder / "keys.jsonl") == 2
    assert "trained without aspect-ratio buckets: give sample.height and sample.width" in place.log
