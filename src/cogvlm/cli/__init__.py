"""The command line: thin commands, each of which imports its part when called.

Exit codes: 0 done, 1 failed, 2 the input is not usable, 130 Ctrl-C. Errors raised on purpose are
one line on standard error; standard output holds answers only.
"""

from __future__ import annotations

import io
import sys

# Importing a module of commands registers them; the order here is that of --help.
from . import about, ask, batch, caption, chat, data, engine, make, read, serve  # noqa: F401
from .shared import app


def main() -> None:
    """Entry point of the ``cogvlm`` command."""
    # A console that cannot show a sign of the answer shows "?" instead of a traceback.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        app(prog_name="cogvlm")
    except KeyboardInterrupt:
        sys.exit(130)
