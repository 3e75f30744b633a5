"""`sft --conversations`: files and data sets of the Hub, their weights, and what is left out of them."""

import gzip
import json
import re
import runpy
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hub import serving, talk, write_hub

from nanochat_ray.data import messages
from nanochat_ray.evals.tasks import MixtureOptions, own, sft_conversations
from nanochat_ray.evals.tasks.rewarded import own_task

pytestmark = pytest.mark.usefixtures("offline")


def asking(i: int) -> dict:
    return {"messages": talk(f"Who are you, {i}?", f"Number {i}.")["messages"]}


def share(i: int) -> dict:
    return {
        "conversations": [{"from": "human", "value": f"Who are you, {i}?"}, {"from": "gpt", "value": f"Number {i}."}]
    }


def alpaca(i: int) -> dict:
    return {"instruction": f"Who are you, {i}?", "input": "", "output": f"Number {i}."}


def lines(values) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def test_each_format_of_each_kind_of_file_gives_the_same(tmp_path, capsys):
    for kind, record in (("OpenAI", asking), ("ShareGPT", share), ("Alpaca", alpaca)):
        records = [record(i) for i in range(5)]
        (tmp_path / "a.jsonl").write_bytes(lines(records))
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(records)))
        (tmp_path / "a.json.zst").write_bytes(zstandard.compress(json.dumps(records, indent=1).encode()))
        pq.write_table(pa.Table.from_pylist([r | {"uuid": "x"} for r in records]), tmp_path / "a.parquet")
        for name in ("a.jsonl", "a.jsonl.gz", "a.json.zst", "a.parquet"):
            assert list(own.conversations(str(tmp_path / name))) == [asking(i) for i in range(5)]
            assert f"{name}: 5 in {kind}'s format\n" in capsys.readouterr().out


def test_bad_lines_are_counted_and_refused_above_a_hundredth(tmp_path, capsys):
    file = tmp_path / "mine.jsonl"
    good = [asking(i) for i in range(396)]
    bad = ['{"messages": []}', "{", json.dumps({"text": "Hi"}), json.dumps(asking(1))[:-3]]
    file.write_text("".join(f"{line}\n" for line in [bad[0], *map(json.dumps, good), *bad[1:]]))
    assert list(own.conversations(str(file))) == good
    (said,) = capsys.readouterr().out.splitlines()
    assert "396 in OpenAI's format; 4 left out: mine.jsonl line 1 has no messages in its column messages; " in said
    assert "mine.jsonl: line 398 is not JSON" in said
    assert said.endswith("mine.jsonl line 399 has no column messages, conversations, or instruction and output; its "
                         "columns: text; …")  # fmt: skip
    file.write_text("".join(f"{line}\n" for line in [bad[0], *map(json.dumps, good[:-1]), *bad[1:]]))
    with pytest.raises(ValueError, match=r"mine.jsonl: 4 of 399 conversations can't be used, more than 1%: .*line 1 "):
        list(own.conversations(str(file)))
    file.write_text("")
    with pytest.raises(ValueError, match="holds no conversations"):
        list(own.conversations(str(file)))


def test_a_weight_is_what_follows_the_last_sign_unless_that_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mine.jsonl", "a=2", "lr=1/b.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(lines([asking(1)]))
    for argument, expected in (
        ("mine.jsonl", ("mine.jsonl", 1)),
        ("mine.jsonl=3", ("mine.jsonl", 3)),
        ("mine.jsonl=0.5", ("mine.jsonl", 0.5)),
        ("lr=1/b.jsonl", ("lr=1/b.jsonl", 1)),
        ("lr=1/b.jsonl=2", ("lr=1/b.jsonl", 2)),
        ("a=2", ("a=2", 1)),
        ("a=2=4", ("a=2", 4)),
        ("*.jsonl=2", ("*.jsonl", 2)),
        ("mixture", ("mixture", 1)),
        ("hub:me/mine:main:train=2.5", ("hub:me/mine:main:train", 2.5)),
    ):
        assert own.parse(argument) == expected
    for argument in ("mine.jsonl=0", "mine.jsonl=-1", "mine.jsonl=nan", "mine.jsonl=inf", "mixture=2"):
        with pytest.raises(ValueError, match="a weight is a number above 0"):
            own.parse(argument)
    for argument in ("none.jsonl", "none.jsonl=2", "mine.jsonl=two"):
        with pytest.raises(FileNotFoundError, match="does not exist: name a file that does, or hub:owner/name"):
            own.parse(argument)
    with pytest.raises(ValueError, match="a data set of the Hub is hub:owner/name"):
        own.parse("hub:mine")


def numbers(conversations) -> list[int]:
    return sorted(int(c["messages"][1]["content"].split()[1][:-1]) for c in conversations)


def test_the_guide_does_what_it_says(tmp_path, monkeypatch):
    """Its lines of conversations are read, and its script writes some and rewards right answers alone."""
    monkeypatch.chdir(tmp_path)
    guide = (Path(__file__).parents[2] / "docs" / "own-data.md").read_text()
    (identity,), (script,) = (re.findall(rf"```{kind}\n(.*?)```", guide, re.S) for kind in ("json", "python"))
    (tmp_path / "me.jsonl").write_text(identity)
    assert len(list(own.conversations("me.jsonl"))) == 4
    for line in re.findall(r"`(\{.*\})` \|", guide):
        assert len(messages.read(json.loads(line))[1]["messages"]) == 2
    (tmp_path / "letters.py").write_text(script.replace("6000", "50"))
    runpy.run_path("letters.py", run_name="__main__")
    assert [len(list(own.conversations(f"{name}.jsonl"))) for name in ("spell", "count")] == [50, 50]
    task = own_task("letters.py:Counting")
    assert [task.reward(c, c["messages"][1]["content"]) for c in task.val] == [1.0] * 400
    answer = re.search(r"`(The letters of strawberry: .*)`", guide)[1]
    asked = sys.modules["own_task"].count("strawberry", "r")
    assert [task.reward(asked, text) for text in (answer, answer.replace("r 1", "r"), "So 3.")] == [1.0, 0.0, 0.0]


def test_weights_say_how_often_and_every_twentieth_is_held_out(tmp_path):
    for name, begin, end in (("a", 0, 40), ("b", 100, 142)):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(asking(i) for i in range(begin, end)))
    options = MixtureOptions(conversations=[f"{tmp_path}/a.jsonl=2.5", f"{tmp_path}/b.jsonl=0.25"])
    splits = sft_conversations(options)
    assert numbers(splits["val"]) == [1, 21, 101, 121, 141]
    learned = numbers(splits["train"])
    of_a = [i for i in range(40) if i not in (1, 21)]
    counts = [learned.count(i) for i in of_a]
    assert (set(counts), sum(counts)) == ({2, 3}, 2 * 38 + 19)
    of_b = [i for i in learned if i >= 100]
    assert len(of_b) == len(set(of_b)) == round(39 / 4)
    assert not {101, 121, 141} & set(of_b)
    assert numbers(splits["train"][:50])[-1] >= 100  # mixed
    assert list(splits["train"]) == list(sft_conversations(options)["train"])


def test_they_are_added_to_the_mixture_where_that_is_named(hub, tmp_path):
    file = tmp_path / "identity.jsonl"
    file.write_bytes(lines([asking(1), asking(2)]))
    few = MixtureOptions(datasets_dir=hub, max_rows=5)
    alone = sft_conversations(few)
    both = sft_conversations(MixtureOptions(datasets_dir=hub, max_rows=5, conversations=["mixture", f"{file}=2"]))
    assert [both["train"].count(asking(i)) for i in (1, 2)] == [2, 2]
    assert len(both["train"]) == len(alone["train"]) + 4
    assert list(both["val"]) == list(alone["val"])


def test_a_data_set_of_the_hub_by_name(tmp_path, capsys):
    folder = write_hub(
        tmp_path,
        {
            ("me/mine", "main", "train"): [asking(i) for i in range(3)],
            ("me/mine", "other", "train_sft"): [share(i) for i in range(4)],
        },
    )
    assert list(own.conversations("hub:me/mine:main", folder)) == [asking(i) for i in range(3)]
    assert "hub:me/mine:main: 3 in OpenAI's format" in capsys.readouterr().out
    assert len(list(own.conversations("hub:me/mine:other:train_sft", folder))) == 4
    for source, said in (
        ("hub:me/yours", "me/yours is not in"),
        ("hub:me/mine", "Config name is missing.*'main', 'other'"),
        ("hub:me/mine:third", "me/mine third train: .*'third' not found.*'main', 'other'"),
        ("hub:me/mine:other", "me/mine other train: Unknown split .*train_sft"),
    ):
        with pytest.raises(OSError, match=said) as raised:
            list(own.conversations(source, folder))
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("gated", "said"),
    [
        ("me/mine", "me/mine train: .*gated.*accept its terms on the Hub and set HF_TOKEN"),
        (None, "me/yours train: the Hub has no data set of this name"),
    ],
)
def test_what_the_hub_does_not_give_is_one_line(tmp_path, monkeypatch, gated, said):
    """Of a Hub that HF_ENDPOINT names."""
    import datasets
    from huggingface_hub import constants

    write_hub(tmp_path / "hub", {("me/mine", "main", "train"): [asking(1)]})
    with serving(tmp_path / "hub") as played:
        played.gated = {gated}
        for offline in (datasets.config, constants):
            monkeypatch.setattr(offline, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", played.url)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "ENDPOINT", played.url)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", played.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        if gated is None:
            assert list(own.conversations("hub:me/mine")) == [asking(1)]
        with pytest.raises(OSError, match=said) as raised:
            list(own.conversations(f"hub:{gated or 'me/yours'}"))
    assert "\n" not in str(raised.value)
