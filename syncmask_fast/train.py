"""The main job: `python -m syncmask_fast.train` pretrains with SyncMask, evaluates and writes a report."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import math
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import tyro

from syncmask_fast.config import PRESETS, TrainConfig, from_json, to_json
from syncmask_fast.data.loader import Batch, Loader
from syncmask_fast.data.splits import Split, open_splits
from syncmask_fast.data.tokenizer import TokenCache, load_tokenizer, train_tokenizer
from syncmask_fast.distributed.group import (
    SINGLE_PROCESS,
    GradientReducer,
    Group,
    NullLog,
    check_batch_size,
    check_replicas_match,
    errors_on_local_main_only,
    init_distributed,
    local_device,
    restart_count,
    shard_bounds,
)
from syncmask_fast.distributed.shard import convert_sync_batchnorm, shard_of_batch
from syncmask_fast.evaluate import MaskEvalSet, evaluate_mlm_grounding, evaluate_retrieval, evaluate_sync
from syncmask_fast.model.attention import attention_backend
from syncmask_fast.model.pretrained import load_initial_weights
from syncmask_fast.model.syncmask_model import SyncMaskModel
from syncmask_fast.objective.losses import Queue
from syncmask_fast.objective.masking import sync_share
from syncmask_fast.objective.pretraining import Losses, make_teacher, pretraining_losses, update_teacher
from syncmask_fast.tasks.base import FineTuneTask
from syncmask_fast.training.checkpoint import FeatureBank, TrainState, load_checkpoint, load_latest
from syncmask_fast.training.epochs import epoch_batches, plan
from syncmask_fast.training.flops import peak_flops, step_flops
from syncmask_fast.training.interrupts import (
    CHECKPOINTS,
    dump_bad_batch,
    find_resume_path,
    graceful_stop,
    save,
    save_model,
    tokenizer_fingerprint,
)
from syncmask_fast.training.log import MetricsLog
from syncmask_fast.training.optimizer import lr_multiplier, make_optimizer
from syncmask_fast.training.rollback import Rollback
from syncmask_fast.training.text_pretraining import pretrain_text
from syncmask_fast.utils.device import choose_device
from syncmask_fast.utils.errors import UserError, run_command
from syncmask_fast.utils.files import write_json
from syncmask_fast.utils.terminal import print_results

LOOKBOOK = Path("data/lookbook")
BFLOAT16_WIDTH = 128  # on the CPU, conversions cost narrower models more than products win (docs/step.md)
TRACKED_SAMPLES = 128  # evaluation samples on which synchrony is followed during training
RESUME_MAY_CHANGE = {
    "out",
    "resume",
    "steps",
    "epochs",
    "save_every",
    "log_every",
    "max_skipped_steps",
    "device",
    "decode_threads",
    "decoder",
    "eval",
    "compile",
    "grad_checkpointing",
}


def parse(argv: Sequence[str]) -> TrainConfig:
    """The configuration that a command line asks for: a preset (default tiny), then flags."""
    argv = list(argv)
    preset = argv.pop(0) if argv and argv[0] in PRESETS else "tiny"
    description, default = PRESETS[preset]
    given = {word.split("=")[0] for word in argv}
    if "--epochs" in given and "--steps" not in given:
        default = dataclasses.replace(default, steps=None)
    if "--steps" in given and "--epochs" not in given:
        default = dataclasses.replace(default, epochs=None)
    config = tyro.cli(
        tyro.conf.SuppressFixed[TrainConfig],
        args=argv,
        default=default,
        prog="python -m syncmask_fast.train [tiny|base]",
        description=f"{TrainConfig.__doc__} Preset {preset}: {description} The other one: {' '.join(PRESETS.keys() - {preset})}.",
    )
    config.check()
    return config


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: trains, evaluates, reports."""
    with errors_on_local_main_only():
        config = parse(sys.argv[1:] if argv is None else argv)
        if config.out is None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
            raise UserError(
                "torchrun --max-restarts needs a folder in which restarted processes find their run: give --out."
            )
        device = choose_device(local_device(config.device))
    tune_malloc()
    with init_distributed(device) as group:
        out = group.broadcast_object(run_folder(config))
        with group.main_process_first():
            data = config.data or draw_default_lookbook(config)
            train_split, eval_split = open_splits(data, config.eval.holdout_fraction)
            for problem in (*train_split.index.warnings, *eval_split.index.warnings):
                print(f"skipped: {problem}")
            config = start_run(out, config, data, group)
        train(config, out, device, train_split, eval_split, group=group)
    if group.is_main:
        finish(config, out, device, eval_split)


def run_folder(config: TrainConfig) -> Path:
    """The folder of this run, which need not exist yet."""
    if config.out is not None:
        return config.out
    name = config.preset if config.task.name == "pretraining" else config.task.name
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def draw_default_lookbook(config: TrainConfig) -> Path:
    """Draws the lookbook at the preset's size unless it is there already; returns its folder."""
    from syncmask_fast.sources.lookbook import draw_lookbook

    folder = LOOKBOOK.with_name(f"{LOOKBOOK.name}-{config.image.size}px")
    draw_lookbook(folder, size=config.image.size)
    return folder


def start_run(out: Path, config: TrainConfig, data: str | Path, group: Group = SINGLE_PROCESS) -> TrainConfig:
    """Makes the run's folder, or checks that the one that is there belongs to this configuration; points runs/latest to it."""
    config = dataclasses.replace(config, data=str(data), out=out)
    if not group.is_main:
        return config
    known = out / "config.json"
    begun = any(
        (out / name).exists() for name in ("metrics.jsonl", "checkpoints")
    )  # a run that stopped at a mistake before is no hindrance
    if known.is_file() and begun:
        if config.resume == "never" and not restart_count():
            raise UserError(
                f"{out} holds a run already: choose another --out, or drop --resume never to go on with it."
            )
        before = to_json(from_json(TrainConfig, _read_json(known)))
        now = to_json(config)
        changed = sorted(name for name in now if now[name] != before[name] and name not in RESUME_MAY_CHANGE)
        if changed:
            raise UserError(
                f"{out} holds a run with other settings ({', '.join(changed)}): use the same ones to go on, or another --out."
            )
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(known, to_json(config))
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): choose another --out.") from error
    if out.parent.name == "runs":
        latest = out.parent / "latest"
        with contextlib.suppress(OSError):
            if latest.is_symlink() or not latest.exists():
                latest.unlink(missing_ok=True)
                latest.symlink_to(out.name)
    return config


def train(
    config: TrainConfig,
    out: Path,
    device: torch.device,
    train_split: Split,
    eval_split: Split,
    task: FineTuneTask | None = None,
    group: Group = SINGLE_PROCESS,
) -> None:
    """Trains from the newest checkpoint, or from the start, to the last step; writes checkpoints, metrics and the model."""
    check_batch_size(config.batch_size, group.world_size, config.loss.negatives)
    known = (
        config.task.model
        or config.text.name
        or (config.weights if config.weights and Path(config.weights).is_dir() else None)
    )
    tokenizer = (
        load_tokenizer(str(known)) if known else train_tokenizer(train_split.index.texts, config.text.vocab_size)
    )
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=tokenizer.get_vocab_size()))
    with group.main_process_first():
        tokens = TokenCache.open(train_split.index.folder, tokenizer, train_split.index.texts, config.text.max_length)

    torch.manual_seed(config.seed)
    model = SyncMaskModel(config, tokenizer)
    going_on = group.broadcast_object(find_resume_path(config, out))
    if going_on is not None and not group.is_main and not going_on.exists():
        raise UserError(
            f"{going_on} is not on the machine of rank {group.rank}: give an --out in a folder that all machines share."
        )
    if going_on is None:
        for report in load_initial_weights(model):
            print(report)
    model.to(device)
    if going_on is None and not (known or config.weights) and config.text.pretrain_steps and group.is_main:
        pretrain_text(model, tokens, train_split.samples, config, use_bfloat16(config, device))
    group.broadcast_parameters([*model.parameters(), *model.buffers()])
    teacher = make_teacher(model)
    convert_sync_batchnorm(model, group)
    gradients = GradientReducer(model.parameters(), group)
    optimizer = make_optimizer(model, config.optim)
    queue = Queue.empty(config.loss.queue, config.embed_dim, device)
    products = task.product_ids if task else train_split.index.product_ids[train_split.samples]
    product_ids = np.unique(products, return_inverse=True)[1]
    bank = FeatureBank.empty(len(product_ids), config.embed_dim, device)
    provenance = {
        "samples": len(product_ids),
        "data": train_split.index.fingerprint(),
        "tokenizer": tokenizer_fingerprint(tokenizer),
    }
    state = TrainState(model, teacher, optimizer, queue, bank, torch.empty(0, dtype=torch.int64), provenance=provenance)

    batches_per_epoch = len(product_ids) // config.batch_size
    if batches_per_epoch == 0:
        raise UserError(
            f"{config.data} has {len(product_ids)} training samples, fewer than --batch-size {config.batch_size}: give a smaller one."
        )
    steps = config.steps or max(1, (config.epochs or 1) * batches_per_epoch // config.optim.grad_accum)
    if going_on is not None:
        if going_on.name == CHECKPOINTS and group.is_main:
            going_on = load_latest(going_on, state)
            group.broadcast_object(going_on)
        else:
            going_on = group.broadcast_object(going_on)
            load_checkpoint(going_on, state)
        print(f"going on from {going_on}: step {state.step} of {steps}")
    else:
        state.order = torch.from_numpy(plan(config, state, product_ids, group))
    dtype = configure_compute(config, model, teacher, device)
    parameters = sum(p.numel() for p in model.parameters())
    items = "triplets" if task and task.images_per_item > 1 else "pictures"
    print(
        f"{len(product_ids):,} {items} of {product_ids.max() + 1:,} products, {parameters / 1e6:.1f} M parameters, "
        f"{steps} steps of {config.batch_size} on {f'{group.world_size} x ' if group.world_size > 1 else ''}{device.type} "
        f"in {str(dtype).removeprefix('torch.')}, attention {attention_backend(device, dtype)}"
    )

    grid = config.image.size // config.image.patch
    eval_tokens = TokenCache.open(eval_split.index.folder, tokenizer, eval_split.index.texts, config.text.max_length)
    follow = group.is_main and len(eval_split) and config.masking != "none" and task is None
    followed = MaskEvalSet.of(eval_split, eval_tokens, grid, TRACKED_SAMPLES) if follow else None
    log = (
        MetricsLog(out, state.step, steps, config.log_every, device, peak_flops(device, dtype))
        if group.is_main
        else NullLog()
    )
    begin, end = shard_bounds(config.batch_size, group.world_size)[group.rank : group.rank + 2]
    loader = Loader(
        train_split.index,
        tokens,
        batch_size=(end - begin) * (task.images_per_item if task else 1),
        size=config.image.size,
        augment=config.augment,
        seed=config.seed,
        device=device,
        backend=config.decoder,
        threads=config.decode_threads or group.threads(),
        drop_last=True,
    )
    with loader, graceful_stop(launched=group.world_size > 1) as stop:
        if task:
            batches = task.batches(config, state, loader)
        else:
            batches = epoch_batches(config, state, loader, train_split, product_ids, log, group)
        last: deque[Batch] = deque(maxlen=1)
        batches = (last.append(batch) or batch for batch in batches)
        while state.step < steps:
            optimizer.set_lr_multiplier(lr_multiplier(config.optim, state.step, steps))
            parts, flops = train_step(
                config, state, batches, steps, batches_per_epoch, task.losses if task else None, gradients
            )
            state.step += 1
            pairs = config.batch_size * config.optim.grad_accum
            log.add(state.step, state.epoch, pairs, flops, loader.wait_seconds, optimizer.param_groups[0]["lr"], parts)
            if followed is not None and (state.step % (5 * config.log_every) == 0 or state.step == steps):
                log.note(evaluate_sync(teacher, followed))
            if task is not None and (state.step % config.save_every == 0 or state.step == steps):
                log.note(keep_best(out, teacher, state.step, task))
            log.show_when_due()
            stopping = group.any_rank(bool(stop))
            if state.step % config.save_every == 0 or state.step == steps or stopping:
                check_replicas_match(list(model.parameters()), group, state.step)
                saved = group.is_main and save(out / CHECKPOINTS, state, log)
            if group.is_main and log.skipped_now >= config.max_skipped_steps:
                raise UserError(dump_bad_batch(config, out, state, loader, last[0], log.skipped_now))
            if stopping:
                group.any_rank(
                    False
                )  # torchrun ends the others as soon as one ends: not before the checkpoint is written
                again = f"python -m syncmask_fast.{f'finetune {config.task.name}' if task else f'train {config.preset}'} --out {out}"
                kept = "" if saved else ", without a checkpoint of it"
                print(f"\nstopped at step {state.step} of {steps}{kept}; to go on: {again} with the same flags")
                raise SystemExit(128 + (stop[0] if stop else signal.SIGTERM))
    log.close()
    # The teacher is what makes the masks, and the average of the last models: it is what users get.
    if task is None and group.is_main:
        save_model(state.teacher, out / "model")


def keep_best(out: Path, model: SyncMaskModel, step: int, task: FineTuneTask) -> dict[str, float]:
    """Validates the model and saves it as the run's if it is the best so far; returns the metrics.

    A run that goes on from a checkpoint repeats its steps exactly, so that the best one that it knows of stays the best.
    """
    found = task.validate(model)
    known = out / "best.json"
    best = _read_json(known)["value"] if known.is_file() else -math.inf
    value = found[task.metric]
    print(
        f"step {step:>5}: validation {task.metric} {value:.2f}" + (" (the best so far)" if value > best else ""),
        flush=True,
    )
    if value > best:
        save_model(model, out / "model")
        write_json(known, {"step": step, "metric": task.metric, "value": value})
    return {f"validation/{name}": number for name, number in found.items()}


def configure_compute(
    config: TrainConfig, model: SyncMaskModel, teacher: SyncMaskModel, device: torch.device
) -> torch.dtype:
    """Compiles blocks and turns checkpointing on as asked for, and chooses the attention; returns the precision that products are in."""
    dtype = torch.bfloat16 if use_bfloat16(config, device) else torch.float32
    attention_backend(device, dtype)
    for encoder in (model.image, model.text, model.fusion):
        encoder.grad_checkpointing = config.grad_checkpointing
    if config.compile == "on" or (config.compile == "auto" and device.type == "cuda"):
        for part in (model, teacher):
            for block in (*part.image.vit.blocks, *part.text.layers, *part.fusion.layers):
                block.compile(dynamic=True)
    return dtype


def train_step(
    config: TrainConfig,
    state: TrainState,
    batches: Iterator[Batch],
    steps: int,
    batches_per_epoch: int,
    losses: Callable | None = None,
    gradients: GradientReducer | None = None,
) -> tuple[Losses, float | None]:
    """One optimiser step over `accumulate` batches: losses, gradients, clipping, update, teacher, queue, feature bank.

    losses:    in place of `pretraining_losses`.
    gradients: of the group whose ranks take the step together.
    returns:   the mean losses, and the model FLOPs of this rank's `pretraining_losses`. On one rank nothing is read back from the device. Where a loss
               or a gradient is not finite, the total is NaN and everything in `state` but its clocks stays as it was.
    """
    device = state.model.device
    share = sync_share(state.step / steps, config.mask.ramp)
    fuse = state.step >= round(config.loss.itc_only * steps)
    alpha = config.loss.alpha * min(1.0, state.step * config.optim.grad_accum / batches_per_epoch)
    parts: list[Losses] = []
    flops = 0.0
    rollback = Rollback()
    rollback.snapshot(state.model.buffers())  # running statistics, which the forward pass changes
    for part in range(config.optim.grad_accum):
        batch = next(batches)
        seed = int(np.random.SeedSequence([config.seed, state.step, part]).generate_state(1, np.uint64)[0] >> 1)
        with torch.autocast(device.type, torch.bfloat16, enabled=use_bfloat16(config, device)):
            found, momentum = (losses or pretraining_losses)(
                state.model,
                state.teacher,
                batch,
                state.queue,
                config,
                fuse=fuse,
                sync_share=share,
                alpha=alpha,
                seed=seed,
            )
        last = gradients is not None and part == config.optim.grad_accum - 1
        with gradients.reduce_during_backward() if last else contextlib.nullcontext():
            (found.total / config.optim.grad_accum).backward()
        whole = shard_of_batch(batch)
        rollback.snapshot_rows(
            state.queue, state.queue.next_slots(len(whole.product_ids), state.batches_done, config.batch_size)
        )
        rollback.snapshot_rows((state.bank.images, state.bank.texts, state.bank.filled), whole.samples)
        state.queue.enqueue(*momentum, whole.product_ids, state.batches_done, config.batch_size)
        state.bank.update(whole.samples, *momentum)
        state.batches_done += 1
        parts.append(Losses(*(x.detach() for x in found)))
        flops += 0.0 if losses else step_flops(state.model, batch.lengths, fuse=fuse)
    mean = torch.stack([torch.stack(values).mean() for values in zip(*parts, strict=True)])
    mean = Losses(*(gradients.group.all_reduce(mean) if gradients else mean))
    finite = (
        torch.nn.utils.clip_grad_norm_(state.model.parameters(), config.optim.grad_clip).isfinite()
        & mean.total.isfinite()
    )
    state.optimizer.step(finite)
    state.optimizer.zero_grad()
    rollback.restore_unless(finite)
    update_teacher(state.teacher, state.model, config.optim.ema_decay, state.step, finite)
    return mean._replace(total=mean.total.where(finite, torch.nan)), None if losses else flops


def use_bfloat16(config: TrainConfig, device: torch.device) -> bool:
    """Whether products are in bfloat16: as asked for; auto: on CUDA, and on a CPU that multiplies in it where the model is wide enough to gain."""
    if config.precision != "auto":
        return config.precision == "bfloat16"
    fast = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return fast and (device.type == "cuda" or config.text.width >= BFLOAT16_WIDTH)


def tune_malloc() -> None:
    """Has glibc keep freed memory instead of giving it back to the system: fresh pages cost more than many an operator on the CPU."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        trim_threshold, top_pad, mmap_max = -1, -2, -4
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(top_pad, 256 * 2**20)


def finish(config: TrainConfig, out: Path, device: torch.device, eval_split: Split) -> None:
    """Evaluates the model on held-out products and writes results.json and report.html."""
    from syncmask_fast.report.collect import write_run_report

    model = SyncMaskModel.from_pretrained(out / "model", device)
    results: dict[str, float] = {}
    if len(eval_split):
        tokens = TokenCache.open(
            eval_split.index.folder, model.tokenizer, eval_split.index.texts, model.config.text.max_length
        )
        results |= evaluate_retrieval(model, eval_split, tokens)
        truth = MaskEvalSet.of(eval_split, tokens, model.config.image.size // model.config.image.patch)
        if truth is not None:
            results |= evaluate_sync(model, truth) | evaluate_mlm_grounding(model, truth)
        print_results(results)
    results = {
        name: value for name, value in results.items() if not math.isnan(value)
    }  # what could not be measured is left out
    write_json(out / "results.json", results)
    report = write_run_report(out, model, eval_split, results)
    print(f"\nreport: {report}\nmodel:  {out / 'model'}")


def _read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): mend it, or choose another --out.") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a table: mend it, or choose another --out.")
    return found


if __name__ == "__main__":
    run_command(main)
