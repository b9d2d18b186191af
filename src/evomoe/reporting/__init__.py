"""Head-to-head comparison of routing methods: its runs, tables and figures."""

from evomoe.reporting.comparison import compare

__all__ = ["compare"]
