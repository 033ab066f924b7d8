"""The process that measures one device: `python -m mxn.train.run.measure_rank REQUEST RANK STORE`.

It is started as a rank of the job is, with the same device, threads and share of the processor, at
the same time as all others, so that they are in each other's way as they will be. Writes its answer
beside the request. Start at `main`.
"""

from __future__ import annotations

import pickle
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mxn.train.run.chains import Workload, chains_of, make_chain
from mxn.train.run.job import Job
from mxn.train.run.layer_times import Effort, kept_bytes, time_chain
from mxn.train.run.measured import MODEL_FILE, Answer, Member, Model, Request, basis_of
from mxn.train.run.rank import leave
from mxn.train.run.rounds import Case, Rounds

if TYPE_CHECKING:
    from mxn.chips.chip import Device
    from mxn.train.run.bridge import Bridge
    from mxn.train.run.net import StageModule

_BLOCKS_OF_MANY = 3  # of a case in each round, where there are several


def main(request_file: Path, rank: int, store_address: str) -> None:
    """Measure what the request wants of this rank and write ``answer-RANK.json``."""
    from mxn.chips import find_device

    request = Request.from_json(request_file.read_text())
    job, me = Job.from_json(request.job), request.members[rank]
    torch.set_num_threads(job.group(me.group).threads)
    device = find_device(me.device)
    target = torch.device(device.torch_device)
    if target.type != "cpu":
        torch.accelerator.set_device_index(target.index or 0)
    bridge = _connect(job, request, rank, store_address, device)
    folder = request_file.parent
    try:
        wait_for_share(folder, rank)
        wait = synchronizer(target)
        taken = framework_bytes(device)
        rounds = Rounds()
        if request.has_layers:
            models = pickle.loads((folder / MODEL_FILE).read_bytes())  # our own parent wrote it
            _layers(rounds, request, job, me, models, device, bridge, wait)
        links = _links(request, job, bridge, wait)
    finally:
        bridge.close()
    answer = Answer(
        rank=rank, framework_bytes=taken, readings=rounds.readings(), links=links
    )  # fmt: skip
    path = folder / f"answer-{rank}.json"
    part = path.with_suffix(".part")
    part.write_text(answer.to_json())
    part.replace(path)


def wait_for_share(folder: Path, rank: int) -> None:
    """Say that all is imported, and wait until this process has its share of the processor.

    Imports take seconds of a whole core, and say nothing about the layers.
    """
    (folder / f"ready-{rank}").touch()
    while not (folder / "go").exists():
        time.sleep(0.01)


def _connect(job: Job, request: Request, rank: int, address: str, device: Device) -> Bridge:
    """Meet the others as ranks of the job do, see `rank.py`."""
    from mxn.train.run.bridge import Bridge, BridgeOptions, LinkLimit

    group = job.group(request.members[rank].group)
    rate = group.link_bytes_per_s
    is_emulated = any(other.link_bytes_per_s is not None for other in job.devices)
    options = BridgeOptions(
        wire_dtype=job.plan.wire_dtype,
        limit=LinkLimit(bytes_per_s=rate) if rate is not None else None,
    )
    return Bridge.connect(
        address, rank, len(request.members), device,
        island=group.name if is_emulated else None, options=options,
    )  # fmt: skip


def _layers(
    rounds: Rounds,
    request: Request,
    job: Job,
    me: Member,
    model: Model,
    device: Device,
    bridge: Bridge,
    wait: Callable[[], object],
) -> None:
    """Measure all cases, again and again while the rounds differ and there is time."""
    work = Workload(
        spec=model.spec, names=model.names, biases=model.biases, seq_tokens=job.seq_tokens,
        dtype=job.dtype_of(me.group), is_packed=request.is_packed,
    )  # fmt: skip
    effort = _effort(request)
    begun_s = time.monotonic()
    while True:
        rounds.begin()
        for micro_batch, tp in product(request.micro_batches, request.tps):
            for kind, layers in chains_of(model.spec).items():
                bridge.barrier(f"the measurement of {kind}")
                if tp <= job.group(me.group).count:
                    case = (kind, micro_batch, tp)
                    measure_case(rounds, case, work, job, layers, device, effort, wait)
        told = bridge.gather([time.monotonic() - begun_s, rounds.are_enough])
        if told[0][0] >= request.seconds or all(enough for _, enough in told):
            return  # all ranks alike, as all were told the same


def _effort(request: Request) -> Effort:
    blocks = min(request.blocks, _BLOCKS_OF_MANY) if request.seconds else request.blocks
    return Effort(blocks=blocks, block_s=request.block_s, warmup_s=request.block_s)


def measure_case(
    rounds: Rounds,
    case: Case,
    work: Workload,
    job: Job,
    layers: tuple[int, int],
    device: Device,
    effort: Effort,
    wait: Callable[[], object],
) -> None:
    """Add what one kind of layer costs on this device, in this process.

    With tensor parallelism it is the part that one of so many ranks computes, without its sums.
    The chain is made anew in each round: all of them at once may not fit on the device.
    """
    _, micro_batch, tp = case
    torch_device = torch.device(device.torch_device)
    chain = make_chain(
        work, layers, micro_batch, torch_device, lambda stage: updates(stage, job), tp=tp
    )
    rounds.add(case, time_chain(chain, effort, synchronize=wait))
    if case not in rounds.kept:
        rounds.kept[case] = kept_bytes(chain) / chain.num_layers


def _links(
    request: Request, job: Job, bridge: Bridge, wait: Callable[[], object]
) -> tuple[dict[str, Any], ...]:
    from mxn.chips import find_device
    from mxn.train.run.link_times import time_links

    members = request.members

    def basis(first: int, second: int) -> str:
        ends = (members[first], members[second])
        bases = {basis_of(job.group(end.group), find_device(end.device)) for end in ends}
        limited = any(job.group(end.group).link_bytes_per_s is not None for end in ends)
        return "simulated" if limited or "simulated" in bases else "measured"

    times = time_links(
        bridge, request.pairs, basis=basis, synchronize=wait, block_s=request.block_s / 2
    )
    return tuple(
        {"first": t.first, "second": t.second, "link": asdict(t.link), "noise": t.noise}
        for t in times
    )


class _Stepper:
    """The job's optimizer as the measurement sees it: one update of what the chain holds."""

    def __init__(self, stage: StageModule) -> None:
        from mxn.train.run.optim import AdamSettings, AdamW, GradientSums

        self._sums = GradientSums(stage)
        self._optimizer = AdamW(stage, AdamSettings())

    def step(self) -> None:
        """The rate is tiny: weights must stay where products are neither 0 nor infinite."""
        self._sums.square_norm()
        self._optimizer.step(self._sums, 1e-12, scale=1e-3)
        self._sums.clear()


def updates(stage: StageModule, job: Job) -> _Stepper | None:
    """Freeze what the job does not train and return its optimizer; None when nothing is left."""
    from mxn.train.run.optim import trainable

    if job.lora is not None:
        from mxn.train.run.lora import LoraSettings, attach

        settings = LoraSettings(
            rank=job.lora.rank, alpha=job.lora.alpha, targets=tuple(job.lora.targets)
        )
        attach(stage, settings, seed=job.seed)
    return _Stepper(stage) if trainable(stage) else None


def synchronizer(device: torch.device) -> Callable[[], object]:
    """Return a function that waits for all work on `device`."""
    if device.type == "cpu":
        return lambda: None
    module = torch.get_device_module(device.type)
    return lambda: module.synchronize(device)


def framework_bytes(device: Device) -> float:
    """Return what this process takes of the device's memory before any weight is there.

    On a CPU its resident memory; else what the driver counts as used beyond torch's own blocks,
    which is right while nobody else uses the device.
    """
    if device.torch_device == "cpu":
        import psutil

        return float(psutil.Process().memory_info().rss)
    from mxn.chips import free_memory

    torch.zeros(1, device=device.torch_device)
    module = torch.get_device_module(torch.device(device.torch_device).type)
    used = device.memory_bytes - free_memory(device)
    reserved = getattr(module, "memory_reserved", lambda _: 0)(device.torch_device)
    return float(max(0, used - reserved))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    leave(0)
