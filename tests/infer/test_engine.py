"""Generation: what comes out, when it stops, and that text arrives whole."""

import numpy as np
import pytest
import tiny
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from gptworks.core.errors import DataError
from gptworks.data.tokenizer import Tokenizer
from gptworks.infer import engine as generation
from gptworks.infer.engine import Decoding, Engine, Generation
from gptworks.infer.sampling import Sampling, choose
from gptworks.model.transformer import Output

GREEDY = Sampling(temperature=0)
SCRIPTS = "déjà vu, 红楼梦：满纸荒唐言 🎉👩‍👧 привет мир, नमस्ते दुनिया, こんにちは, مرحبا 𝔘𝔫𝔦 end"


class Scripted(torch.nn.Module):
    """A model that says `script`, whatever it is asked; a full context does not stop it."""

    def __init__(self, script: list[int], limit: int = 64) -> None:
        super().__init__()
        self.script, self.said, self.weight = script, 0, torch.nn.Parameter(torch.zeros(1))
        self.config = tiny.shape(1000, limit)
        self.heard: list[list[int]] = []

    def forward(self, tokens: torch.Tensor, cache: object = None) -> Output:
        self.heard.append(tokens[0].tolist())
        return Output(torch.zeros(1, tokens.shape[1], 1), ())

    @property
    def head(self) -> "Scripted":
        return self

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        self.said += 1
        return torch.nn.functional.one_hot(torch.tensor(self.script[self.said - 1]), 2000).float()


@pytest.fixture
def engine() -> Engine:
    tokenizer = tiny.tokenizer()
    return Engine(tiny.model(vocab_size=len(tokenizer)), tokenizer, (tokenizer.eos_id or 0,))


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    """Merges cross the bytes of neighbouring characters, so that tokens end inside them."""
    return Tokenizer.train_bpe([SCRIPTS * 3, tiny.text(5000)], 320, "qwen2")


def say(tokenizer: Tokenizer, ids: list[int], **options) -> tuple[Generation, list[str]]:
    made = Generation("")
    speaker = Engine(Scripted([*ids, tokenizer.eos_id or 0]), tokenizer, (tokenizer.eos_id or 0,))  # type: ignore[arg-type]
    return made, list(speaker.stream("the", GREEDY, options.pop("n", 10_000), result=made, **options))


# -- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_greedy_text_is_the_argmax_of_the_whole_text_each_time(family):
    tokenizer = tiny.tokenizer()
    model = tiny.model(vocab_size=len(tokenizer), family=family)
    engine = Engine(model, tokenizer, ())
    made = engine.generate("the sea", GREEDY, 20)
    ids = engine.prompt_ids("the sea")
    with torch.no_grad():
        for token in made.tokens:
            assert int(model.scores(torch.tensor([ids]))[0, -1].argmax()) == token
            ids.append(token)
    assert len(made.tokens) == 20 and made.finish_reason == "length"
    assert engine.generate("the sea", GREEDY, 20, cached=False).tokens == made.tokens


def test_cached_and_uncached_sampling_agree_beyond_a_full_context(engine):
    how = Sampling(seed=3)
    cached = engine.generate("a bird", how, 3 * tiny.CONTEXT, ignore_eos=True)
    assert len(cached.tokens) == 3 * tiny.CONTEXT
    assert engine.generate("a bird", how, 3 * tiny.CONTEXT, ignore_eos=True, cached=False).tokens == cached.tokens


def test_a_full_context_goes_on_from_its_later_half(bpe):
    script, limit = bpe.encode(tiny.text(200)), 16
    model = Scripted(script, limit)
    made = Engine(model, bpe, ()).generate("the", GREEDY, 40, cached=False)  # type: ignore[arg-type]
    prompt = bpe.encode("the")
    ids = prompt + made.tokens
    lengths = [len(heard) for heard in model.heard]
    first = limit - len(prompt) + 1  # so many fit, the last of them a full context
    assert lengths[:first] == list(range(len(prompt), limit + 1))
    assert lengths[first : first + 9] == list(range(limit // 2, limit + 1))
    assert all(ids[: len(prompt) + n][-len(heard) :] == heard for n, heard in enumerate(model.heard))


def test_the_seed_decides_the_text(engine):
    def text(seed):
        return engine.generate("the", Sampling(seed=seed), 24, ignore_eos=True).tokens

    assert text(1) == text(1)
    assert text(1) != text(2)
    assert text(None) != text(None)


def test_generation_does_not_disturb_the_global_generator_or_the_mode(engine):
    engine.model.train()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    engine.generate("the", Sampling(seed=1), 4)
    assert torch.equal(torch.get_rng_state(), before)
    assert engine.model.training


def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers(engine):
    with pytest.raises(DataError, match=rf"{tiny.CONTEXT} tokens.*fewer than {tiny.CONTEXT}") as refused:
        engine.generate("a" * tiny.CONTEXT, GREEDY, 1)
    assert refused.value.code == 65
    assert len(engine.generate("a" * (tiny.CONTEXT - 1), GREEDY, 3, ignore_eos=True).tokens) == 3


def test_an_empty_prompt_begins_a_text(engine):
    assert engine.prompt_ids("") == [engine.tokenizer.start_id]


def test_counts_and_rates_are_those_of_the_run(engine):
    made = engine.generate("the sea", GREEDY, 5, ignore_eos=True)
    assert made.prompt_tokens == len("the sea") and len(made.tokens) == 5
    assert made.tokens_per_second > 0 and made.prompt_tokens_per_second > 0
    assert made.text == engine.tokenizer.decode(made.tokens)


# -- where it stops --------------------------------------------------------------------------------------------------


def test_end_of_text_stops_unless_ignored(bpe):
    ids = bpe.encode("the old king")
    made, _ = say(bpe, [*ids, bpe.eos_id, *ids])
    assert (made.text, made.finish_reason, made.tokens) == ("the old king", "stop", ids)
    made, _ = say(bpe, [*ids, bpe.eos_id, *ids], ignore_eos=True, n=2 * len(ids) + 1)
    assert made.finish_reason == "length"
    assert made.text == "the old king<|endoftext|>the old king"


def test_max_new_tokens_counts_tokens(bpe):
    ids = bpe.encode("the old king sang to the sea")
    made, _ = say(bpe, ids, n=3)
    assert made.tokens == ids[:3] and made.finish_reason == "length"


@pytest.mark.parametrize(
    ("stop", "shown"),
    [
        (("king sa",), "the old "),
        (("ng sang t",), "the old ki"),
        (("the",), ""),
        (("sea!", "old"), "the "),
        (("bird",), "the old king sang to the sea"),
        (("sea, and",), "the old king sang to the sea"),
        (("",), "the old king sang to the sea"),
        (("sea", "the s"), "the old king sang to "),
    ],
    ids=str,
)
def test_stop_strings_end_the_text_wherever_tokens_end(bpe, stop, shown):
    text = "the old king sang to the sea"
    for ids in (bpe.encode(text), [i for c in text for i in bpe.encode(c)]):
        made, pieces = say(bpe, ids, stop=stop)
        assert made.text == "".join(pieces) == shown
        assert made.finish_reason == "stop"


def test_no_piece_of_a_stop_string_is_shown_before_it_is_whole(bpe):
    ids = [i for c in "one STOPPING STOP two" for i in bpe.encode(c)]
    made, pieces = say(bpe, ids, stop=("STOP two",))
    assert made.text == "".join(pieces) == "one STOPPING "
    assert not any(made.text[: sum(map(len, pieces[:n]))].endswith("STOP") for n in range(len(pieces)))


# -- text arrives whole ----------------------------------------------------------------------------------------------


def pieces_of(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    text = Decoding(tokenizer, stop)
    made = [piece for i in ids for piece in text.add(i)] + list(text.finish())
    assert "".join(made) == text.shown
    return made


def test_streamed_pieces_of_every_script_are_whole_characters(bpe):
    by_bytes = [b for character in SCRIPTS for b in bpe.encode(character)]
    assert any("\ufffd" in bpe.decode([i]) for i in by_bytes)
    for ids in (bpe.encode(SCRIPTS), by_bytes):
        made = pieces_of(bpe, ids)
        assert "".join(made) == SCRIPTS
        assert not any("\ufffd" in piece for piece in made)
        assert len(made) > len(SCRIPTS) / 3  # it does stream


def test_tokens_that_end_inside_a_character_are_streamed_whole():
    """A token may hold the end of one character and the beginning of the next."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    plain = Backend(models.BPE(vocab={c: i for i, c in enumerate(sorted(alphabet))}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters = plain.encode("𝔘红𝔫é👩").tokens  # one a byte
    for size in (2, 3, 5, 6):
        chunks = ["".join(letters[i : i + size]) for i in range(0, len(letters), size)]
        for first in range(1, 5):  # the first bytes alone, so that a run of tokens ends inside characters
            words = letters[:first] + ["".join(letters[first:][i : i + size]) for i in range(0, len(letters), size)]
            vocab = {w: i for i, w in enumerate(dict.fromkeys([*sorted(alphabet), *chunks, *words]))}
            backend = Backend(models.WordLevel(vocab, unk_token="?"))
            backend.decoder = decoders.ByteLevel()
            made = pieces_of(Tokenizer(backend, {}), [vocab[w] for w in words if w])
            assert "".join(made) == "𝔘红𝔫é👩"
            assert not any("\ufffd" in piece for piece in made)


def test_any_bytes_at_all_give_the_text_that_decoding_them_at_once_gives(bpe):
    draw = np.random.default_rng(0)
    for _ in range(40):
        ids = draw.integers(0, 256, size=24).tolist()  # mostly no text
        assert "".join(pieces_of(bpe, ids)) == bpe.decode(ids)


def test_bytes_that_never_become_text_are_shown_in_the_end(bpe):
    lead = bpe.encode("𝔊")[0]
    assert bpe.decode([lead]) == "\ufffd"
    assert "".join(pieces_of(bpe, [lead] * 200)) == "\ufffd" * 200


def test_a_decoder_that_drops_the_first_space_keeps_that_of_a_continuation():
    vocab = {"<unk>": 0, "▁the": 1, "▁sea": 2, "▁was": 3}
    backend = Backend(models.WordLevel(vocab, unk_token="<unk>"))
    backend.decoder = decoders.Metaspace()
    tokenizer = Tokenizer(backend, {})
    text = Decoding(tokenizer, (), [1])
    assert [piece for i in (2, 3) for piece in text.add(i)] == [" sea", " was"]
    assert pieces_of(tokenizer, [1, 2]) == ["the", " sea"]
    engine = Engine(Scripted([2, 3, 0]), tokenizer, (0,))  # type: ignore[arg-type]
    assert engine.generate("▁the", GREEDY, 9).text == " sea was"


def test_a_penalty_is_for_each_id_of_the_text_whatever_its_length(engine, monkeypatch):
    """A tensor of the whole text at each token made 12,000 tokens half as fast, a token, as 1,000."""
    seen_at_each = []

    def watched(logits, seen, **options):
        seen_at_each.append(sorted(seen.tolist()))
        return choose(logits, seen, **options)

    monkeypatch.setattr(generation, "choose", watched)
    result = engine.generate("ab", Sampling(repetition_penalty=1.2, seed=3), 60, ignore_eos=True)
    before = engine.prompt_ids("ab")
    ids = before + result.tokens
    assert seen_at_each == [sorted(set(ids[:length])) for length in range(len(before), len(ids))]


@pytest.mark.parametrize("limit", [0, 10**9])
def test_a_small_model_computes_with_one_thread_and_leaves_the_callers_number_alone(limit, monkeypatch):
    monkeypatch.setattr(generation, "ONE_THREAD", limit)
    numbers, before = [], torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        tokenizer = tiny.tokenizer()
        model = tiny.model(vocab_size=len(tokenizer))
        usual = model.forward
        monkeypatch.setattr(model, "forward", lambda *a, **b: numbers.append(torch.get_num_threads()) or usual(*a, **b))
        for _ in Engine(model, tokenizer, ()).stream("ab", Sampling(seed=1), 4, ignore_eos=True):
            assert torch.get_num_threads() == 3
        assert set(numbers) == {1 if limit else 3} and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
