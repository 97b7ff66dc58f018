"""Sources of images and texts, and how they become shards: one module a source; `packing` does what they share."""
