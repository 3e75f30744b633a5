"""Where ChatService runs: on each host that has an engine, and on the head, where Serve always has a proxy."""

import uuid

import ray
from ray._raylet import IMPLICIT_RESOURCE_PREFIX
from ray.core.generated import autoscaler_pb2
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

# Resources of which each host has 1 without saying so. A host where neither is used is idle for Ray's autoscaler, which
# may take it away.
ENGINE_MARK, FRONT_MARK = f"{IMPLICIT_RESOURCE_PREFIX}nanochat-engine", f"{IMPLICIT_RESOURCE_PREFIX}nanochat-front-"
HEAD_MARK = "node:__internal_head__"
MOST_HOSTS = 1000


class OneBesideEngines:
    """A policy for Serve's autoscaling, as hosts and engines come and go. Serve's controller gets it by value."""

    def __init__(self, mark: str):
        self.mark = mark

    def __call__(self, _: AutoscalingContext) -> tuple[int, dict]:
        gcs = ray._private.worker.global_worker.gcs_client
        reply = autoscaler_pb2.GetClusterResourceStateReply.FromString(gcs.get_cluster_resource_state())
        alive = [n for n in reply.cluster_resource_state.node_states if n.status != autoscaler_pb2.NodeStatus.DEAD]
        left = {node.node_id: node.available_resources for node in alive}
        wanted = {host for host, has in left.items() if HEAD_MARK in has or has.get(ENGINE_MARK, 1) < 1}
        there = {host for host, has in left.items() if has.get(self.mark, 1) < 1}
        # Once all hosts that want one have one, Serve ends the others: it begins where the fewest replicas are.
        return max(1, len(wanted if wanted <= there else wanted | there)), {}


def one_beside_engines() -> dict:
    """Options of the deployment. Each version has a mark of its own, so that the next one starts beside this one."""
    mark = FRONT_MARK + uuid.uuid4().hex
    policy = AutoscalingPolicy(policy_function=OneBesideEngines, policy_kwargs={"mark": mark})
    delays = {"upscale_delay_s": 0, "downscale_delay_s": 0}
    return {
        "ray_actor_options": {"num_cpus": 0, "resources": {mark: 1}},
        "autoscaling_config": AutoscalingConfig(min_replicas=1, max_replicas=MOST_HOSTS, policy=policy, **delays),
    }
