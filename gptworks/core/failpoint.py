"""Named places in the product where a test can have it fail. Nothing happens unless GPTWORKS_FAILPOINT is set.

GPTWORKS_FAILPOINT="checkpoint.tensors:3:kill" kills the process at the third pass through that place; several are
separated by commas, and `@1` at the end names the only rank that is meant. `sleep` takes
seconds: "step.update:5:sleep=9".
"""

import errno
import os
import signal
import time
from typing import Any

# Every place, and what is about to happen there. A test demands that each is passed and each is used.
PLACES = {
    "folder.fsync": "a file of a folder is about to be made durable",
    "folder.manifest": "all files are there, the manifest is not",
    "folder.rename": "all is durable under another name",
    "folder.renamed": "the folder has its name; its parent is not yet durable",
    "text.replace": "a small file is about to take the place of the old one",
    "shards.piece": "a piece of text is about to be encoded",
    "checkpoint.tensors": "a tensor of a checkpoint is about to be written",
    "checkpoint.rotate": "the new checkpoint stands, an old one is about to go",
    "checkpoint.restore": "a checkpoint is about to be read",
    "run.configured": "the run's config.yaml is written, nothing is trained",
    "step.loss": "the loss of a micro-batch, a tensor",
    "step.gradient": "the gradient of the first parameter, a tensor",
    "step.update": "the gradient is ready, the optimizers are about to move the weights",
    "step.weight": "the first parameter after the update, a tensor",
    "step.count": "the weights have moved, the counters have not",
    "step.hooks": "a step is done, its hooks are about to be called",
    "eval.start": "an evaluation is about to begin",
    "metrics.write": "a line of metrics.jsonl is about to be written",
    "model.save": "training is over, the model folder is about to be written",
}


class Armed:
    """The failpoints that a text names; counts the passes through each."""

    def __init__(self, text: str) -> None:
        self.passes: dict[str, int] = {}
        self.armed: list[tuple[str, int, str]] = []
        for part in filter(None, text.split(",")):
            what, _, rank = part.partition("@")
            place, number, action = what.split(":")
            assert place in PLACES, f"GPTWORKS_FAILPOINT: no place {place!r}"
            if rank in ("", os.environ.get("RANK", "0")):
                self.armed.append((place, int(number), action))

    def __call__(self, place: str, tensor: Any = None) -> None:
        assert place in PLACES, place
        self.passes[place] = self.passes.get(place, 0) + 1
        for armed, number, action in self.armed:
            if armed == place and number == self.passes[place]:
                _act(action, tensor)


def _act(action: str, tensor: Any) -> None:
    name, _, value = action.partition("=")
    match name:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "term":
            os.kill(os.getpid(), signal.SIGTERM)
        case "exit":
            os._exit(int(value or 1))
        case "raise":
            raise RuntimeError("failpoint")
        case "eio" | "enospc" | "eacces":
            number = getattr(errno, name.upper())
            raise OSError(number, os.strerror(number))
        case "sleep":
            time.sleep(float(value or 1))
        case "nan" | "inf":
            tensor.detach().view(-1)[0] = float(name)
        case "scale":
            tensor.detach().mul_(float(value))
        case _:
            raise AssertionError(f"GPTWORKS_FAILPOINT: no action {action!r}")


_armed: Armed | None = None


def arm(text: str | None) -> Armed | None:
    """Sets what happens from now on in this process; None: nothing."""
    global _armed
    _armed = Armed(text) if text is not None else None
    return _armed


def failpoint(place: str, tensor: Any = None) -> None:
    """A place where a test may have this process fail."""
    if _armed is not None:
        _armed(place, tensor)


arm(os.environ.get("GPTWORKS_FAILPOINT"))
