"""A Ctrl-C in the seconds that a command's imports take: one line, like later ones."""

import os
import signal
import sys


def _end(*_):
    os.write(2, b"interrupted\n")
    os._exit(130)


def hand_over():
    """SIGINT raises KeyboardInterrupt again, as Python has it: endings.run_command meets it."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# Only where one of our own files is the command: a program that imports it keeps its own way. A
# SIGINT that is ignored, as under nohup, stays so.
_command = getattr(sys.modules.get("__main__"), "__file__", None) or ""
if os.path.dirname(os.path.abspath(_command)) == os.path.dirname(os.path.abspath(__file__)):
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
