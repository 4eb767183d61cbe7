"""A conversation in the terminal, or through pipes: read a line, answer it, until the lines end."""

import json
import sys
from collections.abc import Callable
from contextlib import closing

from gptworks.core import folder
from gptworks.core.errors import GptworksError, Preempted, UsageError
from gptworks.core.log import PRINTABLE, console, plural
from gptworks.core.runtime import interrupts
from gptworks.infer.chat import Conversation
from gptworks.infer.engine import Generation

HELP = """\
/reset      forget what was said (not the --system text)
/save FILE  write what was said as JSON lines
/help       this
/exit       leave; so does Ctrl-D
Ctrl-C stops a reply. A line that begins with // is a message that begins with /."""
WHY = {
    "interrupt": "stopped",
    "length": "cut off after --max-new-tokens",
    "context": "cut off: the context is full",
}


class Terminal:
    """Lines of standard input are messages or commands; standard output has the replies and nothing else."""

    def __init__(self, conversation: Conversation, put: Callable[[str], None], as_json: bool = False) -> None:
        """`put` writes to standard output. With `as_json` a reply is one JSON object on a line."""
        self.conversation, self.put, self.as_json = conversation, put, as_json
        self.person = sys.stdin.isatty()
        self.commands = {"reset": self._reset, "save": self._save, "help": self._help}
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")

    def run(self) -> None:
        """Answers lines until they end, or /exit. A mistake ends a pipe with its exit code; a person is told of it."""
        if self.person:
            console.say("/help lists the commands, Ctrl-D leaves")
        while (line := self._read()) is not None and line.strip() != "/exit":
            try:
                self._answer(line)
            except GptworksError as error:
                if not self.person or isinstance(error, Preempted):
                    raise
                console.warn(str(error))

    def _read(self) -> str | None:
        """The next line; None after the last. Ctrl-C at the prompt begins the line anew."""
        while True:
            try:
                if self.person and sys.stdout.isatty() and not self.as_json:
                    import readline  # noqa: F401  line editing for input()

                    return input("> ")
                if self.person:
                    print("> ", end="", file=sys.stderr, flush=True)
                line = sys.stdin.readline()
                return line.rstrip("\r\n") if line else None
            except EOFError:
                self.put("\n")
                return None
            except KeyboardInterrupt:
                if not self.person:
                    raise
                print(file=sys.stderr)
                console.say("Ctrl-D or /exit leaves")

    def _answer(self, line: str) -> None:
        if line.startswith("//"):
            self._reply(line[1:])
        elif line.startswith("/"):
            name, _, argument = line[1:].partition(" ")
            if name not in self.commands:
                raise UsageError(f"no command /{name}; /help lists them, // begins a message with /")
            self.commands[name](argument.strip())
        elif line.strip():
            self._reply(line)

    def _reply(self, text: str) -> None:
        generation, stopped = Generation(text), ""
        with interrupts.listening():
            try:
                with closing(self.conversation.reply(text, generation)) as parts:
                    for part in parts:
                        self._show(part)
                        if interrupts.requested:
                            break
                stopped = interrupts.requested or ""
            except KeyboardInterrupt:  # a second one, at once
                stopped = "SIGINT"
        if stopped:
            generation.finish_reason = "interrupt"
        self._end(generation)
        if stopped == "SIGTERM":
            raise Preempted("stopped by SIGTERM")
        if stopped and not self.person:
            raise KeyboardInterrupt

    def _show(self, part: str) -> None:
        if not self.as_json:
            self.put(part.translate(PRINTABLE) if sys.stdout.isatty() else part)

    def _end(self, generation: Generation) -> None:
        if not self.as_json:
            self.put("\n")
            if generation.finish_reason in WHY:
                console.say(f"[{WHY[generation.finish_reason]}]")
            return
        row = {
            "prompt": generation.prompt,
            "text": self.conversation.turns[-1][-1]["content"],
            "tokens": len(generation.tokens),
            "finish_reason": generation.finish_reason,
            "prompt_tokens": generation.prompt_tokens,
            "dropped_turns": self.conversation.dropped,
            "tokens_per_second": round(generation.tokens_per_second, 1),
            "prompt_tokens_per_second": round(generation.prompt_tokens_per_second, 1),
        }
        self.put(json.dumps(row, ensure_ascii=False) + "\n")

    # -- commands ------------------------------------------------------------------------------------------------

    def _reset(self, argument: str) -> None:
        self.conversation.reset()
        console.say("[forgotten]")

    def _save(self, argument: str) -> None:
        if not argument:
            raise UsageError("/save needs a file: /save FILE")
        path, messages = folder.path(argument), self.conversation.messages
        folder.write_text(path, "".join(json.dumps(message, ensure_ascii=False) + "\n" for message in messages))
        console.say(f"[{plural(len(messages), 'message')} -> {path}]")

    def _help(self, argument: str) -> None:
        console.say(HELP)
