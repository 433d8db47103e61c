"""What an estimator does to the gradient, measured and not believed: by enumeration, or on real models."""

from tokenrl.names import lazily

__getattr__, __dir__ = lazily(__name__)
