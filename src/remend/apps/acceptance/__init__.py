"""What an edit must do, and must not do, before it may act: acceptance, and the verdict on one edit."""

from remend.apps.acceptance.criteria import STANDARD, AcceptanceCriteria
from remend.apps.acceptance.result import AcceptanceResult, Check, RejectedError, guarded, judge

__all__ = ["STANDARD", "AcceptanceCriteria", "AcceptanceResult", "Check", "RejectedError", "guarded", "judge"]
