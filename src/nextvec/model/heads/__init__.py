"""Heads: a backbone state and noise to draws of the next latent."""
