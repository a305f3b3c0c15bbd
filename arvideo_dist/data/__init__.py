"""From shards to batches: index, sample order, decoding, augmentation, loader."""
