"""Tasks whose condition is drawn from files: shards, training, resume and drawing, on two ranks."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

import ldmscale as library
from ldmscale.data.conditions.boxes import Box
from ldmscale.errors import ConfigError
from ldmscale.inference.condition_files import Told
from ldmscale.inference.image_set import Wanted
from ldmscale.inference.sample import conditions_of
from ldmscale.models.conditions import Conditions

pytestmark = pytest.mark.distributed

TRAIN = [
    "diffusion", "experiment=smoke", "data=synthetic", "data.shards='ae/data/*.tar'", "first_stage.path=ae",
    "preview.sampler_steps=2", "preview.images=3", "preview.every_steps=4",
    "checkpoint.save_every_steps=2", "optim.lr=1e-2", "data.flip=true",
]  # fmt: skip
UNTOLD = ["text_encoder=null", "unet.context_dim=null"]
TASKS = {
    "superres": [  # told by captions as well
        "spatial=superres",
        "unet.in_channels=7",
        "spatial.degradation=blind",
        "spatial.noise=0.1",
        "diffusion.spatial_dropout=0.3",
    ],
    "semantic": [
        *UNTOLD,
        "data=shards",
        "data.image_size=32",
        "data.workers=0",
        "data.crop=random",
        "data.shards='maps.tar'",
        "spatial=semantic",
        "spatial.map_classes=3",
        "unet.in_channels=7",
        "data.max_bad_share=0.2",
    ],
    "inpainting": [*UNTOLD, "spatial=inpainting", "spatial.channels=5", "unet.in_channels=9"],
    "layout": [
        "text_encoder.tokenizer=layout",
        "text_encoder.vocab_size=82",
        "text_encoder.max_tokens=8",
        "layout=found",
        "data.crop=random",
    ],
    "embeddings": [
        "text_encoder=null",
        "data=shards",
        "data.image_size=32",
        "data.workers=0",
        "data.shards='maps.tar'",
        "embeddings=clip_768",
        "embeddings.width=64",
        "embeddings.max_tokens=3",
    ],
}


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path)


def read(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.array(picture)


def shard_with_maps(path: Path) -> None:
    """Pictures wider than high, each with its map and one to three embeddings; two maps are bad."""
    draws = np.random.default_rng(1)
    with webdataset.TarWriter(str(path), mtime=0) as tar:
        for number in range(24):
            numbers = draws.integers(0, 3, (32, 48)).astype(np.uint8)
            if number == 3:
                numbers[0, 0] = 3
            if number == 9:
                numbers = numbers[:, :40]
            image = np.repeat(draws.integers(0, 256, (32, 48, 1), dtype=np.uint8), 3, axis=2)
            array = io.BytesIO()
            np.save(array, draws.standard_normal((1 + number % 3, 64)).astype(np.float32))
            told = {"map.png": png(numbers), "embeddings.npy": array.getvalue(), "txt": "a map"}
            tar.write({"__key__": f"{number:03d}", "png": png(image), **told})


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line["loss/total"] for line in lines if "loss/total" in line}
    assert list(found) == [1, 2, 3, 4]
    return list(found.values())


@pytest.fixture(scope="module")
def place(small_place: Any) -> Any:
    """The folder, in which each task is trained for two steps and then for two more."""
    place, folder = small_place, small_place.folder
    draws = np.random.default_rng(0)
    # Larger than trained (32 pixels), and not what the networks halve evenly.
    for name, height, width in (("a", 8, 8), ("b", 12, 11)):
        save(
            folder / "superres_files" / f"{name}.png",
            draws.integers(0, 256, (height, width, 3), dtype=np.uint8),
        )
        image = draws.integers(0, 256, (height * 4, width * 4 + 1, 3), dtype=np.uint8)
        mask = np.zeros(image.shape[:2], np.uint8)
        mask[5:20, 9:22] = 255
        save(folder / "inpainting_files" / f"{name}.png", image)
        save(folder / "inpainting_files" / f"{name}_mask.png", mask)
        save(
            folder / "semantic_files" / f"{name}.png",
            draws.integers(0, 3, (height * 4, width * 4), dtype=np.uint8),
        )
        boxes = [
            {"class": "circle", "box": [0.1, 0.2, 0.6, 0.9]},
            {"class": "square", "box": [0, 0, 0.5, 0.5]},
        ]
        (folder / "layout_files").mkdir(exist_ok=True)
        (folder / "layout_files" / f"{name}.json").write_text(
            json.dumps({"boxes": boxes[: 1 + (name == "b")]})
        )
        (folder / "embeddings_files").mkdir(exist_ok=True)
        np.save(folder / "embeddings_files" / name, draws.standard_normal((2, 64)).astype(np.float16))
    shard_with_maps(folder / "maps.tar")
    for task, told in TASKS.items():
        for steps in (2, 4):
            place.run(*TRAIN, *told, f"run.dir={task}", f"train.max_steps={steps}", ranks=2)
        assert "resumed from" in (folder / task / "logs" / "rank_00000.log").read_text()
    return place


@pytest.mark.parametrize("task", TASKS)
def test_the_condition_of_a_sample_is_the_same_on_one_rank_without_a_resume(place, task):
    place.run(*TRAIN, *TASKS[task], f"run.dir={task}_alone", "train.max_steps=4", "preview.every_steps=0")
    assert losses(place.folder / task) == pytest.approx(losses(place.folder / f"{task}_alone"), rel=1e-4)
    assert (place.folder / task / "samples" / "step_00000004.png").is_file()


@pytest.mark.parametrize("task", TASKS)
def test_files_of_any_size_are_drawn_from_alike_on_any_number_of_ranks(place, task):
    draw = ["sample", f"sample.model={task}", f"sample.condition={task}_files", "sample.steps=3"]
    if task == "superres":
        draw += ["sample.spatial_guidance=1.5"]
    place.run(*draw, "sample.out=" + task + "_two", ranks=2)
    # No picture has more pixels than such a tile: nothing changes.
    place.run(*draw, "sample.out=" + task + "_one", "sample.decode_tile_pixels=64")
    folder = place.folder
    drawn = sorted((folder / f"{task}_two").glob("0*.png"))
    assert [file.name for file in drawn] == ["000000_a_0.png", "000001_b_0.png"]
    for file in drawn:
        pixels, name = read(file), file.name.split("_")[1]
        other = read(folder / f"{task}_one" / file.name)
        # Images of one size share a batch on one rank, and its kernels round otherwise than those of a batch of one.
        assert np.abs(pixels.astype(int) - other.astype(int)).max() <= 1
        if task in ("layout", "embeddings"):
            assert pixels.shape == (32, 32, 3)
            continue
        given = read(folder / f"{task}_files" / f"{name}.png")
        if task == "semantic":
            assert pixels.shape == (*given.shape, 3)
            continue
        if task == "superres":
            assert pixels.shape == (given.shape[0] * 4, given.shape[1] * 4, 3)
            continue
        hole = read(folder / f"{task}_files" / f"{name}_mask.png") > 127
        assert np.array_equal(pixels[~hole], given[~hole])
        assert (pixels[hole] != given[hole]).mean() > 0.9


@pytest.mark.parametrize("times", [2, 4])
@pytest.mark.parametrize("task", ["superres", "semantic", "inpainting"])
def test_sizes_above_that_of_training_are_drawn_in_tiles_as_they_are_whole(place, tmp_path, task, times):
    side, draws = 32 * times, np.random.default_rng(times)
    file = tmp_path / "large.png"
    if task == "superres":
        save(file, draws.integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8))
    elif task == "semantic":
        save(file, draws.integers(0, 3, (side, side), dtype=np.uint8))
    else:
        save(file, draws.integers(0, 256, (side, side, 3), dtype=np.uint8))
        mask = np.zeros((side, side), np.uint8)
        mask[side // 4 : side // 2 + 3, side // 4 :] = 255  # across the borders of tiles
        save(tmp_path / "large_mask.png", mask)
    parts, wanted = library.load(place.folder / task), [Wanted(0, "", "", 7)]

    def draw(tile_pixels: int | None) -> torch.Tensor:
        told = Told(parts, str(file), 1, tile_pixels)
        drawn = library.sample(
            parts, [""], steps=3, conditions=told.conditions(wanted), decode_tile_pixels=tile_pixels
        )
        return told.finished(wanted, drawn)

    whole, tiled = draw(None), draw(32)
    assert whole.shape == (1, 3, side, side)
    assert 0 < (whole - tiled).abs().max() < 1 / 255


def test_bad_maps_are_in_the_ledger(place):
    told = (place.folder / "semantic_alone" / "data_ledger.jsonl").read_text()
    assert "has the number 3: there are 3 classes" in told and "40x32 pixels, its image 48x32" in told


def test_what_a_task_cannot_do_is_said_before_anything_is_loaded(place, ldmscale):
    alone = ldmscale(
        "sample", "sample.model=superres", "sample.prompts=[a]", "sample.height=64", cwd=place.folder
    )
    assert alone.returncode == 2 and "the model reads one (spatial.kind=image)" in alone.stderr
    guided = ldmscale(
        "sample",
        "sample.model=inpainting",
        "sample.condition=inpainting_files",
        "sample.spatial_guidance=2",
        cwd=place.folder,
    )
    assert guided.returncode == 2 and "the model always saw what is joined to its latent" in guided.stderr
    latents = ldmscale(
        *TRAIN, *TASKS["superres"], "data.kind=latents", "spatial.halvings=1", cwd=place.folder
    )
    assert latents.returncode == 2
    assert "data.kind=latents has none" in latents.stderr and "spatial.halvings is set" in latents.stderr


def test_caption_and_small_image_both_tell_and_each_guides_by_its_own_scale(place):
    parts = library.load(place.folder / "superres")
    assert parts.spatial_dropout == 0.3

    def draw(caption: str, level: float, **scales: float) -> torch.Tensor:
        told = conditions_of(parts, [caption], torch.full((1, 3, 8, 8), level))
        return library.sample(parts, [caption], steps=3, conditions=told, **({"guidance": 5.0} | scales))

    plain = draw("a red circle", 0.5)
    for other in (
        draw("a blue square", 0.5),
        draw("a red circle", -0.5),
        draw("a red circle", 0.5, guidance=2.0),
        draw("a red circle", 0.5, spatial_guidance=3.0),
    ):
        assert (plain - other).abs().max() > 1e-3
    lines = [
        json.loads(line) for line in (place.folder / "superres" / "metrics.jsonl").read_text().splitlines()
    ]
    assert any(line.get("spatial/dropped", 0) > 0 for line in lines)


def test_a_layout_is_drawn_from_python_and_each_box_counts(place):
    parts = library.load(place.folder / "layout")
    assert parts.layout is not None and parts.layout.labels.names == ("circle", "square", "triangle")
    assert parts.denoiser is not None and parts.denoiser.null_token_ids is not None
    assert parts.denoiser.null_token_ids.tolist() == parts.layout.encode([]).tolist()

    def draw(*boxes: Box, guidance: float = 4.0) -> torch.Tensor:
        assert parts.layout is not None
        tokens = torch.from_numpy(parts.layout.encode(boxes))[None]
        told = Conditions(token_ids=tokens)
        return library.sample(parts, [""], steps=3, guidance=guidance, conditions=told)

    left, right = Box(0, 0.0, 0.0, 0.5, 1.0), Box(0, 0.5, 0.0, 1.0, 1.0)
    assert (draw(left) - draw(right)).abs().max() > 1e-3
    assert (draw(left) - draw(left._replace(label=1))).abs().max() > 1e-3
    assert (draw(left) - draw(left, guidance=1.0)).abs().max() > 1e-3
    assert torch.allclose(draw(), draw(guidance=1.0), atol=1e-4)  # no box is the null condition
    with pytest.raises(ConfigError, match="the model reads layouts, and prompts tell none"):
        library.sample(parts, ["a"])


def test_a_layout_that_cannot_be_drawn_is_refused(place, ldmscale):
    (place.folder / "bad.json").write_text('{"boxes": [{"class": "circle", "box": [0.5, 0, 1.5, 1]}]}')
    draw = ["sample", "sample.model=layout", "sample.steps=3", "sample.out=bad_drawn"]
    done = ldmscale(*draw, "sample.condition=bad.json", cwd=place.folder)
    assert done.returncode == 2 and "outside of the image" in done.stderr and "bad.json" in done.stderr
    # The folder was not begun. On two ranks the one of the good file draws it, and both end alike.
    both = f"sample.condition=[{place.folder}/layout_files/a.json,bad.json]"
    done = ldmscale(*draw, both, cwd=place.folder, ranks=2)
    assert done.returncode == 2 and "bad.json" in done.stderr and "Traceback" not in done.stderr
    assert [file.name for file in (place.folder / "bad_drawn").glob("0*.png")] == ["000000_a_0.png"]
    refused = ldmscale("export", "src=layout", "dst=layout.ckpt", "format=compvis", cwd=place.folder)
    assert refused.returncode == 2 and "reads layouts" in refused.stderr
