"""The training loop and its parts: objectives, optimisers, checkpoints, metrics."""

VERBS = {
    "autoencoder": "autoencoder",
    "lm": "calm",
    "baseline": "token_lm",
}  # what `nextvec train` calls it: kind of run
