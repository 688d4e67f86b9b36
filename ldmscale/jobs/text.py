"""The run's tokenizer: loaded by name, or trained on the shards' captions; stored with the run either way."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from ldmscale.config import DiffusionJob, FrozenTextConfig, TextEncoderConfig
from ldmscale.data.captions import caption_of
from ldmscale.data.encoder_tokens import EncoderTokenizer, keep
from ldmscale.data.samples import SampleReader
from ldmscale.data.tokens import Tokenizer, train_wordpiece
from ldmscale.distributed.collectives import from_main_rank
from ldmscale.errors import ConfigError, DataError
from ldmscale.frozen_text import open_text_encoder
from ldmscale.jobs.open_run import Run
from ldmscale.jobs.stored_text import stored_text
from ldmscale.models.frozen_text import FrozenTextEncoder

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
