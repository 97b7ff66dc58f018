"""Time and memory of planning one epoch over any number of samples, with the features of a simulated catalog.

    python -m bench.simulate_epoch_order --samples 10000000 --width 64 --search-space 1920
    python -m bench.simulate_epoch_order --samples 10000000 --width 64 --search-space 65536 --ranks 51

The catalog has 200 kinds of products. A product is near its kind, its four views are near the product, and image and
text of a view are near each other.
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
    """Rank 0 of several ranks that do not exist: it walks its own search spaces and adds nothing from the others."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.world_size = ranks

    def all_reduce_host(self, x: Tensor) -> Tensor:
        return x


def catalog(samples: int, width: int) -> tuple[Tensor, Tensor]:
    """Return unit vectors float32 [samples, width] of images and of texts."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(KINDS, width, generator=generator)
    images, texts = torch.empty(samples, width), torch.empty(samples, width)
    for begin in range(0, samples, CHUNK):  # in place, so that memory is the planner's
        n = min(CHUNK, samples - begin)
        products = -(-n // VIEWS)
        own = torch.randn(products, width, generator=generator)
        kind = kinds[torch.randint(KINDS, (products,), generator=generator)]
        view = (kind + 0.5 * own).repeat_interleave(VIEWS, 0)[:n]
        for features in (images, texts):
            noise = torch.randn(n, width, generator=generator)
            features[begin : begin + n] = F.normalize(view + 0.4 * noise, dim=1)
    return images, texts


def peak_gib() -> float:
    """Return the most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    """Plan once and print a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--search-space", type=int, help="unset: one walk over all")
    parser.add_argument("--ranks", type=int, default=1, help="time the walks of one rank of so many")
    args = parser.parse_args()
    images, texts = catalog(args.samples, args.width)
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
        assert np.array_equal(np.sort(order), np.arange(args.samples)), "the order is no permutation"
    walks = -(-args.samples // (args.search_space or args.samples))
    row = vars(args) | {
        "walks": walks,
        "walks_of_rank": -(-walks // args.ranks),
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "bank_gib": round(2 * images.nbytes / 2**30, 2),
        "peak_before_gib": round(before, 2),
        "peak_gib": round(peak_gib(), 2),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
