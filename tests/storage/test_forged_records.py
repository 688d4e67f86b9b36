"""Small files that a forger or a torn disk wrote: one error that names the file, what was found and the remedy."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ldmscale import cli
from ldmscale.checkpoint.run_folder import RunFolder
from ldmscale.cluster import submission
from ldmscale.data.conditions.annotations import ClassLabels
from ldmscale.data.latents.format import LatentFormat, LatentManifest
from ldmscale.data.latents.writer import finish_set, is_finished
from ldmscale.data.loading.skipped_samples import read_ledger
from ldmscale.distributed.watchdog import read_beats
from ldmscale.errors import ConfigError, DataError, LdmscaleError
from ldmscale.inference.image_set import Prompts, SampleFolder
from ldmscale.storage.lease import LeaseLostError, check_held, take, take_if_free
from ldmscale.storage.object_store import Storage
from ldmscale.storage.plain_values import bounded, parsed
from ldmscale.storage.store_folder import StoreFolder
from ldmscale.storage.store_lease import StoreLeases
from ldmscale.storage.upload_claim import Claim
from ldmscale.tracking.metrics import MetricsFile

DEEP = "[" * 100_000 + "]" * 100_000
# What no reader of an object can use, and of which some raise other errors than JSON's own.
BROKEN = [
    "",
    "{",
    "[]",
    "5",
    "null",
    '"text"',
    DEEP,
    '{"a": ' + DEEP + "}",
    "\x00",
    '{"a": "\xff'.encode("latin-1").decode("latin-1"),
]
HOLDER = {"number": 1, "host": "h", "pid": 5, "since": "s", "processes": "", "started": "", "released": False}
FORMAT = {"autoencoder": "a", "kind": "latent", "dtype": "float32", "shape": [1, 2, 2], "transform": {}}
SET = {
    "version": "ldmscale-latents-1", "format": FORMAT, "shards": ["00000.tar"], "samples": 1, "skipped": 0,
    "scale_factor": 1.0, "channel_mean": [0.0], "channel_std": [1.0],
}  # fmt: skip
SHARD = {
    "version": "ldmscale-latents-1", "format": FORMAT, "source": None, "samples": 1, "skipped": 0, "bytes": 4,
    "sha256": "0" * 64, "channel_sum": [0.0], "channel_squares": [1.0],
}  # fmt: skip
BILLION = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + before] * 10)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


def use_config(folder: Path, content: str) -> None:
    (folder / "config.yaml").write_text(content)
    RunFolder(folder).config()


def use_identity(folder: Path, content: str) -> None:
    (folder / "run.json").write_text(content)
    RunFolder(folder).identity()


def use_lease(folder: Path, content: str) -> None:
    (folder / "lease_00000001.json").write_text(content)
    take(folder, wait_seconds=0.0).release()


def use_store_lease(folder: Path, content: str) -> None:
    (folder / "claims").mkdir()
    (folder / "claims" / "00000.00000001.json").write_text(content)
    StoreLeases(StoreFolder(f"file://{folder}", Storage()), "claims").take_if_free(
        "00000", timeout_seconds=60
    )


def use_latents(folder: Path, content: str) -> None:
    (folder / "manifest.json").write_text(content)
    LatentManifest.load(folder)


def use_latent_shard(folder: Path, content: str) -> None:
    (folder / "00000.tar").write_bytes(b"tar!")
    (folder / "00000.json").write_text(content)
    finish_set(folder, ["00000.tar"], LatentFormat(**FORMAT))


def use_classes(folder: Path, content: str) -> None:
    (folder / "classes.json").write_text(content)
    ClassLabels.load(folder / "classes.json")


def use_submission(folder: Path, content: str) -> None:
    (folder / "submissions" / "0001").mkdir(parents=True)
    (folder / "submissions" / "0001" / "submission.json").write_text(content)
    submission.earlier(folder)


def use_samples(folder: Path, content: str) -> None:
    (folder / "sample.json").write_text(content)
    SampleFolder(folder, {}).settle(Prompts(("a",), ("",)))


Use = Callable[[Path, str], None]
FORGED: list[tuple[Use, Any, type[LdmscaleError], str]] = [
    (use_config, "a: [", ConfigError, "config.yaml is damaged .*restore it"),
    (use_config, "5", ConfigError, "found 5, expected keys with values"),
    (use_config, "- a", ConfigError, r"found \['a'\]"),
    (use_config, "", ConfigError, "found None"),
    (use_config, "a: !!python/object/apply:os.system [id]", ConfigError, "could not determine a constructor"),
    (use_config, "a: &a [*a]", ConfigError, "nested deeper than 100"),
    (use_config, "a: " + DEEP, ConfigError, "config.yaml is damaged"),
    (use_config, BILLION, ConfigError, "more than 10000000 values"),
    (use_identity, {"attempts": "x"}, ConfigError, "attempts: found 'x'"),
    (use_identity, {"attempts": -1}, ConfigError, "attempts: found -1"),
    (use_identity, {"finished_step": [4]}, ConfigError, r"finished_step: found \[4\]"),
    (use_identity, {"wandb_id": "../../x"}, ConfigError, r"wandb_id: found '\.\./\.\./x'"),
    (use_identity, {"wandb_id": 5}, ConfigError, "wandb_id: found 5"),
    (use_identity, {"text_encoder": "x"}, ConfigError, "text_encoder: found 'x'"),
    (
        use_lease,
        HOLDER | {"pid": "x"},
        DataError,
        "pid: found 'x'.*make sure that no process uses its folder, delete it",
    ),
    (use_lease, HOLDER | {"pid": -1}, DataError, "pid: found -1"),
    (use_lease, HOLDER | {"host": []}, DataError, r"host: found \[\]"),
    (use_lease, HOLDER | {"released": "yes"}, DataError, "released: found 'yes'"),
    (use_store_lease, HOLDER | {"pid": {}}, DataError, "00000.00000001.json is damaged .*pid: found {}"),
    (use_latents, SET | {"format": 5}, DataError, "format: found 5"),
    (use_latents, SET | {"format": FORMAT | {"kind": "x"}}, DataError, "kind: found 'x'"),
    (use_latents, SET | {"format": FORMAT | {"shape": [1, 2]}}, DataError, "shape"),
    (use_latents, SET | {"format": FORMAT | {"odd": 1}}, DataError, "odd: found 1"),
    (use_latents, SET | {"samples": "1"}, DataError, "samples: found '1'"),
    (use_latents, SET | {"scale_factor": float("nan")}, DataError, "scale_factor: found nan"),
    (use_latents, SET | {"channel_mean": ["x"]}, DataError, "channel_mean.0: found 'x'"),
    (use_latents, SET | {"channel_std": [1.0, 2.0]}, DataError, "not of as many channels"),
    (use_latents, SET | {"shards": 7}, DataError, "shards: found 7"),
    (use_latents, SET | {"version": [1]}, DataError, r"version \[1\], expected"),
    (
        use_latent_shard,
        SHARD | {"samples": "1"},
        DataError,
        "00000.json is damaged .*samples: found '1'.*makes this shard anew",
    ),
    (use_latent_shard, SHARD | {"format": []}, DataError, r"format: found \[\]"),
    (use_latent_shard, SHARD | {"channel_sum": "x"}, DataError, "channel_sum: found 'x'"),
    (use_latent_shard, SHARD | {"bytes": "4"}, DataError, "are not finished"),
    (use_latent_shard, {"bytes": 4, "sha256": "0" * 64}, DataError, "made in another way"),
    (use_classes, {"source": "cls", "count": "4", "names": None}, DataError, "count: found '4'"),
    (use_classes, {"source": "cls", "count": 4}, DataError, "names: .*Field required"),
    (
        use_classes,
        {"source": "cls", "count": 1, "names": ["a", "b"]},
        DataError,
        "found 2 names of 1 classes",
    ),
    (use_classes, {"source": "cls", "count": 1, "names": [5]}, DataError, "names.0: found 5"),
    (use_samples, {"made_by": 5, "prompts": []}, ConfigError, "made_by: found 5"),
    (use_samples, {"made_by": {}, "prompts": [["a"]]}, ConfigError, "prompts.0"),
    (use_samples, {"made_by": {}}, ConfigError, "prompts: .*Field required"),
]


@pytest.mark.parametrize(
    ("use", "content", "error", "words"),
    FORGED,
    ids=[f"{row[0].__name__}-{at}" for at, row in enumerate(FORGED)],
)
def test_a_forged_file_is_refused_with_what_was_found(
    tmp_path: Path, use: Use, content: Any, error: type[LdmscaleError], words: str
) -> None:
    began = time.monotonic()
    with pytest.raises(error, match=words) as found:
        use(tmp_path, content if isinstance(content, str) else json.dumps(content))
    assert len(str(found.value)) < 2000 and time.monotonic() - began < 20


@pytest.mark.parametrize("content", range(len(BROKEN)))
@pytest.mark.parametrize(
    "use",
    [use_identity, use_latents, use_latent_shard, use_classes, use_submission, use_samples],
    ids=lambda use: use.__name__,
)
def test_what_is_no_object_is_one_error(tmp_path: Path, use: Use, content: int) -> None:
    with pytest.raises((ConfigError, DataError)):
        use(tmp_path, BROKEN[content])


@pytest.mark.parametrize("content", range(1, len(BROKEN)))
@pytest.mark.parametrize("use", [use_lease, use_store_lease], ids=lambda use: use.__name__)
def test_a_lease_that_is_no_object_is_one_error(tmp_path: Path, use: Use, content: int) -> None:
    with pytest.raises(DataError, match="delete it"):
        use(tmp_path, BROKEN[content])


def test_a_holder_whose_successor_cannot_be_read_still_loses_the_folder(tmp_path: Path) -> None:
    lease = take(tmp_path)
    (tmp_path / "lease_00000002.json").write_text("[]")
    with pytest.raises(LeaseLostError, match="another process"):
        check_held(tmp_path, lease.number)
    lease.release()


def test_a_holder_keeps_the_folder_while_its_own_file_is_damaged(tmp_path: Path) -> None:
    lease = take(tmp_path)
    for content in BROKEN:
        lease.path.write_text(content)
        assert lease.held()
    lease.release()


def test_a_lease_that_is_being_made_is_not_damaged(tmp_path: Path) -> None:
    (tmp_path / "lease_00000001.json").write_text("")
    assert take_if_free(tmp_path) is None


def test_a_later_claim_counts_whatever_it_holds(tmp_path: Path) -> None:
    for content in BROKEN:
        folder = tmp_path / str(BROKEN.index(content))
        claim = Claim(StoreFolder(f"file://{folder}", Storage()), "run")
        (folder / f"{claim.number + 1:08d}.json").write_text(content)
        with pytest.raises(LeaseLostError, match="claimed by a later start"):
            claim.check()


def test_damaged_lines_of_metrics_and_ledger_are_left_out(tmp_path: Path) -> None:
    lines = [
        '{"step": 1}',
        *(text for text in BROKEN if text),
        '{"step": "x"}',
        '{"step": 1e999}',
        '{"step": 2}',
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    assert metrics.resume_from(5) == 2
    metrics.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    (tmp_path / "ledger").write_text("".join(line + "\n" for line in lines[:-3]))
    assert read_ledger(tmp_path / "ledger") == [{"step": 1}]


def test_forged_beats_are_left_out(tmp_path: Path) -> None:
    beat = {"rank": 0, "host": "h", "pid": 1, "attempt": 1, "step": 1, "phase": "step", "phase_seconds": 0.1}
    (tmp_path / "heartbeat").mkdir()
    forged = [
        *BROKEN,
        *(json.dumps(beat | change) for change in ({"rank": 10**12}, {"rank": "x"}, {"phase": []})),
    ]
    for at, content in enumerate([json.dumps(beat), *forged]):
        (tmp_path / "heartbeat" / f"rank_{at:05d}.json").write_text(content)
    assert [found.rank for found in read_beats(tmp_path)] == [0]


def test_the_doctor_goes_on_behind_what_is_damaged(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = RunFolder(tmp_path / "run")
    (run.path / "submissions" / "0001").mkdir(parents=True)
    (run.path / "submissions" / "0001" / "submission.json").write_text("[]")
    (run.path / "logs").mkdir()
    (run.path / "logs" / "rank_x.log").write_text("ERROR all is lost\n")
    run.lease.mkdir()
    (run.lease / "lease_00000001.json").write_text("[]")
    run.config_file.write_text("job: diffusion\ntrain: 5\n")
    (run.path / "metrics.jsonl").write_text('5\n[]\n{"a": 1}\n')
    assert cli.main(["doctor", f"run.dir={run.path}"]) == 2
    told = capfd.readouterr().err
    assert "lease_00000001.json is damaged" in told and "submission.json is damaged" in told
    run.identity_file.write_text("[]")
    assert cli.main(["doctor", f"run.dir={run.path}"]) == 2
    assert "run.json is damaged" in capfd.readouterr().err


def test_values_are_bounded_in_depth_and_number() -> None:
    assert bounded({"a": [1, {"b": None}]}) == {"a": [1, {"b": None}]}
    value: list[Any] = []
    value.append(value)
    with pytest.raises(ValueError, match="nested deeper"):
        bounded(value)
    assert parsed("[" * 100 + "]" * 100)
    with pytest.raises(ValueError, match="nested deeper"):
        parsed("[" * 101 + "]" * 101)


def test_a_finished_shard_is_read_as_before(tmp_path: Path) -> None:
    (tmp_path / "00000.tar").write_bytes(b"tar!")
    (tmp_path / "00000.json").write_text(json.dumps(SHARD))
    assert is_finished(tmp_path, "00000.tar", LatentFormat(**FORMAT, version=1))
    (tmp_path / "manifest.json").write_text(json.dumps(SET))
    assert LatentManifest.load(tmp_path).format == LatentFormat(**FORMAT, version=1)
    assert os.listdir(tmp_path)
