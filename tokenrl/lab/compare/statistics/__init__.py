"""Judges scores of several arms over seeds; it knows nothing of how they were made."""
