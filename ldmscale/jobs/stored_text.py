"""Captions that a frozen text encoder encodes once, before the training: `text_encoder.precompute`.

The vectors lie in the run's text_embeddings/ (tokens.npy, vectors.npy, encoder.json), whole or not at all. A start
encodes what is not there yet, with the weights that made the others.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from ldmscale.config import DiffusionJob, FrozenTextConfig
from ldmscale.data.captions import caption_of
from ldmscale.data.encoder_tokens import EncoderTokenizer
from ldmscale.data.mixture import Mixture
from ldmscale.data.samples import SampleReader
from ldmscale.distributed.collectives import from_main_rank
from ldmscale.errors import ConfigError, DataError
from ldmscale.frozen_text import open_text_encoder
from ldmscale.jobs.open_index import open_index
from ldmscale.jobs.open_run import Run
from ldmscale.models.frozen_text import StoredTextEncoder

log = logging.getLogger(__name__)

BATCH = 64  # captions encoded at a time
_GIB = 2**30


def stored_text(
    run: Run, config: DiffusionJob, text: FrozenTextConfig, tokenizer: EncoderTokenizer
) -> StoredTextEncoder:
    """The vectors of every caption that the run may meet; rank 0 makes those that are not there. Collective.

    Raises ConfigError where they take more room than `text.precompute_max_gib`, or where those that are there were made
    by another encoder.
    """
    indices = [run.index]
    if config.data.heldout_shards is not None:
        indices.append(open_index(config.data.heldout_shards, config.data, run.ranks))
    folder = run.folder.text_embeddings

    def settle() -> None:
        wanted = _distinct_rows(tokenizer, config, indices, text)
        _complete(folder, wanted, text, run.device)

    from_main_rank(settle)
    tokens, vectors, digest = _open(folder)
    return StoredTextEncoder(tokens, vectors, digest)


def _distinct_rows(
    tokenizer: EncoderTokenizer, config: DiffusionJob, indices: list[Mixture], text: FrozenTextConfig
) -> np.ndarray:
    """Token ids int64 [N, L] of the captions of all samples, of the prompts, and of the empty caption."""
    room = 4 * text.max_tokens * text.width
    found: dict[bytes, np.ndarray] = {}
    for captions in _in_batches(config, indices):
        rows = tokenizer.encode(captions)
        found.update((row.tobytes(), row) for row in rows)
        if len(found) * room > text.precompute_max_gib * _GIB:
            raise ConfigError(
                f"text_encoder.precompute=true, but the vectors of {len(found)} and more captions take over "
                f"text_encoder.precompute_max_gib={text.precompute_max_gib:g}: give text_encoder.precompute=false, which "
                "encodes each batch, or more room"
            )
    return np.stack(list(found.values()))


def _in_batches(config: DiffusionJob, indices: list[Mixture]) -> Iterator[list[str]]:
    yield ["", *config.preview.prompts]
    for index in indices:
        reader = SampleReader(index)
        for shard, count in enumerate(index.counts.tolist()):
            captions = []
            for number in range(count):
                try:
                    captions.append(caption_of(reader.read(shard, number).members, config.data.caption))
                except DataError as error:
                    log.debug("a sample without a caption is not trained on: %s", error)
            yield captions
        reader.close()


def _complete(folder: Path, wanted: np.ndarray, text: FrozenTextConfig, device: torch.device) -> None:
    """Encode the rows of `wanted` that are not in `folder`, and write all of them there."""
    encoder = open_text_encoder(text).to(device)
    digest = encoder.digest()
    tokens, vectors = wanted[:0], np.empty((0, text.max_tokens, text.width), np.float32)
    if (folder / "encoder.json").exists():
        tokens, vectors, before = _open(folder)
        if before != digest:
            raise ConfigError(
                f"{folder} was made with the text encoder {before}, and text_encoder.path now holds {digest}: give the "
                "encoder of before, or another run.name"
            )
    known = {row.tobytes() for row in tokens}
    new = wanted[[row.tobytes() not in known for row in wanted]]
    if not len(new):
        return
    made = [
        encoder(torch.from_numpy(new[at : at + BATCH]).to(device)).cpu() for at in range(0, len(new), BATCH)
    ]
    _write(folder, np.concatenate([tokens, new]), np.concatenate([vectors, torch.cat(made).numpy()]), digest)
    log.info(
        "encoded %d distinct captions into %s, %.2f GiB in all", len(new), folder,
        (len(tokens) + len(new)) * text.max_tokens * text.width * 4 / _GIB,
    )  # fmt: skip


def _write(folder: Path, tokens: np.ndarray, vectors: np.ndarray, digest: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "encoder.json").unlink(missing_ok=True)
    for name, values in (("tokens", tokens), ("vectors", vectors)):
        beside = folder / f".{name}.npy"
        np.save(beside, values)
        os.replace(beside, folder / f"{name}.npy")
    (folder / "encoder.json").write_text(json.dumps({"digest": digest, "captions": len(tokens)}) + "\n")


def _open(folder: Path) -> tuple[np.ndarray, np.ndarray, str]:
    """Rows of token ids, their vectors mapped from the file, and the encoder's digest."""
    digest = json.loads((folder / "encoder.json").read_text())["digest"]
    return np.load(folder / "tokens.npy"), np.load(folder / "vectors.npy", mmap_mode="r"), str(digest)
