"""The command line: Lightning's sub-commands and the project's own; the only place that parses arguments."""

import inspect
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, IterableDataset
from jsonargparse import auto_cli, set_parsing_settings
from jsonargparse.typing import register_type
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from remax_lightning import data, modules, rewards, rollout, strategies  # noqa: F401 (known by short names)
from remax_lightning.callbacks import (
    Checkpoint,
    HFExport,
    ProgressLines,
    RankAgreement,
    ResponseWriter,
    SelfCheck,
    StepBar,
)
from remax_lightning.callbacks.hf_export import TrainingRecord, export_module, recorded
from remax_lightning.callbacks.resume_check import flat
from remax_lightning.callbacks.signal_guard import Terminated
from remax_lightning.checkpoints.find_checkpoint import checkpoint_folder
from remax_lightning.checkpoints.safe_checkpoint_io import read_verified
from remax_lightning.cli_arguments import Parser, check_data, check_trainer, prepare
from remax_lightning.cli_errors import TRACEBACK, escape_output, nearest, refuse, sentence, shows_traceback
from remax_lightning.cli_limits import limit_parsing
from remax_lightning.cli_ranks import end_with_launcher, watch_start
from remax_lightning.data.base import TokenizedDataModule
from remax_lightning.data.toy import make_toy_data
from remax_lightning.evaluation.report import report
from remax_lightning.models.visible_text import visible
from remax_lightning.modules.base import TrainableModule
from remax_lightning.modules.fingerprint import check_model
from remax_lightning.modules.hyperparameters import as_plain
from remax_lightning.plan import print_plan
from remax_lightning.rewards import RewardFunction

FUNCTIONS: dict[str, Any] = {"make-toy-data": make_toy_data, "report": report}


def refuse_python_only(value: object) -> str:
    """Refuse a value of a type that the command line cannot give, such as a loaded model.

    Raises:
        ValueError: Always.
    """
    raise ValueError(f"only Python code can give an object here, got {value!r}")


for python_only in (PreTrainedModel, PreTrainedTokenizerBase, RewardFunction, Dataset, IterableDataset):
    # the serializer, too: by default it would turn any list into text
    register_type(python_only, serializer=refuse_python_only, deserializer=refuse_python_only)

EPILOG = (
    f"An error is one sentence; set {TRACEBACK}=1 for the traceback. Completion of options in a shell (needs shtab): "
    "--print_completion shtab-bash > FILE, then source FILE. A configuration with explanations (needs ruamel.yaml): "
    "fit --config FILE --print_config=comments."
)
INTERRUPTED = 130  # what a shell says of a process that SIGINT ended


class ExportingTrainer(Trainer):
    """Lightning's trainer, which can also export a checkpoint and plan the memory of a run."""

    def export(
        self,
        model: TrainableModule,
        ckpt_path: str,
        output_dir: str,
        datamodule: LightningDataModule | None = None,
    ) -> None:
        """Writes the Hugging Face folder of a checkpoint.

        Args:
            model: The module whose checkpoint it is.
            ckpt_path: Checkpoint; or ``last`` for the newest or ``best`` for the best of the run.
            output_dir: Folder to write.
            datamodule: Not used.
        """
        model.configure_model()
        checkpoint = read_verified(ckpt_path)
        path = Path(checkpoint["read_from"])
        check_model(checkpoint, model, is_fit=False)
        model.load_state_dict(checkpoint["state_dict"], strict=model.strict_loading)
        record = TrainingRecord(type(model).__name__, int(checkpoint["global_step"]), path.name, is_last=False)
        for callback in self.checkpoint_callbacks:
            if isinstance(callback, Checkpoint):
                record = recorded(record, path, callback.store)
        export_module(model, output_dir, record)
        print(visible(f"exported {record} to {output_dir}"))

    @staticmethod
    def plan(model: Mapping[str, Any], gpus: int, gpu_memory: float = 80.0) -> None:
        """Prints the memory that a fit would take of each GPU; needs no GPU and downloads nothing.

        Args:
            model: The parsed configuration of the run.
            gpus: Number of GPUs.
            gpu_memory: Memory of each GPU in GiB, as it is sold: 80 for an "80 GB" A100.
        """
        print_plan(model, gpus, gpu_memory)


class CLI(LightningCLI):
    """LightningCLI with the project's defaults: where runs are logged, checkpoints, export, files of responses."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Callbacks that every run has, configurable by their own keys."""
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
        parser.link_arguments("trainer.default_root_dir", "checkpoint.dirpath", compute_fn=checkpoint_folder)
        parser.add_lightning_class_args(HFExport, "hf_export")
        parser.add_lightning_class_args(ResponseWriter, "response_writer")
        parser.add_lightning_class_args(ProgressLines, "progress_lines")
        parser.add_lightning_class_args(SelfCheck, "self_check")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's sub-commands, export and plan."""
        return {**LightningCLI.subcommands(), "export": {"model", "datamodule"}, "plan": {"model"}}

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parse the command line as it is meant; see :func:`prepare`."""
        given = sys.argv[1:] if args is None else args
        names = {name for each in self.subcommands() for name in method_arguments(each)}
        own = method_arguments(given[0]) if given[0] in self.subcommands() else names
        try:
            prepared = prepare(given, names - own)
        except (ValueError, OSError) as error:
            parser.error(str(error))
        self.config = parser.parse_args(prepared)

    def before_instantiate_classes(self) -> None:
        """Refuse what cannot run before anything is loaded."""
        config = self.config[self.subcommand]
        try:
            check_trainer(config)
            check_data(config, str(self.subcommand))
        except ValueError as error:
            self._parser(self.subcommand).error(str(error))

    def instantiate_classes(self) -> None:
        """Build the module, the data and the trainer; a plan needs none of them."""
        if self.subcommand == "plan":
            return
        try:
            super().instantiate_classes()
        except Exception as error:
            if shows_traceback() or (told := sentence(error)) is None:
                raise
            self._parser(self.subcommand).error(told)
        # of a callable the module knows no arguments; loggers want the learning rate
        optimizer = self._get(self.config, "model").as_dict()["init_args"]["optimizer"]
        self.model.hparams["optimizer"] = as_plain(optimizer)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Log to ``<default_root_dir>/logs`` (``validate``, ``test``, ... beside it) unless a logger is set."""
        given = self._get(self.config_init, "trainer")
        if given.logger in (None, True):
            name = "logs" if self.subcommand == "fit" else str(self.subcommand)
            kwargs["logger"] = CSVLogger(given.default_root_dir or ".", name=name, flush_logs_every_n_steps=10)
        if isinstance(given.strategy, str):
            kwargs["strategy"] = {"FSDP2Strategy": "fsdp2", "DDPStrategy": "ddp"}.get(given.strategy, given.strategy)
        callbacks = given.callbacks if isinstance(given.callbacks, list) else [given.callbacks]
        rows = self.datamodule if isinstance(self.datamodule, TokenizedDataModule) else None
        callbacks = [RankAgreement(flat(self._plain_config()), rows), *(each for each in callbacks if each is not None)]
        if given.enable_progress_bar is not False and not any(isinstance(each, ProgressBar) for each in callbacks):
            callbacks.append(StepBar())
        return super().instantiate_trainer(**kwargs, callbacks=callbacks)

    def _plain_config(self) -> dict[str, Any]:
        """The configuration of the sub-command as plain values."""
        subcommand = str(self.subcommand)
        values: dict[str, Any] = yaml.safe_load(self._parser(subcommand).dump(self.config[subcommand], skip_none=False))
        return values

    def before_fit(self) -> None:
        """Hand the configuration to the checkpoints, so that a resumed run can be compared with it."""
        config = self._plain_config()
        compared = {name: config.get(name) for name in ("seed_everything", "model", "data")}
        for callback in self.trainer.checkpoint_callbacks:
            if isinstance(callback, Checkpoint):
                callback.configuration = flat(compared)

    def _run_subcommand(self, subcommand: str) -> None:
        """Plan from the configuration alone, without a trainer or a module."""
        if subcommand != "plan":
            super()._run_subcommand(subcommand)
            return
        config = self.config.plan
        try:
            ExportingTrainer.plan(config.as_dict(), config.gpus, config.gpu_memory)
        except (ValueError, OSError) as error:
            self._parser("plan").error(str(error))

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Find the checkpoint of the run that ``--ckpt_path`` means.

        Lightning only warns where there is none and goes on with the weights as they are; here only ``fit`` with
        ``last`` starts from the beginning.
        """
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        (callback,) = (each for each in self.trainer.checkpoint_callbacks if isinstance(each, Checkpoint))
        callback.is_new_run = kwargs.get("ckpt_path") is None
        if kwargs.get("ckpt_path") not in (None, "hpc"):
            kwargs["ckpt_path"] = callback.find(str(kwargs["ckpt_path"]), is_fit=subcommand == "fit")
        return kwargs

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration as the user gave it: a checkpoint's hyper-parameters never override it."""


def method_arguments(subcommand: str) -> set[str]:
    """Settings that a sub-command has beside the trainer, the model and the data."""
    skipped = {"self", *CLI.subcommands()[subcommand]}
    return set(inspect.signature(getattr(ExportingTrainer, subcommand)).parameters) - skipped


def main(args: list[str] | None = None) -> None:
    """Run a sub-command; an error of the user's ends the process with one sentence.

    Args:
        args: The command line, from Python, where errors are raised as they are. The default is the process's own.
    """
    if args is not None:
        run(args)
        return
    escape_output()
    try:
        run(sys.argv[1:])
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        if (status := status_of_signal(error)) is not None:
            sys.exit(status)
        if isinstance(error, SystemExit):
            raise
        if shows_traceback() or (told := sentence(error)) is None:
            raise
        sys.exit(visible(f"error: {told}"))


def status_of_signal(error: BaseException | None) -> int | None:
    """The exit status of a process that a signal has ended, if an error came of one: in the middle of a save, say.

    Lightning leaves with 1 after SIGINT.
    """
    if error is None:
        return None
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, Terminated):
        return int(str(error.code))
    return status_of_signal(error.__cause__ or error.__context__)


def run(args: Sequence[str]) -> None:
    """Parse a command line and run its sub-command.

    Args:
        args: The sub-command and its arguments.
    """
    end_with_launcher()
    watch_start()
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning's own affair
    sys.path.append(os.getcwd())  # reward functions of the user's own
    set_parsing_settings(add_print_completion_argument=True)
    limit_parsing()
    names = [*CLI.subcommands(), *FUNCTIONS]
    if not args or (not args[0].startswith("-") and args[0] not in names):
        wrong = f", got {args[0]}{nearest(args[0], names)}" if args else "; --help says what they do"
        refuse(f"the first argument must be a sub-command: {', '.join(names)}{wrong}")
    if args[0] in FUNCTIONS:
        auto_cli(FUNCTIONS, args=list(args), as_positional=False, parser_class=Parser)
        return
    CLI(
        TrainableModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        trainer_class=ExportingTrainer,
        trainer_defaults={
            "inference_mode": False,  # a sharded model that first ran under inference mode cannot be trained
            "use_distributed_sampler": False,  # the data modules shard their rows themselves
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
        },
        seed_everything_default=0,
        auto_configure_optimizers=False,
        save_config_kwargs={"overwrite": True},
        parser_class=Parser,
        parser_kwargs={
            "description": "ReMax and its pipeline: supervised fine-tuning, reward model, ReMax. "
            "Further sub-commands, each with its own --help: make-toy-data (the quickstart's data), "
            "report (table, plot and summary of a tested run).",
            "epilog": EPILOG,
        },
        args=list(args),
    )
