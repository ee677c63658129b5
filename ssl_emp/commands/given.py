"""What a run is given in Python beside its config; a run from a shell is given nothing."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssl_emp.text import resume_command


@dataclass(frozen=True)
class Given:
    """The arguments of `ssl_emp.pretrain` and `ssl_emp.resume` that no file can hold.

    Attributes:
        images: as `ssl_emp.data.objects.load_object` takes them; None: those of data.source.
        in_python: somebody's process goes on after the run: it is told what to call, not which command.
        verbose: whether lines are printed; RUN/train.log has them anyway.
        has_network: the network is a module.
    """

    images: Any = None
    in_python: bool = False
    verbose: bool = True
    has_network: bool = False

    def again(self, out: Path) -> str:
        """How to go on with the run in `out`."""
        if not self.in_python:
            return resume_command(out)
        more = "" if self.images is None else ", data"
        return f"ssl_emp.resume({os.fspath(out)!r}{more}{', model=model' if self.has_network else ''})"


FROM_A_SHELL = Given()
