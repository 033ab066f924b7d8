"""What a job is trained on. Start at `MicroBatch`, then `Rows`."""

from mxn.train.run.data.batch import IGNORED, MicroBatch

__all__ = ["IGNORED", "MicroBatch"]
