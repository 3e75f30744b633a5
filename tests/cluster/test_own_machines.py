"""cluster/local.yaml: `ray up` from a laptop over ssh to two machines, a job, and `ray down`."""

import pydoc_data.topics
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hosts import REPOSITORY, Cluster, Host

from nanochat_ray.train.metrics import read_metrics

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("/usr/sbin/sshd", "rsync"))),
    reason="no sshd or rsync: apt-get install openssh-server rsync",
)
SSHD = """
ListenAddress {host.address}
HostKey {key}
AuthorizedKeysFile {key}.pub
PidFile none
UsePAM no
StrictModes no
PermitRootLogin prohibit-password
"""


class Machines(Cluster):
    """Hosts that answer ssh, with a HOME of their own. The first is the laptop, which has the key."""

    def join(self, host: Host) -> None:
        key = self.shared / "id_ed25519"
        if host is self.head:
            del self.env["RAY_ADDRESS"], self.env["RAY_AUTH_TOKEN"], self.env["RAY_AUTH_MODE"]
            host.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
            self.config = self.write_config(str(key))
            return
        config = self.shared / f"sshd-{host.name}"
        config.write_text(SSHD.format(host=host, key=key))
        passwd = self.shared / f"passwd-{host.name}"
        passwd.write_text(Path("/etc/passwd").read_text().replace(":/root:", f":{host.root}/home:"))
        host.run("mount", "--bind", str(passwd), "/etc/passwd")
        venv = host.root / "home" / "nanochat-ray" / ".venv"
        venv.parent.mkdir()
        venv.symlink_to(sys.prefix)
        host.popen("/usr/sbin/sshd", "-D", "-f", str(config), stderr=subprocess.DEVNULL)

    def write_config(self, key: str) -> str:
        """The repository's, with what a user puts there. The environment is this one's."""
        config = yaml.safe_load((REPOSITORY / "cluster" / "local.yaml").read_text())
        head, *workers = (host.address for host in self.hosts[1:])
        config["provider"] |= {"head_ip": head, "worker_ips": workers}
        config["auth"] = {"ssh_user": "root", "ssh_private_key": key}
        owner_alone, make, environment, bashrc = config["setup_commands"]
        assert "make .venv/ready" in make
        home = f"{self.env['NANOCHAT_RAY_HOME']} PYTHONPATH=~/nanochat-ray"  # `ray up` copied this, and nothing else
        config["setup_commands"] = [owner_alone, environment.replace("/shared/nanochat", home), bashrc]
        for name in ("head_start_ray_commands", "worker_start_ray_commands"):
            stop, start = config[name]
            config[name] = [stop, f"{start} --num-cpus=1"]
        path = self.shared / "local.yaml"
        path.write_text(yaml.safe_dump(config))
        return str(path)

    def ray(self, command: str, *arguments: str) -> str:
        where = ["env", f"--chdir={REPOSITORY}", "ray", command]
        return self.head.run(*where, self.config, *arguments, env=self.env, timeout=300)


@pytest.fixture(scope="module")
def cluster():
    with Machines(3) as cluster:
        yield cluster


def raylets(cluster: Machines) -> int:
    return sum(len(host.processes("raylet/raylet")) for host in cluster.hosts)


def assert_token_is_hidden(cluster: Machines, said: str):
    """In no command line, in no log of Ray, and readable by its owner alone."""
    for host in cluster.hosts[1:]:
        path = host.root / "home" / ".ray" / "auth_token"
        token = path.read_text().strip()
        assert len(token) >= 32 and path.stat().st_mode & 0o077 == 0
        assert token not in said and not host.processes(token)
        logs = [log for log in (host.root / "tmp" / "ray").glob("session_2*/logs/**/*") if log.is_file()]
        assert logs and not [log for log in logs if token.encode() in log.read_bytes()]


def test_a_cluster_comes_trains_and_goes(cluster, golden):
    text = cluster.shared / "text"
    text.mkdir()
    (text / "topics.txt").write_text("\n\n".join(topic for _, topic in sorted(pydoc_data.topics.topics.items())))
    began = time.monotonic()
    cluster.ray("up", "--yes")
    print(f"up after {time.monotonic() - began:.0f} s")
    with pytest.raises(RuntimeError, match=r"[Aa]uthentication|401"):
        cluster.hosts[1].run("ray", "job", "list", env=cluster.env | {"HOME": str(cluster.shared)})
    assert "ok       home " in cluster.ray("exec", "nanochat-ray doctor --address auto")
    options = f"--source {text} --depth 1 --minutes 0.05 --workers 2 --skip sft --run tiny"
    said = cluster.ray("exec", f"ray job submit -- python -m experiments.speedrun {options}")
    print(f"trained after {time.monotonic() - began:.0f} s")
    assert "report    " in said, said[-3000:]
    lines = read_metrics(str(cluster.shared / "home" / "runs" / "tiny"))
    assert {line["train/world_size"] for line in lines if "train/world_size" in line} == {2}
    assert_token_is_hidden(cluster, said)
    cluster.ray("down", "--yes")
    while raylets(cluster):
        assert time.monotonic() - began < 400
        time.sleep(0.5)
    print(f"down after {time.monotonic() - began:.0f} s")
