"""The process of the command ``tdxmig``, also as ``python -m tdxmig_model``.

Nothing heavy is imported before an interrupt is one line instead of a traceback.
"""

from __future__ import annotations

import os
import signal
import sys

INTERRUPTED = 130


def run() -> int:
    """Run the command line of this process; its exit code."""
    _open_standard_descriptors()
    try:
        from tdxmig_model.cli import main

        code = main()
    except KeyboardInterrupt:
        os.write(2, b"tdxmig: interrupted\n")
        code = INTERRUPTED
    # The answer is out; an interrupt while the interpreter takes itself down adds nothing.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return code


def _open_standard_descriptors() -> None:
    """A descriptor below 3 that was closed (`>&-`) is not to become a socket of the migration."""
    while (lowest := os.open(os.devnull, os.O_RDWR)) < 3:
        continue
    os.close(lowest)


if __name__ == "__main__":
    sys.exit(run())
