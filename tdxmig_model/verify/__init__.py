"""Verdicts on the model: what is proved, and what each guard is for."""

from tdxmig_model.verify.judge import Report, Row, Verdict, reach, small_instance, verify
from tdxmig_model.verify.mutants import Mutant, every, listed, mutants
from tdxmig_model.verify.repairs import removed_by
from tdxmig_model.verify.widths import verify_widths

__all__ = [
    "Mutant",
    "Report",
    "Row",
    "Verdict",
    "every",
    "listed",
    "mutants",
    "reach",
    "removed_by",
    "small_instance",
    "verify",
    "verify_widths",
]
