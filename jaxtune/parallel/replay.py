"""A schedule's table replayed tick by tick, with every rule asserted. It shares nothing with what made the table."""

from collections.abc import Iterator

from jaxtune.parallel.schedule import Schedule

Work = tuple[int, int]  # chunk, micro-batch
Buffers = list[dict[int, Work]]  # of each stage: what lies in which slot, while it is needed


def check(schedule: Schedule) -> None:
    """Replay a table.

    Raises:
        AssertionError: an input or a gradient is not where the table says, a slot is overwritten while it is needed,
            or a chunk does not meet every micro-batch exactly once.
    """
    S = schedule.stages
    saved: Buffers = [{} for _ in range(S)]
    grads: Buffers = [{} for _ in range(S)]
    done: dict[str, set[Work]] = {"f": set(), "b": set(), "w": set()}
    for tick in range(schedule.ticks):
        for stage in range(S):
            _forward(schedule, tick, stage, saved[stage], done)
            _backward(schedule, tick, stage, saved[stage], grads[stage], done)
            _weight(schedule, tick, stage, saved[stage], grads[stage], done)
        for stage in range(S):
            _receive(schedule, tick, stage, saved[stage], grads[stage])
    chunks = range(S * schedule.virtual)
    everything = {(chunk, micro) for chunk in chunks for micro in range(schedule.micro_batches)}
    assert done["f"] == everything, f"no forward: {sorted(everything - done['f'])}"
    assert done["b"] == everything, f"no backward: {sorted(everything - done['b'])}"
    assert done["w"] in (set(), everything), f"no weight gradient: {sorted(everything - done['w'])}"
    assert not any(saved) and not any(grads), "something was received that is never used"


def _work(schedule: Schedule, kind: str, tick: int, stage: int) -> Work | None:
    micro, chunk = (int(getattr(schedule, f"{kind}_{what}")[tick, stage]) for what in ("micro", "chunk"))
    if micro < 0 or chunk < 0:
        assert micro == chunk == -1, f"tick {tick}, stage {stage}: half of an entry"
        return None
    assert chunk % schedule.stages == stage, f"tick {tick}: chunk {chunk} does not lie on stage {stage}"
    return chunk, micro


def _once(kind: str, work: Work, done: dict[str, set[Work]]) -> None:
    assert work not in done[kind], f"{kind}{work} runs twice"
    done[kind].add(work)


def _read(buffer: dict[int, Work], slot: int, work: Work, absent: bool, where: str) -> None:
    if absent:
        assert slot == -1, f"{where}: {work} takes nothing from a slot, found {slot}"
    else:
        assert buffer.get(slot) == work, f"{where}: slot {slot} holds {buffer.get(slot)}, not {work}"


def _forward(schedule: Schedule, tick: int, stage: int, saved: dict, done: dict) -> None:
    work = _work(schedule, "f", tick, stage)
    if work is None:
        return
    _read(saved, int(schedule.f_slot[tick, stage]), work, work[0] == 0, f"forward, tick {tick}, stage {stage}")
    _once("f", work, done)


def _backward(schedule: Schedule, tick: int, stage: int, saved: dict, grads: dict, done: dict) -> None:
    work = _work(schedule, "b", tick, stage)
    if work is None:
        return
    assert work in done["f"], f"tick {tick}: backward of {work} before its forward"
    split = bool((schedule.w_micro >= 0).any())
    _use(schedule, "b", tick, stage, work, saved, grads, last=not split)
    _once("b", work, done)


def _weight(schedule: Schedule, tick: int, stage: int, saved: dict, grads: dict, done: dict) -> None:
    work = _work(schedule, "w", tick, stage)
    if work is None:
        return
    assert work in done["b"], f"tick {tick}: weight gradient of {work} before its backward"
    _use(schedule, "w", tick, stage, work, saved, grads, last=True)
    _once("w", work, done)


def _use(
    schedule: Schedule, kind: str, tick: int, stage: int, work: Work, saved: dict, grads: dict, last: bool
) -> None:
    """A backward or a weight gradient reads its input and its output gradient; the last of them frees both."""
    where = f"{kind}, tick {tick}, stage {stage}"
    slot = int(getattr(schedule, f"{kind}_slot")[tick, stage])
    grad_slot = int(getattr(schedule, f"{kind}_grad_slot")[tick, stage])
    _read(saved, slot, work, work[0] == 0, where)
    _read(grads, grad_slot, work, work[0] == schedule.stages * schedule.virtual - 1, where)
    if last:
        saved.pop(slot, None)
        grads.pop(grad_slot, None)


def _arrivals(schedule: Schedule, tick: int, stage: int) -> Iterator[tuple[str, Work | None]]:
    """What the neighbours send at the end of a tick: an output from below, an input gradient from above."""
    S = schedule.stages
    below, above = _work(schedule, "f", tick, (stage - 1) % S), _work(schedule, "b", tick, (stage + 1) % S)
    wanted = below is not None and below[0] + 1 < S * schedule.virtual
    yield "f", (below[0] + 1, below[1]) if below and wanted else None
    yield "b", (above[0] - 1, above[1]) if above and above[0] else None


def _receive(schedule: Schedule, tick: int, stage: int, saved: dict, grads: dict) -> None:
    buffers = {"f": (saved, schedule.num_slots), "b": (grads, schedule.num_grad_slots)}
    for kind, work in _arrivals(schedule, tick, stage):
        buffer, size = buffers[kind]
        slot = int(getattr(schedule, f"recv_{kind}_slot")[tick, stage])
        where = f"arrival, tick {tick}, stage {stage}"
        assert (slot >= 0) == (work is not None), f"{where}: slot {slot} for {work}"
        if work is not None:
            assert slot < size and slot not in buffer, f"{where}: slot {slot} still holds {buffer.get(slot)}"
            buffer[slot] = work
