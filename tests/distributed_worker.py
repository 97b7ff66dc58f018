"""Checks of collectives and losses on three ranks with unequal shards, against one process with the whole batch.

`test_distributed.py` runs `main` on each rank. All ranks draw the same numbers, so each knows the whole batch and the
result.
"""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from syncmask_fast.distributed.batch_norm import convert_sync_batchnorm
from syncmask_fast.distributed.gradients import GradientReducer, check_replicas_match
from syncmask_fast.distributed.group import Group, init_distributed
from syncmask_fast.distributed.shard import BatchShard, lockstep
from syncmask_fast.objective.memory import Queue, make_teacher
from syncmask_fast.objective.pretraining import pretraining_losses
from syncmask_fast.objective.schedule import Schedule
from syncmask_fast.utils.errors import UserError
from tests.helpers import small_batch, small_config, small_model

BOUNDS = [0, 3, 4, 8]


def part_of_eight(group: Group) -> BatchShard:
    return BatchShard(group, BOUNDS, [3, 1, 4, 1, 5, 9, 2, 6], torch.arange(8), torch.arange(8))


def check_gather(group: Group) -> None:
    part, whole, weight = part_of_eight(group), torch.randn(8, 5), torch.randn(3, 8, 5)
    here = whole[part.rows].clone().requires_grad_()
    gathered = part.gather(here)
    assert torch.equal(gathered, whole)
    (gathered * weight[group.rank]).sum().backward()  # every rank has a loss of its own
    assert torch.allclose(here.grad, weight.sum(0)[part.rows], atol=1e-6)
    assert torch.equal(part.local().gather(here), here)


def check_fetch(group: Group) -> None:
    part, lengths = part_of_eight(group), [3, 1, 4, 1, 5, 9, 2, 6]
    texts = list(torch.randn(sum(lengths), 4).split(lengths))
    wanted = [[7, 0, 0, 3], [], [2, 5, 1, 7, 6]]
    here = torch.cat(texts[part.rows]).requires_grad_()
    fetched = part.exchange(here, wanted, lengths)
    assert torch.equal(fetched, torch.cat([here.new_zeros(0, 4), *(texts[n] for n in wanted[group.rank])]))
    (fetched * (group.rank + 1)).sum().backward()
    times = [sum((rank + 1) * rows.count(n) for rank, rows in enumerate(wanted)) for n in range(8)]
    expected = torch.cat([torch.full((lengths[n], 4), float(times[n])) for n in range(8)[part.rows]])
    assert torch.equal(here.grad, expected)
    rows = part.exchange(torch.arange(8)[part.rows], wanted)
    assert rows.tolist() == wanted[group.rank]


def check_gradients(group: Group) -> None:
    """Two batches are added up, one parameter has no gradient, one is used twice; pieces of one parameter each and one
    piece of all.
    """
    for piece in (1, 1 << 20):
        torch.manual_seed(3)
        net = nn.ModuleDict({"first": nn.Linear(4, 4), "unused": nn.Linear(4, 4), "last": nn.Linear(4, 4)})
        gradients = GradientReducer(net.parameters(), group, piece)
        data = torch.randn(2, 3, 6, 4)

        def loss(x: Tensor) -> Tensor:
            return net["last"](net["first"](net["first"](x)).relu()).square().sum()  # noqa: B023

        for part in range(2):
            if part:
                with gradients.reduce_during_backward():
                    loss(data[part, group.rank]).backward()
            else:
                loss(data[part, group.rank]).backward()
        ours = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
        for p in net.parameters():
            p.grad = None
        loss(data.flatten(0, 2)).backward()  # outside of `reduce_during_backward`: this process alone
        for mine, p in zip(ours, net.parameters(), strict=True):
            assert (mine is None) == (p.grad is None)
            assert mine is None or torch.allclose(mine, p.grad, rtol=1e-4, atol=1e-5)


def check_batch_norm(group: Group) -> None:
    """Statistics, gradients and running averages of ten images, of which one rank has none."""
    bounds = [0, 4, 4, 10]
    rows = slice(bounds[group.rank], bounds[group.rank + 1])
    torch.manual_seed(4)
    plain, images, weight = BatchNormAct2d(3), torch.randn(10, 3, 5, 5) * 3 + 20, torch.randn(10, 3, 5, 5)
    nn.init.uniform_(plain.weight)
    net = nn.Sequential(copy.deepcopy(plain))
    convert_sync_batchnorm(net, group)
    whole, here = images.clone().requires_grad_(), images[rows].clone().requires_grad_()
    (plain(whole) * weight).sum().backward()
    out = net(here)
    (out * weight[rows]).sum().backward()
    assert torch.allclose(out, plain.train()(images)[rows], atol=1e-4)
    assert torch.allclose(here.grad, whole.grad[rows], atol=1e-4)
    assert torch.allclose(group.all_reduce(net[0].weight.grad), plain.weight.grad, rtol=1e-3, atol=1e-3)
    for name in ("running_mean", "running_var"):
        again = BatchNormAct2d(3)
        again(images)
        assert torch.allclose(getattr(net[0], name), getattr(again, name), rtol=1e-4)
    assert net.eval()(images).shape == images.shape


def check_in_step(group: Group) -> None:
    """Rank 1 has nothing of batch 1, rank 2 nothing of the last one: these are left out, the others come to all."""
    numbers = [[0, 1, 2, 3], [0, 2, 3], [0, 1, 2]][group.rank]

    def rows_of(number: int):
        return number, torch.tensor([[10 * number + group.rank, n] for n in range(group.rank + 1)]).numpy()

    found = list(lockstep(iter(numbers), rows_of, 3, group))
    assert [number for number, _ in found] == [0, 2]
    for number, rows in found:
        assert [theirs.tolist() for theirs in rows] == [
            [[10 * number + rank, n] for n in range(rank + 1)] for rank in range(3)
        ]


def check_losses(group: Group) -> None:
    """Every objective of one step on unequal parts, both kinds of stem: losses and gradients add up to those of one
    process.
    """
    for negatives, stem in (("global", "conv"), ("global", "patch"), ("local", "conv")):
        config = small_config(masking="sync")
        config = dataclasses.replace(
            config,
            loss=dataclasses.replace(
                config.loss, presence=1.0, presence_negatives=3, collages=0.5, negatives=negatives
            ),
            mask=dataclasses.replace(config.mask, layer=1),
            image=dataclasses.replace(config.image, patch=16, stem=stem),
        )
        model, batch = small_model(config), small_batch(config, seed=5, pairs=8)
        teacher, start = make_teacher(model), copy.deepcopy(model)
        queue = Queue.empty(4, config.embed_dim, torch.device("cpu"))
        schedule = Schedule(with_fusion=True, sync_probability=0.5, alpha=0.3, seed=7)

        truth, features = pretraining_losses(start, teacher, batch, queue, config, schedule)
        truth["total"].backward()

        convert_sync_batchnorm(model, group)
        part = dataclasses.replace(batch.shard, group=group, bounds=BOUNDS)
        rows = part.rows
        tokens = slice(int(batch.cu_seqlens[rows.start]), int(batch.cu_seqlens[rows.stop]))
        mine = dataclasses.replace(
            batch,
            pixels=batch.pixels[rows],
            token_ids=batch.token_ids[tokens],
            cu_seqlens=batch.cu_seqlens[rows.start : rows.stop + 1] - batch.cu_seqlens[rows.start],
            lengths=batch.lengths[rows],
            sample_ids=batch.sample_ids[rows],
            epoch_positions=batch.epoch_positions[rows],
            sample_ids_host=batch.sample_ids_host[rows],
            shard=part,
        )
        gradients = GradientReducer(model.parameters(), group)
        found, gathered = pretraining_losses(model, teacher, mine, queue, config, schedule)
        with gradients.reduce_during_backward():
            found["total"].backward()
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gathered, features, strict=True))
        assert found.keys() == truth.keys()
        for name, value in found.items():
            ours, theirs = group.all_reduce(value), truth[name]
            if negatives == "global" or name in ("itc", "mlm", "mim"):
                assert torch.allclose(ours, theirs, rtol=1e-5), (negatives, stem, name, ours, theirs)
            else:
                assert ours.isfinite()
                assert ours != theirs  # other negatives than those of the whole batch
        if negatives == "global":
            for (name, p), q in zip(start.named_parameters(), model.parameters(), strict=True):
                assert (p.grad is None) == (q.grad is None), name
                assert p.grad is None or torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-5), (
                    stem,
                    name,
                    (p.grad - q.grad).abs().max(),
                )


def check_replicas(group: Group) -> None:
    weights = [torch.ones(5), torch.zeros(3)]
    check_replicas_match(weights, group, 1)
    weights[0][2] += group.rank * 1e-7 * 2
    with pytest.raises(UserError, match="step 9"):
        check_replicas_match(weights, group, 9)


def check_host_collectives(group: Group) -> None:
    assert group.any_rank(group.rank == 2)
    assert not group.any_rank(False)
    assert group.broadcast_object(group.rank) == 0
    assert group.broadcast(torch.tensor([group.rank])).tolist() == [0]
    assert group.all_gather_host(torch.tensor([group.rank])).flatten().tolist() == [0, 1, 2]
    assert group.all_reduce_host(torch.tensor([group.rank])).tolist() == [3]


CHECKS = [
    check_gather,
    check_fetch,
    check_gradients,
    check_batch_norm,
    check_in_step,
    check_losses,
    check_replicas,
    check_host_collectives,
]


def main(argv: list[str]) -> None:
    """Run every check; argv is what a command line would give, and is not read."""
    with init_distributed(torch.device("cpu")) as group:
        for check in CHECKS:
            torch.manual_seed(1)
            check(group)
            group.print(f"{check.__name__} passed")
