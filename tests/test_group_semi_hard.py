"""group_semi_hard, C++ and reference, against a walk of plain loops written from the contract."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from syncmask_fast import _native, ops
from syncmask_fast.kernels import group_semi_hard as module


def oracle(image_feats, text_feats, ids, batch_size=1, margin=0.0, start=0, search_space=None):
    """The walk in float64, one item at a time."""
    images, texts = image_feats.double(), text_feats.double()
    ids, n = ids.tolist(), len(ids)
    result = []
    for begin in range(0, n, search_space or max(n, 1)):
        run = list(range(begin, min(n, begin + (search_space or n))))
        order = [start if begin == 0 else begin]
        while len(order) < len(run):
            p, c = len(order), order[-1]
            s = texts @ images[c] if p % 2 == 1 else images @ texts[c]
            left = [j for j in run if j not in order]
            taken = {ids[c]} | {ids[x] for x in order[p // batch_size * batch_size :]}
            allowed = [j for j in left if ids[j] not in taken]
            below = [j for j in allowed if s[j] < s[c] - margin]
            order.append(max(below or allowed or left, key=lambda j: (s[j], -j)))
        result += order
    return result


def draw(n, d, generator, products=None):
    images = torch.nn.functional.normalize(torch.randn(n, d, generator=generator), dim=1)
    texts = torch.nn.functional.normalize(images + 0.1 * torch.randn(n, d, generator=generator), dim=1)
    return images, texts, torch.randint(products or max(1, n // 3), (n,), generator=generator)


def draw_integers(n, d, generator, products=None):
    """Similarities that are small integers: exact in every order of summation, full of ties."""
    images, texts = (torch.randint(-1, 2, (n, d), generator=generator).float() for _ in range(2))
    return images, texts, torch.randint(products or max(1, n // 3), (n,), generator=generator)


# n and D: all ones; odd; primes; around the kernel's 16 and 32 lanes.
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (3, 15), (31, 16), (37, 17), (64, 31), (65, 33), (90, 100)])
def test_matches_reference(shape, backend, generator):
    for margin, batch_size, search_space in ((0.0, 1, None), (0.1, 8, None), (0.05, 5, 13)):
        args = draw(*shape, generator)
        options = dict(batch_size=batch_size, margin=margin, search_space=search_space)
        order = ops.group_semi_hard(*args, **options, backend=backend)
        assert order.dtype == torch.int64
        assert order.tolist() == oracle(*args, **options)


@pytest.mark.parametrize("margin", [0.0, 2.0, -3.0, math.inf, -math.inf])
@pytest.mark.parametrize("batch_size", [1, 4, 1000])
@pytest.mark.parametrize("search_space", [None, 1, 16, 1000])
def test_exact_with_ties(margin, batch_size, search_space, backend, generator):
    args = draw_integers(45, 5, generator)
    start = 0 if search_space == 1 else 11
    options = dict(batch_size=batch_size, margin=margin, start=start, search_space=search_space)
    assert ops.group_semi_hard(*args, **options, backend=backend).tolist() == oracle(*args, **options)


# 2 neighbors: most lists run dry; 5: some do; 128: none does. n: up to a panel of 48 items, and above 48 * 2 items
# (where bounds are sampled first). Few products: most of a list is not allowed.
@pytest.mark.parametrize("n", [1, 2, 47, 48, 49, 95, 300])
@pytest.mark.parametrize("neighbors", [0, 2, 5, 128])
def test_dry_lists(n, neighbors, isa, generator):
    for products, margin, search_space in (
        (n, 0.0, None),
        (n // 4 + 1, 0.3, None),
        (3, -math.inf, 130),
        (1, math.inf, None),
    ):
        options = dict(batch_size=8, margin=margin, search_space=search_space)
        for images, texts, ids in (draw(n, 16, generator, products), draw_integers(n, 4, generator, products)):
            expected = ops.group_semi_hard_reference(images.double(), texts.double(), ids, **options)
            assert torch.ops.syncmask.group_semi_hard(images, texts, ids, 8, margin, 0, search_space, neighbors).equal(
                expected
            )


@pytest.mark.gpu
@pytest.mark.skipif(
    not _native.is_cuda_loaded() or not torch.cuda.is_available(),
    reason="needs a CUDA device and csrc/group_semi_hard.cu built",
)
@pytest.mark.parametrize(
    ("n", "d"), [(1, 4), (2, 3), (33, 5), (300, 16), (3000, 30)]
)  # D in fours and not; one block and several
@pytest.mark.parametrize("neighbors", [0, 2, 40])  # 2: most lists run dry; 40: more than a warp reads at a time
def test_cuda(n, d, neighbors, generator):
    for products, margin, search_space in (
        (n, 0.0, None),
        (n // 4 + 1, 0.3, None),
        (3, -math.inf, 130),
        (1, math.inf, None),
    ):
        options = dict(batch_size=8, margin=margin, search_space=search_space)
        for args in (draw(n, d, generator, products), draw_integers(n, d, generator, products)):
            expected = ops.group_semi_hard(*args, **options)
            on_gpu = [x.cuda() for x in args]
            order = torch.ops.syncmask.group_semi_hard(*on_gpu, 8, margin, 0, search_space, neighbors)
            assert order.is_cuda
            assert order.tolist() == expected.tolist()
    assert ops.group_semi_hard(*on_gpu, **options, backend="cpp").equal(order)


def steps_of_the_cuda_kernel(
    images, texts, lists, product, item, unvisited, batch_of, order, state, batch_size, margin
):
    """What csrc/group_semi_hard.cu does, for new lists after each scan."""
    position, place = state.tolist()
    while True:
        order[position] = item[place]
        unvisited[place] = False
        batch_of[product[place]] = position // batch_size
        position += 1
        if position == len(order):
            break
        batch = position // batch_size
        allowed = unvisited & (product != product[place]) & (batch_of[product] != batch)
        first = [j for j in lists[(position + 1) % 2, place].tolist() if j >= 0 and allowed[j]][:1]
        if first:
            place = first[0]
            continue
        s = (texts @ images[place] if position % 2 else images @ texts[place]).double()
        near = allowed & (s < s[place] - margin)
        place = int(torch.where(near if near.any() else allowed if allowed.any() else unvisited, s, -math.inf).argmax())
        break
    state.copy_(torch.tensor([position, place]))


@pytest.mark.parametrize("neighbors", [1, 4, 64])
def test_lists_and_steps_on_cuda(neighbors, generator):
    """The loop that makes the lists, around a stand-in for the kernel."""
    library = torch.library.Library("syncmask", "IMPL")
    library.impl("_group_walk", steps_of_the_cuda_kernel, "CPU")
    for products, margin, start in ((70, 0.0, 0), (20, 0.3, 69), (3, -math.inf, 5), (1, math.inf, 0)):
        for images, texts, ids in (draw(70, 8, generator, products), draw_integers(70, 8, generator, products)):
            codes = torch.unique(ids, return_inverse=True)[1]
            expected = oracle(images, texts, ids, 8, margin, start)
            assert module._walk_cuda(images, texts, codes, 8, margin, start, neighbors).tolist() == expected
    library._destroy()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_compiles_for_cuda(tmp_path):
    """For sm_90, without a GPU: within the registers of a block of 1,024 threads, and nothing spilled."""
    include = Path(torch.__file__).parent / "include"
    source = Path(__file__).resolve().parents[1] / "csrc/group_semi_hard.cu"
    command = [
        "nvcc",
        "-std=c++17",
        "-O3",
        "-arch=sm_90",
        "-Xptxas",
        "-v",
        "-DUSE_CUDA",
        "-DTORCH_TARGET_VERSION=0x020a000000000000ULL",
    ]
    run = subprocess.run(
        [*command, "-isystem", str(include), "-c", str(source), "-o", str(tmp_path / "walk.o")],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    spills = re.findall(r"(\d+) bytes spill", run.stderr)
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", run.stderr)]
    assert spills
    assert set(spills) == {"0"}
    assert max(registers) <= 64
    print(run.stderr)


def test_dtypes_and_strides(backend, generator):
    args = draw_integers(40, 6, generator)
    expected = ops.group_semi_hard(*args, batch_size=4, backend=backend)
    for dtype in (torch.bfloat16, torch.float16):
        got = ops.group_semi_hard(*(x.to(dtype) for x in args[:2]), args[2], batch_size=4, backend=backend)
        assert got.equal(expected)
    strided = (args[0].T.contiguous().T, torch.stack((args[1], args[1]), 2)[:, :, 1], args[2].repeat_interleave(2)[::2])
    assert ops.group_semi_hard(*strided, batch_size=4, backend=backend).equal(expected)
    same = args[0][:1].expand(40, -1)  # every pair alike: by index, as products allow
    assert ops.group_semi_hard(same, same, torch.arange(40), backend=backend).tolist() == list(range(40))


def test_alternates_and_returns_to_every_level(backend):
    # Image 0 is near text 2, text 2 near image 1: image -> text, then text -> image.
    images = torch.tensor([[1.0, 0, 0], [0, 0.9, 0.1], [0.5, 0, 0], [0, 0, 1]])
    texts = torch.tensor([[2.0, 0, 0], [0.1, 1, 0], [0.9, 0.9, 0], [0, 0.1, 0.2]])
    distinct = torch.arange(4)
    assert ops.group_semi_hard(images, texts, distinct, margin=-math.inf, backend=backend).tolist() == [0, 2, 1, 3]
    # One product only: nothing is allowed, the walk continues to the highest, whatever its id.
    one = torch.zeros(4, dtype=torch.int64)
    assert ops.group_semi_hard(images, texts, one, batch_size=4, backend=backend).tolist() == [0, 2, 1, 3]
    # 2 is of 0's product: from 0 it goes to another one although less similar, and to 2 from there.
    ids = torch.tensor([7, 8, 7, 9])
    assert ops.group_semi_hard(images, texts, ids, margin=-math.inf, backend=backend).tolist() == [0, 1, 2, 3]
    # Everything is above the threshold: the highest allowed.
    assert ops.group_semi_hard(images, texts, distinct, margin=100.0, backend=backend).tolist() == [0, 2, 1, 3]


def test_threshold_is_strict(backend):
    images = torch.tensor([[4.0], [1.0], [1.0]])
    texts = torch.tensor([[1.0], [0.75], [0.5]])  # own pair of item 0: 4; item 1: 3; item 2: 2
    ids = torch.arange(3)
    assert ops.group_semi_hard(images, texts, ids, margin=1.0, backend=backend).tolist() == [0, 2, 1]
    assert ops.group_semi_hard(images, texts, ids, margin=0.9, backend=backend).tolist() == [0, 1, 2]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
def test_not_finite_is_still_a_permutation(bad, backend, generator):
    images, texts, ids = draw(30, 8, generator)
    images[3], texts[5, 2], images[17, 0], texts[17, 1] = bad, bad, bad, -bad
    order = ops.group_semi_hard(images, texts, ids, batch_size=4, margin=0.1, backend=backend)
    assert sorted(order.tolist()) == list(range(30))


def test_empty(backend):
    feats, ids = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    assert ops.group_semi_hard(feats, feats, ids, search_space=3, backend=backend).shape == (0,)
    wide = torch.zeros(3, 0)
    assert ops.group_semi_hard(wide, wide, torch.arange(3), backend=backend).tolist() == [0, 1, 2]


@st.composite
def walks(sample):
    n = sample(st.integers(1, 60))
    seed = sample(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    exact = sample(st.booleans())
    args = (draw_integers if exact else draw)(n, sample(st.integers(1, 9)), generator, sample(st.integers(1, n)))
    search_space = sample(st.none() | st.integers(1, n + 2))
    options = dict(
        batch_size=sample(st.integers(1, n + 1)),
        margin=sample(st.sampled_from([-math.inf, 0.0, 0.2, 1.0, math.inf])),
        start=sample(st.integers(0, min(n, search_space or n) - 1)),
        search_space=search_space,
    )
    return args, options, sample(st.integers(2, 9))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(walks())
def test_properties(walk):
    (images, texts, ids), options, neighbors = walk
    n, run = len(ids), options["search_space"] or len(ids)
    orders = [ops.group_semi_hard(images, texts, ids, **options, backend="reference")]
    for isa in _native.isas():
        _native.set_isa(isa)
        orders.append(ops.group_semi_hard(images, texts, ids, **options, backend="cpp"))
        orders.append(torch.ops.syncmask.group_semi_hard(images, texts, ids, *options.values(), neighbors))
    _native.set_isa(None)
    for order in orders:
        assert sorted(order.tolist()) == list(range(n))
        assert order[0] == options["start"]
        products = ids[order].tolist()
        for begin in range(0, n, run):
            part = products[begin : begin + run]
            assert sorted(order[begin : begin + run].tolist()) == list(range(begin, min(n, begin + run)))
            for p in range(1, len(part)):
                first = p // options["batch_size"] * options["batch_size"]
                taken = {*part[first:p], part[p - 1]}
                # The same product twice only where every product that was left would have been.
                assert part[p] not in taken or set(part[p:]) <= taken
    assert all(order.equal(orders[0]) for order in orders)


def test_threads_do_not_show(isa, generator):
    args = draw_integers(400, 8192, generator)  # enough work per step for three threads
    threads = torch.get_num_threads()
    try:
        orders = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            orders.append(ops.group_semi_hard(*args, batch_size=16, margin=2.0, backend="cpp"))
    finally:
        torch.set_num_threads(threads)
    reference = ops.group_semi_hard_reference(*args, batch_size=16, margin=2.0)
    assert all(order.equal(reference) for order in orders)


def test_float64_reference(generator):
    images, texts, ids = draw(40, 6, generator)
    got = ops.group_semi_hard_reference(images.double(), texts.double(), ids, batch_size=4, margin=0.05)
    assert got.tolist() == oracle(images, texts, ids, batch_size=4, margin=0.05)


def good():
    return dict(image_feats=torch.zeros(5, 4), text_feats=torch.zeros(5, 4), ids=torch.arange(5))


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"image_feats": torch.zeros(5)}, ["image_feats ", "[5]", "[N, D]"]),
        ({"image_feats": torch.zeros(5, 4, dtype=torch.int64)}, ["image_feats ", "int64"]),
        ({"image_feats": torch.zeros(5, 4, dtype=torch.float64)}, ["image_feats ", "float64"]),
        ({"text_feats": torch.zeros(4, 4)}, ["text_feats ", "[4, 4]", "[5, 4]"]),
        ({"text_feats": torch.zeros(5, 4, dtype=torch.bfloat16)}, ["text_feats ", "bfloat16"]),
        ({"text_feats": torch.zeros(5, 4, device="meta")}, ["text_feats ", "meta"]),
        ({"ids": torch.zeros(5)}, ["ids ", "float32", "int64"]),
        ({"ids": torch.arange(4)}, ["ids ", "[4]", "[5]"]),
        ({"batch_size": 0}, ["batch_size ", "0", "at least 1"]),
        ({"batch_size": 2.0}, ["batch_size ", "2.0"]),
        ({"margin": math.nan}, ["margin ", "nan"]),
        ({"start": 5}, ["start ", "5", "0 to 4"]),
        ({"start": -1}, ["start ", "-1"]),
        ({"start": 3, "search_space": 3}, ["start ", "3", "0 to 2"]),
        ({"search_space": 0}, ["search_space ", "0"]),
        ({"backend": "walk"}, ["backend ", "'walk'"]),
        ({"backend": "triton"}, ["backend ", "'triton'", "group_semi_hard"]),
    ],
)
def test_errors(change, names):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is checked below)
        ops.group_semi_hard(**(good() | change))
    for name in names:
        assert name in str(caught.value)


@pytest.mark.parametrize("name", ["group_semi_hard", "group_semi_hard_reference"])
def test_opcheck(name, generator):
    args = draw(9, 4, generator)
    for search_space in (None, 4):
        torch.library.opcheck(getattr(torch.ops.syncmask, name), (*args, 3, 0.1, 1, search_space))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_compile(backend, generator):
    def caller(images, texts, ids):
        return ops.group_semi_hard(images * 1.0, texts, ids, batch_size=3, backend=backend) + 1

    compiled = torch.compile(caller, fullgraph=True, backend="aot_eager")
    for n in (12, 7):
        args = draw(n, 4, generator)
        assert compiled(*args).equal(caller(*args))
