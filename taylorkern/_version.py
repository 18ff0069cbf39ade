"""The one place the version is written; readable without installing and without importing torch."""

__version__ = "0.1.0"
