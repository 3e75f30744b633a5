"""One process at a time writes into a run's folder."""

import json
import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest

from nanochat_ray.train import lease


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A job of Ray that is not asked for, and seconds in place of many."""
    monkeypatch.setattr(lease, "job", lambda: {"session": "one", "job": "01"})
    monkeypatch.setattr(lease.ray._private.state, "jobs", lambda: [{"JobID": "02", "IsDead": True}])
    monkeypatch.setattr(lease, "SILENT_SECONDS", 1.5)
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.05)


def write_holder(folder: Path, **changes) -> None:
    holder = {"token": "x", "since": "then", "session": "other", "job": "01"} | lease.process(os.getpid()) | changes
    (folder / "holder.json").write_text(json.dumps(holder))


def test_the_second_says_who_holds_the_run_and_a_released_one_is_free(tmp_path):
    folder = str(tmp_path)
    with lease.hold(folder):
        with lease.hold(folder):  # a stage of the same job
            pass
        refused = []

        def second():
            try:
                with lease.hold(folder):
                    pass
            except ValueError as error:
                refused.append(str(error))

        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        assert refused[0].startswith(
            f"{folder} is held by process {os.getpid()} on {lease.socket.gethostname()} since 2"
        )
    assert not list(tmp_path.iterdir())
    with lease.hold(folder):
        pass


def test_a_holder_that_died_does_not_block(tmp_path, capsys):
    """On this host its process is gone, on this cluster its job; elsewhere its file stays as it is."""
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=[0])
    process.start()
    write_holder(tmp_path, **lease.process(process.pid))
    process.join()
    began = time.monotonic()
    with lease.hold(str(tmp_path)):
        pass
    write_holder(tmp_path, where=None, session="one", job="02")
    with lease.hold(str(tmp_path)):
        assert time.monotonic() - began < 1
    write_holder(tmp_path, began="1")  # another process has its pid
    with lease.hold(str(tmp_path)):
        assert time.monotonic() - began < 1
    assert "sign of life" not in capsys.readouterr().out
    write_holder(tmp_path, where=None, host="elsewhere")
    with lease.hold(str(tmp_path)):
        assert 1.5 < time.monotonic() - began < 5
    assert capsys.readouterr().out.count("waiting at most 2 s for a sign of life: ") == 1


def test_a_holder_elsewhere_that_gives_signs_of_life_is_left_alone(tmp_path):
    write_holder(tmp_path, where=None, host="elsewhere", pid=7)
    beat = threading.Timer(0.3, os.utime, [tmp_path / "holder.json"])
    beat.start()
    with pytest.raises(ValueError, match="held by process 7 on elsewhere since then"), lease.hold(str(tmp_path)):
        pass
    beat.join()


def test_of_two_that_start_at_the_same_moment_one_goes_on(tmp_path, monkeypatch):
    with lease.hold(str(tmp_path)) as first:
        first.beat()
        first.check()
        write_holder(tmp_path)  # of one that looked before the first had written
        first.beat()
        with pytest.raises(ValueError, match="is held by process"):
            first.check()
    assert (tmp_path / "holder.json").exists()


def test_a_folder_that_is_deleted_is_held_again(tmp_path):
    with lease.hold(str(tmp_path / "run")) as held:
        (tmp_path / "run" / "holder.json").unlink()
        held.beat()
        assert json.loads((tmp_path / "run" / "holder.json").read_text())["token"] == held.me["token"]
