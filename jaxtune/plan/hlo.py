"""What a compiled program sends between devices, read from its HLO text: what, how much, how often, along which axes.

The text is that of `compiled.as_text()`, on CPU, GPU or TPU. Only collectives, loops and calls are looked at.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
BITS = {"pred": 8, "token": 0, "opaque": 0}  # others have their number of bits in the name
_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*)$")
_SHAPE = re.compile(r"\b([a-z]\w*?)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(calls|to_apply|body|condition|branch_computations|called_computations|\w+_computation)=([^,{]+|\{[^}]*\})"
)
_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_AXES = re.compile(r"mesh\[([^\]]*)\](?:, device_ids=\((?:\[([\d,]+)\](?:T\(([\d,]+)\))?|([\d,]+))\))? \{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\s*\{"n":\s*"(\d+)"')


@dataclass(frozen=True)
class Collective:
    """One kind of transfer of a program, the same ones together.

    bytes: of one device's buffer, as NCCL counts: of an all-gather the whole result, of a reduce-scatter the whole
    operand. times: in one run of the program. axes: of the mesh; empty: groups that no set of axes gives.
    at_most: it stands under a condition, or in a loop whose length the data decide.
    """

    kind: str
    dtype: str
    bytes: int
    devices: int  # that exchange with each other
    axes: tuple[str, ...]
    times: int
    at_most: bool = False

    @property
    def sent(self) -> int:
        """Bytes that one device sends in a run, by the ring algorithms."""
        share = (self.devices - 1) / self.devices
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0, "collective-broadcast": 1.0}
        return round(self.times * self.bytes * factor.get(self.kind, share))


@dataclass(frozen=True)
class Instruction:
    """One line: `name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    @cached_property
    def called(self) -> dict[str, list[str]]:
        """Attribute -> the computations that it names."""
        return {key: re.findall(r"[\w.-]+", names) for key, names in _CALLED.findall(self.attributes)}


Computations = dict[str, list[Instruction]]


def collectives(
    text: str, mesh: dict[str, int], loop_trips: int = 1, shares: tuple[float, ...] = ()
) -> list[Collective]:
    """The transfers of a compiled program, most bytes first.

    mesh: axis -> size, in the order of the mesh. loop_trips: how often a loop runs whose length the data decide.
    shares: how often an outermost condition takes its dearest branch, 0 to 1, and one right in it; others are counted
    as if they always did.
    """
    computations, entry = parse(text)
    found: dict[Collective, float] = {}
    for transfer, times in _Walk(computations, mesh, loop_trips).below(entry, _Run(1.0, shares)):
        found[transfer] = found.get(transfer, 0.0) + times
    return sorted((replace(one, times=round(times)) for one, times in found.items()), key=lambda one: -one.sent)


@dataclass(frozen=True)
class _Run:
    """How often a computation runs; shares: how often a condition right in it holds, and one in that."""

    times: float
    shares: tuple[float, ...] = ()
    is_conditional: bool = False
    at_most: bool = False

    def branch(self) -> "_Run":
        share, rest = (self.shares[0], self.shares[1:]) if self.shares else (1.0, ())
        return _Run(self.times * share, rest, True, self.at_most or not self.shares)

    def loop(self, trips: int | None, otherwise: int) -> "_Run":
        shares = () if self.is_conditional else self.shares
        times = self.times * (otherwise if trips is None else trips)
        return _Run(times, shares, self.is_conditional, self.at_most or trips is None)


def parse(text: str) -> tuple[Computations, str]:
    """(the instructions of each computation, the name of the entry)."""
    computations: Computations = {}
    entry, current = "", []
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[1], [])
            entry = header[1] if line.startswith("ENTRY") else entry
        elif match := _INSTRUCTION.match(line):
            current.append(_instruction(match[1], match[2]))
    return computations, entry


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    operands = tuple(re.findall(r"%([\w.#-]+)", rest[opening:closing])) or (rest[opening + 1 : closing],)
    return Instruction(name, shape, rest[:opening], operands, rest[closing + 1 :])


def _closing(text: str, opening: int) -> int:
    """Where the parenthesis that opens at `opening` closes."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    raise ValueError(f"HLO that is not understood: {text[:100]}")


Transfers = list[tuple[Collective, float]]  # each with how often it takes place, its own `times` being 1


@dataclass(frozen=True)
class _Walk:
    computations: Computations
    mesh: dict[str, int]
    loop_trips: int

    def below(self, name: str, run: _Run) -> Transfers:
        """Every transfer in a computation and in those that it calls."""
        found: Transfers = []
        for instruction in self.computations.get(name, ()):
            called = [one for names in instruction.called.values() for one in names]
            if _kind(instruction):
                transfer = _transfer(instruction, self.mesh)
                found += [(replace(transfer, at_most=run.at_most), run.times)] if transfer else []
            elif instruction.opcode == "conditional":
                # One branch runs: of the head's, each computes another number of tokens.
                found += max([self.below(one, run.branch()) for one in called], key=_sent)
            else:
                inner = run
                if instruction.opcode == "while":
                    inner = run.loop(trip_count(instruction, self.computations, name), self.loop_trips)
                found += [transfer for one in called for transfer in self.below(one, inner)]
        return found


def _sent(transfers: Iterable[tuple[Collective, float]]) -> float:
    return sum(transfer.sent * times for transfer, times in transfers)


def trip_count(loop: Instruction, computations: Computations, home: str) -> int | None:
    """How often a while loop runs; None: the data decide.

    XLA for CPU and GPU says so in the end; for TPU, and before that, it is read off a condition `index < constant` and
    the index's first value.
    """
    if said := _TRIPS.search(loop.attributes):
        return int(said[1])
    condition = computations[loop.called["condition"][0]]
    names = {one.name: one for one in condition}
    root = condition[-1]
    if root.opcode not in ("compare", "fusion") or len(root.operands) != 2:
        return None
    position, limit = _position(root.operands[0], names), names.get(root.operands[1])
    compare = root if root.opcode == "compare" else computations[root.called["calls"][0]][-1]
    if position is None or limit is None or limit.opcode != "constant" or "direction=LT" not in compare.attributes:
        return None
    first = _element(computations[home], loop.operands[0], position)
    return None if first is None else int(limit.operands[0]) - first


def _position(operand: str, names: dict[str, Instruction]) -> int | None:
    """Of which element of a tuple an operand is: XLA writes `tuple#2`, or names an instruction that takes it out."""
    _, hash_, written = operand.partition("#")
    if not hash_:
        taken = names.get(operand)
        found = taken and re.search(r"index=(\d+)", taken.attributes)
        written = found[1] if found else ""
    return int(written) if written.isdecimal() else None


def _element(computation: list[Instruction], name: str, position: int) -> int | None:
    """The integer at a position of a tuple, where it is a constant."""
    names = {one.name: one for one in computation}
    made = names.get(name)
    if made is None or made.opcode != "tuple":
        return None
    value = names.get(made.operands[position])
    while value is not None and value.opcode == "copy":
        value = names.get(value.operands[0])
    return int(value.operands[0]) if value is not None and value.opcode == "constant" else None


def _kind(instruction: Instruction) -> str | None:
    opcode = instruction.opcode.removesuffix("-start")
    return opcode if opcode in COLLECTIVES else None


def _transfer(instruction: Instruction, mesh: dict[str, int]) -> Collective | None:
    """What an instruction sends; None within groups of one."""
    kind = _kind(instruction)
    assert kind is not None
    if kind == "collective-permute":
        pairs = _list_of_lists(instruction.attributes, "source_target_pairs")
        groups, devices = [pair for pair in pairs if pair[0] != pair[1]], 2
    else:
        groups = replica_groups(instruction.attributes, math.prod(mesh.values()))
        devices = len(groups[0])
    if not groups or devices == 1:
        return None
    shapes = _SHAPE.findall(instruction.shape)
    size = sum(_bytes(dtype, dims) for dtype, dims in shapes)
    if instruction.opcode == "all-gather-start":  # operands and results
        size = size * devices // (devices + 1)
    elif instruction.opcode == "collective-permute-start":  # operand, result, and two words of context
        size = _bytes(*shapes[0])
    elif kind == "reduce-scatter":
        size *= devices
    axes = axes_of(groups, mesh, whole=kind != "collective-permute")
    devices = math.prod(mesh[axis] for axis in axes) if kind == "collective-permute" and axes else devices
    return Collective(kind, shapes[0][0], size, devices, axes, 1)


def _bytes(dtype: str, dims: str) -> int:
    digits = re.search(r"\d+", dtype)
    bits = BITS.get(dtype, int(digits[0]) if digits else 0)
    return math.prod(int(dim) for dim in dims.split(",") if dim) * bits // 8


def replica_groups(attributes: str, devices: int) -> list[list[int]]:
    """The groups in `replica_groups={{0,1},{2,3}}`, `[2,2]<=[4]`, `[2,2]<=[2,2]T(1,0)` or, by the axes of a mesh,
    `mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}`; none named: one of all.

    Raises:
        ValueError: they are written in yet another way.
    """
    after = attributes.partition("replica_groups=")[2]
    if match := _AXES.match(after):
        mesh, source, order, ids, axes = match.groups()
        return _groups_along(mesh, axes, _numbers(ids) if ids else _iota(source, order))
    if after.startswith("mesh"):
        raise ValueError(f"replica groups of a kind that is not known: {after[:100]}")
    if match := _IOTA.match(after):
        shape, source, order = match.groups()
        return _iota(source, order).reshape(_numbers(shape)).tolist()
    return _list_of_lists(attributes, "replica_groups") or [list(range(devices))]


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _iota(source: str | None, order: str | None) -> np.ndarray:
    """The device ids of `[2,4]T(1,0)`, flat: counted in the first shape, then transposed; nothing: no ids."""
    dims = _numbers(source) if source else []
    ids = np.arange(math.prod(dims) if source else 0).reshape(dims or [0])
    return (ids.transpose(_numbers(order)) if order else ids).reshape(-1)


def _groups_along(mesh: str, axes: str, ids: Sequence[int] | np.ndarray) -> list[list[int]]:
    """Of `'a'=2,'b'=4` and `'a','b':(2)2`: along a whole axis, or along a part of one, of that size, after `(2)`.

    ids: the devices in the mesh's order; empty: counted.
    """
    shape: list[int] = []
    along: list[int] = []
    parts = {name: cut for name, *cut in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)}
    for name, count in re.findall(r"'([^']+)'=(\d+)", mesh):
        if name not in parts:
            shape.append(int(count))
            continue
        before, size = (int(part) for part in parts[name]) if all(parts[name]) else (1, int(count))
        along.append(len(shape) + 1)
        shape += [before, size, int(count) // (before * size)]
    counted = np.array(ids) if len(ids) else np.arange(math.prod(shape))
    groups = np.moveaxis(counted.reshape(shape), along, range(-len(along), 0))
    return groups.reshape(-1, math.prod(shape[dim] for dim in along)).tolist()


def _list_of_lists(attributes: str, name: str) -> list[list[int]]:
    found = re.search(name + r"=\{((?:\{[\d,]*\},?)*)\}", attributes)
    lists = re.findall(r"\{([\d,]*)\}", found[1]) if found else []
    return [[int(n) for n in one.split(",")] for one in lists if one]


def axes_of(groups: Sequence[Sequence[int]], mesh: dict[str, int], whole: bool = True) -> tuple[str, ...]:
    """The axes of a mesh along which the devices of a group differ, all groups alike.

    whole: a group must hold every device along these axes; where it does not, there is no answer: ().
    """
    places = [np.array(np.unravel_index(np.array(group), tuple(mesh.values()))) for group in groups]
    differs = np.any([(place != place[:, :1]).any(axis=1) for place in places], axis=0)
    axes = tuple(axis for axis, differ in zip(mesh, differs, strict=True) if differ)
    if whole and any(len(group) != math.prod(mesh[axis] for axis in axes) for group in groups):
        return ()
    return axes
