"""A problem of one's own: strings of letters to be written backwards, made by a function as they are needed.

    gptworks train laptop problem=examples/own_problem.py:Reverse model.parameters=100k train.context=16 \
        train.batch_tokens=1024 train.time_budget_s=null train.max_steps=800 train.eval_every=50 train.patience=4

A row is `hgfedcba>abcdefgh`; only what stands behind the `>` counts. The run ends once the accuracy, which reaches
0.99, was no better in four evaluations.
"""

import numpy as np
import torch

from gptworks.core.config import ProblemSettings, fixed
from gptworks.core.runtime import mix
from gptworks.data.batch import Batch, Batches, Cursor
from gptworks.data.tokenizer import Tokenizer
from gptworks.training.objectives import Loss
from gptworks.training.problem import Evaluation, Evaluator, Problem, Work

TOKENIZER = Tokenizer.train_characters(set("abcdefgh>"))
LETTERS, (ARROW,) = np.array(TOKENIZER.encode("abcdefgh")), TOKENIZER.encode(">")


class Strings(Batches):
    # Row n of the stream is a function of the seed and n, so a run is continued and replayed to the bit.
    def __init__(self, length, seed, rows, group):
        self.length, self.seed, self.rows, self.group = length, seed, rows, group

    def make(self, first, rows):
        draws = (np.random.default_rng(mix(self.seed, row)) for row in range(first, first + rows))
        string = LETTERS[np.array([draw.integers(8, size=self.length) for draw in draws])]
        whole = torch.from_numpy(np.hstack((string, np.full((rows, 1), ARROW), string[:, ::-1])))
        weights = torch.ones(rows, 2 * self.length)
        weights[:, : self.length] = 0  # what stands before the arrow cannot be foreseen
        return Batch(whole[:, :-1], whole[:, 1:], weights)

    def take(self, cursor):
        batch = self.make(cursor.row, self.rows)
        return batch.share_of(self.group.rank, self.group.size), Cursor(0, cursor.row + self.rows)


class Backwards(Evaluator):
    """The cross-entropy behind the arrow, and how many letters are right there: for training and for evaluations."""

    figures = ("accuracy", "first_letter")

    def __init__(self, held_out):
        self.held_out = held_out

    def weight(self, batch):
        return float(batch.weights.sum())

    def loss(self, model, batch):
        hidden = model(batch.tokens).hidden
        loss = model.head.loss_sum(hidden.flatten(0, 1), batch.targets.flatten(), batch.weights.flatten())
        right = (model.head.logits(hidden.detach()).argmax(-1) == batch.targets) * batch.weights
        first = right[:, right.shape[1] // 2].sum()
        return Loss(loss, {"accuracy": (right.sum(), batch.weights.sum()), "first_letter": (first, len(right))})

    @torch.no_grad()
    def __call__(self, model):
        right, letters = self.loss(model, self.held_out.to(model.device)).figures["accuracy"]
        return Evaluation({"accuracy": float(right / letters)}, (f"accuracy {float(right / letters):.4f}",))


class Reverse(Problem):
    class Settings(ProblemSettings):
        length: int = fixed(8, "letters of a string")

    watched, lower_is_better, identity, tokenizer = "accuracy", False, "strings", TOKENIZER

    @classmethod
    def open(cls, config, place):
        return cls()

    def start(self, model, config, group, values):
        rows = config.train.batch_tokens // config.train.context
        strings = Strings(config.problem.length, config.train.seed, rows, group)
        work = Backwards(strings.make(1 << 40, 256))  # far on in the endless stream
        return Work(strings, objective=work, evaluate=work)
