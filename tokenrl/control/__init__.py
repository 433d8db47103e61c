"""Classic control: gymnasium agents trained by the estimators of the language side."""

from tokenrl.names import lazily

__getattr__, __dir__ = lazily(__name__)
