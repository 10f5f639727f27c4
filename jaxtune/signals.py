"""SIGTERM and Ctrl-C during training: once to finish the step and save, twice to stop at once."""

import os
import signal
import socket
import threading

from jaxtune.console import say

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """Within a `with` statement, the first signal sets `requested` and the second ends the process.

    The loop looks at `requested` after each step, saves, and exits with `exit_code`: 143 after SIGTERM, 130
    after Ctrl-C. Before the first step there is nothing to save, and it exits as soon as it looks; `steps` says whether
    there will be a step to save. A thread does the listening: Python's own handlers wait while XLA compiles, and the
    second signal is for whoever cannot wait. Signals reach a process's main thread alone; in another one this
    does nothing, and `requested` stays false.
    """

    def __init__(self, steps: bool = True) -> None:
        self.steps = steps
        self.requested = False
        self.signum: int | None = None
        self._active = threading.current_thread() is threading.main_thread()

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as a shell gives it; 0 when there was none."""
        return 0 if self.signum is None else 128 + self.signum

    def __enter__(self) -> "StopSignal":
        if self._active:
            self._ear, self._mouth = socket.socketpair()
            self._mouth.setblocking(False)
            self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
            self._thread.start()
            # A signal's number is written to this socket at once, whatever the main thread is in.
            self._old_mouth = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
            self._old = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        if self._active:
            for number, handler in self._old.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._old_mouth)
            self._mouth.close()
            self._thread.join()
            self._ear.close()

    def _listen(self) -> None:
        while received := self._ear.recv(1):
            if received[0] in SIGNALS:
                self._act(received[0])

    def _act(self, number: int) -> None:
        if self.requested:
            os._exit(128 + number)
        self.signum = number
        name = signal.Signals(number).name
        try:
            what = "finishing this step and saving" if self.steps else "stopping before the first step"
            say(f"{name}: {what}; once more stops at once", style="yellow")
        finally:
            self.requested = True
