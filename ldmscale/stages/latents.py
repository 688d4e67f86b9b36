"""Stage 2: encode shards of images into shards of latents, by any number of processes that may come and go.

A thread reads ahead (or data.workers processes do), the device encodes, a thread writes behind, and another one uploads
what goes to a store. The bytes of a shard are the same whatever the batch, the processes and the workers are, on a CPU;
see `Encoder`.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from ldmscale.data.latents.format import LatentFormat
from ldmscale.data.latents.work_queue import Claim, Claims
from ldmscale.data.latents.writer import LatentShardWriter, Source
from ldmscale.data.loading.shard_chunks import Chunk, ChunkReader, Span
from ldmscale.data.loading.skipped_samples import FREE_FAULTS, Ledger
from ldmscale.data.loading.transforms import ImageItem
from ldmscale.data.loading.workers import TURN_SECONDS, end, next_of, start_of_workers
from ldmscale.data.shards.reader import SampleReader
from ldmscale.data.shards.urls import is_local
from ldmscale.data.tokenizers.pretrained import EncoderTokenizer
from ldmscale.distributed import rng as draws
from ldmscale.errors import DataError, StoppedEarlyError
from ldmscale.models.bottleneck import Posterior
from ldmscale.models.text_encoder import FrozenTextEncoder
from ldmscale.stages.first_stage import FirstStage
from ldmscale.storage.lease import LeaseLostError
from ldmscale.storage.object_store import StoreError
from ldmscale.waiting import Wait, make_stoppable

log = logging.getLogger(__name__)

_BEHIND = 3  # batches that wait to be written
PREFETCH_CHUNKS = 2  # that each loading process prepares ahead
_UPLOADING = 1  # shards that wait to be uploaded behind the one that is
_POLL_SECONDS = 0.5


class Encoder:
    """Images to what is stored, so that neighbours in the batch change nothing.

    On a CPU every image is encoded alone, by one thread, several at a time: matrix products of other shapes, and other
    numbers of threads, round in other ways (1e-6 of a latent in float32). On a GPU batches are filled up to `batch`:
    there, latents follow the batch size and the kind of device by as much as its kernels do.
    """

    def __init__(self, first_stage: FirstStage, batch: int) -> None:
        self.first_stage, self.batch = first_stage, batch
        self._threads = (
            ThreadPoolExecutor(
                torch.get_num_threads(), "encoder", initializer=lambda: torch.set_num_threads(1)
            )
            if first_stage.device.type == "cpu"
            else None
        )

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [b,3,H,W] -> moments [b,2C,h,w] or VQ's vectors [b,C,h,w], float32 on the device."""
        if self._threads is not None:
            return torch.cat(list(self._threads.map(self.first_stage.moments, torch.split(images, 1))))
        missing = self.batch - len(images)
        full = functional.pad(images, (0, 0, 0, 0, 0, 0, 0, missing)) if missing else images
        return self.first_stage.moments(full)[: len(images)]

    def text(self, encoder: FrozenTextEncoder, ids: Tensor) -> Tensor:
        """int64 [b,L] -> float32 [b,L,D], likewise."""
        if self._threads is not None:
            return torch.cat(list(self._threads.map(encoder, torch.split(ids, 1))))
        full = functional.pad(ids, (0, 0, 0, self.batch - len(ids)))
        encoded: Tensor = encoder(full.to(self.first_stage.device))
        return encoded[: len(ids)]

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown()


@dataclass(frozen=True, kw_only=True)
class LatentsWork:
    """How every shard of a set of latents is made.

    Attributes:
        reader: reads the shards of images.
        item: makes the image, caption and tokens of a sample.
        first_stage: encodes.
        format: of the set.
        sources: what each shard is made of.
        ledger: takes down what cannot be used.
        text: the frozen text encoder whose outputs are stored, and its tokenizer; None: none are.
        batch: images encoded at a time.
        workers: processes that read; 0: a thread.
        max_bad_share: of a shard's samples.
    """

    reader: SampleReader
    item: ImageItem
    first_stage: FirstStage
    format: LatentFormat
    sources: Sequence[Source]
    ledger: Ledger
    text: tuple[FrozenTextEncoder, EncoderTokenizer] | None = None
    batch: int = 16
    workers: int = 0
    max_bad_share: float = 1.0


@dataclass
class _Shard:
    """A shard in the making. `write` and `drop` are called by one thread."""

    work: LatentsWork
    claim: Claim
    lost: bool = False
    files: ExitStack = field(default_factory=ExitStack)
    writer: LatentShardWriter | None = None

    def write(self, chunk: Chunk, moments: Sequence[Tensor], text: Tensor | None) -> None:
        """Adds a chunk. `moments`: of the images, and of the mirrored ones. `text`: of the captions."""
        try:
            of_captions = None if text is None else text.cpu().numpy()
            self._write(chunk, [each.cpu().numpy() for each in moments], of_captions)
        except BaseException:
            self.lost = True  # what is half written must not appear
            raise

    def finish(self) -> None:
        """The shard appears, unless another process has taken it over."""
        try:
            self.files.close()
        except LeaseLostError as error:
            log.warning("shard %s is left to another process: %s", self.claim.name, error)
        else:
            assert self.writer is not None
            log.info("shard %s: %d samples", self.claim.name, self.writer.samples)
        self.claim.lease.release()

    def _write(self, chunk: Chunk, moments: Sequence[np.ndarray], text: np.ndarray | None) -> None:
        number, work = self.claim.number, self.work
        if self.writer is None:
            self.writer = LatentShardWriter(
                self.claim.place, self.claim.name, work.format, work.sources[number], self.claim.lease.check
            )
            self.files.enter_context(self.writer)
        url = work.reader.index.shards[number]
        refused = list(chunk.skipped)
        for place, row in enumerate(chunk.rows):
            views = [each[place] for each in moments]
            try:
                self.writer.write(
                    row.key, views[0], row.caption, row.metadata,
                    flipped=views[1] if len(views) > 1 else None, tokens=row.tokens, bucket=chunk.span.bucket,
                    view=row.view, captions=row.captions, text_tokens=row.text_tokens,
                    text=None if text is None else text[place],
                )  # fmt: skip
            except DataError as error:
                refused.append((row.key, str(error)))
        for key, reason in refused:
            self.writer.skipped += 1
            work.ledger.record(shard=url, key=key, reason=reason, position=None)
        count = int(work.reader.index.counts[number])
        if self.writer.skipped > max(FREE_FAULTS, work.max_bad_share * count):
            raise DataError(
                f"{self.writer.skipped} of the {count} samples of {url} cannot be used, more than "
                f"data.max_bad_share={work.max_bad_share}; {work.ledger.path} names them"
            )

    def drop(self) -> None:
        """Forgets what was made of it, and leaves it to others."""
        error = LeaseLostError("dropped")
        self.files.__exit__(LeaseLostError, error, None)
        self.claim.lease.release()


def make_shards(work: LatentsWork, claims: Claims, stopped: Callable[[], bool]) -> bool:
    """Makes shards until all are finished, by whomever, and says True; False if it was stopped.

    A shard in the making when it is stopped is dropped. Where others make the last ones it waits for them: should they
    die, their shards are made here.

    Raises:
        DataError: if too much of a shard cannot be used, or a finished one is of another make.
        StoreError: if the store of the images or of the latents cannot be reached.
    """
    others: Wait | None = None
    with _Line(work, claims, stopped) as line:
        while not claims.all_finished():
            if stopped():
                return False
            if line.run():
                others = None
                continue
            # No time limit: the claims of the dead run out, and then their shards are made here.
            others = others or Wait(
                partial(_made_by_others, claims), limit_seconds=math.inf, obeys_stop=False
            )
            others.turn(_POLL_SECONDS)
    return True


def _made_by_others(claims: Claims) -> str:
    return (
        f"the last {claims.unfinished} shards, which other processes make; a claim of one that died runs out after "
        "latents.claim_timeout_seconds"
    )


class _Line:
    """Reader, encoder and writer of this process, each at work on another batch."""

    def __init__(self, work: LatentsWork, claims: Claims, stopped: Callable[[], bool]) -> None:
        self._work, self._claims, self._stopped = work, claims, stopped
        self._shards: dict[int, _Shard] = {}  # by the claim's number
        self._claimed = 0
        self._encoder = Encoder(work.first_stage, work.batch)
        # A stop must not wait for a store that does not answer: what is not finished is dropped.
        self._ahead, self._behind = (
            ThreadPoolExecutor(1, name, make_stoppable) for name in ("reader", "writer")
        )
        self._pending: deque[Future[None]] = deque()
        self._uploads = ThreadPoolExecutor(1, "uploader", make_stoppable) if claims.place.remote else None
        self._uploading: deque[Future[None]] = deque()
        remote = any(not is_local(url) for url in work.reader.index.shards)
        # As in `Loader`: stores have threads of their own, which do not survive a fork. Workers only read: where images
        # are local they ask no store, wherever latents go.
        context = None if not work.workers else "forkserver" if remote else "fork"
        self._loader: DataLoader[Chunk] = DataLoader(
            ChunkReader(work.reader, work.item, None if work.text is None else work.text[1]),
            batch_size=None,
            sampler=_Spans(self),
            num_workers=work.workers,
            collate_fn=_as_it_is,
            prefetch_factor=PREFETCH_CHUNKS if work.workers else None,
            timeout=TURN_SECONDS if work.workers else 0.0,
            multiprocessing_context=context,
            worker_init_fn=start_of_workers() if work.workers else None,
            persistent_workers=work.workers > 0,
            generator=torch.Generator().manual_seed(0),
        )

    def __enter__(self) -> _Line:
        return self

    def __exit__(self, *_: object) -> None:
        self._ahead.shutdown()
        self._behind.shutdown()
        if self._uploads is not None:
            self._uploads.shutdown()
        self._drop_all()
        self._encoder.close()
        end(getattr(self._loader, "_iterator", None), at_once=self._stopped())

    def run(self) -> int:
        """Makes whatever can be claimed; the number of batches that were."""
        try:
            return self._run()
        except StoppedEarlyError:
            if not self._stopped():
                raise
            return 0

    def _run(self) -> int:
        chunks, done = iter(self._loader), 0
        ahead = self._ahead.submit(_next_or_none, chunks)
        while (chunk := ahead.result()) is not None and not self._stopped():
            ahead = self._ahead.submit(_next_or_none, chunks)
            if chunk.unreachable:
                raise StoreError(chunk.unreachable)
            self._encode(chunk)
            done += 1
        if not self._stopped():
            _wait(self._pending, 0)
            _wait(self._uploading, 0)
        return done

    def spans(self) -> Iterator[Span]:
        """Claims shards as they are asked for."""
        while not self._stopped():
            claim = self._claims.next(self._lose)
            if claim is None:
                return
            self._claimed += 1
            mine, shard = self._claimed, _Shard(self._work, claim)
            self._shards[mine] = shard
            for start, stop, bucket, last in self._batches(claim.number):
                if shard.lost or self._stopped():
                    break
                yield Span(mine, claim.number, start, stop, last, bucket)

    def _batches(self, shard: int) -> Iterator[tuple[int, int, int, bool]]:
        """Start, stop and bucket of each batch of a shard, and whether it is the last: each of one bucket."""
        counts = self._work.reader.index.bucket_counts[shard].tolist()
        total, begin = sum(counts), 0
        if total == 0:
            yield 0, 0, 0, True
        for bucket, count in enumerate(counts):
            for start in range(begin, begin + count, self._work.batch):
                stop = min(start + self._work.batch, begin + count)
                yield start, stop, bucket, stop == total
            begin += count

    def _encode(self, chunk: Chunk) -> None:
        shard = self._shards.get(chunk.span.claim)
        if shard is None:
            return  # lost, and what was read ahead of it is of no use
        if not shard.lost:
            moments, text = [], None
            if chunk.rows and self._work.text is not None:
                ids = np.stack([row.text_ids for row in chunk.rows if row.text_ids is not None])
                text = self._encoder.text(self._work.text[0], torch.from_numpy(ids))
            if chunk.images is not None:
                moments = [self._stored(chunk, chunk.images)]
                if self._work.format.flips:
                    moments.append(self._stored(chunk, chunk.images.flip(-1)))
            self._pending.append(self._behind.submit(shard.write, chunk, moments, text))
            _wait(self._pending, _BEHIND)
        if shard.lost or chunk.span.last:
            self._pending.append(self._behind.submit(self._end, chunk.span.claim))

    def _stored(self, chunk: Chunk, images: Tensor) -> Tensor:
        moments = self._encoder(images)  # [b,2C,h,w] or [b,C,h,w]
        if self._work.format.stored_shape[0] == moments.shape[1]:
            return moments
        posterior = Posterior.from_moments(moments)
        places = [(chunk.span.number << 32) + row.at for row in chunk.rows]
        noise = draws.normal(0, places, "posterior", posterior.mean.shape[1:])
        return posterior.sample(noise.to(moments.device))

    def _lose(self, number: int) -> None:
        for shard in list(self._shards.values()):
            if shard.claim.number == number:
                shard.lost = True

    def _end(self, claim: int) -> None:
        shard = self._shards.pop(claim, None)
        if shard is None:
            return
        if shard.lost:
            shard.drop()
        elif self._uploads is None:
            shard.finish()
        else:
            _wait(self._uploading, _UPLOADING)
            self._uploading.append(self._uploads.submit(shard.finish))

    def _drop_all(self) -> None:
        while self._shards:
            self._shards.popitem()[1].drop()


class _Spans:
    def __init__(self, line: _Line) -> None:
        self._line = line

    def __iter__(self) -> Iterator[Span]:
        return self._line.spans()


def _next_or_none(chunks: Iterator[Chunk]) -> Chunk | None:
    try:
        return next_of(chunks)
    except StopIteration:
        return None


def _wait(pending: deque[Future[None]], most: int) -> None:
    """Until at most so much is left to be done; here the errors of threads come out."""
    wait = Wait(
        "the thread that writes shards; does the folder or store of latents.path answer",
        limit_seconds=math.inf,
    )
    while len(pending) > most:
        try:
            pending[0].result(timeout=_POLL_SECONDS)
        except FutureTimeoutError:
            if not pending[0].done():
                wait.check()
                continue
            pending[0].result()  # ended in the meantime, or by an error of this kind
        pending.popleft()


def _as_it_is(chunk: Any) -> Any:
    return chunk
