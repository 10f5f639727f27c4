"""Where jaxtune speaks to a person: one console for reports, stages, warnings and progress bars.

It writes to stdout. A command whose stdout is its answer (generated text, say) moves it aside with
`speak_on_stderr`; one that would lose more than words where stdout's disk is full calls `go_on_unheard`. Without a
terminal everything is plain, unwrapped lines, and nobody makes a bar.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, cast

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from jaxtune.errors import OutputError


@contextmanager
def told_when_full() -> Iterator[None]:
    """Around a write to stdout: that its disk is full, say, becomes an OutputError. A reader that is gone stays one."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"the output cannot be written: {error.strerror or error}") from None


class _Stream:
    """Where a console writes to. bear: what is done about an OutputError."""

    def __init__(self, file: IO[str], bear: Callable[[OutputError], None]):
        self._file, self._bear = file, bear

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> None:
        self._try(self._file.write, text)

    def flush(self) -> None:
        self._try(self._file.flush)

    def _try(self, act: Callable[..., object], *arguments: str) -> None:
        try:
            with told_when_full():
                act(*arguments)
        except OutputError as error:
            self._bear(error)


class _Console(Console):
    """Its errors of writing are OutputErrors, or told once on stderr and endured: of a command that asked for that, and
    on stderr itself, where no answer is written."""

    goes_on, _warned = False, False

    @property  # type: ignore[misc]  # nobody sets it
    def file(self) -> IO[str]:
        return cast(IO[str], _Stream(super().file, self._bear))

    def _bear(self, error: OutputError) -> None:
        if not (self.goes_on or self.stderr):
            raise error
        if not self._warned:
            self._warned = True
            with contextlib.suppress(OSError):
                print(f"Warning: {error}; the work goes on without it", file=sys.stderr)  # noqa: T201


# A notebook's stdout calls itself a terminal, and shows what moves a terminal's cursor as it is: plain lines there,
# which a reader can copy and a test can compare.
_is_notebook = type(sys.stdout).__module__.startswith("ipykernel")
console = _Console(highlight=False, markup=False, force_jupyter=False, force_terminal=False if _is_notebook else None)


def speak_on_stderr() -> None:
    """Leave stdout to the command's own answer."""
    console.stderr = True


def go_on_unheard() -> None:
    """Where stdout's disk is full, say so once and go on; else it is an OutputError."""
    console.goes_on = True


def say(text: str, style: str | None = None) -> None:
    """Lines as they are: no markup is read in them, and none is broken."""
    console.print(text, style=style, soft_wrap=True)


def stage(text: str) -> None:
    """What is being waited for from now on: `stage("Loading the model")`."""
    say(f"{text} ...")


def warn(text: str) -> None:
    """Something that the user would want to know, though the work goes on."""
    say(f"Warning: {text}", style="yellow")


class Bar:
    """A progress bar at the foot of the terminal; what is said meanwhile stands above it."""

    def __init__(self, total: int, done: int = 0):
        text = TextColumn("{task.completed}/{task.total}  {task.fields[summary]}", markup=False)
        self._progress = Progress(BarColumn(bar_width=16), text, console=console)
        self._task = self._progress.add_task("", total=total, completed=done, summary="")

    def start(self) -> None:
        self._progress.start()

    def update(self, done: int, summary: str) -> None:
        self._progress.update(self._task, completed=done, summary=summary)

    def stop(self) -> None:
        self._progress.stop()


@contextmanager
def loading_bar(text: str) -> Iterator[Callable[[str, int, int], None]]:
    """Gives (what, bytes done, bytes in all) -> None: a bar in a terminal, and one line elsewhere."""
    if not console.is_terminal:
        stage(text)
        yield lambda what, done, total: None
        return
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(text, total=None)
        yield lambda what, done, total: progress.update(task, completed=done, total=total)


@contextmanager
def rate_bar(text: str, what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Gives (how many are done) -> None: a bar with their rate and the time left, or two lines without a terminal.

    what: the name of what is counted, such as rows; total: None where it is not known.
    """
    if not console.is_terminal:
        stage(text)
        started, done = time.monotonic(), 0

        def count(now: int) -> None:
            nonlocal done
            done = now

        yield count
        seconds = time.monotonic() - started
        say(f"{done:,} {what} in {seconds:.1f} s, {done / max(seconds, 1e-9):,.0f} a second")
        return
    rate = _RateColumn(what)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), rate, TimeRemainingColumn(), console=console
    ) as progress:
        task = progress.add_task(text, total=total)
        yield lambda now: progress.update(task, completed=now)


class _RateColumn(TextColumn):
    """`120,000 rows  9,800 rows/s`."""

    def __init__(self, what: str):
        super().__init__("")
        self._what = what

    def render(self, task: Task) -> Text:
        return Text(f"{task.completed:,.0f} {self._what}  {task.speed or 0:,.0f} {self._what}/s")
