"""Atomic writes: complete or not there, with the umask's permissions, by one process or several."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ldmscale.storage.atomic import (
    appearing,
    create_file,
    finished_file,
    locked,
    new_folder,
    open_new,
    replace_folder,
    write_file,
    write_json,
    write_text,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def python(program: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_files_and_folders_have_the_permissions_that_the_umask_leaves(umask: int, tmp_path: Path) -> None:
    write_text(tmp_path / "text", "a")
    write_file(tmp_path / "bytes", [b"a", b"b"])
    write_json(tmp_path / "deep" / "json", {"a": 1}, durable=False)
    create_file(tmp_path / "created", b"a")
    draft, stream = open_new(tmp_path, ".draft.")
    stream.close()
    for path in (*(tmp_path / name for name in ("text", "bytes", "deep/json", "created")), draft):
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path
    with appearing(tmp_path / "folder", overwrite=False) as folder:
        (folder / "file").write_text("a")
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_write_that_fails_leaves_the_old_content_and_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "before")

    def parts() -> Iterator[bytes]:
        yield b"half"
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_file(path, parts())
    with pytest.raises(RuntimeError), new_folder(tmp_path / "folder"):
        raise RuntimeError
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["file"]


def test_processes_and_threads_that_write_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    # Two open writers of one path have two temporary files: with one name the second would truncate the first.
    with finished_file(tmp_path / "file") as one, finished_file(tmp_path / "file") as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "file").read_text() == "one"  # renamed last
    program = (
        "import sys; from pathlib import Path; from ldmscale.storage.atomic import write_json\n"
        "for _ in range(100): write_json(Path(sys.argv[1]), [sys.argv[2]] * 20000, durable=False)"
    )
    path = tmp_path / "list"
    writers = [python(program, str(path), name) for name in ("a", "b")]
    read = 0
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            found = json.loads(path.read_text())
            assert len(found) == 20000 and len(set(found)) == 1
            read += 1
    assert read and [writer.wait() for writer in writers] == [0, 0]
    assert sorted(os.listdir(tmp_path)) == ["file", "list"]


def test_of_many_processes_that_create_a_file_one_does(tmp_path: Path) -> None:
    program = (
        "import os, sys, time; from pathlib import Path; from ldmscale.storage.atomic import create_file\n"
        "while time.time() < float(sys.argv[2]): pass\n"
        "mine = [n for n in range(50) if create_file(Path(sys.argv[1]) / str(n), str(os.getpid()).encode())]\n"
        "print(os.getpid(), *mine)"
    )
    creators = [python(program, str(tmp_path), str(time.time() + 2)) for _ in range(3)]
    said = [creator.communicate(timeout=120)[0].split() for creator in creators]
    created = [(int(number), pid) for pid, *numbers in said for number in numbers]
    assert sorted(number for number, _ in created) == list(range(50))
    assert all((tmp_path / str(number)).read_text() == pid for number, pid in created)
    assert not list(tmp_path.glob(".*"))


def test_a_lock_makes_processes_wait(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from ldmscale.storage.atomic import locked\n"
        "print('started', flush=True)\n"
        "with locked(Path(sys.argv[1])): print(Path(sys.argv[2]).read_text())"
    )
    with locked(tmp_path / "lock"):
        other = python(program, str(tmp_path / "lock"), str(tmp_path / "file"))
        assert other.stdout is not None and other.stdout.readline() == "started\n"
        time.sleep(0.5)
        assert other.poll() is None
        (tmp_path / "file").write_text("written")
    assert other.communicate(timeout=60)[0] == "written\n"


def test_a_folder_replaces_another_as_a_whole(tmp_path: Path) -> None:
    for content in ("old", "new"):
        with new_folder(tmp_path / "folder") as made:
            (made / content).write_text(content)
            replace_folder(made, tmp_path / "folder")
    assert os.listdir(tmp_path) == ["folder"] and os.listdir(tmp_path / "folder") == ["new"]
