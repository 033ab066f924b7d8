"""Writes checkpoints while training goes on: copy to the host, then a thread does the rest.

Each rank has a `Checkpointer` and writes the layers it was told to; a rank needs no word from the
others, only the same folder. Rank 0 waits for the pieces of all, writes the manifest and renames
the folder: until then it does not exist for a reader. Knows no plan and no optimizer.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mxn.errors import MxnError
from mxn.train.run.checkpoint import manifest as manifests
from mxn.train.run.checkpoint.files import Written, sync_folder, write_json, write_tensors
from mxn.train.run.checkpoint.manifest import Manifest, Position, ShardFile
from mxn.train.run.checkpoint.reading import remove

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("mxn.train")

_POLL_S = 0.02
Layers = Mapping[int, Mapping[str, "Tensor"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What all checkpoints of a launch have in common."""

    job: str  # fingerprint
    plan: str  # fingerprint
    plan_json: str
    num_layers: int
    num_ranks: int
    launch: int  # how often the ranks were started: keeps pieces of a killed launch apart
    told: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Costs:
    """Seconds, summed over the checkpoints of this rank."""

    num_saved: int = 0
    num_failed: int = 0
    copy_s: float = 0.0  # training stood still for the copy
    wait_s: float = 0.0  # and for the write before, where checkpoints come too often
    write_s: float = 0.0  # in the thread


class Checkpointer:
    """One rank's writer. `save` returns when the tensors are copied; `close` when all is written.

    A write that fails (disk full) is logged and counted, training goes on, and the next is tried;
    `close` raises when the last one failed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rank: int,
        identity: Identity,
        keep: int,
        patience_s: float = 600.0,
    ) -> None:
        self.folder, self.rank, self.identity, self.keep = folder, rank, identity, keep
        self.patience_s = patience_s
        self.costs = Costs()
        self._buffers: dict[tuple[int | None, str], Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def save(
        self, position: Position, layers: Layers, of_rank: Mapping[str, Tensor] | None = None
    ) -> None:
        """Copy the tensors and let them be written. Every rank calls it at the same step.

        `layers`: those that this rank is to write, by number; `of_rank`: what only it can use.
        """
        started = time.perf_counter()
        self._join()
        waited = time.perf_counter()
        done: dict[int, Tensor] = {}
        copies = {layer: self._copy(layer, tensors, done) for layer, tensors in layers.items()}
        own = self._copy(None, of_rank or {}, done)
        _synchronize([*layers.values(), of_rank or {}])
        self.costs.wait_s += waited - started
        self.costs.copy_s += time.perf_counter() - waited
        self._thread = threading.Thread(
            target=self._run, args=(position, copies, own), name="checkpoint", daemon=True
        )
        self._thread.start()

    def is_writing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def close(self) -> None:
        """Wait until the last checkpoint is complete. Raises: MxnError when it failed."""
        self._join()
        if self._error is not None:
            raise MxnError(
                f"the last checkpoint could not be written: {self._error}",
                hint=f"check the space and the rights of {self.folder}",
            ) from self._error

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    # -- in the caller's thread ------------------------------------------------------------------

    def _copy(
        self, layer: int | None, tensors: Mapping[str, Tensor], done: dict[int, Tensor]
    ) -> dict[str, Tensor]:
        """Copy to host memory that is kept for the next time (pinned where a device copies).

        `done`: the copies of this save by their source. A matrix that embedding and head share is
        copied once.
        """
        import torch

        copies = {}
        for name, tensor in tensors.items():
            if id(tensor) in done:
                copies[name] = done[id(tensor)]
                continue
            buffer = self._buffers.get((layer, name))
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                is_away = tensor.device.type != "cpu"
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=is_away)
                self._buffers[layer, name] = buffer
            copies[name] = buffer.copy_(tensor.detach(), non_blocking=True)
            done[id(tensor)] = buffer
        return copies

    # -- in the thread ---------------------------------------------------------------------------

    def _run(self, position: Position, layers: Layers, own: Mapping[str, Tensor]) -> None:
        started = time.perf_counter()
        try:
            self._write(position, layers, own)
            self._error = None
            self.costs.num_saved += 1
        except Exception as error:  # whatever it was, training must not end by it
            self._error = error
            self.costs.num_failed += 1
            log.error("checkpoint of step %d failed: %s", position.step, error)
        finally:
            self.costs.write_s += time.perf_counter() - started

    def _write(self, position: Position, layers: Layers, own: Mapping[str, Tensor]) -> None:
        name = manifests.partial_name(position.step, self.identity.launch)
        partial = self.folder / name
        partial.mkdir(exist_ok=True)
        problem: Exception | None = None
        try:
            files: dict[str, ShardFile] = {}
            for layer, tensors in layers.items():
                self._write_file(partial, files, f"layer-{layer:05d}", layer, tensors)
            if own:
                self._write_file(partial, files, "rank", None, own)
            told: dict[str, Any] = {"files": {n: asdict(file) for n, file in files.items()}}
        except Exception as error:
            # What was written goes first: on a full disk there is no room to say so otherwise.
            for path in partial.glob(f"*.{self.rank:04d}.safetensors"):
                path.unlink()
            problem, told = error, {"error": str(error)}
        write_json(partial / _piece(self.rank), told)
        if self.rank == 0:
            self._complete(position, partial)  # removes what the others wrote, if one has failed
        elif problem is not None:
            raise problem

    def _write_file(
        self,
        partial: Path,
        files: dict[str, ShardFile],
        stem: str,
        layer: int | None,
        tensors: Mapping[str, Tensor],
    ) -> None:
        name = f"{stem}.{self.rank:04d}.safetensors"
        written = write_tensors(partial / name, tensors)
        files[name] = ShardFile(layer=layer, rank=self.rank, written=written)

    def _complete(self, position: Position, partial: Path) -> None:
        """Wait for the pieces of all ranks, write the manifest, rename, drop the oldest."""
        files = self._gather(partial)
        identity = self.identity
        manifest = Manifest(
            position=position, job=identity.job, plan=identity.plan, plan_json=identity.plan_json,
            num_layers=identity.num_layers, num_ranks=identity.num_ranks, files=files,
            told=identity.told,
        )  # fmt: skip
        if missing := manifest.missing_layers():
            raise MxnError(f"no rank wrote layer {missing[0]}")
        for rank in range(identity.num_ranks):
            (partial / _piece(rank)).unlink()
        manifest.write(partial)
        final = self.folder / manifests.folder_name(position.step)
        # A run that went back to an older one comes by again.
        if final.exists() and not remove(final):
            final.rename(_free(partial))  # who reads it finds it gone, and takes this one
        partial.rename(final)
        sync_folder(self.folder)
        for _, old in manifests.complete(self.folder)[: -self.keep]:
            if not remove(old):
                log.info("%s is being read: it is removed behind the next one", old.name)

    def _gather(self, partial: Path) -> dict[str, ShardFile]:
        files: dict[str, ShardFile] = {}
        deadline = time.monotonic() + self.patience_s
        ranks = range(self.identity.num_ranks)
        pieces = [_await_piece(partial / _piece(rank), deadline) for rank in ranks]
        for rank, told in enumerate(pieces):
            if "error" in told:
                shutil.rmtree(partial)  # nobody writes to it any more
                raise MxnError(f"rank {rank} could not write its part: {told['error']}")
            for name, file in told["files"].items():
                written = Written(**file["written"])
                files[name] = ShardFile(layer=file["layer"], rank=rank, written=written)
        return files


def _synchronize(sources: Iterable[Mapping[str, Tensor]]) -> None:
    """Wait until tensors of devices are copied, whatever the device: none says when it is."""
    import torch

    devices = {tensor.device for tensors in sources for tensor in tensors.values()}
    for device in devices:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)


def _piece(rank: int) -> str:
    return f"piece-{rank:04d}.json"


def _await_piece(path: Path, deadline: float) -> dict[str, Any]:
    while True:
        try:
            return json.loads(path.read_bytes())
        except FileNotFoundError:
            if time.monotonic() > deadline:
                raise MxnError(f"{path.name} did not come in time") from None
        time.sleep(_POLL_S)


def _free(partial: Path) -> Path:
    """Return a free name of what the next start removes, beside a partial folder."""
    number = 0
    while (path := partial.with_name(f"{partial.name}{number:03d}")).exists():
        number += 1
    return path


def due(step: int, since_s: float, every_steps: int | None, every_seconds: float | None) -> bool:
    """Return whether a checkpoint is due behind step `step`; rank 0 asks and tells the others."""
    by_steps = every_steps is not None and step % every_steps == 0
    return by_steps or (every_seconds is not None and since_s >= every_seconds)


def owned_layers(holders: Mapping[int, list[int]], rank: int) -> list[int]:
    """Return the layers that `rank` writes, of those that several ranks hold alike.

    `holders`: ranks by layer. Layers are dealt out in turn, so that all holders write a share.
    """
    return [layer for layer, ranks in sorted(holders.items()) if ranks[layer % len(ranks)] == rank]
