"""Rounds of training steps in turns, pair by pair, and what they say: times, ratios, memory, FLOP/s."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from openvision3.bench.timing import Spread, limits, machine
from openvision3.bench.train_step import (
    OURS,
    OURS_FAST,
    PEER,
    PEER_COMPILED,
    TOLERANCE,
    Case,
    SideKind,
    TrainingSide,
    step_flops,
    with_speed_options,
)
from openvision3.bench.workers import Worker
from openvision3.config import OpenVisionError

Say = Callable[[str], object]


def start_worker(case: Case, kind: SideKind) -> Worker:
    """A side's process."""
    return Worker(kind.name, TrainingSide, case, kind)


@dataclass
class Figures:
    """What was measured of one side, over all of its rounds."""

    kind: SideKind
    seconds: list[float] = field(default_factory=list)  # of each timed step
    losses: dict[str, float] = field(default_factory=dict)  # of the first step, with the gradient's norm
    peak: int | None = None  # bytes above the process at rest, the most of all timed steps
    static: dict[str, int] = field(default_factory=dict)  # bytes by part: parameters, gradients, optimizer, frozen

    @property
    def activations(self) -> int | None:
        """Bytes of the peak that are not static."""
        return None if self.peak is None else self.peak - sum(self.static.values())

    def add(self, turn: Mapping[str, Any]) -> None:
        """Counts a timed turn in."""
        self.seconds.append(turn["seconds"])
        if turn["peak"] is not None:
            self.peak = max(self.peak or 0, turn["peak"])


@dataclass
class Comparison:
    """The sides of a case, and how many times as long the first of a pair takes as the second."""

    case: Case
    sides: dict[str, Figures] = field(default_factory=dict)
    ratios: dict[tuple[str, str], Spread] = field(default_factory=dict)
    best_peer: SideKind = PEER
    notes: list[str] = field(default_factory=list)
    flops: dict[bool, dict[str, float]] = field(default_factory=dict)  # of a step by part; with speed options or not
    limits: dict[str, Spread] = field(default_factory=dict)  # FLOP/s

    def measure_limits(self) -> None:
        """Measures the limits once more: between turns, as a shared machine changes."""
        dtype = torch.bfloat16 if self.case.precision == "bf16" else torch.float32
        for name, spread in limits(torch.device(self.case.device), dtype, rounds=1).items():
            before = self.limits[name].values if name in self.limits else ()
            self.limits[name] = Spread.of([*before, *spread.values])

    def flops_per_second(self, name: str) -> float:
        """Of a side's step, by its median time."""
        side = self.sides[name]
        return sum(self.flops[side.kind.fast].values()) / Spread.of(side.seconds).median

    def of_limits(self, name: str) -> dict[str, float]:
        """A side's FLOP/s as a share of each limit."""
        return {limit: self.flops_per_second(name) / spread.median for limit, spread in self.limits.items()}

    def to_json(self) -> dict[str, Any]:
        """All figures, as JSON can hold them."""
        rows = {}
        for name, side in self.sides.items():
            seconds = Spread.of(side.seconds)
            rows[name] = {
                "seconds": seconds.values,
                "seconds_median": seconds.median,
                "samples_per_second": self.case.batch_size / seconds.median,
                "flops_per_second": self.flops_per_second(name),
                "of_limits": self.of_limits(name),
                "peak_bytes": side.peak,
                "static_bytes": side.static,
                "activation_bytes": side.activations,
                "losses": side.losses,
            }
        return {
            "recipe": self.case.config.recipe,
            "resolution": self.case.resolution,
            "batch_size": self.case.batch_size,
            "pixel_stride": self.case.pixel_stride,
            "text": self.case.texts,
            "precision": self.case.precision,
            "seed": self.case.config.seed,
            "machine": machine(torch.device(self.case.device)),
            "best_peer": self.best_peer.name,
            "sides": rows,
            "ratios": [
                {"slower": a, "faster": b, "median": r.median, "low": r.low, "high": r.high, "values": r.values}
                for (a, b), r in self.ratios.items()
            ],
            "flops": {"all pictures": self.flops[False], "speed options": self.flops[True]},
            "limits": {name: vars(spread) for name, spread in self.limits.items()},
            "notes": self.notes,
        }


def compare(
    case: Case,
    rounds: int,
    peers: tuple[SideKind, ...] = (PEER, PEER_COMPILED),
    say: Say = print,
    start: Callable[[Case, SideKind], Worker] = start_worker,
) -> Comparison:
    """Measures all sides, two at a time. The faster of `peers` is the peer of all ratios.

    Raises `OpenVisionError` where two sides disagree (`check_agreement`), or where one fails. A peer whose compilation
    fails is left out, with a note.
    """
    found = Comparison(case)
    found.flops = {fast: step_flops(case, fast) for fast in (False, True)}
    found.best_peer = peers[0]
    if len(peers) > 1:
        try:
            time_pair(found, peers[0], peers[1], rounds, say, start)
        except RuntimeError as error:  # of the compiler; a side that disagrees is an `OpenVisionError`
            found.notes.append(f"{peers[1].name}: fails as it is: {str(error).strip().splitlines()[-1]}")
            say(found.notes[-1])
        else:
            ratio = found.ratios[peers[0].name, peers[1].name].median
            found.best_peer = peers[1] if ratio > 1 else peers[0]
    peer, fast_peer = found.best_peer, with_speed_options(found.best_peer)
    for slower, faster in ((peer, OURS), (peer, OURS_FAST), (peer, fast_peer), (fast_peer, OURS_FAST)):
        time_pair(found, slower, faster, rounds, say, start)
    if any(share > 1 for name in found.sides for share in found.of_limits(name).values()):
        found.notes.append("a share of a limit is above 100 %: the machine was busier when the limits were measured")
    return found


def compare_memory(
    case: Case,
    kinds: tuple[SideKind, ...] = (PEER, OURS),
    say: Say = print,
    start: Callable[[Case, SideKind], Worker] = start_worker,
) -> dict[str, Figures]:
    """The memory of a step of each side, one process after the other, and no ratio of times.

    A first step makes the optimizer's state; the second one counts. Raises `OpenVisionError` where the losses or
    gradients of the first disagree.
    """
    found: dict[str, Figures] = {}
    for kind in kinds:
        with start(case, kind) as worker:
            first, second = worker.turn(), worker.turn()
        found[kind.name] = side = Figures(kind, losses=first["losses"], static=first["static"])
        side.add(second)
        check_agreement(next(iter(found.values())), side, case.precision)
        say(f"{case.resolution} px, {kind.name}: {(side.activations or 0) / 2**30:.2f} GiB without static bytes")
    return found


def time_pair(
    found: Comparison,
    first: SideKind,
    second: SideKind,
    rounds: int,
    say: Say,
    start: Callable[[Case, SideKind], Worker] = start_worker,
) -> None:
    """Steps of two sides in turns: one to warm up and compare the losses, and `rounds` that count."""
    case, pair = found.case, (first, second)
    with start(case, first) as a, start(case, second) as b:
        for kind, worker in zip(pair, (a, b), strict=True):
            turn = worker.turn()
            side = found.sides.setdefault(kind.name, Figures(kind))
            side.losses, side.static = turn["losses"], turn["static"]
        for kind in pair:  # the first side is the peer's, or ours of before
            reference = next(side for side in found.sides.values() if side.kind.fast == kind.fast)
            check_agreement(reference, found.sides[kind.name], case.precision)
        seconds: tuple[list[float], list[float]] = ([], [])
        for number in range(1, rounds + 1):
            for index, (kind, worker) in enumerate(zip(pair, (a, b), strict=True)):
                turn = worker.turn()
                found.sides[kind.name].add(turn)
                seconds[index].append(turn["seconds"])
            found.measure_limits()
            times = ", ".join(f"{kind.name} {taken[-1]:.3g} s" for kind, taken in zip(pair, seconds, strict=True))
            say(f"{case.resolution} px, round {number} of {rounds}: {times}")
    found.ratios[first.name, second.name] = Spread.of([x / y for x, y in zip(*seconds, strict=True)])


def check_agreement(one: Figures, other: Figures, precision: str) -> None:
    """Raises `OpenVisionError` where losses or gradient norms of two sides differ by more than `TOLERANCE`."""
    names = one.losses.keys() | other.losses.keys()
    for name in sorted(names):
        a, b = one.losses.get(name, float("nan")), other.losses.get(name, float("nan"))
        if not abs(a - b) <= TOLERANCE[precision] * max(abs(a), abs(b)):
            raise OpenVisionError(
                f"{one.kind.name} and {other.kind.name} disagree: {name} is {a:.6g} and {b:.6g}, more than "
                f"{TOLERANCE[precision]:.2%} apart in {precision}; they do not compute the same, so there is no ratio"
            )
