"""The forecast behaves as a scaling law does, and the size it proposes is the one it says is best."""

import math

import pytest

from gptworks.planning.forecast import best_parameters, share_of_unigrams


def test_more_parameters_more_tokens_and_fresh_text_each_reach_more():
    assert share_of_unigrams(1e6, 1e7, 1e9) > share_of_unigrams(2e6, 1e7, 1e9)
    assert share_of_unigrams(1e6, 1e7, 1e9) > share_of_unigrams(1e6, 2e7, 1e9)
    assert share_of_unigrams(1e6, 1e8, 1e6) > share_of_unigrams(1e6, 1e8, 1e7) > share_of_unigrams(1e6, 1e8, 1e8)


def test_a_second_pass_is_worth_nearly_as_much_as_new_text_and_a_hundredth_nothing():
    once, twice, fresh = (share_of_unigrams(1e6, t, e) for t, e in ((1e6, 1e6), (2e6, 1e6), (2e6, 2e6)))
    assert fresh < twice < once and (once - twice) > 0.9 * (once - fresh)
    assert share_of_unigrams(1e6, 1e8, 1e6) == pytest.approx(share_of_unigrams(1e6, 1e9, 1e6), rel=0.01)


def test_data_without_end_never_repeats():
    assert share_of_unigrams(1e6, 1e7, math.inf) == share_of_unigrams(1e6, 1e7, 1e7)


@pytest.mark.parametrize("flops", [1e13, 1e15, 1e18, 1e21])
def test_the_proposed_size_is_better_than_its_neighbours(flops):
    size, reached = best_parameters(flops, math.inf)
    assert reached == share_of_unigrams(size, flops / (6 * size), math.inf)
    for other in (size / 2, size * 2):
        assert reached <= share_of_unigrams(other, flops / (6 * other), math.inf)


def test_a_short_text_wants_a_smaller_model_than_an_endless_one():
    assert best_parameters(1e16, 1e6)[0] != best_parameters(1e16, math.inf)[0]
    sizes = [best_parameters(10.0**power, math.inf)[0] for power in range(11, 22)]
    assert sizes == sorted(sizes)
