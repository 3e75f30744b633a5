"""What cluster/kuberay/ has pods run, on hosts of the tests' own. Run by `make test-cluster`.

Environment, entrypoint and Serve config are the files'; home, keys and what is too large for a CPU are the test's. It
speaks to the head as KubeRay does: over HTTP, with the token.
"""

import hashlib
import pydoc_data.topics
import time

import httpx
import pytest
import yaml
from hosts import REPOSITORY, Cluster

KEY = "the-key-of-a-client"
SMALL = "--minutes=0.05 --workers=2 --skip core sft chatcore --run=small"


def items(name: str) -> dict[str, dict]:
    """Of a file, by kind."""
    listed = yaml.safe_load((REPOSITORY / "cluster" / "kuberay" / f"{name}.yaml").read_text())["items"]
    return {item["kind"]: item for item in listed}


@pytest.fixture(scope="module")
def cluster():
    cluster = Cluster(2)
    environment = items("rayservice")["ConfigMap"]["data"] | items("rayjob")["ConfigMap"]["data"]
    text = cluster.shared / "text.txt"
    environment |= {"PRESET": "cpu", "DEPTH": "1", "OPTIONS": f"{SMALL} --source={text}"}
    cluster.env = environment | cluster.env
    with cluster:
        text.write_text("\n\n".join(pydoc_data.topics.topics.values()))
        yield cluster


def call(cluster: Cluster, method: str, path: str, body: dict | None = None) -> dict:
    headers = {"Authorization": f"Bearer {cluster.env['RAY_AUTH_TOKEN']}"}
    answer = httpx.request(
        method, f"http://{cluster.head.address}:8265/api/{path}", json=body, headers=headers, timeout=60
    )
    assert answer.is_success, answer.text
    return answer.json() if answer.content else {}


def test_a_rayjob_trains(cluster):
    entrypoint = items("rayjob")["RayJob"]["spec"]["entrypoint"]
    job = call(cluster, "POST", "jobs/", {"entrypoint": entrypoint, "submission_id": "speedrun"})["submission_id"]
    began, status = time.monotonic(), {"status": "PENDING"}
    while status["status"] in ("PENDING", "RUNNING") and time.monotonic() < began + 240:
        time.sleep(1)
        status = call(cluster, "GET", f"jobs/{job}")
    said = call(cluster, "GET", f"jobs/{job}/logs")["logs"]
    assert status["status"] == "SUCCEEDED", said[-3000:]
    print(f"{time.monotonic() - began:.0f} s")
    assert "=== done" in said
    assert (cluster.shared / "home" / "runs" / "small" / "report.html").exists()


def test_a_rayservice_answers_who_has_a_key(cluster):
    config = yaml.safe_load(items("rayservice")["RayService"]["spec"]["serveConfigV2"])
    keys = cluster.shared / "keys"
    keys.write_text(hashlib.sha256(KEY.encode()).hexdigest())
    run = cluster.shared / "home" / "runs" / "small"
    own = {"checkpoint": [f"chat={run}"], "api_keys": str(keys), "use_gpu": False, "compile": False}
    config["applications"][0]["args"] |= own
    call(cluster, "PUT", "serve/applications/", config)
    began, state = time.monotonic(), ""
    while state != "RUNNING" and time.monotonic() < began + 120:
        time.sleep(0.5)
        state = call(cluster, "GET", "serve/applications/")["applications"]["nanochat"]["status"]
        assert state != "DEPLOY_FAILED"
    print(f"{time.monotonic() - began:.0f} s")
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
    for host in cluster.hosts:
        url = f"http://{host.address}:8000"
        assert httpx.get(f"{url}/-/healthz", timeout=30).text == "success"  # KubeRay's probe of a worker
        statuses = [
            httpx.post(
                f"{url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {key}"}, timeout=60
            ).status_code
            for key in ("none", KEY)
        ]
        assert statuses == [401, 200]
    secrets = (KEY.encode(), cluster.env["RAY_AUTH_TOKEN"].encode())
    for host in cluster.hosts:
        assert not any(host.processes(secret.decode()) for secret in secrets)
        logs = [log for log in (host.root / "tmp" / "ray").glob("session_2*/logs/**/*") if log.is_file()]
        assert logs and not [log for log in logs if any(secret in log.read_bytes() for secret in secrets)]
