"""The planner on as many samples as you like: time and memory of one epoch's plan, from drawn features.

    python bench/simulate_plan.py --samples 10000000 --width 64 --search-space 1920
    python bench/simulate_plan.py --samples 10000000 --width 64 --search-space 65536 --ranks 51    # the walks of one rank of 51

Features are those of a catalogue: kinds of things, products near their kind, four views near their product, images and texts a little apart.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from syncmask_fast.data.epoch_order import epoch_order
from syncmask_fast.distributed.group import Group

VIEWS, KINDS = 4, 200
CHUNK = 1 << 18


class OneOfMany(Group):
    """One rank of several whose others are not there: it makes its own walks and adds nothing to them."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks = ranks

    def all_reduce_host(self, x: Tensor) -> Tensor:
        return x


def catalogue(samples: int, width: int) -> tuple[Tensor, Tensor]:
    """Unit vectors float32 [samples, width] of images and of texts, made in place."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(KINDS, width, generator=generator)
    images, texts = torch.empty(samples, width), torch.empty(samples, width)
    for begin in range(0, samples, CHUNK):
        n = min(CHUNK, samples - begin)
        product = torch.randn(-(-n // VIEWS), width, generator=generator).repeat_interleave(VIEWS, 0)[:n]
        middle = (
            kinds[torch.randint(KINDS, (-(-n // VIEWS),), generator=generator)].repeat_interleave(VIEWS, 0)[:n]
            + 0.5 * product
        )
        for side in (images, texts):
            side[begin : begin + n] = F.normalize(middle + 0.4 * torch.randn(n, width, generator=generator), dim=1)
    return images, texts


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--search-space", type=int, help="unset: one walk over all")
    parser.add_argument("--ranks", type=int, default=1, help="time the part of one rank of so many")
    args = parser.parse_args()
    images, texts = catalogue(args.samples, args.width)
    products = np.arange(args.samples) // VIEWS
    before, begin, begin_cpu = peak_gib(), time.perf_counter(), time.process_time()
    order = epoch_order(
        0,
        1,
        products,
        batch_size=args.batch_size,
        kind="semi_hard",
        image_feats=images,
        text_feats=texts,
        search_space=args.search_space,
        group=OneOfMany(args.ranks),
    )
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - begin_cpu
    if args.ranks == 1:
        seen = np.zeros(args.samples, bool)
        seen[order] = True
        assert seen.all(), "the plan is no permutation"
    walks = -(-args.samples // (args.search_space or args.samples))
    found = vars(args) | {"walks": walks, "walks_made": -(-walks // args.ranks), "threads": torch.get_num_threads()}
    found |= {"seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds, 1)}
    found |= {
        "bank_gib": round(2 * images.nbytes / 2**30, 2),
        "peak_before_gib": round(before, 2),
        "peak_gib": round(peak_gib(), 2),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
