"""A thin OpenAI-compatible server around OpenVINO GenAI's pipeline, for mixed_load.py.

    openvino/bin/python bench/engine/peers/openvino_server.py MODEL --port 8080 --threads 2

OpenVINO's own server is no Python package. Standard library only, streamed completions of token ids
only: one thread steps the pipeline, each request's thread waits for its tokens.
"""

from __future__ import annotations

import argparse
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy
import openvino
import openvino_genai as genai


class Engine:
    """The pipeline and the thread that steps it while there is something to do."""

    def __init__(self, model: str, threads: int, slots: int, kv_tokens: int) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.num_kv_blocks = -(-kv_tokens // 32) + slots
        scheduler.max_num_seqs = slots
        scheduler.max_num_batched_tokens = 2048
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = False
        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        self._pipe = genai.ContinuousBatchingPipeline(model, scheduler, "CPU", settings)
        self._changed = threading.Condition()
        self._num_requests = 0
        threading.Thread(target=self._steps, daemon=True).start()

    def submit(self, prompt: list[int], new_tokens: int) -> Any:
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = new_tokens
        config.ignore_eos, config.do_sample = True, False
        with self._changed:
            self._num_requests += 1
            ids = openvino.Tensor(numpy.array([prompt], dtype=numpy.int64))
            handle = self._pipe.add_request(self._num_requests, ids, config)
            self._changed.notify_all()
        return handle

    def _steps(self) -> None:
        while True:
            with self._changed:
                while not self._pipe.has_non_finished_requests():
                    self._changed.wait()
            self._pipe.step()
            with self._changed:
                self._changed.notify_all()

    def read(self, handle: Any) -> int:
        """Wait for a step that brought tokens; return how many. 0: there are no more."""
        with self._changed:
            while not handle.can_read():
                if handle.get_status() != genai.GenerationStatus.RUNNING:
                    return 0
                self._changed.wait()
            return sum(len(output.generated_ids) for output in handle.read().values())


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    engine: Engine

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path != "/v1/completions" or not body.get("stream"):
            self.send_error(404, "only streamed /v1/completions")
            return
        handle = self.engine.submit(body["prompt"], body["max_tokens"])
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        done = 0
        while new := self.engine.read(handle):
            done += new
            self._event({"choices": [{"index": 0, "text": "", "finish_reason": None}]})
            if done >= body["max_tokens"]:
                break
        self._event({"choices": [], "usage": {"completion_tokens": done}})
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def _event(self, payload: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(payload).encode() + b"\n\n")
        self.wfile.flush()

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing: a line for each request would be work of the server's."""


class Server(ThreadingHTTPServer):
    request_queue_size = 128  # connections may come while a step keeps all cores busy
    daemon_threads = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder that optimum-cli exported")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--kv-tokens", type=int, default=65536)
    arguments = parser.parse_args()
    Handler.engine = Engine(
        arguments.model, arguments.threads, arguments.slots, arguments.kv_tokens
    )
    print(f"http://127.0.0.1:{arguments.port}", flush=True)
    Server(("127.0.0.1", arguments.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
