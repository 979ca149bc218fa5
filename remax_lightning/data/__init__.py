"""Prompts, demonstrations and preferences as batches."""

from remax_lightning.data.demonstrations import DemonstrationDataModule
from remax_lightning.data.preferences import PreferenceDataModule
from remax_lightning.data.prompts import PromptDataModule

__all__ = ["DemonstrationDataModule", "PreferenceDataModule", "PromptDataModule"]
