"""Trains a model on demonstrations: supervised fine-tuning, and the warm start of a training."""
