"""MLflow, in an SQLite file of the run unless MLFLOW_TRACKING_URI says otherwise.

Its earlier store, plain folders, is in maintenance mode, and refused unless a variable asks for it.
"""

import os
import time
from pathlib import Path
from typing import Any

# before it is imported: then it would ask its maker's server
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException

from ssl_emp.errors import UserError
from ssl_emp.loggers.base import PROJECT, About, flat, own_place
from ssl_emp.safe_files import inner_folder

PARAMS_AT_ONCE = 100  # MLflow's limit
EVERY_ROW_HAS = "step"


class MlflowLogger:
    def __init__(self, folder: Path) -> None:
        self.local: Path | None = None
        if not (uri := os.environ.get("MLFLOW_TRACKING_URI")):
            self.local = own_place(folder, "mlflow")
            inner_folder(self.local, "artifacts")
            uri = f"sqlite:///{self.local / 'mlflow.db'}"
        self.client = MlflowClient(tracking_uri=uri)

    def open(self, about: About, known: str | None) -> tuple[str, int | None]:
        if known is not None and (epoch := self._going_on(known)) is not None:
            return known, epoch
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        experiment = self.client.get_experiment_by_name(name)
        place = None if self.local is None else (self.local / "artifacts").as_uri()
        made = self.client.create_experiment(name, place) if experiment is None else experiment.experiment_id
        self.id = self.client.create_run(made, run_name=about.name).info.run_id
        self._check_place()
        params = [Param(key, str(value)) for key, value in flat(about.config).items()]
        for start in range(0, len(params), PARAMS_AT_ONCE):
            self.client.log_batch(self.id, params=params[start : start + PARAMS_AT_ONCE])
        self._describe(about)
        return self.id, -1

    def _going_on(self, known: str) -> int | None:
        """The last epoch of a run that the store has; None: it has no such run."""
        try:
            self.client.get_run(known)
        except MlflowException:
            return None
        self.id = known
        self._check_place()
        self.client.update_run(known, status="RUNNING")
        history = self.client.get_metric_history(known, EVERY_ROW_HAS)
        return max((metric.step for metric in history), default=-1)

    def _check_place(self) -> None:
        """A database says where files go, and a run directory may be a stranger's, or have been moved."""
        if self.local is None:
            return
        place = self.client.get_run(self.id).info.artifact_uri
        if not place.startswith((self.local / "artifacts").as_uri() + "/"):
            fix = f"after a move, take it away and all is written anew: mv {self.local} {self.local}-moved"
            raise UserError(f"{self.local / 'mlflow.db'} keeps its files elsewhere, in {place}", fix)

    def _describe(self, about: About) -> None:
        self.client.log_dict(self.id, about.config, "config.yaml")
        self.client.log_dict(self.id, about.environment, "environment.json")

    def epoch(self, number: int, scalars: dict[str, float]) -> None:
        now = round(1000 * time.time())
        figures = [Metric(name, float(value), now, number) for name, value in scalars.items()]
        self.client.log_batch(self.id, metrics=figures)

    def evaluation(self, scalars: dict[str, float], rows: list[dict[str, Any]], epoch: int) -> None:
        self.epoch(epoch, scalars)
        self.client.log_dict(self.id, {"rows": rows}, "evaluation.json")

    def file(self, path: Path, name: str, kind: str) -> None:
        if path.is_dir():
            self.client.log_artifacts(self.id, str(path), name)
        else:
            self.client.log_artifact(self.id, str(path))

    def close(self, finished: bool) -> None:
        self.client.set_terminated(self.id, "FINISHED" if finished else "KILLED")
