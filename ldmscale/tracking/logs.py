"""Logging of a job: one file a rank, the console for rank 0, warnings included, chatty libraries quieted."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path

from rich.logging import RichHandler

from ldmscale.distributed.environment import Ranks
from ldmscale.messages import Formatter
from ldmscale.tracking.console import terminal

# Libraries that tell at INFO (or even WARNING) what only their own developers want to know.
_QUIET = {
    "DeepSpeed": logging.WARNING,
    "deepspeed": logging.WARNING,
    "urllib3": logging.WARNING,
    "botocore": logging.WARNING,
    "aiobotocore": logging.WARNING,
    "s3fs": logging.WARNING,
    "fsspec": logging.WARNING,
    "httpx": logging.WARNING,
    "httpcore": logging.WARNING,
    "filelock": logging.WARNING,
    "PIL": logging.WARNING,
    "matplotlib": logging.WARNING,
    "wandb": logging.WARNING,
    "git": logging.WARNING,
    "transformers": logging.ERROR,
    "torch.distributed": logging.WARNING,
}

# Warnings about the insides of libraries that a user of ldmscale can do nothing about (regular expressions on
# their starts).
_IGNORED_WARNINGS = (
    r".*(all_gather_into_tensor|reduce_scatter_tensor)",  # torch renames them, DeepSpeed calls them
    r".*`torch\.distributed\.(_all_gather_base|_reduce_scatter_base)`",
    r".*barrier\(\): using the device under current context",
)


def set_up_logging(folder: Path | None, ranks: Ranks, *, level: int = logging.INFO) -> None:
    """Send log records to folder/logs/rank_00000.log (appended) and to the console; calling it again replaces
    the handlers.

    Rank 0 shows `level` and above on standard error (with colours on a terminal), the other ranks only
    errors, so that one message is not printed once a rank. With `folder` None there is no file.
    """
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if getattr(handler, "ldmscale_owned", False)]:
        root.removeHandler(handler)
        handler.close()
    handlers = [_console_handler(ranks, level)]
    if folder is not None:
        handlers.append(_file_handler(folder / "logs" / f"rank_{ranks.rank:05d}.log", ranks))
    for handler in handlers:
        handler.ldmscale_owned = True  # type: ignore[attr-defined]
        root.addHandler(handler)
    root.setLevel(level)
    logging.captureWarnings(True)
    for pattern in _IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message=pattern)
    quiet_libraries()


def quiet_libraries() -> None:
    """Raise the levels of chatty loggers.

    Once more after importing DeepSpeed, which sets its own level at import.
    """
    os.environ.setdefault(
        "TOKENIZERS_PARALLELISM", "false"
    )  # else it warns at every fork of a loading process
    os.environ.setdefault("WANDB_SILENT", "true")
    for name, level in _QUIET.items():
        logging.getLogger(name).setLevel(level)


def _file_handler(path: Path, ranks: Ranks) -> logging.Handler:
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, mode="a", encoding="utf-8")
    handler.setFormatter(Formatter(f"%(asctime)s r{ranks.rank} %(levelname)s %(name)s: %(message)s"))
    return handler


def _console_handler(ranks: Ranks, level: int) -> logging.Handler:
    handler: logging.Handler
    if not ranks.is_main:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(Formatter(f"[rank {ranks.rank}] %(levelname)s %(message)s"))
        handler.setLevel(max(level, logging.ERROR))
        return handler
    if terminal().is_terminal:
        handler = RichHandler(console=terminal(), show_path=False, log_time_format="[%X]", markup=False)
        handler.setFormatter(Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    handler.setLevel(level)
    return handler
