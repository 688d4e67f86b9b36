"""A run whose folder is gone comes back from the copies behind `checkpoint.url`: what it is, and what it has told."""

from __future__ import annotations

import logging
from typing import Any

from ldmscale.checkpoint.remote import RemoteCheckpoints
from ldmscale.checkpoint.run_folder import RunFolder
from ldmscale.errors import ConfigError, StoppedEarlyError
from ldmscale.storage.names import TOKENIZER_FILE, WANDB_ID, has_form
from ldmscale.storage.object_store import Storage
from ldmscale.waiting import stoppable

log = logging.getLogger(__name__)

# Uploaded with every checkpoint. The configuration and the identity of the run are in the manifest.
_TOKENIZER = "tokenizer"  # a folder
BESIDE = ("metrics.jsonl", "skipped_steps.jsonl", "classes.json", _TOKENIZER)
_LARGEST = 8 << 30  # bytes of all of them: the metrics of ten million steps


def recover(folder: RunFolder, url: str | None, storage: Storage) -> None:
    """Write configuration, W&B's id and metrics of the run behind `url` into a folder that holds no run yet; rank 0 only.

    Then the run is resumed like any other: a configuration that differs is refused or told. Raises ConfigError if the
    store cannot be read: whether the run is new is then not known, and a new one would replace the other's checkpoints.
    """
    if url is None or folder.config_file.exists():
        return
    store = RemoteCheckpoints(url, storage)
    try:
        with stoppable():
            steps = store.steps()
            if not steps:
                return
            found = store.manifest(steps[-1]).state.get("run")
            about: dict[str, Any] = found if isinstance(found, dict) else {}
            names = store.get_beside(folder.path, _restorable, _LARGEST)
    except StoppedEarlyError:
        raise
    except Exception as error:  # each store's library has its own
        raise ConfigError(
            f"checkpoint.url={url} cannot be read ({error!r}), and {folder.path} holds no run: whether a run is to be "
            "resumed is not known. Mend the access to the store, or give checkpoint.url=null to begin a new run"
        ) from error
    log.warning(
        "%s is gone: the run goes on from %s (%s)", folder.path, url, ", ".join(names) or "no metrics"
    )
    if has_form(about.get("wandb_id"), WANDB_ID):
        folder.note({**folder.identity(), "wandb_id": about["wandb_id"]})
    if isinstance(about.get("config"), dict):
        folder.settle_config(about["config"])  # last: from here on the folder holds the run


def _restorable(name: str) -> bool:
    """Whether an upload writes a file of this name: one of `BESIDE`, or a file of the tokenizer's folder. Never code."""
    folder, slash, file = name.partition("/")
    if slash:
        return folder == _TOKENIZER and has_form(file, TOKENIZER_FILE)
    return name in BESIDE and name != _TOKENIZER
