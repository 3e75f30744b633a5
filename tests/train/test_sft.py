from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import pytest

from nanochat_ray import storage
from nanochat_ray.data.conversations import Conversations, prepare_conversations, split_into_shards
from nanochat_ray.data.loader import Rows
from nanochat_ray.data.packing import pack_conversations
from nanochat_ray.data.tokenizer import Tokenizer
from nanochat_ray.evals.tasks import arithmetic, spelling
from nanochat_ray.train.sft import batch_size


@pytest.fixture
def tokenizer(golden):
    return Tokenizer.load(str(golden / "nanochat_d2"))


@pytest.mark.slow
def test_no_token_of_a_conversation_is_lost_and_only_the_assistants_are_learned(ray_session, tokenizer):
    """Among them long ones, which take many rows."""

    def talk(text: str, turns: int) -> dict:
        return {"messages": [{"role": role, "content": text} for _ in range(turns) for role in ("user", "assistant")]}

    long = [talk("one more word " * 9, 20), talk("ö" * 400, 1), talk("def f(x): return x\n" * 30, 3)]
    splits = {"train": Conversations(arithmetic.conversations("train", 50) + long)}
    splits["val"] = Conversations(spelling.conversations("val", 10))
    folder = prepare_conversations(splits, tokenizer, 128)
    manifest = storage.read_json(storage.join(folder, "manifest.json"))
    for split, conversations in splits.items():
        rendered = [tokenizer.render_conversation(c, max_tokens=None) for c in conversations]
        rows = Rows(storage.join(folder, split))
        tokens, mask = rows[range(len(rows))].ravel(), rows.mask(range(len(rows))).ravel()
        learned = sorted(t for ids, flags in rendered for t, flag in zip(ids, flags, strict=True) if flag)
        _, targets = rows.batch(range(len(rows)))
        assert sorted(targets[targets >= 0].tolist()) == learned  # no row's first token is among them
        starts = np.flatnonzero(np.append(tokens, tokenizer.bos_id) == tokenizer.bos_id)
        # What is between two bos is a conversation, or in order a part of one that is longer than a row.
        pieces = [list(zip(tokens[a + 1 : b], mask[a + 1 : b], strict=True)) for a, b in pairwise(starts)]
        for ids, flags in rendered:
            left = list(zip(ids, flags, strict=True))[1:]
            while left:
                piece = next(p for p in pieces if p and p == left[: len(p)] and (len(p) in (128, len(left))))
                pieces.remove(piece)
                left = left[len(piece) :]
        assert not any(pieces)
        assert manifest[split] == {
            "conversations": len(conversations),
            "rows": len(rows),
            "tokens": sum(len(ids) for ids, _ in rendered),
            "dropped_tokens": 0,
            "learned_tokens": len(learned),
            "split_conversations": 3 if split == "train" else 0,
        }


@pytest.mark.slow
def test_the_same_conversations_are_packed_once(ray_session, tokenizer):
    splits = {split: Conversations(arithmetic.conversations(split, 5)) for split in ("train", "val")}
    folder = prepare_conversations(splits, tokenizer, 128)
    assert prepare_conversations(splits, tokenizer, 128) == folder
    assert prepare_conversations(splits, tokenizer, 256) != folder
    with pytest.raises(ValueError, match="no val conversations"):
        prepare_conversations({"train": splits["train"], "val": Conversations()}, tokenizer, 128)
    with pytest.raises(ValueError, match=r"^conversation: message 0 has role 'robot', expected 'user'$"):
        prepare_conversations(splits | {"train": Conversations([{"messages": [{"role": "robot"}]}])}, tokenizer, 128)


@pytest.mark.slow
def test_rows_are_the_rendered_conversations_packed_in_order(ray_session, tokenizer):
    """One after the other in lists, without tasks, and with those that come several times rendered each time."""
    talk = {"messages": [{"role": r, "content": "half \ud800 a pair, " * 30} for r in ("system", "user", "assistant")]}
    few, once = arithmetic.conversations("train", 20), spelling.conversations("train", 30)
    splits = {"train": Conversations([talk, *once]), "val": Conversations([*few[:3], talk])}
    splits["train"].add(few, times=3)
    splits["train"].shuffle(Random(1))
    folder = prepare_conversations(splits, tokenizer, 64)
    for split, conversations in splits.items():
        pieces = []
        for conversation in conversations:
            ids, mask = tokenizer.render_conversation(conversation, max_tokens=None)
            pieces.append((ids[:65], mask[:65]))
            starts = range(65, len(ids), 64)
            pieces += [([ids[0], *ids[i : i + 64]], [0, *mask[i : i + 64]]) for i in starts]
        tokens, mask = pack_conversations([(np.array(i), np.array(m, np.uint8)) for i, m in pieces], 65)
        rows = Rows(storage.join(folder, split))
        assert rows.tokens[0].dtype == np.uint16
        assert (rows.tokens[0] == tokens).all()
        assert (rows.masks[0] == mask).all()


@pytest.fixture
def sharded(tokenizer, monkeypatch) -> dict[str, Conversations]:
    """Of some 20 shards, with conversations that come several times."""
    monkeypatch.setattr("nanochat_ray.data.conversations.SHARD_BYTES", 4096)
    splits = {"train": Conversations(spelling.conversations("train", 300)), "val": Conversations()}
    splits["train"].add(arithmetic.conversations("train", 40), times=2.5)
    splits["val"].add(arithmetic.conversations("val", 5))
    splits["train"].shuffle(Random(1))
    return splits


def contents(folder: str) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.slow
def test_shards_hold_each_conversation_as_often_as_it_comes(ray_session, tokenizer, sharded):
    parts = split_into_shards(sharded["train"])
    assert len(parts) > 15
    assert sorted(np.concatenate(parts)) == sorted(sharded["train"].order)
    assert not any(set(a) & set(b) for a, b in pairwise(parts))
    folder = prepare_conversations(sharded, tokenizer, 64)
    rows = Rows(storage.join(folder, "train"))
    assert len(rows.tokens) == len(parts)
    rendered = [tokenizer.render_conversation(c, max_tokens=None) for c in sharded["train"]]
    counts = storage.read_json(storage.join(folder, "manifest.json"))["train"]
    assert (counts["conversations"], counts["rows"], counts["dropped_tokens"]) == (300 + 100, len(rows), 0)
    assert counts["tokens"] == sum(len(ids) for ids, _ in rendered)
    assert counts["learned_tokens"] == sum(sum(mask) for _, mask in rendered) == rows.mask(range(len(rows))).sum()


@pytest.mark.slow
def test_a_preparation_that_was_killed_does_the_missing_shards_alone(ray_session, tokenizer, sharded, capsys):
    folder = Path(prepare_conversations(sharded, tokenizer, 64))
    made, number = contents(folder), len(split_into_shards(sharded["train"]))
    (folder / "manifest.json").unlink()
    (folder / "train" / "rows_00003.json").unlink()  # its rows are there, perhaps not whole
    (folder / "train" / "rows_00003.arrow").write_bytes(b"half")
    for name in ("rows_00007.json", "rows_00007.arrow"):
        (folder / "train" / name).unlink()
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.arrow")}
    capsys.readouterr()
    assert prepare_conversations(sharded, tokenizer, 64) == str(folder)
    assert f"train {number - 2} of {number} shards are finished already\n" in capsys.readouterr().out
    assert contents(folder) == made
    done = {path.name for path in folder.rglob("*.arrow") if times.get(path) != path.stat().st_mtime_ns}
    assert done == {"rows_00003.arrow", "rows_00007.arrow"}


@pytest.mark.slow
def test_rows_do_not_depend_on_the_number_of_cpus(ray_session, tokenizer, sharded, monkeypatch, tmp_path):
    made = []
    for cpus in (1, 2, 64):
        monkeypatch.setenv("NANOCHAT_RAY_HOME", str(tmp_path / str(cpus)))
        monkeypatch.setattr("ray.cluster_resources", lambda cpus=cpus: {"CPU": cpus})
        made.append(contents(prepare_conversations(sharded, tokenizer, 64)))
    assert made[0] == made[1] == made[2]


def test_the_batch_is_a_share_of_the_data():
    assert batch_size(1_048_576, 300_000_000, 2048) == 1_048_576  # of the Hub's mixture
    assert batch_size(1_048_576, 550_912, 2048) == 16_384  # 33 steps of the offline one
    assert batch_size(1_048_576, 3 * 2048, 2048) == 2048  # one row at least
