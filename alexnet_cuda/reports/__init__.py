"""The pictures of a run, its page, and what they show of the network."""

from .report import write_report

__all__ = ["write_report"]
