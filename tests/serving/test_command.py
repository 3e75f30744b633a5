"""`nanochat-ray serve` as people run it: a process of its own, whose ChatService listens itself, without a proxy."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import grpc
import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from ray.serve.generated.serve_pb2 import ASGIRequest
from ray.serve.generated.serve_pb2_grpc import ASGIServiceStub
from test_faults import joined, post, streams

from serving import load_test
from serving.start import free_port

pytestmark = pytest.mark.slow


class Command:
    """On IPv6, where the environment names proxies that nobody is."""

    def __init__(self, *options: str):
        port = free_port()
        self.url = f"http://[::1]:{port}"
        command = [sys.executable, "-m", "nanochat_ray.cli", "serve", *options, "--host", "::1", "--port", str(port)]
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        environment |= dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
        self.process = psutil.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    def up(self) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            except httpx.HTTPError:
                time.sleep(0.2)
        raise AssertionError("the service did not start")

    def replica(self, deployment: str) -> psutil.Process:
        children = self.process.children(recursive=True)
        return next(p for p in children if f"ServeReplica:nanochat:{deployment}" in " ".join(p.cmdline()))

    def pages_used(self) -> float:
        families = text_string_to_metric_families(httpx.get(f"{self.url}/metrics", timeout=30).text)
        return sum(s.value for f in families for s in f.samples if s.name == "nanochat_engine_kv_pages_used")


@pytest.fixture
def command(checkpoints, tmp_path) -> Iterator[Command]:
    (tmp_path / "link").symlink_to(checkpoints["babbling"])
    command = Command("--checkpoint", f"model={tmp_path}/link", "--dtype", "float32", "--no-compile")
    yield command
    if command.process.is_running():
        for process in [*command.process.children(recursive=True), command.process]:
            process.kill()


def test_serve(command, tmp_path):
    command.up()
    endless_headers_are_refused(command)
    other_names_are_refused(command)
    it_is_the_front_that_listens(command)
    its_processes_have_no_lower_priority(command)
    its_replicas_hear_nobody_else(command)
    who_hangs_up_frees_memory(command)
    streams_of_a_lost_engine_end_with_an_error_and_it_is_replaced(command)
    a_lost_front_comes_back_on_its_port(command)
    a_checkpoint_that_is_gone_is_named(command, tmp_path / "link")
    sigterm_ends_all_processes_as_ctrl_c_does(command)


def it_is_the_front_that_listens(command):
    listens = [c.laddr for c in command.replica("ChatService").net_connections("tcp") if c.status == "LISTEN"]
    assert ("::1", int(command.url.rpartition(":")[2])) in listens


def its_processes_have_no_lower_priority(command):
    assert {command.replica(name).nice() for name in ("ChatService", "engine-0")} == {psutil.Process().nice()}


def its_replicas_hear_nobody_else(command):
    """They listen to each other on all addresses, and unpickle what they hear: not without Ray's token."""
    assert post(command.url, "Are you there?", 2).status_code == 200
    listens = [c.laddr.port for c in command.replica("engine-0").net_connections("tcp") if c.status == "LISTEN"]
    refusals = set()
    for port in listens:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, pytest.raises(grpc.RpcError) as refused:
            ASGIServiceStub(channel).HandleRequest(ASGIRequest(), timeout=20)
        refusals.add(refused.value.code())
    assert grpc.StatusCode.UNAUTHENTICATED in refusals
    assert refusals <= {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED}


def who_hangs_up_frees_memory(command):
    result = load_test.run(load_test.Options(command.url, clients=50, requests=50, max_tokens=[1000], drop=1.0))
    assert result.dropped + result.ok == 50 and result.dropped > 40  # one may be answered before it hangs up
    deadline = time.monotonic() + 10  # seconds, for busy machines
    while command.pages_used() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert command.pages_used() == 0


def streams_of_a_lost_engine_end_with_an_error_and_it_is_replaced(command):
    opened = streams(command.url, 4)
    command.replica("engine-0").kill()
    killed = time.monotonic()
    assert post(command.url, "And now?", 4).status_code == 200
    assert time.monotonic() - killed < 60
    joined(opened)
    assert {str(stream.failure) for stream in opened} == {"the replica that answered was lost; ask again"}


def a_lost_front_comes_back_on_its_port(command):
    command.replica("ChatService").kill()
    command.up()
    assert post(command.url, "And now?", 4).status_code == 200


def endless_headers_are_refused(command):
    response = httpx.get(f"{command.url}/health", headers={f"X-{i}": "x" * 100 for i in range(3000)})
    assert response.status_code == 431


def other_names_are_refused(command):
    assert httpx.get(f"{command.url}/health", headers={"Host": "evil.example"}).status_code == 403


def a_checkpoint_that_is_gone_is_named(command, link):
    """By completions and by /health, in seconds; once it is back, an engine starts."""
    checkpoint = link.readlink()
    link.unlink()
    command.replica("engine-0").kill()
    began = time.monotonic()
    refused = post(command.url, "And now?", 4)
    assert refused.status_code == 503 and str(link) in refused.json()["error"]["message"]
    assert time.monotonic() - began < 20
    health = httpx.get(f"{command.url}/health", timeout=10)
    assert health.status_code == 503 and str(link) in health.json()["status"]
    time.sleep(6)  # until the command itself has looked
    link.symlink_to(checkpoint)
    command.up()
    assert post(command.url, "And now?", 4).status_code == 200


def sigterm_ends_all_processes_as_ctrl_c_does(command):
    processes = command.process.children(recursive=True)
    command.process.send_signal(signal.SIGTERM)
    assert command.process.wait(60) == 130
    said = command.process.stdout.read()
    assert f"serving    {command.url} (only from this machine" in said and "Ctrl-C stops it" in said
    assert "warning    no engine of model answers: its checkpoint is gone" in said
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert alive == []
