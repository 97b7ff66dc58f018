"""Compiles every Triton kernel and configuration for several GPUs without one, and says what each takes.

    python -m syncmask_fast.kernels.ahead_of_time [--json FILE]

Per kernel, configuration and target: registers a thread, bytes of stack (register spills and local arrays, of
which these kernels have none) and bytes of shared memory, as `cuobjdump` reads them from the cubin. The pointers
are specialised as torch's allocations are: 16-byte aligned, innermost stride 1, the other strides and the head
width multiples of 16.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from syncmask_fast.kernels import mine_semi_hard_triton, sync_mask_triton

TARGETS = (80, 90, 100)
# Shared memory a program may have, in bytes (CUDA C++ Programming Guide, compute capabilities).
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class Configuration(NamedTuple):
    """One kernel with all that decides its machine code but the target."""

    module: str  # of the kernel, in this package
    kernel: str
    types: dict[str, str]  # argument -> type; of the arguments that are not constants
    constants: dict[str, int | bool | float]
    multiples: tuple[str, ...]  # arguments that are multiples of 16
    num_warps: int
    num_stages: int
    dtype: str

    @property
    def name(self) -> str:
        sizes = " ".join(
            f"{key.removeprefix('BLOCK_')}={int(value)}" for key, value in self.constants.items() if key.isupper()
        )
        return f"{self.kernel.strip('_')} {self.dtype} {sizes}"


def _sync_mask() -> Iterator[Configuration]:
    module = "sync_mask_triton_kernels"
    for dtype, blocks in sync_mask_triton.configurations():
        kernel = _kernel(module, blocks.kernel)
        types, constants, multiples = {}, dict(blocks.constants), []
        for name in kernel.arg_names:
            if name in blocks.constants:
                continue
            if name in ("maskable_ptr", "token_mask_ptr", "patch_mask_ptr"):
                types[name] = "*i1"
            elif name in ("q_ptr", "k_ptr", "v_ptr"):
                types[name] = "*" + _TYPES[dtype]
            elif name.endswith("_ptr"):
                types[name] = "*fp32"
            elif name in ("q_stride_d", "k_stride_d", "v_stride_d", "m_stride_t"):
                constants[name] = 1
                continue
            else:
                types[name] = {"scale": "fp32", "ratio_bits": "i64"}.get(name, "i32")
            if name.endswith("_ptr") or name == "width" or ("_stride_" in name and not name.startswith("m_")):
                multiples.append(name)
        yield Configuration(
            module,
            blocks.kernel,
            types,
            constants,
            tuple(multiples),
            blocks.num_warps,
            blocks.num_stages,
            _TYPES[dtype],
        )


def _mine_semi_hard() -> Iterator[Configuration]:
    module = "mine_semi_hard_triton_kernels"
    features, whole_numbers = (
        ("anchors_ptr", "candidates_ptr"),
        ("anchor_ids_ptr", "candidate_ids_ptr", "keys_ptr", "index_ptr"),
    )
    for dtype, blocks in mine_semi_hard_triton.configurations():
        kernel = _kernel(module, blocks.kernel)
        types, constants, multiples = {}, dict(blocks.constants), []
        for name in kernel.arg_names:
            if name in blocks.constants:
                continue
            if name in ("a_stride_d", "c_stride_d", "a_id_stride", "c_id_stride", "p_stride"):
                constants[name] = 1
                continue
            if name.endswith("_ptr"):
                types[name] = "*" + (_TYPES[dtype] if name in features else "i64" if name in whole_numbers else "fp32")
            else:
                types[name] = "fp32" if name in ("margin", "temperature", "inverse_temperature") else "i32"
            if name.endswith("_ptr") or name in ("a_stride_n", "c_stride_m", "width"):
                multiples.append(name)
        yield Configuration(
            module,
            blocks.kernel,
            types,
            constants,
            tuple(multiples),
            blocks.num_warps,
            blocks.num_stages,
            _TYPES[dtype],
        )


# Each operator with Triton kernels adds a function that yields its configurations.
OPERATORS = (_sync_mask, _mine_semi_hard)


def configurations() -> list[Configuration]:
    """Every configuration of every operator."""
    return [one for operator in OPERATORS for one in operator()]


def compile_for(one: Configuration, capability: int) -> dict[str, str | int]:
    """Compiles to a cubin for a compute capability (80 is sm_80) and reads what it takes.

    returns: kernel, configuration, dtype, target, warps, stages, registers, stack and shared (bytes).
    errors:  RuntimeError of Triton or ptxas where it does not compile.
    """
    kernel = _kernel(one.module, one.kernel)
    signature = {name: one.types.get(name, "constexpr") for name in kernel.arg_names}
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in one.multiples}
    source = ASTSource(kernel, signature, dict(one.constants), attributes)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": one.num_warps, "num_stages": one.num_stages},
    )
    usage = _resources(compiled.asm["cubin"])
    return {
        "kernel": one.kernel.strip("_"),
        "configuration": one.name,
        "dtype": one.dtype,
        "target": f"sm_{capability}",
        "warps": one.num_warps,
        "stages": one.num_stages,
        "registers": usage["REG"],
        "stack": usage["STACK"] + usage["LOCAL"],
        "shared": compiled.metadata.shared,
    }


def compile_all(targets: Iterable[int] = TARGETS, processes: int = 2) -> list[dict[str, str | int]]:
    """`compile_for` every configuration and target, in several processes."""
    jobs = [(one, target) for one in configurations() for target in targets]
    with ProcessPoolExecutor(processes) as pool:
        return list(pool.map(compile_for, *zip(*jobs, strict=True)))


def table(rows: list[dict[str, str | int]]) -> str:
    """The rows as a Markdown table: one line a configuration, `registers / shared KiB` for each target."""
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
    parser = argparse.ArgumentParser(
        prog="python -m syncmask_fast.kernels.ahead_of_time", description=__doc__.partition("\n")[0]
    )
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


def _kernel(module: str, name: str) -> triton.JITFunction:
    return getattr(importlib.import_module(f"syncmask_fast.kernels.{module}"), name)


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
