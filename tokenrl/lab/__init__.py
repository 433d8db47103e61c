"""Measures what an estimator does to the gradient: exactly by enumeration, or on samples of real models."""

from tokenrl.names import lazily

__getattr__, __dir__ = lazily(__name__)
