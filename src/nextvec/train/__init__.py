"""The training loop and its parts: objectives, optimisers, checkpoints, metrics."""
