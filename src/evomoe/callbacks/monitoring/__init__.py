"""What is measured, kept and shown of a run: routing, cost, samples."""
