"""Tasks to train on by rewards."""

import pickle
import subprocess
import sys

import pytest
import ray.cloudpickle

from nanochat_ray.evals.tasks.rewarded import TaskOptions, load_task

OWN = """
class Short:
    train = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}]
    val = train

    def reward(self, conversation, answer):
        return float(len(answer) < 10)
"""


@pytest.mark.parametrize("name", ["arithmetic", "spelling", "counting"])
def test_questions_of_training_are_not_held_out_and_references_are_right(name):
    task = load_task(TaskOptions(task=name))
    train, val = ({c["messages"][0]["content"] for c in part} for part in (task.train, task.val))
    assert len(task.train) == 1600 and len(task.val) == 400 and not train & val
    for conversation in task.val[:50]:
        answer = conversation["messages"][-1]["content"]
        assert isinstance(answer, list) == (name != "spelling")
        text = answer if isinstance(answer, str) else answer[-1]["text"]
        assert task.reward(conversation, text) == 1.0 and task.reward(conversation, "I don't know") == 0.0


def test_gsm8k_is_read_from_a_folder(hub, offline):
    task = load_task(TaskOptions(task="gsm8k", datasets_dir=hub))
    assert task.train and task.val
    assert task.reward(task.val[0], task.val[0]["messages"][-1]["content"][-1]["text"]) == 1.0


def test_a_task_of_ones_own_travels_without_its_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    sent = ray.cloudpickle.dumps(load_task(TaskOptions(task=f"{path}:Short")))
    path.unlink()
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer).reward({}, 'Hello'))"
    told = subprocess.run([sys.executable, "-c", code], input=sent, capture_output=True, timeout=60, check=True)
    assert told.stdout.strip() == b"1.0"
    assert pickle.loads(sent).val


def test_mistakes_are_one_line(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("class Half:\n    train = val = [1]\n")
    (tmp_path / "mine.txt").write_text("")
    for name, error, why in (
        ("chess", ValueError, "no task 'chess'; there are letters, arithmetic, .*FILE.py:CLASS"),
        (f"{tmp_path}/none.py:Task", FileNotFoundError, "no file .*none.py"),
        (f"{tmp_path}/mine.txt:Task", ValueError, "mine.txt does not end in .py"),
        (f"{path}:Half", ValueError, "is no task: ValueError: it has no reward"),
        (f"{path}:None", ValueError, "is no task: AttributeError"),
    ):
        with pytest.raises(error, match=why):
            load_task(TaskOptions(task=name))
