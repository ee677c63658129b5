"""How a command of one process ends: its exit code, and a line where something was wrong."""

import os
from collections.abc import Callable

from ssl_emp.errors import RunFailed, UserError
from ssl_emp.run.interrupts import Interrupts, Stopped
from ssl_emp.run.streams import prepare_streams, put
from ssl_emp.text import printable


def ended(command: Callable[[], None], stopped_line: str = "stopped; nothing was written") -> int:
    """Run it. 0 done; 2 the user can fix it, 3 it failed, each told in a line; 128+n stopped by signal n."""
    prepare_streams()
    # checkpoints from model hubs are read without pickle
    os.environ.setdefault("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    try:
        with Interrupts():
            command()
        return 0
    except (UserError, RunFailed) as error:
        put("stderr", f"error: {printable(str(error))}\n")
        return 2 if isinstance(error, UserError) else 3
    except KeyboardInterrupt as stopped:
        put("stderr", f"{stopped_line}\n")
        return 128 + stopped.number if isinstance(stopped, Stopped) else 130
