"""`mxn gateway` as an operator runs it: limits, TLS, the end of a process, wrong settings."""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import threading
import time

import httpx
import psutil
import pytest

from mxn.engine.echo import EchoEngine
from mxn.serve.app import create_app
from mxn.serve.served import ServedModel, ServedModels
from mxn.serve.server import running
from support.server import gateway_process

WORDS = 40  # of a slow answer, 50 ms each


@pytest.fixture(scope="module")
def far():
    """A server whose answers take a while; the address of it as a replica."""
    engine = EchoEngine(token_s=0.05)
    models = ServedModels([ServedModel(name="echo", client=engine, tokenizer=engine.tokenizer)])
    with running(create_app(models)) as url:
        yield f"echo={url}"


def gateway(folder, far, *options, is_real=False):
    words = ("--replica", far, "--database", "none", *options)
    return gateway_process(folder, *words, is_real=is_real)


def wait_until_ready(url, verify=True):
    deadline_s = time.monotonic() + 30
    while httpx.get(f"{url}/health", timeout=5, verify=verify).status_code != 200:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def body(num_tokens=WORDS, **more):
    return {"model": "echo", "prompt": "hello there", "max_tokens": num_tokens} | more


def ask(url, num_tokens=WORDS, **options):
    return httpx.post(f"{url}/v1/completions", json=body(num_tokens), timeout=30, **options)


class Stream(threading.Thread):
    """Reads a stream; `has_begun` when the first event is there."""

    def __init__(self, url):
        super().__init__()
        self.url = url
        self.has_begun = threading.Event()
        self.events = []
        self.problem = ""
        self.start()
        assert self.has_begun.wait(20)

    def run(self):
        try:
            self.read()
        except httpx.RemoteProtocolError as error:  # it was cut, which is what a test is about
            self.problem = str(error)

    def read(self):
        with httpx.stream(
            "POST", f"{self.url}/v1/completions", json=body(stream=True), timeout=30
        ) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    self.events.append(line[6:])
                    self.has_begun.set()


def check_whole(stream):
    stream.join(30)
    assert stream.events[-1] == "[DONE]"
    parts = [json.loads(event) for event in stream.events[:-1]]
    assert parts[-1]["choices"][0]["finish_reason"] == "length"


def test_a_request_that_takes_too_long_is_ended(tmp_path, far):
    with gateway(tmp_path, far, "--request-timeout", "0.5") as (url, _, _):
        wait_until_ready(url)
        begun_s = time.monotonic()
        answer = ask(url)
        assert time.monotonic() - begun_s < 1.5
        assert answer.status_code == 408
        assert answer.json()["error"]["code"] == "request_timeout"
        assert ask(url, 2).status_code == 200


def test_more_requests_than_the_limit_are_told_to_come_later(tmp_path, far):
    with gateway(tmp_path, far, "--max-requests", "1") as (url, _, _):
        wait_until_ready(url)
        stream = Stream(url)
        answer = ask(url, 1)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "overloaded"
        assert int(answer.headers["retry-after"]) > 0
        assert httpx.get(f"{url}/health").status_code == 200
        check_whole(stream)
        assert ask(url, 1).status_code == 200


def test_tls(tmp_path, far):
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    make_certificate(cert, key)
    options = ("--tls-cert", str(cert), "--tls-key", str(key))
    with gateway(tmp_path, far, *options) as (url, _, _):
        assert url.startswith("https://127.0.0.1:")
        trusted = ssl.create_default_context(cafile=str(cert))
        wait_until_ready(url, verify=trusted)
        assert ask(url, 2, verify=trusted).status_code == 200
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            ask(url, 2)


def make_certificate(cert, key):
    import datetime
    import ipaddress

    x509 = pytest.importorskip("cryptography.x509", reason="cryptography makes the certificate")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    secret = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(secret.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
        .sign(secret, hashes.SHA256())
    )
    cert.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    key.write_bytes(
        secret.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_gateway_that_is_stopped_ends_its_streams_first(tmp_path, far, workers):
    options = ("--workers", workers)
    with gateway(tmp_path, far, *options, is_real=True) as (url, process, log):
        wait_until_ready(url)
        stream = Stream(url)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        asked_s = time.monotonic()
        with pytest.raises(httpx.ConnectError):
            ask(url, 1)
        assert time.monotonic() - asked_s < 0.5
        check_whole(stream)
        assert process.wait(10) == 0
    assert "Traceback" not in log.read_text()


def test_ctrl_c_in_a_terminal_ends_streams_first_too(tmp_path, far):
    with gateway(tmp_path, far, "--workers", "2") as (url, process, log):
        wait_until_ready(url)
        stream = Stream(url)
        for pid in {process.pid, *group_of(process)}:  # as a terminal does, to the whole group
            os.kill(pid, signal.SIGINT)
        check_whole(stream)
        assert process.wait(10) == 0
    assert "Traceback" not in log.read_text()


def group_of(process):
    """Return the processes in the group of `process` that it has started."""
    group = os.getpgid(process.pid)
    found = [child.pid for child in psutil.Process(process.pid).children()]
    return [pid for pid in found if os.getpgid(pid) == group]


def test_workers_end_when_the_process_that_started_them_is_killed(tmp_path, far):
    with gateway(tmp_path, far, "--workers", "2") as (url, process, _):
        wait_until_ready(url)
        workers = psutil.Process(process.pid).children()
        stream = Stream(url)
        process.kill()
        process.wait()
        check_whole(stream)
        _, alive = psutil.wait_procs(workers, timeout=10)
        assert not alive


def test_a_stream_that_outlasts_the_drain_is_cut(tmp_path, far):
    with gateway(tmp_path, far, "--drain", "1") as (url, process, _):
        wait_until_ready(url)
        stream = Stream(url)
        process.send_signal(signal.SIGTERM)
        begun_s = time.monotonic()
        process.wait(10)
        assert time.monotonic() - begun_s < 5
        stream.join(10)
        assert "[DONE]" not in stream.events
        assert "closed" in stream.problem


def test_a_gateway_that_leaves_goes_on_working_while_health_says_no(tmp_path, far):
    with gateway(tmp_path, far, "--leave", "2") as (url, process, _):
        wait_until_ready(url)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        health = httpx.get(f"{url}/health")
        assert (health.status_code, health.json()["status"]) == (503, "draining")
        assert httpx.get(f"{url}/ping").status_code == 503, "the same under another name"
        assert ask(url, 2).status_code == 200
        assert process.wait(15) == 0


def test_one_of_two_workers_is_killed_and_the_service_goes_on(tmp_path, far):
    with gateway(tmp_path, far, "--workers", "2") as (url, process, log):
        wait_until_ready(url)
        own = psutil.Process(process.pid)
        stream = Stream(url)
        workers = own.children()
        (busy,) = [one for one in workers if is_connected(one, url)]
        (victim,) = [one for one in workers if one != busy]
        victim.kill()
        for _ in range(10):  # over a new connection each
            assert ask(url, 1).status_code == 200
        check_whole(stream)
        wait_for_children(own, 2)
        assert {one.pid for one in own.children()} > {busy.pid}
        busy.kill()  # now the new one has to answer alone
        assert ask(url, 1).status_code == 200
    assert "starting it again" in log.read_text()


def is_connected(process, url):
    port = httpx.URL(url).port
    found = process.net_connections("tcp")
    return any(one.status == psutil.CONN_ESTABLISHED and one.laddr.port == port for one in found)


def wait_for_children(process, num):
    deadline_s = time.monotonic() + 10
    while len(process.children()) < num:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


SECRET = "hunter2-of-the-ledger"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "at least one replica"),
        (("--replica", "m"), "MODEL=URL"),
        (("--replica", "m=http://127.0.0.1:1,colour=red"), "colour"),
        (("--replica", "m=http://127.0.0.1:1", "--tool-parser", "nope"), "hermes"),
        (("--replica", "m=http://127.0.0.1:1", "--reasoning-parser", "nope"), "none"),
        (("--replica", "m=http://127.0.0.1:1", "--tls-cert", "x.pem"), "belong together"),
        (
            ("--replica", "m=http://127.0.0.1:1", "--tls-cert", "x.pem", "--tls-key", "y.pem"),
            "x.pem is no file",
        ),
        (("--config", "nowhere.toml"), "nowhere.toml"),
        (
            (
                "--replica", "m=http://127.0.0.1:1",
                "--database", f"postgresql+psycopg://me:{SECRET}@127.0.0.1:1/x?connect_timeout=2",
            ),
            "127.0.0.1",
        ),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_one_clear_message(mxn, options, said):
    done = mxn("gateway", "--port", "0", *options)
    check_message(done, said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('colour = "red"', "colour"),
        ('port = "many"', "port"),
        ("replicas = [", "valid TOML"),
        ('replicas = ["m=http://127.0.0.1:1"]\nworkers = 0', "workers"),
        ('replicas = ["m=http://127.0.0.1:1"]\nreasoning_parser = "nope"', "nope"),
    ],
)
def test_a_wrong_file_is_one_clear_message_too(mxn, tmp_path, text, said):
    file = tmp_path / "gateway.toml"
    file.write_text(text)
    check_message(mxn("gateway", "--port", "0", "--config", file), said)


def check_message(done: subprocess.CompletedProcess, said):
    assert done.returncode not in (0, -signal.SIGTERM)
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert SECRET not in done.stderr + done.stdout
    assert len(done.stderr.splitlines()) < 8, done.stderr
