"""Measures a policy on held-out prompts by rewarded completions, and by the best of n."""
