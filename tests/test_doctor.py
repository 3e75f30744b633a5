"""The doctor on one host, and what it says of findings that this machine can't show."""

import os
import sys

import pytest

from nanochat_ray import doctor, versions


def test_this_machine_is_checked(ray_session, capsys, nanochat_ray_home):
    assert doctor.run(doctor.DoctorOptions())
    shown = capsys.readouterr().out
    for check in ("versions", "GPUs", "memory", "/dev/shm", "disk", "open files", "clock", "home"):
        assert f" {check} " in shown, check
    assert f"Python {sys.version.split()[0]}" in shown and "FAIL" not in shown and "network" not in shown
    assert not (nanochat_ray_home / "doctor").exists()


def test_a_home_that_cannot_be_written_fails(ray_session, capsys, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NANOCHAT_RAY_HOME", str(tmp_path / "file" / "home"))
    assert not doctor.run(doctor.DoctorOptions())
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert "file/home can't be written" in line and "NANOCHAT_RAY_HOME" in line


def test_other_versions_are_named_with_their_hosts():
    same = {"Python": "3.11.7", "ray": "2.60.0", "torch": "2.13.0", "nanochat_ray": "1a2b3c4d"}
    hosts = {f"h{i}": same for i in range(8)}
    assert versions.differences(hosts) == []
    lines = versions.differences(hosts | {"odd": same | {"torch": "2.12.1"}})
    assert lines == ["torch: 2.13.0 on h0, h1, h2, h3, h4 and 3 more; 2.12.1 on odd"]


H100 = "NVIDIA H100, 81559 MiB, driver 580.1"


@pytest.mark.parametrize(
    ("gpus", "known", "level", "named"),
    [
        ({"names": [H100] * 8, "usable": 8, "peers": True, "error": ""}, 8, "ok", "8 × NVIDIA H100"),
        ({"names": [H100] * 8, "usable": 0, "peers": True, "error": "driver too old"}, 8, "FAIL", "driver too old"),
        ({"names": [H100] * 8, "usable": 8, "peers": True, "error": ""}, 0, "warning", "Ray knows of 0"),
        ({"names": [H100] * 2, "usable": 2, "peers": False, "error": ""}, 2, "warning", "peer access"),
        ({"names": [], "usable": 0, "error": ""}, 8, "FAIL", "not found"),
        ({"names": [], "usable": 0, "peers": True, "error": ""}, 0, "ok", "none"),
    ],
)
def test_gpus(gpus, known, level, named):
    (finding,) = doctor.check_gpus(gpus, known)
    assert finding.level == level and named in finding.text
    assert bool(finding.remedy) == (level != "ok")


def test_nvidia_smi_and_torch_are_asked(tmp_path, monkeypatch):
    """With a tool in nvidia-smi's place, and this machine's torch, which has no CUDA."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '{H100.replace('driver ', '').replace(' MiB', '')}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = doctor.gpus()
    assert found["names"] == [H100] and found["peers"]
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    assert doctor.gpus() == doctor.NO_GPUS | {"error": "NVIDIA-SMI has failed"}
