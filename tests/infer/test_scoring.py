"""The figure a model is judged by: exact, independent of the batch size, beside what simple means need."""

import dataclasses
import lzma
import math
from collections import Counter

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptworks.core.errors import NotFinite
from gptworks.data.loader import blocks
from gptworks.data.shards import Stream
from gptworks.data.tokenizer import Tokenizer
from gptworks.infer.scoring import (
    PASSAGE,
    bits_per_byte,
    charge,
    passage,
    score,
    stream_losses,
    total,
    unigram,
    xz,
)
from gptworks.model.heads import LanguageHead
from gptworks.model.transformer import Output


@pytest.fixture(scope="module")
def model():
    return tiny.model(vocab_size=len(tiny.tokenizer()))


STREAM = tiny.stream(documents=5, characters=150)


def by_hand(model, stream: Stream, context: int, stride: int) -> tuple[float, int]:
    """-log p of every token after the first, in a loop: windows of `context` inputs, `stride` apart."""
    ids, total, predicted, start = stream.tokens.astype(int).tolist(), 0.0, 0, 0
    while predicted < len(ids) - 1:
        end = min(start + context, len(ids) - 1)
        with torch.no_grad():
            shares = model.scores(torch.tensor([ids[start:end]])).double().softmax(-1)[0]
        for place in range(max(start, predicted), end):
            total -= math.log(shares[place - start, ids[place + 1]])
        predicted, start = end, start + stride
    return total, len(ids) - 1


@pytest.mark.parametrize(("context", "stride"), [(32, None), (32, 8), (32, 31), (7, None), (32, 1)])
def test_the_score_is_the_mean_written_out(model, context, stride):
    made = score(model, STREAM, context, rows=4, stride=stride)
    total, tokens = by_hand(model, STREAM, context, stride or context)
    assert made.tokens == tokens == len(STREAM.tokens) - 1
    assert made.loss == pytest.approx(total / tokens, abs=1e-6)
    assert made.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-6)
    assert made.bits_per_byte == pytest.approx(total / math.log(2) / STREAM.bytes, rel=1e-6)
    assert made.bytes == STREAM.bytes


def test_the_score_does_not_depend_on_the_batch_size(model):
    scores = [score(model, STREAM, 32, rows=rows).loss for rows in (1, 2, 3, 16, 1000)]
    assert max(scores) - min(scores) < 1e-6


def test_the_score_is_bitwise_the_same_whoever_scored_which_batch(model):
    """So that several processes may share the batches."""
    parts = list(stream_losses(model, STREAM, 8, rows=2))
    assert len(parts) > 20
    assert total(parts, STREAM) == score(model, STREAM, 8, rows=2)
    uneven = [part * np.float32(10.0**number) for number, part in enumerate(parts[:20])]  # a plain sum would round
    for seed in range(20):
        order = np.random.default_rng(seed).permutation(20)
        assert total([uneven[i] for i in order], STREAM) == total(uneven, STREAM)


@pytest.mark.parametrize("stride", [None, 5])
def test_token_losses_come_in_the_order_of_the_text(model, stride):
    losses = np.concatenate(list(stream_losses(model, STREAM, 16, rows=3, stride=stride)))
    assert len(losses) == len(STREAM.tokens) - 1
    for end in (1, 2, 17, 40):
        part = Stream(STREAM.tokens[: end + 1], np.array([0]), 1)
        expected, _ = by_hand(model, part, 16, stride or 16)
        if not stride or end <= 16:
            assert losses[:end].sum() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("context", "stride"), [(16, None), (16, 5), (16, 16), (16, 1), (5000, None), (5000, 7)])
def test_every_token_is_predicted_exactly_once(context, stride):
    ids = np.arange(len(STREAM.tokens), dtype=np.uint32)  # each token its own name
    counted: Counter[int] = Counter()
    for batch in blocks(Stream(ids, np.array([0]), 1), context, stride):
        assert (batch.targets == batch.tokens + 1)[batch.weights > 0].all()
        counted.update(batch.targets[batch.weights > 0].tolist())
    assert counted == Counter(range(1, len(ids)))


def test_scoring_leaves_the_mode_alone_and_has_no_dropout():
    model = tiny.model(vocab_size=31, dropout=0.5)
    model.train()
    assert score(model, STREAM, 32) == score(model, STREAM, 32)
    assert model.training


def test_a_stride_gives_later_tokens_more_context():
    """With a text of one repeated block, a token is foreseeable once the window holds its block."""
    ids = np.tile(np.arange(8, dtype=np.uint16), 12)

    class Copies(torch.nn.Module):
        """Certain of the token 8 places back, where it sees one; else it takes every token for as likely."""

        def __init__(self) -> None:
            super().__init__()
            self.config = tiny.shape()
            self.head = LanguageHead(dataclasses.replace(tiny.shape(8), hidden_size=8))
            torch.nn.init.eye_(self.head.weight)

        def forward(self, tokens: torch.Tensor, segments: object = None) -> Output:
            made = torch.zeros(*tokens.shape, 8)
            made[:, 7:].scatter_(2, tokens[:, :-7, None], 100.0)
            return Output(made, ())

    stream = Stream(ids, np.array([0]), 1)
    last = len(ids) - 1
    blind = 7 * -(-last // 16)  # of each block's 16 places the first 7 see too little
    assert score(Copies(), stream, 16).loss == pytest.approx(math.log(8) * blind / last, rel=1e-5)  # type: ignore[arg-type]
    assert score(Copies(), stream, 16, stride=8).loss == pytest.approx(math.log(8) * 7 / last, rel=1e-5)  # type: ignore[arg-type]


def test_weights_that_are_not_finite_have_no_score():
    model = tiny.model(vocab_size=31)
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("nan")
    with pytest.raises(NotFinite):
        score(model, STREAM, 32)


def test_unigram_is_the_entropy_of_the_predicted_tokens():
    tokens = np.array([9, 1, 1, 2, 3], dtype=np.uint16)  # the first is never predicted
    made = unigram(Stream(tokens, np.array([0]), 6))
    assert made["loss"] == pytest.approx(0.5 * math.log(2) + 2 * 0.25 * math.log(4))
    assert made["bits_per_byte"] == pytest.approx(4 * 1.5 / 6)
    predicted = STREAM.tokens[1:].tolist()
    entropy = -sum(n / len(predicted) * math.log(n / len(predicted)) for n in Counter(predicted).values())
    assert unigram(STREAM)["loss"] == pytest.approx(entropy, rel=1e-9)


def test_a_model_that_knows_the_frequencies_scores_the_unigram_entropy():
    """Two ways to one figure: a model whose logits are the log frequencies."""
    model = tiny.model(vocab_size=31)
    counts = torch.tensor(np.bincount(STREAM.tokens[1:], minlength=31))

    class Frequencies(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = tiny.shape()
            self.head = LanguageHead(dataclasses.replace(tiny.shape(31), hidden_size=31))
            torch.nn.init.eye_(self.head.weight)

        def forward(self, tokens, segments=None):
            return Output(counts.double().log().float().clamp_min(-100.0).expand(*tokens.shape, 31), ())

    assert score(Frequencies(), STREAM, 32).loss == pytest.approx(unigram(STREAM)["loss"], abs=1e-5)
    assert score(model, STREAM, 32).loss != pytest.approx(unigram(STREAM)["loss"], abs=1e-2)


def test_xz_is_what_the_tool_needs():
    text = tiny.text(4000).encode()
    made = xz(text)
    assert made is not None
    file = lzma.LZMACompressor(format=lzma.FORMAT_XZ, preset=9 | lzma.PRESET_EXTREME)
    assert made["bytes"] == len(file.compress(text) + file.flush())
    assert made["bits_per_byte"] == pytest.approx(made["bytes"] * 8 / 4000)
    assert xz(b"") is None


def test_a_passage_has_the_text_of_its_ids_and_the_loss_of_each_token(model):
    """Windows that overlap by half, as `score` has them with that stride."""
    stream, tokenizer = tiny.stream(documents=8, characters=400), tiny.tokenizer()
    pieces = passage(model, stream, tokenizer, context=32)
    ids = stream.tokens[: PASSAGE + 1].tolist()
    losses = [loss for _, own in pieces for loss in own]
    assert "".join(text for text, _ in pieces) == tokenizer.decode(ids)
    assert len(ids) == PASSAGE + 1 and len(losses) == PASSAGE and pieces[0][1] == []
    nats, tokens = by_hand(model, Stream(stream.tokens[: PASSAGE + 1], stream.documents, 1), 32, 16)
    assert sum(losses) == pytest.approx(nats, abs=0.0005 * tokens)


def test_a_passage_never_shows_half_a_character():
    tokenizer = Tokenizer.of_bytes()
    text = "宝玉 sang é🙂"
    ids = np.array(tokenizer.encode(text), dtype=np.uint16)
    pieces = passage(tiny.model(vocab_size=len(tokenizer)), Stream(ids, np.array([0]), 0), tokenizer, context=8)
    assert [piece for piece, _ in pieces] == list(text)
    assert [len(losses) for _, losses in pieces] == [2, 3, 1, 1, 1, 1, 1, 1, 2, 4]


def test_a_text_of_one_token_is_a_passage_without_losses(model):
    stream = Stream(np.array([3], dtype=np.uint16), np.array([0]), 1)
    assert [losses for _, losses in passage(model, stream, tiny.tokenizer(), context=8)] == [[]]


@given(
    nats=st.floats(0, 1e6), kept=st.integers(1, 10**6), lost=st.integers(0, 10**6), more=st.integers(0, 10**6),
    cost=st.floats(0, 1e5),
)  # fmt: skip
def test_losing_more_of_a_text_never_lowers_bits_per_byte(nats, kept, lost, more, cost):
    """Whatever a model needs for what comes back, and for the tokens that stand for what does not."""
    before = bits_per_byte(nats, kept + lost, lost)
    assert bits_per_byte(nats + cost, kept + lost + more, lost + more) >= before * (1 - 1e-12)
    assert bits_per_byte(nats, kept, 0) == nats / math.log(2) / kept  # and to the bit where nothing is lost
    assert charge(nats, kept + lost, lost) >= 8


def test_what_is_lost_is_charged_on_top_and_the_loss_stays(model):
    made = score(model, dataclasses.replace(STREAM, bytes=STREAM.bytes + 100, lost_bytes=100), 32)
    plain = score(model, STREAM, 32)
    assert (made.loss, made.tokens, made.lost_bytes) == (plain.loss, plain.tokens, 100)
    bits = plain.bits_per_byte * STREAM.bytes
    assert bits < 8 * STREAM.bytes
    assert made.bits_per_byte == pytest.approx((bits + 800) / (STREAM.bytes + 100))
    simple = unigram(dataclasses.replace(STREAM, bytes=STREAM.bytes + 100, lost_bytes=100))["bits_per_byte"]
    assert simple * (STREAM.bytes + 100) == pytest.approx(unigram(STREAM)["bits_per_byte"] * STREAM.bytes + 800)
