"""Copies of a run's checkpoints behind a URL (an object store, another file system).

    URL/step_00001000/rank_*.safetensors COMPLETE manifest.json
    URL/beside/metrics.jsonl ...       files of the run, as they were at the last upload
    URL/starts/00000003.json           which start may upload, see storage/upload_claim.py

An object store cannot rename a folder. The manifest, uploaded last and removed first, makes a checkpoint count.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from ldmscale.checkpoint import manifest as manifests
from ldmscale.checkpoint.folders import folder_name, step_of
from ldmscale.checkpoint.manifest import Manifest, parse_manifest
from ldmscale.checkpoint.shards import COMPLETE
from ldmscale.errors import CheckpointError, DataError
from ldmscale.storage.atomic import sync
from ldmscale.storage.names import shown
from ldmscale.storage.object_store import Storage
from ldmscale.storage.store_folder import StoreFolder
from ldmscale.storage.upload_claim import Claim

log = logging.getLogger(__name__)

_BESIDE = "beside"
_STARTS = "starts"
_LARGEST_TEXT = 1 << 30  # bytes of a manifest


class RemoteCheckpoints:
    """One process's view of them. Requests are retried as `storage` says.

    Methods raise StoreError where the store cannot be reached, AbsentError where a checkpoint is not there, and OSError
    where a local file cannot be read or written.
    """

    def __init__(self, url: str, storage: Storage | None = None) -> None:
        self.url = url.rstrip("/")
        self._store = StoreFolder(self.url, storage or Storage())
        self._claim: Claim | None = None

    def claim(self, owner: str) -> None:
        """Keep earlier starts from uploading, once; `owner` names the run folder for messages."""
        if self._claim is None:
            self._claim = Claim(StoreFolder(f"{self.url}/{_STARTS}", self._store.storage), owner)

    def check_claim(self) -> None:
        """Raise LeaseLostError if a later start has claimed the URL."""
        if self._claim is not None:
            self._claim.check()

    def steps(self) -> list[int]:
        """Steps of the checkpoints that count, oldest first."""
        found = [step_of(Path(name)) for name in self._store.names()]
        return sorted(step for step in found if step is not None and self._counts(step))

    def _counts(self, step: int) -> bool:
        return self._store.size(_place(step, manifests.NAME)) is not None

    def put(self, folder: Path, names: list[str]) -> None:
        """Upload some files of a checkpoint's folder."""
        self._store.make(folder.name)
        for name in names:
            self._store.upload(folder / name, f"{folder.name}/{name}")

    def withdraw(self, step: int) -> None:
        """Remove the manifest of a checkpoint, before any rank replaces its files."""
        if self._counts(step):
            self._store.remove(_place(step, manifests.NAME))

    def publish(self, folder: Path) -> None:
        """Upload what makes the checkpoint count, when its other files are there."""
        self.put(folder, [COMPLETE, manifests.NAME])

    def put_beside(self, root: Path, names: Sequence[str]) -> None:
        """Upload files of the run's folder `root`, and all in its subfolders of these names. Missing ones are left out."""
        files: list[Path] = []
        for name in names:
            files += (root / name).rglob("*") if (root / name).is_dir() else [root / name]
        for path in (path for path in files if path.is_file()):
            place = f"{_BESIDE}/{path.relative_to(root).as_posix()}"
            self._store.make(place.rpartition("/")[0])
            self._store.upload(path, place)

    def get_beside(self, root: Path, wanted: Callable[[str], bool], most_bytes: int) -> list[str]:
        """Download the files of the run into its folder; returns their names.

        Anyone who may write to the store can put files there. Those whose names are not `wanted`, and those beyond
        `most_bytes` in all, are left in the store, which is logged.
        """
        found = self._store.below(_BESIDE)
        names, left = [], most_bytes
        for name in sorted(filter(wanted, found)):
            if found[name].size > left:
                log.warning("%s/%s/%s has %d bytes: left there", self.url, _BESIDE, name, found[name].size)
                continue
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            self._store.download(f"{_BESIDE}/{name}", root / name, most_bytes=left)
            left -= found[name].size
            names.append(name)
        if foreign := sorted(name for name in found if not wanted(name)):
            log.warning(
                "%s/%s holds %d files that no upload of a run writes, left there: %s",
                self.url, _BESIDE, len(foreign), ", ".join(map(shown, foreign[:5])),
            )  # fmt: skip
        return names

    def manifest(self, step: int) -> Manifest:
        """A checkpoint's manifest there. Raises CheckpointError where it is damaged."""
        source = f"{self.url}/{_place(step, manifests.NAME)}"
        return parse_manifest(self._read(step, manifests.NAME), source)

    def _read(self, step: int, name: str) -> bytes:
        size = self._store.size(_place(step, name))
        if size is not None and size > _LARGEST_TEXT:
            raise CheckpointError(
                f"{self.url}/{_place(step, name)} has {size} bytes, expected {_LARGEST_TEXT} at most: remove that checkpoint"
            )
        return self._store.storage.content(f"{self.url}/{_place(step, name)}")

    def get_small(self, step: int, folder: Path) -> None:
        """Download manifest and COMPLETE into a folder."""
        for name in (manifests.NAME, COMPLETE):
            (folder / name).write_bytes(self._read(step, name))
            sync(folder / name)

    def get(self, step: int, name: str, size: int, folder: Path) -> None:
        """Download one file of `size` bytes into a folder, flushed to the disk."""
        self._store.download(_place(step, name), folder / name, most_bytes=size)
        sync(folder / name)

    def remove(self, step: int) -> None:
        """Remove a checkpoint. A failure is logged and does not stop the run."""
        try:
            self.withdraw(step)
            self._store.remove_folder(folder_name(step))
        except DataError as error:
            log.warning("cannot remove step %d from %s: %s", step, self.url, error)


def _place(step: int, name: str) -> str:
    return f"{folder_name(step)}/{name}"
