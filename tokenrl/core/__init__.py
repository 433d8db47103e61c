"""The mathematics: estimators, their parts, and what each does to the gradient. Imports no torch."""

from typing import TYPE_CHECKING

from tokenrl.names import lazily

if TYPE_CHECKING:
    from tokenrl.core.estimator import Advantages, Estimator

__all__ = ["Advantages", "Estimator"]
__getattr__ = lazily(__name__, dict.fromkeys(__all__, "tokenrl.core.estimator"))
