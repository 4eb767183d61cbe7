"""Text from a model: one sequence, token by token, with a key-value cache."""

import secrets
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from gptworks.core.errors import DataError, UsageError
from gptworks.core.log import plural
from gptworks.core.workers import threads
from gptworks.data.tokenizer import Tokenizer, check_rows
from gptworks.infer.sampling import Sampling, choose
from gptworks.model.attention import KeyValueCache
from gptworks.model.config import parameter_count
from gptworks.model.linear import BlockLinear
from gptworks.model.transformer import Transformer


@dataclass
class Generation:
    """A finished continuation. Rates are tokens per second."""

    prompt: str
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: str = "length"  # stop: end-of-text or a stop string; length: max_new_tokens
    prompt_tokens: int = 0
    prompt_tokens_per_second: float = 0.0
    tokens_per_second: float = 0.0


_BACK = 4  # tokens before a new one that its decoding may depend on
_PATIENCE = 32  # tokens that bytes without a meaning are kept back for


ONE_THREAD = 32_000_000  # parameters: a step of a smaller model is too short for threads to meet after each operation


class Engine:
    """Generates with one model; holds no state between calls."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, stop_ids: tuple[int, ...]) -> None:
        self.model, self.tokenizer, self.stop_ids = model, tokenizer, stop_ids
        # By the size alone: by a clock, a seed would give another text from one time to the next.
        small = parameter_count(model.config) <= ONE_THREAD and next(model.parameters()).device.type == "cpu"
        self.threads = partial(threads, 1) if small else nullcontext

    def prompt_ids(self, prompt: str) -> list[int]:
        """Ids of the prompt after what the tokenizer itself puts in front; an empty prompt is a document's start.

        Raises DataError for too long a prompt.
        """
        ids = self.tokenizer.front + self.tokenizer.encode(prompt)
        if not ids:
            if self.tokenizer.start_id is None:
                raise DataError("an empty prompt, and the tokenizer has no token that begins a text")
            ids = [self.tokenizer.start_id]
        return self._fitting(ids)

    def _fitting(self, ids: list[int]) -> list[int]:
        limit = self.model.config.max_position_embeddings
        if len(ids) >= limit:
            raise DataError(f"the prompt has {plural(len(ids), 'token')}; this model takes fewer than {limit:,}")
        check_rows(self.tokenizer, max(ids, default=0), rows=self.model.config.vocab_size, what="the prompt")
        return ids

    def generate(self, prompt: str, how: Sampling, max_new_tokens: int, **options: object) -> Generation:
        """Like `stream`, but returns the finished text."""
        result = Generation(prompt)
        for _ in self.stream(prompt, how, max_new_tokens, result=result, **options):  # type: ignore[arg-type]
            pass
        return result

    @torch.no_grad()
    def stream(
        self,
        prompt: str | list[int],
        how: Sampling,
        max_new_tokens: int,
        stop: tuple[str, ...] = (),
        ignore_eos: bool = False,
        cached: bool = True,
        result: Generation | None = None,
    ) -> Iterator[str]:
        """Yields text as it becomes certain; `result` is filled on the way. Raises DataError for too long a prompt,
        UsageError for less than one token.

        The prompt is text, or ids that are taken as they are. Where the context is full, the model goes on from the
        later half of it.
        """
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens={max_new_tokens}: must be at least 1")
        ids = self.prompt_ids(prompt) if isinstance(prompt, str) else self._fitting(prompt)
        result = result if result is not None else Generation(prompt if isinstance(prompt, str) else "")
        was_training = self.model.training
        self.model.eval()
        try:
            yield from self._stream(
                ids, how, max_new_tokens=max_new_tokens, stop=stop, ignore_eos=ignore_eos, cached=cached, result=result
            )
        finally:
            self.model.train(was_training)

    def _stream(
        self,
        ids: list[int],
        how: Sampling,
        max_new_tokens: int,
        stop: tuple[str, ...],
        ignore_eos: bool,
        cached: bool,
        result: Generation,
    ) -> Iterator[str]:
        config, device = self.model.config, next(self.model.parameters()).device
        limit = config.max_position_embeddings
        cache = KeyValueCache(config.num_hidden_layers, limit) if cached else None
        step = Step(self.model, recorded=device.type == "cuda" and can_record(self.model))
        generator = torch.Generator().manual_seed(how.seed if how.seed is not None else secrets.randbits(63))
        control = set(self.tokenizer.control_tokens.values())
        text = Decoding(self.tokenizer, stop, [i for i in ids if i not in control])
        result.prompt_tokens = len(ids)
        window, feed = list(ids), ids  # what the model sees, and what of it the cache does not have yet
        seen = torch.tensor(sorted(set(ids)) if how.repetition_penalty != 1.0 else [])
        start, first = time.perf_counter(), 0.0
        while True:
            with self.threads():
                logits = step(feed, cache)
                if not first:
                    first = time.perf_counter()
                    result.prompt_tokens_per_second = len(ids) / max(first - start, 1e-9)
                token = choose(logits, seen, how=how, generator=generator)
            if how.repetition_penalty != 1.0 and token not in seen:
                seen = torch.cat((seen, torch.tensor([token])))
            if token in self.stop_ids and not ignore_eos:
                result.finish_reason = "stop"
                break
            window.append(token)
            feed = [token]
            result.tokens.append(token)
            yield from text.add(token)
            if text.stopped:
                result.finish_reason = "stop"
                break
            if len(result.tokens) >= max_new_tokens:
                break
            if len(window) > limit:
                feed = window = window[-max(limit // 2, 1) :]
                cache = KeyValueCache(config.num_hidden_layers, limit) if cached else None
            if not cached:
                feed = window
        yield from text.finish()
        result.text = text.shown
        steps = len(result.tokens) - (result.finish_reason != "stop" or text.stopped)
        result.tokens_per_second = max(steps, 0) / max(time.perf_counter() - first, 1e-9)


def can_record(model: Transformer) -> bool:
    """True where a step waits nowhere for the processor: the codes of low-bit layers have their levels copied over, and
    experts may be computed one after another."""
    layers = (layer for layer in model.modules() if isinstance(layer, BlockLinear))
    return not model.config.num_experts and all(layer.recordable for layer in layers)


class Step:
    """Scores of the next token [V], after tokens that a cache has and those that are given.

    Starting the kernels of a step takes a GPU's host several times as long as the GPU takes to run them. `recorded`, a
    step of one token is recorded once as a CUDA graph, and then started whole.
    """

    def __init__(self, model: Transformer, recorded: bool) -> None:
        self.model, self.recorded = model, recorded
        self.device = next(model.parameters()).device
        self.token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        self.cache: KeyValueCache | None = None  # that the graph reads and writes
        self.room = 0  # of the cache when the graph was made
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits = torch.empty(0)

    def __call__(self, tokens: list[int], cache: KeyValueCache | None) -> Tensor:
        if not self.recorded or cache is None or len(tokens) > 1 or not cache.length:
            return self._scores(torch.tensor([tokens], device=self.device), cache)
        if self.cache is not cache or cache.length >= self.room:
            self._record(cache)
        assert self.graph
        self.token.fill_(tokens[0])
        self.graph.replay()
        cache.length += 1  # its tensor moves in the graph
        return self.logits

    def _scores(self, tokens: Tensor, cache: KeyValueCache | None) -> Tensor:
        return self.model.head.logits(self.model(tokens, cache=cache).hidden[0, -1])

    def _record(self, cache: KeyValueCache) -> None:
        self.graph = None  # its memory goes before the next one's comes
        length = cache.length
        cache.fix()
        assert cache.place is not None
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries set themselves up at the first use, which cannot be recorded
            self._scores(self.token, cache)
        torch.cuda.current_stream().wait_stream(aside)
        cache.length = length
        cache.place.fill_(length)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # others may use the GPU meanwhile
            self.logits = self._scores(self.token, cache)
        cache.length = length
        self.cache, self.room = cache, cache.room


class Decoding:
    """Decodes ids as they come; keeps back half a character and anything that may become a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...], context: list[int] | None = None) -> None:
        """`context` is what stands before: some decoders drop the space that a text begins with."""
        self.tokenizer, self.stop = tokenizer, tuple(s for s in stop if s)
        self.shown, self.stopped = "", False
        self._whole, self._ids = "", list(context or [])[-_BACK:]
        self._done = len(self._ids)  # ids up to here end with a whole character
        self._taken = 0  # characters of what comes after, already in `_whole`

    def add(self, token: int) -> Iterator[str]:
        self._ids.append(token)
        fresh = self._fresh()
        # What may still become a character has to wait; bytes that never do must not wait for ever.
        sure = fresh.rstrip("\ufffd") if len(self._ids) - self._done < _PATIENCE else fresh
        self._whole += sure[self._taken :]
        self._taken = max(len(sure), self._taken)
        if sure == fresh:
            self._done, self._taken = len(self._ids), 0
        yield from self._show()

    def _fresh(self) -> str:
        """The text of the ids after `_done`. Decoding from a few tokens back keeps a step's cost constant and spaces
        right."""
        back = max(self._done - _BACK, 0)
        before = self.tokenizer.decode(self._ids[back : self._done])
        return self.tokenizer.decode(self._ids[back:])[len(before) :]

    def finish(self) -> Iterator[str]:
        if not self.stopped:
            self._whole += self._fresh()[self._taken :]
            yield from self._show(final=True)

    def _show(self, final: bool = False) -> Iterator[str]:
        places = [place for s in self.stop if (place := self._whole.find(s)) >= 0]
        if places:
            self.stopped = True
            sure = min(places)
        elif final:
            sure = len(self._whole)
        else:
            sure = len(self._whole)
            for s in self.stop:
                for size in range(min(len(s) - 1, len(self._whole)), 0, -1):
                    if self._whole.endswith(s[:size]):
                        sure = min(sure, len(self._whole) - size)
                        break
        if sure > len(self.shown):
            new = self._whole[len(self.shown) : sure]
            self.shown += new
            yield new
