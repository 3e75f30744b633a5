"""The speedrun as a job from outside the cluster, on three hosts that share no folder. Run by `make test-cluster`."""

import json
import os
import subprocess
import time

import boto3
import pytest
import s3
from hosts import BIN, REPOSITORY, Cluster
from train.runs import assert_every_row_once

from nanochat_ray import storage
from nanochat_ray.train import checkpoint
from nanochat_ray.train.metrics import read_metrics

HOME = "s3://bucket/home"
RUN = f"{HOME}/runs/tiny"
ROWS_PER_STEP = 8  # of the cpu preset
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}


@pytest.fixture(scope="module")
def cluster():
    """Three hosts of one CPU each, and S3 beside them, of which 0.5 % of the requests fail."""
    process, port = s3.start_moto()
    with Cluster(3) as cluster:
        cluster.proxy = s3.Proxy(port, cluster.network.gateway)
        cluster.proxy.faults.decide = s3.share(0.005, s3.SLOW_DOWN)
        cluster.store = KEYS | {"AWS_ENDPOINT_URL": cluster.proxy.url, "AWS_EC2_METADATA_DISABLED": "true"}
        cluster.store["NANOCHAT_RAY_HOME"] = HOME
        keys = {name.lower(): value for name, value in KEYS.items()}
        boto3.client("s3", "us-east-1", endpoint_url=f"http://127.0.0.1:{port}", **keys).create_bucket(Bucket="bucket")
        with pytest.MonkeyPatch.context() as patch:
            for name, value in cluster.store.items():
                patch.setenv(name, value)
            yield cluster
    process.kill()
    process.wait()


def submit(cluster, *command: str) -> subprocess.Popen:
    """From this machine, which is no host of the cluster."""
    runtime_env = json.dumps({"env_vars": cluster.store | {"WANDB_MODE": "disabled"}})
    env = {name: value for name, value in (os.environ | cluster.env).items() if name != "RAY_ADDRESS"}
    job = [str(BIN / "ray"), "job", "submit", "--address", f"http://{cluster.head.address}:8265"]
    job += ["--working-dir", str(REPOSITORY), "--runtime-env-json", runtime_env, "--", "python", "-m", *command]
    return subprocess.Popen(job, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_job_from_outside_is_killed_submitted_again_and_ends(cluster):
    command = ["experiments.speedrun", "--depth=1", "--minutes=0.4", "--workers=3", "--run=tiny"]
    began = time.monotonic()
    job = submit(cluster, *command)
    while not checkpoint.checkpoints(RUN):
        assert job.poll() is None, job.stdout.read()[-3000:]
        assert time.monotonic() - began < 300
        time.sleep(0.5)
    for process in cluster.head.processes("experiments.speedrun"):
        process.kill()
    said, _ = job.communicate(timeout=60)
    assert job.returncode != 0 and "=== chat" not in said
    job = submit(cluster, *command)
    said, _ = job.communicate(timeout=300)
    assert job.returncode == 0, said[-3000:]
    assert "pretrain: resuming from step" in said
    failed, sent = cluster.proxy.faults.counts.total(), cluster.proxy.faults.requests.total()
    print(f"{time.monotonic() - began:.0f} s; {failed} of {sent} requests failed")
    assert failed > 0
    assert "\narithmetic: " in said and "\ncounting letters: " in said and f"{RUN}/report.html" in said


def test_it_used_every_row_once(cluster):
    steps = storage.read_json(f"{RUN}/config.json")["plan"]["num_iterations"]
    assert_every_row_once(RUN, steps, ROWS_PER_STEP)
    assert {line["train/world_size"] for line in read_metrics(RUN) if "train/world_size" in line} == {3}


def test_a_miniseries_trains_on_several_hosts_at_once(cluster):
    rows = storage.read_json(f"{RUN}/config.json")["rows"]
    options = ["--preset=cpu", "--depths", "1", "2", "--ratio=0.1", f"--rows={rows}", "--name=series"]
    job = submit(cluster, "experiments.miniseries", *options)
    most, deadline = 0, time.monotonic() + 300
    while job.poll() is None and time.monotonic() < deadline:
        most = max(most, sum(bool(host.processes("RayTrainWorker")) for host in cluster.hosts))
        time.sleep(0.5)
    said, _ = job.communicate(timeout=30)
    assert job.returncode == 0, said[-3000:]
    assert "d1 finished" in said and "d2 finished" in said and most > 1
    assert {"results.csv", "report.html"} <= set(storage.listdir(f"{HOME}/runs/series"))
