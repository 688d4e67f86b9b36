"""Peers that cannot be installed beside us: each in a virtual environment of its own, made on request.

Such an environment sees what this one has (torch, numpy, Pillow) and adds the peer; nothing is put into this one. It lies
in the cache folder (`LDMSCALE_CACHE`), some 100 MB for both.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import IO, Any

from ldmscale.storage.atomic import cache_folder

PEERS = {
    "energon": ["megatron-energon>=7,<8"],
    # Its requirements name torchvision, and older numpy and transformers than ours: what it imports is named here.
    "streaming": ["--no-deps", "mosaicml-streaming==0.13.0", *("brotli", "xxhash", "zstd", "python-snappy"),
                  *("cramjam", "catalogue", "oci")],
}  # fmt: skip
"""What pip installs for each."""


def python_of(peer: str, *, make: bool) -> Path | None:
    """The interpreter of a peer's environment; None if there is none, and `make` does not ask for it.

    Raises:
        subprocess.CalledProcessError: if pip cannot install the peer.
    """
    folder = cache_folder("peers") / peer
    python, done = folder / "bin" / "python", folder / "COMPLETE"
    if done.exists():
        return python
    if not make:
        return None
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (folder / "lib" / version / "site-packages" / "base.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pinned = Path(__file__).parents[1] / "constraints" / "cpu.txt"
    subprocess.run([python, "-m", "pip", "install", "-q", *PEERS[peer], "-c", pinned], check=True)
    done.touch()
    return python


class Peer:
    """A peer's stream of samples, in its own process.

    Args:
        python: interpreter of its environment.
        name: of the peer.
        kind: "images" or "latents".
        folder: of the shards; the peer may write into it.
        samples: in it.
        batch: samples a batch.
    """

    def __init__(self, python: Path, name: str, kind: str, folder: Path, samples: int, batch: int) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.peer_streams", name, kind, folder, str(samples), str(batch)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=open(folder / "stderr.txt", "wb"),  # noqa: SIM115  the child's
            text=True,
        )
        self._errors = folder / "stderr.txt"
        self._answer()  # it is ready

    def sums(self) -> dict[str, str]:
        """Checksum of each sample, by key."""
        return dict(self._ask("check"))

    def seconds(self) -> float:
        """Processor time of one pass through all samples."""
        return float(self._ask("pass")["seconds"])

    def close(self) -> None:
        self._pipe(self._process.stdin).close()
        self._process.wait(timeout=60)

    def _ask(self, what: str) -> Any:
        requests = self._pipe(self._process.stdin)
        requests.write(f"{what}\n")
        requests.flush()
        return self._answer()

    def _answer(self) -> Any:
        line = self._pipe(self._process.stdout).readline()
        if not line:
            raise SystemExit(f"{self.name} ended:\n{self._errors.read_text(errors='replace')[-2000:]}")
        return json.loads(line)

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe
