"""What happens around training: checkpoints, export, files of responses."""

from remax_lightning.callbacks.checkpoint import Checkpoint
from remax_lightning.callbacks.gradient_variance import GradientVariance
from remax_lightning.callbacks.hf_export import HFExport
from remax_lightning.callbacks.progress_lines import ProgressLines, StepBar
from remax_lightning.callbacks.rank_agreement import RankAgreement
from remax_lightning.callbacks.response_writer import ResponseWriter
from remax_lightning.callbacks.self_check import SelfCheck

__all__ = [
    "Checkpoint",
    "GradientVariance",
    "HFExport",
    "ProgressLines",
    "RankAgreement",
    "ResponseWriter",
    "SelfCheck",
    "StepBar",
]
