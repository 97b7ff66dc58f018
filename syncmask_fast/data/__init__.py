"""Data: shards, texts, augmentation, the epoch's plan and the loader. Nothing here imports the model."""
