"""Steps with losses or gradients that are not finite: found before they change weights, left out,
or explained.
"""

from detkit.engine.nonfinite.explanation import explain, in_short
from detkit.engine.nonfinite.stand_in import giving_nan, has_stand_in
from detkit.engine.nonfinite.step import BrokenStep, Pass
from detkit.engine.nonfinite.verdict import Verdict, judge

__all__ = [
    "BrokenStep",
    "Pass",
    "Verdict",
    "explain",
    "giving_nan",
    "has_stand_in",
    "in_short",
    "judge",
]
