"""A decoder that can be trained, cut into the layers of a plan. Start at `StageModule`."""

from mxn.train.run.net.stage import StageModule

__all__ = ["StageModule"]
