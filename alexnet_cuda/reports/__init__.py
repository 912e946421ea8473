"""The pictures of a run."""

from .pictures import write_pictures

__all__ = ["write_pictures"]
