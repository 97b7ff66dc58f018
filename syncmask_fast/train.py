"""Pretrain with SyncMask, evaluate, and write a report: `python -m syncmask_fast.train`."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import sys
from collections.abc import Sequence

import numpy as np
import torch
import tyro

from syncmask_fast.config import PRESETS, TrainConfig
from syncmask_fast.data.splits import Split
from syncmask_fast.distributed.gradients import GradientReducer, check_replicas_match
from syncmask_fast.distributed.group import (
    Group,
    check_batch_size,
    errors_on_local_main_only,
    init_distributed,
    local_device,
)
from syncmask_fast.model.attention import attention_backend
from syncmask_fast.model.syncmask_model import SyncMaskModel
from syncmask_fast.objective.pretraining import pretraining_losses
from syncmask_fast.tasks.base import FineTuneTask
from syncmask_fast.tasks.mask_quality import MaskEvalSet, evaluate_mlm_grounding, evaluate_sync
from syncmask_fast.tasks.retrieval import evaluate_retrieval
from syncmask_fast.training.checkpoint import save, save_model
from syncmask_fast.training.epochs import epoch_batches, plan_epoch
from syncmask_fast.training.flops import peak_flops, step_flops
from syncmask_fast.training.interrupts import dump_bad_batch, graceful_stop
from syncmask_fast.training.log import MetricsLog, NullLog
from syncmask_fast.training.optimizer import lr_multiplier
from syncmask_fast.training.run_dir import create_run_dir, save_if_best
from syncmask_fast.training.setup import build_state, configure_compute, make_loader, open_data, open_texts
from syncmask_fast.training.step import train_step
from syncmask_fast.utils.device import choose_device, tune_malloc
from syncmask_fast.utils.errors import UserError, run_command
from syncmask_fast.utils.files import write_json
from syncmask_fast.utils.terminal import print_results

TRACKED_SAMPLES = 128  # evaluation samples on which mask quality is tracked during training


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line: train, evaluate, report."""
    # Before the group exists, every process checks the flags, and one of each machine complains.
    with errors_on_local_main_only():
        config = parse(sys.argv[1:] if argv is None else argv)
        if config.out is None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
            raise UserError(
                "torchrun --max-restarts is set, but restarted processes could not find their run. Give --out."
            )
        device = choose_device(local_device(config.device))
    tune_malloc()
    with init_distributed(device) as group:
        config, train_split, eval_split = open_data(config, group)
        config = create_run_dir(config, group)
        signal_number = train(config, device, train_split, eval_split, group)
    # 128 + the signal's number is how shells report it; schedulers then restart the job.
    if signal_number is not None:
        raise SystemExit(128 + signal_number)
    if group.is_main:
        evaluate_and_report(config, device, eval_split)


def parse(argv: Sequence[str]) -> TrainConfig:
    """Return the configuration of a command line: a preset (default tiny), then flags."""
    argv = list(argv)
    preset = argv.pop(0) if argv and argv[0] in PRESETS else "tiny"
    description, default = PRESETS[preset]
    # --steps and --epochs exclude each other: the one that is given replaces the preset's.
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
        description=f"{TrainConfig.__doc__} Preset {preset}: {description} "
        f"Other presets: {', '.join(PRESETS.keys() - {preset})}.",
    )
    config.check()
    return config


def train(
    config: TrainConfig,
    device: torch.device,
    train_split: Split,
    eval_split: Split,
    group: Group,
    task: FineTuneTask | None = None,
) -> int | None:
    """Train from the latest checkpoint, or from the start, to the last step; write checkpoints, metrics and the model.

    task:    of a fine-tuning; None pretrains.
    returns: the number of the signal that stopped the run, or None if it reached its end.
    """
    # 1. Items, and how many steps they make. Items are samples, or the triplets of composed retrieval.
    check_batch_size(config.batch_size, group.world_size, config.loss.negatives)
    product_ids = task.product_ids if task else train_split.index.product_ids[train_split.samples]
    product_ids = np.unique(product_ids, return_inverse=True)[1]
    batches_per_epoch = len(product_ids) // config.batch_size
    if batches_per_epoch == 0:
        raise UserError(
            f"{config.data} has {len(product_ids)} training samples, fewer than --batch-size {config.batch_size}. "
            "Give a smaller one."
        )
    steps = config.steps or max(1, (config.epochs or 1) * batches_per_epoch // config.optim.grad_accum)

    # 2. Model, teacher, optimizer, queue, feature bank; from a checkpoint or from initial weights.
    config, tokenizer, tokens = open_texts(config, train_split, group)
    state = build_state(config, tokenizer, tokens, train_split, len(product_ids), device, group)
    if state.step == 0:
        state.order = plan_epoch(config, state, product_ids, group)
    # After batch norms were converted: the reducer hooks the parameters that are trained.
    reducer = GradientReducer(state.model.parameters(), group)
    dtype = configure_compute(config, state)
    parameters = sum(p.numel() for p in state.model.parameters())
    group.print(
        f"{len(product_ids):,} {'triplets' if task and task.images_per_item > 1 else 'images'} "
        f"of {product_ids.max() + 1:,} products, {parameters / 1e6:.1f} M parameters, {steps} steps of "
        f"{config.batch_size} on {f'{group.world_size} x ' if group.world_size > 1 else ''}{device.type} "
        f"in {str(dtype).removeprefix('torch.')}, attention {attention_backend(device, dtype)}"
    )

    # 3. Batches, log, and the samples on which mask quality is tracked.
    log, tracked = NullLog(), None
    if group.is_main:
        grid = config.image.size // config.image.patch
        log = MetricsLog(config, state.step, steps, device, peak_flops(device, dtype))
        if len(eval_split) and config.masking != "none" and task is None:
            eval_tokens = eval_split.tokens(tokenizer, config.text.max_length)
            tracked = MaskEvalSet.of(eval_split, eval_tokens, grid, TRACKED_SAMPLES)
    loader = make_loader(config, train_split, tokens, device, group, task.images_per_item if task else 1)
    objective = task.losses if task else pretraining_losses
    if task:
        batches = task.batches(config, state, loader)
    else:
        batches = epoch_batches(config, state, loader, train_split, product_ids, log, group)

    # 4. The loop.
    with loader, contextlib.closing(log), graceful_stop(group) as signals:
        while state.step < steps:
            state.optimizer.set_lr_multiplier(lr_multiplier(config.optim, state.step, steps))
            result = train_step(state, batches, config, objective, reducer, steps, batches_per_epoch)
            state.step += 1
            last = state.step == steps

            # FLOPs follow from lengths on the host; losses stay on the device until they are printed.
            flops = None
            if task is None:
                flops = sum(step_flops(state.model, lengths, result.with_fusion) for lengths in result.lengths)
            row = {"step": state.step, "epoch": state.epoch, "wait_seconds": loader.wait_seconds}
            row["lr"] = state.optimizer.param_groups[0]["lr"]
            log.log_step(row, result.losses, config.batch_size * config.optim.grad_accum, flops)
            if tracked is not None and (state.step % (5 * config.log_every) == 0 or last):
                log.log_metrics(evaluate_sync(state.teacher, tracked))
            if task is not None and (state.step % config.save_every == 0 or last):
                metrics = task.validate(state.teacher)
                save_if_best(config.out, state.teacher, state.step, task.metric, metrics[task.metric])
                log.log_metrics({f"validation/{name}": value for name, value in metrics.items()})
            log.print_if_due()

            stopping, saved = group.any_rank(bool(signals)), False
            if state.step % config.save_every == 0 or last or stopping:
                check_replicas_match(list(state.model.parameters()), group, state.step)
                saved = group.is_main and save(config.out, state, log)
            if log.consecutive_skips >= config.max_skipped_steps:
                path = dump_bad_batch(config.out, result.last_batch, loader.index, state.step, state.epoch)
                raise UserError(
                    f"{log.consecutive_skips} steps in a row up to step {state.step} had a loss or gradient that is "
                    f"not finite (--max-skipped-steps {config.max_skipped_steps}); they changed nothing. Look at the "
                    f"last batch in {path}, then start another --out with a lower --optim.lr or --precision float32."
                )
            if stopping:
                # torchrun ends all ranks as soon as one ends: wait until rank 0 has written the checkpoint.
                group.any_rank(False)
                command = f"finetune {config.task.name}" if task else f"train {config.preset}"
                note = "" if saved else ", without a checkpoint of it"
                group.print(
                    f"\nStopped at step {state.step} of {steps}{note}. "
                    f"To resume: python -m syncmask_fast.{command} --out {config.out} with the same flags"
                )
                return signals[0] if signals else signal.SIGTERM

    # The teacher makes the masks, and as an average of many models it is the better one: users get it.
    if task is None and group.is_main:
        save_model(state.teacher, config.out / "model")
    return None


def evaluate_and_report(config: TrainConfig, device: torch.device, eval_split: Split) -> None:
    """Evaluate the model on held-out products; write results.json and report.html."""
    from syncmask_fast.report.collect import write_run_report

    model = SyncMaskModel.from_pretrained(config.out / "model", device)
    results: dict[str, float] = {}
    if len(eval_split):
        tokens = eval_split.tokens(model.tokenizer, model.config.text.max_length)
        results |= evaluate_retrieval(model, eval_split, tokens)
        truth = MaskEvalSet.of(eval_split, tokens, model.config.image.size // model.config.image.patch)
        if truth is not None:
            results |= evaluate_sync(model, truth) | evaluate_mlm_grounding(model, truth)
        print_results(results)
    # What could not be measured is NaN, which JSON does not know.
    results = {name: value for name, value in results.items() if not math.isnan(value)}
    write_json(config.out / "results.json", results)
    report = write_run_report(config.out, model, eval_split, results)
    print(f"\nreport: {report}\nmodel:  {config.out / 'model'}")


if __name__ == "__main__":
    run_command(main)
