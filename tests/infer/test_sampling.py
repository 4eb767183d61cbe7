"""Each way to choose a token, against its definition written out one token at a time."""

import math

import pytest
import tiny
import torch

from gptworks.core.errors import NotFinite, UsageError
from gptworks.infer.sampling import Sampling, choose

V = 12
LOGITS = torch.randn(V, generator=torch.Generator().manual_seed(0)) * 2
NOTHING = torch.tensor([], dtype=torch.int64)


def softmax(scores: list[float]) -> list[float]:
    weights = [math.exp(s - max(scores)) for s in scores]
    return [w / sum(weights) for w in weights]


def expected(how: Sampling, seen: list[int]) -> list[float]:
    """The distribution that `how` describes."""
    scores = LOGITS.tolist()
    for token in set(seen):  # Keskar et al. 2019, with the sign taken care of as transformers does
        scores[token] *= how.repetition_penalty if scores[token] < 0 else 1 / how.repetition_penalty
    scores = [s / how.temperature for s in scores]
    kept = sorted(range(V), key=lambda i: -scores[i])
    if how.top_k:
        kept = kept[: how.top_k]
    shares = dict(zip(kept, softmax([scores[i] for i in kept]), strict=True))
    if how.top_p < 1:  # the smallest set of the likeliest that holds top_p
        nucleus, total = [], 0.0
        for i in kept:
            nucleus.append(i)
            total += shares[i]
            if total >= how.top_p:
                break
        kept = nucleus
    kept = [i for i in kept if shares[i] >= how.min_p * max(shares.values())]
    rest = sum(shares[i] for i in kept)
    return [shares[i] / rest if i in kept else 0.0 for i in range(V)]


@pytest.mark.parametrize(
    "how",
    [
        Sampling(),
        Sampling(temperature=0.5),
        Sampling(temperature=2.0),
        Sampling(top_k=4),
        Sampling(top_k=V + 5),
        Sampling(top_p=0.6),
        Sampling(top_p=1e-6),
        Sampling(min_p=0.2),
        Sampling(repetition_penalty=1.7),
        Sampling(repetition_penalty=0.6),
        Sampling(repetition_penalty=1.3, temperature=0.8, top_k=8, top_p=0.9, min_p=0.1),
    ],
    ids=str,
)
def test_draws_follow_the_definition(how, monkeypatch):
    seen = torch.tensor([1, 1, 4, 7])
    given: list[torch.Tensor] = []
    draw = torch.multinomial

    def recorded(probabilities, *rest, **named):
        given.append(probabilities / probabilities.sum())
        return draw(probabilities, *rest, **named)

    monkeypatch.setattr(torch, "multinomial", recorded)
    token = choose(LOGITS, seen, how, torch.Generator().manual_seed(0))
    wanted = torch.tensor(expected(how, seen.tolist()))
    assert (given[0] - wanted).abs().max() < 1e-6
    assert wanted[token] > 0


def test_many_draws_have_the_frequencies_of_the_softmax():
    generator, n = torch.Generator().manual_seed(0), 20_000
    counts = torch.zeros(V)
    for _ in range(n):
        counts[choose(LOGITS, NOTHING, Sampling(), generator)] += 1
    p = LOGITS.double().softmax(-1)
    assert ((counts / n - p).abs() < 4.5 * (p * (1 - p) / n).sqrt() + 1e-9).all()


def test_greedy_takes_the_likeliest_after_the_penalty():
    generator = torch.Generator()
    best, second = LOGITS.topk(2).indices.tolist()
    assert choose(LOGITS, NOTHING, Sampling(temperature=0), generator) == best
    assert choose(LOGITS, torch.tensor([best]), Sampling(temperature=0, repetition_penalty=50), generator) == second
    assert choose(LOGITS, NOTHING, Sampling(top_k=1), generator) == best


@pytest.mark.parametrize("temperature", [1e-40, 1e-9, 1e9])
def test_extreme_temperatures_neither_overflow_nor_fail(temperature):
    tokens = {choose(LOGITS, NOTHING, Sampling(temperature=temperature), torch.Generator()) for _ in range(3)}
    if temperature < 1:
        assert tokens == {int(LOGITS.argmax())}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_choose_nothing(score, temperature):
    with pytest.raises(NotFinite):
        choose(torch.tensor([0.0, score, 1.0]), NOTHING, Sampling(temperature=temperature), torch.Generator())


def test_choosing_leaves_the_logits_alone():
    logits = LOGITS.clone()
    choose(logits, torch.tensor([0, 1, 2]), Sampling(repetition_penalty=2.0, top_k=3), torch.Generator())
    assert torch.equal(logits, LOGITS)


def test_transformers_agrees_on_what_is_kept():
    transformers = pytest.importorskip("transformers")
    logits = tiny.model(vocab_size=V).head.logits(torch.randn(1, 32)).detach()
    for warper, how in (
        (transformers.TopKLogitsWarper(5), Sampling(top_k=5)),
        (transformers.TopPLogitsWarper(0.7), Sampling(top_p=0.7)),
        (transformers.MinPLogitsWarper(0.4), Sampling(min_p=0.4)),
    ):
        allowed = set(torch.isfinite(warper(NOTHING, logits.clone())[0]).nonzero().flatten().tolist())
        generator = torch.Generator().manual_seed(0)
        assert {choose(logits[0], NOTHING, how, generator) for _ in range(2000)} == allowed, how


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 2.0},
        {"min_p": float("nan")},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("inf")},
    ],
    ids=str,
)
def test_impossible_settings_are_refused_by_name(values):
    with pytest.raises(UsageError, match=next(iter(values))) as refused:
        Sampling(**values)
    assert refused.value.code == 64
