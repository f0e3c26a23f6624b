"""How much each unit of a family matters: criteria by name, and scores that a user gives.

Higher scores stay. ``docs/importance.md`` lists the criteria with their formulas and sources.
"""

from torchlathe.passes.importance.criterion import Criterion, Scoring
from torchlathe.passes.importance.scoring import (
    Importance,
    comparable,
    need_values,
    resolve,
    scores,
)
from torchlathe.passes.importance.table import TABLE, criterion_names, get_criterion

__all__ = [
    "TABLE",
    "Criterion",
    "Importance",
    "Scoring",
    "comparable",
    "criterion_names",
    "get_criterion",
    "need_values",
    "resolve",
    "scores",
]
