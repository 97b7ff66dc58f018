"""Several processes that train as one: how they find each other, what they agree on, and how their gradients add up.

`--batch-size` counts the pairs of all ranks together. Every batch is cut over the ranks in runs of neighbours (`shard_bounds`), and the loss of a
rank is its part of a sum: the losses of all ranks add up to the loss of one process with the whole batch, and so do their gradients. Hence gradients
are summed, not averaged, and nothing hangs on how many masked words or patches a rank happens to have. `parts.py` holds a rank's rows of a batch.

Tensors on the device travel through `Group`'s own backend (NCCL on CUDA, gloo on CPUs); what the host must know (which rows a batch has, whether
to stop, the plan) through a second group that is always gloo, so that the device is never waited for. Gradients have a third one, because they
travel while the backward pass still runs.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncmask_fast.utils.device import cpu_cores
from syncmask_fast.utils.errors import UserError

Item = TypeVar("Item")

HOST_TIMEOUT = timedelta(
    hours=12
)  # of the host's group: rank 0 may plan an epoch or draw a dataset while the others wait
BUCKET_BYTES = 8 << 20  # gradients travel in pieces of about this size
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
END = 2**62  # the number of the batch that comes after an epoch's last


def shard_bounds(rows: int, ranks: int) -> list[int]:
    """ranks + 1 numbers: rank r has rows bounds[r] to bounds[r + 1] - 1 of `rows`; where they do not divide, some ranks have one more."""
    return [rows * rank // ranks for rank in range(ranks + 1)]


def check_batch_size(pairs: int, ranks: int, negatives: str) -> None:
    """Raises `UserError` where a batch gives a rank no pair, or, with local negatives, no pair of another product."""
    fewest = ranks * (2 if negatives == "local" and ranks > 1 else 1)
    if pairs < fewest:
        raise UserError(f"--batch-size {pairs} is that of all {ranks} processes together: give {fewest} or more.")


class Group:
    """The processes of a run. A process that was not started by torchrun is a group of one, in which nothing travels.

    rank, ranks:             this process's number in the run, and how many there are.
    local_rank, local_world_size: the same among the processes of this machine.
    """

    def __init__(self, rank: int = 0, ranks: int = 1, local_rank: int = 0, local_world_size: int = 1) -> None:
        self.rank, self.world_size, self.local_rank, self.local_world_size = rank, ranks, local_rank, local_world_size
        self.host = self.gradients = None
        if ranks > 1:
            self.host = dist.new_group(backend="gloo", timeout=HOST_TIMEOUT)
            self.gradients = dist.new_group()

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files, prints and logs."""
        return self.rank == 0

    def threads(self) -> int:
        """This process's part of the machine's cores, at most 16."""
        return min(16, max(1, cpu_cores() // self.local_world_size))

    # On the host ------------------------------------------------------------------------------------------------------------------------

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        if self.world_size == 1:
            return flag
        flags = torch.tensor([int(flag)])
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.host)
        return bool(flags)

    def all_reduce_host(self, x: Tensor) -> Tensor:
        """The sum over the ranks of a host tensor, in place."""
        if self.world_size > 1:
            dist.all_reduce(x, group=self.host)
        return x

    def all_gather_host(self, message: Tensor) -> Tensor:
        """What every rank says, [ranks, ...]; messages are host tensors of one shape and dtype."""
        if self.world_size == 1:
            return message[None]
        said = message.new_empty(self.world_size, *message.shape)
        dist.all_gather_into_tensor(said, message[None], group=self.host)
        return said

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's values of a host tensor, which has the same shape and dtype on all ranks."""
        if self.world_size > 1:
            dist.broadcast(tensor, 0, group=self.host)
        return tensor

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value of something small that can be pickled."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, 0, group=self.host)
        return values[0]

    @contextlib.contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Rank 0 goes through the body first, then one process of every other machine, then the rest: what one has written the next ones find."""
        turn = 0 if self.rank == 0 else 1 if self.local_rank == 0 else 2
        for stage in range(3):
            if stage == turn:
                yield
            if self.world_size > 1:
                dist.barrier(group=self.host)

    # On the device ----------------------------------------------------------------------------------------------------------------------

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks, without gradient."""
        x = x.detach()
        if self.world_size > 1:
            x = x.clone()
            dist.all_reduce(x)
        return x

    def broadcast_parameters(self, tensors: Iterable[Tensor]) -> None:
        """Overwrites tensors on the device by those of rank 0."""
        for tensor in tensors if self.world_size > 1 else ():
            values = tensor.detach().contiguous()
            dist.broadcast(values, 0)
            tensor.detach().copy_(values)


SINGLE_PROCESS = Group()


def local_device(name: str) -> str:
    """What --device means for this process: "auto" and "cuda" give each process of a machine a CUDA device of its own.

    errors: UserError where there are more processes than devices, or where a process is told which device to take.
    """
    if "WORLD_SIZE" not in os.environ or name == "cpu":
        return name
    if name.startswith("cuda:"):
        raise UserError(
            f"--device {name} names one device, but torchrun started several processes: give --device cuda, and each takes its own."
        )
    devices, processes = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if devices == 0:
        return name
    if processes > devices:
        raise UserError(
            f"torchrun started {processes} processes on this machine, which has {devices} CUDA devices: give --nproc_per_node {devices}."
        )
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"


@contextlib.contextmanager
def init_distributed(device: torch.device) -> Iterator[Group]:
    """The group of this process: the one that torchrun's environment names, or a group of one. Ranks other than the first print nothing.

    errors: UserError where the environment is not whole, where the processes do not find each other, or where one of them is lost.
    """
    if "WORLD_SIZE" not in os.environ:
        yield SINGLE_PROCESS
        return
    missing = [name for name in TORCHRUN if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE is set, but {', '.join(missing)} not: start the run with torchrun, or unset WORLD_SIZE."
        )
    rank, ranks, local_rank, local_world_size = (int(os.environ[name]) for name in TORCHRUN[:4])
    backend = "nccl" if device.type == "cuda" else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(device)
    try:
        store = store_for_this_attempt(next(iter(dist.rendezvous("env://", rank, ranks)))[0], rank, ranks)
        device_id, timeout = (device, None) if backend == "nccl" else (None, HOST_TIMEOUT)
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, device_id=device_id, timeout=timeout)
        group = Group(rank, ranks, local_rank, local_world_size)
    except (RuntimeError, ValueError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"rank {rank} did not find the others through {place} ({one_line(error)}): check torchrun's --rdzv-endpoint."
        ) from error
    said = sys.stdout
    try:
        with contextlib.ExitStack() as stack:
            if rank:
                sys.stdout = stack.enter_context(open(os.devnull, "w"))
            yield group
            dist.barrier(group=group.host)
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)):
            raise
        mend = "its own message says why; torchrun --max-restarts N has runs go on from their last checkpoint"
        raise UserError(f"rank {rank} lost another process ({one_line(error)}): {mend}.") from error
    finally:
        sys.stdout = said
    dist.destroy_process_group()


def store_for_this_attempt(store: dist.Store, rank: int, ranks: int) -> dist.Store:
    """A part of the store that no earlier processes have written to, the same for all ranks.

    torchrun (2.15) keeps its store over restarts, in which the addresses of processes that are gone would be found, and its count of restarts differs
    from machine to machine. So rank 0 makes a name for this attempt, and the others take it when rank 0 has shown that it knows of them.
    """
    mine = uuid.uuid4().hex
    if rank == 0:
        store.set("attempt", mine)
        for other in range(1, ranks):
            store.set(f"{mine}/{other}/known", store.get(f"{mine}/{other}"))
        return dist.PrefixStore(mine, store)
    while True:
        attempt = store.get("attempt").decode()
        store.set(f"{attempt}/{rank}", mine)
        known = f"{attempt}/{rank}/known"
        if store.check([known]) and store.get(known).decode() == mine:
            return dist.PrefixStore(attempt, store)
        time.sleep(0.02)


@contextlib.contextmanager
def errors_on_local_main_only() -> Iterator[None]:
    """For what all processes of a machine do alike, such as reading the command line: of a mistake only the first one speaks."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        try:
            yield
        except UserError:
            raise SystemExit(2) from None


def restart_count() -> int:
    """How often torchrun has restarted the processes of this run."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


class NullLog:
    """Stands for the log on the ranks that have none: takes every call and does nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *values, **named: None


def lockstep(
    batches: Iterator[Item], rows_of: Callable[[Item], tuple[int, np.ndarray]], width: int, group: Group
) -> Iterator[tuple[Item, list[np.ndarray]]]:
    """One batch after the other, for all ranks the same one, each with what all ranks say of its rows.

    rows_of: of this rank's share of a batch its number in the epoch, and two numbers that describe each of its rows, int64 [n, 2].
    width:   the most rows that a rank can have.
    returns: shares, each with what describes the rows of every rank.
    A batch of which a rank has no row left, because all its images are damaged, is left out by all.
    """
    share = next(batches, None)
    while True:
        number, rows = (END, None) if share is None else rows_of(share)
        message = torch.zeros(2 + width, 2, dtype=torch.int64)
        message[0] = number
        if rows is not None:
            message[1] = len(rows)
            message[2 : 2 + len(rows)] = torch.from_numpy(rows)
        said = group.all_gather_host(message)
        furthest, together = int(said[:, 0].max()), int(said[:, 0].min()) == int(said[:, 0].max())
        if together and share is None:
            return
        if together:
            yield share, [theirs[2 : 2 + int(theirs[1, 0])].numpy() for theirs in said]
        if together or number < furthest:
            share = next(batches, None)


class GradientReducer:
    """Adds up the gradients of all ranks, piece by piece, while the backward pass still runs.

    The pieces are the parameters from the last to the first, which is about the order in which their gradients come, and travel in this order on all
    ranks. A parameter that has no gradient keeps none; which these are is the same on all ranks, since it follows from the settings and the step.
    Not torch's DistributedDataParallel: it takes one forward pass of one module, averages, and gives every parameter a gradient.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], group: Group, piece: int = BUCKET_BYTES) -> None:
        self.group = group
        self.pieces: list[list[nn.Parameter]] = [[]]
        size = 0
        for parameter in reversed([p for p in parameters if p.requires_grad]):
            if size >= piece:
                self.pieces.append([])
                size = 0
            self.pieces[-1].append(parameter)
            size += parameter.nbytes
        self.piece_of = {parameter: number for number, members in enumerate(self.pieces) for parameter in members}
        self.missing: list[int] = []
        self.sent: list[tuple[dist.Work, Tensor, list[Tensor]]] = []
        self.listening, self.next = False, 0
        if group.world_size > 1:
            for parameter in self.piece_of:
                parameter.register_post_accumulate_grad_hook(self._ready)

    @contextlib.contextmanager
    def reduce_during_backward(self) -> Iterator[None]:
        """Around the backward pass after which the gradients are those of a step; at its end all gradients are sums over the ranks."""
        if self.group.world_size == 1:
            yield
            return
        self.missing = [len(members) for members in self.pieces]
        self.listening, self.next = True, 0
        yield
        self.listening = False
        for number in range(self.next, len(self.pieces)):
            self._send(number)
        for work, flat, gradients in self.sent:
            work.wait()
            torch._foreach_copy_(
                gradients,
                [x.view_as(g) for x, g in zip(flat.split([g.numel() for g in gradients]), gradients, strict=True)],
            )
        self.sent = []

    def _ready(self, parameter: nn.Parameter) -> None:
        if not self.listening:
            return
        self.missing[self.piece_of[parameter]] -= 1
        while self.next < len(self.pieces) and self.missing[self.next] == 0:
            self._send(self.next)

    def _send(self, number: int) -> None:
        self.next = number + 1
        gradients = [p.grad for p in self.pieces[number] if p.grad is not None]
        if gradients:
            flat = torch.cat([g.reshape(-1) for g in gradients])
            self.sent.append((dist.all_reduce(flat, group=self.group.gradients, async_op=True), flat, gradients))


def check_replicas_match(parameters: Sequence[Tensor], group: Group, step: int) -> None:
    """Raises `UserError` where the ranks' weights are no longer the same, bit for bit."""
    if group.world_size == 1:
        return
    total = torch.stack([p.detach().double().sum() for p in parameters]).sum().cpu()
    sums = group.all_gather_host(total[None])
    if (sums != sums[0]).any():
        values = ", ".join(f"{value:.17g}" for value in sums.flatten().tolist())
        mend = "use machines and devices of one kind, or go on from the last checkpoint"
        raise UserError(f"at step {step} the ranks' weights differ (their sums are {values}): {mend}.")
