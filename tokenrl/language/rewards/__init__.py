"""Loads, composes and calls reward functions and reward models, if wanted under a deadline."""
