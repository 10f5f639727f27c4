"""Pipeline schedules as tables: what each stage does in each tick, and in which buffer slot its input lies.

Plain numpy; nothing here runs a model. Legend: S stages, V chunks on each stage, C = S * V chunks of the model,
M micro-batches, T ticks; chunk c = v * S + s lies on stage s. In a tick a stage runs one forward, then one backward,
then (zero_bubble) one weight gradient; then outputs go to stage s + 1 and input gradients to stage s - 1, mod S.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from jaxtune.errors import MeshError, nearest

IDLE = -1
FORWARD_COST, BACKWARD_COST = 1.0, 2.0  # of a stage's share of one micro-batch, V chunks together


@dataclass(frozen=True)
class Schedule:
    """Tables of int32 [T, S]; -1: nothing.

    `f_*`, `b_*`, `w_*`: micro-batch and chunk of the forward, the backward and the weight gradient. Slots of the
    buffer of stage inputs: what arrives at the end of tick t goes into `recv_f_slot[t]`, its forward reads it from
    `f_slot` and its backward (then its weight gradient) from `b_slot` (`w_slot`); chunk 0 has none, for its input is
    the embedding of the micro-batch. Slots of the buffer of output gradients: `recv_b_slot`, `b_grad_slot`,
    `w_grad_slot`; the last chunk has none, for its gradient is that of the loss.
    """

    name: str
    stages: int
    virtual: int
    micro_batches: int
    f_micro: np.ndarray
    f_chunk: np.ndarray
    f_slot: np.ndarray
    b_micro: np.ndarray
    b_chunk: np.ndarray
    b_slot: np.ndarray
    b_grad_slot: np.ndarray
    w_micro: np.ndarray
    w_chunk: np.ndarray
    w_slot: np.ndarray
    w_grad_slot: np.ndarray
    recv_f_slot: np.ndarray
    recv_b_slot: np.ndarray

    @property
    def ticks(self) -> int:
        """T."""
        return len(self.f_micro)

    @property
    def splits_backward(self) -> bool:
        """A backward gives the input's gradient alone, and the weights' comes later."""
        return bool((self.w_micro >= 0).any())

    @property
    def num_slots(self) -> int:
        """Stage inputs that the stage with most of them keeps at once."""
        return 1 + int(max(self.recv_f_slot.max(), IDLE))

    @property
    def num_grad_slots(self) -> int:
        """Output gradients that the stage with most of them keeps at once."""
        return 1 + int(max(self.recv_b_slot.max(), IDLE))


@dataclass(frozen=True)
class Ticks:
    """When each chunk meets each micro-batch: [C, M] each; weight: None where the backward does both."""

    forward: np.ndarray
    backward: np.ndarray
    weight: np.ndarray | None = None

    @property
    def last_use(self) -> np.ndarray:
        """The tick after which a chunk's input and output gradient are not needed again."""
        return self.backward if self.weight is None else self.weight


def make_schedule(name: str, stages: int, micro_batches: int, virtual: int = 1) -> Schedule:
    """The table of a schedule.

    name: gpipe (Huang et al. 2018), 1f1b (Narayanan et al. 2019), interleaved (Narayanan et al. 2021; `virtual`
    chunks on each stage), zero_bubble (the order of ZB-H1, Qi et al. 2023).

    Raises:
        MeshError: an unknown name, or numbers that the schedule cannot be made for.
    """
    check_numbers(name, stages, micro_batches, virtual)
    return _tabulate(name, stages, virtual, SCHEDULES[name](stages, virtual, micro_batches))


def check_numbers(name: str, stages: int, micro_batches: int, virtual: int) -> None:
    """Refuse what make_schedule would."""
    if name not in SCHEDULES:
        raise MeshError(f"mesh.schedule {name}: allowed: {', '.join(SCHEDULES)}{nearest(name, SCHEDULES)}")
    for what, number in (("stages", stages), ("micro-batches", micro_batches), ("virtual stages", virtual)):
        if number < 1:
            raise MeshError(f"mesh.schedule {name}: {number} {what}; at least 1 is needed")
    if name != "interleaved":
        if virtual > 1:
            raise MeshError(f"mesh.virtual_stages {virtual}: {name} has one chunk on each stage; use interleaved")
        return
    if virtual == 1:
        raise MeshError("mesh.schedule interleaved: mesh.virtual_stages must be 2 or more; with 1 it is 1f1b")
    if micro_batches % stages:
        below = micro_batches // stages * stages
        near = f"{below} or {below + stages}" if below else f"{stages}"
        raise MeshError(
            f"mesh.schedule interleaved: train.micro_batches {micro_batches} is not a multiple of mesh.pipe {stages}; "
            f"{near} would do"
        )


def _gpipe(S: int, V: int, M: int) -> Ticks:
    """All forwards, then all backwards."""
    stage, micro = np.arange(S)[:, None], np.arange(M)
    forward = stage + micro
    return Ticks(forward, (M + S - 1) + (S - 1 - stage) + micro)


def _one_forward_one_backward(S: int, V: int, M: int) -> Ticks:
    """Each stage goes through rounds of S micro-batches, chunk after chunk; a backward follows as soon as it can."""
    v, stage = np.divmod(np.arange(S * V)[:, None], S)
    rounds, rest = np.divmod(np.arange(M), S)
    forward = stage + rounds * S * V + v * S + rest
    backward = (V - 1) * S + 2 * (S - 1) - stage + rounds * S * V + (V - 1 - v) * S + rest
    return Ticks(forward, backward)


def _zero_bubble(S: int, V: int, M: int) -> Ticks:
    """1f1b, with weight gradients where a stage would wait, then where all stages have one, and the rest at the end.

    A tick takes as long as its busiest stage (forward, backward and weight gradient cost 1 each), so a weight
    gradient is free on a stage that does less than that, and costs 1 for all stages together elsewhere. From
    2 (S - 1) micro-batches on that is a step of 3 M + S - 1, as ZB-H1's, where 1f1b has 3 M + 3 (S - 1).
    It is no gain where the weight gradient computes the forward and the backward a second time.
    """
    ticks = _one_forward_one_backward(S, V, M)
    done: np.ndarray = np.zeros(S, int)
    weight: np.ndarray = np.zeros((S, M), int)
    tick = 0
    while (done < M).any():
        waiting = (ticks.backward <= tick).sum(1) - done > 0
        work = (ticks.forward == tick).sum(1) + (ticks.backward == tick).sum(1)
        if not (waiting & (work == work.max())).all():
            waiting &= work < max(work.max(), 1)
        weight[waiting, done[waiting]] = tick
        done += waiting
        tick += 1
    return Ticks(ticks.forward, ticks.backward, weight)


SCHEDULES: dict[str, Callable[[int, int, int], Ticks]] = {
    "1f1b": _one_forward_one_backward,
    "gpipe": _gpipe,
    "interleaved": _one_forward_one_backward,
    "zero_bubble": _zero_bubble,
}


def _tabulate(name: str, S: int, V: int, ticks: Ticks) -> Schedule:
    C, M = ticks.forward.shape
    T = 1 + int(ticks.last_use.max())
    stage: np.ndarray = np.arange(C) % S
    chunk, micro = np.broadcast_to(np.arange(C)[:, None], (C, M)), np.broadcast_to(np.arange(M), (C, M))
    inputs = _slots(ticks.forward[:-1], ticks.last_use[1:], stage[1:])
    grads = _slots(ticks.backward[1:], ticks.last_use[:-1], stage[:-1])
    none = np.full((1, M), IDLE)
    saved, incoming = np.concatenate([none, inputs]), np.concatenate([grads, none])

    def table(when: np.ndarray | None, values: np.ndarray, where: np.ndarray = stage) -> np.ndarray:
        out: np.ndarray = np.full((T, S), IDLE, np.int32)
        if when is not None:
            out[when, where[:, None]] = values
        return out

    return Schedule(
        name,
        S,
        V,
        M,
        f_micro=table(ticks.forward, micro),
        f_chunk=table(ticks.forward, chunk),
        f_slot=table(ticks.forward, saved),
        b_micro=table(ticks.backward, micro),
        b_chunk=table(ticks.backward, chunk),
        b_slot=table(ticks.backward, saved),
        b_grad_slot=table(ticks.backward, incoming),
        w_micro=table(ticks.weight, micro),
        w_chunk=table(ticks.weight, chunk),
        w_slot=table(ticks.weight, saved),
        w_grad_slot=table(ticks.weight, incoming),
        recv_f_slot=table(ticks.forward[:-1], inputs, stage[1:]),
        recv_b_slot=table(ticks.backward[1:], grads, stage[:-1]),
    )


def _slots(arrival: np.ndarray, last_use: np.ndarray, stage: np.ndarray) -> np.ndarray:
    """Slots [chunks, M] for arrays that arrive at the end of a tick and are last read within another.

    The lowest free slot in order of arrival: the fewest slots that intervals can do with. An array may take the
    slot of one that is read for the last time in the tick at whose end it arrives.
    """
    slots = np.full(arrival.shape, IDLE)
    free_from: dict[int, list[int]] = {}
    for index in np.argsort(arrival, axis=None, kind="stable"):
        c, m = np.unravel_index(index, arrival.shape)
        ends = free_from.setdefault(int(stage[c]), [])
        slot = next((slot for slot, end in enumerate(ends) if end <= arrival[c, m]), len(ends))
        ends[slot : slot + 1] = [int(last_use[c, m])]
        slots[c, m] = slot
    return slots


def costs(schedule: Schedule, forward: float, backward: float, weight: float = 0.0) -> np.ndarray:
    """What each tick takes [T]: as long as its busiest stage, for all meet at its end.

    forward, backward, weight: of a stage's share of one micro-batch, V chunks together.
    """
    work = forward * (schedule.f_micro >= 0) + backward * (schedule.b_micro >= 0) + weight * (schedule.w_micro >= 0)
    return work.max(axis=1) / schedule.virtual


def bubble(schedule: Schedule, forward: float = FORWARD_COST, backward: float = BACKWARD_COST) -> float:
    """The share of a step in which a stage waits, 0 to 1.

    backward: of both gradients together; a schedule that splits it is taken to do half of it each time.
    """
    split = schedule.splits_backward
    parts = (backward / 2, backward / 2) if split else (backward, 0.0)
    busy = schedule.micro_batches * (forward + backward)
    return float(1 - busy / costs(schedule, forward, *parts).sum())


def picture(schedule: Schedule) -> str:
    """Ticks from top to bottom, stages from left to right: `F3` the forward of micro-batch 3, `B3` its backward,
    `W3` its weight gradient, with a letter for the chunk on the stage where there are several."""
    tables = [("F", schedule.f_micro, schedule.f_chunk), ("B", schedule.b_micro, schedule.b_chunk)]
    tables += [("W", schedule.w_micro, schedule.w_chunk)] if schedule.splits_backward else []
    columns = [[f"stage {s}" for s in range(schedule.stages)]]
    columns += [[_cell(schedule, tables, t, s) for s in range(schedule.stages)] for t in range(schedule.ticks)]
    width = max(len(cell) for row in columns for cell in row)
    lines = [
        " | ".join([label.rjust(4), *(cell.ljust(width) for cell in row)]).rstrip()
        for label, row in zip(["tick", *map(str, range(schedule.ticks))], columns)
    ]
    return "\n".join([*lines, _summary(schedule)])


def _cell(schedule: Schedule, tables: list[tuple[str, np.ndarray, np.ndarray]], tick: int, stage: int) -> str:
    width = 1 + len(str(schedule.micro_batches - 1)) + (schedule.virtual > 1)
    words = []
    for letter, micro, chunk in tables:
        m, v = int(micro[tick, stage]), int(chunk[tick, stage]) // schedule.stages
        word = "" if m < 0 else f"{letter}{m}" + (chr(ord("a") + v) if schedule.virtual > 1 else "")
        words.append(word.ljust(width))
    return " ".join(words)


def _summary(schedule: Schedule) -> str:
    chunks = f" of {schedule.virtual} chunks" if schedule.virtual > 1 else ""
    return (
        f"{schedule.name}: {schedule.stages} stages{chunks}, {schedule.micro_batches} micro-batches: bubble "
        f"{bubble(schedule):.1%}; kept at once: stage inputs {schedule.num_slots}, output gradients "
        f"{schedule.num_grad_slots}"
    )
