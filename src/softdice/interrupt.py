"""Ctrl-C while the command is still importing what it needs, or has done its work: an end without a traceback.

Nothing happens where softdice is used as a library, or in a process that the command started: only the command itself,
which no other code shares, is changed.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


def is_command() -> bool:
    """Whether this process is `softdice ...` or `python -m softdice ...`, and no child of it."""
    started = sys.argv[0] if sys.argv else ""
    if started == "-m":  # what it is while the package of the module to be run is imported
        return "-m" in sys.orig_argv and sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1] == ["softdice"]
    if os.path.basename(started) not in ("softdice", "softdice.exe"):
        return False
    from multiprocessing import parent_process  # a child by `spawn` has its parent's arguments

    return parent_process() is None


@contextmanager
def heard() -> Iterator[None]:
    """Make Ctrl-C a KeyboardInterrupt inside; afterwards ignore it, for the work is done."""
    if signal.getsignal(signal.SIGINT) is not _stop:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _stop(*_: object) -> None:
    os.write(2, b"Stopped.\n")
    os._exit(130)


if (
    threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not where it is ignored, as behind `nohup`
    and is_command()
):
    signal.signal(signal.SIGINT, _stop)
