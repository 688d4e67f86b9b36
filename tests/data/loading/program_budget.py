"""Two gloo ranks read; what goes wrong on one of them must end both, alike. Run by test_limit.py."""

import json
import os
import signal
import sys
from pathlib import Path

from ldmscale.data.loading.loader import Loader
from ldmscale.data.loading.skipped_samples import Ledger
from ldmscale.data.loading.training_data import BadDataLimit, next_for_all
from ldmscale.data.loading.transforms import ImageItem
from ldmscale.data.shards.index import ShardIndex
from ldmscale.distributed.environment import read_ranks
from ldmscale.distributed.process_group import close_world, open_world
from ldmscale.errors import DataError, LdmscaleError


class OnlyRankOne:
    """An item that rank 1 alone cannot make, from some position on."""

    def __init__(self, rank: int, first_bad: int, kind: str) -> None:
        self.rank, self.first_bad, self.kind = rank, first_bad, kind
        self.item = ImageItem(8, seed=0)

    def __call__(self, sample, position):
        if self.rank == 1 and position >= self.first_bad:
            if self.kind == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise DataError("planted")
        return self.item(sample, position)


def main() -> None:
    folder, ranks = Path(sys.argv[1]), read_ranks()
    open_world(ranks, timeout_minutes=2)
    index = ShardIndex.open(sorted(map(str, folder.glob("*.tar"))))
    found = {}
    cases = {
        "hard": ("planted", BadDataLimit(), 0),  # 16 stand-ins fail, too: this rank has no batch
        "share": ("share", BadDataLimit(max_share=0.05), 0),
        "row": ("share", BadDataLimit(max_in_a_row=5), 1),
        "killed": ("killed", BadDataLimit(), 1),
    }
    for name, (kind, limit, workers) in cases.items():
        maker = OnlyRankOne(ranks.rank, 48, kind)
        if kind == "share":
            maker = SomeBad(ranks.rank, 48)
        loader = Loader(index, maker, seed=0, rank=ranks.rank, world=2, global_batch=8, rank_micro_batch=2,
                        workers=workers, ledger=Ledger(folder / f"{name}.jsonl", ranks.rank))  # fmt: skip
        taken = 0
        try:
            for _ in range(200):
                next_for_all(loader, limit)
                taken += 1
        except LdmscaleError as error:
            found[name] = [type(error).__name__, error.shared, taken, str(error), loader.position]
        loader.close()
    (folder / f"rank{ranks.rank}.json").write_text(json.dumps(found))
    close_world()


class SomeBad(OnlyRankOne):
    """Rank 1 cannot use any original sample from some position on; their stand-ins it can."""

    def __init__(self, rank: int, first_bad: int) -> None:
        super().__init__(rank, first_bad, "share")
        self.refused: set[int] = set()

    def __call__(self, sample, position):
        if self.rank == 1 and position >= self.first_bad and position not in self.refused:
            self.refused.add(position)
            raise DataError("planted")
        return self.item(sample, position)


main()
