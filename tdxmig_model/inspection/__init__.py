"""What a captured migration stream holds, record by record, and what is wrong with it.

The parsers of `wire` stop at the first byte that may not stand where it stands.  Here reading goes
on as long as the lengths can be trusted: a wrong field is told and the next record is read.  One
record is held at a time, whatever the size of the file.
"""

from tdxmig_model.inspection.entry import Entry, GpaRange, Problem
from tdxmig_model.inspection.files import CapturedFile, Framing, Summary, inspect

__all__ = ["CapturedFile", "Entry", "Framing", "GpaRange", "Problem", "Summary", "inspect"]
