"""The chat service on several hosts, which are namespaces of this machine. Run by `make test-cluster`.

The tests go on from each other: what one deploys the next one asks.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import grpc
import httpx
import pytest
import yaml
from hosts import REPOSITORY, Cluster, Host
from prometheus_client.parser import text_string_to_metric_families
from ray.serve.generated.serve_pb2 import ASGIRequest
from ray.serve.generated.serve_pb2_grpc import ASGIServiceStub

KEYS = ("of-the-load", "of-the-limit")
PER_MINUTE = 600
LOST = "the replica that answered was lost; ask again"
LONG = 1900  # tokens of an answer that takes seconds


@pytest.fixture(scope="module")
def cluster():
    """Three hosts, whose Ray has the priority of any program: engines are to answer beside whatever else runs here."""
    cluster = Cluster(3)
    cluster.env["RAY_worker_niceness"] = "0"
    with cluster:
        yield cluster


def deploy(cluster: Cluster, checkpoint: str, proxies: str = "EveryNode", **options) -> None:
    """As cluster/serve.yaml says, with other arguments; returns when it runs."""
    config = yaml.safe_load((REPOSITORY / "cluster" / "serve.yaml").read_text()) | {"proxy_location": proxies}
    given = {"checkpoint": [f"chat={checkpoint}"], "replicas": 3, "dtype": "float32", "compile": False}
    config["applications"][0]["args"] = given | options
    path = cluster.shared / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    dashboard = f"http://{cluster.head.address}:8265"
    cluster.head.run("serve", "deploy", "--address", dashboard, str(path), env=cluster.env)
    headers, deadline, status = {"Authorization": f"Bearer {cluster.env['RAY_AUTH_TOKEN']}"}, time.monotonic() + 180, ""
    while status != "RUNNING" and time.monotonic() < deadline:
        time.sleep(1)
        answer = httpx.get(f"{dashboard}/api/serve/applications/", headers=headers, timeout=30).json()
        status = answer["applications"].get("nanochat", {}).get("status")
        assert status != "DEPLOY_FAILED", answer
    assert status == "RUNNING", json.dumps(answer)


def url(host: Host, path: str = "/v1/chat/completions") -> str:
    return f"http://{host.address}:8000{path}"


def ask(
    host: Host, content: str | list, max_tokens: int = 3, key: str = KEYS[0], timeout: float = 60
) -> httpx.Response:
    messages = content if isinstance(content, list) else [{"role": "user", "content": content}]
    headers, timeouts = {"Authorization": f"Bearer {key}"}, httpx.Timeout(timeout, connect=3)
    return httpx.post(
        url(host), json={"messages": messages, "max_tokens": max_tokens}, headers=headers, timeout=timeouts
    )


class Stream(threading.Thread):
    """A long answer being read from a host; `end` is "whole", "cut" or the message of the error event that ended it."""

    def __init__(self, host: Host, number: int):
        super().__init__(daemon=True)
        self.host, self.number, self.began, self.end, self.ended = host, number, threading.Event(), "", 0.0
        self.start()

    def run(self) -> None:
        messages = [{"role": "user", "content": f"Tell me of number {self.number}"}]
        body = {"messages": messages, "max_tokens": LONG, "temperature": 1, "stream": True}
        headers, end = {"Authorization": f"Bearer {KEYS[0]}"}, "cut"
        try:
            with httpx.stream("POST", url(self.host), json=body, headers=headers, timeout=90) as response:
                for line in response.iter_lines():
                    self.began.set()
                    if line.startswith('data: {"error"'):
                        end = json.loads(line.removeprefix("data: "))["error"]["message"]
                    elif line == "data: [DONE]" and end == "cut":
                        end = "whole"
        except httpx.HTTPError:
            end = "cut"
        self.end, self.ended = end, time.monotonic()


class Load:
    """Clients of each host, each with one short request after another, while it is entered."""

    def __init__(self, hosts: list[Host], clients: int = 2):
        self.answers = {host: [] for host in hosts}  # when each one came, and its status
        self.stop, self.began = threading.Event(), time.monotonic()
        self.threads = [threading.Thread(target=self.client, args=(h, i)) for h in hosts for i in range(clients)]

    def client(self, host: Host, number: int) -> None:
        for i in range(100_000):
            if self.stop.wait(0.5):
                return
            try:
                status = ask(host, f"{host.name} {number} {i}").status_code
            except httpx.HTTPError as error:
                status = type(error).__name__
            self.answers[host].append((time.monotonic(), status))

    def __enter__(self) -> "Load":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join(90)
        self.ended = time.monotonic()

    def statuses(self, host: Host) -> set:
        return {status for _, status in self.answers[host]}

    def longest_gap(self, host: Host) -> float:
        """Seconds without an answer."""
        times = [self.began, *sorted(when for when, status in self.answers[host] if status == 200), self.ended]
        return max(later - earlier for earlier, later in pairwise(times))


def counts(host: Host, name: str, label: str) -> Counter:
    families = text_string_to_metric_families(httpx.get(url(host, "/metrics"), timeout=30).text)
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    found = Counter()
    for sample in samples:
        found[sample.labels[label]] += sample.value
    return found


def test_each_host_answers_by_its_own_front(cluster, checkpoints):
    deploy(cluster, checkpoints[0])
    before, fronts = Counter(), []
    for host in cluster.hosts:
        for i in range(4):
            assert ask(host, f"{host.name} {i}").status_code == 200
        after = counts(cluster.head, "nanochat_requests_total", "front")
        [(front, more)] = (after - before).items()
        assert more == 4
        fronts.append(front)
        before = after
        endless = httpx.get(url(host, "/health"), headers={f"X-{i}": "x" * 100 for i in range(3000)}, timeout=30)
        assert endless.status_code == 431  # Serve's proxies limit connections too
    assert len(set(fronts)) == 3
    assert len({str(sorted(counts(h, "nanochat_requests_total", "front").items())) for h in cluster.hosts}) == 1
    assert sum(counts(cluster.head, "nanochat_engine_requests", "replica").values()) == 12


def test_a_conversation_finds_its_engine_from_any_host(cluster):
    for number in range(6):
        turns = [{"role": "user", "content": f"{number}: a story of a fox, a hen and a long winter. " * 5}]
        for turn, host in enumerate(cluster.hosts):
            answer = ask(host, turns, 20).json()
            assert (answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 32) == (turn > 0)
            turns += [answer["choices"][0]["message"], {"role": "user", "content": "Go on"}]
            turns[-2] = {"role": "assistant", "content": turns[-2]["content"]}


def test_a_new_checkpoint_fails_no_request(cluster, checkpoints):
    """It comes with keys and a limit, which all hosts then know of."""
    keys = cluster.shared / "keys"
    keys.write_text("".join(f"{hashlib.sha256(key.encode()).hexdigest()}\n" for key in KEYS))
    with Load(cluster.hosts) as load:
        opened = [Stream(host, i) for i in range(2) for host in cluster.hosts]
        assert all(stream.began.wait(30) for stream in opened)
        deploy(cluster, checkpoints[1], api_keys=str(keys), requests_per_minute=PER_MINUTE)
    assert {host.name: load.statuses(host) for host in cluster.hosts} == {host.name: {200} for host in cluster.hosts}
    assert max(load.longest_gap(host) for host in cluster.hosts) < 10
    for stream in opened:
        stream.join(60)
    assert {stream.end for stream in opened} == {"whole"}


def test_a_limit_counts_requests_to_all_hosts(cluster):
    assert {ask(host, "Hi", key="wrong").status_code for host in cluster.hosts} == {401}
    with ThreadPoolExecutor(6) as pool:
        sent = pool.map(lambda i: ask(cluster.hosts[i % 3], [], key=KEYS[1]).status_code, range(PER_MINUTE + 30))
        assert Counter(sent) == {400: PER_MINUTE, 429: 30}
    assert {ask(host, "Hi", key=KEYS[1]).status_code for host in cluster.hosts} == {429}
    assert {ask(host, "Hi").status_code for host in cluster.hosts} == {200}


def test_a_host_cut_off_takes_only_its_own_streams(cluster):
    lost, living = cluster.hosts[2], cluster.hosts[:2]
    with Load(living) as load:
        opened = [Stream(host, i) for i, host in enumerate(living * 8)]  # a third of them at the lost host's engine
        assert all(stream.began.wait(30) for stream in opened)
        lost.cut_off()
        cut = time.monotonic()
        for stream in opened:
            stream.join(60)
        time.sleep(max(0, cut + 30 - time.monotonic()))
    ends = Counter(stream.end for stream in opened)
    assert ends == {"whole": ends["whole"], LOST: ends[LOST]} and ends["whole"] and ends[LOST]
    assert max(stream.ended - cut for stream in opened if stream.end == LOST) < 20
    assert [load.statuses(host) for host in living] == [{200}, {200}]
    gaps = [load.longest_gap(host) for host in living]
    assert max(gaps) < 10, gaps


def test_a_host_that_comes_back_has_a_front_again(cluster):
    host = cluster.hosts[2]
    host.power_off()
    host.heal()
    cluster.join(host)
    deadline, status = time.monotonic() + 90, None
    while status != 200 and time.monotonic() < deadline:
        time.sleep(0.5)
        try:
            status = ask(host, "Are you there?").status_code
        except httpx.HTTPError as error:
            status = error
    assert status == 200
    deadline = time.monotonic() + 30
    while len(counts(host, "nanochat_requests_total", "front")) < 3 and time.monotonic() < deadline:
        ask(host, "And your front?")
        time.sleep(0.5)
    assert len(counts(host, "nanochat_requests_total", "front")) == 3


TRY_TO_CONNECT = "import ray, sys; ray.init(sys.argv[1], logging_level='ERROR'); print('connected')"


@pytest.mark.parametrize("token", [None, "0" * 64])
def test_nothing_is_open_without_the_token(cluster, token):
    dashboard = f"http://{cluster.head.address}:8265"
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    for method, path in (
        ("GET", "/api/jobs/"),
        ("POST", "/api/jobs/"),
        ("GET", "/api/serve/applications/"),
        ("PUT", "/api/serve/applications/"),
        ("DELETE", "/api/serve/applications/"),
        ("GET", "/nodes?view=summary"),
        ("GET", "/api/v0/actors"),
        ("GET", "/api/v0/logs"),
    ):
        response = httpx.request(
            method,
            dashboard + path,
            json={"entrypoint": "true"} if method == "POST" else None,
            headers=headers,
            timeout=30,
        )
        assert response.status_code in (401, 403), f"{method} {path}: {response.status_code}"
    for port in listening(cluster.hosts[1], "ServeReplica"):
        with grpc.insecure_channel(f"{cluster.hosts[1].address}:{port}") as channel:
            metadata = [("authorization", f"Bearer {token}")] if token else []
            with pytest.raises(grpc.RpcError) as refused:
                ASGIServiceStub(channel).HandleRequest(ASGIRequest(), timeout=20, metadata=metadata)
        assert refused.value.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(cluster.root)} | ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {})
    command = [sys.executable, "-c", TRY_TO_CONNECT, f"{cluster.head.address}:6379"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "connected" not in done.stdout


def listening(host: Host, process: str) -> list[int]:
    lines = host.run("ss", "-ltnpH").splitlines()
    return [int(line.split()[3].rpartition(":")[2]) for line in lines if process[:11] in line]


def test_the_command_waits_until_the_cluster_has_room(cluster, checkpoints):
    dashboard = f"http://{cluster.head.address}:8265"
    cluster.head.run("serve", "shutdown", "--yes", "--address", dashboard, env=cluster.env)
    later = cluster.hosts[2]
    later.power_off()
    options = ["--checkpoint", checkpoints[0], "--replicas=5", "--dtype=float32", "--no-compile", "--host=0.0.0.0"]
    command = ["python", "-m", "nanochat_ray.cli", "serve", *options, "--port=8100"]
    said = cluster.shared / "said"
    with said.open("w") as output:
        process = cluster.head.popen(*command, env=cluster.env, stdout=output, stderr=output)
    until(said, "waiting    5 engines")
    time.sleep(10)
    assert "serving" not in said.read_text() and process.poll() is None
    cluster.join(later)
    until(said, "serving    http://0.0.0.0:8100")
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
    for host in cluster.hosts:
        answer = httpx.post(f"http://{host.address}:8100/v1/chat/completions", json=body, timeout=60)
        assert answer.status_code == 200
    process.terminate()
    process.wait(30)


def until(file: Path, says: str) -> None:
    deadline = time.monotonic() + 120
    while says not in file.read_text():
        assert time.monotonic() < deadline, file.read_text()
        time.sleep(0.5)
