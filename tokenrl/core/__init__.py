"""The mathematics: estimators, their parts, and what each part does to the gradient. Imports no torch."""

from tokenrl.names import lazily

__getattr__, __dir__ = lazily(__name__)
