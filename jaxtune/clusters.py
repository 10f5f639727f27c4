"""Whether this process is one of several, as its environment says, and their start through `jax.distributed`.

JAX itself reads the environments of Slurm, Open MPI, Kubernetes and TPU pods; here is decided when it is to. What
the processes then do together is processes.py's.
"""

import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import NoReturn

from jaxtune.console import warn
from jaxtune.errors import LostProcess, ProcessError, listing

COORDINATOR, PROCESSES, PROCESS = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
LOCAL_DEVICES, HEARTBEAT = "JAX_LOCAL_DEVICE_IDS", "JAXTUNE_HEARTBEAT_SECONDS"
PATIENCE, STUCK = "JAXTUNE_START_SECONDS", "JAXTUNE_STUCK_SECONDS"
DEFAULT_SECONDS = {HEARTBEAT: "100", PATIENCE: "300", STUCK: "1800"}  # STUCK: until steps were timed; see fate.Pace
AUTO = "auto"  # in place of the number of processes: JAX shall find everything out
DOCS = "docs/many_processes.md has an example for each launcher"


@dataclass(frozen=True)
class Place:
    """Where this process is among several; what is None is for JAX to find out.

    launcher: who started them, for messages. coordinator: host:port of process 0. processes: how many. process: which
    one this is, from 0. local_devices: the machine's GPUs that are this process's.
    """

    launcher: str
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    local_devices: tuple[int, ...] | None = None


def find_place(environment: Mapping[str, str]) -> Place | None:
    """Where the environment says that this process is; None when it is alone.

    Raises:
        ProcessError: the environment contradicts itself, or says a part only.
    """
    for look in (_explicit, _slurm, _open_mpi, _kubernetes, _tpu_pod):
        place = look(environment)
        if place is not None:
            return None if place.processes == 1 else place
    if COORDINATOR in environment:
        raise ProcessError(f"{COORDINATOR} is set, but not {PROCESSES} and {PROCESS}; {DOCS}")
    return None


def start(place: Place) -> None:
    """Join the other processes; to be called before JAX is used for anything.

    When they do not come in time, this process ends with a message and exit code 75.

    Raises:
        ProcessError: JAX cannot make out who they are.
    """
    import jax

    heartbeat, patience = (seconds(os.environ, name) for name in (HEARTBEAT, PATIENCE))
    told = place.coordinator is not None and place.process is not None
    # JAX's own listener would take SIGTERM away from signals.py, and from whoever starts.
    jax.config.update("jax_enable_preemption_service", False)
    timer = threading.Timer(patience, _give_up, (place, patience))
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.processes,
            place.process,
            place.local_devices,
            # Who says all is not to be asked again: a launcher may stand inside another's job.
            cluster_detection_method="deactivate" if told else None,
            heartbeat_timeout_seconds=heartbeat,
            initialization_timeout=patience + 60,  # JAX's own end is an abort
        )
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ProcessError(f"{place.launcher}: JAX cannot join the processes: {reason[:300]}. {DOCS}") from error
    finally:
        timer.cancel()


def _give_up(place: Place, patience: int) -> NoReturn:
    process = "" if place.process is None else f" (this is process {place.process})"
    message = (
        f"Of {place.processes or 'the'} processes of the run{process}, not all came to "
        f"{place.coordinator or 'the coordinator'} within {patience} s; {PATIENCE} sets another time. Look whether all "
        f"were started with the same address, and can reach it. {DOCS}\n"
    )
    os.write(2, message.encode())
    os._exit(LostProcess.exit_code)


def seconds(environment: Mapping[str, str], name: str) -> int:
    """HEARTBEAT: after which silence a process is given up; PATIENCE: how long they wait for one another at first;
    STUCK: how long in a step."""
    value = environment.get(name, DEFAULT_SECONDS[name])
    if not value.isdecimal() or int(value) < 1:
        raise ProcessError(f"{name} is {value!r}; it must be a whole number of seconds")
    return int(value)


def _explicit(environment: Mapping[str, str]) -> Place | None:
    """What `jaxtune launch` sets, and whoever has a launcher that nothing else here knows."""
    count = environment.get(PROCESSES)
    index = environment.get(PROCESS)
    if count == AUTO:
        return Place("your launcher", environment.get(COORDINATOR), None, None, _local_devices(environment))
    if count is None and index is None:
        return None
    if count == "1":
        return Place("your launcher", processes=1)
    if index is None:
        index = environment.get("JOB_COMPLETION_INDEX")  # an indexed job of Kubernetes
    found = {PROCESSES: count, PROCESS: index, COORDINATOR: environment.get(COORDINATOR)}
    missing = [name for name, value in found.items() if value is None]
    if missing:
        there = [name for name, value in found.items() if value is not None]
        raise ProcessError(f"{listing(there)} is set, but not {' and '.join(missing)}; the three go together. {DOCS}")
    return _place("your launcher", environment, count, index)


def _slurm(environment: Mapping[str, str]) -> Place | None:
    """A task of a job step with several tasks; not a login shell, a batch script or `srun --pty bash`."""
    if environment.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        if "SLURM_STEP_NUM_TASKS" not in environment and environment.get("SLURM_NTASKS", "1") != "1":
            warn(f"the Slurm job has {environment['SLURM_NTASKS']} tasks, but srun did not start this one: it is alone")
        return None
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    _require("Slurm", environment, names)
    return Place("Slurm", environment.get(COORDINATOR), local_devices=_local_devices(environment))


def _open_mpi(environment: Mapping[str, str]) -> Place | None:
    if environment.get("OMPI_COMM_WORLD_SIZE", "1") == "1":
        return None
    names = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
    count, index, local = _require("Open MPI", environment, names)
    # Up to version 4 this names the machine of mpirun, and JAX puts the coordinator there; 5 names none.
    if COORDINATOR not in environment and "OMPI_MCA_orte_hnp_uri" not in environment:
        raise ProcessError(
            f"This Open MPI does not say where process 0 is: set {COORDINATOR} to its host:port for all processes "
            f"(mpirun -x {COORDINATOR}=HOST:PORT). {DOCS}"
        )
    return _place("Open MPI", environment, count, index, default_device=local)


def _kubernetes(environment: Mapping[str, str]) -> Place | None:
    """A pod of an indexed job. JAX asks the cluster's own interface, for which it needs a package and a role."""
    if "KUBERNETES_SERVICE_HOST" not in environment or "JOB_COMPLETION_INDEX" not in environment:
        return None
    if find_spec("kubernetes") is None:
        raise ProcessError(
            f"This is pod {environment['JOB_COMPLETION_INDEX']} of an indexed Kubernetes job, and nothing says how "
            f"many pods train together: set {PROCESSES} and {COORDINATOR} in the manifest, or {PROCESSES}=1 for pods "
            f"that train alone. {DOCS}"
        )
    return Place("Kubernetes", environment.get(COORDINATOR), local_devices=_local_devices(environment))


def _tpu_pod(environment: Mapping[str, str]) -> Place | None:
    """A host of a TPU slice of several, where the environment lists them, as on Google Kubernetes Engine."""
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or ""
    # libtpu writes a warning into the variable where it knows no hosts.
    several = re.fullmatch(r"[^,\s]+(,[^,\s]+)+", hosts) or environment.get("MEGASCALE_NUM_SLICES", "1") not in (
        "",
        "1",
    )
    return Place("the TPU pod", environment.get(COORDINATOR)) if several else None


def _place(
    launcher: str,
    environment: Mapping[str, str],
    count: str | None,
    index: str | None,
    default_device: str | None = None,
) -> Place:
    numbers = {PROCESSES: count, PROCESS: index}
    for name, value in numbers.items():
        if value is None or not value.isdecimal():
            raise ProcessError(f"{name} is {value!r}; it must be a whole number. {DOCS}")
    processes, process = (int(value or 0) for value in numbers.values())
    if process >= processes:
        raise ProcessError(f"process {process} of {processes}: they are counted from 0 to {processes - 1}. {DOCS}")
    coordinator = environment.get(COORDINATOR)
    if coordinator is not None and not re.fullmatch(r".+:\d+", coordinator):
        raise ProcessError(f"{COORDINATOR} is {coordinator!r}; it must be host:port, of process 0. {DOCS}")
    devices = _local_devices(environment)
    if devices is None and default_device is not None:
        devices = (int(default_device),)
    return Place(launcher, coordinator, processes, process, devices)


def _local_devices(environment: Mapping[str, str]) -> tuple[int, ...] | None:
    text = environment.get(LOCAL_DEVICES)
    if text is None:
        return None
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise ProcessError(f"{LOCAL_DEVICES} is {text!r}; it must be numbers of GPUs, such as 0,1")
    return tuple(map(int, text.split(",")))


def _require(launcher: str, environment: Mapping[str, str], names: tuple[str, ...]) -> list[str]:
    missing = [name for name in names if name not in environment]
    if missing:
        raise ProcessError(
            f"{launcher} started several processes, but {listing(missing)} is not in the environment of this one; "
            f"set {PROCESSES}, {PROCESS} and {COORDINATOR} by hand, or {PROCESSES}=1 to train alone. {DOCS}"
        )
    return [environment[name] for name in names]
