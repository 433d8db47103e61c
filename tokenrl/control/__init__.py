"""Gymnasium agents on the estimator core: the language model's algorithm, with actions for tokens."""
