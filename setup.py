"""Build the package and its compiled operators: `_C.so`, and `_C_cuda.so` where nvcc and a torch with CUDA are found.

They are two libraries because the second does not load into a torch without CUDA. Without a C++ compiler or torch the
install succeeds without them, and the operators run their slower references.

Everything declarative is in pyproject.toml. The libraries use LibTorch's stable ABI and no Python API: one build serves
every Python and every torch from 2.10 on. torch is never imported here. In an isolated build (plain `pip install .`) it
cannot be, but its headers and libraries in the target environment are ordinary files. CXX and NVCC choose the
compilers, CXXFLAGS adds to the flags of the first; an empty NVCC leaves out `_C_cuda.so`.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/*.cpp"))
CUDA_SOURCES = ["csrc/group_semi_hard.cu"]
HEADERS = sorted(path.relative_to(ROOT).as_posix() for ext in ("h", "inl") for path in ROOT.glob(f"csrc/*.{ext}"))
CUDA_TARGETS = ("sm_80", "sm_90", "sm_100")  # those that the nvcc at hand knows are built
TORCH_TARGET = "0x020a000000000000ULL"  # the binary uses what torch 2.10 has, whatever torch it is built with
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]


class NotBuilt(Exception):
    """Why a compiled library is left out."""


class BuildNative(build_ext):
    """Report a library that cannot be built, and leave it out."""

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.so"

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name))
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            (compile_cuda_library if extension.sources == CUDA_SOURCES else compile_library)(extension.sources, target)
            print(f"syncmask_fast: built {target.name}", file=sys.stderr)
        except NotBuilt as reason:
            print(f"syncmask_fast: installing without {target.name}, {reason}", file=sys.stderr)


class AnyPythonWheel(bdist_wheel):
    """The wheel depends on the platform, not on the Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def compile_library(sources: list[str], target: Path) -> None:
    if not sys.platform.startswith("linux"):
        raise NotBuilt("which are for Linux")
    torch = find_torch()
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "c++", "clang++"))), None)
    if compiler is None:
        raise NotBuilt("because no C++ compiler was found (install g++, or set CXX)")
    include, library = torch / "include", torch / "lib"
    files = [str(ROOT / source) for source in sources]
    files_read = sorted(file for file in ROOT.glob("csrc/*") if file.suffix in (".cpp", ".h", ".inl"))
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files_read)).hexdigest()[:12]
    version = subprocess.run([compiler, "-dumpfullversion", "-dumpversion"], capture_output=True, text=True).stdout
    stamp = f"csrc {digest}, torch {torch_version(torch)} headers, {Path(compiler).name} {version.strip()}"
    defines = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", f'-DSYNCMASK_BUILD_STAMP="{stamp}"']
    # -ltorch_cpu -lc10: torch's libraries are not loaded globally, so the symbols need a file to come from.
    # No run path is needed: torch is imported, and so loaded, first. Built aside and renamed, because a process may
    # have the old one open.
    flags = [*FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    with tempfile.TemporaryDirectory(dir=target.parent) as folder, ThreadPoolExecutor(len(files)) as pool:
        objects = [str(Path(folder, f"{index}.o")) for index in range(len(files))]
        compiles = [
            [compiler, *flags, *defines, "-isystem", str(include), "-c", file, "-o", result]
            for file, result in zip(files, objects, strict=True)
        ]
        list(pool.map(run_compiler, compiles))
        built = Path(folder, target.name)
        links = [f"-L{library}", "-ltorch_cpu", "-lc10", "-o", str(built)]
        run_compiler([compiler, *flags, "-shared", *objects, *links])
        os.replace(built, target)


def compile_cuda_library(sources: list[str], target: Path) -> None:
    nvcc = shutil.which(os.environ.get("NVCC", "nvcc"))
    if nvcc is None:
        raise NotBuilt("because no nvcc was found (its operators run their references on a GPU)")
    torch = find_torch()
    if not (torch / "lib/libtorch_cuda.so").is_file():
        raise NotBuilt("because this torch has no CUDA")
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        built = Path(folder, target.name)
        files = [str(ROOT / source) for source in sources]
        links = ["-shared", f"-L{torch / 'lib'}", "-ltorch_cuda", "-ltorch_cpu", "-lc10", "-o", str(built)]
        run_compiler([nvcc, *cuda_flags(nvcc, torch), *files, *links])
        os.replace(built, target)


def cuda_flags(nvcc: str, torch: Path) -> list[str]:
    """Return nvcc's flags: machine code for the known targets, and PTX of the last for what comes after them."""
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    targets = [name.removeprefix("sm_") for name in CUDA_TARGETS if name in known]
    if not targets:
        raise NotBuilt(f"because {nvcc} compiles for none of {', '.join(CUDA_TARGETS)}")
    codes = [f"arch=compute_{number},code=sm_{number}" for number in targets]
    codes.append(f"arch=compute_{targets[-1]},code=compute_{targets[-1]}")
    flags = ["-std=c++17", "-O3", "--threads", "0", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-DUSE_CUDA"]
    defines = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-isystem", str(torch / "include")]
    return [*flags, *defines, *(word for code in codes for word in ("-gencode", code))]


def run_compiler(command: list[str]) -> None:
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        raise NotBuilt(f"because the compiler failed:\n{' '.join(command)}\n{run.stderr}")


def find_torch() -> Path:
    """Return the folder of the torch of the environment that is installed into.

    An isolated build hides it from this process by PYTHONPATH; a fresh interpreter that ignores that sees it.
    """
    code = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s and s.origin else '')"
    run = subprocess.run([sys.executable, "-E", "-c", code], capture_output=True, text=True, cwd=tempfile.gettempdir())
    origin = run.stdout.strip()
    folder = Path(origin).parent if origin else None
    if folder is None or not (folder / "include/torch/csrc/stable/library.h").is_file():
        raise NotBuilt("because torch 2.10 or later is not installed here yet (install torch, then this again)")
    return folder


def torch_version(torch: Path) -> str:
    for line in (torch / "version.py").read_text().splitlines():
        if line.startswith("__version__ ="):
            return line.split("=")[1].strip().strip("'\"")
    return "unknown"


setup(
    packages=[*find_packages(include=["syncmask_fast", "syncmask_fast.*"]), "syncmask_fast.kernels"],
    package_dir={"syncmask_fast.kernels": "kernels"},
    ext_modules=[
        Extension("syncmask_fast._C", SOURCES, depends=HEADERS, optional=True),
        Extension("syncmask_fast._C_cuda", CUDA_SOURCES, depends=HEADERS, optional=True),
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPythonWheel},
)
