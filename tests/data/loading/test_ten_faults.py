"""`ldmscale index data.check=decode` on a folder with ten planted faults names all ten, and goes on after each."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

from ldmscale.data.shards.index import ShardIndex
from ldmscale.data.shards.report import check_shards

MakeImage = Callable[..., bytes]


def plant(folder: Path, make_image: MakeImage) -> dict[tuple[str, str], str]:
    """Writes shards with ten faults; returns {(shard, key): kind}."""

    def sample(
        key: str, image: bytes | None = None, caption: bytes | None = b"a caption", ending: str = "png"
    ):
        picture = make_image(seed=len(key)) if image is None else image
        record = json.dumps({"key": key}).encode()
        found = [(f"{key}.{ending}", picture), (f"{key}.json", record)]
        return found if caption is None else [*found, (f"{key}.txt", caption)]

    bomb = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + (100_000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"
    bomb += (__import__("zlib").crc32(bomb[12:29])).to_bytes(4, "big") + b"\x00\x00\x00\x00IDAT"
    whole = make_image(80, 80, seed=1)
    shards = {
        "images.tar": [
            *sample("good"),
            *sample("undecodable", b"this is no image"),
            *sample("cut", whole[: len(whole) // 2]),
            *sample("huge", bomb),
            *sample("empty", b""),
            *sample("misnamed", make_image(format="JPEG")),
        ],
        "captions.tar": [
            *sample("good"),
            *sample("blank", caption=b"  \n "),
            *sample("latin", caption="caf\u00e9".encode("latin-1")),
            *sample("wordless", caption=None),
        ],
        "names.tar": [*sample("good"), ("../../etc/evil.png", whole)],
        "cut.tar": [*sample("good"), *sample("lost", whole)],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, members in shards.items():
        with tarfile.open(folder / name, "w", format=tarfile.USTAR_FORMAT) as tar:
            for path, data in members:
                member = tarfile.TarInfo(path)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            if name == "names.tar":
                for path, kind in (("link.png", tarfile.SYMTYPE), ("device.png", tarfile.BLKTYPE)):
                    member = tarfile.TarInfo(path)
                    member.type, member.linkname = kind, "/etc/passwd"
                    tar.addfile(member)
    with tarfile.open(folder / "cut.tar") as tar:
        cut = tar.getmember("lost.png").offset_data + 700
    with open(folder / "cut.tar", "r+b") as stream:
        stream.truncate(cut)
    return {
        ("images.tar", "undecodable"): "bad_image",
        ("images.tar", "cut"): "bad_image",
        ("images.tar", "huge"): "bad_image",
        ("images.tar", "empty"): "empty_member",
        ("images.tar", "misnamed"): "wrong_extension",
        ("captions.tar", "blank"): "bad_caption",
        ("captions.tar", "latin"): "bad_caption",
        ("captions.tar", "wordless"): "missing_member",
        ("names.tar", "../../etc/evil.png"): "unsafe_name",
        ("cut.tar", ""): "truncated",
    }


def test_all_ten_are_named_and_what_is_whole_is_found(
    tmp_path: Path, make_image: MakeImage, ldmscale: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    planted = plant(tmp_path / "set", make_image)
    paths = sorted(map(str, (tmp_path / "set").glob("*.tar")))
    report = check_shards(paths, "decode")
    found = {(Path(item.shard).name, item.key): item.kind for item in report.damage}
    assert len(planted) == 10 and planted.items() <= found.items()
    reasons = {item.key: item.detail for item in report.damage}
    assert "too large: 100000x100000" in reasons["huge"] and "0xe9" in reasons["latin"]
    # Links and devices are named, too, and never followed.
    assert {("names.tar", "link.png"), ("names.tar", "device.png")} <= set(found)
    index = ShardIndex.open(paths)
    assert index.total == report.samples == 12  # what can be read at all; the rest is for the ledger
    # A shard of the pattern that is not there, and a link to nowhere, hide nothing of the rest.
    (tmp_path / "set" / "astray.tar").symlink_to("nowhere.tar")
    asked = f"data.shards=[{tmp_path / 'set'},{tmp_path / 'gone.tar'}]"
    done = ldmscale("index", asked, "data.check=decode", cwd=tmp_path)
    assert done.returncode == 2
    said = done.stdout + done.stderr
    planted |= {("astray.tar", ""): "missing_shard", ("gone.tar", ""): "missing_shard"}
    missing = [
        (shard, key, kind)
        for (shard, key), kind in planted.items()
        if not (shard in said and key in said and kind in said)
    ]
    assert missing == [] and "14 damages in 6 shards" in said, said
