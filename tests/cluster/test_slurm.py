"""cluster/slurm.sh on a real Slurm: a controller and two nodes of 3 CPUs, each on a host of its own."""

import os
import pydoc_data.topics
import re
import shlex
import shutil
import subprocess
import sys
import time

import pytest
from hosts import REPOSITORY, Cluster, Host
from train.runs import assert_every_row_once, assert_same_weights

from nanochat_ray.train import checkpoint

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("slurmctld", "slurmd", "munged"))), reason="no Slurm: apt-get install slurm-wlm munge"
)
NUM_ITERATIONS, ROWS_PER_STEP = 80, 8
OTHER_TOKEN = "of-another-cluster"  # in the shell that calls sbatch
CONFIG = """
ClusterName=test
SlurmctldHost={head.name}({head.address})
SlurmUser=root
AuthInfo=socket={folder}/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_min_interval=100000,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 MaxTime=60
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF MaxTime=60
"""


class Slurm(Cluster):
    """Hosts without Ray, which the jobs start."""

    def join(self, host: Host) -> None:
        if host is self.head:
            self.start_controller()
        self.start_daemon(host, "slurmd", "-D", "-N", host.name)

    def start_controller(self) -> None:
        del self.env["RAY_ADDRESS"], self.env["RAY_AUTH_TOKEN"]
        folder = self.root / "slurm"
        folder.mkdir()
        (folder / "key").write_bytes(os.urandom(64))
        (folder / "key").chmod(0o600)
        munged = ["munged", "--foreground", "--force", f"--key-file={folder}/key", f"--socket={folder}/socket"]
        munged += [f"--{name}-file={folder}/munge.{name}" for name in ("pid", "log", "seed")]
        self.munged = subprocess.Popen(munged, stderr=subprocess.DEVNULL)
        nodes = [f"NodeName={host.name} NodeAddr={host.address} CPUs=3 RealMemory=8000\n" for host in self.hosts]
        config = CONFIG.format(head=self.head, folder=folder, nodes="".join(nodes))
        (folder / "slurm.conf").write_text(config)
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # loaded, though nothing here uses it
        self.env["SLURM_CONF"] = str(folder / "slurm.conf")
        self.start_daemon(self.head, "slurmctld", "-D")
        self.checkout = self.shared / "checkout"
        self.checkout.mkdir()
        (self.checkout / "cluster").symlink_to(REPOSITORY / "cluster")
        (self.checkout / ".venv").symlink_to(sys.prefix)

    def start_daemon(self, host: Host, *command: str) -> None:
        host.popen(*command, env=self.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def __exit__(self, *_) -> None:
        super().__exit__()
        self.munged.kill()
        self.munged.wait()

    def submit(self, *options: str) -> "Job":
        env = self.env | {"PYTHONPATH": str(REPOSITORY), "RAY_AUTH_TOKEN": OTHER_TOKEN}
        said = self.head.run("sbatch", f"--chdir={self.checkout}", *options, env=env)
        return Job(self, said.split()[-1])


class Job:
    def __init__(self, slurm: Slurm, number: str):
        self.slurm, self.number = slurm, number
        self.out = slurm.checkout / f"slurm-{number}.out"
        self.token = slurm.head.root / "home" / ".ray" / f"slurm-{number}"

    def told(self, name: str) -> str:
        """What Slurm knows of it: JobState or Restarts."""
        said = self.slurm.head.run("scontrol", "show", "job", self.number, env=self.slurm.env)
        return re.search(rf"\b{name}=(\S+)", said)[1]

    @property
    def said(self) -> str:
        return self.out.read_text() if self.out.exists() else ""

    def wait_until(self, condition, seconds: float = 240) -> float:
        began = time.monotonic()
        while not condition():
            assert self.told("JobState") not in ("FAILED", "CANCELLED", "TIMEOUT"), self.said[-3000:]
            assert time.monotonic() - began < seconds, self.said[-3000:]
            time.sleep(0.3)
        return time.monotonic() - began


@pytest.fixture(scope="module")
def cluster():
    with Slurm(2) as cluster:
        yield cluster


def job(nodes: int, cpus: int) -> list[str]:
    few = ["--gpus-per-node=0", "--mem=2G", "--time=30", f"--nodes={nodes}", f"--cpus-per-task={cpus}"]
    return [*few, str(REPOSITORY / "cluster" / "slurm.sh")]


def pretrain(run: str) -> list[str]:
    """With two workers of a CPU each."""
    tiny = ["--depth=2", "--head-dim=32", f"--total-batch-size={ROWS_PER_STEP * 64}", "--dtype=float32"]
    tiny += ["--compile=False", "--workers=2", "--sample-every=0", "--eval-every=0", "--save-every=10"]
    tiny += [f"--num-iterations={NUM_ITERATIONS}", "--eval-tokens=1024", f"--run={run}"]
    return ["nanochat-ray", "pretrain", *tiny]


def raylets(cluster: Slurm) -> list[int]:
    return [len(host.processes("raylet/raylet")) for host in cluster.hosts]


def test_a_preempted_job_ends_as_the_one_beside_it(cluster, golden):
    """Two jobs share the hosts. One makes way for a third, is queued again, and trains on to the same weights."""
    runs, text = cluster.shared / "home" / "runs", cluster.shared / "topics.txt"
    text.write_text("\n\n".join(topic for _, topic in sorted(pydoc_data.topics.topics.items())))
    prepare = ["nanochat-ray", "prepare", f"--source={text}", "--sequence-len=64", f"--tokenizer={golden}/nanochat_d2"]
    both = f"{shlex.join(prepare)} && exec {shlex.join(pretrain('preempted'))}"
    preempted = cluster.submit("--partition=low", *job(nodes=2, cpus=1), "sh", "-c", both)
    preempted.wait_until(lambda: list(runs.parent.glob("rows/*/manifest.json")))
    whole = cluster.submit("--partition=high", *job(nodes=1, cpus=2), *pretrain("whole"))
    print(f"first checkpoint: {preempted.wait_until(lambda: checkpoint.checkpoints(str(runs / 'preempted'))):.0f} s")
    print(f"two Rays: {whole.wait_until(lambda: raylets(cluster) == [2, 1]):.0f} s")
    tokens = [one.token.read_text() for one in (whole, preempted)]
    assert tokens[0] != tokens[1] and all(len(token) == 64 for token in tokens)
    assert {one.token.stat().st_mode & 0o777 for one in (whole, preempted)} == {0o600}
    assert not any(host.processes(token) for host in cluster.hosts for token in tokens)
    daemons = [daemon for host in cluster.hosts for daemon in host.processes("raylet/raylet")]
    assert all(daemon.environ().get("RAY_AUTH_TOKEN") != OTHER_TOKEN for daemon in daemons)
    node = cluster.hosts[1].name
    cluster.submit("--partition=high", f"--nodelist={node}", "--cpus-per-task=3", "--output=/dev/null", "--wrap=true")
    print(f"preempted: {preempted.wait_until(lambda: preempted.told('Restarts') == '1'):.0f} s")
    assert whole.told("JobState") == "RUNNING"
    for one in (whole, preempted):
        print(f"ended: {one.wait_until(lambda one=one: one.told('JobState') == 'COMPLETED'):.0f} s")
    assert whole.told("Restarts") == "0" and "failed" not in whole.said
    assert "pretrain: resuming from step" in preempted.said and "pretrain: resuming" not in whole.said
    for run in ("whole", "preempted"):
        assert_every_row_once(runs / run, NUM_ITERATIONS, ROWS_PER_STEP)
    assert_same_weights(runs / "whole", runs / "preempted")


def test_jobs_leave_nothing(cluster):
    """After the test above."""
    logs = [path.read_text() for path in cluster.checkout.glob("slurm-*.out")]
    assert len(logs) == 4
    for host in cluster.hosts:
        assert not host.processes("raylet") and not host.processes("gcs_server")
        assert not list((host.root / "tmp").glob("ray-*"))
        assert not list((host.root / "home" / ".ray").glob("slurm-*"))
