# SPDX-License-Identifier: Apache-2.0
"""The console script `jaxunlearn`: one small module for each command.

Exit status, of every command:

    0    finished
    1    the run failed: a loss was not finite, a disk was full, memory ran out
    2    the command cannot be run: an unknown option, an unusable file or setting
    75   stopped by SIGTERM; what was done is saved, and the same command resumes
    130  stopped by Ctrl-C (SIGINT); the same
"""

import os
import signal
import sys


def main() -> None:
    """Runs the command line; the entry point of the console script."""
    try:
        import click  # noqa: F401
    except ImportError:
        print(
            'error: the commands need click. Run: pip install "jaxunlearn[hf]"',
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    from jaxunlearn.commands import _group

    # transformers would otherwise report at its import that PyTorch is not installed.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    signal.signal(signal.SIGTERM, _group.terminate)
    sys.unraisablehook = _group.send_again
    _group.group.main(prog_name="jaxunlearn")
