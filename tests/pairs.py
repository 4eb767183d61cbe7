"""A problem that asks of a run what `examples/own_problem.py` does not: pairs of rows, an extra tensor, a frozen second
model, a parameter that nothing depends on, rows that the model itself writes, values in the checkpoint."""

import copy

import torch
import torch.nn.functional as F

from gptworks.core.config import ProblemSettings, fixed, flexible
from gptworks.data.batch import Batch, Batches, Cursor
from gptworks.data.tokenizer import Tokenizer
from gptworks.training.objectives import Loss
from gptworks.training.problem import Beside, Evaluation, Evaluator, Parent, Problem, Work


class Written(Batches):
    ahead = False  # the last token of a row is the one that the model finds likeliest now

    def __init__(self, model, rows, seed, group, values):
        self.model, self.rows, self.seed, self.group, self.values = model, rows, seed, group, values

    @torch.no_grad()
    def take(self, cursor):
        draw = torch.Generator().manual_seed(self.seed * 1000 + cursor.row)
        tokens = torch.randint(20, (self.rows, 8), generator=draw)
        tokens[:, -1] = self.model.scores(tokens[:, :-1])[:, -1].argmax(-1) % 20
        self.values["taken"] = self.values.get("taken", 0) + 1
        margin = {"margin": 0.1 + torch.rand(self.rows, generator=draw)}
        batch = Batch(tokens, tokens, torch.ones(tokens.shape), extra=margin, unit=2)
        return batch.share_of(self.group.rank, self.group.size), Cursor(0, cursor.row + self.rows)


class Ranking(Evaluator):
    """The first of a pair is to have the larger last hidden state, beyond the reference's. The head is not used."""

    figures = ("won",)

    def __init__(self, reference, held_out):
        self.reference, self.held_out = reference, held_out

    def weight(self, batch):
        return len(batch.tokens) / 2

    def loss(self, model, batch):
        before = self.reference(batch.tokens).hidden[:, -1].sum(-1)
        gain = (model(batch.tokens).hidden[:, -1].sum(-1) - before) * batch.extra["margin"]
        ahead = gain[0::2] - gain[1::2]
        return Loss(-F.logsigmoid(ahead).sum(), {"won": ((ahead > 0).sum(), len(ahead))})

    def __call__(self, model):
        won, pairs = self.loss(model, self.held_out).figures["won"]
        return Evaluation({"won": float(won) / pairs}, (f"won {won} of {pairs}",))


class Pairs(Problem):
    class Settings(ProblemSettings):
        patience: int = flexible(3, "a setting of the problem's own, as others have one")
        changes: list[str] = fixed([], "another")

    unit, watched, lower_is_better, identity, tokenizer = 2, "won", False, "pairs", Tokenizer.of_bytes()
    parents, beside = (Parent("reference", "the model as it began", "0" * 64),), Beside(10**6, 10.0)

    @classmethod
    def open(cls, config, place):
        return cls()

    def start(self, model, config, group, values):
        reference = copy.deepcopy(model).requires_grad_(False)
        reference.initialise(config.train.seed)
        rows = config.train.batch_tokens // config.train.context
        work = Ranking(reference, Written(reference, 16, 7, type(group)(), {}).take(Cursor())[0])
        return Work(Written(model, rows, config.train.seed, group, values), objective=work, evaluate=work)
