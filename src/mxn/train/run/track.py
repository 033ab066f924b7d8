"""What a run writes down: metrics.jsonl always, and an MLflow run where the job asks for one.

Knows numbers and texts; knows no tensors, ranks or plans. A thread talks to MLflow, so that a slow
server costs no step. Start at `Tracker`.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Any

from mxn.errors import UnsupportedError, UserError
from mxn.train.run.job import TrackingSettings
from mxn.train.run.login import take_login, with_login, without_login

log = logging.getLogger("mxn.train")

_LONGEST_PARAM = 6000  # characters; what MLflow takes
_CLOSE_S = 30.0
_NO_MLFLOW = "tracking with MLflow was asked for, and the package mlflow is not installed"


class Tracker:
    """Metrics of a job's steps. A resumed job goes on in the same file and the same MLflow run."""

    def __init__(
        self, folder: Path, settings: TrackingSettings, *, name: str, first_step: int = 0
    ) -> None:
        """`first_step`: lines of this step and later ones are of a run that was cut off: removed.

        Raises: UnsupportedError without MLflow; UserError when its server cannot be reached.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        _keep_before(self.path, first_step)
        self._file = self.path.open("ab", buffering=0)
        self._has_no_room = False
        self._mlflow: _MlflowRun | None = None
        if settings.mlflow is not None:
            shown = replace(settings, mlflow=take_login(settings.mlflow))
            self._mlflow = _MlflowRun(folder / "mlflow.json", shown, name)

    def step(self, step: int, metrics: Mapping[str, float | int | None]) -> None:
        """Write one step; values that are unknown (None) are left out of MLflow.

        A full disk costs the line and not the run; it is said once.
        """
        try:
            _append(self._file, (json.dumps({"step": step, **metrics}) + "\n").encode())
        except OSError as error:
            self._go_on_without(error)
        if self._mlflow:
            known = {k: float(v) for k, v in metrics.items() if v is not None}
            self._mlflow.send("metrics", (step, known))

    def _go_on_without(self, error: OSError) -> None:
        if not self._has_no_room:
            log.warning("%s cannot be written, steps are left out of it: %s", self.path, error)
        self._has_no_room = True
        with suppress(OSError):
            os.utime(self.path)  # the supervisor takes a file that stays as it is for a stall

    def params(self, values: Mapping[str, Any]) -> None:
        """Tell what the run depends on; nested values get dotted names."""
        if self._mlflow:
            self._mlflow.send("params", _flat(values))

    def artifact(self, name: str) -> None:
        """Give MLflow a file of the job's folder, such as the plan, if it is there."""
        path = self.path.parent / name
        if self._mlflow and path.is_file():
            self._mlflow.send("artifact", (name, path.read_text(encoding="utf-8")))

    def close(self, status: str = "FINISHED") -> None:
        """End with MLflow's status FINISHED, FAILED or KILLED; KILLED may go on later."""
        self._file.close()
        if self._mlflow:
            self._mlflow.close(status)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the steps of a metrics file; a last line that is not whole is left out."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break  # the writer was killed in the middle of it
    return rows


def _append(file: FileIO, line: bytes) -> None:
    """Add a whole line or nothing: readers stop at a part of one. Raises: OSError."""
    begin = file.seek(0, os.SEEK_END)
    try:
        while line:
            line = line[file.write(line) :]
    except OSError:
        file.truncate(begin)
        raise


def num_steps(path: Path) -> int:
    """Return how many steps a metrics file tells of, from the job's first; 0 without one."""
    return max((row["step"] + 1 for row in read_metrics(path)), default=0)


def _keep_before(path: Path, first_step: int) -> None:
    rows = read_metrics(path)
    kept = [row for row in rows if row["step"] < first_step]
    if path.is_file():
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        partial.replace(path)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = str(value)[:_LONGEST_PARAM]
    return flat


class _MlflowRun:
    """One MLflow run; its id is kept in a file, so that a restart finds it again."""

    def __init__(self, path: Path, settings: TrackingSettings, name: str) -> None:
        self._client = _connect(settings)
        self._run_id = self._open(path, settings, name)
        self._queue: queue.Queue[tuple[str, Any] | None] = queue.Queue()
        self._has_failed = False
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def send(self, kind: str, content: Any) -> None:
        self._queue.put((kind, content))

    def close(self, status: str) -> None:
        self._queue.put(("status", status))
        self._queue.put(None)
        self._thread.join(_CLOSE_S)
        if self._thread.is_alive():
            log.warning("MLflow did not take the last metrics in time; metrics.jsonl has them all")

    def _open(self, path: Path, settings: TrackingSettings, name: str) -> str:
        try:
            if path.is_file():
                told = json.loads(path.read_text(encoding="utf-8"))
                if told["uri"] == settings.mlflow:
                    self._client.update_run(told["run"], status="RUNNING")
                    return told["run"]
            found = self._client.get_experiment_by_name(settings.experiment)
            experiment = (
                found.experiment_id
                if found
                else self._client.create_experiment(settings.experiment)
            )
            run_id = self._client.create_run(experiment, run_name=name).info.run_id
        except Exception as error:  # MLflow passes on what its many stores raise
            raise _refused(settings, error) from None  # its own words may hold the password
        path.write_text(json.dumps({"uri": settings.mlflow, "run": run_id}), encoding="utf-8")
        return run_id

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                self._send(*item)
            except Exception as error:  # the job goes on, and the file has every number
                if not self._has_failed:
                    said = without_login(str(error))
                    log.warning("MLflow fails, metrics are in the file only: %s", said)
                self._has_failed = True

    def _send(self, kind: str, content: Any) -> None:
        entities: Any = importlib.import_module("mlflow.entities")
        if kind == "metrics":
            step, values = content
            now_ms = int(time.time() * 1000)
            metrics = [entities.Metric(name, value, now_ms, step) for name, value in values.items()]
            self._client.log_batch(self._run_id, metrics=metrics)
        elif kind == "params":
            params = [entities.Param(name, value) for name, value in content.items()]
            for first in range(0, len(params), 100):
                self._client.log_batch(self._run_id, params=params[first : first + 100])
        elif kind == "artifact":
            name, text = content
            self._client.log_text(self._run_id, text, name)
        else:
            self._client.set_terminated(self._run_id, status=content)


def _refused(settings: TrackingSettings, error: Exception) -> UserError:
    said = "".join(str(error).splitlines()[:1])
    return UserError(
        without_login(f"MLflow at {settings.mlflow!r} cannot be used: {said}"),
        hint="tracking: {mlflow: …} takes http://host:port, or sqlite:///path.db",
    )


def _connect(settings: TrackingSettings) -> Any:
    # Its own patience is minutes for each call; a server that is not there should be said at once.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    try:
        mlflow: Any = importlib.import_module("mlflow")
    except ImportError as error:
        raise UnsupportedError(_NO_MLFLOW, hint="pip install 'mxn[train]'") from error
    assert settings.mlflow is not None
    uri = with_login(settings.mlflow)
    try:
        # Without a registry of models: the small package has none for sqlite.
        return mlflow.MlflowClient(tracking_uri=uri, registry_uri="")
    except Exception as error:  # as above
        raise _refused(settings, error) from None
