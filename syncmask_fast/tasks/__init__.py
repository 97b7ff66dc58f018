"""One task, one file: metrics, evaluation and fine-tuning."""
