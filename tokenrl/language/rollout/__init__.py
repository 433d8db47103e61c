"""Samples completions from a policy, scores them and rewards them, with reproducible random numbers."""
