"""`shoal shard`: cuts a checkpoint by role and expert, so that each rank reads whole files from end to end."""

from model_shards.cut.cut import CutReport, cut_checkpoint

__all__ = ["CutReport", "cut_checkpoint"]
