"""Starting the chat service: what is wrong is known, and said in one line, before Ray starts."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from serving.app import ServiceOptions, app, newest_checkpoint
from serving.start import address, check_port, start

CONFIG = Path(__file__).resolve().parents[2] / "cluster" / "serve.yaml"


def test_example_config_is_valid():
    config = ServeDeploySchema.model_validate(yaml.safe_load(CONFIG.read_text()))
    [application] = config.applications
    assert application.import_path == "serving.app:app"
    assert set(application.args) <= set(ServiceOptions.model_fields) and ServiceOptions(**application.args)


def test_newest_checkpoint_is_the_default(checkpoints, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no checkpoint under"):
        app(ServiceOptions())
    monkeypatch.setenv("NANOCHAT_RAY_HOME", str(Path(checkpoints["babbling"]).parents[1]))
    assert newest_checkpoint().startswith(checkpoints["babbling"])


@pytest.mark.parametrize(
    ("options", "says"),
    [(["--checkpoint", "nonsense"], "no checkpoint in "), (["--port", "TAKEN"], "Address already in use")],
)
def test_errors_are_one_line(checkpoints, options, says):
    home = Path(checkpoints["knowing"]).parents[1]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        options = [str(taken.getsockname()[1]) if word == "TAKEN" else word for word in options]
        command = [sys.executable, "-m", "nanochat_ray.cli", "serve", *options]
        environment = os.environ | {"NANOCHAT_RAY_HOME": str(home)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 1 and done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ") and says in line


def test_addresses_of_ipv6_have_brackets():
    assert [address(host, 80) for host in ("::1", "localhost")] == ["[::1]:80", "localhost:80"]
    taken = socket.create_server(("::1", 0), family=socket.AF_INET6)
    with taken, pytest.raises(OSError, match=r"cannot listen on \[::1\]:\d+: .* in use"):
        check_port("::1", taken.getsockname()[1])


def test_ports_out_of_range_are_refused():
    with pytest.raises(OSError, match=r"cannot listen on 127\.0\.0\.1:99999"):
        check_port("127.0.0.1", 99999)


def test_more_engines_than_cpus_are_refused(ray_session, checkpoints):
    options = ServiceOptions(checkpoint=checkpoints["knowing"], replicas=3)
    with pytest.raises(ValueError, match=r"3 engines .* need a CPU each; there are 2"):
        start(app(options), 3, "127.0.0.1", 0)


def test_engines_can_wait_for_gpus_that_are_not_there_yet(ray_session, checkpoints):
    for use_gpu in (None, True):
        service = app(ServiceOptions(checkpoint=checkpoints["knowing"], use_gpu=use_gpu))._bound_deployment
        resources = service.init_args[-1]._bound_deployment.ray_actor_options
        assert resources.get("num_gpus", 0) == bool(use_gpu)


def test_two_models_of_one_name_are_refused(checkpoints):
    with pytest.raises(ValueError, match="two checkpoints are named 'knowing'"):
        app(ServiceOptions(checkpoint=[checkpoints["knowing"]] * 2))


def test_keys_that_are_not_hashes_are_refused(checkpoints, tmp_path):
    for content, says in (("secret\n", "not a sha256"), ("\n", "holds no key")):
        (tmp_path / "keys").write_text(content)
        with pytest.raises(ValueError, match=says) as refused:
            app(ServiceOptions(checkpoint=checkpoints["knowing"], api_keys=str(tmp_path / "keys")))
        assert "secret" not in str(refused.value)  # it may be a key, and the message goes to logs
