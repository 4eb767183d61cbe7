"""Order and packing are pure functions of (seed, epoch); every token is predicted once."""

import hashlib
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import examples

from gptworks.core.errors import DataError, RunMismatch
from gptworks.data.batch import Batch, Cursor
from gptworks.data.loader import Loader, Mixture, Plan, best_fit, blocks, plan_epoch
from gptworks.data.shards import SourceCount, Stream
from gptworks.data.tokenizer import Tokenizer

EOS = 0


def stream_of(sizes: list[int]) -> Stream:
    """Documents of so many tokens; every token but the start token is its own position, so that it can be found."""
    total = sum(sizes)
    tokens = np.arange(total, dtype=np.uint32)
    starts = np.cumsum([0, *sizes[:-1]])
    return Stream(tokens, starts.astype(np.int64), total)


SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=40).filter(lambda sizes: sum(sizes) >= 2)


def pieces_of(plan: Plan) -> list[tuple[int, int]]:
    return list(zip(plan.starts.tolist(), plan.lengths.tolist(), strict=True))


@given(sizes=SIZES, context=st.integers(2, 30), seed=st.integers(0, 5), epoch=st.integers(0, 5))
@settings(max_examples=examples(300), deadline=None)
def test_every_position_is_an_input_once_an_epoch(sizes: list[int], context: int, seed: int, epoch: int) -> None:
    stream = stream_of(sizes)
    plan = plan_epoch(stream, context, seed, epoch)
    covered = sorted(position for start, length in pieces_of(plan) for position in range(start, start + length))
    assert covered == list(range(sum(sizes) - 1))
    fill = [int(plan.lengths[a:b].sum()) for a, b in pairwise(plan.offsets)]
    assert min(fill) > 0 and max(fill) <= context
    assert plan.offsets[-1] == len(plan.starts)


@given(sizes=SIZES, context=st.integers(2, 30))
@settings(max_examples=examples(200), deadline=None)
def test_a_document_that_fits_a_row_is_never_cut(sizes: list[int], context: int) -> None:
    stream = stream_of(sizes)
    starts = stream.documents.tolist()
    lengths = dict(zip(starts, sizes, strict=True))
    lengths[starts[-1]] -= 1  # the last token has nothing to predict
    plan = plan_epoch(stream, context, 1, 0)
    found = pieces_of(plan)
    for start, length in lengths.items():
        if 0 < length <= context:
            assert (start, length) in found
    assert plan.cut_documents == sum(length > context for length in lengths.values())
    for start, length in found:  # no piece crosses into the next document
        begin = max(s for s in starts if s <= start)
        assert start + length <= begin + lengths[begin]


def test_an_epoch_is_a_function_of_seed_and_number() -> None:
    stream = stream_of([5, 50, 17, 3, 90, 8] * 10)
    same = plan_epoch(stream, 16, 7, 2), plan_epoch(stream, 16, 7, 2)
    assert pieces_of(same[0]) == pieces_of(same[1])
    assert same[0].offsets.tolist() == same[1].offsets.tolist()
    others = [plan_epoch(stream, 16, 7, 3), plan_epoch(stream, 16, 8, 2)]
    assert all(pieces_of(other) != pieces_of(same[0]) for other in others)


def test_long_documents_are_cut_elsewhere_in_another_epoch() -> None:
    stream = stream_of([1000])
    cuts = [frozenset(plan_epoch(stream, 32, 1, epoch).starts.tolist()) for epoch in range(20)]
    assert len(set(cuts)) > 10


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=80))
@settings(max_examples=examples(200), deadline=None)
def test_best_fit_never_overfills_and_leaves_no_two_rows_that_would_fit_one(lengths: list[int]) -> None:
    rows, count = best_fit(lengths, 20)
    fill = np.bincount(rows, weights=lengths, minlength=count)
    assert fill.max() <= 20 and fill.min() > 0 and len(fill) == count
    half_empty = sorted(fill)[:2]
    assert count == 1 or sum(half_empty) > 20


def test_best_fit_packs_exactly_where_that_is_possible() -> None:
    rows, count = best_fit([7, 3, 6, 4, 5, 5, 10], 10)
    assert count == 4 and sorted(np.bincount(rows, weights=[7, 3, 6, 4, 5, 5, 10])) == [10, 10, 10, 10]


@pytest.mark.parametrize("median", [30, 150, 700])
def test_packing_wastes_under_two_percent(median: int) -> None:
    """Lengths as of real corpora: log-normal, from a line to many rows."""
    draw = np.random.default_rng(0)
    sizes = np.clip(draw.lognormal(np.log(median), 1.0, 3000), 4, 50_000).astype(int).tolist()
    plan = plan_epoch(stream_of(sizes), 256, 1, 0)
    assert 1 - plan.lengths.sum() / (len(plan) * 256) < 0.02


def loader(sizes: list[int], context: int = 16, rows: int | None = 3, **options: object) -> Loader:
    return Loader(stream_of(sizes), context, rows, 5, **options)  # type: ignore[arg-type]


def rows_of(batch: Batch) -> list[tuple[list[int], list[int], list[float]]]:
    return [
        (batch.tokens[i].tolist(), batch.targets[i].tolist(), batch.weights[i].tolist())
        for i in range(len(batch.tokens))
    ]


def test_a_batch_holds_inputs_their_next_tokens_and_no_more() -> None:
    made = loader([5, 40, 9, 3, 70])
    cursor, seen = Cursor(), []
    while cursor.epoch == 0:
        batch, cursor = made.take(cursor)
        for tokens, targets, weights in rows_of(batch):
            for token, target, weight in zip(tokens, targets, weights, strict=True):
                if weight:
                    assert (weight, target) == (1.0, token + 1)  # each token is its own position
                    seen.append(token)
                else:
                    assert (token, target) == (0, 0)
    first_epoch = 5 + 40 + 9 + 3 + 70 - 1
    assert sorted(seen[:first_epoch]) == list(range(first_epoch))


def straight(made: Loader, number: int) -> tuple[list[Batch], list[Cursor]]:
    batches, cursors = [], [Cursor()]
    for _ in range(number):
        batch, cursor = made.take(cursors[-1])
        batches.append(batch)
        cursors.append(cursor)
    return batches, cursors


def test_from_any_cursor_on_the_sequence_is_that_of_a_straight_run() -> None:
    sizes = [5, 40, 9, 3, 70, 22]
    batches, cursors = straight(loader(sizes), 25)
    assert cursors[-1].epoch >= 2
    for start in range(25):
        fresh = loader(sizes)  # another process
        batch, after = fresh.take(cursors[start])
        assert after == cursors[start + 1]
        assert rows_of(batch) == rows_of(batches[start])


def test_batch_size_changes_the_grouping_not_the_order() -> None:
    sizes = [5, 40, 9, 3, 70, 22]
    singles, _ = straight(loader(sizes, rows=1), 12)
    groups, _ = straight(loader(sizes, rows=4), 3)
    assert [row for batch in singles for row in rows_of(batch)] == [row for batch in groups for row in rows_of(batch)]


def test_full_batches_are_whole_epochs() -> None:
    made = loader([5, 40, 9, 3, 70], rows=None)
    batches, cursors = straight(made, 3)
    assert cursors == [Cursor(epoch, 0) for epoch in range(4)]
    for epoch, batch in enumerate(batches):
        assert len(batch.tokens) == len(made.plan(epoch))
        assert batch.weights.sum() == 126


def test_the_last_batch_of_the_last_epoch_is_short() -> None:
    made = loader([5, 40, 9, 3, 70], rows=4, max_epochs=2)
    total = made.rows_in(2)
    assert total == len(made.plan(0)) + len(made.plan(1)) and total % 4
    cursor, sizes, weight = Cursor(), [], 0.0
    while cursor.epoch < 2:
        batch, cursor = made.take(cursor)
        sizes.append(len(batch.tokens))
        weight += float(batch.weights.sum())
    assert sizes == [4] * (total // 4) + [total % 4]
    assert weight == 2 * 126
    assert cursor == Cursor(2, 0)


def test_rows_of_a_part_of_an_epoch() -> None:
    made = loader([50] * 20)
    whole = len(made.plan(0))
    assert made.rows_in(1) == whole and made.rows_in(0.5) == round(whole / 2)
    assert made.rows_in(1.25) == whole + round(len(made.plan(1)) / 4)


def test_segments_number_the_pieces_of_a_row() -> None:
    made = loader([5, 3, 4, 9, 2, 40], mask_documents=True)
    starts = made.stream.documents.tolist()
    batch, _ = made.take(Cursor())
    assert batch.segments is not None
    for tokens, weights, segments in zip(batch.tokens, batch.weights, batch.segments, strict=True):
        used = int(weights.sum())
        steps = torch.diff(segments[:used])
        for i, step in enumerate(steps.tolist()):
            joined = tokens[i + 1] == tokens[i] + 1 and int(tokens[i + 1]) not in starts
            assert step == (0 if joined else 1)
        assert segments[0] == 0 and (segments[used:] == segments[used - 1] + 1).all()  # padding stands alone
    assert loader([5, 3, 4, 9, 2, 40]).take(Cursor())[0].segments is None


def test_micro_batches_are_the_batch() -> None:
    batch, _ = loader([50] * 20, rows=7, mask_documents=True).take(Cursor())
    parts = list(batch.rows(3))
    assert [len(part.tokens) for part in parts] == [3, 3, 1]
    for name in ("tokens", "targets", "weights", "segments"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))


def test_report_says_what_was_cut() -> None:
    assert "2 documents longer than a row were cut, no token dropped" in loader([5, 40, 9, 3, 70]).report()
    assert "1 document longer than a row was cut, no token dropped" in loader([5, 40, 9, 3]).report()


def test_the_order_of_unweighted_text_is_what_it_has_always_been() -> None:
    """A run that was begun by an older version goes on with the same rows."""
    known = {(1, 0): "71a3424c1a967199", (1, 1): "7880c446acc89a1e", (7, 3): "85c3df66d86dd80d"}
    stream = stream_of([(i * i * 7919 + 13) % 97 + 1 for i in range(300)])
    for (seed, epoch), digest in known.items():
        plan = plan_epoch(stream, 32, seed, epoch)
        parts = [np.asarray(part, dtype="<i8").tobytes() for part in (plan.starts, plan.lengths, plan.offsets)]
        assert hashlib.sha256(b"".join(parts)).hexdigest()[:16] == digest


# -- weighted sources --------------------------------------------------------------------------------------------


def corpus_of(*sources: list[int]) -> Stream:
    """As `stream_of`, of several sources."""
    whole = stream_of([size for source in sources for size in source])
    parts = tuple(SourceCount(f"s{i}", len(source), sum(source), sum(source)) for i, source in enumerate(sources))
    return Stream(whole.tokens, whole.documents, whole.bytes, parts)


SOURCES = st.lists(st.lists(st.integers(2, 60), min_size=1, max_size=12), min_size=1, max_size=5)
WEIGHTS = st.sampled_from([1.0, 0.1, 0.7, 3.0, 0.01, 12.5])


def inputs_of(plan: Plan) -> np.ndarray:
    """Every position that is an input in an epoch, as often as it is."""
    empty = [np.empty(0, dtype=np.int64)]
    return np.concatenate([np.arange(start, start + length) for start, length in pieces_of(plan)] or empty)


@given(sources=SOURCES, data=st.data(), context=st.integers(2, 30), seed=st.integers(0, 3))
@settings(max_examples=examples(50), deadline=None)
def test_a_source_gives_its_share_and_no_token_twice_before_all_came_once(
    sources: list[list[int]], data: st.DataObject, context: int, seed: int
) -> None:
    stream = corpus_of(*sources)
    weights = [data.draw(WEIGHTS) for _ in sources]
    mixture = Mixture(stream, context, seed, weights)
    total = sum(map(sum, sources)) - 1
    bounds = np.cumsum([0, *map(sum, sources)])
    bounds[-1] -= 1
    times = np.zeros(total, dtype=np.int64)
    for epoch in range(4):
        plan = plan_epoch(stream, context, seed, epoch, mixture)
        fill = [int(plan.lengths[a:b].sum()) for a, b in pairwise(plan.offsets)]
        assert min(fill) > 0 and max(fill) <= context
        np.add.at(times, inputs_of(plan), 1)
        assert mixture.consumed(epoch + 1).tolist() == [int(times[a:b].sum()) for a, b in pairwise(bounds)]
        for number, (a, b) in enumerate(pairwise(bounds)):
            share = Fraction(repr(weights[number])) / sum(Fraction(repr(weight)) for weight in weights)
            asked = (epoch + 1) * share * total
            assert asked - 1 < times[a:b].sum() < asked + context
            assert times[a:b].max() - times[a:b].min() <= 1


@given(sources=SOURCES, context=st.integers(2, 30))
@settings(max_examples=examples(50), deadline=None)
def test_pieces_of_a_mixture_keep_to_their_document(sources: list[list[int]], context: int) -> None:
    stream = corpus_of(*sources)
    mixture = Mixture(stream, context, 1, [1.0 + number for number in range(len(sources))])
    ends = np.append(stream.documents[1:], len(stream.tokens) - 1)
    whole = set(zip(stream.documents.tolist(), (ends - stream.documents).tolist(), strict=True))
    for start, length in pieces_of(plan_epoch(stream, context, 1, 2, mixture)):
        document = int(np.searchsorted(stream.documents, start, side="right")) - 1
        assert start + length <= ends[document] and length <= context
        if ends[document] - stream.documents[document] <= context:
            assert (start, length) in whole  # a document that fits a row is never cut


@given(sources=SOURCES, data=st.data(), rows=st.integers(1, 7), weighted=st.booleans())
@settings(max_examples=examples(60), deadline=None)
def test_shares_count_the_rows_that_were_consumed(
    sources: list[list[int]], data: st.DataObject, rows: int, weighted: bool
) -> None:
    stream = corpus_of(*sources)
    weights = [data.draw(WEIGHTS) for _ in sources] if weighted else None
    made = Loader(stream, 16, rows, 5, weights=weights)
    bounds = np.cumsum([0, *map(sum, sources)])
    cursor, seen = Cursor(), np.zeros(len(sources), dtype=np.int64)
    for _ in range(data.draw(st.integers(1, 12))):
        batch, cursor = made.take(cursor)
        positions = batch.tokens[batch.weights > 0].numpy()
        seen += np.histogram(positions, bounds)[0]
    found = Loader(stream, 16, rows, 5, weights=weights).sources(cursor)
    assert [row["inputs"] for row in found] == seen.tolist()
    assert [row["path"] for row in found] == [part.path for part in stream.sources]
    assert sum(row["achieved"] for row in found) == pytest.approx(1)
    assert sum(row["asked"] for row in found) == pytest.approx(1)
    sizes = np.diff(bounds) - (np.arange(len(sources)) == len(sources) - 1)
    assert [row["passes"] for row in found] == pytest.approx((seen / sizes).tolist())


def test_shares_of_many_epochs_are_counted_without_planning_them(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = corpus_of([30] * 100, [7] * 50, [200] * 3)
    made = Loader(stream, 16, 4, 1, weights=[0.5, 0.3, 0.2])
    monkeypatch.setattr(made, "plan", None)
    passes = 0
    whole = Mixture._pass

    def counted(*arguments: int) -> object:
        nonlocal passes
        passes += 1
        return whole(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Mixture, "_pass", counted)
    found = made.sources(Cursor(10**6, 0))
    assert passes <= 3
    assert [row["achieved"] for row in found] == pytest.approx([0.5, 0.3, 0.2], abs=1e-6)


def test_a_mixture_is_a_function_of_seed_and_epoch_and_of_the_ratio_of_weights() -> None:
    stream = corpus_of([5, 50, 17] * 10, [3, 90, 8] * 10)

    def rows(seed: int, epoch: int, *weights: float) -> list[tuple[int, int]]:
        return pieces_of(plan_epoch(stream, 16, seed, epoch, Mixture(stream, 16, seed, weights)))

    assert rows(7, 2, 0.7, 0.3) == rows(7, 2, 0.7, 0.3) == rows(7, 2, 7, 3)
    assert rows(7, 2, 0.7, 0.3) != rows(7, 3, 0.7, 0.3) != rows(8, 3, 0.7, 0.3)


def test_a_weighted_run_goes_on_from_any_cursor() -> None:
    stream = corpus_of([5, 40, 9] * 3, [3, 70, 22])
    batches, cursors = straight(Loader(stream, 16, 3, 5, weights=[0.9, 0.1]), 25)
    assert cursors[-1].epoch >= 2
    for start in range(25):
        batch, after = Loader(stream, 16, 3, 5, weights=[0.9, 0.1]).take(cursors[start])
        assert after == cursors[start + 1] and rows_of(batch) == rows_of(batches[start])


def test_sources_are_mixed_throughout_an_epoch() -> None:
    stream = corpus_of([40] * 200, [40] * 50)
    made = Loader(stream, 16, 8, 1, weights=[0.5, 0.5])
    boundary, shares, cursor = 200 * 40, [], Cursor()
    while cursor.epoch == 0:
        batch, cursor = made.take(cursor)
        shares.append(float((batch.tokens[batch.weights > 0] < boundary).float().mean()))
    quarters = [np.mean(part) for part in np.array_split(shares, 4)]
    assert all(0.4 < share < 0.6 for share in quarters)


def test_one_source_has_all_of_it_and_a_hundred_share() -> None:
    alone = Loader(corpus_of([5, 40, 9]), 16, 2, 1, weights=[0.3])
    assert sorted(inputs_of(alone.plan(0)).tolist()) == sorted(inputs_of(alone.plan(1)).tolist()) == list(range(53))
    many = Loader(corpus_of(*[[20 + i] for i in range(100)]), 16, 2, 1, weights=[1.0 + i for i in range(100)])
    for row in many.sources(Cursor(50, 0)):
        assert row["achieved"] == pytest.approx(row["asked"], abs=1e-3)


def test_a_tiny_weight_is_served_in_the_end() -> None:
    made = Loader(corpus_of([30] * 100, [30] * 100), 16, 2, 1, weights=[1, 1e-5])
    assert made.sources(Cursor(1, 0))[1]["inputs"] == 0
    assert 0 < made.sources(Cursor(100, 0))[1]["achieved"] < 1e-4


def test_a_source_too_small_for_its_weight_and_foreign_shards_are_refused() -> None:
    with pytest.raises(DataError, match=r"s1: 3 tokens are too few for 50\.00%.* more than 1,000 times"):
        Loader(corpus_of([100] * 100, [3], [5]), 16, 2, 1, weights=[0.25, 0.5, 0.25])
    with pytest.raises(RunMismatch, match="1 sources and data.train weights 2"):
        Loader(corpus_of([100]), 16, 2, 1, weights=[1, 1])


def test_the_mixture_of_the_first_epoch_is_told() -> None:
    made = Loader(corpus_of([10] * 100, [10] * 300), 16, 2, 1, weights=[3, 1])
    first, second = made.mixture_report()
    assert " ".join(first.split()) == "s0 asked 75.00%, achieved 75.00%, 3.00 passes an epoch"
    assert "0.33 passes" in second
    assert Loader(corpus_of([10], [20]), 16, 2, 1).mixture_report() == []


def test_a_row_is_shown_as_a_person_reads_it() -> None:
    tokenizer = Tokenizer.train_characters("abcde \n\u202e")
    start = tokenizer.start_id
    texts = ["a\nb", "c\u202ed", "e" * 500]
    ids = [i for text in texts for i in (start, *tokenizer.encode(text))]
    starts = np.cumsum([0, *(len(text) + 1 for text in texts[:-1])])
    shown = Loader(Stream(np.array(ids), starts, 0), 600, 1, 1).look(tokenizer)
    assert "\n" not in shown and len(shown) <= 250
    assert shown == "row 1 begins: " + "e" * 200 or " ‖ " in shown
    short = Loader(Stream(np.array(ids[:8]), starts[:2], 0), 10, 1, 1).look(tokenizer)
    assert set(short.removeprefix("row 1 begins: ").split(" ‖ ")) == {"a\\nb", "c\\u202e"}  # the last predicts nothing


@given(total=st.integers(2, 200), context=st.integers(1, 40), data=st.data())
@settings(max_examples=examples(300), deadline=None)
def test_evaluation_predicts_every_token_once(total: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.none() | st.integers(1, context))
    seen: list[int] = []
    for batch in blocks(stream_of([total]), context, stride):
        assert batch.tokens.shape == (1, context)
        used = [
            (int(t), int(n), i)
            for i, (t, n, w) in enumerate(zip(batch.tokens[0], batch.targets[0], batch.weights[0], strict=True))
            if w
        ]
        assert used and all(target == token + 1 for token, target, _ in used)
        if stride and seen:
            assert used[0][2] >= min(context - stride, used[0][0])  # the context that the window promises
        seen += [target for _, target, _ in used]
    assert seen == list(range(1, total))


def test_a_run_made_longer_has_no_short_batches_but_where_it_was_to_end() -> None:
    """Begun for one epoch, eight rows a batch, and then told to go on."""
    begun = loader([16] * 11, rows=8, max_epochs=1)
    assert 8 < len(begun.plan(0)) < 16
    sizes, cursor = [], Cursor()
    while cursor.epoch < 4:
        batch, cursor = begun.take(cursor)
        sizes.append(len(batch.tokens))
    assert sizes[:2] == [8, len(begun.plan(0)) - 8] and set(sizes[2:]) == {8}
