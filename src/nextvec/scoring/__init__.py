"""Scoring rules from draws alone: the energy score and BrierLM. Torch only."""
