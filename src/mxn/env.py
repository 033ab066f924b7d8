"""Every environment variable that mxn reads, in one table: nothing else asks for MXN_*."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from mxn.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Variable:
    name: str
    default: str
    meaning: str


VARIABLES = (
    Variable("MXN_HOME", "~/.mxn", "state: measured chips, kernel tables, keys, logs"),
    Variable("MXN_DEVICE", "auto", "device for `mxn serve`, such as cpu, cuda:0, npu:0, sim:0"),
    Variable("MXN_DTYPE", "auto", "weights and activations: auto, float32, bfloat16, float16"),
    Variable("MXN_WEIGHTS", "plain", "weights on a CPU: plain, f32, bf16, int8, int4, int4-g32, …"),
    Variable("MXN_KV", "auto", "cache beside packed weights: auto, f32, bf16, int8"),
    Variable("MXN_SPECULATION", "off", "guess tokens and verify them: off, ngram, mtp"),
    Variable("MXN_CUDA_GRAPHS", "on", "on a GPU, replay decode steps as graphs: on, off"),
    Variable("MXN_THREADS", "0", "CPU threads of an engine; 0 = all cores this process may use"),
    Variable("MXN_KERNELS", "", "pin kernels, such as `linear=torch,rms_norm=naive`"),
    Variable("MXN_KERNEL_TUNING", "on", "measure kernels at load: on, off (priority decides)"),
    Variable("MXN_ISA", "auto", "native kernels: auto, generic, avx2, avx512, avx512vnni, amx"),
    Variable("MXN_SPIN_US", "200", "native kernels: an idle thread looks for work so long"),
    Variable("MXN_PIN", "off", "native kernels: on binds each thread to a core of its own"),
    Variable("MXN_FALLBACK_CHECK", "on", "check a fallback model at load: on, off"),
    Variable("MXN_API_KEY", "", "key that callers of `mxn serve` must send"),
    Variable("MXN_DATABASE", "", "URL of the ledger; empty: the SQLite file MXN_HOME/ledger.db"),
    Variable("MXN_TIME_ZONE", "UTC", "time zone of the days and months of usage and statements"),
    Variable("MXN_DATABASE_SYNC", "normal", "SQLite: normal survives a crash, full a power loss"),
    Variable("MXN_PROJECT_FILE_BYTES", "10737418240", "bytes of uploaded files a project may keep"),
    Variable("MXN_LOG", "info", "log level of engine and server: debug, info, warning, error"),
    Variable("MXN_BUILD_DIR", "", "where compiled extensions are cached; empty: MXN_HOME/build"),
    Variable("MXN_SIM", "0", "simulated chip: 1 lists its devices in detection"),
    Variable("MXN_SIM_DEVICES", "2", "simulated chip: number of devices"),
    Variable("MXN_SIM_MEMORY", "4GiB", "simulated chip: memory of each device"),
    Variable("MXN_SIM_LAUNCH_US", "0", "simulated chip: extra microseconds per operator"),
    Variable("MXN_SIM_FAIL_AFTER", "0", "simulated chip: the n-th operator fails; 0 = never"),
)

_BY_NAME = {variable.name: variable for variable in VARIABLES}


def get(name: str) -> str:
    """Return the value of a variable of the table, or its default."""
    return os.environ.get(name, _BY_NAME[name].default)


def get_int(name: str) -> int:
    """Return a variable as an integer. Raises: ConfigError when it is none."""
    text = get(name)
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name} must be an integer, got {text!r}") from None


def get_switch(name: str) -> bool:
    """Return whether a variable is on. Raises: ConfigError when it is neither on nor off."""
    text = get(name)
    if text not in ("on", "off"):
        raise ConfigError(f"{name} must be on or off, got {text!r}")
    return text == "on"


def home() -> Path:
    """Return the state folder, created if needed."""
    path = Path(get("MXN_HOME")).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    return path
