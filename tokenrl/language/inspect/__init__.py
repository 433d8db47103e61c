"""Inspects a trained policy: evaluation, interactive completions and best-of-n."""
