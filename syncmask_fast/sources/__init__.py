"""Sources of pictures and texts, and how they become shards: each source is one module, `packing` does what they share."""
