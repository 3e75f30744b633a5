"""Places ChatService: one on each host, except on hosts that an autoscaler brought and that have no engine."""

import uuid

import ray
from ray._raylet import IMPLICIT_RESOURCE_PREFIX
from ray.core.generated import autoscaler_pb2
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

# Implicit resources: every host has 1 of each. An autoscaler removes no host where a front uses one.
ENGINE_MARK, FRONT_MARK = f"{IMPLICIT_RESOURCE_PREFIX}nanochat-engine", f"{IMPLICIT_RESOURCE_PREFIX}nanochat-front-"
HEAD_MARK = "node:__internal_head__"
MAX_HOSTS = 1000


class OneOnEachHost:
    """Serve autoscaling policy that follows hosts and engines. Serve pickles it by value for its controller."""

    def __init__(self, mark: str):
        self.mark = mark

    def __call__(self, _: AutoscalingContext) -> tuple[int, dict]:
        gcs = ray._private.worker.global_worker.gcs_client
        reply = autoscaler_pb2.GetClusterResourceStateReply.FromString(gcs.get_cluster_resource_state())
        alive = [n for n in reply.cluster_resource_state.node_states if n.status != autoscaler_pb2.NodeStatus.DEAD]
        left = {node.node_id: node.available_resources for node in alive}
        stay = {node.node_id for node in alive if HEAD_MARK in node.available_resources or not node.ray_node_type_name}
        wanted = stay | {host for host, has in left.items() if has.get(ENGINE_MARK, 1) < 1}
        there = {host for host, has in left.items() if has.get(self.mark, 1) < 1}
        # When each wanted host has a front, Serve stops the surplus ones, first on hosts with the fewest replicas.
        return max(1, len(wanted if wanted <= there else wanted | there)), {}


def one_on_each_host() -> dict:
    """Options of the deployment. Each version has its own mark, so that the next version can start beside this one."""
    mark = FRONT_MARK + uuid.uuid4().hex
    policy = AutoscalingPolicy(policy_function=OneOnEachHost, policy_kwargs={"mark": mark})
    delays = {"upscale_delay_s": 0, "downscale_delay_s": 0}
    return {
        "ray_actor_options": {"num_cpus": 0, "resources": {mark: 1}},
        "autoscaling_config": AutoscalingConfig(min_replicas=1, max_replicas=MAX_HOSTS, policy=policy, **delays),
    }
