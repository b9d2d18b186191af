"""Networks built from one set of blocks."""
