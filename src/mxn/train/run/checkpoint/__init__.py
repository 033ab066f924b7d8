"""Checkpoints of a training job. Writing: `Checkpointer`; finding and reading: `find`, `Stored`.

A checkpoint is a folder `step-00000100` with a safetensors file for each layer and `manifest.json`,
which lists them with size and checksum. The files know layers and names of tensors, never stages or
pipelines: a job may go on from it under any other plan. A folder without manifest does not exist.
"""

from mxn.train.run.checkpoint.manifest import Manifest, Position
from mxn.train.run.checkpoint.reading import with_checkpoint
from mxn.train.run.checkpoint.stored import Stored, find
from mxn.train.run.checkpoint.writer import Checkpointer

__all__ = ["Checkpointer", "Manifest", "Position", "Stored", "find", "with_checkpoint"]
