"""Figures of trained models: reconstruction, BrierLM over whole documents, and what a model costs."""
