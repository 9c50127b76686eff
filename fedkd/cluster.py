"""Ray: started here or joined, while something else is done; and the environment of its workers."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from fedkd.errors import RunError
from fedkd.kept import kept_workers
from fedkd.threads import cores

if TYPE_CHECKING:
    from fedkd.scenario import Scenario

T = TypeVar("T")

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")

wait_for_starts = True
"""Whether a start that is not wanted any more is waited for, so that Ray is gone afterwards; the command line calls
`exit_now` instead."""

_started: tuple[str, dict[str, str]] = "", {}  # address of the Ray that is here, and what its processes were given


@contextmanager
def shared_engine(scenario: Scenario, meanwhile: Callable[[], T] = lambda: None) -> Iterator[T]:
    """Keep one Ray for several runs, and workers where the next run wants the same: starting them takes seconds.

    Parameters
    ----------
    scenario : Scenario
        Says whether Ray is wanted.
    meanwhile : callable
        Something to do while Ray starts; the context's value is what it returns. If it fails, Ray is stopped again.
    """
    if scenario.system.engine == "inline":
        yield meanwhile()
        return
    import ray

    for thread in _Ray.alive():
        if thread.over.is_set():  # Ctrl-C may have cut its end short
            thread.join()
    if ray.is_initialized():
        yield meanwhile()
        return
    thread = _Ray(scenario.system.address, scenario.system.workers)
    try:
        thread.start()
        value = meanwhile()
        thread.started.result()
    except BaseException:
        thread.end(wait=wait_for_starts)
        raise
    try:
        with kept_workers():
            yield value
    finally:
        thread.end()


def is_there() -> bool:
    """Whether there is a Ray that `shared_engine` has begun to start, and that has not been stopped yet."""
    return bool(_Ray.alive())


def exit_now(code: int) -> NoReturn:
    """End this process and what there is of Ray, instead of waiting until it has started and stopped.

    Parameters
    ----------
    code : int
        Exit code.
    """
    import psutil

    sys.stdout.flush()
    sys.stderr.flush()
    for process in psutil.Process().children(recursive=True):  # agents of Ray would outlive the others for a while
        with suppress(psutil.NoSuchProcess):
            process.kill()
    os._exit(code)


class _Ray(threading.Thread):
    """Starts Ray, and lives until it is over: on Linux, processes end with the thread that has started them.

    Parameters
    ----------
    address, workers
        As of `start_ray`.
    """

    def __init__(self, address: str, workers: int) -> None:
        super().__init__(name="fedkd-ray", daemon=True)
        self.address, self.workers = address, workers
        self.started: Future[None] = Future()
        self.over = threading.Event()

    @classmethod
    def alive(cls) -> list[_Ray]:
        """Return those that there are."""
        return [thread for thread in threading.enumerate() if isinstance(thread, cls)]

    def end(self, wait: bool = True) -> None:
        """Let Ray be stopped as soon as it has started, and wait for that unless told not to."""
        self.over.set()
        if wait and self.is_alive():  # Ctrl-C may have come before it was
            self.join()

    def run(self) -> None:
        """Start Ray, wait, and stop it."""
        import ray

        try:
            start_ray(self.address, self.workers)
        except BaseException as error:  # raised where the start is waited for
            self.started.set_exception(error)
        else:
            self.started.set_result(None)
            self.over.wait()
        ray.shutdown()


def worker_env() -> dict[str, str]:
    """Return the environment of a worker process.

    Modules resolve as in the driver; the working folder comes last, so it shadows nothing.
    """
    path = [os.path.abspath(entry) for entry in sys.path if entry]
    return {
        "PYTHONPATH": os.pathsep.join(dict.fromkeys([*path, os.getcwd()])),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        # By default glibc returns large blocks to the system at every free, and page faults then dominate
        # small convolutions. 32 MiB is the largest threshold that it accepts.
        "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
        "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
        "FLWR_TELEMETRY_ENABLED": os.environ.get("FLWR_TELEMETRY_ENABLED", "0"),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }


def start_ray(address: str, workers: int) -> None:
    """Start Ray on this machine, or join a cluster.

    Parameters
    ----------
    address : str
        Cluster to join; empty starts one here.
    workers : int
        CPUs that a new Ray must have at least.

    Raises
    ------
    RunError
        Ray cannot be started or joined.
    """
    import ray

    global _started
    settings: dict[str, Any] = {"include_dashboard": False, "logging_level": logging.ERROR}
    if not address:  # "local" keeps RAY_ADDRESS from choosing a cluster that nobody asked for
        settings |= {"address": "local", "num_cpus": max(workers, cores())}
    else:
        settings |= {"address": address}
    env = {} if address else worker_env()
    alike = all(os.environ.get(name, "1") == "1" for name in THREADS)  # Ray leaves alone what somebody has set
    try:
        # Ray sees to the threads of a worker itself; here, libraries that are being imported would read these.
        with _own_sigterm(), _environment({name: value for name, value in env.items() if name not in THREADS}):
            ray.init(**settings)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise RunError(f"Ray cannot be {'joined at ' + address if address else 'started'}: {error}") from error
    _started = ray.get_runtime_context().gcs_address, env if alike else {}


def runtime_env() -> dict[str, Any] | None:
    """Return what Ray has to give workers; None if all of its processes were started with it.

    Ray then takes the processes that it starts beforehand, instead of starting others when they are needed.
    """
    import ray

    env = worker_env()
    return None if _started == (ray.get_runtime_context().gcs_address, env) else {"env_vars": env}


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep the handler of SIGTERM: after Ray's own, a process aborts if it takes more than seconds to end."""
    if threading.current_thread() is threading.main_thread():
        before = signal.getsignal(signal.SIGTERM)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
        return
    get, put = ctypes.pythonapi.PyOS_getsig, ctypes.pythonapi.PyOS_setsig
    get.argtypes, get.restype = [ctypes.c_int], ctypes.c_void_p
    put.argtypes, put.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    handler = get(signal.SIGTERM)  # as `signal.signal` may be called by the main thread alone
    try:
        yield
    finally:
        put(signal.SIGTERM, handler)


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Let processes that are started meanwhile find these variables."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
