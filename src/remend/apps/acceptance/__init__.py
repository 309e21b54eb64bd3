"""Acceptance tests of edits: measure what an edit does to a model, and apply it only if it meets the criteria."""

from remend.apps.acceptance.check import (
    AcceptanceCheck,
    AcceptanceResult,
    RejectedError,
    apply_if_accepted,
    check_acceptance,
)
from remend.apps.acceptance.criteria import STANDARD_CRITERIA, AcceptanceCriteria

__all__ = [
    "STANDARD_CRITERIA",
    "AcceptanceCheck",
    "AcceptanceCriteria",
    "AcceptanceResult",
    "RejectedError",
    "apply_if_accepted",
    "check_acceptance",
]
