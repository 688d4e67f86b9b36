"""What the doctor says of ranks that differ, of disks without room, and of shards that are not there."""

from ldmscale.cluster.doctor_machine import RankFacts, compare, examine_folder, examine_room, examine_shards
from ldmscale.storage.object_store import Storage


def facts(
    rank: int, host: str = "a", versions: str = "torch 2.13", gflops: float = 100.0, clock: float = 5.0
):
    return RankFacts(rank, host, "CPU (1 threads a rank)", versions, gflops, 1.0, clock)


def test_a_slow_rank_a_wrong_clock_and_another_version_are_named_with_their_host():
    found = compare(
        [facts(0), facts(1), facts(2, "b", gflops=50.0), facts(3, "c", "torch 2.12", clock=30.0)], 0.8
    )
    assert len(found.warnings) == 2 and len(found.faults) == 1
    slow = next(text for text in found.warnings if "median" in text)
    assert slow.startswith("rank 2 on b computes at 50%") and "cluster.exclude=[b]" in slow
    assert any("25.0 s" in text for text in found.warnings)
    assert found.faults[0].startswith("rank 3 on c has torch 2.12, rank 0 has torch 2.13")
    assert not compare([facts(0), facts(1)], 0.8).warnings


def test_a_disk_is_measured_and_leaves_no_file(tmp_path):
    found = examine_folder(tmp_path / "new", 1)
    assert "MiB/s" in found.values["disk"] and not found.faults
    assert not list((tmp_path / "new").iterdir())
    (tmp_path / "file").write_text("")
    assert "cannot be written" in examine_folder(tmp_path / "file", 1).faults[0]


def test_room_is_counted_for_the_checkpoints_that_are_kept_and_the_next(tmp_path):
    assert not examine_room(tmp_path, 1000, 2).faults
    fault = examine_room(tmp_path, 10**15, 2).faults[0]
    assert "44703483.6 are needed" in fault  # 3 x 16 bytes x 10^15, in GiB


def test_shards_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "0.tar").write_bytes(b"x" * 1000)
    (tmp_path / "1.tar").write_bytes(b"")
    shards = [str(tmp_path / f"{number}.tar") for number in range(3)]
    found = examine_shards(shards, 8, Storage())
    assert (
        len(found.faults) == 2
        and "1.tar is empty" in found.faults[0]
        and "2.tar cannot be read" in found.faults[1]
    )
    assert "3, of which 3 were opened" in found.values["shards"]


def test_shards_in_a_store_are_reached_as_the_run_will_reach_them(object_store):
    shards = [object_store.put("ready", f"examined/{number}.tar", b"x" * 1000 * number) for number in (1, 0)]
    options = object_store.options()
    options["client_kwargs"].pop("endpoint_url")
    found = examine_shards([*shards, "s3://ready/examined/2.tar"], 8, Storage(options, object_store.endpoint))
    assert [fault.split(":", 2)[1] for fault in found.faults] == [
        "//ready/examined/0.tar is empty",
        "//ready/examined/2.tar cannot be read",
    ]
    assert "3, of which 3 were opened" in found.values["shards"]
