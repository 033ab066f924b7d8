"""Fixtures that several rooms share."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from support.databases import database, postgres, url

__all__ = ["database", "postgres", "url"]

# Two cores are the smallest machine the suite must run on: workers of a parallel run must not each
# start a thread for every core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Compiled extensions survive the run, although each run has a home of its own.
_home = Path(os.environ.get("MXN_HOME", "~/.mxn")).expanduser()
os.environ.setdefault("MXN_BUILD_DIR", str(_home / "build"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Each new home would measure all kernels at its first load, for seconds. Tests of that turn it on.
os.environ.setdefault("MXN_KERNEL_TUNING", "off")
# A shell's background job ignores ctrl-c and so would the programs that tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@pytest.fixture(autouse=True, scope="session")
def _own_home(tmp_path_factory):
    """Keep measured tables and keys of the user out of the tests, and the other way round."""
    if "MXN_HOME" not in os.environ:
        os.environ["MXN_HOME"] = str(tmp_path_factory.mktemp("mxn-home"))


@pytest.fixture(scope="module")
def forked_engines():
    """Engines of a module of tests start without their imports, see `support/forked_engines.py`."""
    from support.forked_engines import quickly

    with pytest.MonkeyPatch.context() as patch:
        quickly(patch)
        yield


@pytest.fixture(scope="session")
def device():
    """The device the parity tests run on: MXN_TEST_DEVICE, by default the CPU."""
    from mxn.chips import find_device

    return find_device(os.environ.get("MXN_TEST_DEVICE", "cpu"))


@pytest.fixture
def record_error(request):
    """Note the error of a parity test in the file that MXN_PARITY_REPORT names, if it names one."""

    def record(what: str, error: float) -> None:
        path = os.environ.get("MXN_PARITY_REPORT")
        if path:
            case = request.node.callspec.id
            with Path(path).open("a") as file:
                file.write(json.dumps({"case": case, "what": what, "error": error}) + "\n")

    return record
