"""``python -m tdxmig_model`` is the command ``tdxmig``."""

from __future__ import annotations

import sys

from tdxmig_model.cli import main

if __name__ == "__main__":
    sys.exit(main())
