"""nextvec: continuous autoregressive language models (CALM, arXiv 2510.27688)."""

__version__ = "0.1.0"
