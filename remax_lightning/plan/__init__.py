"""What a run will take of a GPU's memory, before it is started."""

from remax_lightning.plan.report import print_plan

__all__ = ["print_plan"]
