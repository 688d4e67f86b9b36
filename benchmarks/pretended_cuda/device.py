"""Makes a CPU build of torch accept tensors on "cuda": compiles cuda_hooks.cpp once and loads it before torch.

torch itself must not be imported before `pretend`: its libraries would be bound to their own `getAccelerator`.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

from ldmscale.storage.atomic import cache_folder, finished_file

SOURCE = Path(__file__).with_name("cuda_hooks.cpp")


class Unsupported(RuntimeError):
    """This machine cannot pretend CUDA; the message says why. Tests skip with it."""


def torch_folder() -> Path:
    """The folder of the installed torch, which is not imported."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise Unsupported("torch is not installed")
    return Path(found.origin).parent


def library() -> Path:
    """Compiles cuda_hooks.cpp, unless the cache folder holds the library for this source and this torch.

    g++ is called directly, and the result is renamed into place: `torch.utils.cpp_extension` imports torch, and waits
    without a limit on the lock file of a build that was killed.

    Raises:
        Unsupported: another system, another build of torch, or no g++.
    """
    if sys.platform != "linux":
        raise Unsupported(f"pretended CUDA needs Linux (symbol interposition), and this is {sys.platform}")
    folder = torch_folder()
    version = (folder / "version.py").read_bytes()
    if b"+cpu" not in version:
        raise Unsupported(
            f"pretended CUDA needs a CPU build of torch, and that in {folder} has device guards of its own"
        )
    key = hashlib.sha256(SOURCE.read_bytes() + version + bytes(folder)).hexdigest()
    path = cache_folder("pretended_cuda") / f"libcuda_hooks_{key[:16]}.so"
    if not path.exists():
        if shutil.which("g++") is None:
            raise Unsupported("pretended CUDA needs g++ to compile cuda_hooks.cpp, and there is none on PATH")
        _compile(folder, path)
    return path


def _compile(torch: Path, path: Path) -> None:
    command = ["g++", "-O0", "-std=c++20", "-fPIC", "-shared", "-w", f"-I{torch}/include", str(SOURCE)]
    command += [f"-L{torch}/lib", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch}/lib"]
    with finished_file(path) as temporary:
        built = subprocess.run([*command, "-o", str(temporary)], capture_output=True, text=True, check=False)
        if built.returncode:
            raise Unsupported(f"cuda_hooks.cpp does not compile against torch's headers:\n{built.stderr}")


def pretend() -> None:
    """Loads the library. Call it before anything imports torch.

    Raises:
        Unsupported: this machine or this build of torch cannot.
        RuntimeError: torch is imported already.
    """
    if "torch" in sys.modules:
        raise RuntimeError(
            "pretend() comes too late: torch is imported already; call it first in the process"
        )
    ctypes.CDLL(str(library()), mode=ctypes.RTLD_GLOBAL)
