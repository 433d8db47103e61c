"""Completions sampled from a policy, scored and rewarded, reproducibly."""
