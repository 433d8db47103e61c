"""Trains reward models on preferences: pairs of completions of which one was chosen."""
