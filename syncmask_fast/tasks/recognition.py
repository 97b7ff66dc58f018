"""Category and subcategory recognition: accuracy and macro-F1, evaluation, and fine-tuning.

The classifier knows the labels of its training products. Images with a label that only the evaluation set has can never
be right: they count as errors, and their number is reported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor

from syncmask_fast.config import TrainConfig
from syncmask_fast.data.loader import Batch
from syncmask_fast.data.splits import Split
from syncmask_fast.data.token_cache import TokenCache
from syncmask_fast.model.layout import PackedLayout
from syncmask_fast.model.syncmask_model import SyncMaskModel
from syncmask_fast.objective.memory import Features, Queue
from syncmask_fast.objective.schedule import Schedule
from syncmask_fast.tasks.base import FineTuneTask, evaluation_batches, image_items, open_tokens
from syncmask_fast.utils.errors import UserError


def recognition_metrics(truth: Sequence[str], predicted: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """Return metrics in percent of N images; macro-F1 is the mean F1 of the classes that its name states.

    truth, predicted: label names [N]; every predicted name is one of `labels`, those of the classifier.
    accuracy:                    share of right images.
    macro-F1/truth-or-predicted: labels in truth or prediction. scikit-learn's default, so probably what others report.
    macro-F1/seen-in-truth:      labels of the classifier that the truth has.
    accuracy/most-frequent:      accuracy of the best constant answer.
    """
    truth, predicted = np.asarray(truth), np.asarray(predicted)
    unseen = ~np.isin(truth, labels)
    seen = sorted(set(truth[~unseen].tolist()))
    # zero_division: a class without predictions has F1 0, without a warning.
    seen_f1 = f1_score(truth, predicted, labels=seen, average="macro", zero_division=0) if seen else 0.0
    return {
        "accuracy": 100 * float(accuracy_score(truth, predicted)),
        "macro-F1/truth-or-predicted": 100 * float(f1_score(truth, predicted, average="macro", zero_division=0)),
        "macro-F1/seen-in-truth": 100 * float(seen_f1),
        "accuracy/most-frequent": 100 * float(max((truth == label).mean() for label in labels)),
        "images": float(len(truth)),
        "labels": float(len(labels)),
        "labels-in-truth": float(len(set(truth.tolist()))),
        "unseen-labels": float(len(set(truth[unseen].tolist()))),
        "unseen-images": float(unseen.sum()),
    }


def _labeled(split: Split, kind: str) -> Split:
    """Return the samples that have a label. kind: "category" or "subcategory", a column of the index."""
    return Split(split.index, split.samples[getattr(split.index, kind).codes[split.samples] >= 0])


@torch.inference_mode()
def evaluate_recognition(model: SyncMaskModel, split: Split, tokens: TokenCache) -> dict[str, float]:
    """Return recognition metrics in percent of the classifier that the model was fine-tuned with.

    Images without a label are left out, and counted. errors: UserError for data without labels.
    """
    task = model.config.task
    labels, labeled = getattr(split.index, task.name), _labeled(split, task.name)
    if not len(labeled):
        raise UserError(f"{split.index.folder} has no {task.name} in its records. Recognition needs labels.")
    # Names, not codes: the evaluation split may number its labels in another way than the training split.
    truth, predicted = [], []
    for batch in evaluation_batches(model, split, tokens, labeled.samples):
        layout = PackedLayout.of_batch(batch)
        logits = model.label_logits(model.image(batch.pixels), model.text(batch.token_ids, layout), layout)
        predicted += [task.labels[i] for i in logits.argmax(1).tolist()]
        truth += [labels.names[code] for code in labels.codes[batch.sample_ids_host]]
    unseen = sorted(set(truth) - set(task.labels))
    if unseen:
        print(f"Labels unknown to the classifier, whose images count as errors: {', '.join(unseen)}")
    results = recognition_metrics(truth, predicted, task.labels)
    results["unlabeled-images"] = float(len(split) - len(labeled))
    return {f"{task.name}/{task.inputs}/{name}": value for name, value in results.items()}


def finetune_recognition(config: TrainConfig, split: Split, validation: Split) -> tuple[FineTuneTask, TrainConfig]:
    """Return the fine-tuning of recognition, and the configuration with the labels of the training products.

    Images without a label are left out. errors: UserError for fewer than two labels.
    """
    kind = config.task.name
    labels, labeled = getattr(split.index, kind), _labeled(split, kind)
    known = np.unique(labels.codes[labeled.samples])
    if len(known) < 2:
        raise UserError(f"{split.index.folder} has {len(known)} {kind} labels. Recognition needs two or more.")
    class_of = np.searchsorted(known, labels.codes)  # by sample id; valid for labeled training samples only

    def losses(
        model: SyncMaskModel,
        teacher: SyncMaskModel,
        batch: Batch,
        queue: Queue,
        config: TrainConfig,
        schedule: Schedule,
    ) -> tuple[dict[str, Tensor], Features]:
        """Return the cross-entropy of the label."""
        layout = PackedLayout.of_batch(batch)
        images, texts = model.image(batch.pixels), model.text(batch.token_ids, layout)
        target = torch.from_numpy(class_of[batch.sample_ids_host]).to(images.device)
        loss = F.cross_entropy(model.label_logits(images, texts, layout), target)
        # The loop stores features of every item in the bank; recognition does not train them.
        features = Features(model.project_images(images).detach(), model.project_texts(texts, layout).detach())
        return {"total": loss}, features

    def validate(model: SyncMaskModel) -> dict[str, float]:
        return evaluate_recognition(model, validation, open_tokens(model, validation))

    task = dataclasses.replace(config.task, labels=tuple(labels.names[code] for code in known))
    fine_tuning = image_items(labeled, losses, validate, f"{kind}/{task.inputs}/accuracy")
    return fine_tuning, dataclasses.replace(config, task=task)
