"""Tasks whose condition is joined to the latent: shards, training, resume and drawing from files, on two ranks."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

pytestmark = pytest.mark.distributed

AUTOENCODER = [
    "autoencoder",
    "experiment=smoke",
    "run.dir=ae",
    "train.max_steps=2",
    "train.rank_micro_batch=8",
]
TRAIN = [
    "diffusion", "experiment=smoke", "data=synthetic", "data.shards='ae/data/*.tar'", "first_stage.path=ae",
    "text_encoder=null", "unet.context_dim=null", "preview.sampler_steps=2", "preview.images=3", "preview.every_steps=4",
    "checkpoint.save_every_steps=2", "optim.lr=1e-2", "data.flip=true",
]  # fmt: skip
TASKS = {
    "superres": ["spatial=superres", "unet.in_channels=7", "spatial.degradation=blind", "spatial.noise=0.1"],
    "semantic": [
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
    "inpainting": ["spatial=inpainting", "spatial.channels=5", "unet.in_channels=9"],
}


def finished(done):
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path)


def read(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.array(picture)


def shard_with_maps(path: Path) -> None:
    """Pictures wider than high, each with its map; two maps are bad."""
    draws = np.random.default_rng(1)
    with webdataset.TarWriter(str(path), mtime=0) as tar:
        for number in range(24):
            numbers = draws.integers(0, 3, (32, 48)).astype(np.uint8)
            if number == 3:
                numbers[0, 0] = 3
            if number == 9:
                numbers = numbers[:, :40]
            image = np.repeat(draws.integers(0, 256, (32, 48, 1), dtype=np.uint8), 3, axis=2)
            tar.write(
                {"__key__": f"{number:03d}", "png": png(image), "map.png": png(numbers), "txt": "a map"}
            )


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
def place(tmp_path_factory, ldmscale) -> Path:
    folder = tmp_path_factory.mktemp("spatial")
    finished(ldmscale(*AUTOENCODER, cwd=folder))
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
    shard_with_maps(folder / "maps.tar")
    for task, told in TASKS.items():
        for steps in (2, 4):
            run = [*TRAIN, *told, f"run.dir={task}", f"train.max_steps={steps}"]
            done = finished(ldmscale(*run, cwd=folder, ranks=2, timeout=600))
        assert "resumed from" in done.stderr
    return folder


@pytest.mark.parametrize("task", TASKS)
def test_the_condition_of_a_sample_is_the_same_on_one_rank_without_a_resume(place, ldmscale, task):
    run = [*TRAIN, *TASKS[task], f"run.dir={task}_alone", "train.max_steps=4", "preview.every_steps=0"]
    finished(ldmscale(*run, cwd=place))
    assert losses(place / task) == pytest.approx(losses(place / f"{task}_alone"), rel=1e-4)
    assert (place / task / "samples" / "step_00000004.png").is_file()


@pytest.mark.parametrize("task", TASKS)
def test_files_of_any_size_are_drawn_from_alike_on_any_number_of_ranks(place, ldmscale, task):
    draw = ["sample", f"sample.model={task}", f"sample.condition={task}_files", "sample.steps=3"]
    finished(ldmscale(*draw, "sample.out=" + task + "_two", cwd=place, ranks=2, timeout=600))
    finished(ldmscale(*draw, "sample.out=" + task + "_one", cwd=place))
    drawn = sorted((place / f"{task}_two").glob("0*.png"))
    assert [file.name for file in drawn] == ["000000_a_0.png", "000001_b_0.png"]
    for file in drawn:
        pixels, name = read(file), file.name.split("_")[1]
        assert np.array_equal(pixels, read(place / f"{task}_one" / file.name))
        given = read(place / f"{task}_files" / f"{name}.png")
        if task == "semantic":
            assert pixels.shape == (*given.shape, 3)
            continue
        if task == "superres":
            assert pixels.shape == (given.shape[0] * 4, given.shape[1] * 4, 3)
            continue
        hole = read(place / f"{task}_files" / f"{name}_mask.png") > 127
        assert np.array_equal(pixels[~hole], given[~hole])
        assert (pixels[hole] != given[hole]).mean() > 0.9


def test_bad_maps_are_in_the_ledger(place):
    told = (place / "semantic_alone" / "data_ledger.jsonl").read_text()
    assert "has the number 3: there are 3 classes" in told and "40x32 pixels, its image 48x32" in told


def test_what_a_task_cannot_do_is_said_before_anything_is_loaded(place, ldmscale):
    alone = ldmscale("sample", "sample.model=superres", "sample.prompts=[a]", "sample.height=64", cwd=place)
    assert alone.returncode == 2 and "the model reads one (spatial.kind=image)" in alone.stderr
    latents = ldmscale(*TRAIN, *TASKS["superres"], "data.kind=latents", "spatial.halvings=1", cwd=place)
    assert latents.returncode == 2
    assert "data.kind=latents has none" in latents.stderr and "spatial.halvings is set" in latents.stderr
