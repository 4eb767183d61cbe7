"""Two models on one text: pairs that both tokenizers have whole, and an interval that holds what it promises."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import examples
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from gptworks import lifecycle
from gptworks.core.config import Data
from gptworks.core.errors import DataError
from gptworks.data.shards import encode_documents, read_documents
from gptworks.data.text import safe_places
from gptworks.data.tokenizer import PATTERNS, Tokenizer
from gptworks.infer import comparison
from gptworks.infer.comparison import bits_before, compare, cut, student
from gptworks.infer.scoring import stream_losses
from gptworks.model.build import Loaded
from gptworks.model.transformer import Output

# -- the interval ----------------------------------------------------------------------------------------------------


def ends(per_pair: np.ndarray, sizes: np.ndarray, pieces: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Running totals at the places of a text whose pairs have these differences and sizes, cut into more pieces."""
    assert (sizes >= comparison.PAIR_BYTES).all()
    steps = np.arange(1, pieces + 1) / pieces
    fine = [np.append(0, np.cumsum(values))[:-1, None] + values[:, None] * steps for values in (per_pair, sizes)]
    return fine[0].ravel(), fine[1].ravel()


def compared(d: np.ndarray, x: np.ndarray) -> comparison.Difference:
    bits, sizes = ends(d, x)
    other = np.sin(np.arange(len(bits)))  # whatever the second model needs, the first needs that and `d`
    return compare(bits + other, other, sizes)


def test_with_equal_pairs_it_is_the_paired_t_test() -> None:
    stats = pytest.importorskip("scipy.stats")
    draw = np.random.default_rng(0)
    for n in (10, 13, 16):
        one, two = draw.gamma(2, 900, (2, n))
        theirs = stats.ttest_rel(one / 2000, two / 2000).confidence_interval(0.95)
        made = compared(one - two, np.full(n, 2000))
        assert made.pairs == n and made.interval == pytest.approx(tuple(theirs), rel=1e-4)
    stretches = draw.gamma(2, 900, (16, 5))  # more pairs than 16: neighbours are taken together
    theirs = stats.ttest_1samp(stretches.sum(1) / 10_000, 0).confidence_interval(0.95)
    made = compared(stretches.ravel(), np.full(80, 2000))
    assert made.pairs == 80 and made.interval == pytest.approx(tuple(theirs), rel=1e-4)


def test_the_quantiles_are_those_of_student() -> None:
    table = {9: 2.262157, 10: 2.228139, 15: 2.131450, 30: 2.042272, 120: 1.979930}  # of every book
    for freedom, value in table.items():
        assert student(0.975, freedom) == pytest.approx(value, rel=1e-5)
    stats = pytest.importorskip("scipy.stats")
    for freedom in range(9, 200):
        assert student(0.975, freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-5)


@pytest.mark.parametrize(("pairs", "carried"), [(10, 0.0), (50, 0.0), (300, 0.0), (300, 0.4)])
def test_the_interval_covers_the_true_difference(pairs: int, carried: float) -> None:
    """Of skewed differences that grow with the pair's size, each with a share of what the pair before it had."""
    draw, truth, repeats = np.random.default_rng(pairs), 0.05, 1500
    covered = 0
    for _ in range(repeats):
        x = draw.integers(2000, 2600, pairs)
        noise = draw.gamma(2, 1, pairs + 50) - 2
        for i in range(1, pairs + 50):
            noise[i] += carried * noise[i - 1]
        low, high = compared(x * (truth + 0.1 * noise[50:]), x).interval or (1, 0)
        covered += low <= truth <= high
    assert 0.92 < covered / repeats < 0.97


def test_the_estimate_is_the_difference_of_both_totals() -> None:
    draw = np.random.default_rng(1)
    d, x = draw.normal(100, 50, 33), draw.integers(2000, 9000, 33)
    made = compared(d, x)
    assert made.bits_per_byte == pytest.approx(d.sum() / x.sum(), rel=1e-12)
    low, high = made.interval or (0, 0)
    assert (low + high) / 2 == pytest.approx(made.bits_per_byte)


def test_few_pairs_have_no_interval() -> None:
    made = compared(np.full(9, 100.0), np.full(9, 2000))
    assert (made.pairs, made.interval) == (9, None)
    found = made.as_dict("one", "other")
    assert found["interval"] is None and found["better"] is None and "10 pairs" in found["reason"]


@pytest.mark.parametrize(("shift", "better"), [(-200, "one"), (200, "other"), (0, None)])
def test_better_is_who_needs_fewer_bits_if_the_interval_leaves_out_zero(shift: float, better: str | None) -> None:
    d = np.random.default_rng(0).normal(shift, 300, 60)
    d += shift - d.mean()
    found = compared(d, np.full(60, 2000)).as_dict("one", "other")
    assert found["better"] == better
    assert found["reason"] == (None if better else "no difference shown")


def test_a_place_that_a_token_spans_ends_no_pair() -> None:
    bits, sizes = np.arange(1.0, 101.0), np.arange(1, 101) * 1000
    assert compare(bits, bits, sizes).pairs == 50
    spanned = np.where((sizes % 3000 == 0) | (sizes == 100_000), bits, np.nan)
    assert compare(bits, spanned, sizes).pairs == 33
    assert compare(spanned, bits, sizes).bits_per_byte == 0


# -- the pairs -------------------------------------------------------------------------------------------------------

TEXTS = st.lists(
    st.sampled_from(
        ["the sea", " was", " grey", ". ", "\n", "\n\n", "  ", "it's", " 12", " 红楼梦", "é", "A", " a", "xy "]
    ),
    max_size=60,
).map("".join)


def foreign() -> dict[str, Tokenizer]:
    """Tokenizers whose tokens may span a safe place, or whose ids of a piece depend on what is around it."""
    words = {w: i for i, w in enumerate(["?", "▁the", "▁sea", "▁was", "▁", "t", "h", "e", "s", "a", "w"])}
    metaspace = Backend(models.BPE(vocab=words, merges=[], unk_token="?", fuse_unk=True))
    metaspace.pre_tokenizer = pre_tokenizers.Metaspace()
    nfc = Backend.from_str(tiny_bpe("qwen2").backend.to_str())
    nfc.normalizer = normalizers.NFC()
    phrases = Backend.from_str(tiny_bpe("qwen2").backend.to_str())
    phrases.add_tokens([AddedToken("sea was", special=False), AddedToken("\nthe", special=False)])
    whole = Backend(models.WordLevel({"?": 0}, unk_token="?"))  # one token a document
    return {name: Tokenizer(b, {}) for name, b in
            {"metaspace": metaspace, "nfc": nfc, "phrases": phrases, "whole": whole}.items()}  # fmt: skip


def tiny_bpe(pattern: str) -> Tokenizer:
    return Tokenizer.train_bpe([tiny.text(3000) + " it's 红楼梦 é\n\n" * 5], 330, pattern)


TOKENIZERS = {pattern: tiny_bpe(pattern) for pattern in PATTERNS} | foreign()


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=TEXTS, apart=st.integers(1, 20))
@settings(max_examples=examples(60), deadline=None)
def test_marked_ids_are_those_of_the_whole_text(name: str, text: str, apart: int) -> None:
    """And the ids before a place, with those after it, are the tokens that the library puts there."""
    made = TOKENIZERS[name]
    places = list(safe_places(text, apart))
    assert all(b - a >= apart for a, b in zip([0, *places], places, strict=False))
    ids, before = made.encode_marked(text, places)
    made.backend.encode_special_tokens = True
    whole = made.backend.encode(text, add_special_tokens=False)
    assert ids.tolist() == whole.ids
    for place, count in zip(places, before.tolist(), strict=True):
        spans = [(start, end) for start, end in whole.offsets if start < place]
        assert count == (-1 if any(end > place for _, end in spans) else len(spans))


def test_some_places_are_spanned_and_most_are_not() -> None:
    text = tiny.text(5000)
    places = list(safe_places(text, 20))
    spanned = {name: (made.encode_marked(text, places)[1] < 0).mean() for name, made in TOKENIZERS.items()}
    assert len(places) > 100 and spanned["whole"] == 1
    assert 0 < spanned["phrases"] < 0.5 and 0 < spanned["metaspace"] < 0.5  # unknown letters are one token
    assert {spanned[name] for name in (*PATTERNS, "nfc")} == {0}


def test_pieces_are_cut_at_the_bytes_that_they_say() -> None:
    documents = [tiny.text(3000), "é" * 1500, "\n".join(["红楼梦。"] * 900)]
    places, sizes = cut(documents)
    assert len(places[0]) > 3 and places[1] == [] and len(places[2]) > 3
    expected, done = [], 0
    for document, within in zip(documents, places, strict=True):
        expected += [done + len(document[:place].encode()) for place in [*within, len(document)]]
        done = expected[-1]
    assert sizes.tolist() == expected


def test_a_long_text_without_a_break_is_cut_in_no_time() -> None:
    assert list(safe_places("红" * 3_000_000, 500)) == []
    assert len(list(safe_places("the sea\n" * 500_000, 500))) > 7000


# -- two models ------------------------------------------------------------------------------------------------------


def loaded(tokenizer: Tokenizer, seed: int, name: str, **parts: int) -> Loaded:
    return Loaded(Path(name), tiny.model(seed, len(tokenizer), **parts), tokenizer, (), {})


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "a.jsonl"
    documents = [tiny.text(size, seed) for seed, size in enumerate([9000, 40, 700, 30_000, 1])]
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


def test_bits_of_a_piece_are_those_of_its_tokens(text: Path) -> None:
    """Summed by hand, over the tokens that the library says lie in each piece."""
    documents = read_documents(str(text), Data())
    places, _ = cut(documents)
    made = loaded(tiny_bpe("qwen2"), 1, "one")
    stream, marks = encode_documents(documents, made.tokenizer, places)
    losses = np.concatenate(list(stream_losses(made.model, stream, 32, 8)))
    assert len(losses) == len(stream.tokens) - 1
    bits = np.diff(bits_before(losses, marks), prepend=0.0)
    index = piece = 0
    for document, within in zip(documents, places, strict=True):
        start, expected = index, [0.0] * (len(within) + 1)
        spans = made.tokenizer.backend.encode(document, add_special_tokens=False).offsets
        for position, (begin, _) in enumerate([(0, 0), *spans]):  # the start token is the first piece's
            which = int(np.searchsorted(within, begin, side="right")) if position else 0
            expected[which] += losses[start + position - 1] / math.log(2) if start + position else 0.0
        index += 1 + len(spans)
        assert bits[piece : piece + len(expected)] == pytest.approx(expected, rel=1e-6)
        piece += len(expected)
    assert piece == len(bits) and index == len(stream.tokens)


def test_models_with_other_tokenizers_are_compared_on_the_same_bytes(text: Path) -> None:
    one, other = loaded(tiny.tokenizer(), 1, "one"), loaded(tiny_bpe("llama-bpe"), 2, "other", context=64)
    found = lifecycle.evaluate(one, str(text), against=other)
    against = found["against"]
    assert found["method"] == "blocks of 32" and against["method"] == "blocks of 64"
    assert {key: against[key] for key in ("loss", "bits_per_byte", "tokens", "bytes")} == {
        key: lifecycle.evaluate(other, str(text))[key] for key in ("loss", "bits_per_byte", "tokens", "bytes")
    }
    difference = found["bits_per_byte"] - against["bits_per_byte"]
    assert against["difference_bits_per_byte"] == pytest.approx(difference, rel=1e-9)
    low, high = against["interval"]
    assert low < difference < high and 16 <= against["pairs"] <= 39741 // 2000
    assert against["better"] in ("one", "other") and against["reason"] is None
    mirrored = lifecycle.evaluate(other, str(text), against=one)["against"]
    assert mirrored["interval"] == pytest.approx([-high, -low]) and mirrored["better"] == against["better"]


def test_a_model_is_no_better_than_itself(text: Path) -> None:
    one = loaded(tiny_bpe("gpt-2"), 1, "one")
    found = lifecycle.evaluate(one, str(text), against=one)["against"]
    assert found["difference_bits_per_byte"] == 0 and found["interval"] == [0, 0] and found["better"] is None


def test_a_text_that_one_tokenizer_lacks_characters_for_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("THE SEA\n" * 900)
    with pytest.raises(DataError, match="not in this character-level vocabulary"):
        lifecycle.evaluate(loaded(tiny_bpe("gpt-2"), 1, "one"), str(tmp_path / "a.txt"), against=loaded(
            tiny.tokenizer(), 2, "other"
        ))  # fmt: skip


def test_a_better_model_is_found_better(text: Path) -> None:
    """The same model, once with its head made blunt."""
    sharp, blunt = loaded(tiny.tokenizer(), 1, "sharp"), loaded(tiny.tokenizer(), 1, "blunt")
    documents = read_documents(str(text), Data())
    stream, _ = encode_documents(documents, sharp.tokenizer)
    counts = torch.from_numpy(np.bincount(stream.tokens.astype(np.int64), minlength=len(sharp.tokenizer)) + 1.0)
    for each, strength in ((sharp, 1.0), (blunt, 0.9)):
        each.model.forward = lambda tokens, segments=None: Output(torch.ones(*tokens.shape, 1), ())  # type: ignore[method-assign]
        each.model.lm_head.weight = torch.nn.Parameter((strength * counts.log()).float()[:, None])
    assert lifecycle.evaluate(blunt, str(text), against=sharp)["against"]["better"] == "sharp"


# -- what a tokenizer loses ------------------------------------------------------------------------------------------


WORDS = pre_tokenizers.Split(Regex(r"\s"), "isolated")


def spaced() -> Tokenizer:
    """Letters, of which it leaves out those that it does not know."""
    backend = Backend(models.BPE(vocab={c: i for i, c in enumerate(["</s>", *tiny.ALPHABET])}, merges=[]))
    backend.pre_tokenizer = WORDS
    backend.decoder = decoders.Fuse()
    return Tokenizer(backend, {"eos_token": "</s>"})


def test_a_text_that_is_lost_makes_no_evaluation_better(tmp_path: Path) -> None:
    one = loaded(spaced(), 1, "one")
    scores, text = [], tiny.text(9000)
    for lost in (0, 300, 6000):
        (tmp_path / "a.txt").write_text(text + "你好" * (lost // 6) if lost else text)
        scores.append(lifecycle.evaluate(one, str(tmp_path / "a.txt")))
        assert scores[-1].lost_bytes == lost and scores[-1].bytes == 9000 + lost
    assert scores[0].loss == scores[1].loss == scores[2].loss
    assert scores[0].bits_per_byte < scores[1].bits_per_byte < scores[2].bits_per_byte
    bits = scores[0].bits_per_byte * 9000
    assert scores[2].bits_per_byte == pytest.approx((bits + 8 * 6000) / 15_000)
    (tmp_path / "a.txt").write_text("你好---你好")
    with pytest.raises(DataError, match="nothing of the text comes back"):
        lifecycle.evaluate(one, str(tmp_path / "a.txt"), separator="---")


def test_a_model_does_not_win_by_losing_text(tmp_path: Path) -> None:
    """Two models that are one, but for a tokenizer that leaves a third of the text out."""
    know = Backend(models.BPE(vocab={c: i for i, c in enumerate(["</s>", *tiny.ALPHABET, *"你好"])}, merges=[]))
    know.decoder, know.pre_tokenizer = decoders.Fuse(), WORDS
    whole = Loaded(Path("whole"), tiny.model(1, 33), Tokenizer(know, {"eos_token": "</s>"}), (), {})
    lossy = Loaded(Path("lossy"), tiny.model(1, 33), spaced(), (), {})
    for each in (whole, lossy):  # every token costs the same
        each.model.forward = lambda tokens, segments=None: Output(torch.ones(*tokens.shape, 1), ())  # type: ignore[method-assign]
        each.model.lm_head.weight = torch.nn.Parameter(torch.ones(33, 1))
    (tmp_path / "a.txt").write_text("".join(tiny.text(500, seed) + "你好" * 40 + "\n" for seed in range(60)))
    made = lifecycle.evaluate(lossy, str(tmp_path / "a.txt"), against=whole)
    against = made.against
    assert against is not None and (made.lost_bytes, against.lost_bytes) == (60 * 240, 0)
    assert made.bits_per_byte - against.bits_per_byte == pytest.approx(against.difference_bits_per_byte, rel=1e-9)
    assert against.better == "whole"
