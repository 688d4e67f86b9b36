"""Copies of a run's checkpoints behind an fsspec URL (an object store, another file system).

    URL/step_00001000/rank_*.safetensors COMPLETE manifest.json
    URL/beside/metrics.jsonl ...       files of the run, as they were at the last upload
    URL/starts/00000003.json           which start may upload, see claim.py

An object store moves nothing in one piece; there the manifest, uploaded last and removed first, is what makes
a checkpoint count.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec

from ldmscale.checkpoint import manifest as manifests
from ldmscale.checkpoint.folders import folder_name, step_of
from ldmscale.checkpoint.shards import COMPLETE
from ldmscale.storage.atomic import sync
from ldmscale.storage.upload_claim import Claim

log = logging.getLogger(__name__)

_BESIDE = "beside"
_STARTS = "starts"


class RemoteCheckpoints:
    """One process's view of them. Every method may raise OSError, or what the store's library raises."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._fs: Any = None
        self._root = ""
        self._claim: Claim | None = None

    def claim(self, owner: str) -> None:
        """Keep earlier starts from uploading, once; `owner` tells people whose claim it is."""
        if self._claim is None:
            place = self._place(_STARTS)
            self._claim = Claim(self._fs, place, owner)

    def check_claim(self) -> None:
        """Raise LeaseLostError if a later start has claimed the URL."""
        if self._claim is not None:
            self._claim.check()

    def _place(self, name: str, file: str = "") -> str:
        if self._fs is None:
            self._fs, self._root = fsspec.core.url_to_fs(self.url)
        return "/".join(filter(None, (self._root, name, file)))

    def steps(self) -> list[int]:
        """Steps of the checkpoints that count, oldest first."""
        root = self._place("")
        self._fs.invalidate_cache()
        try:
            found = [step_of(Path(path)) for path in self._fs.ls(root, detail=False)]
        except FileNotFoundError:
            return []
        return sorted(step for step in found if step is not None and self._counts(step))

    def _counts(self, step: int) -> bool:
        return bool(self._fs.exists(self._place(folder_name(step), manifests.NAME)))

    def put(self, folder: Path, names: list[str]) -> None:
        """Upload some files of a checkpoint's folder."""
        self._place("")
        self._fs.makedirs(self._place(folder.name), exist_ok=True)
        for name in names:
            self._fs.put_file(str(folder / name), self._place(folder.name, name))

    def withdraw(self, step: int) -> None:
        """Make a checkpoint not count any more, before its files are replaced."""
        place = self._place(folder_name(step), manifests.NAME)
        if self._fs.exists(place):
            self._fs.rm_file(place)

    def publish(self, folder: Path) -> None:
        """Upload what makes the checkpoint count, when its other files are there."""
        self.put(folder, [COMPLETE, manifests.NAME])

    def put_beside(self, root: Path, names: Sequence[str]) -> None:
        """Upload files of the run's folder `root`, and all in its subfolders of these names; what is missing is left out."""
        self._place("")
        files: list[Path] = []
        for name in names:
            files += (root / name).rglob("*") if (root / name).is_dir() else [root / name]
        for path in (path for path in files if path.is_file()):
            place = self._place(_BESIDE, path.relative_to(root).as_posix())
            self._fs.makedirs(place.rpartition("/")[0], exist_ok=True)
            self._fs.put_file(str(path), place)

    def get_beside(self, root: Path) -> list[str]:
        """Download the files of the run into its folder; returns their names."""
        top = self._place(_BESIDE)
        try:
            found = [str(place) for place in self._fs.find(top)]
        except FileNotFoundError:
            return []
        names = [place.rpartition(f"/{_BESIDE}/")[2] for place in found]
        for place, name in zip(found, names, strict=True):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            self._fs.get_file(place, str(root / name))
        return names

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint's manifest there says besides tensors."""
        state: dict[str, Any] = json.loads(self._read(step, manifests.NAME))["state"]
        return state

    def files(self, step: int) -> list[str]:
        """Names of a checkpoint's files of tensors."""
        return [file["name"] for file in json.loads(self._read(step, manifests.NAME))["files"]]

    def _read(self, step: int, name: str) -> bytes:
        place = self._place(folder_name(step), name)
        content: bytes = self._fs.cat_file(place)
        return content

    def get_small(self, step: int, folder: Path) -> None:
        """Download manifest and COMPLETE into a folder."""
        for name in (manifests.NAME, COMPLETE):
            (folder / name).write_bytes(self._read(step, name))
            sync(folder / name)

    def get(self, step: int, name: str, folder: Path) -> None:
        """Download one file into a folder, flushed to the disk."""
        place = self._place(folder_name(step), name)
        self._fs.get_file(place, str(folder / name))
        sync(folder / name)

    def remove(self, step: int) -> None:
        """Remove a checkpoint. Failing to is no reason to stop a run."""
        try:
            self.withdraw(step)
            self._fs.rm(self._place(folder_name(step)), recursive=True)
        except Exception as error:  # each store's library has its own
            log.warning("cannot remove step %d from %s: %s", step, self.url, error)
