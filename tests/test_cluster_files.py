"""The files in cluster/ against the schemas of those who read them, and what Ray makes of them without a cloud."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import boto3
import jsonschema
import kubernetes_validate
import moto
import pytest
import yaml
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.providers import _get_node_provider
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.tags import TAG_RAY_NODE_KIND, TAG_RAY_NODE_NAME, TAG_RAY_USER_NODE_TYPE
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.job_submission import JobStatus

CLUSTER = Path(__file__).resolve().parents[1] / "cluster"
KUBERNETES = "1.33"  # whose schemas are taken
MANIFESTS = {path.stem: yaml.safe_load(path.read_text())["items"] for path in (CLUSTER / "kuberay").glob("*.yaml")}
CLOUDS = ("aws", "azure", "gcp")
RAY_ENV = dict(re.findall(r"^(RAY_\w+)=(.*)$", (CLUSTER / "ray.env").read_text(), re.MULTILINE))
PASSWORDS = re.compile(r"(?i)(token|secret|password|access_key|api_key)\s*[:=]\s*[\"']?[0-9a-z/+]{16,}")


def ray_resource(name: str) -> dict:
    return next(item for item in MANIFESTS[name] if item["apiVersion"] == "ray.io/v1")


def cluster_spec(name: str) -> dict:
    spec = ray_resource(name)["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def pods(name: str) -> list[dict]:
    spec = cluster_spec(name)
    return [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def strict(schema):
    """The schema, refusing fields that it does not name, which Kubernetes would drop without a word."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {name: strict(part) for name, part in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        schema.setdefault("additionalProperties", False)
    return schema


@pytest.mark.parametrize("name", sorted(MANIFESTS))
def test_kuberay_knows_every_field(name, shared):
    resource = ray_resource(name)
    schema = strict(json.loads((shared / "kuberay" / f"{resource['kind']}.json").read_text()))
    schema["properties"]["metadata"] = {"type": "object"}
    jsonschema.validate(resource, schema)


@pytest.mark.parametrize("name", sorted(MANIFESTS))
def test_kubernetes_knows_every_field(name):
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}}
    own = [item for item in MANIFESTS[name] if item["apiVersion"] != "ray.io/v1"]
    for item in (*own, *(pod | {"spec": spec} for spec in pods(name))):
        kubernetes_validate.validate(item, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", sorted(MANIFESTS))
def test_pods_have_few_rights_and_ask_for_the_token(name):
    spec = cluster_spec(name)
    assert spec["authOptions"] == {"mode": "token", "secretName": "nanochat-token"}
    labels = spec["headGroupSpec"]["template"]["metadata"]["labels"]
    [policy] = [item for item in MANIFESTS[name] if item["kind"] == "NetworkPolicy"]
    assert policy["spec"]["podSelector"]["matchLabels"] == labels
    open_to_all = [rule["ports"] for rule in policy["spec"]["ingress"] if "from" not in rule]
    assert open_to_all == ([[{"port": 8000}]] if name == "rayservice" else [])
    for group in spec["workerGroupSpecs"]:
        assert group["template"]["metadata"]["labels"] == labels
        assert group["template"]["spec"]["automountServiceAccountToken"] is False
    for pod in pods(name):
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
        writable = {volume["name"] for volume in pod["volumes"] if "emptyDir" in volume}
        for container in pod["containers"]:
            rights = container["securityContext"]
            assert rights["readOnlyRootFilesystem"] and not rights["allowPrivilegeEscalation"]
            assert rights["capabilities"] == {"drop": ["ALL"]}
            assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/home/ray", "/tmp", "/dev/shm"}
            assert {mount["name"] for mount in container["volumeMounts"]} <= writable
            assert container["resources"]["limits"].keys() >= {"cpu", "memory", "ephemeral-storage"}


def test_the_rayservice_serves_as_serve_yaml_says():
    service = yaml.safe_load(ray_resource("rayservice")["spec"]["serveConfigV2"])
    assert service == yaml.safe_load((CLUSTER / "serve.yaml").read_text())
    assert service["applications"][0]["args"]["api_keys"]


@pytest.mark.parametrize("name", ["serve", "skypilot-serve"])
def test_a_service_on_a_network_asks_for_a_key(name):
    text = (CLUSTER / f"{name}.yaml").read_text()
    config = yaml.safe_load(text)
    command = shlex.split(config.get("run", ""))
    if command:
        assert command[command.index("--host") + 1] == "0.0.0.0"
        assert command[command.index("--api-keys") + 1] == "$API_KEYS" and config["envs"]["API_KEYS"]
    else:
        assert config["http_options"]["host"] == "0.0.0.0" and config["applications"][0]["args"]["api_keys"]


@pytest.mark.parametrize("path", ["aws.yaml", "azure.yaml", "gcp.yaml", "local.yaml", "skypilot.yaml", "slurm.sh"])
def test_every_ray_asks_for_a_token(path):
    assert re.search(r"^[^#]*RAY_AUTH_MODE=token", (CLUSTER / path).read_text(), re.MULTILINE)


def test_skypilot_starts_no_ray_without_a_token():
    script = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())["run"]
    done = subprocess.run(["bash", "-c", script], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert done.returncode and "RAY_AUTH_TOKEN: is not given" in done.stderr


def test_the_image_ends_as_a_user_without_rights():
    users = re.findall(r"^USER (.+)$", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    assert users[-1] == "1000"


def test_the_rayjob_ends_what_it_started():
    rules = ray_resource("rayjob")["spec"]["deletionStrategy"]["deletionRules"]
    deleted = {rule["condition"].get("jobStatus") for rule in rules if rule["policy"] == "DeleteCluster"}
    assert deleted == {JobStatus.SUCCEEDED, JobStatus.FAILED, None}


@pytest.mark.parametrize("path", sorted(CLUSTER.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_host_has_the_settings_of_ray_env_and_no_file_a_secret(path):
    text = path.read_text()
    assert not PASSWORDS.search(text)
    if path.parent.name == "kuberay" or path.stem in CLOUDS:
        given = dict(re.findall(r"(RAY_\w+)(?:=|: )\"?([\w.:]+)", text))
        wanted = RAY_ENV if "serving" in text else {k: v for k, v in RAY_ENV.items() if "SERVE" not in k}
        assert wanted.items() <= given.items()


def autoscaling_config(name: str) -> dict:
    if name not in CLOUDS:
        resource = ray_resource(name) | {"spec": cluster_spec(name)}
        return _derive_autoscaling_config_from_ray_cr(resource | {"metadata": {"name": name, "namespace": "default"}})
    config = prepare_config(yaml.safe_load((CLUSTER / f"{name}.yaml").read_text()))
    validate_config(config)
    return config


@pytest.mark.parametrize("name", [*CLOUDS, "raycluster"])
def test_spot_nodes_come_first_and_others_when_there_are_none(name):
    config = AutoscalingConfig(autoscaling_config(name), skip_content_hash=True)
    types = config.get_node_type_configs()
    assert not types[config.get_head_node_type()].resources.get("GPU")
    assert {kind.min_worker_nodes for kind in types.values()} == {0}
    for kind in types.values():
        kind.resources.setdefault("CPU", 8)  # on AWS Ray asks the cloud

    def launched(**availability) -> dict[str, int]:
        wanted = ResourceRequestUtil.group_by_count([ResourceRequestUtil.make({"GPU": 1, "CPU": 1})] * 16)
        request = SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=types,
            max_num_nodes=config.get_max_num_worker_nodes(),
            resource_requests=wanted,
            **availability,
        )
        return {launch.instance_type: launch.count for launch in ResourceDemandScheduler().schedule(request).to_launch}

    assert launched().get("gpu-spot") == 2 and "gpu" not in launched()
    failed = {"gpu-spot": 0.0}
    without = launched(recoverable_resource_availabilities=failed, cloud_resource_availabilities=failed)
    assert without.get("gpu") == 2 and "gpu-spot" not in without


def test_ray_up_makes_what_aws_yaml_says(tmp_path, monkeypatch):
    """Ray's own bootstrap and node provider, against moto's EC2."""
    for name, value in (("AWS_ACCESS_KEY_ID", "key"), ("AWS_SECRET_ACCESS_KEY", "secret"), ("HOME", str(tmp_path))):
        monkeypatch.setenv(name, value)
    (tmp_path / ".ssh").mkdir()
    with moto.mock_aws():
        for role in ("nanochat-head", "nanochat-worker"):
            boto3.client("iam", "us-east-1").create_instance_profile(InstanceProfileName=role)
        config = bootstrap_aws(autoscaling_config("aws"))
        provider = _get_node_provider(config["provider"], config["cluster_name"])
        for name, kind in config["available_node_types"].items():
            tags = {TAG_RAY_USER_NODE_TYPE: name, TAG_RAY_NODE_NAME: name, TAG_RAY_NODE_KIND: "worker"}
            provider.create_node(kind["node_config"], tags, 1)
        ec2 = boto3.client("ec2", "us-east-1")
        instances = [i for reservation in ec2.describe_instances()["Reservations"] for i in reservation["Instances"]]
        groups = ec2.describe_security_groups(GroupNames=["ray-autoscaler-nanochat"])["SecurityGroups"]
    made = {
        (i["InstanceType"], i.get("InstanceLifecycle"), i["IamInstanceProfile"]["Arn"].rpartition("/")[2])
        for i in instances
    }
    assert made == {
        ("m7i.4xlarge", None, "nanochat-head"),
        ("p5.48xlarge", "spot", "nanochat-worker"),
        ("p5.48xlarge", None, "nanochat-worker"),
    }
    assert {i["MetadataOptions"]["HttpTokens"] for i in instances} == {"required"}
    [group] = groups
    assert [rule["FromPort"] for rule in group["IpPermissions"] if rule["IpRanges"]] == [22]
