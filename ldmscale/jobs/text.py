"""The run's tokenizer: loaded by name, or trained on the shards' captions; stored with the run either way."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from ldmscale.config import DiffusionJob, TextEncoderConfig
from ldmscale.data.captions import caption_of
from ldmscale.data.samples import SampleReader
from ldmscale.data.tokens import Tokenizer, train_wordpiece
from ldmscale.distributed.collectives import from_main_rank
from ldmscale.errors import ConfigError, DataError
from ldmscale.jobs.open_run import Run

log = logging.getLogger(__name__)

TRAINED_ON = 200_000  # captions at most


def settle_tokenizer(run: Run, config: DiffusionJob, text: TextEncoderConfig) -> Tokenizer:
    """The tokenizer in the run folder, which rank 0 puts there when the run starts. Collective."""
    folder = run.folder.tokenizer

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
