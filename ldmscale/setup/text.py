"""The run's tokenizer: loaded by name, or trained on the shards' captions; stored with the run either way."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch

from ldmscale.builders.networks import open_text_encoder
from ldmscale.config import DiffusionJob, FrozenTextConfig, TextEncoderConfig
from ldmscale.data.conditions.annotations import caption_of
from ldmscale.data.latents.format import TextFormat
from ldmscale.data.shards.mixture import Mixture
from ldmscale.data.shards.reader import SampleReader
from ldmscale.data.tokenizers.bert import Tokenizer, train_wordpiece
from ldmscale.data.tokenizers.pretrained import EncoderTokenizer, keep
from ldmscale.distributed.collectives import from_main_rank
from ldmscale.errors import ConfigError, DataError
from ldmscale.models.text_encoder import FrozenTextEncoder, StoredTextEncoder
from ldmscale.setup.index import open_index
from ldmscale.setup.run import Run
from ldmscale.storage.atomic import finished_file, write_json
from ldmscale.storage.given_files import refuse_lfs_pointer
from ldmscale.storage.plain_values import checked, parsed_object

log = logging.getLogger(__name__)

TRAINED_ON = 200_000  # captions at most


def settle_tokenizer(
    run: Run, config: DiffusionJob, text: TextEncoderConfig | FrozenTextConfig
) -> Tokenizer | EncoderTokenizer:
    """The tokenizer in the run folder, which rank 0 puts there when the run starts. Collective."""
    folder = run.folder.tokenizer
    if isinstance(text, FrozenTextConfig):
        from_main_rank(lambda: None if (folder / "tokenizer.json").exists() else keep(text.path, folder))
        return EncoderTokenizer.load(folder, text.max_tokens)

    def settle() -> None:
        if (folder / "tokenizer.json").exists():
            return
        if text.tokenizer == "train":
            train_wordpiece(_captions(run, config.data.caption), text.vocab_size, folder)
        else:
            Tokenizer.load(text.tokenizer, text.max_tokens).save(folder)

    from_main_rank(settle)
    tokenizer = Tokenizer.load(folder, text.max_tokens)
    if tokenizer.vocab_size > text.vocab_size:
        raise ConfigError(
            f"text_encoder.vocab_size={text.vocab_size}, but the tokenizer {text.tokenizer} has {tokenizer.vocab_size} ids: "
            f"give text_encoder.vocab_size={tokenizer.vocab_size}"
        )
    return tokenizer


def open_frozen_text(
    run: Run, config: DiffusionJob, tokenizer: Tokenizer | EncoderTokenizer | None
) -> FrozenTextEncoder | None:
    """The frozen text encoder on this rank's device, noted in run.json; None where the model has none. Collective.

    Rank 0 opens it first: where it comes from the model hub, the others find it in the local copy. With
    text_encoder.precompute rank 0 alone has it, for as long as it encodes the captions.
    """
    text = config.text_encoder
    if not isinstance(text, FrozenTextConfig):
        return None
    if text.precompute:
        assert isinstance(tokenizer, EncoderTokenizer)
        stored = stored_text(run, config, text, tokenizer)
        run.note("text_encoder", {"path": text.path, "digest": stored.digest()})
        return stored
    opened: list[FrozenTextEncoder] = []
    from_main_rank(lambda: opened.append(open_text_encoder(text)))
    encoder = opened[0] if opened else open_text_encoder(text)
    found = encoder.digest()
    run.note("text_encoder", {"path": text.path, "digest": found})
    count = sum(weight.numel() for weight in encoder.parameters())
    log.info(
        "frozen %s encoder %s of %s parameters, %s, %s", text.kind, text.path, f"{count:,}", text.dtype, found
    )
    return encoder.to(run.device)


def open_caption_encoder(
    text: FrozenTextConfig, device: torch.device
) -> tuple[FrozenTextEncoder, EncoderTokenizer]:
    """The frozen text encoder on a device, and its tokenizer, outside of any run."""
    with tempfile.TemporaryDirectory() as folder:
        keep(text.path, Path(folder) / "tokenizer")
        tokenizer = EncoderTokenizer.load(Path(folder) / "tokenizer", text.max_tokens)
    return open_text_encoder(text).to(device), tokenizer


def check_stored_text(
    config: DiffusionJob, form: TextFormat, encoder: FrozenTextEncoder, tokenizer: EncoderTokenizer
) -> None:
    """Compares the text encodings that are stored with the latents with what the run's encoder would make.

    Raises:
        DataError: if they are of another encoder, another tokenizer, or another caption.
    """
    otherwise = "or data.stored_text=false, which runs the encoder"
    faults = [
        f"the text encodings of the latents were made with {name} {there}, this run has {here}: give the text_encoder= that "
        f"made them, {otherwise}"
        for name, there, here in (
            ("the text encoder", form.encoder, encoder.digest()),
            ("max_tokens", form.max_tokens, tokenizer.max_tokens),
            ("width", form.width, encoder.width),
            ("the tokenizer", form.tokenizer, tokenizer.fingerprint),
        )
        if there != here
    ]
    if config.data.caption != "txt":
        faults.append(
            f"data.caption={config.data.caption}, but the stored text encodings are of the caption that the latents were made "
            f"with: give data.caption=txt, {otherwise}"
        )
    if faults:
        raise DataError(faults)


def _captions(run: Run, source: str) -> Iterator[str]:
    reader = SampleReader(run.index)
    left = TRAINED_ON
    for shard, count in enumerate(run.index.counts.tolist()):
        for number in range(min(count, left)):
            try:
                yield caption_of(reader.read(shard, number).members, source)
            except DataError as error:
                log.debug("a sample without a caption does not shape the vocabulary: %s", error)
        left -= min(count, left)
    reader.close()


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
        with finished_file(folder / f"{name}.npy") as temporary, open(temporary, "wb") as stream:
            np.save(stream, values)
    write_json(folder / "encoder.json", {"digest": digest, "captions": len(tokens)}, indent=None)


def _open(folder: Path) -> tuple[np.ndarray, np.ndarray, str]:
    """Rows of token ids, their vectors mapped from the file, and the encoder's digest."""
    for name in ("encoder.json", "tokens.npy", "vectors.npy"):
        refuse_lfs_pointer(folder / name)
    try:
        digest = checked(str, parsed_object((folder / "encoder.json").read_bytes()).get("digest"))
        tokens = np.load(folder / "tokens.npy", allow_pickle=False)
        vectors = np.load(folder / "vectors.npy", mmap_mode="r", allow_pickle=False)
        if not (isinstance(tokens, np.ndarray) and isinstance(vectors, np.ndarray)):
            raise ValueError("an archive of arrays in place of one")
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise DataError(f"{folder} is damaged ({error}): delete it, and start again") from error
    return tokens, vectors, str(digest)
