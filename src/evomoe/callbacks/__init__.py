"""Lightning callbacks: evolution, monitoring, progress, and the guards of a run."""
