"""The order of samples: pure, complete, of one bucket a batch, and the same for any number of ranks and workers."""

import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sana.data.order import BucketedOrder, Leftovers
from sana.errors import InvalidInput

BUCKETS = [f"{i * i % 7}" for i in range(103)]
some_buckets = st.lists(st.integers(0, 3), min_size=1, max_size=60)


@given(some_buckets, st.integers(1, 9), st.integers(0, 2**64), st.sampled_from(["short", "drop"]))
def test_an_epoch_sees_every_sample_at_most_once(
    buckets: list[int], size: int, seed: int, leftovers: Leftovers
) -> None:
    if leftovers == "drop" and max(Counter(buckets).values()) < size:
        with pytest.raises(InvalidInput, match=f"No bucket has a whole batch of {size}"):
            BucketedOrder(buckets, size, seed, leftovers=leftovers)
        return
    order = BucketedOrder(buckets, size, seed, leftovers=leftovers)
    for epoch in range(2):
        draws = range(epoch * order.batches_per_epoch, (epoch + 1) * order.batches_per_epoch)
        batches = [order.batch(draw) for draw in draws]
        seen = [index for batch in batches for index in batch]
        assert len(set(seen)) == len(seen)
        assert all(len({buckets[index] for index in batch}) == 1 for batch in batches)
        assert {order.epoch(draw) for draw in draws} == {epoch}
        if leftovers == "short":
            assert sorted(seen) == list(range(len(buckets)))
            assert all(1 <= len(batch) <= size for batch in batches)
        else:
            assert all(len(batch) == size for batch in batches)
            assert not set(order.never_seen) & set(seen)


def test_dropped_leftovers_are_others_in_every_epoch_and_small_buckets_are_told() -> None:
    order = BucketedOrder(["a"] * 10 + ["b"] * 3, 4, 0, leftovers="drop")
    assert order.never_seen == [10, 11, 12]
    assert BucketedOrder(["a"] * 10 + ["b"] * 3, 4, 0).never_seen == []
    seen = [{i for d in (0, 1) for i in order.batch(2 * epoch + d)} for epoch in range(12)]
    assert all(len(some) == 8 for some in seen)
    assert set().union(*seen) == set(range(10))


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_ranks_and_workers_together_see_the_order_of_one(ranks: int, workers: int) -> None:
    """Rank r of w takes draws step * w + r; worker k of n makes every nth of them."""
    alone = BucketedOrder(BUCKETS, 4, 11)
    total = 3 * alone.batches_per_epoch // ranks * ranks
    made: dict[int, list[int]] = {}
    for rank in range(ranks):
        draws = range(rank, total, ranks)
        for worker in range(max(workers, 1)):
            own = BucketedOrder(BUCKETS, 4, 11)
            for draw in draws[worker :: max(workers, 1)]:
                assert draw not in made
                made[draw] = own.batch(draw)
    assert [made[draw] for draw in range(total)] == [alone.batch(draw) for draw in range(total)]


def test_a_draw_does_not_depend_on_the_draws_before() -> None:
    order = BucketedOrder(BUCKETS, 4, 5)
    forwards = [order.batch(draw) for draw in range(200)]
    fresh = BucketedOrder(BUCKETS, 4, 5)
    assert [fresh.batch(draw) for draw in reversed(range(200))] == forwards[::-1]


def test_seeds_and_epochs_differ() -> None:
    order = BucketedOrder(["a"] * 64, 8, 0)
    epochs = [tuple(i for d in range(8) for i in order.batch(8 * epoch + d)) for epoch in range(4)]
    assert len(set(epochs)) == 4
    assert BucketedOrder(["a"] * 64, 8, 1).batch(0) != order.batch(0)


def test_the_order_never_changes() -> None:
    """A run that goes on with a later release must see what it would have seen."""
    order = BucketedOrder([i % 3 for i in range(20)], 4, 3)
    assert [order.batch(draw) for draw in (0, 1, 7, 100)] == GOLDEN


def test_another_process_sees_the_same_order() -> None:
    code = (
        "from sana.data.order import BucketedOrder\n"
        "order = BucketedOrder([f'{i * i % 7}' for i in range(103)], 4, 11)\n"
        "print([order.batch(draw) for draw in range(70)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    order = BucketedOrder(BUCKETS, 4, 11)
    assert done.stdout.strip() == str([order.batch(draw) for draw in range(70)])


def test_places_in_the_epoch_are_even() -> None:
    order = BucketedOrder(["a"] * 16, 4, 9)
    first = Counter(order.batch(4 * epoch)[0] for epoch in range(1600))
    assert len(first) == 16
    assert all(60 < count < 145 for count in first.values())


def test_a_replacement_is_of_the_same_bucket_and_pure() -> None:
    order = BucketedOrder(BUCKETS, 4, 11)
    for draw in range(50):
        for index in order.batch(draw):
            others = [order.instead(draw, index, attempt) for attempt in range(6)]
            assert {BUCKETS[other] for other in others} == {BUCKETS[index]}
            assert others == [BucketedOrder(BUCKETS, 4, 11).instead(draw, index, attempt) for attempt in range(6)]
    assert len({order.instead(3, 5, attempt) for attempt in range(40)}) > 3


def test_all_of_a_bucket_stand_in_for_one_another() -> None:
    order = BucketedOrder(BUCKETS, 4, 11)
    for draw, index in ((0, 5), (31, 40)):
        found = list(order.stand_ins(draw, index))
        members = [other for other, bucket in enumerate(BUCKETS) if bucket == BUCKETS[index]]
        assert sorted(set(found)) == members
        assert len(found) == 2 * len(members)
        assert found[: len(members)] == [order.instead(draw, index, attempt) for attempt in range(len(members))]


def test_the_other_draws_of_an_epoch_are_a_pure_row() -> None:
    order = BucketedOrder(BUCKETS, 4, 11)
    count = order.batches_per_epoch
    rows = [list(order.elsewhere(draw)) for draw in range(count, 2 * count)]
    for draw, row in enumerate(rows, count):
        assert sorted((*row, draw)) == list(range(count, 2 * count))
        assert row == list(BucketedOrder(BUCKETS, 4, 11).elsewhere(draw))
    assert len({row[0] for row in rows}) > count // 3
    assert list(BucketedOrder(["a"], 4, 11).elsewhere(7)) == []


def test_a_million_samples_are_no_trouble() -> None:
    order = BucketedOrder([i % 40 for i in range(1_000_000)], 64, 1)
    batches = [order.batch(draw) for draw in range(0, 20_000, 997)]
    assert all(len({index % 40 for index in batch}) == 1 for batch in batches)
    assert 2 <= len(order._plans) <= 2


@pytest.mark.parametrize(("given", "words"), [(([], 4), "no samples"), ((["a"], 0), "at least one sample, not 0")])
def test_nothing_to_order(given: tuple[list[str], int], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        BucketedOrder(*given, 0)
    with pytest.raises(InvalidInput, match="counted from 0"):
        BucketedOrder(["a"], 1, 0).batch(-1)


GOLDEN = [[19, 16, 4], [9, 0, 15], [16, 19, 13], [4, 16, 7, 10]]
