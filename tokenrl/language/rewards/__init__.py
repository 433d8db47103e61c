"""Reward functions: calling, composing, a library, a deadline, reward models that score."""
