"""Mixture-of-Experts that evolve: from one dense expert to many sparse ones."""

__version__ = "0.1.0"
