"""What `ldmscale index` finds wrong with conditions, given as to the training job."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

from ldmscale.data.conditions.annotations import ClassLabels
from ldmscale.data.conditions.validation import Classes, ConditionChecks
from ldmscale.data.shards.report import check_shards

MakeImage = Callable[..., bytes]
WriteTar = Callable[..., str]
GOOD = {"label": 1, "boxes": [{"class": "cat", "box": [0.1, 0.1, 0.9, 0.9]}]}
# By key: what the json has instead, the size of the map, and the kinds of damage.
SAMPLES: dict[str, tuple[dict[str, object], tuple[int, int], list[str]]] = {
    "good": ({}, (20, 16), []),
    "label": ({"label": 2}, (20, 16), ["bad_label"]),
    "unlabelled": ({"label": None}, (20, 16), ["bad_label"]),
    "outside": ({"boxes": [{"class": "cat", "box": [0.1, 0.1, 1.2, 0.9]}]}, (20, 16), ["bad_boxes"]),
    "stranger": ({"boxes": [{"class": "cow", "box": [0.1, 0.1, 0.2, 0.9]}]}, (20, 16), ["bad_boxes"]),
    "size": ({}, (16, 20), ["bad_map"]),
    "all": ({"label": -1, "boxes": 3}, (1, 1), ["bad_boxes", "bad_label", "bad_map"]),
}


def plant(path: Path, make_image: MakeImage, write_tar: WriteTar) -> str:
    members = []
    for key, (instead, size, _) in SAMPLES.items():
        members += [
            (f"{key}.png", make_image(20, 16)),
            (f"{key}.map.png", make_image(*size, mode="L")),
            (f"{key}.txt", b"a caption"),
            (f"{key}.json", json.dumps(GOOD | instead).encode()),
        ]
    return write_tar(path, members)


def test_labels_boxes_and_maps_that_no_run_could_use_are_named(
    tmp_path: Path,
    make_image: MakeImage,
    write_tar: WriteTar,
    ldmscale: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    shard = plant(tmp_path / "a.tar", make_image, write_tar)
    cats = ClassLabels("json:boxes", 1, ("cat",))
    checks = ConditionChecks(
        Classes("json:label", ClassLabels("json:label", 2)), Classes("json:boxes", cats), map_classes=256
    )
    for check in ("headers", "decode"):
        report = check_shards([shard], check, conditions=checks)
        found = {key: sorted(d.kind for d in report.damage if d.key == key) for key in SAMPLES}
        assert found == {key: kinds for key, (_, _, kinds) in SAMPLES.items()}
    assert any("1.2" in damage.detail and "outside" in damage.detail for damage in report.damage)
    # Looked at and asked again, it is the record; asked for less, or for other classes, it is another look.
    assert check_shards([shard], "decode", conditions=checks).looked_through == 0
    assert check_shards([shard], "decode").damaged == 0
    fewer = check_shards([shard], "decode", conditions=ConditionChecks(map_classes=9))
    assert fewer.damage_counts == {"bad_map": len(SAMPLES)} and fewer.looked_through == 1
    (tmp_path / "names.txt").write_text("cat\n")
    done = ldmscale(
        "index", f"data.shards={shard}", "class_embedder=imagenet", "class_embedder.classes=2", "layout=found",
        "layout.names=names.txt", "spatial=semantic", "spatial.map_classes=256", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    said = done.stdout + done.stderr
    for key, (_, _, kinds) in SAMPLES.items():
        assert all(f"{kind}: {shard} {key}:" in said for kind in kinds), (key, said)
    assert "the label 2 is out of range: there are 2 classes" in said
    assert "has 16x20 pixels, its image 20x16" in said and "there is no class 'cow' among" in said


def test_names_that_are_found_may_be_any() -> None:
    checks = ConditionChecks(labels=Classes("json:label", None))
    members = {"json": json.dumps({"label": "whatever"}).encode()}
    assert list(checks.faults(members, lambda: None, "headers", 10)) == []
    assert [kind for kind, _ in checks.faults({}, lambda: None, "headers", 10)] == ["bad_label"]
    assert checks.members == {"json"} and not checks.nothing and ConditionChecks().nothing
    assert ConditionChecks(map_classes=2).members == {"map.png"}
