"""A cluster whose autoscaler adds hosts and takes them away: Ray's fake provider, which starts nodes on one host."""

import json
import time

import pytest
from hosts import Cluster
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
from test_serving import ask, deploy
from test_training import Run

NODE_TYPES = {
    "ray.head.default": {"resources": {}, "node_config": {}, "max_workers": 0},
    "worker": {"resources": {"CPU": 1, "object_store_memory": 10**8}, "node_config": {}, "max_workers": 3},
}
COMMANDS = ("setup_commands", "initialization_commands", "head_setup_commands", "worker_setup_commands")
COMMANDS += ("head_start_ray_commands", "worker_start_ray_commands")
CONFIG = {name: [] for name in (*COMMANDS, "cluster_synced_files", "rsync_exclude", "rsync_filter")} | {
    "auth": {},
    "file_mounts": {},
    "file_mounts_sync_continuously": False,
    "cluster_name": "grows",
    "max_workers": 3,
    "idle_timeout_minutes": 0.2,
    "provider": {
        "type": "external",  # as "fake_multinode" has its defaults in a file that is not in the wheel
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
        "launch_multiple": True,
        "head_node_id": FAKE_HEAD_NODE_ID,
    },
    "available_node_types": NODE_TYPES,
    "head_node_type": "ray.head.default",
}
SETTINGS = {  # as ray.cluster_utils.AutoscalingCluster has them
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    "RAY_memory_usage_threshold": "0.99",
}


class Growing(Cluster):
    """A head without room for work."""

    def join(self, host) -> None:
        config = self.shared / "autoscaler.json"
        config.write_text(json.dumps(CONFIG))
        env = {name: value for name, value in self.env.items() if name != "RAY_ADDRESS"} | SETTINGS
        where = ["--head", "--dashboard-host", host.address, f"--node-ip-address={host.address}"]
        host.run("ray", "start", *where, "--num-cpus=0", f"--autoscaling-config={config}", env=env)

    def nodes(self) -> int:
        """How many the autoscaler has brought."""
        count = "import ray, json; ray.init(log_to_driver=False); print(sum(n['Alive'] for n in ray.nodes()) - 1)"
        return int(self.head.run("python", "-c", count, env=self.env).splitlines()[-1])


@pytest.fixture(scope="module")
def cluster():
    with Growing(1) as cluster:
        yield cluster


def test_hosts_come_for_a_run_and_go_when_it_has_ended(cluster, rows):
    """`prepare` brought one, for its tasks."""
    wait_until_idle(cluster)
    run = Run(cluster, rows, "asks", workers=2, num_iterations=20)
    run.start(0)
    waiting = "pretrain: waiting for 2 workers of 1 CPU: 0 there"
    print(f"hosts are asked for: {run.wait_until(lambda: waiting in run.said):.0f} s")
    print(f"first step on 2: {run.wait_until(lambda: run.trains_on(2)):.0f} s")
    run.finish()
    assert run.sizes == [2]
    print(f"gone after {wait_until_idle(cluster):.0f} s")


def test_hosts_come_for_the_engines_of_a_service_and_go_with_them(cluster, checkpoints):
    """Two engines fill a host. All hosts have one address here, so only the head has a proxy."""
    wait_until_idle(cluster)
    began = time.monotonic()
    deploy(cluster, checkpoints[0], "HeadOnly", replicas=4)
    print(f"four engines on {cluster.nodes()} hosts: {time.monotonic() - began:.0f} s")
    assert cluster.nodes() == 2
    assert {ask(cluster.head, f"{i}").status_code for i in range(8)} == {200}
    deploy(cluster, checkpoints[0], "HeadOnly", replicas=1)
    print(f"one is left after {wait_until_idle(cluster, 1):.0f} s")
    assert ask(cluster.head, "Are you there?").status_code == 200
    dashboard = f"http://{cluster.head.address}:8265"
    cluster.head.run("serve", "shutdown", "--yes", "--address", dashboard, env=cluster.env)
    print(f"none after {wait_until_idle(cluster):.0f} s")


def wait_until_idle(cluster, hosts: int = 0) -> float:
    """Seconds until no more than `hosts` are left."""
    began = time.monotonic()
    while cluster.nodes() > hosts:
        assert time.monotonic() - began < 60
        time.sleep(1)
    return time.monotonic() - began
