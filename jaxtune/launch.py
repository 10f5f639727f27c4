"""`jaxtune launch`: several processes of one command on this machine, which end together.

Process 0 has the terminal; what the others say is kept, and shown when one of them fails. On several machines the
cluster's launcher does this (docs/many_processes.md).
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from jaxtune.clusters import COORDINATOR, HEARTBEAT, LOCAL_DEVICES, PROCESS, PROCESSES, seconds
from jaxtune.errors import ConfigError
from jaxtune.files import temporary_directory

BIND, LAUNCHED = "JAX_COORDINATOR_BIND_ADDRESS", "JAXTUNE_LAUNCHED"
STOPS = (signal.SIGTERM, signal.SIGINT)
LATE = 15  # seconds beyond the heartbeat after which a process that outlives another's failure is ended
AT_START = 3  # seconds that are left to the others where a signal to all has ended one before it could save
TAIL = 50  # lines of a failed process that are shown
TOLD = (2, 75, 130, 143)  # exit codes that process 0 has explained


def launch(arguments: list[str], processes: int, devices: int) -> int:
    """Run `jaxtune ARGUMENTS` in so many processes, and give the exit code of the one that failed first, or 0.

    devices: of each process. GPUs are counted off: process 1 of 2 each has GPU 2 and 3. CPU devices are made.

    Raises:
        ConfigError: a command that is not for several processes, or no place for what they say.
    """
    if arguments[:1] != ["train"]:
        raise ConfigError(f"launch starts jaxtune train; found {' '.join(arguments)[:80] or 'nothing'}")
    address = f"127.0.0.1:{free_port()}"
    with temporary_directory() as logs:
        homes = [Path(logs) / f"process-{number}.log" for number in range(processes)]
        group = Group()
        with group.passing_signals_on():
            for number, log in enumerate(homes):
                environment = child_environment(os.environ, address, number, processes, devices)
                command = [sys.executable, "-m", "jaxtune", *arguments]
                group.start(command, environment, None if number == 0 else log)
            group.wait(seconds(os.environ, HEARTBEAT) + LATE)
        return report(group, homes)


def child_environment(
    environment: Mapping[str, str], address: str, number: int, processes: int, devices: int
) -> dict[str, str]:
    """What process `number` needs to know. address: of process 0, host:port."""
    flags = environment.get("XLA_FLAGS", "").split()
    flags = [flag for flag in flags if not flag.startswith("--xla_force_host_platform_device_count")]
    local = ",".join(str(number * devices + device) for device in range(devices))
    direct = ",".join(filter(None, (environment.get("no_grpc_proxy", environment.get("no_proxy")), "127.0.0.1")))
    proxied = any(name.lower().endswith("_proxy") for name in environment)
    return {
        **environment,
        "XLA_FLAGS": " ".join(flags),
        "JAX_NUM_CPU_DEVICES": str(devices),
        COORDINATOR: address,
        BIND: address,  # nobody on the network needs to reach it
        PROCESSES: str(processes),
        PROCESS: str(number),
        LOCAL_DEVICES: local,
        **({"no_grpc_proxy": direct} if proxied else {}),
    }


class Group:
    """The processes, in order; `failed` is the number of the first that failed."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen] = []
        self.failed: int | None = None
        self.stops: list[int] = []

    def start(self, command: list[str], environment: Mapping[str, str], log: Path | None) -> None:
        """Begin one process. log: where its output goes, in place of ours.

        Each is a session of its own: Ctrl-C in a terminal reaches this process alone, which passes it on once. Its
        input is a pipe that closes when this process is gone; see `stop_with_launcher`.
        """
        if self.stops:
            return
        with contextlib.nullcontext() if log is None else log.open("wb") as file:
            self.processes.append(
                subprocess.Popen(
                    command,
                    env={**environment, LAUNCHED: "1"},
                    stdin=subprocess.PIPE,
                    stdout=file,
                    stderr=file,
                    start_new_session=True,
                )
            )

    @contextlib.contextmanager
    def passing_signals_on(self) -> Iterator[None]:
        """Send SIGTERM and Ctrl-C to every process. Whatever happens, none is left running at the end."""
        old = {number: signal.signal(number, self._pass_on) for number in STOPS}
        try:
            yield
        finally:
            self._send(signal.SIGKILL)
            for process in self.processes:
                process.wait()
            for number, handler in old.items():
                signal.signal(number, handler)

    def wait(self, patience: float) -> None:
        """Until all have ended by themselves, or for `patience` seconds after the first failed. Where that one had not
        got as far as to take the signal that was passed on, the others have nobody to take a step with."""
        deadline = None
        while any(process.poll() is None for process in self.processes):
            if deadline is not None and time.monotonic() > deadline:
                return
            self._look()
            if deadline is None and self.failed is not None:
                stopped = -self.processes[self.failed].returncode in self.stops
                deadline = time.monotonic() + (AT_START if stopped else patience)
            time.sleep(0.05)
        self._look()

    def _look(self) -> None:
        if self.failed is None:
            failed = [number for number, process in enumerate(self.processes) if process.poll()]
            # Of two that are found at once, the one that a signal killed did not follow the other.
            self.failed = min(failed, key=lambda number: self.processes[number].returncode, default=None)

    def _pass_on(self, number: int, _: object) -> None:
        self.stops.append(number)
        self._send(number)

    def _send(self, number: int) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)


def stop_with_launcher() -> None:
    """In a process that a Group started: save and stop when the launcher is gone, as SIGTERM would have it."""

    def listen() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    if LAUNCHED in os.environ:
        threading.Thread(target=listen, name="launcher", daemon=True).start()


def report(group: Group, logs: list[Path]) -> int:
    """Say which process failed and of what, where process 0 has not; the exit code."""
    if group.failed is None:
        return 128 + group.stops[0] if group.stops and not group.processes else 0
    status = group.processes[group.failed].returncode
    code = 128 - status if status < 0 else status
    if code in TOLD:
        return code
    if group.failed > 0:
        prefix = f"process {group.failed}: "
        for line in logs[group.failed].read_text(errors="replace").splitlines()[-TAIL:]:
            _say(prefix + line)
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"failed with exit code {code}"
    _say(f"Process {group.failed} of {len(group.processes)} {how}, so the run ended; the same command goes on with it")
    return code


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - beside what process 0 says


def free_port() -> int:
    """A port of this machine that nobody uses at present."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
