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
    [
        (["--checkpoint", "nonsense"], "no checkpoint in "),
        (["--checkpoint", "MODEL", "MODEL"], "two checkpoints are named 'knowing'"),
        (["--checkpoint", "MODEL", "--api-keys", "nowhere.txt"], "nowhere.txt"),
        (["--checkpoint", "MODEL", "--port", "TAKEN"], "Address already in use"),
        (["--checkpoint", "MODEL", "--port", "99999"], "cannot listen on 127.0.0.1:99999"),
    ],
)
def test_errors_are_one_line(checkpoints, options, says):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        words = {"MODEL": checkpoints["knowing"], "TAKEN": str(taken.getsockname()[1])}
        command = [sys.executable, "-m", "nanochat_ray.cli", "serve", *(words.get(word, word) for word in options)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=120)
    assert done.returncode == 1 and done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ") and says in line


def test_keys_that_are_not_hashes_are_refused(checkpoints, tmp_path):
    for content, says in (("secret\n", "not a sha256"), ("\n", "holds no key")):
        (tmp_path / "keys").write_text(content)
        with pytest.raises(ValueError, match=says):
            app(ServiceOptions(checkpoint=checkpoints["knowing"], api_keys=str(tmp_path / "keys")))
