"""The forecast behaves as a scaling law does, and the size it proposes is the one it says is best."""

import math

import pytest

from gptworks.planning.forecast import best_parameters, likely_bits, share_of_counting


def test_more_parameters_more_text_and_fresh_text_each_reach_more():
    assert share_of_counting(1e6, 1e7, 1e9) > share_of_counting(2e6, 1e7, 1e9)
    assert share_of_counting(1e6, 1e7, 1e9) > share_of_counting(1e6, 2e7, 1e9)
    assert share_of_counting(1e6, 1e8, 1e6) > share_of_counting(1e6, 1e8, 1e7) > share_of_counting(1e6, 1e8, 1e8)


def test_a_second_pass_is_worth_nearly_as_much_as_new_text_and_a_hundredth_nothing():
    once, twice, fresh = (share_of_counting(1e6, t, e) for t, e in ((1e6, 1e6), (2e6, 1e6), (2e6, 2e6)))
    assert fresh < twice < once and (once - twice) > 0.9 * (once - fresh)
    assert share_of_counting(1e6, 1e8, 1e6) == pytest.approx(share_of_counting(1e6, 1e9, 1e6), rel=0.01)


def test_data_without_end_never_repeats():
    assert share_of_counting(1e6, 1e7, math.inf) == share_of_counting(1e6, 1e7, 1e7)


@pytest.mark.parametrize("flops", [1e13, 1e15, 1e18, 1e21])
def test_the_proposed_size_is_better_than_its_neighbours(flops):
    def seen(parameters):
        return 4 * flops / (6 * parameters)

    size, reached = best_parameters(seen, math.inf, 0)
    assert reached == share_of_counting(size, seen(size), math.inf)
    for other in (size / 2, size * 2):
        assert reached <= share_of_counting(other, seen(other), math.inf)


def test_more_compute_makes_a_larger_model_down_to_what_the_vocabulary_takes_and_up_to_what_is_allowed():
    sizes = [best_parameters(lambda p, f=10.0**n: f / p, math.inf, 4096)[0] for n in range(8, 22)]
    assert sizes == sorted(sizes) and sizes[0] == 48 * 4096
    assert best_parameters(lambda p: 1e30 / p, math.inf, 0, most=1e7)[0] <= 1e7
    assert best_parameters(lambda p: 1e30 / p, math.inf, 4096, most=1)[0] == 48 * 4096


def test_a_forecast_is_never_above_an_untrained_model():
    assert likely_bits(100.0, 2.6, 4096, 4.0) == 3.0
    assert likely_bits(0.5, 2.6, 4096, 4.0) == pytest.approx(1.3)


@pytest.mark.parametrize(
    ("parameters", "seen", "text", "unigram", "vocab", "reached"),
    [  # of benchmarks/sizes.py, docs/log.md: novels, novels for five minutes, Wikipedia
        (615_072, 2.4e6 * 3.7, 33e6, 2.606, 4096, 1.711), (2_458_688, 5.14e6 * 4.02, 33e6, 2.440, 8192, 1.533),
        (577_856, 2.3e6 * 3.66, 1e8, 2.848, 8192, 2.085),
    ],
)  # fmt: skip
def test_the_law_meets_runs_that_were_made(parameters, seen, text, unigram, vocab, reached):
    share = share_of_counting(parameters, seen, text)
    assert likely_bits(share, unigram, vocab, 1.0) == pytest.approx(reached, rel=0.12)
