"""A look at a part of a text tells its size."""

import gzip
import json

import pytest
import tiny

from gptworks.core.config import Data
from gptworks.core.config import Tokenizer as TokenizerConfig
from gptworks.core.errors import DataError
from gptworks.data import glance as module
from gptworks.data.glance import glance
from gptworks.data.shards import prepare
from gptworks.data.tokenizer import usual_vocabulary

BPE = TokenizerConfig(vocab_size=300)


def test_a_small_text_is_read_whole_and_counted_as_its_shards_are(tmp_path):
    (tmp_path / "a.txt").write_text(tiny.text(6 * 5000))
    data = Data(train=str(tmp_path / "a.txt"))
    seen, made = glance(data, BPE), prepare(data, BPE, tmp_path / "shards")
    assert seen.complete and seen.vocabulary == 300
    assert seen.train_bytes + seen.eval_bytes == made.train.bytes + made.eval.bytes
    assert seen.train_tokens == pytest.approx(len(made.train.tokens), rel=0.02)
    assert seen.eval_tokens == pytest.approx(len(made.eval.tokens), rel=0.05)


@pytest.fixture
def little(monkeypatch):
    """A look so short that a test's text is longer."""
    monkeypatch.setattr(module, "SAMPLED", 40_000)


@pytest.mark.usefixtures("little")
@pytest.mark.parametrize("form", ["txt", "many", "gz", "jsonl"])
def test_a_part_tells_the_size_of_the_whole(tmp_path, form):
    texts = [tiny.text(700_000, seed) for seed in range(12)]
    size = sum(map(len, texts))
    if form == "many":
        for number, text in enumerate(texts):
            (tmp_path / f"{number}.txt").write_text(text)
        place = tmp_path
    elif form == "gz":
        place = tmp_path / "a.txt.gz"
        place.write_bytes(gzip.compress("".join(texts).encode()))
    elif form == "jsonl":
        place = tmp_path / "a.jsonl"
        place.write_text("".join(json.dumps({"text": text, "id": "x" * 300}) + "\n" for text in texts))
    else:
        place = tmp_path / "a.txt"
        place.write_text("".join(texts))
    seen = glance(Data(train=str(place), eval_bytes=20_000), BPE)
    assert not seen.complete and seen.sample_bytes <= 40_000
    assert seen.train_bytes + seen.eval_bytes == pytest.approx(size, rel=0.15)
    assert seen.eval_bytes == 20_000


def test_a_held_out_text_is_looked_at_too(tmp_path):
    (tmp_path / "a.txt").write_text(tiny.text(6 * 4000))
    (tmp_path / "b.txt").write_text(tiny.text(6 * 1000, 1))
    seen = glance(Data(train=str(tmp_path / "a.txt"), eval=str(tmp_path / "b.txt")), BPE)
    assert seen.train_bytes == (tmp_path / "a.txt").stat().st_size
    assert seen.eval_bytes == (tmp_path / "b.txt").stat().st_size


def test_a_text_that_is_none_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="no text"):
        glance(Data(train=str(tmp_path / "empty.txt")), BPE)
    with pytest.raises(DataError, match="no such file"):
        glance(Data(train=str(tmp_path / "none.txt")), BPE)


def test_a_function_is_asked_for_a_few_documents_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SAMPLED", 1000)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def endless():\n    while True:\n        yield 'the sea ' * 30\n")
    assert not glance(Data(train="mine.py:endless"), BPE).complete


def test_the_vocabulary_grows_with_the_text_and_stays_where_it_is_asked_for(tmp_path):
    sizes = [usual_vocabulary(10**power) for power in range(3, 12)]
    assert sizes == sorted(sizes) and sizes[0] == 512 and sizes[-1] <= 65536
    assert usual_vocabulary(0) == usual_vocabulary(9_000_000) == 4096
    (tmp_path / "a.txt").write_text(tiny.text(6 * 5000))
    data = Data(train=str(tmp_path / "a.txt"))
    assert glance(data, TokenizerConfig()).vocabulary == usual_vocabulary((tmp_path / "a.txt").stat().st_size)
    assert glance(data, TokenizerConfig(kind="char")).vocabulary is None


def test_many_small_files_fill_the_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SAMPLED", 100_000)
    for number in range(300):
        (tmp_path / f"{number}.txt").write_text(tiny.text(10 if number % 3 else 3000, number))
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    seen = glance(Data(train=str(tmp_path)), BPE)
    assert seen.sample_bytes > 90_000 and not seen.complete
    assert seen.train_bytes + seen.eval_bytes == pytest.approx(size, rel=0.1)
    assert seen.seconds < 30


@pytest.mark.parametrize("text", ["a", "  "])
def test_too_little_text_for_both_splits_is_refused(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(DataError, match="no text for the eval split"):
        glance(Data(train=str(tmp_path / "a.txt")), BPE)
