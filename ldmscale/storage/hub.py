"""Downloads from the Hugging Face hub: a copy in the hub's local cache is used first.

Without a network the hub's client retries for most of a minute, so the cache is asked before the network. Errors are
the client's own, of many kinds (no network, no such name, no access): callers say in theirs what the user can do.
Imports no torch; huggingface_hub is imported when a file is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def cached_first(load: Callable[[bool], T]) -> T:
    """Returns `load(True)`, which may read local files only, or `load(False)` where the first raises OSError.

    `load` passes its argument on as `local_files_only` of transformers' or huggingface_hub's functions.
    """
    try:
        return load(True)
    except OSError:  # the hub's LocalEntryNotFoundError is one
        return load(False)


def hub_file(repository: str, name: str) -> Path:
    """The local copy of the file `name` of the repository OWNER/NAME. Raises what the hub's client raises."""
    from huggingface_hub import hf_hub_download

    return Path(cached_first(lambda local: str(hf_hub_download(repository, name, local_files_only=local))))
