"""What a job is trained on: files become tokens (`prepare`), tokens become `Rows`."""

from mxn.train.run.data.batch import IGNORED, MicroBatch
from mxn.train.run.data.cache import DataSettings, TokenCache, prepare
from mxn.train.run.data.rows import Rows

__all__ = ["IGNORED", "DataSettings", "MicroBatch", "Rows", "TokenCache", "prepare"]
