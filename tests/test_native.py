"""The C++ operators under AddressSanitizer, on every instruction set, in one process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from syncmask_fast import _native

ROOT = Path(__file__).resolve().parents[1]

# Every kernel and every path in it: words and keys that fill no vector, one word, no word, several parts, samples
# or parts shared out, converted and strided inputs. Reads and writes past an end abort the process.
CODE = """
import sys
from pathlib import Path
import torch
from syncmask_fast import _native
_native.find = lambda name=_native.LIBRARY: Path(sys.argv[1]) if name == _native.LIBRARY else None
from syncmask_fast import ops
from syncmask_fast.kernels.crop_resize import crop_resize
from syncmask_fast.kernels.packed_attention import packed_attention
from syncmask_fast.kernels.transpose import transpose
from syncmask_fast.model.layout import PackedLayout
assert str(_native.load()) == sys.argv[1], _native.describe()
ones = torch.ones(3)
for isa in _native.isas():
    _native.set_isa(isa)
    torch.manual_seed(0)
    for b, h, t, p, d in [(0, 1, 2, 3, 4), (1, 1, 1, 1, 1), (3, 2, 7, 9, 5), (1, 2, 70, 25, 17), (40, 1, 19, 37, 16)]:
        words = torch.rand(b, t) < 0.7
        words[:1] = False
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            q, k, v = (torch.randn(b, h, n, d).to(dtype) for n in (t, p + 1, p + 1))
            for token_rule, patch_rule in (("peak", "max"), ("mass", "mean"), ("cls", "cls"), ("output", "weighted")):
                rules = dict(token_score=token_rule, patch_score=patch_rule, backend="cpp")
                ops.sync_mask(q, k, words, v=v, token_ratio=1, **rules)
                one_k, one_v = k[:1].expand_as(k), v[:1].expand_as(v)
                ops.sync_mask(q.mT.contiguous().mT, one_k, words, v=one_v, patch_ratio=1, **rules)
    for n, d in [(0, 3), (1, 1), (37, 17), (90, 100), (230, 9)]:
        images, texts, ids = torch.randn(n, d).round(), torch.randn(n, d).round(), torch.arange(n) // 3
        for search_space in (None, 13):
            options = dict(batch_size=5, search_space=search_space)
            expected = ops.group_semi_hard(images, texts, ids, **options, backend="reference")
            for neighbors in (0, 2, 128):
                found = torch.ops.syncmask.group_semi_hard(images, texts, ids, 5, 0.0, 0, search_space, neighbors)
                assert found.equal(expected)
    sizes = [(0, 3, 2, 1), (3, 0, 2, 1), (1, 1, 1, 5), (17, 35, 9, 3), (5, 700, 1000, 70), (90, 3000, 33, 20)]
    for n, m, d, k in sizes:
        ids, other_ids, positive = torch.arange(n) // 2, torch.arange(m) // 2, torch.rand(n)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            anchors, candidates = torch.randn(n, d).to(dtype), torch.randn(m, d).to(dtype)
            for temperature in (None, 0.5):
                options = dict(k=k, temperature=temperature, backend="cpp")
                ops.mine_semi_hard(anchors, candidates, ids, other_ids, positive, **options)
                strided = anchors.T.contiguous().T, candidates[:1].expand(m, d)
                ops.mine_semi_hard(*strided, ids, other_ids, positive, **options)
    blocks = [([], [], 1, 1), ([1, 0], [0, 1], 1, 1), ([3, 70], [17, 33], 2, 64), ([65, 1], [5, 64], 1, 19)]
    for queries, keys, h, d in blocks:
        for dtype in (torch.float32, torch.bfloat16):
            q, k, v = (torch.randn(h, sum(n), d).to(dtype).requires_grad_() for n in (queries, keys, keys))
            parts = q.transpose(0, 1), k.transpose(0, 1), v[:1].expand_as(v).transpose(0, 1)
            starts = PackedLayout.of(queries).cu_seqlens, PackedLayout.of(keys).cu_seqlens
            packed_attention(*parts, *starts).sum().backward()
    for height, width, (x, y, w, h), size in [
        (1, 1, (0, 0, 1, 1), 1), (1, 1, (0, 0, 1, 1), 37), (5, 300, (0, 0, 300, 5), 1), (61, 53, (52, 60, 1, 1), 19),
        (61, 53, (7, 0, 46, 61), 31), (97, 101, (3, 5, 98, 92), 16), (13, 11, (2, 1, 9, 12), 127),
    ]:
        image, out = torch.randint(256, (height, width, 3), dtype=torch.uint8), torch.empty(3, size, size)
        for flip in (False, True):
            crop_resize(image, x, y, w, h, flip, 1.0, 1.0, 1.0, ones, ones, out)
            crop_resize(image, x, y, w, h, flip, 1.1, 0.9, 0.5, ones, ones, out)
    for shape in [(0, 3), (1, 1), (8, 8), (7, 13), (33, 65), (131, 8)]:
        transpose(torch.randn(shape).bfloat16())
    print(isa)
"""


@pytest.mark.slow
def test_address_sanitizer(tmp_path):
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    library = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(library).is_file():
        pytest.skip(f"{compiler} has no libasan")
    build = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)]
    flags = {"CXX": compiler, "CXXFLAGS": "-fsanitize=address -fno-omit-frame-pointer -g -O1", "NVCC": ""}  # _C only
    run = subprocess.run(build, env=os.environ | flags, capture_output=True, text=True, cwd=ROOT)
    built = tmp_path / "syncmask_fast/_C.so"
    assert built.is_file(), run.stderr
    settings = {"LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", CODE, str(built)]
    run = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-5000:]
    assert run.stdout.split() == _native.isas()
