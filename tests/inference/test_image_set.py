"""The folder of a set of images: it goes on where it stopped, and holds images that were drawn alike."""

import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldmscale.errors import ConfigError
from ldmscale.inference.image_set import Prompts, SampleFolder, free_folder, listing_digest
from ldmscale.inference.prompts import read_negatives, read_prompts

MADE_BY = {
    "checkpoint": "step_00000006 (ab)",
    "sampler": "ddim",
    "steps": "50",
    "guidance": "5.0",
    "mask": "",
}
PROMPTS = Prompts(["a red circle", "Ein Bär / ß", "a red circle"], ["", "blurred", ""])


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (24, 40, 3), dtype=np.uint8)


def drawn(path: Path) -> tuple[SampleFolder, list]:
    """A whole set of six."""
    folder = SampleFolder(path, MADE_BY)
    folder.settle(PROMPTS)
    images = PROMPTS.images(per_prompt=2, first_seed=7, distinct_seeds=False)
    for image in images:
        folder.write(image, picture(image.number))
    return folder, images


def test_a_set_numbers_its_images_and_gives_them_seeds():
    shared = PROMPTS.images(per_prompt=2, first_seed=7, distinct_seeds=False)
    assert [image.number for image in shared] == list(range(6))
    assert [image.seed for image in shared] == [7, 8] * 3
    distinct = PROMPTS.images(per_prompt=2, first_seed=7, distinct_seeds=True)
    assert [image.seed for image in distinct] == [7, 8, 9, 10, 11, 12]
    assert len({image.file_name for image in shared}) == 6  # though a prompt is there twice
    assert shared[2].file_name == "000002_ein-b-r_7.png" and shared[2].negative == "blurred"


def test_a_picture_tells_all_that_it_depends_on(tmp_path):
    _, images = drawn(tmp_path / "set")
    with Image.open(tmp_path / "set" / images[2].file_name) as found:
        told = dict(found.text)
        assert np.array_equal(np.asarray(found), picture(2))
    assert told == MADE_BY | {"prompt": "Ein Bär / ß", "negative_prompt": "blurred", "seed": "7"}


def test_a_half_done_set_lacks_what_is_not_there_whole(tmp_path):
    folder, images = drawn(tmp_path / "set")
    assert folder.missing(images) == []
    files = [folder.path / image.file_name for image in images]
    files[1].unlink()
    files[3].write_bytes(files[3].read_bytes()[:-20])
    files[4].write_bytes(b"")
    again = SampleFolder(folder.path, MADE_BY)
    again.settle(PROMPTS)
    assert again.missing(images) == [1, 3, 4]
    assert not [name for name in folder.path.iterdir() if name.name.startswith(".")]  # nothing half written


def test_a_set_grows_at_its_end_and_nowhere_else(tmp_path):
    folder, _ = drawn(tmp_path / "set")
    more = Prompts([*PROMPTS.texts, "new"], [*PROMPTS.negatives, ""])
    folder.settle(more)
    assert folder.missing(more.images(2, 7, False)) == [6, 7]
    folder.settle(PROMPTS)  # a part of it is whole
    assert len(json.loads((folder.path / "sample.json").read_text())["prompts"]) == 4
    with pytest.raises(
        ConfigError, match=r"sample.prompts: number 1 is 'new', but .*'a red circle' \(4 differ\)"
    ):
        folder.settle(Prompts(["new", *PROMPTS.texts], ["", *PROMPTS.negatives]))
    with pytest.raises(ConfigError, match=r"sample.negative_prompts: number 2 is '', but .*'blurred'"):
        folder.settle(Prompts(PROMPTS.texts, ["", "", ""]))


def test_parameters_that_differ_are_refused_by_name_and_all_at_once(tmp_path):
    drawn(tmp_path / "set")
    other = MADE_BY | {"steps": "20", "mask": "hole.png (12)", "checkpoint": "step_00000009 (cd)"}
    with pytest.raises(ConfigError) as error:
        SampleFolder(tmp_path / "set", other).settle(PROMPTS)
    told = "\n".join(error.value.faults)
    assert len(error.value.faults) == 3
    assert "sample.steps=20" in told and "give sample.steps=50" in told
    assert "sample.mask=hole.png (12)" in told and "drawn with null" in told
    assert "newest checkpoint is step_00000009 (cd)" in told and "drawn by step_00000006 (ab)" in told
    # What says nothing of the pixels may change: where the model lies, and this package's version.
    SampleFolder(tmp_path / "set", MADE_BY | {"model": "/elsewhere", "ldmscale": "9"}).settle(PROMPTS)


def test_a_folder_of_unknown_pictures_is_refused(tmp_path):
    Image.fromarray(picture(0)).save(tmp_path / "holiday.png")
    with pytest.raises(ConfigError, match=r"no sample\.json"):
        SampleFolder(tmp_path, MADE_BY).settle(PROMPTS)


def test_a_set_that_could_not_begin_leaves_its_folder_to_another_try(tmp_path):
    SampleFolder(tmp_path / "set", MADE_BY).settle(PROMPTS)
    SampleFolder(tmp_path / "set", MADE_BY).abandon()
    SampleFolder(tmp_path / "set", MADE_BY | {"steps": "20"}).settle(Prompts(["else"], [""]))
    drawn(tmp_path / "other")
    SampleFolder(tmp_path / "other", MADE_BY).abandon()  # there are pictures: nothing is forgotten
    with pytest.raises(ConfigError, match=r"sample.steps=20"):
        SampleFolder(tmp_path / "other", MADE_BY | {"steps": "20"}).settle(PROMPTS)


def test_without_a_folder_given_a_set_finds_its_own_again(tmp_path):
    assert free_folder(tmp_path, MADE_BY, PROMPTS).path.name == "drawn"
    assert free_folder(tmp_path, MADE_BY | {"steps": "20"}, PROMPTS).path.name == "drawn_2"
    assert free_folder(tmp_path, MADE_BY, Prompts(["else"], [""])).path.name == "drawn_3"
    assert free_folder(tmp_path, MADE_BY | {"steps": "20"}, PROMPTS).path.name == "drawn_2"


def test_thirty_thousand_images_are_listed_in_little_memory(tmp_path):
    folder = SampleFolder(tmp_path, MADE_BY)
    prompts = Prompts([f"prompt {n}" for n in range(30_000)], [""] * 30_000)
    folder.settle(prompts)
    images = prompts.images(1, 0, distinct_seeds=True)
    folder.write(images[0], picture(0))
    for image in images[1:20_000]:  # one file under many names
        os.link(tmp_path / images[0].file_name, tmp_path / image.file_name)
    tracemalloc.start()
    try:
        again = SampleFolder(tmp_path, MADE_BY)
        again.settle(prompts)
        missing = again.missing(prompts.images(1, 0, distinct_seeds=True))
        again.write_grid(images, None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert missing == list(range(20_000, 30_000))
    assert peak < 40e6  # the pictures alone would be 86 MB


def test_a_grid_has_the_first_images_only(tmp_path):
    folder = SampleFolder(tmp_path, MADE_BY)
    prompts = Prompts([str(n) for n in range(70)], [""] * 70)
    folder.settle(prompts)
    images = prompts.images(1, 0, True)
    for image in images[:64]:  # the last six are not even there
        folder.write(image, np.full((600, 300, 3), image.number, dtype=np.uint8))
    folder.write_grid(images, None)
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (8 * 130 - 2, 8 * 258 - 2)
        assert grid.getpixel((0, 0)) == (0, 0, 0) and grid.getpixel((1037, 2061)) == (63, 63, 63)


def test_files_of_another_format_are_told_from_others_but_not_by_what_was_drawn(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "weights.safetensors").write_bytes(b"1")
    before = listing_digest(tmp_path)
    drawn(tmp_path / "samples" / "drawn")
    assert listing_digest(tmp_path) == before
    (tmp_path / "unet" / "weights.safetensors").write_bytes(b"12")
    assert listing_digest(tmp_path) != before
    assert listing_digest(tmp_path / "unet" / "weights.safetensors") not in ("", before)


def test_prompts_come_from_lists_files_and_single_texts(tmp_path):
    (tmp_path / "prompts.txt").write_text("one\n\n  two \n", encoding="utf-8")
    assert read_prompts(str(tmp_path / "prompts.txt")) == ["one", "two"]
    assert read_prompts(("one", "two")) == ["one", "two"] and read_prompts("one") == ["one"]
    with pytest.raises(ConfigError, match="names no prompt"):
        read_prompts(("",))
    assert read_negatives(None, 2) == ["", ""] and read_negatives("blurred", 2) == ["blurred"] * 2
    assert read_negatives(str(tmp_path / "prompts.txt"), 3) == ["one", "", "two"]
    # A text that can only be the name of a file is not drawn.
    for given, told in (
        (str(tmp_path / "promts.txt"), "there is no file .*promts.txt"),
        (f"{tmp_path}/", "no file"),
    ):
        with pytest.raises(ConfigError, match=told):
            read_prompts(given)
    (tmp_path / "latin.txt").write_bytes("Drache, grün\n".encode("latin1"))
    with pytest.raises(ConfigError, match="give text in UTF-8"):
        read_prompts(str(tmp_path / "latin.txt"))
    with pytest.raises(ConfigError, match="2 entries for 3 prompts"):
        read_negatives(("a", "b"), 3)
