"""The problem that most runs solve: predict each next token of a text."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptworks.core import folder
from gptworks.core.config import Chosen, ChosenTrain, Config
from gptworks.core.errors import DataError, UsageError
from gptworks.core.log import console
from gptworks.training.problem import Evaluation, Evaluator, Place, Problem, Work

if TYPE_CHECKING:
    from gptworks.core.ranks import Group
    from gptworks.data.loader import Loader
    from gptworks.data.shards import Shards
    from gptworks.model.transformer import Transformer

EVALUATED_ROWS = 64  # of the validation text, to time an evaluation


class Pretraining(Problem):
    """Next-token prediction on the shards of a text, measured by the exact loss of what was held out of it."""

    sections = frozenset({"data", "tokenizer", "generate"})

    def __init__(self, shards: "Shards") -> None:
        from gptworks.infer.scoring import unigram

        self.shards, self.tokenizer, self.identity = shards, shards.tokenizer, shards.identity
        self.epoch_tokens = len(shards.train.tokens) - 1
        self.eval_tokens = len(shards.eval.tokens) - 1
        self.bytes_per_token, self.lost_per_token = shards.train.bytes_per_token, shards.train.lost_per_token
        self.vocabulary, self.unigram_bits = shards.vocabulary, unigram(shards.eval)["bits_per_byte"]
        self._loaders: dict[tuple[Any, ...], Loader] = {}

    @classmethod
    def check(cls, config: Config) -> None:
        if "???" in (config.data.train if isinstance(config.data.train, list) else [config.data.train]):
            raise UsageError("this recipe trains on a text of yours: add data.train=FILE (a file, folder or glob)")

    @classmethod
    def prepare(cls, config: Config, place: Place) -> folder.Verifying | None:
        """Tokenizer and shards, where they are missing or the text changed; a run that has begun keeps its ids."""
        from gptworks.data import shards

        path = cls._folder(config, place)
        tokenizer = place.base.tokenizer if place.base else None
        if place.begun and path.is_dir():
            try:
                return shards.open_shards(path, tokenizer=tokenizer).verifying
            except DataError as error:
                console.warn(f"{error}; making the shards again from the text")
        own = path.resolve() == place.data.resolve()
        return shards.prepare(config.data, config.tokenizer, path, base_tokenizer=tokenizer, own=own).verifying

    @classmethod
    def verify(cls, config: Config, place: Place) -> folder.Verifying | None:
        return folder.Verifying(cls._folder(config, place))

    @classmethod
    def edited(cls, config: Config, place: Place) -> str | None:
        from gptworks.data.shards import edited

        return edited(cls._folder(config, place), config.data)

    @classmethod
    def open(cls, config: Config, place: Place) -> "Pretraining":
        from gptworks.data.shards import open_shards

        tokenizer = place.base.tokenizer if place.base else None
        return cls(open_shards(cls._folder(config, place), verified=True, tokenizer=tokenizer))

    @staticmethod
    def _folder(config: Config, place: Place) -> Path:
        return Path(config.data.shards) if config.data.shards else place.data

    def start(self, model: "Transformer", config: Chosen, group: "Group", values: dict[str, Any]) -> Work:
        from gptworks.data.shards import check_ids
        from gptworks.training.objectives import NextToken

        for split in (self.shards.train, self.shards.eval):
            check_ids(split, self.tokenizer, rows=model.config.vocab_size, what=str(self.shards.path))
        loader = self._loader(config, group)
        rows = max(1, min(64, 16384 // config.train.context))
        lines = [loader.report(), *loader.mixture_report(), loader.look(self.tokenizer)]
        evaluate = HeldOut(self.shards, config.train, rows=rows, group=group)
        return Work(loader, NextToken(config.train), evaluate=evaluate, lines=lines)

    def _loader(self, config: Chosen, group: "Group") -> "Loader":
        """The batches of a run; made once, since planning an epoch of a large text takes a while."""
        from gptworks.data.loader import Loader
        from gptworks.planning.choose import batch_rows

        train = config.train
        rows = None if train.batch_tokens == "full" else batch_rows(config)
        most = int(-(-train.max_epochs // 1)) if train.max_epochs else None
        key = (train.context, rows, train.seed, most, config.data.mask_documents, str(config.data.weights), group)
        if key not in self._loaders:
            self._loaders[key] = Loader(
                self.shards.train, train.context, batch_rows=rows, seed=train.seed, max_epochs=most,
                mask_documents=config.data.mask_documents, weights=config.data.weights, rank=group.rank,
                world=group.size,
            )  # fmt: skip
        return self._loaders[key]

    def prompts(self, most_tokens: int) -> list[str]:
        from gptworks.data.shards import beginnings

        return beginnings(self.shards.eval, self.tokenizer, most_tokens)

    def lineage(self, config: Chosen) -> dict[str, Any]:
        from gptworks.model import card

        manifest, held_out = self.shards.manifest, config.data.eval
        split = manifest["split"]
        return {
            "data": card.mixture(config.data.model_dump(mode="json")["train"]),
            "data_sha256": manifest["source_sha256"],
            "split": split.replace(held_out, card.place(held_out)) if held_out else split,
        }


class HeldOut(Evaluator):
    """The exact loss of the held-out text, in blocks of the context; processes share out the batches."""

    def __init__(self, shards: "Shards", train: ChosenTrain, rows: int, group: "Group") -> None:
        self.stream, self.context, self.workers = shards.eval, train.context, train.workers
        self.tokenizer = shards.tokenizer
        self.rows, self.group = rows, group

    def __call__(self, model: "Transformer") -> Evaluation:
        from gptworks.infer.scoring import expert_use, score

        scores = score(model, self.stream, context=self.context, rows=self.rows, group=self.group, workers=self.workers)
        figures = scores.as_dict()
        logged = {name: figures[name] for name in ("loss", "bits_per_byte", "perplexity")}
        if model.config.num_experts:
            logged |= expert_use(model, self.stream, context=self.context, rows=self.rows)
        shown = (
            f"loss {scores.loss:.4f}",
            f"{scores.bits_per_byte:.3f} bits/byte",
            f"perplexity {scores.perplexity:.2f}",
        )
        return Evaluation(figures, shown, logged)

    def part(self, model: "Transformer") -> float:
        from itertools import islice

        from gptworks.infer.scoring import stream_losses

        batches: Iterator[Any] = stream_losses(
            model, self.stream, context=self.context, rows=self.rows, workers=self.workers
        )
        timed = sum(len(losses) for losses in islice(batches, -(-EVALUATED_ROWS // self.rows)))
        return timed / (len(self.stream.tokens) - 1) * self.group.size

    def passage(self, model: "Transformer") -> list[tuple[str, list[float]]]:
        from gptworks.infer.scoring import passage

        return passage(model, self.stream, tokenizer=self.tokenizer, context=self.context)
