"""The mathematics: estimators, their parts, and what each does to the gradient. Imports no torch."""

from tokenrl.core.estimator import Advantages, Estimator

__all__ = ["Advantages", "Estimator"]
