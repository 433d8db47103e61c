"""Evaluates trained policies: held-out rewards, best-of-n, and completions for people."""
