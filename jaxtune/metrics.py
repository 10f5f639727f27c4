"""What a run writes while it trains: metrics.jsonl, ledger.jsonl, TensorBoard events, a bar or plain lines.

The ledger says exactly what each step did, so that two runs can be compared bit by bit; the others are for
people. Training reads none of it back, except that the files are rewound when a run goes on from a checkpoint.
"""

import math
import os
import resource
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax

from jaxtune.config import LogSection
from jaxtune.console import Bar, console, say, warn
from jaxtune.errors import SaveError
from jaxtune.record_files import Lenient, LineFile, Row, TensorBoard, read_lines, rewind

METRICS, LEDGER, TENSORBOARD = "metrics.jsonl", "ledger.jsonl", "tensorboard"


class Recorder:
    """The record of one run. One process makes one, and no other writes to its files.

    run_dir: exists; log: how often to write; total_steps: of the whole run; done: the step of the checkpoint
    that the run goes on from, or 0: what the files hold of later steps is dropped.
    Call `start` just before the first step (what passed until then, compiling say, is not counted), `step` after
    each step and before a checkpoint of that step is committed, `evaluation` after an evaluation, `close` at the
    end; or use it in a `with` statement. `rows` are the lines of metrics.jsonl.
    """

    def __init__(self, run_dir: Path, log: LogSection, total_steps: int, done: int = 0):
        self._every, self._total_steps = log.every, total_steps
        self.rows = rewind(run_dir / METRICS, done)
        ledger = rewind(run_dir / LEDGER, done)
        if len(ledger) != done:
            warn(f"{run_dir / LEDGER} holds {len(ledger)} of the {done} steps before the checkpoint")
        self._ledger_path = run_dir / LEDGER
        self._ledger = LineFile(self._ledger_path)
        self._files = [Lenient(run_dir / METRICS, LineFile)]
        if log.tensorboard:
            self._files.append(Lenient(run_dir / TENSORBOARD, lambda path: TensorBoard(path, done)))
        self._counts = _Counts(self.rows, ledger)
        self._latest: Row = _told(ledger[-1], self.rows) if ledger else {}
        self._bar = Bar(total_steps, done) if console.is_terminal else None

    def __enter__(self) -> "Recorder":
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def start(self) -> None:
        """Start the clock and the bar."""
        self._counts.start()
        if self._bar:
            self._bar.start()

    def step(
        self,
        step: int,
        *,
        loss: float,
        grad_norm: float,
        lr: float,
        tokens: int,
        supervised_tokens: int,
        batch_sha256: str,
        data_wait: float = 0.0,
        bad_steps: int = 0,
        loss_scale: float | None = None,
        source_examples: dict[str, int] | None = None,
    ) -> None:
        """Record a step. tokens and supervised_tokens: of its batch, padding not counted, all devices together;
        data_wait: seconds that the loop waited for the batch, of which a line tells the mean over its steps;
        bad_steps: how many steps of the run were skipped so far, for numbers that were not finite or a spike;
        loss_scale: of float16, the next step's; source_examples: of several sources of data, how many of the batch's
        examples are of each; a line tells how many the run has had.

        Raises:
            SaveError: the ledger cannot be written; without it nobody could tell what the run did.
        """
        values = {"loss": float(loss), "grad_norm": float(grad_norm)}
        counts = {"tokens": int(tokens), "supervised_tokens": int(supervised_tokens)}
        exact = {name: value.hex() for name, value in values.items()}
        sources = {"source_examples": source_examples} if source_examples else {}
        self._write_ledger({"step": step, "batch_sha256": batch_sha256, **exact, **counts, **sources})
        self._counts.add(**counts, data_wait=float(data_wait), sources=source_examples or {})
        self._latest = {"step": step, **values, "lr": float(lr), "bad_steps": int(bad_steps)}
        self._latest |= {} if loss_scale is None else {"loss_scale": float(loss_scale)}
        if step % self._every == 0 or step == self._total_steps:
            self._log()
        if self._bar:
            self._bar.update(step, self._summary())

    def evaluation(self, step: int, loss: float) -> None:
        """Add `eval_loss`, the mean over the supervised tokens of the held-out data, to the line of `step`."""
        if not self.rows or self.rows[-1]["step"] != step:
            if self._latest.get("step") != step:
                warn(f"{self._ledger_path} has no step {step}: its eval loss, {float(loss):.4f}, has no line")
                return
            self._log()
        self._counts.pause()
        fields = {"eval_loss": _finite(float(loss))}
        self.rows[-1].update(fields)
        for file in self._files:
            file.amend(fields)
        trained = "nan" if self.rows[-1]["loss"] is None else f"{self.rows[-1]['loss']:.4f}"
        say(f"step {step}/{self._total_steps}  loss {trained}  eval loss {float(loss):.4f}", style="bold")

    def close(self) -> None:
        """Stop the bar and close the files; safe to call twice."""
        if self._bar:
            self._bar.stop()
        self._ledger.close()
        for file in self._files:
            file.close()

    def _write_ledger(self, row: Row) -> None:
        try:
            self._ledger.append(row)
        except OSError as error:
            raise SaveError(
                f"{self._ledger_path}: step {row['step']} cannot be written: {error.strerror or error}; "
                "make room, then run the same command again: it goes on from the last checkpoint"
            ) from None

    def _log(self) -> None:
        row = {name: _finite(value) for name, value in self._latest.items()}
        row |= self._counts.take() | {"memory_bytes": memory_in_use()}
        self.rows.append(row)
        for file in self._files:
            file.append(row)
        if not self._bar:
            say(f"step {row['step']}/{self._total_steps}  {self._summary()}")

    def _summary(self) -> str:
        """The latest step in a line that fits beside a bar on 80 columns, unless something is wrong."""
        left = self._counts.seconds_left(self._total_steps - self._latest["step"])
        parts = [
            f"loss {self._latest['loss']:.4f}",
            f"lr {self._latest['lr']:.1e}",
            f"{self._counts.shown_rate:,.0f} tokens/s",
            f"{memory_in_use() / 2**30:.1f} GiB",
            f"{duration(left)} left",
        ]
        if self._latest["bad_steps"]:
            parts.append(f"{self._latest['bad_steps']} skipped")
        return "  ".join(parts)


def _told(row: Row, lines: list[Row]) -> Row:
    """What the ledger and the lines have of the ledger's last step; its learning rate is in neither."""
    exact = {name: float.fromhex(row[name]) for name in ("loss", "grad_norm")}
    return {"step": row["step"], **exact, "lr": math.nan, "bad_steps": lines[-1]["bad_steps"] if lines else 0}


class Silent:
    """What the other processes have in place of a Recorder: the first one writes for all."""

    def __init__(self, run_dir: Path):
        self._run_dir = run_dir

    @property
    def rows(self) -> list[Row]:
        """What the first process has written so far."""
        return read_rows(self._run_dir)

    def __enter__(self) -> "Silent":
        return self

    def __exit__(self, *_) -> None:
        pass

    def step(self, step: int, **_: Any) -> None:
        pass

    def evaluation(self, step: int, loss: float) -> None:
        pass


class _Counts:
    """Tokens and seconds since the last line, and in all. The seconds of an evaluation do not count."""

    def __init__(self, rows: list[Row], ledger: list[Row]):
        logged = rows[-1]["step"] if rows else 0
        pending = [row for row in ledger if row["step"] > logged]
        self._total = sum(row["tokens"] for row in ledger)
        self._sources: Counter[str] = Counter()
        for row in ledger:
            self._sources.update(row.get("source_examples", {}))
        self._tokens = sum(row["tokens"] for row in pending)
        self._supervised = sum(row["supervised_tokens"] for row in pending)
        self._steps = 0
        self.start()

    def start(self) -> None:
        self._first = self._since = self._latest = time.monotonic()
        # Of this process, since the last line:
        self._timed = 0  # tokens: the rate's
        self._waits: list[float] = []  # of each step, for its data
        self._line_rate = 0.0

    def add(self, tokens: int, supervised_tokens: int, data_wait: float, sources: dict[str, int]) -> None:
        self._latest = time.monotonic()
        self._sources.update(sources)
        self._steps += 1
        self._total += tokens
        self._tokens += tokens
        self._timed += tokens
        self._waits.append(data_wait)
        self._supervised += supervised_tokens

    def pause(self) -> None:
        """What passed since the latest step was not training."""
        idle = time.monotonic() - self._latest
        self._first, self._since, self._latest = self._first + idle, self._since + idle, self._latest + idle

    @property
    def shown_rate(self) -> float:
        """The last line's tokens a second: steadier than what a few steps since would say."""
        return self._line_rate or self._rate()

    def _rate(self) -> float:
        return self._timed / max(self._latest - self._since, 1e-9)

    def seconds_left(self, steps: int) -> float:
        return (self._latest - self._first) / max(self._steps, 1) * steps

    def take(self) -> Row:
        """What a line says of the steps since the last one; the next line starts from here."""
        self._line_rate = self._rate()
        row: Row = {
            "tokens": self._tokens,
            "supervised_tokens": self._supervised,
            "total_tokens": self._total,
            "tokens_per_second": self._line_rate,
            "data_wait_seconds": sum(self._waits) / max(len(self._waits), 1),
        }
        if self._sources:
            row["source_examples"] = dict(self._sources)
        self._tokens = self._supervised = self._timed = 0
        self._waits = []
        self._since = self._latest
        return row


def memory_in_use() -> int:
    """Bytes in use on the fullest local device; where the backend does not tell (a CPU), of this process."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    used = [stat["bytes_in_use"] for stat in stats if "bytes_in_use" in stat]
    return max(used) if used else _resident_bytes()


def _resident_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux: the most it ever was
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def duration(seconds: float) -> str:
    """`42 s`, `3:07` or `2:05:00`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, seconds = divmod(whole, 60)
    return f"{minutes}:{seconds:02}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def _finite(value: float | int) -> float | int | None:
    """JSON has no nan and no infinity; null stands for them."""
    return value if math.isfinite(value) else None


def read_rows(run_dir: Path) -> list[Row]:
    """The lines of a run's metrics.jsonl, as far as they are whole."""
    return read_lines(run_dir / METRICS)
