"""Prompts, demonstrations and preferences as batches."""

from remax_lightning.data.data_modules import DemonstrationDataModule, PreferenceDataModule, PromptDataModule

__all__ = ["DemonstrationDataModule", "PreferenceDataModule", "PromptDataModule"]
