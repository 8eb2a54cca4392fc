"""Ctrl-C in the command: end without a traceback, at any moment.

While the command imports its packages, which takes seconds, Ctrl-C prints "Stopped." and exits. While it works, Ctrl-C
raises KeyboardInterrupt, which it handles itself. After that it is ignored. Nothing changes where softdice is used as
a library, or in a process that the command started.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


def is_command() -> bool:
    """Return whether this process is `softdice ...` or `python -m softdice ...`, and no child of it."""
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # Python sets this while it imports the package of the module to run
        return "-m" in sys.orig_argv and sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1] == ["softdice"]
    if os.path.basename(program) not in ("softdice", "softdice.exe"):
        return False
    from multiprocessing import parent_process  # a child by `spawn` has its parent's arguments

    return parent_process() is None


@contextmanager
def heard() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt inside the block, and ignore it afterwards.

    Change nothing if the handler of SIGINT is not `_stop`: in a library, or with a user's own handler.
    """
    if signal.getsignal(signal.SIGINT) is not _stop:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _stop(*_: object) -> None:
    """End the process at once, with the exit status of an interrupted program."""
    os.write(2, b"Stopped.\n")
    os._exit(130)


if (
    threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler  # `nohup` ignores it: leave that alone
    and is_command()
):
    signal.signal(signal.SIGINT, _stop)
