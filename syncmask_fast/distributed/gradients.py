"""Sum gradients over the ranks while the backward pass still runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncmask_fast.distributed.group import Group
from syncmask_fast.utils.errors import UserError

BUCKET_BYTES = 8 << 20


class GradientReducer:
    """Sum the gradients of all ranks, bucket by bucket, overlapped with the backward pass.

    Buckets hold parameters from the last to the first, roughly the order in which gradients arrive, and are sent in
    this order on every rank. A parameter without a gradient keeps none; the settings and the step decide which ones
    these are, so all ranks agree.

    We do not use DistributedDataParallel: it expects one forward pass of one module, averages, and gives every
    parameter a gradient.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], group: Group, bucket_bytes: int = BUCKET_BYTES) -> None:
        self.group = group
        self.buckets: list[list[nn.Parameter]] = [[]]
        size = 0
        for parameter in reversed([p for p in parameters if p.requires_grad]):
            if size >= bucket_bytes:
                self.buckets.append([])
                size = 0
            self.buckets[-1].append(parameter)
            size += parameter.nbytes
        self._bucket_of = {parameter: number for number, bucket in enumerate(self.buckets) for parameter in bucket}
        self._missing: list[int] = []  # gradients that each bucket still waits for
        self._in_flight: list[tuple[dist.Work, Tensor, list[Tensor]]] = []
        self._active, self._next = False, 0
        if group.world_size > 1:
            for parameter in self._bucket_of:
                parameter.register_post_accumulate_grad_hook(self._on_grad)

    @contextlib.contextmanager
    def reduce_during_backward(self) -> Iterator[None]:
        """Wrap the last backward pass of a step. On exit all gradients are sums over the ranks."""
        if self.group.world_size == 1:
            yield
            return
        self._missing = [len(bucket) for bucket in self.buckets]
        self._active, self._next = True, 0
        yield
        self._active = False
        # Buckets with a parameter that got no gradient are still waiting.
        for number in range(self._next, len(self.buckets)):
            self._launch(number)
        for work, flat, gradients in self._in_flight:
            work.wait()
            pieces = flat.split([g.numel() for g in gradients])
            torch._foreach_copy_(gradients, [x.view_as(g) for x, g in zip(pieces, gradients, strict=True)])
        self._in_flight = []

    def _on_grad(self, parameter: nn.Parameter) -> None:
        if not self._active:
            return
        self._missing[self._bucket_of[parameter]] -= 1
        # A full bucket waits for those before it: every rank must launch its collectives in the same order.
        while self._next < len(self.buckets) and self._missing[self._next] == 0:
            self._launch(self._next)

    def _launch(self, number: int) -> None:
        self._next = number + 1
        gradients = [p.grad for p in self.buckets[number] if p.grad is not None]
        if gradients:
            flat = torch.cat([g.reshape(-1) for g in gradients])
            work = dist.all_reduce(flat, group=self.group.gradient_group, async_op=True)
            self._in_flight.append((work, flat, gradients))


def check_replicas_match(parameters: Sequence[Tensor], group: Group, step: int) -> None:
    """Raise `UserError` if the ranks' weights are not equal, bit for bit."""
    if group.world_size == 1:
        return
    total = torch.stack([p.detach().double().sum() for p in parameters]).sum().cpu()
    sums = group.all_gather_host(total[None])
    if (sums != sums[0]).any():
        values = ", ".join(f"{value:.17g}" for value in sums.flatten().tolist())
        raise UserError(
            f"The ranks' weights differ at step {step} (their sums are {values}). "
            "Use machines and devices of one kind, or resume from the last checkpoint."
        )
