"""Trains agents in gymnasium environments with the same estimators as language models."""

from tokenrl.names import lazily

__getattr__, __dir__ = lazily(__name__)
