"""One run: its directory and lock, metrics, checkpoints, signals, console, plots and report."""
