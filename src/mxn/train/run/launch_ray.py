"""Starts the ranks of a plan on the machines of a Ray cluster, behind what `launch.py` offers.

One actor per rank, reserved all together, on a machine with its kind of device; the actor starts
the same rank process that this machine would, so what a rank is does not depend on Ray. The job's
folders, model and data must be reachable under the same paths on every machine, and mxn installed
there. Knows Ray; knows no tensors. Start at `launch_on_ray`.
"""

# pyright: reportMissingImports=false
# Ray is an extra, so checks run without it.

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mxn.errors import UnsupportedError
from mxn.train.run.cpu_share import CpuShare
from mxn.train.run.job import DeviceSettings, Job
from mxn.train.run.launch import (
    LocalRanks,
    RankSpec,
    log_path,
    rank_command,
    rank_specs,
    start_process,
)
from mxn.train.run.login import PASSWORD, USER
from mxn.train.run.supervise.needs import NoPlaceError
from mxn.train.run.supervise.ranks import Launching

log = logging.getLogger("mxn.train")

Resources = Mapping[str, float]

RESOURCES = {"cuda": "GPU", "npu": "NPU", "hpu": "HPU", "xpu": "GPU"}
"""What Ray calls a kind of device. Ray shows a process only its own, as number 0."""
_HANDED_ON = ("PYTHONPATH", USER, PASSWORD)  # variables that the machines do not have
_RESERVE_S = 60.0
_START_S = 300.0  # of an actor on a machine that was there a moment ago
_GONE = -signal.SIGKILL  # of a rank whose machine or actor is gone


class RankHost:
    """The actor: holds one rank process on its machine."""

    def start(
        self, spec_json: str, folder: str, group: dict[str, Any], variables: dict[str, str]
    ) -> int:
        """Start the rank and return its process id there."""
        spec, settings = RankSpec.from_json(spec_json), DeviceSettings(**group)
        file = Path(folder) / f"rank-{spec.rank}.json"
        file.write_text(spec_json, encoding="utf-8")
        self.share: CpuShare | None = None
        if settings.cpu_share is not None:
            self.share = CpuShare.create(settings.cpu_share, f"rank-{spec.rank}")
        self.process = start_process(
            rank_command(file), log_path(Path(folder), spec.rank), settings, variables
        )
        if self.share is not None:
            self.share.take_in(self.process.pid)
        return self.process.pid

    def poll(self) -> int | None:
        return self.process.poll()

    def send_signal(self, number: int) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)

    def end(self) -> int:
        """End the rank if it runs, and return its exit status."""
        if self.process.poll() is None:
            self.process.kill()
        code = self.process.wait()
        if self.share is not None:
            self.share.remove()
            self.share = None
        return code


class _RemoteProcess:
    """A rank on some machine, with the methods of `subprocess.Popen` that are used here."""

    def __init__(self, actor: Any, pid: int) -> None:
        self._actor, self.pid = actor, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._ask("poll")
        return self.returncode

    def kill(self) -> None:
        self.returncode = self._ask("end")

    def send_signal(self, number: int) -> None:
        self._ask("send_signal", number)

    def wait(self, timeout: float | None = None) -> int | None:
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None and (deadline is None or time.monotonic() < deadline):
            time.sleep(0.05)
        return self.returncode

    def release(self) -> None:
        """Let the machine go."""
        import ray

        self._ask("end")
        ray.kill(self._actor)

    def _ask(self, method: str, *arguments: Any) -> Any:
        import ray

        try:
            return ray.get(getattr(self._actor, method).remote(*arguments))
        except ray.exceptions.RayActorError:
            return _GONE


class RayRanks(LocalRanks):
    """The ranks of one launch, on a Ray cluster."""

    def start(self, job: Job) -> None:
        """Reserve all devices, then start all ranks.

        Raises: NoPlaceError when the cluster does not have them in time; UnsupportedError for
        pinned ranks: which cores of a machine are free, only that machine's Ray knows.
        """
        if pinned := sorted({spec.group for spec in self._specs if job.group(spec.group).pin}):
            raise UnsupportedError(
                f"group {pinned[0]!r} has pin, and ranks on Ray are not pinned",
                hint="leave out `pin`, or launch on this machine",
            )
        names = [spec.group for spec in self._specs]
        self._group = _reserve(names, [bundle_of(job.group(name)) for name in names])
        super().start(job)

    def _start(self, spec: RankSpec, group: DeviceSettings, cores: frozenset[int] | None) -> None:
        from dataclasses import asdict

        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        bundle = bundle_of(group)
        options: dict[str, Any] = {
            "num_cpus": bundle.get("CPU", 0),
            "num_gpus": bundle.get("GPU", 0),
            "resources": {k: v for k, v in bundle.items() if k not in ("CPU", "GPU")},
            "max_restarts": 0,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=spec.rank
            ),
        }
        actor = ray.remote(RankHost).options(**options).remote()
        handed_on = {name: os.environ[name] for name in _HANDED_ON if name in os.environ}
        asked = actor.start.remote(spec.to_json(), str(self.logs), asdict(group), handed_on)
        try:
            pid = ray.get(asked, timeout=_START_S)
        except ray.exceptions.RayTaskError as error:  # as if it had been started here
            raise error.cause from error
        except ray.exceptions.RayError as error:  # its machine went behind the reservation
            said = str(error).partition("\n")[0]
            text = f"rank {spec.rank} (group {spec.group!r}) was not started by Ray: {said}"
            raise NoPlaceError(text, group=spec.group) from error
        self._processes.append(_RemoteProcess(actor, pid))  # type: ignore[arg-type]

    def _clean(self) -> None:
        from ray.util import remove_placement_group

        if self._group is None:
            return
        for process in self._processes:
            process.release()  # type: ignore[attr-defined]
        remove_placement_group(self._group)
        self._group = None
        super()._clean()


def launch_on_ray(launching: Launching, address: str | None = None) -> RayRanks:
    """Start the ranks of a plan on a Ray cluster: the one at `address`, or the one around us.

    Raises: UnsupportedError without the package ray; NoPlaceError when the cluster is too small.
    """
    from mxn.train.run.bridge import serve_store

    ray = _ray()
    if not ray.is_initialized():
        ray.init(address=address, log_to_driver=False)
    store, store_address = serve_store(_meeting_host(ray))
    specs = [_as_seen_by_ray(spec) for spec in rank_specs(launching, store_address)]
    launching.log_folder.mkdir(parents=True, exist_ok=True)
    ranks = RayRanks(specs, launching.log_folder, store)
    ranks.start(launching.job)
    return ranks


def bundle_of(group: DeviceSettings) -> dict[str, float]:
    """Return what Ray is to reserve for a rank of a group."""
    kind = group.device.partition(":")[0]
    cpus = float(group.threads if group.cpu_share is None else min(1.0, group.cpu_share))
    named = {RESOURCES[kind]: 1.0} if kind in RESOURCES else {}
    return {"CPU": cpus} | named


def _as_seen_by_ray(spec: RankSpec) -> RankSpec:
    from dataclasses import replace

    kind = spec.device.partition(":")[0]
    return replace(spec, device=f"{kind}:0") if kind in RESOURCES else spec


def unplaced(
    bundles: Sequence[Resources], machines: Sequence[Resources], free: Resources
) -> int | None:
    """Return the first bundle that no machine has room for behind those before it.

    `machines`: all that each one has; `free`: what others leave of the whole cluster. None where
    all seem to fit, such as when a machine is gone and the cluster does not know yet.
    """
    rooms, left = [dict(machine) for machine in machines], dict(free)
    for number in sorted(range(len(bundles)), key=lambda number: -len(bundles[number])):
        bundle = bundles[number]  # those that few machines have room for come first
        room = next((room for room in rooms if _fits(bundle, room)), None)
        if room is None or not _fits(bundle, left):
            return number
        for name, amount in bundle.items():
            room[name] = room.get(name, 0.0) - amount
            left[name] = left.get(name, 0.0) - amount
    return None


def _fits(bundle: Resources, room: Resources) -> bool:
    return all(amount <= room.get(name, 0.0) + 1e-9 for name, amount in bundle.items())


def _reserve(groups: Sequence[str], bundles: Sequence[Resources]) -> Any:
    """Return the place of all ranks: `groups` and `bundles` by rank. Raises: NoPlaceError."""
    import ray
    from ray.util import placement_group, remove_placement_group

    group = placement_group([dict(bundle) for bundle in bundles], strategy="PACK")
    if not group.wait(_RESERVE_S):
        free = ray.available_resources()
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        remove_placement_group(group)
        rank = unplaced(bundles, machines, free)
        whose = "" if rank is None else f"; none for rank {rank} (group {groups[rank]!r})"
        raise NoPlaceError(
            f"the Ray cluster cannot hold {len(bundles)} ranks now: they need {list(bundles)}, "
            f"it has {free} free{whose}",
            group=None if rank is None else groups[rank],
            hint="free devices, add machines, or plan for fewer",
        )
    return group


def _meeting_host(ray: Any) -> str:
    """Return this machine's address as the others reach it; loopback where there are none."""
    if len([node for node in ray.nodes() if node["Alive"]]) == 1:
        return "127.0.0.1"
    return ray.util.get_node_ip_address()


def _ray() -> Any:
    try:
        import ray
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            "ranks were to start on Ray, and the package ray is not installed",
            hint="pip install 'mxn[cluster]'",
        ) from error
    return ray
