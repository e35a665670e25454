"""nextvec: continuous autoregressive language models (CALM, arXiv 2510.27688), which predict the next vector of K tokens.

    from nextvec import Calm

    model = Calm.from_pretrained("runs/demo/calm")
    for text in model.stream("def ", temperature=0.5, seed=0):
        print(text, end="", flush=True)

Names are imported when first used, so that `import nextvec` and `nextvec --help` stay quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Autoencoder": "nextvec.model.autoencoder",
    "BrierResult": "nextvec.scoring.brier",
    "Calm": "nextvec.model.calm",
    "Run": "nextvec.rundir",
    "Sampling": "nextvec.sampling.settings",
    "TokenLM": "nextvec.model.token_lm",
    "TokenShards": "nextvec.text.shards",
    "UserError": "nextvec.errors",
    "convert": "nextvec.reference.convert",
    "convert_back": "nextvec.reference.convert",
    "energy_score_loss": "nextvec.scoring.energy",
    "evaluate_brier": "nextvec.evaluate.brier",
    "evaluate_likelihood": "nextvec.evaluate.bound",
    "evaluate_reconstruction": "nextvec.evaluate.reconstruction",
    "evaluate_sampler": "nextvec.evaluate.brier",
    "generate": "nextvec.sampling.generate",
    "load_run": "nextvec.rundir",
    "load_tokenizer": "nextvec.text.tokenizer",
    "prepare": "nextvec.text.prepare",
    "preset": "nextvec.presets",
}

__all__ = [
    "Autoencoder",
    "BrierResult",
    "Calm",
    "Run",
    "Sampling",
    "TokenLM",
    "TokenShards",
    "UserError",
    "__version__",
    "convert",
    "convert_back",
    "energy_score_loss",
    "evaluate_brier",
    "evaluate_likelihood",
    "evaluate_reconstruction",
    "evaluate_sampler",
    "generate",
    "load_run",
    "load_tokenizer",
    "prepare",
    "preset",
]

if TYPE_CHECKING:
    from nextvec.errors import UserError
    from nextvec.evaluate.bound import evaluate_likelihood
    from nextvec.evaluate.brier import evaluate_brier, evaluate_sampler
    from nextvec.evaluate.reconstruction import evaluate_reconstruction
    from nextvec.model.autoencoder import Autoencoder
    from nextvec.model.calm import Calm
    from nextvec.model.token_lm import TokenLM
    from nextvec.presets import preset
    from nextvec.reference.convert import convert, convert_back
    from nextvec.rundir import Run, load_run
    from nextvec.sampling.generate import generate
    from nextvec.sampling.settings import Sampling
    from nextvec.scoring.brier import BrierResult
    from nextvec.scoring.energy import energy_score_loss
    from nextvec.text.prepare import prepare
    from nextvec.text.shards import TokenShards
    from nextvec.text.tokenizer import load_tokenizer


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'nextvec' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
