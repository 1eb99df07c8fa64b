"""The version of this graphlocal."""

__version__ = "0.1.0"
