"""Which devices this machine has, and why. Start at `survey`; the rest builds on it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from mxn.chips import registry
from mxn.chips.chip import Chip, Device, UnusableError
from mxn.chips.probe import Probe
from mxn.errors import NotFoundError

log = logging.getLogger("mxn.chips")


@dataclass(frozen=True, slots=True)
class Survey:
    """The outcome of looking for every known chip. The dicts map a vendor to a reason."""

    devices: tuple[Device, ...]
    unusable: dict[str, str]  # hardware is there, this process cannot use it
    absent: dict[str, str]  # what was looked for
    broken: dict[str, str]  # plug-ins that failed, by entry point name


def survey(probe: Probe | None = None, plugins: Sequence[registry.Plugin] | None = None) -> Survey:
    """Ask every plug-in for its devices; one that fails is reported and the others go on."""
    probe = probe or Probe()
    found = Survey((), {}, {}, {})
    devices: list[Device] = []
    for plugin in registry.plugins() if plugins is None else plugins:
        if plugin.chip is None:
            found.broken[plugin.name] = plugin.error or "unknown error"
            continue
        try:
            listed = plugin.chip.detect(probe)
            if not listed:
                found.absent[plugin.chip.vendor] = plugin.chip.absence(probe)
        except UnusableError as error:
            found.unusable[plugin.chip.vendor] = str(error)
        except Exception as error:  # a bug in one plug-in must not hide the other chips
            found.broken[plugin.name] = f"detection failed: {type(error).__name__}: {error}"
            log.warning("chip plug-in %r is broken", plugin.name, exc_info=True)
        else:
            devices += listed
    devices.sort(key=lambda device: (device.vendor != "cpu", device.id.split(":")[0], device.index))
    return Survey(tuple(devices), found.unusable, found.absent, found.broken)


def detect(probe: Probe | None = None) -> list[Device]:
    """Return the usable devices of this machine, the CPU first."""
    return list(survey(probe).devices)


def find_device(text: str = "auto", probe: Probe | None = None) -> Device:
    """Return the device that `text` names: "auto", "cpu", "cuda:1", "npu", "sim:0".

    "auto" is the best accelerator that is not simulated, or else the CPU; a name without number
    means number 0. After the call `torch.device(device.torch_device)` works.
    Raises: NotFoundError, listing what exists and why the named one does not.
    """
    probe = probe or Probe()
    if text == "auto":
        found = survey(probe)
        best = choose_best(found.devices)
        log.info("device auto: %s (%s, %s)", best.id, best.chip, best.name)
        return best
    kind, _, number = text.strip().lower().partition(":")
    wanted = f"{kind}:{number or 0}"
    mine = [p for p in registry.plugins() if p.chip is None or p.chip.torch_type == kind]
    found = survey(probe, mine)
    on_request = [d for p in mine if p.chip for d in p.chip.on_request(probe)]
    for device in (*found.devices, *on_request):
        if device.id == wanted:
            return device
    raise _not_found(text, kind, found, on_request, probe)


def choose_best(devices: Sequence[Device]) -> Device:
    """Return the fastest accelerator by its known peak, then by memory; the CPU if there is none.

    Raises: NotFoundError when there is no device at all.
    """
    real = [d for d in devices if registry.chip_of(d.vendor).basis != "simulated"]
    if not real:
        raise NotFoundError(
            "no device at all, not even a CPU",
            hint="the chip plug-ins are not installed; install mxn again: pip install -e .",
        )
    return max(real, key=_rank)


def free_memory(device: Device, probe: Probe | None = None) -> int:
    """Return the bytes of `device` that are free for this process now."""
    return registry.chip_of(device.vendor).memory(device, probe or Probe())[0]


def utilization(device: Device, probe: Probe | None = None) -> float | None:
    """Return the busy share of `device`, 0 to 1, or None when nobody tells."""
    return registry.chip_of(device.vendor).utilization(device, probe or Probe())


def default_dtype(device: Device, checkpoint_dtype: str) -> tuple[str, str]:
    """Return the dtype to compute in, a torch name, and the reason.

    The checkpoint's dtype where the device computes it natively, float32 everywhere else.
    """
    wanted = checkpoint_dtype.removeprefix("torch.")
    if wanted == "float32":
        return wanted, "the checkpoint is float32"
    if wanted in device.native_dtypes:
        return wanted, f"the checkpoint is {wanted} and {device.chip} computes it natively"
    return "float32", f"the checkpoint is {wanted}, which {device.chip} does not compute natively"


def _rank(device: Device) -> tuple[bool, bool, float, int, int]:
    from mxn.chips import specs

    spec = specs.find(device.chip)
    peak = spec.best("fp16") or spec.best("bf16") if spec else None
    rate = peak.value if peak else 0.0
    is_known = device.vendor != "unknown"
    return device.vendor != "cpu", is_known, rate, device.memory_bytes, -device.index


def _not_found(
    text: str, kind: str, found: Survey, on_request: list[Device], probe: Probe
) -> NotFoundError:
    here = [d.id for d in detect(probe)] + [d.id for d in on_request]
    reasons = [*found.unusable.values()]
    if not any(isinstance(p.chip, Chip) and p.chip.torch_type == kind for p in registry.plugins()):
        reasons += [f"plug-in {name}: {why}" for name, why in found.broken.items()]
    message = f"no device {text!r}; this machine has: {', '.join(dict.fromkeys(here)) or 'none'}"
    for reason in reasons:
        message += f"\n  {reason}"
    return NotFoundError(message, hint="`mxn chips --explain` shows what was looked for")
