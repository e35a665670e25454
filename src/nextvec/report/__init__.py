"""The report: one self-contained page from what training and evaluation left behind."""

from nextvec.report.page import build_report

__all__ = ["build_report"]
