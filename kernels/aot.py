"""Compile every Triton kernel and configuration for several GPUs without having one, and print what each takes.

    python -m syncmask_fast.kernels.aot [--json FILE]

Per kernel, configuration and target: registers a thread, bytes of stack (register spills and local arrays, of
which these kernels have none) and bytes of shared memory, as `cuobjdump` reads them from the cubin. Arguments
are specialized as for torch's own allocations (`specialize`).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from syncmask_fast.kernels import mine_semi_hard_triton, sync_mask_triton
from syncmask_fast.kernels.library import LaunchConfig

TARGETS = (80, 90, 100)
# Shared memory a program may have, in bytes (CUDA C++ Programming Guide, compute capabilities).
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
# Types of arguments by name, where they are not float32 pointers and int32 numbers.
_ELEMENTS = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "anchors_ptr", "candidates_ptr"), "input")
_ELEMENTS |= dict.fromkeys(("maskable_ptr", "token_mask_ptr", "patch_mask_ptr"), "i1")
_ELEMENTS |= dict.fromkeys(("anchor_ids_ptr", "candidate_ids_ptr", "keys_ptr", "index_ptr"), "i64")
_SCALARS = dict.fromkeys(("scale", "margin", "temperature", "inverse_temperature"), "fp32") | {"ratio_bits": "i64"}
_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class Configuration(NamedTuple):
    """One kernel with all that decides its machine code, except the target."""

    module: ModuleType  # of the kernel
    launch: LaunchConfig
    dtype: str  # of the input
    types: dict[str, str]  # argument -> type; of the arguments that are not constants
    constants: dict[str, int | bool | float]
    multiples: list[str]  # arguments that are multiples of 16

    @property
    def kernel(self) -> triton.JITFunction:
        return getattr(self.module, self.launch.kernel)

    @property
    def name(self) -> str:
        constants = self.launch.constants.items()
        sizes = " ".join(f"{key.removeprefix('BLOCK_')}={int(value)}" for key, value in constants)
        return f"{self.launch.kernel.strip('_')} {self.dtype} {sizes}"


def configurations() -> list[Configuration]:
    """Return every configuration of every operator."""
    return [
        specialize(module, launch, _TYPES[dtype])
        for module in (sync_mask_triton, mine_semi_hard_triton)
        for dtype, launch in module.configurations()
    ]


def specialize(module: ModuleType, launch: LaunchConfig, dtype: str) -> Configuration:
    """Derive each argument's type from its name: `X_ptr`, `X_stride_D`, else a number.

    Pointers are multiples of 16 bytes. The last stride of a tensor is 1; where it is that of the head or feature width
    D, the other strides are multiples of 16, as is `width`.
    """
    one = Configuration(module, launch, dtype, {}, dict(launch.constants), [])
    names = [name for name in one.kernel.arg_names if name not in launch.constants]
    innermost = {name.partition("_stride_")[0]: name for name in names if "_stride_" in name}  # the last one stays
    for name in names:
        tensor, is_stride, _ = name.partition("_stride_")
        if is_stride and name == innermost[tensor]:
            one.constants[name] = 1
            continue
        if name.endswith("_ptr"):
            element = _ELEMENTS.get(name, "fp32")
            one.types[name] = "*" + (dtype if element == "input" else element)
        else:
            one.types[name] = _SCALARS.get(name, "i32")
        of_features = is_stride and innermost[tensor].endswith("_d")
        if name.endswith("_ptr") or name == "width" or of_features:
            one.multiples.append(name)
    return one


def compile_for(one: Configuration, capability: int) -> dict[str, str | int]:
    """Compile to a cubin for a compute capability (80 is sm_80) and read what it takes.

    returns: kernel, configuration, dtype, target, warps, stages, registers, stack and shared (bytes).
    errors:  RuntimeError of Triton or ptxas where it does not compile.
    """
    kernel, launch = one.kernel, one.launch
    signature = {name: one.types.get(name, "constexpr") for name in kernel.arg_names}
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in one.multiples}
    source = ASTSource(kernel, signature, dict(one.constants), attributes)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages},
    )
    usage = _resources(compiled.asm["cubin"])
    return {
        "kernel": launch.kernel.strip("_"),
        "configuration": one.name,
        "dtype": one.dtype,
        "target": f"sm_{capability}",
        "warps": launch.num_warps,
        "stages": launch.num_stages,
        "registers": usage["REG"],
        "stack": usage["STACK"] + usage["LOCAL"],
        "shared": compiled.metadata.shared,
    }


def compile_all(targets: Iterable[int] = TARGETS, processes: int = 2) -> list[dict[str, str | int]]:
    """Call `compile_for` for every configuration and target, in several processes."""
    jobs = [(index, target) for index in range(len(configurations())) for target in targets]
    with ProcessPoolExecutor(processes) as pool:
        return list(pool.map(_compile_job, *zip(*jobs, strict=True)))


def table(rows: list[dict[str, str | int]]) -> str:
    """Return the rows as a Markdown table: one line a configuration, `registers / shared KiB` for each target."""
    targets = sorted({row["target"] for row in rows}, key=lambda target: int(target[3:]))
    lines = [f"| configuration | warps | stages | {' | '.join(targets)} |", "|---" * (3 + len(targets)) + "|"]
    of = {(row["configuration"], row["target"]): row for row in rows}
    for name in dict.fromkeys(row["configuration"] for row in rows):
        cells = [of[name, target] for target in targets]
        figures = [
            f"{row['registers']} / {row['shared'] / 1024:.1f}"
            + (f" / {row['stack']} B of stack" if row["stack"] else "")
            for row in cells
        ]
        lines.append(f"| {name} | {cells[0]['warps']} | {cells[0]['stages']} | {' | '.join(figures)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m syncmask_fast.kernels.aot", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    arguments = parser.parse_args(argv)
    rows = compile_all()
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    print("registers a thread / KiB of shared memory a program")
    print(table(rows))
    spilled = [row for row in rows if row["stack"]]
    print(f"{len(rows)} compiled, {len(spilled)} with register spills")
    return 1 if spilled else 0


def _compile_job(index: int, target: int) -> dict[str, str | int]:
    return compile_for(configurations()[index], target)  # modules and kernels do not travel between processes


def _resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL ... of a cubin with one kernel, by the cuobjdump that comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603 (Triton's own tool)
    return {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", said[said.index("REG:") :])}


if __name__ == "__main__":
    sys.exit(main())
