"""Language models as token-level policies: load, sample, reward, train, evaluate."""

from tokenrl.names import lazily

__getattr__, __dir__ = lazily(__name__)
