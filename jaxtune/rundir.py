"""Whose run directory it is: new, this run's, or somebody else's; one live process in it at a time.

run.json is the mark of a run: the configuration and the fingerprints that it began with, what was changed
since, and whether it is finished. config.yaml beside it is for people. What a step writes is metrics.py's and
checkpoint.py's business.

Of several processes the first holds the directory, decides and writes; the others look whether they see the same one.
"""

import contextlib
import errno
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from jaxtune import __version__, hf_write, processes, tune
from jaxtune.config import Config, dump_config, make_config
from jaxtune.console import say, warn
from jaxtune.drift import ABSENT, LOG, REFUSE, Change, changes, fingerprint, is_print_of
from jaxtune.errors import CheckpointError, SaveError, UserError, listing
from jaxtune.files import PARTIAL, expanded, is_at, is_disks, read_json, try_lock, write_whole
from jaxtune.section import TuneSection, adapter_of
from jaxtune.signals import StopSignal
from jaxtune.tokenizer import is_tokenizer_print, tokenizer_print
from jaxtune.tune import peft_io

__all__ = ["Run", "StopSignal", "has_weights", "open_run", "read_record", "result_directory"]

RECORD, CONFIG, LOCK = "run.json", "config.yaml", "run.lock"
LEDGER, CHECKPOINTS = "ledger.jsonl", "checkpoints"
ADAPTER, MODEL = "adapter", "model"  # a run's result, one or the other
TRACES = (LEDGER, CHECKPOINTS, ADAPTER, MODEL)  # something was trained here
OWN = {RECORD, CONFIG, LOCK, RECORD + PARTIAL, CONFIG + PARTIAL}  # what there is before anything was trained
KINDS: dict[str, tuple[Any, str]] = {  # of what a record holds
    **dict.fromkeys(("config", "fingerprints"), (dict, "an object")),
    "changes": (list, "a list"),
    "finished": (bool, "true or false"),
    "template": ((str, dict, type(None)), "a text, an object or null"),
}
SHARED_SECONDS = 30  # for a network file system to show one machine what another wrote


class Run:
    """A run directory that this process holds until the end of a `with` statement.

    begun: steps were taken here before. finished: the result was written, and the configuration asks for no
    more; there is nothing to do.
    """

    def __init__(
        self,
        directory: Path,
        config: Config,
        record: dict[str, Any],
        found: list[Change],
        lock: int | None,
        made: bool = False,
    ):
        """lock: the file handle that holds the directory; None where another process does. made: the directory was
        made for this run, and goes with it where the run is refused."""
        self.directory, self.checkpoints = directory, directory / CHECKPOINTS
        self.begun = _begun(directory)
        self._config, self._record, self._changes, self._lock, self._made = config, record, found, lock, made
        self._pending: dict[str, Any] = {}
        longer = {"train.steps", "train.epochs"} & {change.key for change in found}
        self._result = result_directory(directory, config.tune)
        self.finished = bool(record.get("finished")) and has_weights(self._result) and not longer

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *_) -> None:
        if self._lock is not None:
            _let_go(self.directory, self._lock, self._made and kind is not None and issubclass(kind, UserError))

    def check(
        self,
        data: str,
        model: Path,
        total_steps: int | None = None,
        held_out: str | None = None,
        tokenizer: Any = None,
    ) -> None:
        """Compare what the run reads with what it began with. `begin` writes it down.

        data: the training data's fingerprint; model: where the base model lies; total_steps: of the whole run;
        held_out: the fingerprint of what it is evaluated on; tokenizer: with the chat template that is in use.

        Raises:
            CheckpointError: the data, the model, its tokenizer or the adapter to start from has other contents, or
                the run is longer already than it is to be, or ended before and has no checkpoint any more.
            ProcessError: another process reads other contents.
        """
        places, adapter = {"model": model}, adapter_of(self._config.tune)
        if adapter is not None:
            places["adapter"] = expanded(adapter)
        prints = {"data": data, **{name: fingerprint(path) for name, path in places.items()}}
        if held_out is not None:
            prints["held-out data"] = held_out
        if tokenizer is not None:
            prints["tokenizer"] = tokenizer_print(tokenizer)
        template = getattr(tokenizer, "chat_template", None)
        processes.compare(lambda: {f"the {name} (SHA-256)": print for name, print in prints.items()})
        before = self._record.get("fingerprints")
        if self.begun and before is not None:
            other = [name for name in places if name in before and before[name] != prints[name]]
            same = {name: prints[name] for name in other if is_print_of(before[name], places[name])}
            if "tokenizer" in before and tokenizer is not None and is_tokenizer_print(before["tokenizer"], tokenizer):
                same["tokenizer"] = prints["tokenizer"]
            noted = {"tokenizer": prints.get("tokenizer")} | before | same  # an earlier version has not noted it
            told = self._record.get("template")
            self._compare(noted | {"template": told or template}, prints | {"template": template})
            self._compare_length(total_steps)
        log = self._record.get("changes", [])
        if self.begun and self._changes:
            log = [*log, [str(change) for change in self._changes]]
        self._pending = {"fingerprints": prints, "changes": log, "template": template, "finished": False}

    def begin(self, step: int) -> None:
        """Write down the configuration that holds from now on, as everything is in place to go on after `step`."""
        if step == 0 and self.begun:
            say(f"{self.directory}: no checkpoint was saved yet; it begins at step 1 again")
        self._write(**self._pending)

    def _compare(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        model, paths = self._config.model, listing(_paths(self._config))
        # Of a stream's rows that are not read yet, only the code that will read them is known.
        code = ", or jaxtune's code that reads it," if self._config.data.streaming else ""
        names = {
            "data": f"the training data ({paths}){code}",
            "model": f"the base model ({model.path})",
            "tokenizer": f"the tokenizer ({model.tokenizer or model.path})",
            "template": f"the chat template ({self._config.data.template or model.tokenizer or model.path})",
            "adapter": f"the adapter to start from ({adapter_of(self._config.tune)})",
        }
        changed = {name for name in names if before.get(name) != now.get(name)}
        if "data" in changed and changed & {"tokenizer", "template"}:
            changed.remove("data")  # it is what these make of the files
        elif changed == {"template"}:
            warn(f"{self.directory}: {names['template']} changed since this run began; the training data did not")
            changed.clear()
        if changed:
            told = " and ".join(what for name, what in names.items() if name in changed)
            raise CheckpointError(
                f"{self.directory}: {told} changed since this run began; "
                "bring the old ones back, or choose another train.output_dir for a new run"
            )
        asked, held = {"eval.path", "eval.split"} & {change.key for change in self._changes}, "held-out data"
        if held in before and before[held] != now.get(held) and not asked:
            warn(f"{self.directory}: the held-out data changed since this run began; its evaluations do not compare")

    def _compare_length(self, total_steps: int | None) -> None:
        names = [path.name for path in self.checkpoints.iterdir()] if self.checkpoints.is_dir() else []
        done = max((int(name) for name in names if name.isdecimal()), default=0)
        there = has_weights(self._result)
        if not done and (there or self._record.get("finished")):
            found, begin = ("is", "begin with that result") if there else ("was", "do it again")
            raise CheckpointError(
                f"{self.directory}: the run in it has ended ({self._result.name}/ {found} its result), and there is no "
                f"checkpoint to go on from; a new run in another train.output_dir can {begin}"
            )
        if total_steps is not None and total_steps < done:
            raise CheckpointError(
                f"{self.directory}: {total_steps} steps are asked for, and {done} are done; "
                "raise train.steps or train.epochs, or choose another train.output_dir for a new run"
            )

    def before(self, key: str, now: Any) -> Any:
        """The value that a field of the configuration had at the start before. now: the one that it has."""
        return next((change.old for change in self._changes if change.key == key), now)

    @property
    def tokenizer_print(self) -> str | None:
        """The fingerprint of the tokenizer that the run began with; None: it has not begun, or none was noted."""
        return self._record.get("fingerprints", {}).get("tokenizer")

    @property
    def meta(self) -> dict[str, Any]:
        """What a checkpoint says about the run that it is of."""
        return {key: self._record.get(key) for key in ("jaxtune", "config", "fingerprints", "changes")}

    def finish(self) -> None:
        """The result is written: the same command has nothing to do from now on."""
        self._write(finished=True)

    def _write(self, **fields: Any) -> None:
        self._record = {"jaxtune": __version__, **self._record, "config": self._config.model_dump(), **fields}
        if self._lock is None:
            return
        with _told(self.directory):
            write_whole(self.directory / RECORD, json.dumps(self._record, indent=1, ensure_ascii=False))
            write_whole(self.directory / CONFIG, dump_config(self._config))


def result_directory(run_dir: Path, section: TuneSection) -> Path:
    """Where training with this method puts its result."""
    return run_dir / (ADAPTER if tune.has_adapter(section) else MODEL)


def has_weights(result: Path) -> bool:
    """Whether a run's result lies there, and not what somebody left of it."""
    return any(result.glob("*.safetensors"))


def open_run(config: Config) -> Run:
    """Take `train.output_dir` for a new run or to go on with its run, or say why not.

    Nothing that was there is written over: a directory with other things in it is refused, and one with a run
    is when `config` would alter its weights or data. What else was changed is printed.

    Raises:
        CheckpointError: the directory cannot be used; the message says what is there and what to do.
    """
    directory = expanded(config.train.output_dir)
    if not processes.is_first():
        return _follow(directory, config)
    run = _hold(directory, config)
    told = {"begun": run.begun, "finished": run.finished, "mark": (directory / LOCK).read_text(errors="replace")}
    processes.decided_by_first("directory", lambda: told)
    return run


def _follow(directory: Path, config: Config) -> Run:
    """The run that process 0 holds, as it sees it."""
    told = processes.decided_by_first("directory", dict)
    _require_shared(directory, told["mark"])
    run = Run(directory, config, {}, [], None)
    run.begun, run.finished = told["begun"], told["finished"]
    return run


def _require_shared(directory: Path, mark: str) -> None:
    """Refuse a directory that is not the one with process 0's `mark` in it."""
    end = time.monotonic() + SHARED_SECONDS
    while True:
        with contextlib.suppress(OSError):
            if (directory / LOCK).read_text(errors="replace") == mark:
                return
        if time.monotonic() > end:
            break
        time.sleep(0.5)
    raise CheckpointError(
        f"train.output_dir {directory.absolute()} on {socket.gethostname()} is not the directory that process 0 "
        f"({mark.strip()}) writes to; all processes need the same one, on storage that the machines share"
    )


def _hold(directory: Path, config: Config) -> Run:
    with _told(directory):
        _require_way(directory)
        _require_ours(directory)
        made = not directory.exists()
        directory.mkdir(parents=True, exist_ok=True)
        lock, is_locked = _take_lock(directory)
    made = made and is_locked
    try:
        with _told(directory):
            _require_ours(directory)
            return _open(directory, config, lock, made)
    except BaseException as error:
        _let_go(directory, lock, made and isinstance(error, UserError))
        raise


def _let_go(directory: Path, lock: int, unused: bool) -> None:
    """unused: of a run that was refused; if it had nothing to write yet but what it was to be, its directory goes."""
    with contextlib.suppress(OSError):
        if unused and {path.name for path in directory.iterdir()} <= OWN:
            for name in (*(OWN - {LOCK}), LOCK):  # the lock last: nobody else comes in before
                (directory / name).unlink(missing_ok=True)
            directory.rmdir()
    os.close(lock)


def _open(directory: Path, config: Config, lock: int, made: bool) -> Run:
    begun, record = _begun(directory), read_record(directory)
    if begun and config.checkpoint.resume == "never":
        raise CheckpointError(
            f"{directory}: there is a run in it, and checkpoint.resume is never; "
            "choose another train.output_dir, or set checkpoint.resume: auto to go on with it"
        )
    found = changes(_old_config(directory, record), config) if begun else []
    run = Run(directory, config, record if begun else {}, found, lock, made)
    moved = [change for change in found if _is_moved(change, record)]
    read = [change for change in found if not run.finished and _is_checked(change, record)]
    _refuse(directory, [change for change in found if change not in (*moved, *read)])
    if run._result.exists() and not run._result.is_dir():
        raise CheckpointError(
            f"{run._result}: is in the way of the run's result; move it away, or choose another train.output_dir"
        )
    if not run.finished:
        _require_access(directory)
        (peft_io.check_target if tune.has_adapter(config.tune) else hf_write.check_target)(run._result)
    if not begun or (run.finished and found and found == moved):  # so that whoever loads it finds the model
        run._write()
    _announce(run, found, moved, record)
    return run


def _is_moved(change: Change, record: dict[str, Any]) -> bool:
    """Whether the base model that the run began with lies in another place now."""
    told = record.get("fingerprints", {}).get("model")
    if change.key != "model.path" or told is None:
        return False
    place = expanded(change.new)
    return place.exists() and is_print_of(told, place)


def _is_checked(change: Change, record: dict[str, Any]) -> bool:
    """Whether training data is to be read in another place, of which `Run.check` sees that it holds the same."""
    keys = change.key.split(".")
    is_place = keys[0] == "data" and keys[-1] in ("path", "dataset_dir") and ABSENT not in (change.old, change.new)
    return is_place and "data" in record.get("fingerprints", {})


def _refuse(directory: Path, found: list[Change]) -> None:
    refused = [str(change) for change in found if change.rule == REFUSE]
    if refused:
        lines = "\n".join(f"  {line}" for line in refused)
        raise CheckpointError(
            f"{directory}: the run in it has another configuration:\n{lines}\n"
            "These would alter its weights or its data. Put them back to go on with it, or choose another "
            "train.output_dir for a new run."
        )


def _announce(run: Run, found: list[Change], moved: list[Change], record: dict[str, Any]) -> None:
    for change in moved:
        say(f"{change}: the same model")
    if run.finished:
        say(f"{run.directory}: this run is finished; raise train.steps or train.epochs to train for longer")
        return
    for change in (one for one in found if one not in moved):
        (warn if change.rule == LOG else say)(f"{change}")
    if run.begun:
        say(f"{run.directory}: going on with the run in it")
        if record.get("jaxtune") != __version__:
            warn(f"the run began under jaxtune {record.get('jaxtune')}; this is {__version__}")


def _old_config(directory: Path, record: dict[str, Any]) -> Config:
    return make_config(record.get("config", {}), str(directory / RECORD))


def read_record(directory: Path) -> dict[str, Any]:
    """What a run's directory says of it; nothing where there is no record.

    Raises:
        CheckpointError: it cannot be read, or is not as it was written.
    """
    path = directory / RECORD
    record = read_json(path, CheckpointError) if path.exists() else {}
    for name, (kinds, words) in KINDS.items():
        if name in record and not isinstance(record[name], kinds):
            raise CheckpointError(
                f'{path}: "{name}" is {type(record[name]).__name__}, expected {words}; bring the file back, or '
                "choose another train.output_dir"
            )
    return record


def _begun(directory: Path) -> bool:
    """Whether a step was taken in this directory."""
    for path in (directory / name for name in TRACES):
        if path.is_dir() and any(path.iterdir()):
            return True
        if path.is_file() and path.stat().st_size:
            return True
    return False


def _require_way(directory: Path) -> None:
    """Refuse a link to nowhere, in whose place no directory can be made."""
    for path in (directory, *directory.parents):
        if path.is_symlink() and not path.exists():
            raise CheckpointError(
                f"train.output_dir {directory}: {path} is a link to {os.readlink(path)}, which is not there; make that "
                "directory (is its disk mounted?), or choose another train.output_dir"
            )


def _require_ours(directory: Path) -> None:
    """Refuse a directory with something in it that is no run. Hidden files are nobody's business here."""
    if not directory.exists():
        return
    names = sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))
    if RECORD not in names and set(names) - (OWN - {CONFIG}):
        raise CheckpointError(
            f"{directory}: there are other things in it ({listing(names)}) and no {RECORD}; "
            "allowed: a new or empty directory, or that of a run; choose another train.output_dir"
        )


def _require_access(directory: Path) -> None:
    """Refuse what would be refused only after the model is read and the step compiled."""
    for path in (directory, directory / CHECKPOINTS, directory / LEDGER):
        if path.exists() and not os.access(path, os.R_OK | os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def _take_lock(directory: Path) -> tuple[int, bool]:
    """A file handle that holds the directory until it is closed or the process is dead; False: it cannot, without
    locks."""
    handle = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    locked = try_lock(handle)
    if locked is None:
        warn(f"{directory}: this file system has no locks; never start two runs in this directory")
        return handle, False
    if not locked or not is_at(handle, directory / LOCK):
        holder = os.pread(handle, 200, 0).decode(errors="replace").strip()
        os.close(handle)
        raise CheckpointError(
            f"{directory}: another process trains in it ({holder or 'it has not said which'}); "
            "wait for it or stop it, or choose another train.output_dir"
        )
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    os.fsync(handle)  # other machines shall see it
    return handle, True


@contextlib.contextmanager
def _told(directory: Path):
    try:
        yield
    except OSError as error:
        told = f"train.output_dir {directory}: cannot be used: {error.filename or directory}: {error.strerror}"
        if is_disks(error):
            raise SaveError(f"{told}; make room, or mend the disk, then run the same command again") from None
        raise CheckpointError(f"{told}; choose a directory that you may write to") from None


def _paths(config: Config) -> list[str]:
    return [path for part in config.data.parts for path in part.paths]
