"""Has the IV observer of the tests watch a process of `tdxmig run` too.

Python runs this first where the directory is on PYTHONPATH.  Processes of a run are started with
"spawn"; any other process is left alone.
"""

import os
import sys
from pathlib import Path

REPORTS = os.environ.get("TDXMIG_TEST_IV_REPORTS")

if REPORTS and any("spawn_main" in argument for argument in sys.orig_argv):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from iv_record import report_at_exit

    report_at_exit(Path(REPORTS))
    del sys.path[0]
