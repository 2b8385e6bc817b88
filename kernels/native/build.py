"""Builds the C++ of this folder once per machine, and loads it.

Guarantees: what is loaded was compiled from these sources, with these flags, by this compiler, for this processor; the
build appears whole or not at all, so that several processes may start at once. No compiler is an error that says so.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = ("native.cpp", "products.h", "rows.h", "sums.h", "vectors.h")
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fopenmp",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-Wno-psabi",
)


class NativeUnavailableError(RuntimeError):
    """The compiled engine cannot be built or loaded here: one line that says why and what to do."""


@cache
def library() -> ctypes.CDLL:
    """The loaded library, built if this machine has not built it yet (about five seconds).

    Raises:
        NativeUnavailableError: no C++ compiler, or one that refuses.
    """
    compiler = _compiler()
    target = _folder() / f"native-{_digest(compiler)}.so"
    if not target.exists():
        _build(compiler, target)
    try:
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise _unavailable(f"{target} does not load ({error})", "delete it") from error


def _unavailable(found: str, do: str) -> NativeUnavailableError:
    return NativeUnavailableError(f"backend 'native': {found}; {do}, or pass backend='chunked' (torch alone, slower)")


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and (path := shutil.which(name)):
            return path
    raise _unavailable("no C++ compiler found (tried $CXX, g++, clang++, c++)", "install g++")


def _folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "logitcache" / "kernels"


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        first = (done.stderr.strip() or "no message").splitlines()[0]
        raise _unavailable(f"{command[0]} failed: {first}", "mend the compiler")
    return done.stdout


def _digest(compiler: str) -> str:
    """Of the sources, the flags, and the macros the compiler predefines: its version, the processor's features."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    digest.update(_run([compiler, "-march=native", "-fopenmp", "-dM", "-E", "-x", "c++", os.devnull]).encode())
    for name in SOURCES:
        digest.update((HERE / name).read_bytes())
    return digest.hexdigest()[:16]


def _build(compiler: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        built = Path(folder) / "native.so"
        _run([compiler, *FLAGS, str(HERE / "native.cpp"), "-o", str(built)])
        os.replace(built, target)
