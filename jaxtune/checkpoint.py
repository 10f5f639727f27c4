"""What a kill cannot take: training state on disk, saved while training goes on, and found again whole.

checkpoints/
  200/state/         the arrays, written by Orbax under their paths
  200/meta.json      what the run was (the caller's; not read here)
  200/manifest.json  every file's size and SHA-256, every array's shape and type; written last
  300.saving/        a save under way: it becomes 300 by one rename, after its manifest is on disk
  100.deleting/      an old one on its way out

Of several processes each writes its own shards, and the first does the rest, when all have written.

Nothing is deleted before a newer checkpoint is complete. No Python class is stored: a state is any pytree, and
comes back in the structure that the reader gives. Where arrays of a state lie is the reader's choice too.
"""

import contextlib
import json
import logging
import math
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from jaxtune import processes
from jaxtune.console import warn
from jaxtune.errors import CheckpointError, SaveError, UserError, listing
from jaxtune.files import read_json
from jaxtune.manifest import damages, read_manifest, sync, write_manifest
from jaxtune.models.weights import Tree, set_path

STATE, META = "state", "meta.json"
SAVING, DELETING = ".saving", ".deleting"
SAVE_SECONDS = 6 * 3600  # the longest that one save may take
Arrays = dict[str, Any]  # path, joined by "/" -> array

# What goes wrong inside Orbax is raised here with the path in it; its own report is a traceback in the log.
logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)
_report_unraisable = sys.unraisablehook


def _without_late_writes(unraisable: Any) -> None:
    """The other writes of a save that failed end when nobody waits for them any more, each with a traceback."""
    if "tensorstore" in sys.modules and str(unraisable.exc_value) == "Event loop is closed":
        return
    _report_unraisable(unraisable)


sys.unraisablehook = _without_late_writes


class Checkpointer:
    """The checkpoints of a live run: the one writer of its directory.

    directory: made when needed; every: steps between saves; keep: how many to keep, at least 2. Call
    `check_errors` at each step, and `close` at the end whatever happens, from the thread that saves.
    """

    def __init__(self, directory: Path, every: int, keep: int):
        if keep < 2:
            raise ValueError("keep at least 2 checkpoints: with 1, a damaged one leaves none")
        self.directory, self.every, self.keep = Path(directory).absolute(), every, keep
        self._orbax = _orbax()
        self._thread: threading.Thread | None = None
        self._error: SaveError | None = None
        self._damaged: set[int] = set()
        if processes.is_first():
            _clean(self.directory)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        alone = processes.count() == 1
        if alone or kind is None or issubclass(kind, (SystemExit, UserError)):
            self.close()  # else what the save under way waits for may never come

    def due(self, step: int) -> bool:
        """Whether the configuration asks for a save after this step."""
        return step % self.every == 0

    def preflight(self, state: Any) -> None:
        """Whether the disk has room for all the checkpoints that will lie there at once.

        Raises:
            CheckpointError: it has not; the message says how much is needed and how much is free.
        """
        if not processes.is_first():
            return
        missing = max(self.keep + 1 - len(saved_steps(self.directory)), 1)
        try:
            _require_space(self.directory, missing * state_bytes(state))
        except OSError as error:
            raise CheckpointError(f"{self.directory}: no room for {missing} checkpoints: {error}") from None

    def save(self, step: int, state: Any, meta: dict[str, Any], wait: bool = False) -> None:
        """Begin to save `state` as `step`; the caller may give its arrays away as soon as this returns.

        state: any pytree of arrays (a None is nothing); meta: JSON. The save before is waited for first. A step
        that is already there and whole is left as it is: a run that goes on from it has nothing new to save.

        Raises:
            SaveError: this save could not begin, or the one before, or with `wait` this one, failed.
        """
        self.wait()
        if processes.decided_by_first("save", lambda: self._has(step)):
            return
        arrays = by_path(state)
        home = self.directory / f"{step}{SAVING}"
        with self._reported(step, home):
            if processes.is_first():
                _require_space(self.directory, _size(arrays))
                shutil.rmtree(home, ignore_errors=True)
                home.mkdir(parents=True)
            self._orbax.save(home / STATE, args=ocp.args.PyTreeSave(_nested(_own(arrays))))
        self.check_errors()
        shapes = {path: [array.dtype.name, *array.shape] for path, array in arrays.items()}
        text = json.dumps(meta, indent=1, ensure_ascii=False)
        self._thread = threading.Thread(target=self._finish, args=(step, home, shapes, text), name="checkpoint")
        self._thread.start()
        if wait:
            self.wait()

    def _has(self, step: int) -> bool:
        there = step in saved_steps(self.directory) and step not in self._damaged
        return there and not problems(self.directory, step, read=False)

    def _finish(self, step: int, home: Path, shapes: dict[str, list], meta: str) -> None:
        with self._reported(step, home):
            self._orbax.wait_until_finished()  # all processes' shards
            if processes.is_first():
                (home / META).write_text(meta, encoding="utf-8")
                write_manifest(home, step, shapes)
                self._commit(step, home)
            processes.barrier("saved", SAVE_SECONDS)

    def _commit(self, step: int, home: Path) -> None:
        final = self.directory / str(step)
        if final.exists():
            _remove(final)
        home.rename(final)
        sync(self.directory)
        self._damaged.discard(step)
        if wrong := problems(self.directory, step, read=False):
            raise OSError(listing(wrong))
        self._prune(step)

    def _prune(self, newest: int) -> None:
        """Delete what is older than the newest `keep` whole ones."""
        steps = [step for step in saved_steps(self.directory) if step <= newest]
        whole = [s for s in steps if s not in self._damaged and not problems(self.directory, s, read=False)]
        for step in sorted(set(steps) - set(whole[-self.keep :])):
            try:
                _remove(self.directory / str(step))
            except OSError as error:
                warn(f"{self.directory / str(step)}: this old checkpoint could not be deleted: {error.strerror}")

    @contextlib.contextmanager
    def _reported(self, step: int, home: Path) -> Iterator[None]:
        """Keep what goes wrong for `check_errors`, and give its space on the disk back."""
        try:
            yield
        except Exception as error:
            if processes.is_first():
                shutil.rmtree(home, ignore_errors=True)
            whole = [s for s in saved_steps(self.directory) if s not in self._damaged]
            last = f"the last checkpoint is step {whole[-1]}" if whole else "there is no checkpoint yet"
            self._error = SaveError(
                f"{self.directory / str(step)}: this checkpoint could not be saved: {_reason(error)}; {last}; "
                "make room or make the directory writable, then run the same command again"
            )
            self._error.__cause__ = error

    def check_errors(self) -> None:
        """Raise the SaveError of a save that failed in the background, once."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Until the save under way is on disk.

        Raises:
            SaveError: it failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check_errors()

    def close(self) -> None:
        """Wait, and let go of threads. A process that ends without this may lose the save under way."""
        try:
            self.wait()
        finally:
            self._orbax.close()
            if processes.is_first():
                _clean(self.directory)  # a save that failed may have gone on writing

    def latest_valid(self) -> int | None:
        """The newest step whose files are all as they were written; see the function of the same name."""
        return processes.decided_by_first("step", self._search)

    def _search(self) -> int | None:
        step, self._damaged = _search(self.directory)
        return step

    def arrays(self, step: int) -> dict[str, list]:
        """What a step that `latest_valid` gave has; see the function of the same name.

        Raises:
            CheckpointError: this process does not see what process 0 sees.
        """
        if not processes.is_first() and (wrong := problems(self.directory, step, read=False)):
            raise CheckpointError(
                f"{self.directory / str(step)}: process 0 sees this checkpoint whole, and this machine does not: "
                f"{listing(wrong, 3)}; the run directory must be on storage that the machines share"
            )
        return arrays(self.directory, step)

    def restore(self, step: int, abstract: Any) -> Any:
        """The state of a step that `latest_valid` gave; see `restore`.

        Raises:
            CheckpointError: what is there is of another model, or this process does not see what process 0 sees.
        """
        self.arrays(step)
        return _restore(self._orbax, self.directory, step, abstract, partial=False)


def saved_steps(directory: Path) -> list[int]:
    """The steps that have a checkpoint, whole or damaged, in order.

    Raises:
        CheckpointError: the directory cannot be read.
    """
    if not Path(directory).is_dir():
        return []
    try:
        return sorted(int(path.name) for path in Path(directory).iterdir() if path.name.isdecimal() and path.is_dir())
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror}") from None


def latest_valid(directory: Path) -> int | None:
    """The newest step in `directory` whose files are all as they were written; None when there never was one.

    Every damaged one that is passed over is said aloud.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    return _search(Path(directory))[0]


def _search(directory: Path) -> tuple[int | None, set[int]]:
    damaged: dict[int, str] = {}
    for step in reversed(saved_steps(directory)):
        wrong = problems(directory, step)
        if not wrong:
            if damaged:
                warn(f"going back to the checkpoint of step {step}")
            return step, set(damaged)
        if step not in saved_steps(directory):
            continue  # a live run has deleted it meanwhile
        damaged[step] = f"{directory / str(step)}: this checkpoint is damaged: {listing(wrong, 3)}"
        warn(damaged[step])
    if damaged:
        raise CheckpointError(
            f"{directory}: every checkpoint is damaged (steps {listing(map(str, damaged))}); "
            "bring back their files, or choose another train.output_dir to begin at step 1"
        )
    return None, set()


def problems(directory: Path, step: int, read: bool = True) -> list[str]:
    """What is not as it was written in the checkpoint of `step`; with read=False, by the files' sizes alone."""
    return damages(Path(directory) / str(step), step, read)


def read_meta(directory: Path, step: int) -> dict[str, Any]:
    """What the run said about itself when it saved `step`."""
    return read_json(Path(directory) / str(step) / META, CheckpointError)


def arrays(directory: Path, step: int) -> dict[str, list]:
    """Path -> [type, *shape] of every array saved as `step`."""
    return read_manifest(Path(directory) / str(step))["arrays"]


def restore(directory: Path, step: int, abstract: Any, partial: bool = False) -> Any:
    """The arrays saved as `step`, bit for bit, in the structure and at the places of `abstract`.

    abstract: a pytree of jax.ShapeDtypeStruct, on the mesh that its shardings name, whatever mesh it was saved
    from; without sharding, on the first device. partial: `abstract` may leave out arrays that were saved.

    Raises:
        CheckpointError: a file is not as it was written; or arrays are missing, left over, or of another shape
            or type: the message names them.
    """
    if wrong := problems(directory, step):
        raise CheckpointError(f"{Path(directory) / str(step)}: this checkpoint is damaged: {listing(wrong, 3)}")
    with contextlib.closing(_orbax()) as orbax:
        return _restore(orbax, Path(directory), step, abstract, partial)


def _restore(orbax: ocp.AsyncCheckpointer, directory: Path, step: int, abstract: Any, partial: bool) -> Any:
    home = directory.absolute() / str(step)
    wanted = {path: _placed(array) for path, array in by_path(abstract).items()}
    _require_same(home, read_manifest(home)["arrays"], wanted, partial)
    tree = _nested(wanted)
    args = ocp.args.PyTreeRestore(tree, ocp.checkpoint_utils.construct_restore_args(tree), partial_restore=True)
    try:
        arrays = by_path(orbax.restore(home / STATE, args=args))
    except Exception as error:
        raise CheckpointError(f"{home}: this checkpoint cannot be read: {_reason(error)}") from error
    return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[path] for path in wanted])


def _require_same(home: Path, saved: dict[str, list], wanted: Arrays, partial: bool) -> None:
    found = {path: [array.dtype.name, *array.shape] for path, array in wanted.items()}
    lines = [f"{path}: not in the checkpoint" for path in found if path not in saved]
    if not partial:
        lines += [f"{path}: in the checkpoint alone" for path in saved if path not in found]
    both = [path for path in found if path in saved and saved[path] != found[path]]
    lines += [f"{path}: saved as {_shape(saved[path])}, now {_shape(found[path])}" for path in both]
    if lines:
        raise CheckpointError(f"{home}: this checkpoint is of another model or tuning method: {listing(lines)}")


def _shape(entry: list) -> str:
    return f"{entry[0]}{entry[1:]}"


def _placed(array: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(array, "sharding", None) or SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def _orbax() -> ocp.AsyncCheckpointer:
    options = ocp.options.AsyncOptions(timeout_secs=SAVE_SECONDS)
    return ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(), async_options=options)


def by_path(tree: Any) -> Arrays:
    """The arrays of a pytree, or what stands for them, by the paths that a checkpoint has them under."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def state_bytes(state: Any) -> int:
    """Of a checkpoint of this state (arrays or their shapes), before Orbax compresses it."""
    return _size(by_path(state))


def _size(arrays: Arrays) -> int:
    return sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays.values())


def _nested(arrays: Arrays) -> Tree:
    tree: Tree = {}
    for path, array in arrays.items():
        set_path(tree, tuple(path.split("/")), array)
    return tree


def _own(arrays: Arrays) -> Arrays:
    """Copies that nobody else can overwrite.

    Orbax copies from a device to the host before `save` returns, but on a CPU it takes a view of the very
    buffers that are given to the next step. jax 0.10 then has that step write elsewhere, which takes the same
    memory as a copy and is promised nowhere.
    """
    held = {path: array for path, array in arrays.items() if isinstance(array, jax.Array)}
    if not any(device.platform == "cpu" for array in held.values() for device in array.devices()):
        return arrays
    return {**arrays, **_copy(held)}


@jax.jit
def _copy(arrays: Arrays) -> Arrays:
    return jax.tree.map(jnp.copy, arrays)


def _require_space(directory: Path, size: int) -> None:
    place = next(path for path in (directory, *directory.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if size > free:
        needed = math.ceil(size / 1e6)  # up, and what is free down: they never read the same
        raise OSError(f"{needed} MB are needed, and {free // 10**6} MB are free on the disk")


def _remove(home: Path) -> None:
    """Delete a checkpoint; one that is half gone never looks like one that is there."""
    doomed = home.with_name(home.name + DELETING)
    shutil.rmtree(doomed, ignore_errors=True)
    home.rename(doomed)
    shutil.rmtree(doomed)


def _clean(directory: Path) -> None:
    """Remove what saves and deletions that were cut off have left."""
    if directory.is_dir():
        for path in directory.iterdir():
            name, dot, ending = path.name.rpartition(".")
            if name.isdecimal() and dot + ending in (SAVING, DELETING):
                shutil.rmtree(path, ignore_errors=True)


def _reason(error: Exception) -> str:
    """The first line of what went wrong, without the source locations that tensorstore adds."""
    text = str(error.strerror or error) if isinstance(error, OSError) else str(error)
    return text.strip().splitlines()[0].split(" [source locations")[0] if text.strip() else type(error).__name__
