"""The command line: Lightning's sub-commands and the project's own; the only place that parses arguments."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from jsonargparse import auto_cli
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger

from remax_lightning import data, modules, rewards, rollout  # noqa: F401 (their classes are known by short names)
from remax_lightning.callbacks import Checkpoint, HFExport, ResponseWriter
from remax_lightning.data.toy import write_world
from remax_lightning.evaluation.report import report
from remax_lightning.models.export import export
from remax_lightning.modules.base import TrainableModule

FUNCTIONS: dict[str, Callable[..., Any]] = {"world": write_world, "report": report}


class ExportingTrainer(Trainer):
    """Lightning's trainer, which can also export a checkpoint."""

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
            ckpt_path: Checkpoint file, such as runs/remax/checkpoints/last.ckpt.
            output_dir: Folder to write.
            datamodule: Not used.
        """
        model.configure_model()
        checkpoint = torch.load(ckpt_path, map_location="cpu", weights_only=True)
        model.load_state_dict(checkpoint["state_dict"])
        export(model.trained_model, model.tokenizer, output_dir)
        print(f"exported {ckpt_path} to {output_dir}")


class CLI(LightningCLI):
    """LightningCLI with the project's defaults: where runs are logged, checkpoints, export, files of responses."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Callbacks that every run has, configurable by their own keys."""
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
        parser.add_lightning_class_args(HFExport, "hf_export")
        parser.add_lightning_class_args(ResponseWriter, "response_writer")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's sub-commands, and export."""
        return {**LightningCLI.subcommands(), "export": {"model", "datamodule"}}

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Log to ``<default_root_dir>/logs`` (``validate``, ``test``, ... beside it) unless a logger is set."""
        if self._get(self.config_init, "trainer.logger") in (None, True):
            root = self._get(self.config_init, "trainer.default_root_dir") or "."
            name = "logs" if self.subcommand == "fit" else str(self.subcommand)
            kwargs["logger"] = CSVLogger(root, name=name, flush_logs_every_n_steps=10)
        return super().instantiate_trainer(**kwargs)

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration as the user gave it: a checkpoint's hyper-parameters never override it."""


def main(args: list[str] | None = None) -> None:
    """Run a sub-command.

    Args:
        args: The command line; the default is the process's own.
    """
    given = sys.argv[1:] if args is None else args
    if given and given[0] in FUNCTIONS:
        auto_cli(FUNCTIONS, args=given)
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
