"""Text to shards (`prepare`), shards to samples (`dataset`, `order`), samples to batches (`plan`, `stream`)."""
