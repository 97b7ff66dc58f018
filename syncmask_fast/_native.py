"""Load the compiled operators (`_C.so`, and `_C_cuda.so` where torch has CUDA) and choose their instruction set."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import warnings
from pathlib import Path

import torch

LIBRARY = "_C.so"
CUDA_LIBRARY = "_C_cuda.so"
HOW_TO_BUILD = "install g++ and run `make install` (or `pip install -e . --no-build-isolation`)"

_path: Path | None = None
_problem: str | None = "nothing was loaded yet"
_cuda_path: Path | None = None


def load() -> Path | None:
    """Load the library once; return its path, or None where it is not built or does not load."""
    global _path, _problem
    if _path is None:
        found = find()
        if found is None:
            _problem = "the C++ extension is not built"
        else:
            try:
                torch.ops.load_library(str(found))
                _path, _problem = found, None
            except OSError as error:
                _problem = f"the C++ extension does not load ({error})"
    return _path


def load_cuda() -> Path | None:
    """Load the library of CUDA kernels once, where torch has CUDA; return its path, or None."""
    global _cuda_path
    if _cuda_path is None and torch.version.cuda is not None:
        found = find(CUDA_LIBRARY)
        if found is not None:
            try:
                torch.ops.load_library(str(found))
                _cuda_path = found
            except OSError as error:
                warnings.warn(f"{found} does not load ({error}); to have it, {HOW_TO_BUILD}", stacklevel=2)
    return _cuda_path


def find(name: str = LIBRARY) -> Path | None:
    """Return the library next to this package, else that of the installed distribution (run from a clone)."""
    neighbor = Path(__file__).resolve().parent / name
    if neighbor.is_file():
        return neighbor
    try:
        files = importlib.metadata.files("syncmask_fast") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    paths = [Path(str(file.locate())) for file in files if file.name == name]
    return next((path for path in paths if path.is_file()), None)


def is_loaded() -> bool:
    """Return whether the CPU kernels are loaded."""
    return _path is not None


def is_cuda_loaded() -> bool:
    """Return whether the CUDA kernels of csrc/ are loaded."""
    return _cuda_path is not None


def isas() -> list[str]:
    """Return the instruction sets that this CPU can run the kernels in, the widest first; [] where none is loaded."""
    return _text("syncmask_isas").split() if is_loaded() else []


def set_isa(name: str | None) -> None:
    """Choose the instruction set of the CPU kernels for the whole process; None chooses the widest.

    At the start it is the widest that ATEN_CPU_CAPABILITY allows. Do not change it while an operator runs.
    Raises ValueError for one that is not in `isas()`.
    """
    if name is not None and name not in isas():
        raise ValueError(f"isa is {name!r}; expected one of {', '.join(map(repr, isas()))}")
    if is_loaded():
        _library(_path).syncmask_set_isa(name.encode() if name is not None else None)


def isa() -> str | None:
    """Return the instruction set in use; None where no library is loaded."""
    return _text("syncmask_isa") if is_loaded() else None


def build_info() -> str | None:
    """Return what the loaded library was built from and with, as written by setup.py; None where none is loaded."""
    return _text("syncmask_build_stamp") if is_loaded() else None


def describe() -> str:
    """Return one sentence: the loaded file and its build, or what is missing and how to get it."""
    return f"{_path} ({build_info()})" if _path else f"{_problem}; to have it, {HOW_TO_BUILD}"


@functools.cache
def _library(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))


def _text(function: str) -> str:
    """Return the text that a C function of the library returns."""
    call = getattr(_library(_path), function)
    call.restype = ctypes.c_char_p
    return call().decode()
