"""The report: one self-contained page from what training and evaluation left behind."""
