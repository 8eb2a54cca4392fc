"""Ctrl-C while the command is still importing what it needs: an end without a traceback.

Nothing happens where softdice is used as a library: only the command itself, which no other code shares, is changed.
"""

from __future__ import annotations

import os
import signal
import sys
import threading


def is_command() -> bool:
    """Whether this process is `softdice ...` or `python -m softdice ...`."""
    started = sys.argv[0] if sys.argv else ""
    if started == "-m":  # what it is while the package of the module to be run is imported
        return "-m" in sys.orig_argv and sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1] == ["softdice"]
    return os.path.basename(started) in ("softdice", "softdice.exe")


def loud() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _stop(*_: object) -> None:
    from multiprocessing import parent_process

    if parent_process() is None:  # a worker leaves it to the command to say so
        os.write(2, b"Stopped.\n")
    os._exit(130)


if is_command() and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, _stop)
