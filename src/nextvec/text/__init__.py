"""Text to tokens: tokenizers, corpus readers, memory-mapped shards, batches."""
