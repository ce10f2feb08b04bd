"""The order of samples: a pure function of (seed, position), whatever is known of the shards and when."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openvision3.data.order import MIXTURE_BLOCK, MixtureOrder, ShardOrder

COUNTS = [5, 0, 9, 4, 7, 1, 6]


def order(counts: list[int], window: int = 3, block: int = 1, seed: int = 0, known: bool = True, shuffle: bool = True):
    """An order, and the list of the shards whose counts it asked for."""
    found, asked = np.array(counts if known else [-1] * len(counts)), []

    def count(numbers: np.ndarray) -> None:
        asked.extend(numbers.tolist())
        found[numbers] = np.array(counts)[numbers]

    return ShardOrder(found, count, seed, window, block, shuffle), asked


def places(made: ShardOrder, positions: range) -> list[tuple[int, int]]:
    return [window.at(place) for window, place in map(made.find, positions)]


def test_the_order_never_changes() -> None:
    """Literal places: a resumed run relies on them, over all versions."""
    assert places(order([3, 3, 2], window=2, block=2, seed=5)[0], range(8)) == [
        (2, 1), (2, 0), (1, 0), (1, 1), (1, 2), (0, 1), (0, 2), (0, 0),
    ]  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(
    counts=st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(any),
    window=st.integers(1, 14),
    block=st.integers(1, 6),
    seed=st.integers(0, 2**40),
)
def test_each_turn_has_every_sample_once(counts: list[int], window: int, block: int, seed: int) -> None:
    made, _ = order(counts, window, block, seed)
    every = {(shard, number) for shard, count in enumerate(counts) for number in range(count)}
    held = places(made, range(2 * len(every)))
    assert set(held[: len(every)]) == set(held[len(every) :]) == every


@pytest.mark.parametrize(("window", "block"), [(1, 1), (3, 1), (3, 4), (7, 2)])
def test_shards_counted_on_the_way_give_the_same_order(window: int, block: int) -> None:
    """Forwards, and from any position at once; no shard is counted before its window is reached."""
    whole = places(order(COUNTS, window, block)[0], range(100))
    lazy, asked = order(COUNTS, window, block, known=False)
    assert places(lazy, range(1)) == whole[:1] and len(asked) <= window + 1 and lazy.total is None
    assert places(lazy, range(100)) == whole and lazy.total == sum(COUNTS) and sorted(asked) == list(range(7))
    for start in (0, 7, 31, 32, 33, 64, 99):
        assert places(order(COUNTS, window, block, known=False)[0], range(start, 100)) == whole[start:]


def test_unshuffled_is_the_shards_own_order() -> None:
    every = [(shard, number) for shard, count in enumerate(COUNTS) for number in range(count)]
    lazy, asked = order(COUNTS, 3, 4, known=False, shuffle=False)
    assert places(lazy, range(3)) == every[:3] and asked == [0]
    assert places(lazy, range(64)) == every * 2


def test_windows_and_blocks_stay_together() -> None:
    """A window's positions are of its shards alone; blocks are neighbours, at other bounds in another turn."""
    made, _ = order([40] * 6, window=2, block=10)
    bounds = []
    for turn in range(2):
        held = places(made, range(turn * 240, (turn + 1) * 240))
        for begin in range(0, 240, 80):
            assert len({shard for shard, _ in held[begin : begin + 80]}) == 2
        steps = [b == (a[0], a[1] + 1) for a, b in zip(held, held[1:], strict=False)]
        assert 0.85 < np.mean(steps) < 0.95
        bounds.append({b for step, b in zip(steps, held[1:], strict=False) if not step})
    assert bounds[0] != bounds[1]


def test_no_samples_at_all() -> None:
    with pytest.raises(ValueError, match="no samples"):
        order([0, 0], known=False)[0].find(0)


def test_a_mixture_has_its_shares_without_gaps() -> None:
    mixture = MixtureOrder((6.0, 3.0, 1.0), seed=4)
    held = [mixture.find(position) for position in range(2 * MIXTURE_BLOCK + 500)]
    for part, share in enumerate((0.6, 0.3, 0.1)):
        own = [at for which, at in held if which == part]
        assert own == list(range(len(own)))
        for begin in (0, MIXTURE_BLOCK):
            assert sum(which == part for which, _ in held[begin : begin + MIXTURE_BLOCK]) == share * MIXTURE_BLOCK
        assert sum(which == part for which, _ in held[:500]) == pytest.approx(500 * share, abs=60)
    assert [MixtureOrder((6.0, 3.0, 1.0), seed=4).find(20_300)] == held[20_300:20_301]
    assert [part for part, _ in held[:24]] != [MixtureOrder((6.0, 3.0, 1.0), seed=5).find(p)[0] for p in range(24)]


@pytest.mark.parametrize("weights", [(), (1.0, 0.0), (1.0, -1.0), (1.0, float("nan")), (1.0, 1e-9)])
def test_weights_that_are_none(weights: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="weights"):
        MixtureOrder(weights, 0)


def test_shares_are_rounded_to_the_whole() -> None:
    assert MixtureOrder((1.0, 1.0, 1.0), 0).shares.tolist() == [3334, 3333, 3333]


def test_millions_of_shards_take_little_time_and_memory() -> None:
    """The real recipe's scale: 5.6 billion samples in 1.1 million shards, opened deep in the second turn."""
    counts = np.full(1_120_000, 5000)
    made = ShardOrder(counts, lambda numbers: None, seed=0, window=64, block=32, shuffle=True)
    made.count_all()
    window, place = made.find(7_000_000_123)
    assert window.turn == 1 and len(window.shards) == 64 and len(window) == 64 * 5000 and 0 <= place < len(window)
