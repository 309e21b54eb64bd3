"""What an edit must do, and must not do, before it may act: acceptance, and the verdict on one edit."""

from remend.guard.acceptance import STANDARD, Acceptance
from remend.guard.verdict import Check, RejectedError, Verdict, guarded, judge

__all__ = ["STANDARD", "Acceptance", "Check", "RejectedError", "Verdict", "guarded", "judge"]
