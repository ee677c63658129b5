"""trackio, in files of the run unless TRACKIO_DIR, TRACKIO_SPACE_ID or TRACKIO_SERVER_URL say otherwise."""

import json
import os
import re
import secrets
import tempfile
from pathlib import Path
from typing import Any

from ssl_emp.errors import RunFailed
from ssl_emp.loggers.base import PROJECT, About, flat, own_place


class TrackioLogger:
    def __init__(self, folder: Path) -> None:
        if not os.environ.get("TRACKIO_DIR"):
            os.environ["TRACKIO_DIR"] = str(own_place(folder, "trackio"))
        self.local = not any(os.environ.get(name) for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"))
        if self.local:
            os.environ.setdefault("HF_HUB_OFFLINE", "1")  # it would ask the hub for the user's name

    def open(self, about: About, known: str | None) -> tuple[str, int | None]:
        import trackio  # reads the variables above

        self.trackio, self.project = trackio, os.environ.get("TRACKIO_PROJECT") or PROJECT
        # trackio goes on with a run by its name, and run directories may share one
        word = re.sub(r"[^A-Za-z0-9.-]+", "_", about.name)[:60]
        self.name = known or f"{word}-{secrets.token_hex(4)}"
        self.run = trackio.init(
            self.project,
            self.name,
            resume="allow",
            config=flat(about.config) | flat(about.environment, "environment."),
            embed=False,
            auto_log_gpu=False,  # it would sample the machine all the time
            auto_log_cpu=False,
        )
        self.last = self._last_epoch() if self.local else None if known else -1
        return self.name, self.last

    def _last_epoch(self) -> int:
        from trackio.sqlite_storage import SQLiteStorage

        found = SQLiteStorage.get_max_step_for_run(self.project, self.name, run_id=self.run.id)
        return -1 if found is None else int(found)

    def epoch(self, number: int, scalars: dict[str, float]) -> None:
        # `step` is trackio's own name for what is the epoch here
        named = {("train_step" if name == "step" else name): value for name, value in scalars.items()}
        self.run.log(named, step=number)
        self.last = number

    def evaluation(self, scalars: dict[str, float], rows: list[dict[str, Any]], epoch: int) -> None:
        self.run.log(scalars, step=epoch)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "evaluation.json"
            path.write_text(json.dumps(rows, indent=2))
            self.file(path, path.name, "evaluation")

    def file(self, path: Path, name: str, kind: str) -> None:
        self.run.log_artifact(path, name=f"{self.name}-{name}", type=kind)

    def close(self, finished: bool) -> None:
        self.run.finish()
        # trackio itself ends with a warning at most
        if self.local and self.last and self._last_epoch() < self.last:
            raise RunFailed(f"trackio has kept {self._last_epoch()} of {self.last} epochs")
