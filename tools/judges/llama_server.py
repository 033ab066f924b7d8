#!/usr/bin/env python3
"""Stands in for llama-server in its own tests: asks the running host for one server per test.

LLAMA_SERVER_BIN_PATH points here, MXN_JUDGES_SOCKET (set by run.py) at the host. Flags that mean
something to mxn are passed on; the others concern llama.cpp's slots, batches and files. Standard
library only, so that it starts in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

_SWITCHES = ("embedding", "reranking", "jinja", "no-jinja", "kv-unified", "router")


def wanted(arguments: list[str]) -> dict[str, Any]:
    """Return what to ask the host for."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--port", type=int, required=True)
    for flag in ("--alias", "--api-key", "--chat-template", "--chat-template-file", "--reasoning"):
        parser.add_argument(flag)
    parser.add_argument("--ctx-size", type=int)
    parser.add_argument("--parallel", type=int, default=1)
    for flag in _SWITCHES:
        parser.add_argument(f"--{flag}", action="store_true")
    options, _ = parser.parse_known_args(arguments)
    per_slot = 1 if options.kv_unified else options.parallel
    is_encoder = options.embedding or options.reranking
    return {
        "models": ["embedder" if is_encoder else "decoder"],
        "port": options.port,
        "name": options.alias or "default",
        "api_keys": [options.api_key] if options.api_key else [],
        "max_context": options.ctx_size // per_slot if options.ctx_size else None,
        "chat_template": _template(options),
        # llama-server tells every template whether to think; mxn when the request says so.
        "template_kwargs": {"enable_thinking": options.reasoning != "off"},
        "llama_paths": True,
    }


def _template(options: argparse.Namespace) -> str | None:
    """Return Jinja text; names of llama.cpp's built-in templates are not known here."""
    if options.chat_template_file:
        return Path(options.chat_template_file).read_text(encoding="utf-8")
    text: str | None = options.chat_template
    return text if text and " " in text else None


def main() -> int:
    with socket.socket(socket.AF_UNIX) as host:
        host.connect(os.environ["MXN_JUDGES_SOCKET"])
        host.sendall(json.dumps(wanted(sys.argv[1:])).encode() + b"\n")
        answer = json.loads(host.makefile().readline())
        if "error" in answer:
            print(answer["error"], file=sys.stderr)
            return 1
        signal.signal(signal.SIGTERM, lambda *_: host.shutdown(socket.SHUT_WR))
        host.recv(1)  # until the host has stopped the server
    return 0


if __name__ == "__main__":
    sys.exit(main())
