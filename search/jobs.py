"""Sends searches to a Ray cluster through Ray Jobs: only the address of its dashboard is needed, no shared folder.

The working directory is packed and sent, so the configuration and the user's own modules are there. The job runs `secateur
search` in its copy of the folder. The run folder comes back through the log of a second, small job, because Ray Jobs transfers no
files.
"""

from __future__ import annotations

import base64
import importlib
import io
import os
import shlex
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from os.path import exists, isdir, isfile
from pathlib import Path
from typing import Any

from secateur.envs.core import InputError
from secateur.search.run.ray_cluster import first_line, set_ray_environment

LARGEST = 300e6
"""Bytes of a run folder that is fetched."""
START_SECONDS = 120.0
"""How long a new cluster may take until it accepts jobs."""

RUNS, RUN_NAME = ".secateur-jobs", "submitted"
"""Folder of the runs in the home folder of the cluster's head, and name of each run in the folder of its job."""

_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
_BEGIN, _END = "-----BEGIN RUN-----", "-----END RUN-----"
_EXCLUDED = ["/runs/", "/results/", "/.git/", "/.venv/", "__pycache__"]


class Jobs:
    """The jobs of one cluster.

    Args:
        address: of the dashboard, such as "http://head:8265".
    Raises:
        InputError: if Ray's job client is not installed, or there is no cluster.
    """

    def __init__(self, address: str):
        set_ray_environment(address)
        try:
            importlib.import_module("aiohttp")  # ray[default] adds it; without it Ray's own error is a traceback
            from ray.exceptions import RayError
            from ray.job_submission import JobSubmissionClient
        except ImportError as error:
            raise InputError(f"Ray Jobs needs {error.name}: pip install 'secateur[jobs]'.") from None
        self.address = address
        self._errors = (RuntimeError, OSError, ValueError, RayError)
        with self._explained():
            self._client: Any = JobSubmissionClient(address)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except self._errors as error:
            raise InputError(
                f"{self.address}: {first_line(error)}. It must be the address of the cluster's dashboard, and both sides need "
                "RAY_AUTH_MODE=token and the same token."
            ) from None

    def submit(self, config: Path, overrides: Sequence[str], folder: Path, wheel: Path | None = None) -> str:
        """Start a search on the cluster; return the job's id.

        Args:
            config: of the search, in `folder`, or an installed example.
            overrides: "section.key=value" texts.
            folder: working directory; it is packed and sent.
            wheel: of secateur, which is installed for the job; None: the cluster has it.
        """
        job = f"secateur-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        changes = [*overrides, "output.root=runs", f"output.name={RUN_NAME}", "search.address=auto"]
        command = ["python", "-m", "secateur", "search", str(config), *(part for text in changes for part in ("--set", text))]
        environment: dict[str, Any] = {"working_dir": str(folder), "excludes": _EXCLUDED}
        if wheel is not None:
            environment["pip"] = [f"${{RAY_RUNTIME_ENV_CREATE_WORKING_DIR}}/{wheel.resolve().relative_to(folder.resolve())}"]
        # The folder that a job works in is removed after it, so the run lies elsewhere.
        runs = f'"$HOME/{RUNS}/{job}"'
        self._start(f"mkdir -p {runs} && ln -sfn {runs} runs && exec {shlex.join(command)}", job, environment)
        return job

    def _start(self, command: str, job: str, environment: dict[str, Any] | None = None) -> None:
        """Start a job; a cluster that has just started takes none for some seconds."""
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                with self._explained():
                    self._client.submit_job(entrypoint=command, submission_id=job, runtime_env=environment)
                return
            except InputError as error:
                if "No available agent" not in str(error) or time.monotonic() > end:
                    raise
            time.sleep(1)

    def list(self) -> list[tuple[str, str, str]]:
        """Return id, state and message of every job, the latest first."""
        with self._explained():
            found = sorted(self._client.list_jobs(), key=lambda job: -(job.start_time or 0))
        return [(str(job.submission_id), str(job.status.value), str(job.message or "")) for job in found if job.submission_id]

    def status(self, job: str) -> str:
        """Return the state of a job: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
        with self._explained():
            return str(self._client.get_job_status(job).value)

    def stop(self, job: str) -> None:
        """End a job as SIGTERM does: it finishes its running evaluations and saves them."""
        with self._explained():
            self._client.stop_job(job)

    def log(self, job: str) -> str:
        """Return what a job has printed."""
        with self._explained():
            return str(self._client.get_job_logs(job))

    def wait(self, job: str, on_text: Callable[[str], None] = lambda text: None, seconds: float = 1.0) -> str:
        """Return the state of a job once it has ended; call `on_text` with what it prints."""
        shown = 0
        while True:
            state, text = self.status(job), self.log(job)
            on_text(text[shown:])
            shown = len(text)
            if state in _ENDED:
                return state
            time.sleep(seconds)

    def fetch(self, job: str, folder: Path) -> Path:
        """Copy the run of a job into a folder; return the run's folder.

        Raises:
            InputError: if there is no run, it is too large, or the folder has one of this name.
        """
        target = folder / job
        if exists(target):
            raise InputError(f"{target} exists already. Choose another folder.")
        packing = f"{job}-fetch-{time.strftime('%H%M%S')}"
        command = f'python -m secateur.search.jobs "$HOME/{RUNS}/{job}/{RUN_NAME}"'
        self._start(command, packing)
        state, text = self.wait(packing), self.log(packing)
        if state != "SUCCEEDED" or _BEGIN not in text:
            raise InputError(f"The run of {job} cannot be fetched: {(text.strip().splitlines() or [state])[-1]}")
        unpack(text.partition(_BEGIN)[2].partition(_END)[0], target)
        return target


def pack(run: Path) -> str:
    """Return a run folder as text.

    Raises:
        InputError: if there is no such run, or it is too large.
    """
    if not isdir(run):
        raise InputError("the job has no run")
    size = sum(file.stat().st_size for file in run.rglob("*") if isfile(file))
    if size > LARGEST:
        raise InputError(f"the run has {size / 1e6:.0f} MB; more than {LARGEST / 1e6:.0f} MB need a shared folder")
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        archive.add(run, arcname=".")
    return base64.encodebytes(content.getvalue()).decode()


def unpack(text: str, folder: Path) -> None:
    """Write the run folder that `pack` made; only files inside of the folder are written."""
    folder.mkdir(parents=True)
    with tarfile.open(fileobj=io.BytesIO(base64.b64decode(text)), mode="r:gz") as archive:
        archive.extractall(folder, filter="data")


if __name__ == "__main__":
    try:
        print(f"{_BEGIN}\n{pack(Path(sys.argv[1]))}{_END}")
    except InputError as error:
        sys.exit(str(error))
