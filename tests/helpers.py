"""What several tests need: images, flags of a small run, and a small model with its batch, losses and training step."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from syncmask_fast.config import PRESETS, TrainConfig
from syncmask_fast.data.augment import AugmentConfig
from syncmask_fast.data.loader import Batch
from syncmask_fast.data.tokenizer import train_tokenizer
from syncmask_fast.distributed.gradients import GradientReducer
from syncmask_fast.distributed.group import SINGLE_PROCESS
from syncmask_fast.distributed.shard import BatchShard
from syncmask_fast.model.syncmask_model import SyncMaskModel
from syncmask_fast.objective.memory import Features, Queue, make_teacher
from syncmask_fast.objective.pretraining import pretraining_losses
from syncmask_fast.objective.schedule import Schedule
from syncmask_fast.training.checkpoint import TrainState
from syncmask_fast.training.step import StepResult, train_step

WORDS = "a red navy green dress coat skirt bag with star moon zip pocket and the of cotton wool".split()
PAIRS, SEED = 6, 1234
# Flags of a training run of seconds: a small model on 48-px images, batches of 16.
FLAGS = (
    "--image.size 48 --image.patch 16 --image.width 32 --image.depth 2 --image.heads 2 --text.width 32 --text.heads 2"
    " --text.layers 1 --text.fusion-layers 2 --text.pretrain-steps 2 --embed-dim 16 --batch-size 16 --loss.queue 32"
    " --save-every 3 --log-every 2 --decode-threads 1 --device cpu"
).split()
# Two steps of ITC, then four with masks that change from random to sync; into the second epoch of the lookbook.
SIX_STEPS = "--steps 6 --loss.itc-only 0.34 --mask.ramp 0.2 0.6".split()
# Fields of metrics.jsonl that two runs of the same settings do not share.
SPEED = {"pairs_per_s", "mfu", "peak_gib", "data_wait_share", "plan_s"}
# Of `step_config`: masking, weight of the presence loss, stem, input of the masked image.
STEP_CASES = [
    ("sync", 0.0, "patch", "mask-tokens"),
    ("sync", 1.0, "conv", "mask-tokens"),
    ("sync", 1.0, "conv", "visible"),
    ("random", 0.0, "patch", "visible"),
    ("none", 1.0, "patch", "mask-tokens"),
]


def encoded_image(
    seed: int = 0, width: int = 40, height: int = 56, *, mode: str = "RGB", kind: str = "JPEG", **options: object
) -> bytes:
    """Encode an image of smooth colors, different for each seed; smooth, because pixels are compared after a resize."""
    colors = np.random.default_rng(seed).integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8)
    out = io.BytesIO()
    smooth = Image.fromarray(colors).resize((width, height), Image.Resampling.BICUBIC)
    smooth.convert(mode).save(out, kind, **options)
    return out.getvalue()


def write_plain(folder: Path, count: int) -> None:
    """Write one shard as img2dataset does: KEY.jpg, .png or .webp of several sizes, and KEY.txt or a KEY.json with a
    caption; no product ids.
    """
    folder.mkdir()
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for n in range(count):
            kind, suffix = (("JPEG", "jpg"), ("JPEG", "jpeg"), ("PNG", "png"), ("WEBP", "webp"))[n % 4]
            image = encoded_image(n, 30 + n % 5, 40 + n % 7, mode="L" if n % 8 == 0 else "RGB", kind=kind)
            caption = f"coat {n} with {n % 5} zips"
            if n % 2:
                text = {"txt": caption.encode()}
            else:
                text = {"json": json.dumps({"caption": caption, "url": "x", "width": 40}).encode()}
            for ending, data in {suffix: image, **text}.items():
                entry = tarfile.TarInfo(f"{n:09d}.{ending}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))


def run_rows(out: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl, which must be JSON in the strict sense: without NaN."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")) for line in lines]


def learned(out: Path) -> list[dict]:
    """The rows of a run without what two runs of the same settings do not share."""
    return [{name: value for name, value in row.items() if name not in SPEED} for row in run_rows(out)]


def small_config(**changes) -> TrainConfig:
    """A model of a few ten thousand parameters: 48 px, 4 x 4 patches."""
    base = PRESETS["tiny"][1]
    vocabulary = small_tokenizer().get_vocab_size()
    config = dataclasses.replace(
        base,
        embed_dim=16,
        batch_size=6,
        image=dataclasses.replace(base.image, size=48, patch=12, width=32, depth=2, heads=2, stem="patch"),
        text=dataclasses.replace(
            base.text, vocab_size=vocabulary, width=32, heads=2, layers=1, fusion_layers=2, max_length=24
        ),
        loss=dataclasses.replace(base.loss, queue=20, presence=0.0, collages=0.0),
        augment=AugmentConfig(),
        optim=dataclasses.replace(base.optim, muon_lr=None),
    )
    return dataclasses.replace(config, **changes)


@functools.cache
def small_tokenizer() -> Tokenizer:
    return train_tokenizer([" ".join(WORDS)] * 3, 120)


def small_batch(config: TrainConfig, seed: int = 0, pairs: int = PAIRS) -> Batch:
    """A batch of random pixels and words; pairs 0 and 1 are of one product."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 15, (pairs,), generator=generator).tolist()
    size = config.image.size
    ids = torch.randint(5, config.text.vocab_size, (sum(lengths),), generator=generator)
    products = torch.arange(pairs).clamp(min=1) - 1
    places = torch.arange(pairs)
    return Batch(
        torch.randn(pairs, 3, size, size, generator=generator),
        ids,
        torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32),
        lengths,
        places,
        np.arange(pairs),
        places,
        BatchShard.whole(lengths, places, products),
    )


def small_model(config: TrainConfig, seed: int = 0) -> SyncMaskModel:
    """Return a model whose biases, norms and tokens are random too, so that none can be forgotten."""
    torch.manual_seed(seed)
    model = SyncMaskModel(config, small_tokenizer())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def small_queue(config: TrainConfig) -> Queue:
    """Return a queue with seven items; the other places are empty."""
    queue = Queue.empty(config.loss.queue, config.embed_dim, torch.device("cpu"))
    features = F.normalize(torch.randn(2, 7, config.embed_dim, generator=torch.Generator().manual_seed(9)), dim=-1)
    queue.enqueue(Features(*features), torch.tensor([0, 5, 6, 2, 7, 8, 9]), 0, 7)
    return queue


def losses_of(
    config: TrainConfig,
    model: SyncMaskModel,
    batch: Batch,
    *,
    seed: int = SEED,
    share: float = 0.5,
    fuse: bool = True,
    teacher: SyncMaskModel | None = None,
) -> tuple[dict[str, Tensor], Features]:
    """Return the losses of a batch, by default with a teacher equal to the model."""
    schedule = Schedule(with_fusion=fuse, sync_probability=share, alpha=0.3, seed=seed)
    return pretraining_losses(model, teacher or make_teacher(model), batch, small_queue(config), config, schedule)


def step_config(masking: str, presence: float, stem: str, copy: str) -> TrainConfig:
    config = small_config(masking=masking)
    return dataclasses.replace(
        config,
        loss=dataclasses.replace(
            config.loss, presence=presence, presence_negatives=3, collages=presence / 2, mim_input=copy
        ),
        mask=dataclasses.replace(config.mask, layer=1),
        image=dataclasses.replace(config.image, patch=16, stem=stem),
        optim=dataclasses.replace(config.optim, muon_lr=0.01),
    )


def small_state(config: TrainConfig, device: str | torch.device = "cpu") -> TrainState:
    state = TrainState.create(small_model(config).to(device), config, {"samples": PAIRS})
    state.step = 50
    return state


def take_step(config: TrainConfig, state: TrainState, batches: Iterator[Batch], steps: int = 100) -> StepResult:
    """A pretraining step of one process."""
    reducer = GradientReducer(state.model.parameters(), SINGLE_PROCESS)
    return train_step(state, batches, config, pretraining_losses, reducer, steps, batches_per_epoch=1)


READS_BACK = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::unique",
    "aten::_unique2",
    "aten::repeat_interleave.Tensor",
}
TAKE_MASKS = {"aten::index.Tensor", "aten::index_put", "aten::index_put_"}


class NoHostReads(TorchDispatchMode):
    """Fails at operators that wait for the device on CUDA: they give a number, or a tensor whose shape depends on
    values.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        indices = args[1] if name in TAKE_MASKS else ()
        reads_back = name in READS_BACK or any(x is not None and x.dtype == torch.bool for x in indices)
        assert not reads_back, f"{name} reads back from the device"
        return function(*args, **(kwargs or {}))
