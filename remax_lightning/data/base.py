"""What the data modules share: sources, splits, dropped rows, batches and the position in the training order."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import torch
from datasets import Dataset
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, SequentialSampler
from transformers import PreTrainedTokenizerBase

from remax_lightning.data.formats import Format, Row, UnusableRow, to_chat
from remax_lightning.data.order import EvenBatches, Position, ResumableLoader, TrainingOrder, count_batches
from remax_lightning.data.reading import Example, encode_rows
from remax_lightning.data.sources import ACCEPTED, load_rows
from remax_lightning.models.tokenizer import Prompt, encode_prompt, load_tokenizer

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


class TokenizedDataModule(LightningDataModule):
    """Rows of known formats as batches of tokens, in an order that survives a resume exactly.

    Use it with `Trainer(use_distributed_sampler=False)`: it splits its rows over the processes itself.
    """

    def __init__(
        self,
        train: Source = None,
        validation: Source = None,
        test: Source = None,
        predict: Source = None,
        validation_fraction: float = 0.0,
        limit: int | None = None,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        max_prompt_length: int = 512,
        long_prompts: Literal["drop", "truncate"] = "drop",
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
            validation_fraction: Share of the training rows, drawn by ``seed``, that is kept for validation when
                ``validation`` is not given.
            limit: Use only the first rows of ``train``, this many. The default is all.
            batch_size: Rows per process and training step.
            eval_batch_size: Rows per process and step outside training, at most. The default is ``batch_size``.
            max_prompt_length: Longest prompt, in tokens.
            long_prompts: What happens to a longer prompt: `drop` its row, or `truncate` it to its last tokens.
            as_chat: Turn a text prompt into a user message (a `Human:`/`Assistant:` transcript into its turns), so that
                the tokenizer's chat template is applied.
            prompt_column: Column with the prompts, text or messages. The default is found by the names of the columns.
            tokenizer: Folder or hub name of the tokenizer. The default is the model's.
            num_workers: Processes that prepare batches. With 0, the training process does.
            seed: Decides the order of the training rows and which of them are kept for validation.
        """
        super().__init__()
        self.sources: dict[Split, Source] = {
            "train": train,
            "validation": validation,
            "test": test,
            "predict": test if predict is None else predict,
        }
        self.validation_fraction = validation_fraction
        self.limit = limit
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.max_prompt_length = max_prompt_length
        self.long_prompts = long_prompts
        self.as_chat = as_chat
        self.prompt_column = prompt_column
        self.tokenizer_name = tokenizer
        self.num_workers = num_workers
        self.seed = seed
        self.position = Position()
        self.examples: dict[Split, list[Example]] = {}
        self.tokenizer: PreTrainedTokenizerBase  # set by setup
        _check_arguments(self)

    @abstractmethod
    def choose_format(self, columns: list[str]) -> Format | None:
        """How to read rows with these columns; None if no known format has what is needed."""

    @abstractmethod
    def encode(self, row: Row, data_format: Format) -> Example:
        """Turn a row into token ids and whatever else its batch needs.

        Raises:
            UnusableRow: If the row is to be dropped.
        """

    @abstractmethod
    def collator(self, pad_token_id: int) -> Callable[[list[Example]], Batch]:
        """The function that makes a batch of examples."""

    @property
    def column_arguments(self) -> str:
        """Names of the arguments that name columns."""
        return "prompt_column"

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
        self._check_trainer()
        self.tokenizer = self._find_tokenizer()
        for split in SPLITS_OF_STAGE[stage]:
            selected = self._select_rows(split)
            if selected is not None:
                rows, indices = selected
                encode = partial(self.encode, data_format=self._check_format(split, rows.column_names))
                self.examples[split] = encode_rows(split, rows, indices, encode)
        if stage is not None:
            self._examples(SPLITS_OF_STAGE[stage][0])

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of the training rows from the current position on."""
        examples = self._examples("train")
        order = TrainingOrder(len(examples), self.batch_size, self.rank, self.world_size, self.seed, self.position)
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
        if self.trainer is not None and self.trainer.training:
            self.position.advance(self.batch_size * self.world_size, len(self._examples("train")))
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position in the training order."""
        return asdict(self.position)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved position."""
        self.position.epoch, self.position.rows = state_dict["epoch"], state_dict["rows"]

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Tokens of a prompt, no more than the longest length allowed.

        Raises:
            UnusableRow: If there are more and long prompts are dropped.
        """
        ids = encode_prompt(self.tokenizer, prompt)
        if len(ids) > self.max_prompt_length and self.long_prompts == "drop":
            raise UnusableRow(f"prompt above {self.max_prompt_length} tokens")
        return ids[-self.max_prompt_length :]

    def canonical_prompt(self, prompt: Prompt) -> Prompt:
        """The prompt; messages if `as_chat`."""
        return to_chat(prompt) if self.as_chat else prompt

    def canonical_response(self, response: str) -> str:
        """The response; without the blank that sets it off from a text prompt if `as_chat`."""
        return response.strip() if self.as_chat else response

    def _check_trainer(self) -> None:
        if self.world_size > 1 and cast(Any, self.trainer)._accelerator_connector.use_distributed_sampler:
            raise ValueError(
                f"{type(self).__name__} splits its rows over the processes itself and the trainer would split them "
                "again; set use_distributed_sampler to false in the trainer"
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

    def _select_rows(self, split: Split) -> tuple[Dataset, list[int]] | None:
        """Rows of a split's source and the indices of those that belong to it; None without a source."""
        is_cut = (
            split in ("train", "validation") and self.sources["validation"] is None and self.validation_fraction > 0
        )
        source = self.sources["train" if is_cut else split]
        if source is None:
            return None
        rows = load_rows(source)
        if self.limit is not None and (split == "train" or is_cut):
            rows = rows.select(range(min(self.limit, len(rows))))
        if not is_cut:
            return rows, list(range(len(rows)))
        shuffled = np.random.default_rng(self.seed).permutation(len(rows)).tolist()
        held_out = max(1, round(len(rows) * self.validation_fraction))
        return rows, sorted(shuffled[held_out:] if split == "train" else shuffled[:held_out])

    def _check_format(self, split: Split, columns: list[str]) -> Format:
        data_format = self.choose_format(columns)
        if data_format is None or not set(columns).issuperset(data_format.columns):
            lacking = "none of the known formats" if data_format is None else f"not all of {data_format.columns}"
            raise ValueError(
                f"{split}: the rows have the columns {columns}, {lacking}; "
                f"set {self.column_arguments} to the names of columns that they have"
            )
        return data_format

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

    def _loader(self, examples: list[Example], **order: Any) -> DataLoader[Any]:
        """A loader that draws nothing from the global random generator, on which dropout may depend."""
        return ResumableLoader(
            cast(Any, examples),
            num_workers=self.num_workers,
            collate_fn=self.collator(cast(int, self.tokenizer.pad_token_id)),
            generator=torch.Generator().manual_seed(self.seed),
            **order,
        )


def _check_arguments(module: TokenizedDataModule) -> None:
    for name in ("batch_size", "eval_batch_size", "max_prompt_length", "limit"):
        value = vars(module)[name]
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0 <= module.validation_fraction < 1:
        raise ValueError(f"validation_fraction must be in [0, 1), got {module.validation_fraction}")
    if module.seed < 0:
        raise ValueError(f"seed must not be negative, got {module.seed}")


def check_lengths(max_prompt_length: int, max_length: int) -> None:
    """Raise a `ValueError` if the limits leave no room for a response."""
    if max_length <= max_prompt_length:
        raise ValueError(
            f"max_length must exceed max_prompt_length to leave room for a response, got {max_length} and "
            f"{max_prompt_length}; raise max_length or lower max_prompt_length"
        )
