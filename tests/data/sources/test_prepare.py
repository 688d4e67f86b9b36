"""The quickstart's images: captions from paths, a held-out split of known words, shards like
img2dataset's."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from ldmscale.data.shards.index import ShardIndex
from ldmscale.data.shards.report import check_shards
from ldmscale.data.sources.prepare import (
    caption_of_path,
    class_of_path,
    images_in,
    prepare,
    split_heldout,
    sprites,
    unique_captions,
    words_of,
)
from ldmscale.data.sources.sprites import SCENES
from ldmscale.data.sources.wheel import arcade_wheel
from ldmscale.data.sources.writer import Item, write_shards
from ldmscale.errors import DataError

MakeImage = Callable[..., bytes]
INSIDE = "arcade/resources/assets/images/"


@pytest.fixture
def wheel(tmp_path: Path, make_image: MakeImage) -> Path:
    """A wheel with the layout of arcade's: some sprites, some other things."""
    path = tmp_path / "arcade-3.3.3-py3-none-any.whl"
    names = [f"cards/card{suit}{n}.png" for suit in ("Hearts", "Spades") for n in (2, 3, 4, 5)]
    names += [f"tiles/{kind}_{side}.png" for kind in ("dirt", "sand", "snow") for side in ("left", "right")]
    with zipfile.ZipFile(path, "w") as file:
        for number, name in enumerate(names):
            file.writestr(INSIDE + name, make_image(20, 30, seed=number, mode="RGBA"))
        file.writestr(INSIDE + "topdown_tanks/barrel.png", make_image(8, 26))
        file.writestr(INSIDE + "backgrounds/stars.png", make_image(90, 90))
        file.writestr(INSIDE + "miami_synth_parallax/layers/back.png", make_image(90, 90))
        file.writestr(INSIDE + "License.txt", "CC0")
        file.writestr("arcade/examples/other.png", make_image())
    return path


@pytest.mark.parametrize(
    ("path", "caption"),
    [
        ("cards/cardHearts5.png", "cards hearts 5"),
        ("cards/cardClubsA.png", "cards clubs a"),
        ("alien/alienBlue_climb1.png", "alien blue climb 1"),
        (
            "animated_characters/female_person/femalePerson_walk0.png",
            "animated characters female person walk 0",
        ),
        ("topdown_tanks/tileGrass_roadCornerLL.png", "topdown tanks tile grass road corner ll"),
        ("space_shooter/laserBlue01.png", "space shooter laser blue 1"),
        ("tiles/tile.png", "tiles tile"),
        ("My Photo-2 of HTTPServer.jpg", "my photo 2 of http server"),
        ("grass/glass.png", "grass glass"),
    ],
)
def test_captions_are_the_words_of_the_path(path: str, caption: str) -> None:
    assert caption_of_path(path) == caption


def test_words_classes_and_equal_captions() -> None:
    assert words_of("tileGrass_roadSplitE02") == ["tile", "grass", "road", "split", "e", "2"]
    assert class_of_path("topdown_tanks/a/b.png") == "topdown tanks" and class_of_path("redBird.png") == "red"
    assert unique_captions(["a", "b", "a", "a", "a 2"]) == ["a", "b", "a 3", "a 4", "a 2"]


def test_sprites_are_read_from_a_wheel_or_its_folder(wheel: Path, tmp_path: Path) -> None:
    items, skipped = sprites(str(wheel))
    assert len(items) == 14 and len({item.caption for item in items}) == 14
    assert {path for path, _ in skipped} == {
        "topdown_tanks/barrel.png", "backgrounds/stars.png", "miami_synth_parallax/layers/back.png",
    }  # fmt: skip
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "site")
    for root in (tmp_path / "site", tmp_path / "site" / "arcade", tmp_path / "site" / INSIDE):
        assert sprites(str(root))[0] == items


def test_sprites_stand_whole_in_a_transparent_square(wheel: Path) -> None:
    item = sprites(str(wheel))[0][0]
    image = Image.open(io.BytesIO(item.image))
    assert image.size == (30, 30) and image.mode == "RGBA"
    assert image.crop((0, 0, 5, 30)).getextrema()[3] == (0, 0)
    assert image.crop((5, 0, 25, 30)).tobytes() != bytes(20 * 30 * 4)
    wanted = {"class": "cards", "source": "cards/cardHearts2.png", "width": 30, "height": 30}
    boxes = item.metadata.pop("boxes")
    assert item.metadata == {**wanted, "original_width": 20, "original_height": 30}
    assert boxes == [{"class": "cards", "box": [0.1667, 0.0, 0.8333, 1.0]}]  # columns 5 to 25 of 30
    with Image.open(io.BytesIO(item.more["map.png"])) as numbers:
        assert numbers.size == (30, 30) and numbers.crop((0, 0, 5, 30)).getextrema() == (0, 0)


def test_heldout_words_all_occur_in_training_captions(wheel: Path) -> None:
    items, _ = sprites(str(wheel))
    for seed in range(5):
        train, heldout = split_heldout(items, seed=seed, share=0.3)
        known = {word for item in train for word in item.caption.split()}
        assert len(heldout) == 4 and len(train) == 10
        assert all(word in known for item in heldout for word in item.caption.split())
        assert [item for item in items if item in train or item in heldout] == items
        assert split_heldout(items, seed=seed, share=0.3) == (train, heldout)
    assert len({tuple(i.key for i in split_heldout(items, seed=seed, share=0.3)[1]) for seed in range(8)}) > 1


def test_free_text_is_held_out_all_the_same() -> None:
    items = [Item(str(number), b"", "png", f"word{number}", {"class": "x"}) for number in range(20)]
    train, heldout = split_heldout(items, seed=0, share=0.1)
    assert (len(train), len(heldout)) == (18, 2)
    with pytest.raises(DataError, match="too few"):
        split_heldout(items[:1], seed=0, share=0.1)


def test_prepare_writes_shards_once(wheel: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    made = prepare("sprites", folder, root=str(wheel), heldout_share=0.3, samples_per_shard=4)
    assert [Path(path).name for path in made.train] == [
        "train-00000.tar",
        "train-00001.tar",
        "train-00002.tar",
    ]
    assert [Path(path).name for path in made.heldout] == ["heldout-00000.tar"]
    assert (made.train_samples, made.heldout_samples) == (10, 4)
    assert made.classes == {"cards": 8, "tiles": 6} and len(made.skipped) == 3
    times = [Path(path).stat().st_mtime_ns for path in made.train]
    assert prepare("sprites", folder, root=str(wheel), heldout_share=0.3, samples_per_shard=4) == made
    assert [Path(path).stat().st_mtime_ns for path in made.train] == times
    report = check_shards([*made.train, *made.heldout], "decode")
    assert report.damaged == 0 and report.samples == 14 and report.statistics.captions == 14
    other = prepare("sprites", folder, root=str(wheel), heldout_share=0.3, samples_per_shard=100)
    kept = [path.name for path in sorted(folder.glob("*.tar")) if not path.name.startswith("scenes-")]
    assert kept == ["heldout-00000.tar", "train-00000.tar"]
    scenes = check_shards(made.scenes, "headers")
    assert scenes.damaged == 0 and scenes.samples == SCENES + SCENES // 12
    # Shards of the same name that were indexed before are indexed anew.
    assert ShardIndex.open(other.train).total == 10
    Path(other.train[0]).unlink()
    assert Path(
        prepare("sprites", folder, root=str(wheel), heldout_share=0.3, samples_per_shard=100).train[0]
    ).is_file()


def test_plain_webdataset_reads_the_shards(wheel: Path, tmp_path: Path) -> None:
    import webdataset

    made = prepare("sprites", tmp_path / "shards", root=str(wheel), samples_per_shard=5)
    urls = [*made.train, *made.heldout]
    found = {
        sample["__key__"]: sample for sample in webdataset.WebDataset(urls, shardshuffle=False).decode("pil")
    }
    assert len(found) == 14
    sample = found["cards-cardHearts2"]
    assert sample["png"].size == (30, 30) and sample["txt"] == "cards hearts 2"
    assert sample["json"]["caption"] == "cards hearts 2" and sample["json"]["key"] == "cards-cardHearts2"


def test_a_folder_of_one_s_own_images(tmp_path: Path, make_image: MakeImage) -> None:
    root = tmp_path / "my images"
    for name in ("Dogs/rex.v2.JPG", "Dogs/old/bello.png", "cat.png", ".hidden/x.png", "Dogs/broken.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(make_image(format="JPEG" if name.endswith("JPG") else "PNG"))
    (root / "Dogs" / "broken.jpg").write_bytes(b"half a picture")
    (root / "Dogs" / "rex.v2.txt").write_text("A  dog,\nrunning\n", encoding="utf-8")
    (root / "cat.txt").write_bytes(b"caf\xe9")
    items, skipped = images_in(str(root))
    assert [(item.caption, item.metadata["class"], item.extension) for item in items] == [
        ("dogs old bello", "dogs", "png"),
        ("A dog, running", "dogs", "jpg"),
        ("cat", "cat", "png"),
    ]
    assert items[1].image == (root / "Dogs/rex.v2.JPG").read_bytes() and items[1].key == "Dogs-rex-v2"
    assert [path for path, _ in skipped] == ["Dogs/broken.jpg"]
    made = prepare("folder", tmp_path / "shards", root=str(root))
    assert (made.train_samples, made.heldout_samples) == (2, 1)
    assert check_shards(made.train, "decode").damaged == 0


def test_keys_stay_apart(tmp_path: Path, make_image: MakeImage) -> None:
    for name in ("a b.png", "a-b.png", "a/b.png", "ä.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(make_image())
    items, _ = images_in(str(tmp_path))
    assert len({item.key for item in items}) == 4 and not any("." in i.key or "/" in i.key for i in items)
    with pytest.raises(DataError, match="come twice"):
        write_shards([items[0], items[0]], tmp_path / "out", "x", 5)


def test_what_cannot_be_had_is_refused_with_the_remedy(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"needs data\.root=PATH"):
        prepare("folder", tmp_path / "s")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no image that can be read"):
        prepare("folder", tmp_path / "s", root=str(tmp_path / "empty"))
    with pytest.raises(DataError, match="no sprites"):
        prepare("sprites", tmp_path / "s", root=str(tmp_path / "empty"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="neither a folder nor a wheel"):
        prepare("sprites", tmp_path / "s", root=str(tmp_path / "file"))
    # A real pip that has no index and no file to offer.
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    with pytest.raises(DataError, match=r"pip could not fetch arcade==3\.3\.3 .*data\.root=PATH"):
        prepare("sprites", tmp_path / "s")
    assert list((cache / "sources").iterdir()) == []


def test_pip_fetches_the_wheel_once(
    tmp_path: Path, cache: Path, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A real download by the real pip, from a folder in place of the index.
    links = tmp_path / "links"
    links.mkdir()
    with zipfile.ZipFile(links / "arcade-3.3.3-py3-none-any.whl", "w") as file:
        for number in range(4):
            file.writestr(f"{INSIDE}cards/cardHearts{number}.png", make_image(20, 30, seed=number))
        file.writestr(
            "arcade-3.3.3.dist-info/METADATA", "Metadata-Version: 2.1\nName: arcade\nVersion: 3.3.3\n"
        )
        file.writestr(
            "arcade-3.3.3.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr("arcade-3.3.3.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    assert arcade_wheel() == cache / "sources" / "arcade-3.3.3-py3-none-any.whl"
    monkeypatch.delenv("PIP_FIND_LINKS")
    assert len(sprites()[0]) == 4


def test_importing_the_stream_does_not_import_torch() -> None:
    code = (
        "import sys, ldmscale.data, ldmscale.data.sources.prepare, ldmscale.data.latents.format; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=240).returncode == 0


def test_metadata_is_json(wheel: Path) -> None:
    for item in sprites(str(wheel))[0]:
        assert json.loads(json.dumps(item.metadata)) == item.metadata
