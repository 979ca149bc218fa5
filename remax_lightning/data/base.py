"""What the data modules share: sources, splits, dropped rows, batches and the position in the training order."""

import math
from abc import abstractmethod
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, TypeAlias, cast

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from remax_lightning.data.digest import joint_digest, stream_digest, warn_of_changed_rows
from remax_lightning.data.encoding import Batch, Example, LongPrompts, RowEncoder, encode_tables, open_tables
from remax_lightning.data.order import (
    Position,
    ResumableLoader,
    TrainingOrder,
    even_batches,
    mixed_rows,
    shuffled_rows,
    split_rows,
)
from remax_lightning.data.sources import ACCEPTED, Source, SourceTable, check_sources, list_sources, source_name
from remax_lightning.data.streaming import StreamedBatch, StreamedWindows, StreamLoader
from remax_lightning.functional.keyed_random import run_seed
from remax_lightning.models.tokenizer import load_tokenizer

Split: TypeAlias = Literal["train", "validation", "test", "predict"]

SPLITS_OF_STAGE: dict[str | None, tuple[Split, ...]] = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("predict",),
    None: ("train", "validation", "test", "predict"),
}


@dataclass(kw_only=True, eq=False, repr=False)
class TokenizedDataModule(LightningDataModule):
    """Rows of known formats as batches of tokens, in an order that survives a resume exactly.

    Use it with `Trainer(use_distributed_sampler=False)`: it splits its rows among the ranks itself.

    Args:
        train: Training rows: a file (.json, .jsonl, .parquet, .csv; .gz too), glob, folder or hub name
            `owner/name[/configuration][:split]` (split `train` if not given), a list of rows, or a list of these. In
            Python also a ``datasets.Dataset``, or with ``streaming`` an ``IterableDataset`` that yields the same rows
            whenever it is read.
        validation: Rows for validation, given like those of ``train``. Without them (null), and without
            ``validation_fraction``, a fit does not validate.
        test: Rows for testing, given like those of ``train``.
        predict: Rows to write responses for, given like those of ``train``. The default is ``test``.
        weights: Weight of each source of ``train``; its rows are drawn in proportion. An epoch has as many rows as all
            sources together. Each source goes through its rows in passes, each in a new order, so the rows of a small
            source with a large weight come several times an epoch, and the rows of a large source with a small weight
            are spread over several epochs. By default each row of each source comes once an epoch.
        validation_fraction: Fraction of the training rows, drawn by ``seed``, that is used for validation instead.
        limit: Use only the first ``limit`` rows of ``train``. The default is all.
        streaming: Read the training rows as they are needed, for sources that are too large to load; the trainer
            needs ``max_steps``. An epoch ends with the last source. The columns of a .jsonl file are those of its first
            rows. Every rank reads and tokenizes all rows.
        shuffle_window: With ``streaming``, the number of rows in memory; rows are shuffled within such windows.
        skip_bad_rows: Number of corrupt rows (lines of .jsonl files that are not JSON, text that is not UTF-8) of a
            split, or of an epoch of a stream, that are dropped and counted; one more is an error.
        batch_size: Rows per rank and training step.
        eval_batch_size: Largest number of rows per rank and step outside training. The default is ``batch_size``.
        max_prompt_length: Longest prompt, in tokens.
        long_prompts: What happens to a longer prompt: `drop` its row, `truncate` it to its last tokens, or
            `keep_start`, for texts that are to be continued: cut it to its first tokens, and let the reward read the
            shortened text, too (messages are dropped).
        as_chat: Turn a text prompt into a user message (a `Human:`/`Assistant:` transcript into its turns), so that
            the tokenizer's chat template is applied.
        prompt_column: Column with the prompts, text or messages. The default is found by the names of the columns.
        tokenizer: Folder or hub name of the tokenizer. The default is the model's.
        num_workers: Processes that prepare batches. With 0, the training process prepares them.
        seed: Seed of the order of the training rows and of the rows drawn for validation. The default is that of
            ``seed_everything``.
    """

    train: Source = None
    validation: Source = None
    test: Source = None
    predict: Source = None
    weights: list[float] | None = None
    validation_fraction: float = 0.0
    limit: int | None = None
    streaming: bool = False
    shuffle_window: int = 1024
    skip_bad_rows: int = 0
    batch_size: int = 8
    eval_batch_size: int | None = None
    max_prompt_length: int = 512
    long_prompts: LongPrompts = "drop"
    as_chat: bool = False
    prompt_column: str | None = None
    tokenizer: str | None = None
    num_workers: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        super().__init__()
        check_arguments(self)
        self.position = Position()
        self.examples: dict[Split, list[Example]] = {}
        self.source_sizes: list[int] = []  # examples of each source of train
        self.digests: dict[str, str] = {}  # of the rows of each split that was read
        self.stream: list[SourceTable] = []
        self.validation_options: dict[str, Any] = {}  # the trainer's, where a fit has no validation rows
        self.encoder: RowEncoder
        self.order: TrainingOrder

    @abstractmethod
    def encoder_with(self, tokenizer: PreTrainedTokenizerBase) -> RowEncoder:
        """What makes examples of this kind of rows."""

    def encoder_options(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """The arguments that all encoders share."""
        names = ("max_prompt_length", "long_prompts", "as_chat", "prompt_column")
        return {"tokenizer": tokenizer, **{name: getattr(self, name) for name in names}}

    @property
    def rank(self) -> int:
        """Rank of this process; 0 without a trainer."""
        return 0 if self.trainer is None else self.trainer.global_rank

    @property
    def world_size(self) -> int:
        """Number of ranks that the rows are split among; 1 without a trainer."""
        return 1 if self.trainer is None else self.trainer.world_size

    @property
    def digest(self) -> str:
        """A digest of the content and order of all rows that `setup` has read: the same on ranks with the same rows.

        It does not depend on where the rows are stored, nor on how they are tokenized. Of rows that are streamed a part
        counts; see :func:`stream_digest`.
        """
        return joint_digest(self.digests)

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenize the splits of a stage. A trainer that has taken no step yet begins with the first row."""
        if stage == "fit" and self.trainer is not None and self.trainer.global_step == 0:
            self.position.go_to(**asdict(Position()))
        check_trainer(self, stage)
        self.encoder = self.encoder_with(find_tokenizer(self))
        for split in SPLITS_OF_STAGE[stage]:
            if split == "train" and self.streaming:
                self.stream = open_tables("train", self.train, self.encoder, streaming=True)
                self.digests["train"] = stream_digest(self.stream)
            else:
                self._read_split(split)
        if stage is not None and not (stage == "fit" and self.stream):
            self._examples(SPLITS_OF_STAGE[stage][0])
        if stage == "fit" and self.trainer is not None and "validation" not in self.examples:
            self.validation_options = disable_validation(self.trainer)

    def teardown(self, stage: str | None = None) -> None:
        """Give the trainer back the options that `setup` has changed."""
        for name, value in self.validation_options.items():
            setattr(self.trainer, name, value)
        self.validation_options = {}

    def train_dataloader(self) -> DataLoader[Any] | StreamLoader:
        """Batches of the training rows from the current position on."""
        seed, ranks = run_seed(self.seed), (self.rank, self.world_size)
        if self.stream:
            windows = StreamedWindows(self.stream, self.encoder.encode, self.shuffle_window, self.limit, seed)
            options = (self.num_workers, self.skip_bad_rows)
            return StreamLoader(windows, self.batch_size, *ranks, self.position, self.encoder.collate, *options)
        examples = self._examples("train")
        if self.weights is None:
            rows_of_epoch = partial(shuffled_rows, num_rows=len(examples), seed=seed)
        else:
            rows_of_epoch = partial(mixed_rows, sizes=self.source_sizes, weights=self.weights, seed=seed)
        self.order = TrainingOrder(len(examples), self.batch_size, *ranks, self.position, rows_of_epoch)
        return row_loader(self, examples, batch_size=self.batch_size, sampler=self.order)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Batches of the validation rows, none if there are no such rows."""
        return self._evaluation_loader("validation") if "validation" in self.examples else []

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches of the test rows."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches of the rows to write responses for."""
        return self._evaluation_loader("predict")

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Advance the position by a training batch."""
        if self.trainer is not None and self.trainer.training:
            if isinstance(batch, StreamedBatch):
                self.position.go_to(**asdict(batch.position))
            else:
                self.order.take_batch(self.position)
        return dict(batch)

    def state_dict(self) -> dict[str, Any]:
        """The position in the training order, and the digests of the rows."""
        return {**asdict(self.position), "digests": dict(self.digests)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved position; if a fit has other rows than before, a warning says what follows from it."""
        self.position.go_to(state_dict["epoch"], state_dict["rows"])
        if "train" in self.digests:
            warn_of_changed_rows(state_dict.get("digests", {}), self.digests, self.position)

    def _read_split(self, split: Split) -> None:
        """Read and tokenize the rows of a split; nothing without a source."""
        is_divided = split in ("train", "validation") and self.validation_fraction > 0
        key: Split = "train" if is_divided else "test" if split == "predict" and self.predict is None else split
        tables = open_tables(key, getattr(self, key), self.encoder)
        if not tables:
            return
        num_rows = sum(len(cast(Any, table.rows)) for table in tables)
        if self.limit is not None and key == "train":
            num_rows = min(self.limit, num_rows)
        fraction = self.validation_fraction if is_divided else 0.0
        indices = split_rows(num_rows, fraction, run_seed(self.seed))[is_divided and split == "validation"]
        examples, sizes, self.digests[split] = encode_tables(split, tables, indices, self.encoder, self.skip_bad_rows)
        self.examples[split] = examples
        if split == "train" and self.weights is not None:
            check_sizes(sizes, self.train)
            self.source_sizes = sizes

    def _examples(self, split: Split) -> list[Example]:
        if split not in self.examples:
            raise ValueError(f"{type(self).__name__} has no rows for {split}; set {split} to {ACCEPTED}")
        return self.examples[split]

    def _evaluation_loader(self, split: Split) -> DataLoader[Any]:
        """Each row once and in order, every `world_size`-th on this rank."""
        examples = self._examples(split)
        batch_size = self.eval_batch_size or self.batch_size
        batches = even_batches(split, len(examples), batch_size, self.rank, self.world_size)
        return row_loader(self, examples[self.rank :: self.world_size], batch_sampler=batches)


def row_loader(data: TokenizedDataModule, examples: list[Example], **order: Any) -> DataLoader[Any]:
    """A loader that draws nothing from the global random generator, on which dropout may depend."""
    return ResumableLoader(
        cast(Any, examples),
        num_workers=data.num_workers,
        collate_fn=data.encoder.collate,
        generator=torch.Generator().manual_seed(run_seed(data.seed)),
        **order,
    )


def check_arguments(data: TokenizedDataModule) -> None:
    """Raise a `ValueError` that names an argument which is out of its range or does not go with another.

    Raises:
        TypeError: If train, validation, test or predict is no source of rows.
    """
    for split in SPLITS_OF_STAGE[None]:
        check_sources(f"data.{split}", getattr(data, split), streaming=data.streaming and split == "train")
    for name in ("batch_size", "eval_batch_size", "max_prompt_length", "limit", "shuffle_window"):
        value = getattr(data, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for name in ("seed", "skip_bad_rows"):
        if (getattr(data, name) or 0) < 0:
            raise ValueError(f"{name} must not be negative, got {getattr(data, name)}")
    if not 0 <= data.validation_fraction < 1:
        raise ValueError(f"validation_fraction must be in [0, 1), got {data.validation_fraction}")
    if data.validation_fraction > 0 and data.validation is not None:
        raise ValueError(
            f"validation_fraction={data.validation_fraction} and validation exclude each other: validate on rows of "
            "train (set validation to null) or on rows of validation (leave out validation_fraction)"
        )
    if data.weights is not None:
        _check_weights(data.weights, len(list_sources(data.train)))
    if data.streaming and data.weights is not None:
        raise ValueError(
            "weights cannot be used with streaming, since the number of rows of each source has to be known; "
            "set streaming to false, or leave out weights to read the sources one after another"
        )
    if data.streaming and data.validation_fraction > 0:
        raise ValueError(
            f"validation_fraction={data.validation_fraction} cannot be used with streaming, since the rows are "
            "drawn from all; give the rows of validation, or set streaming to false"
        )


def _check_weights(weights: list[float], num_sources: int) -> None:
    if len(weights) != num_sources:
        raise ValueError(
            f"weights must have one number for each source of train, got {len(weights)} for {num_sources}; "
            "give train as a list"
        )
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ValueError(f"weights must be positive, got {weights}; leave out a source that is not to be used")


def check_sizes(sizes: list[int], train: Source) -> None:
    """Raise a `ValueError` if a weighted source has no row that can be used."""
    if 0 in sizes:
        name = source_name(list_sources(train)[sizes.index(0)])
        raise ValueError(
            f"train: no row of {name} can be used (a limit takes rows of the first sources first); "
            "leave it out of train and weights"
        )


def check_trainer(data: TokenizedDataModule, stage: str | None) -> None:
    """Raise a `ValueError` if the trainer would split the rows again, or lacks what streaming needs."""
    if data.world_size > 1 and cast(Any, data.trainer)._accelerator_connector.use_distributed_sampler:
        raise ValueError(
            f"{type(data).__name__} splits its rows among the ranks itself and the trainer would split them again; "
            "set use_distributed_sampler to false in the trainer"
        )
    if stage == "fit" and data.streaming and data.trainer is not None and data.trainer.max_steps == -1:
        raise ValueError(
            "streaming needs trainer.max_steps, since the number of rows is not known before they are read; set it"
        )


def find_tokenizer(data: TokenizedDataModule) -> PreTrainedTokenizerBase:
    """The named tokenizer, or that of the module which is trained."""
    if data.tokenizer is not None:
        return load_tokenizer(data.tokenizer)
    try:
        return cast(Any, data.trainer).lightning_module.tokenizer
    except AttributeError:
        raise ValueError(
            f"{type(data).__name__} has no tokenizer: there is no trainer whose module has one; "
            "set tokenizer to a folder or a hub name"
        ) from None


def disable_validation(trainer: Trainer) -> dict[str, Any]:
    """Switch off the validation of a fit, for which there are no rows.

    Lightning would warn of an empty loader, and refuse a ``val_check_interval`` above the batches of an epoch.

    Returns:
        The trainer's options as they were.
    """
    options = {"limit_val_batches": trainer.limit_val_batches, "val_check_interval": trainer.val_check_interval}
    if trainer.limit_val_batches:
        rank_zero_info("there are no validation rows, so this fit does not validate; set data.validation to some")
    trainer.limit_val_batches, trainer.val_check_interval = 0, 1.0
    return options
