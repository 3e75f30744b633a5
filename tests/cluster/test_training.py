"""Training on three hosts, which are namespaces of this machine. Run by `make test-cluster`."""

import json
import os
import re
import signal
import subprocess
import time
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path

import pytest
from train.runs import assert_every_row_once, steps

from nanochat_ray.train.metrics import read_metrics

PACED = str(Path(__file__).with_name("paced_pretrain.py"))
NUM_ITERATIONS, ROWS_PER_STEP = 300, 8
SECONDS_A_STEP = 1.0  # while something happens to a run


class Run:
    """A paced run of some name. It is slow until it is told to finish."""

    def __init__(self, cluster, rows: str, name: str, **options):
        self.cluster, self.folder = cluster, cluster.shared / "home" / "runs" / name
        self.pace, self.out = cluster.shared / "home" / "pace", cluster.shared / f"{name}.out"
        tiny = {"depth": 2, "head_dim": 32, "total_batch_size": ROWS_PER_STEP * 64, "num_iterations": NUM_ITERATIONS}
        tiny |= {"eval_every": 75, "eval_tokens": 1024, "save_every": 8, "sample_every": 0}
        tiny |= {"dtype": "float32", "compile": False, "workers": 3} | options
        self.num_iterations = tiny["num_iterations"]
        self.command = ["python", PACED, json.dumps({"rows": rows, "run": name} | tiny)]

    def start(self, seconds_a_step: float = SECONDS_A_STEP) -> None:
        self.pace.write_text(str(seconds_a_step))
        with open(self.out, "a") as out:
            self.process = self.cluster.head.popen(
                *self.command, env=self.cluster.env, stdout=out, stderr=subprocess.STDOUT
            )

    @property
    def said(self) -> str:
        return self.out.read_text()

    @property
    def sizes(self) -> list[int]:
        """Of the groups of workers, in turn."""
        return [size for size, _ in groupby(line["train/world_size"] for line in steps(self.folder))]

    def wait_until(self, condition, seconds: float = 240) -> float:
        """Returns how many seconds it took."""
        began = time.monotonic()
        while not condition():
            assert self.process.poll() is None, self.said[-3000:]
            assert time.monotonic() - began < seconds, self.said[-3000:]
            time.sleep(0.1)
        return time.monotonic() - began

    def trains_on(self, workers: int, count: int = 1) -> bool:
        """Whether the newest `count` steps are of so many workers."""
        newest = steps(self.folder)[-count:]
        return len(newest) == count and all(line["train/world_size"] == workers for line in newest)

    @property
    def step(self) -> int:
        return max((line["step"] for line in steps(self.folder)), default=0)

    def finish(self) -> None:
        self.pace.write_text("0")
        assert self.process.wait(timeout=240) == 0, self.said[-3000:]
        assert_every_row_once(self.folder, self.num_iterations, ROWS_PER_STEP)

    @property
    def val_bpb(self) -> list[float]:
        return [line["val/bpb"] for line in read_metrics(str(self.folder)) if "val/bpb" in line]


@pytest.fixture
def start(cluster, rows):
    runs = []

    def begin(name: str, seconds_a_step: float = SECONDS_A_STEP, **options) -> Run:
        runs.append(Run(cluster, rows, name, **options))
        runs[-1].start(seconds_a_step)
        return runs[-1]

    yield begin
    for run in runs:
        run.process.kill()
        run.process.wait()


@pytest.fixture(scope="module")
def undisturbed(cluster, rows) -> list[float]:
    """val/bpb of a run on one host to which nothing happened."""
    run = Run(cluster, rows, "undisturbed", workers=1)
    run.start(0)
    run.finish()
    return run.val_bpb


@contextmanager
def slow_network(host):
    """A step then waits seconds for what the host sends."""
    qdisc = ["tc", "qdisc"]
    host.run(*qdisc, "add", "dev", "eth0", "root", "tbf", "rate", "50mbit", "burst", "64kb", "latency", "500ms")
    yield
    host.run(*qdisc, "del", "dev", "eth0", "root")


def hang(host, seconds: float) -> None:
    """As a machine does while it is moved to another one."""
    stopped = host.pids()
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for pid in stopped:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        time.sleep(seconds)


def test_three_hosts_train_as_one_does(start, undisturbed):
    """Each host's name maps to 127.0.1.1, where no other host answers."""
    run = start("on-3", 0, workers=None)
    run.finish()
    assert run.sizes == [3]
    assert len(undisturbed) == 5
    assert run.val_bpb == pytest.approx(undisturbed, abs=1e-3)


def test_a_run_waits_for_hosts_and_takes_one_that_comes_late(start, cluster, undisturbed):
    lost = cluster.hosts[2]
    lost.power_off()
    run = start("waits", wait_minutes=0.5)
    waiting = "pretrain: waiting for 3 workers of 1 CPU: 2 there; starts with fewer after 0.5 minutes (--wait-minutes)"
    run.wait_until(lambda: waiting in run.said)
    assert not run.folder.exists()
    run.wait_until(lambda: asked(cluster, "{'CPU': 1}: 3"))
    run.wait_until(lambda: run.trains_on(2))
    cluster.join(lost)
    print(f"a host that came late trains after {run.wait_until(lambda: run.trains_on(3)):.0f} s")
    run.finish()
    assert run.sizes == [2, 3]
    assert run.val_bpb == pytest.approx(undisturbed, abs=1e-3)


def asked(cluster, bundles: str) -> bool:
    """Whether the autoscaler, which looks every 5 seconds, was asked for them."""
    return f"{bundles} from request_resources()" in cluster.head.run("ray", "status", env=cluster.env)


def test_gpus_that_do_not_come_are_an_error_of_one_line(start, cluster):
    run = start("gpus", workers=2, use_gpu=True, wait_minutes=0.5)
    waiting = "waiting for 2 workers of 1 GPU: 0 there; gives up after 0.5 minutes (--wait-minutes)\n"
    run.wait_until(lambda: waiting in run.said)
    run.wait_until(lambda: asked(cluster, "{'GPU': 1}: 2"))
    assert run.process.wait(timeout=120) == 1
    assert (
        run.said.splitlines()[-1] == "error: no room for one of 2 workers of 1 GPU, after 0.5 minutes (--wait-minutes)"
    )
    assert not run.folder.exists()


def test_a_run_outlives_a_lost_host_and_a_lost_network_and_grows_back(start, cluster, undisturbed):
    host = cluster.hosts[2]
    run = start("outlives")
    run.wait_until(lambda: run.trains_on(3, count=12))
    host.power_off()
    killed = run.wait_until(lambda: run.trains_on(2))
    cluster.join(host)
    grown = run.wait_until(lambda: run.trains_on(3, count=3))
    with slow_network(host):
        before = run.step
        run.wait_until(lambda: run.step >= before + 5)
    hang(host, 8)
    run.wait_until(lambda: run.step >= before + 10)
    assert run.sizes == [3, 2, 3]  # Ray took neither for a lost host
    host.cut_off()
    cut = run.wait_until(lambda: run.trains_on(2))
    host.heal()
    run.wait_until(lambda: not host.processes("raylet/raylet"))  # the head has given it up, and it ends itself
    cluster.join(host)
    again = run.wait_until(lambda: run.trains_on(3))
    run.finish()
    print(f"next step after: killed {killed:.0f} s, cut off {cut:.0f} s; grown back after {grown:.0f} s, {again:.0f} s")
    assert run.sizes == [3, 2, 3, 2, 3]
    assert run.val_bpb == pytest.approx(undisturbed, abs=1e-3)
    # On an idle machine 12 and 30 s, and growing takes 38; without LostHosts and ray.env 90 and 170.
    assert killed < 30 + grown and cut < 60 + 2 * grown


def test_the_same_job_goes_on_when_its_driver_was_killed_and_in_a_new_cluster(start, cluster, undisturbed):
    run = start("resumes")
    run.wait_until(lambda: run.trains_on(3, count=12))
    for process in cluster.head.processes(PACED):
        process.kill()
    run.process.wait(timeout=30)
    run.start()
    print(f"a killed driver's run goes on after {run.wait_until(lambda: resumed(run, 1)):.0f} s")
    run.wait_until(lambda: run.trains_on(3, count=12))
    for host in cluster.hosts:
        host.power_off()
    run.process.wait(timeout=30)
    for host in cluster.hosts:
        cluster.join(host)
    run.start()
    run.wait_until(lambda: resumed(run, 2))
    run.finish()
    assert run.val_bpb == pytest.approx(undisturbed, abs=1e-3)


def resumed(run: Run, times: int) -> bool:
    return len(re.findall(r"resuming from step \d+, workers: 3", run.said)) == times
