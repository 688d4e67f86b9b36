"""Every job that reads files is given one odd file of each kind: status 2, one message, no traceback."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ldmscale.cli import main
from ldmscale.errors import DataError

BAD: dict[str, bytes | None] = {
    "pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:"
    + b"a" * 64
    + b"\nsize 9\n",
    "not UTF-8": b"caf\xe9\xff\x00\n",
    "empty": b"",
    "cut": b'{"a": [1, ',
    "another type": b"[1, 2, 3]\n",
    "nested": b"[" * 100_000,
    "surrogate": b'{"run": {"name": "\\ud83d"}, "step": 1}\n',
    "folder": None,
    "loop": None,  # a link to itself: opening it fails, as that of a file of another user
}

Words = Callable[[Path], list[str]]


def in_run(name: str, *words: str) -> tuple[str, Words]:
    """A run folder whose file `name` is the bad one."""
    return f"run/{name}", lambda folder: [word.replace("RUN", str(folder / "run")) for word in words]


JOBS: dict[str, tuple[str, Words]] = {
    "index: shard": ("0.tar", lambda f: ["index", f"data.shards={f}/0.tar"]),
    "import: ckpt": ("m.ckpt", lambda f: ["import", f"src={f}/m.ckpt", f"dst={f}/out"]),
    "import: safetensors": ("m.safetensors", lambda f: ["import", f"src={f}/m.safetensors", f"dst={f}/out"]),
    "import: folder": ("m/config.json", lambda f: ["import", f"src={f}/m", f"dst={f}/out"]),
    "import: pipeline": ("m/model_index.json", lambda f: ["import", f"src={f}/m", f"dst={f}/out"]),
    "export: run": in_run("config.yaml", "export", "src=RUN", "dst=RUN/out", "format=diffusers"),
    "sample: run": in_run("config.yaml", "sample", "sample.model=RUN", "sample.prompts=[a]"),
    "sample: model": (
        "m.safetensors",
        lambda f: ["sample", f"sample.model={f}/m.safetensors", "sample.prompts=[a]"],
    ),
    "evaluate: run": in_run("config.yaml", "evaluate", "evaluate.model=RUN", "data.shards=RUN/0.tar"),
    "latents: first stage": in_run(
        "config.yaml", "latents", "first_stage.path=RUN", "data.shards=RUN/0.tar", "latents.path=RUN/l"
    ),
    "diffusion: first stage": in_run(
        "config.yaml", "diffusion", "first_stage.path=RUN", "data.shards=RUN/0.tar", "run.dir=RUN/d"
    ),
    "autoencoder: resumed run": in_run("config.yaml", "autoencoder", "experiment=smoke", "run.dir=RUN"),
    "wandb-sync: config": in_run("config.yaml", "wandb-sync", "run.dir=RUN", "tracking.wandb=offline"),
    "doctor: config": in_run("config.yaml", "doctor", "run.dir=RUN"),
    "frozen": ("frozen.yaml", lambda f: ["autoencoder", "--frozen", f"{f}/frozen.yaml"]),
}


# A folder whose config.yaml leads nowhere is that of no run; settings that a run lacks are no fault of its history.
GOOD = {("autoencoder: resumed run", "loop"), ("doctor: config", "surrogate")}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("job", JOBS)
def test_an_odd_file_is_one_message(
    tmp_path: Path, job: str, kind: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LDMSCALE_CACHE", str(tmp_path / "cache"))
    if (job, kind) in GOOD:
        return
    name, words = JOBS[job]
    bad = tmp_path / name
    bad.parent.mkdir(parents=True, exist_ok=True)
    content = BAD[kind]
    if content is not None:
        bad.write_bytes(content)
    elif kind == "folder":
        bad.mkdir()
    else:
        bad.symlink_to(bad)
    status = main(words(tmp_path))
    out = "".join(capfd.readouterr())
    assert "Traceback" not in out
    assert status == 2, out
    assert len(max(out.split("\n"), key=len)) < 2000


def _without_override() -> None:
    """Take from root the right to read what others closed (capabilities 1 and 2: DAC_OVERRIDE, DAC_READ_SEARCH)."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable, of 32 bits each, twice
    if libc.capget(header, sets) == 0:
        sets[0] &= ~0b110
        libc.capset(header, sets)


def _as_other(words: list[str], folder: Path, out: Path) -> None:
    with open(out, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115 - until the end
    os.chdir(folder)
    os.environ["LDMSCALE_CACHE"] = str(folder / "cache")
    _without_override()
    os._exit(main(words))


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to give a file to another user")
@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("job", [job for job in JOBS if job != "autoencoder: resumed run"])
def test_what_another_user_closed_is_one_message(job: str, kind: str) -> None:
    """A file without the right to read, and a folder without the right to enter it."""
    with tempfile.TemporaryDirectory(prefix="closed") as made:
        folder = Path(made)
        folder.chmod(0o777)
        name, words = JOBS[job]
        bad = folder / "closed" / name
        bad.parent.mkdir(parents=True, exist_ok=True)
        bad.write_bytes(b"{}")
        closed = bad if kind == "file" else folder / "closed"
        os.chown(closed, 65534, 65534)
        closed.chmod(0o700)
        out = folder / "out"
        process = multiprocessing.get_context("fork").Process(
            target=_as_other, args=(words(folder / "closed"), folder, out)
        )
        process.start()
        process.join(60)
        text = out.read_text()
        assert "Traceback" not in text, text
        assert process.exitcode == 2, text


def test_nested_yaml_of_ones_own_is_one_message(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("a: " + "[" * 5000 + "]" * 5000 + "\n")
    for flags in ([], ["--cfg", "job"]):
        status = main(["autoencoder", "--config-dir", str(tmp_path), "experiment=mine", "run.dir=x", *flags])
        out = "".join(capfd.readouterr())
        assert status == 2 and "Traceback" not in out and "nested too deeply" in out, out[:3000]


def test_what_a_damaged_store_of_captions_raises(tmp_path: Path) -> None:
    from ldmscale.setup.text import _open

    for content, fault in (
        (b"PK\x03\x04 cut", "is damaged"),
        (BAD["pointer of Git LFS"], "git lfs pull"),
        (b"", "is damaged"),
        (b"\x93NUMPY\x01", "is damaged"),
    ):
        (tmp_path / "encoder.json").write_text('{"digest": "a", "captions": 1}')
        (tmp_path / "tokens.npy").write_bytes(content or b"")
        with pytest.raises(DataError, match=fault):
            _open(tmp_path)
    np.savez(tmp_path / "x.npz", a=np.zeros(1))
    (tmp_path / "tokens.npy").write_bytes((tmp_path / "x.npz").read_bytes())
    np.save(tmp_path / "vectors.npy", np.zeros(1))
    with pytest.raises(DataError, match="is damaged"):
        _open(tmp_path)
