import threading

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptworks.core.workers import ONE, WORTH_SHARING, Workers, side_by_side

SIZES = st.lists(st.integers(0, WORTH_SHARING), min_size=1, max_size=12)


@given(SIZES, st.integers(1, 5))
@settings(max_examples=tiny.examples(200), deadline=None)
def test_parts_are_consecutive_none_is_empty_and_none_is_much_larger_than_its_share(sizes, count):
    parts = Workers(count)._parts(sizes)
    assert [place for part in parts for place in range(part.start, part.stop)] == list(range(len(sizes)))
    assert all(part.stop > part.start for part in parts) and len(parts) <= count
    if count > 1 and sum(sizes) >= WORTH_SHARING:
        assert max(sum(sizes[part]) for part in parts) <= sum(sizes) / count + 2 * max(sizes)
    else:
        assert len(parts) == 1


@pytest.mark.parametrize("count", [1, 2, 3])
def test_what_is_shared_out_is_what_one_computes(count):
    def lists():
        generator = torch.Generator().manual_seed(1)
        return [[torch.randn(n, 700, generator=generator) for n in (300, 1, 90, 40)] for _ in range(2)]

    def work(targets, values):
        torch._foreach_mul_(targets, values)
        return [t.sum() for t in targets], threading.current_thread().name

    one, _ = lists(), ONE.share(work, *(expected := lists()))
    with side_by_side(count) as pool:
        given_back = pool.share(work, *one)
    for mine, its in zip(one[0], expected[0], strict=True):
        assert torch.equal(mine, its)
    assert [float(s) for sums, _ in given_back for s in sums] == pytest.approx([float(t.sum()) for t in expected[0]])
    assert len(given_back) == count
    assert {name.split("_")[0] for _, name in given_back} == ({"worker"} if count > 1 else {"MainThread"})


def test_no_gradients_are_kept_and_small_lists_stay_with_the_caller():
    weight = torch.ones(3, requires_grad=True)
    with side_by_side(2) as pool:
        [doubled] = pool.share(lambda part: part[0] * 2, [weight])
        assert not doubled.requires_grad and torch.is_grad_enabled()
        assert pool.share(lambda part: threading.current_thread(), [weight]) == [threading.main_thread()]


def test_no_operation_has_more_threads_than_a_worker_whoever_computes_it():
    """Neither those of the workers nor those between them: teams of threads wait by spinning."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with side_by_side(2) as pool:
            assert torch.get_num_threads() == 2
            assert set(pool.map(lambda _: torch.get_num_threads(), range(8))) == {2}
            with side_by_side(2) as within:
                assert within is pool
            with side_by_side(1) as alone:
                assert alone is ONE
            with pytest.raises(ValueError, match="wrong"), side_by_side(2):
                list(pool.map(lambda _: int("wrong"), [0]))
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 4
        with side_by_side(2) as later:
            assert later is not pool
    finally:
        torch.set_num_threads(before)
