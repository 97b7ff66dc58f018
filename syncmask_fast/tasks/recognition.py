"""Recognition metrics: accuracy and macro-F1 of category or subcategory, with the label list stated.

The classifier knows the labels of its training part. A label that only the evaluation set has is unseen: its pictures can never be right, they count
as errors, and how many they are is reported. It is never taken for another class.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.metrics import accuracy_score, f1_score


def recognition_metrics(truth: Sequence[str], predicted: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """Metrics in percent of N pictures; macro-F1 is the mean of the classes' F1, named after the classes that it is over.

    truth, predicted: label names [N]; every predicted name is one of `labels`, which the classifier knows.
    accuracy:                  share of right pictures; unseen labels are errors.
    macro-F1/truth-or-predicted: over the labels in truth or prediction, which is scikit-learn's default and so most likely what others report.
    macro-F1/seen-in-truth:    over the known labels that the truth has.
    accuracy/most-frequent:    what a constant answer gets, the best known label for this truth.
    """
    truth, predicted = np.asarray(truth), np.asarray(predicted)
    unseen = ~np.isin(truth, labels)
    seen_in_truth = sorted(set(truth[~unseen].tolist()))
    counts = [(truth == label).mean() for label in labels]
    seen_f1 = (
        f1_score(truth, predicted, labels=seen_in_truth, average="macro", zero_division=0) if seen_in_truth else 0.0
    )
    return {
        "accuracy": 100 * float(accuracy_score(truth, predicted)),
        "macro-F1/truth-or-predicted": 100 * float(f1_score(truth, predicted, average="macro", zero_division=0)),
        "macro-F1/seen-in-truth": 100 * float(seen_f1),
        "accuracy/most-frequent": 100 * float(max(counts)),
        "images": float(len(truth)),
        "labels": float(len(labels)),
        "labels-in-truth": float(len(set(truth.tolist()))),
        "unseen-labels": float(len(set(truth[unseen].tolist()))),
        "unseen-images": float(unseen.sum()),
    }
