"""The process group of a run: rendezvous, and collectives on the host and on the device.

`--batch-size` counts the pairs of all ranks. Each batch is split into runs of neighboring rows (`shard_bounds`). A
rank's loss is its share of a sum: the losses of all ranks add up to the loss of one process with the whole batch, and
so do the gradients. Gradients are therefore summed, not averaged, and the number of masked tokens on a rank does not
matter.

Three groups: device tensors use the default backend (NCCL on CUDA, gloo on CPUs). Host data (rows of a batch, the epoch
order, whether to stop) uses gloo, so the device is never waited for. Gradients have their own group, because they are
sent while the backward pass runs.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from syncmask_fast.utils.errors import UserError

HOST_TIMEOUT = timedelta(hours=12)  # rank 0 may plan an epoch or draw a dataset while the other ranks wait
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def shard_bounds(rows: int, world_size: int) -> list[int]:
    """Return world_size + 1 numbers: rank r holds rows bounds[r] to bounds[r + 1] - 1. Sizes differ by at most one."""
    return [rows * rank // world_size for rank in range(world_size + 1)]


def check_batch_size(batch_size: int, world_size: int, negatives: str) -> None:
    """Raise `UserError` if a rank would get no pair, or, with local negatives, no pair of another product."""
    fewest = world_size * (2 if negatives == "local" and world_size > 1 else 1)
    if batch_size < fewest:
        raise UserError(
            f"--batch-size {batch_size} is shared by all {world_size} processes and is too small. "
            f"Give {fewest} or more."
        )


class Group:
    """The processes of a run. A process that torchrun did not start is a group of one, and its collectives do nothing.

    rank, world_size:             the number of this process in the run, and how many there are.
    local_rank, local_world_size: the same among the processes of this machine.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, local_rank: int = 0, local_world_size: int = 1) -> None:
        self.rank, self.world_size = rank, world_size
        self.local_rank, self.local_world_size = local_rank, local_world_size
        self.host_group = self.gradient_group = None
        if world_size > 1:
            self.host_group = dist.new_group(backend="gloo", timeout=HOST_TIMEOUT)
            self.gradient_group = dist.new_group()

    @property
    def is_main(self) -> bool:
        """Whether this process writes files, prints and logs."""
        return self.rank == 0

    def print(self, *values: object) -> None:
        """Print on the main process only."""
        if self.is_main:
            print(*values, flush=True)

    # Host collectives

    def any_rank(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank."""
        if self.world_size == 1:
            return flag
        flags = torch.tensor([int(flag)])
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.host_group)
        return bool(flags)

    def all_reduce_host(self, x: Tensor) -> Tensor:
        """Sum a host tensor over the ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(x, group=self.host_group)
        return x

    def all_gather_host(self, message: Tensor) -> Tensor:
        """Return the host tensors of all ranks, [world_size, ...]; they have one shape and dtype."""
        if self.world_size == 1:
            return message[None]
        messages = message.new_empty(self.world_size, *message.shape)
        dist.all_gather_into_tensor(messages, message[None], group=self.host_group)
        return messages

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Overwrite a host tensor by rank 0's, which has the same shape and dtype, and return it."""
        if self.world_size > 1:
            dist.broadcast(tensor, 0, group=self.host_group)
        return tensor

    def broadcast_object(self, value: Any) -> Any:
        """Return rank 0's value, which must be picklable."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, 0, group=self.host_group)
        return values[0]

    @contextlib.contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Run the body on rank 0 first, then on one process of each other machine, then on the rest.

        What one process writes, the next ones find.
        """
        turn = 0 if self.rank == 0 else 1 if self.local_rank == 0 else 2
        for stage in range(3):
            if stage == turn:
                yield
            if self.world_size > 1:
                dist.barrier(group=self.host_group)

    # Device collectives

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum of a device tensor over the ranks, without gradient."""
        x = x.detach()
        if self.world_size > 1:
            x = x.clone()
            dist.all_reduce(x)
        return x

    def broadcast_parameters(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite device tensors by those of rank 0."""
        for tensor in tensors if self.world_size > 1 else ():
            values = tensor.detach().contiguous()
            dist.broadcast(values, 0)
            tensor.detach().copy_(values)


SINGLE_PROCESS = Group()


def local_device(name: str) -> str:
    """Return the value of --device for this process: under torchrun each process of a machine gets its own CUDA device.

    errors: UserError if there are more processes than devices, or if --device names one device.
    """
    if "WORLD_SIZE" not in os.environ or name == "cpu":
        return name
    if name.startswith("cuda:"):
        raise UserError(
            f"--device {name} names one device, but torchrun started several processes. "
            "Give --device cuda; each process then takes its own."
        )
    devices, processes = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if devices == 0:
        return name
    if processes > devices:
        raise UserError(
            f"torchrun started {processes} processes on this machine, which has {devices} CUDA devices. "
            f"Give --nproc_per_node {devices}."
        )
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"


@contextlib.contextmanager
def init_distributed(device: torch.device) -> Iterator[Group]:
    """Yield the group that torchrun's environment describes, or a group of one.

    errors: UserError if the environment is incomplete, if the processes do not find each other, or if one is lost.
    """
    if "WORLD_SIZE" not in os.environ:
        yield SINGLE_PROCESS
        return
    missing = [name for name in TORCHRUN_VARIABLES if name not in os.environ]
    if missing:
        raise UserError(f"WORLD_SIZE is set, but {', '.join(missing)} is not. Use torchrun, or unset WORLD_SIZE.")
    rank, world_size, local_rank, local_world_size = (int(os.environ[name]) for name in TORCHRUN_VARIABLES[:4])
    backend = "nccl" if device.type == "cuda" else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(device)
    try:
        store = next(iter(dist.rendezvous("env://", rank, world_size)))[0]
        store = store_for_this_attempt(store, rank, world_size)
        device_id, timeout = (device, None) if backend == "nccl" else (None, HOST_TIMEOUT)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, device_id=device_id, timeout=timeout
        )
        group = Group(rank, world_size, local_rank, local_world_size)
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"Rank {rank} did not find the other ranks at {address} ({one_line(error)}). "
            "Check torchrun's --rdzv-endpoint."
        ) from error
    try:
        yield group
        dist.barrier(group=group.host_group)
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)):
            raise
        raise UserError(
            f"Rank {rank} lost another process ({one_line(error)}). That process's own message says why; "
            "with torchrun --max-restarts N a run resumes from its last checkpoint."
        ) from error
    dist.destroy_process_group()


def store_for_this_attempt(store: dist.Store, rank: int, world_size: int) -> dist.Store:
    """Return a part of the store that no earlier processes have written to, the same for all ranks.

    torchrun (2.15) keeps its store over restarts, with the addresses of processes that are gone, and its restart counts
    differ between machines. Rank 0 therefore draws a name for this attempt. The others use it once rank 0 has confirmed
    that it has seen them.
    """
    mine = uuid.uuid4().hex
    if rank == 0:
        store.set("attempt", mine)
        for other in range(1, world_size):
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
    """Wrap what all processes of a machine do alike, such as parsing flags: only the first one prints."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        try:
            yield
        except UserError:
            raise SystemExit(2) from None


def restart_count() -> int:
    """Return how often torchrun has restarted the processes of this run."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def one_line(error: BaseException) -> str:
    """Return an exception's message on one line, at most 200 characters."""
    return " ".join(str(error).split())[:200]
