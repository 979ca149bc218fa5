"""The command line: Lightning's sub-commands and the project's own; the only place that parses arguments."""

import os
import sys
import traceback
import warnings
from collections.abc import Mapping
from typing import Any

import yaml
from jsonargparse import auto_cli
from jsonargparse.typing import register_type
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from remax_lightning import data, modules, rewards, rollout, strategies  # noqa: F401 (known by short names)
from remax_lightning.callbacks import Checkpoint, HFExport, ProgressLines, ResponseWriter, SelfCheck
from remax_lightning.callbacks.find_checkpoint import checkpoint_folder, verified
from remax_lightning.callbacks.hf_export import TrainingRecord, export_module, recorded
from remax_lightning.callbacks.resume_check import check_model, flat
from remax_lightning.callbacks.safe_checkpoint_io import read_checkpoint
from remax_lightning.data.toy import write_world
from remax_lightning.evaluation.report import report
from remax_lightning.modules.base import TrainableModule
from remax_lightning.modules.supported import unsupported_strategy
from remax_lightning.plan import print_plan
from remax_lightning.rewards import RewardFunction


def refuse_python_object(value: object) -> Any:
    """Refuse a value for what only Python code can give, such as a loaded model."""
    raise ValueError(f"only Python code can give an object here, got {value!r}")


# what only Python code can give; on the command line no class of these is looked for
for python_type in (PreTrainedModel, PreTrainedTokenizerBase, RewardFunction):
    register_type(python_type, deserializer=refuse_python_object)

FUNCTIONS: dict[str, Any] = {"world": write_world, "report": report}


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
        path = verified(ckpt_path)
        checkpoint = read_checkpoint(path)
        check_model(checkpoint, model, is_fit=False)
        model.load_state_dict(checkpoint["state_dict"], strict=model.strict_loading)
        record = TrainingRecord(type(model).__name__, int(checkpoint["global_step"]), path.name, is_last=False)
        for callback in self.checkpoint_callbacks:
            if isinstance(callback, Checkpoint):
                record = recorded(record, path, callback.store)
        export_module(model, output_dir, record)
        print(f"exported {record} to {output_dir}")

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

    def instantiate_classes(self) -> None:
        """Show what is wrong with an argument as one sentence; jsonargparse wraps it in many."""
        if self.subcommand == "plan":
            return
        try:
            super().instantiate_classes()
        except (ValueError, OSError) as error:
            if (own := own_error(error)) is None:
                raise
            self._parser(self.subcommand).error(str(own))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Log to ``<default_root_dir>/logs`` (``validate``, ``test``, ... beside it) unless a logger is set."""
        if self._get(self.config_init, "trainer.logger") in (None, True):
            root = self._get(self.config_init, "trainer.default_root_dir") or "."
            name = "logs" if self.subcommand == "fit" else str(self.subcommand)
            kwargs["logger"] = CSVLogger(root, name=name, flush_logs_every_n_steps=10)
        strategy = self._get(self.config_init, "trainer.strategy")
        if isinstance(strategy, str) and not strategy.startswith(("auto", "ddp", "fsdp2")):
            raise unsupported_strategy(strategy)  # before Lightning asks for what it would take
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        """Hand the configuration to the checkpoints, so that a resumed run can be compared with it."""
        config = yaml.safe_load(self._parser(self.subcommand).dump(self.config.fit, skip_none=False))
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
        if kwargs.get("ckpt_path") not in (None, "hpc"):
            (callback,) = (each for each in self.trainer.checkpoint_callbacks if isinstance(each, Checkpoint))
            kwargs["ckpt_path"] = callback.find(str(kwargs["ckpt_path"]), is_fit=subcommand == "fit")
        return kwargs

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration as the user gave it: a checkpoint's hyper-parameters never override it."""


def own_error(error: BaseException) -> BaseException | None:
    """The innermost error of a chain that was raised by this package; None if there is none."""
    chain = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(inner)
    for each in reversed(chain):
        raised_in = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(each.__traceback__)]
        if raised_in and raised_in[-1].startswith("remax_lightning."):
            return each
    return None


def main(args: list[str] | None = None) -> None:
    """Run a sub-command.

    Args:
        args: The command line; the default is the process's own.
    """
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning's own affair
    sys.path.append(os.getcwd())  # reward functions of the user's own
    given = sys.argv[1:] if args is None else args
    if given and given[0] in FUNCTIONS:
        auto_cli(FUNCTIONS, args=given, as_positional=False)
        return
    CLI(
        TrainableModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        trainer_class=ExportingTrainer,
        trainer_defaults={
            "inference_mode": False,  # a sharded model that first ran under inference mode cannot be trained
            "use_distributed_sampler": False,  # the data modules split their rows over the processes themselves
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
        },
        seed_everything_default=0,
        auto_configure_optimizers=False,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={
            "description": "ReMax and its pipeline: supervised fine-tuning, reward model, ReMax. "
            "Further sub-commands, each with its own --help: world (make the quickstart's data), "
            "report (table, plot and summary of a tested run)."
        },
        args=args,
    )
