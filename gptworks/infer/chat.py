"""A conversation with a model: messages to ids, replies, and what is left out once the context is full.

What a message says is text. Where it spells a control token, as to end its turn and begin another in someone else's
name, the spelling is encoded as text.
"""

import re
import secrets
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path

from gptworks.core.errors import DataError
from gptworks.core.log import console, plural
from gptworks.core.runtime import mix
from gptworks.data.tokenizer import Tokenizer
from gptworks.infer.engine import Engine, Generation
from gptworks.infer.sampling import Sampling
from gptworks.infer.template import Messages, render, render_foreign

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)
PLAIN = (
    "{% for message in messages %}"
    "{{ {'system': '', 'user': 'User: ', 'assistant': 'Assistant: '}[message.role] + message.content | trim + '\n' }}"
    "{% endfor %}"
    "{{ 'Assistant:' }}"
)
AT_ONCE = 8  # conversations that are tried in one process of the template


class ChatFormat:
    """The spelling of a conversation for a model: its chat template, or one of ours."""

    def __init__(self, tokenizer: Tokenizer, source: str, where: str | None = None) -> None:
        """`where` names a template that comes from a model folder."""
        self.tokenizer, self.source, self.where = tokenizer, source, where
        self._control = tokenizer.control_tokens
        self._control_ids = set(self._control.values())
        longest = sorted(self._control, key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, longest)) or "(?!)")
        self._variables = {"add_generation_prompt": True, "tools": None, "documents": None} | _named(tokenizer)

    @classmethod
    def of(cls, path: Path, tokenizer: Tokenizer) -> "ChatFormat":
        """The folder's template; else ChatML if the tokenizer has its tokens; else plain lines. Raises DataError."""
        source, where = _template(path, tokenizer)
        if source is not None:
            return cls(tokenizer, source, where)
        return cls(tokenizer, CHATML if {"<|im_start|>", "<|im_end|>"} <= tokenizer.control_tokens.keys() else PLAIN)

    @property
    def taught(self) -> bool:
        """True where the model folder says how to talk with it."""
        return self.where is not None

    def ids(self, *conversations: Messages) -> Iterator[list[int]]:
        """Ids of each conversation, up to where the model's reply begins. Raises DataError.

        A conversation is rendered twice: as it is, and with names that nobody can guess in the place of what messages
        say. The second tells which control tokens are the template's. If no message spells one and the first has the
        very same ones, its ids are as good as they are `transformers`'; else those of the second are taken, in which
        the names are replaced and what is not a control token of the template is encoded as text.
        """
        hidden = [_Hidden(messages) for messages in conversations]
        rendered = self._render([each.messages for each in hidden] + list(conversations))
        front = [] if self.taught else self.tokenizer.front
        for messages, each, frame, whole in zip(conversations, hidden, rendered, rendered[len(hidden) :], strict=False):
            spelled = any(self._spelled.search(message["content"]) for message in messages)
            ids = self.tokenizer.encode(whole, control=True)
            theirs = [self._control[token] for token in self._spelled.findall(frame)]
            if spelled or theirs != [token for token in ids if token in self._control_ids]:
                ids = self._guarded(frame, each)
            yield front + ids

    def ends(self, before: Messages) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """The ids and texts that end a reply, as the template has them after one: a control token, or else text.

        `before` is the system message, if there is one.
        """
        hidden = _Hidden([*before, _message("user", "a"), _message("assistant", "b"), _message("user", "c")])
        reply, later = list(hidden.said)[-2:]
        [frame] = self._render([hidden.messages])
        between = frame.partition(reply)[2].partition(later)[0]
        if match := self._spelled.search(between):
            return (self._control[match[0]],), ()
        return (), (between.rstrip(),) if between.strip() else ()

    def _render(self, conversations: list[Messages]) -> list[str]:
        if self.where is None:
            return render(self.source, conversations, self._variables)
        return render_foreign(self.source, conversations, variables=self._variables, where=self.where)

    def _guarded(self, frame: str, hidden: "_Hidden") -> list[int]:
        if hidden.broken(frame):
            raise DataError(
                f"{self.where}: this template takes messages apart, so that a message which spells a control token "
                "cannot be told from the token"
            )
        ids, place = [], 0
        for match in self._spelled.finditer(frame):
            ids += [*self.tokenizer.encode(hidden.shown(frame[place : match.start()])), self._control[match[0]]]
            place = match.end()
        return ids + self.tokenizer.encode(hidden.shown(frame[place:]))


class _Hidden:
    """Messages with numbers that nobody can guess in the place of what they say; the space around it stays."""

    def __init__(self, messages: Messages) -> None:
        self._secret = f"{secrets.randbelow(10**40):040d}"
        self.said: dict[str, str] = {}  # by number
        self.messages = [{**message, "content": self._hide(message["content"])} for message in messages]

    def _hide(self, text: str) -> str:
        said = text.strip()
        if not said:
            return text
        number = f"{self._secret}{len(self.said):06d}"
        self.said[number] = said
        return text.replace(said, number, 1)

    def shown(self, text: str) -> str:
        return re.sub(self._secret + r"\d{6}", lambda match: self.said[match[0]], text)

    def broken(self, text: str) -> bool:
        """True where a number occurs in part."""
        rest = re.sub(self._secret + r"\d{6}", "", text)
        return any(self._secret[i : i + 10] in rest for i in range(30))


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _named(tokenizer: Tokenizer) -> dict[str, str]:
    """bos_token, eos_token and others by the names that templates know them by."""
    named = {key: value for key, value in tokenizer.config.items() if key.endswith("_token")}
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
    return {key: text for key, text in texts.items() if isinstance(text, str)}


def _template(path: Path, tokenizer: Tokenizer) -> tuple[str | None, str]:
    """The chat template of a model folder, if it has one, and where it is written."""
    file = path / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8"), str(file)
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file}: cannot read it: {error}") from None
    where, template = f"{path / 'tokenizer_config.json'}: chat_template", tokenizer.config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next(
            (t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"), template
        )
    if template is not None and not isinstance(template, str):
        raise DataError(f"{where}: neither a template nor a list with one that is named default")
    return template, where


def _clean(text: str) -> str:
    """The text without the broken bytes that a terminal may send."""
    return text.encode("utf-8", "replace").decode("utf-8")


class Conversation:
    """The messages so far, and the model that answers. Whole turns go in and out: a message and its reply."""

    def __init__(
        self, engine: Engine, spelling: ChatFormat, how: Sampling, max_new_tokens: int, system: str | None = None
    ) -> None:
        self.spelling, self.how, self.max_new_tokens = spelling, how, max_new_tokens
        self.system = [_message("system", _clean(system))] if system else []
        self.turns: list[Messages] = []
        self.dropped = 0  # turns, from the oldest, that the model is not shown any more
        ids, self._stop = spelling.ends(self.system)
        self.engine = Engine(engine.model, engine.tokenizer, (*engine.stop_ids, *ids))

    @property
    def messages(self) -> Messages:
        """Everything said so far, dropped turns too."""
        return [*self.system, *(message for turn in self.turns for message in turn)]

    def reset(self) -> None:
        """Forgets every turn; the system message stays."""
        self.turns, self.dropped = [], 0

    def reply(self, text: str, generation: Generation) -> Generator[str, None, None]:
        """Yields the reply as it becomes certain and fills `made`; what was yielded when it is closed counts as said.

        Raises DataError for a message that does not fit into the context by itself.
        """
        text = _clean(text)
        ids = self._fit(_message("user", text))
        left = self.engine.model.config.max_position_embeddings - len(ids)
        how = self.how if self.how.seed is None else replace(self.how, seed=mix(self.how.seed, len(self.turns)))
        said = _message("assistant", "")
        self.turns.append([_message("user", text), said])
        spoken = self.engine.stream(ids, how, min(self.max_new_tokens, left), stop=self._stop, result=generation)
        for part in spoken:
            part = part if said["content"] else part.lstrip()
            said["content"] += part
            yield part
        if generation.finish_reason == "length" and left < self.max_new_tokens:
            generation.finish_reason = "context"

    def _fit(self, message: dict[str, str]) -> list[int]:
        """Ids of the conversation with this message, the oldest turns dropped that leave no room for a reply."""
        limit = self.engine.model.config.max_position_embeddings
        room = min(self.max_new_tokens, limit // 2)
        for first in range(self.dropped, len(self.turns) + 1, AT_ONCE):
            tried = range(first, min(first + AT_ONCE, len(self.turns) + 1))
            conversations = [
                [*self.system, *(said for turn in self.turns[start:] for said in turn), message] for start in tried
            ]
            for start, ids in zip(tried, self.spelling.ids(*conversations), strict=True):
                if len(ids) + room <= limit or (start == len(self.turns) and len(ids) < limit):
                    self._drop(start)
                    return ids
        raise DataError(f"this message takes {plural(len(ids), 'token')}; this model takes fewer than {limit:,}")

    def _drop(self, turns: int) -> None:
        if turns > self.dropped:
            oldest = f"{turns - self.dropped} oldest turns" if turns > self.dropped + 1 else "oldest turn"
            console.warn(f"the context is full: the model does not see the {oldest} any more")
            self.dropped = turns
