"""Weights & Biases, offline unless WANDB_MODE says otherwise."""

import os
import secrets
from pathlib import Path
from typing import Any

import wandb

from ssl_emp.errors import UserError
from ssl_emp.loggers.base import PROJECT, About
from ssl_emp.safe_files import check_inner

# taken where the user's environment has no other value
DEFAULTS = {
    "WANDB_MODE": "offline",
    "WANDB_PROJECT": PROJECT,
    "WANDB_CONSOLE": "off",  # this process prints nothing worth keeping
    "WANDB_DISABLE_CODE": "true",
    "WANDB_DISABLE_GIT": "true",  # the address of a remote may hold a token
    "WANDB_X_DISABLE_META": "true",  # command line, user and host
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_SYMLINK": "false",  # wandb/latest-run, which a run that is copied would not need
    "WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL": "2",  # seconds of figures that a power cut may cost
}


class WandbLogger:
    def __init__(self, folder: Path) -> None:
        for name, value in DEFAULTS.items():
            os.environ.setdefault(name, value)
        os.environ.setdefault("WANDB_DIR", str(folder))
        # the machine's load, of the process that trains
        os.environ.setdefault("WANDB_X_STATS_PID", str(os.getppid()))
        settings = check_inner(folder, "wandb") / "settings"
        if os.path.lexists(settings):  # wandb would send a key to the server that it names
            raise UserError(f"{settings} is no file of a run", f"look at it, and remove it: rm {settings}")

    def open(self, about: About, known: str | None) -> tuple[str, int | None]:
        run_id = known or secrets.token_hex(4)
        self.run = wandb.init(
            id=run_id,
            name=os.environ.get("WANDB_NAME") or about.name,
            resume="allow",
            config={**about.config, "environment": about.environment},
            # the places of the images may change when a run is resumed
            allow_val_change=True,
        )
        return run_id, None if known else -1

    def epoch(self, number: int, scalars: dict[str, float]) -> None:
        self.run.log({**scalars, "epoch": number}, step=number)

    def evaluation(self, scalars: dict[str, float], rows: list[dict[str, Any]], epoch: int) -> None:
        self.run.summary.update(scalars)
        columns = list(dict.fromkeys(name for row in rows for name in row))
        # text: a column of a wandb table has one type
        cells = [["" if row.get(name) is None else str(row[name]) for name in columns] for row in rows]
        self.run.log({"evaluation": wandb.Table(columns=columns, data=cells)}, step=epoch)

    def file(self, path: Path, name: str, kind: str) -> None:
        artifact = wandb.Artifact(f"{self.run.id}-{name}", type=kind)
        (artifact.add_dir if path.is_dir() else artifact.add_file)(str(path))
        self.run.log_artifact(artifact)

    def close(self, finished: bool) -> None:
        self.run.finish(exit_code=0 if finished else 1)
