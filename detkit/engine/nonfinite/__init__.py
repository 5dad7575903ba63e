"""Steps with non-finite losses or gradients: kept from the weights, skipped, or explained."""

from detkit.engine.nonfinite.guard import NonFiniteError, NonFiniteGuard
from detkit.engine.nonfinite.replay import Pass

__all__ = ["NonFiniteError", "NonFiniteGuard", "Pass"]
