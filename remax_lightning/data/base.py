"""What the data modules share: sources, splits, dropped rows, batches and the position in the training order."""

from abc import abstractmethod
from collections.abc import Callable
from copy import copy
from dataclasses import asdict
from functools import partial
from typing import Any, Literal, TypeAlias, cast

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, SequentialSampler
from transformers import PreTrainedTokenizerBase

from remax_lightning.data.arguments import check_arguments, check_sizes
from remax_lightning.data.order import (
    EvenBatches,
    Position,
    ResumableLoader,
    TrainingOrder,
    count_batches,
    mixed_rows,
    shuffled_rows,
    split_rows,
)
from remax_lightning.data.reading import Example, encode_parts
from remax_lightning.data.rows import LongPrompts, RowEncoder
from remax_lightning.data.sources import ACCEPTED, Part, load_parts
from remax_lightning.data.streaming import POSITION, StreamedWindows, StreamLoader
from remax_lightning.models.tokenizer import load_tokenizer

Source: TypeAlias = str | list[str] | None
Batch: TypeAlias = dict[str, Any]
Split: TypeAlias = Literal["train", "validation", "test", "predict"]

SPLITS_OF_STAGE: dict[str | None, tuple[Split, ...]] = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("predict",),
    None: ("train", "validation", "test", "predict"),
}


class TokenizedDataModule(RowEncoder, LightningDataModule):
    """Rows of known formats as batches of tokens, in an order that survives a resume exactly.

    Use it with `Trainer(use_distributed_sampler=False)`: it splits its rows over the processes itself.
    """

    def __init__(
        self,
        train: Source = None,
        validation: Source = None,
        test: Source = None,
        predict: Source = None,
        weights: list[float] | None = None,
        validation_fraction: float = 0.0,
        limit: int | None = None,
        streaming: bool = False,
        shuffle_window: int = 1024,
        skip_bad_rows: int = 0,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        max_prompt_length: int = 512,
        long_prompts: LongPrompts = "drop",
        as_chat: bool = False,
        prompt_column: str | None = None,
        tokenizer: str | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        """Set up nothing yet.

        Args:
            train: Training rows: a file (.json, .jsonl, .parquet, .csv; .gz too), glob, folder or hub name
                `owner/name[/configuration][:split]` (split `train` if not given), or a list of them.
            validation: Rows for validation, likewise.
            test: Rows for testing, likewise.
            predict: Rows to write responses for, likewise. The default is ``test``.
            weights: Weight of each source of ``train``, in whose proportions its rows are drawn. An epoch has as many
                rows as all sources together. Each source gives its share of them and goes through its own rows in
                passes, each in a new order, so the rows of a small source with a large weight come several times an
                epoch and those of a large one with a small weight are spread over several. The default is each row
                of each source once an epoch.
            validation_fraction: Share of the training rows, drawn by ``seed``, that is kept for validation when
                ``validation`` is not given.
            limit: Use only the first rows of ``train``, this many. The default is all.
            streaming: Read the training rows as they are needed, for sources that are too large to load; the trainer
                needs ``max_steps``. An epoch ends with the last source. The first rows tell the columns of a .jsonl
                file. Processes do not share the reading: each reads and tokenizes all rows.
            shuffle_window: With ``streaming``, rows that are held at once; a row's place is drawn within those.
            skip_bad_rows: Rows that may be corrupt (lines of .jsonl files that are not JSON, text that is not UTF-8):
                so many of a split, or of an epoch of a stream, are dropped and counted, one more is an error.
            batch_size: Rows per process and training step.
            eval_batch_size: Rows per process and step outside training, at most. The default is ``batch_size``.
            max_prompt_length: Longest prompt, in tokens.
            long_prompts: What happens to a longer prompt: `drop` its row, `truncate` it to its last tokens, or
                `keep_start` of a text that is to be continued: its first tokens, with which a reward sees it too
                (messages are dropped).
            as_chat: Turn a text prompt into a user message (a `Human:`/`Assistant:` transcript into its turns), so that
                the tokenizer's chat template is applied.
            prompt_column: Column with the prompts, text or messages. The default is found by the names of the columns.
            tokenizer: Folder or hub name of the tokenizer. The default is the model's.
            num_workers: Processes that prepare batches. With 0, the training process does.
            seed: Decides the order of the training rows and which of them are kept for validation.
        """
        check_arguments(locals())
        super().__init__(max_prompt_length, long_prompts, as_chat)
        self.sources: dict[Split, Source] = {
            "train": train,
            "validation": validation,
            "test": test,
            "predict": test if predict is None else predict,
        }
        self.weights = weights
        self.validation_fraction = validation_fraction
        self.limit = limit
        self.streaming = streaming
        self.shuffle_window = shuffle_window
        self.skip_bad_rows = skip_bad_rows
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.prompt_column = prompt_column
        self.tokenizer_name = tokenizer
        self.num_workers = num_workers
        self.seed = seed
        self.position = Position()
        self.examples: dict[Split, list[Example]] = {}
        self.source_sizes: list[int] = []
        self.stream: list[Part] = []

    @abstractmethod
    def collator(self, pad_token_id: int) -> Callable[[list[Example]], Batch]:
        """The function that makes a batch of examples."""

    @property
    def rank(self) -> int:
        """This process among those that share the rows."""
        return 0 if self.trainer is None else self.trainer.global_rank

    @property
    def world_size(self) -> int:
        """Number of processes that share the rows."""
        return 1 if self.trainer is None else self.trainer.world_size

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenize the splits of a stage. A trainer that has taken no step yet begins with the first row."""
        if stage == "fit" and self.trainer is not None and self.trainer.global_step == 0:
            self.load_state_dict(asdict(Position()))
        self._check_trainer(stage)
        self.tokenizer = self._find_tokenizer()
        for split in SPLITS_OF_STAGE[stage]:
            if split == "train" and self.streaming:
                self.stream = self._load(split, self.sources[split], streaming=True)
            else:
                self._read_split(split)
        if stage is not None and not (stage == "fit" and self.stream):
            self._examples(SPLITS_OF_STAGE[stage][0])

    def train_dataloader(self) -> DataLoader[Any] | StreamLoader:
        """Batches of the training rows from the current position on."""
        if self.stream:
            return self._stream_loader()
        examples = self._examples("train")
        if self.weights is None:
            rows_of_epoch = partial(shuffled_rows, num_rows=len(examples), seed=self.seed)
        else:
            rows_of_epoch = partial(mixed_rows, sizes=self.source_sizes, weights=self.weights, seed=self.seed)
        order = TrainingOrder(len(examples), self.batch_size, self.rank, self.world_size, self.position, rows_of_epoch)
        if len(order) == 0:
            raise ValueError(
                f"train has {len(examples)} usable rows, fewer than one batch of batch_size={self.batch_size} on each "
                f"of {self.world_size} process(es); lower batch_size or give more rows"
            )
        return self._loader(examples, batch_size=self.batch_size, sampler=order)

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
        """Count a training batch as handed out."""
        streamed_up_to = batch.pop(POSITION, None)
        if self.trainer is not None and self.trainer.training:
            if streamed_up_to is None:
                self.position.advance(self.batch_size * self.world_size, len(self._examples("train")))
            else:
                self.load_state_dict(asdict(streamed_up_to))
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position in the training order."""
        return asdict(self.position)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved position."""
        self.position.epoch, self.position.rows = state_dict["epoch"], state_dict["rows"]

    def _check_trainer(self, stage: str | None) -> None:
        if self.world_size > 1 and cast(Any, self.trainer)._accelerator_connector.use_distributed_sampler:
            raise ValueError(
                f"{type(self).__name__} splits its rows over the processes itself and the trainer would split them "
                "again; set use_distributed_sampler to false in the trainer"
            )
        if stage == "fit" and self.streaming and self.trainer is not None and self.trainer.max_steps == -1:
            raise ValueError(
                "streaming needs trainer.max_steps, since the number of rows is not known before they are read; set it"
            )

    def _find_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer_name is not None:
            return load_tokenizer(self.tokenizer_name)
        try:
            return cast(Any, self.trainer).lightning_module.tokenizer
        except AttributeError:
            raise ValueError(
                f"{type(self).__name__} has no tokenizer: there is no trainer whose module has one; "
                "set tokenizer to a folder or a hub name"
            ) from None

    def _load(self, split: Split, source: Source, streaming: bool = False) -> list[Part]:
        """The parts of a split's source, whose formats are known."""
        parts = [] if source is None else load_parts(source, streaming=streaming)
        for part in parts:
            self.check_format(split if isinstance(source, str) else f"{split}, {part.source}", list(part.columns))
        return parts

    def _read_split(self, split: Split) -> None:
        """Read and tokenize the rows that belong to a split; nothing without a source."""
        is_cut = (
            split in ("train", "validation") and self.sources["validation"] is None and self.validation_fraction > 0
        )
        parts = self._load(split, self.sources["train" if is_cut else split])
        if not parts:
            return
        num_rows = sum(len(cast(Any, part.rows)) for part in parts)
        if self.limit is not None and (split == "train" or is_cut):
            num_rows = min(self.limit, num_rows)
        fraction = self.validation_fraction if is_cut else 0.0
        indices = split_rows(num_rows, fraction, self.seed)[split == "validation" and is_cut]
        examples, sizes = encode_parts(split, parts, indices, self.encode, self.skip_bad_rows)
        self.examples[split] = examples
        if split == "train" and self.weights is not None:
            check_sizes(sizes, cast(list[str], self.sources["train"]))
            self.source_sizes = sizes

    def _examples(self, split: Split) -> list[Example]:
        if split not in self.examples:
            raise ValueError(f"{type(self).__name__} has no rows for {split}; set {split} to {ACCEPTED}")
        return self.examples[split]

    def _evaluation_loader(self, split: Split) -> DataLoader[Any]:
        """Every row once and in order, every `world_size`-th on this process."""
        examples = self._examples(split)
        num_batches = count_batches(len(examples), self.eval_batch_size, self.world_size)
        if num_batches == 0:
            raise ValueError(
                f"{split} has {len(examples)} usable rows for {self.world_size} processes; give at least one for each"
            )
        own = examples[self.rank :: self.world_size]
        batches = EvenBatches(SequentialSampler(own), self.eval_batch_size, drop_last=False, num_batches=num_batches)
        return self._loader(own, batch_sampler=batches)

    def _stream_loader(self) -> StreamLoader:
        reader = copy(self)  # what the workers get: no trainer, no rows
        reader.trainer, reader.examples = None, {}
        return StreamLoader(
            StreamedWindows(self.stream, reader.encode, self.shuffle_window, self.limit, self.seed),
            self.batch_size,
            self.rank,
            self.world_size,
            self.position,
            self.collator(cast(int, self.tokenizer.pad_token_id)),
            self.num_workers,
            self.skip_bad_rows,
        )

    def _loader(self, examples: list[Example], **order: Any) -> DataLoader[Any]:
        """A loader that draws nothing from the global random generator, on which dropout may depend."""
        return ResumableLoader(
            cast(Any, examples),
            num_workers=self.num_workers,
            collate_fn=self.collator(cast(int, self.tokenizer.pad_token_id)),
            generator=torch.Generator().manual_seed(self.seed),
            **order,
        )
