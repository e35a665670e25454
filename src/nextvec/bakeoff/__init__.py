"""`nextvec bakeoff`: CALM against an equally tuned token Transformer on a user's text, at equal seconds of training.

    text -> sweep of the arms (nextvec.sweep) -> figures of each row -> speeds in turn -> verdict

settings.py: what is asked for, as the spec of a sweep. measure.py: figures of finished rows, beside their result.json. speed.py:
tokens a second. curve.py: learning curves and where they meet. verdict.py: what follows. run.py: all of it, resumable.
"""

from __future__ import annotations

from nextvec.bakeoff.settings import Bakeoff

__all__ = ["Bakeoff"]
