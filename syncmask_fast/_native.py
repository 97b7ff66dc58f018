"""Finds the compiled operators (`_C.so`, and `_C_cuda.so` for a torch with CUDA), loads them once, and says which file that was or
what is wrong."""

from __future__ import annotations

import ctypes
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
    """Loads the library once; returns its path, or None where it is not built or does not load."""
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
    """Loads the library of CUDA kernels once, where torch has CUDA; returns its path, or None."""
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
    """The library beside this package, else that of the installed distribution (run from a clone)."""
    beside = Path(__file__).resolve().parent / name
    if beside.is_file():
        return beside
    try:
        files = importlib.metadata.files("syncmask_fast") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    paths = [Path(str(file.locate())) for file in files if file.name == name]
    return next((path for path in paths if path.is_file()), None)


def loaded() -> bool:
    return _path is not None


def loaded_cuda() -> bool:
    return _cuda_path is not None


def stamp() -> str | None:
    """What the loaded library was built from and with, as written by setup.py; None where none is loaded."""
    if _path is None:
        return None
    function = ctypes.CDLL(str(_path)).syncmask_build_stamp
    function.restype = ctypes.c_char_p
    return function().decode()


def status() -> str:
    """One sentence: the loaded file and its stamp, or what is missing and how to get it."""
    return f"{_path} ({stamp()})" if _path else f"{_problem}; to have it, {HOW_TO_BUILD}"
