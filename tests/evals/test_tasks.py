"""The offline tasks: right answers, tool calls the calculator agrees with, splits that share no problem."""

import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_ray.data.tokenizer import train
from nanochat_ray.evals.tasks import arithmetic, offline_mixture, pydocs, spelling
from nanochat_ray.inference.tools import calculate


def question(conversation) -> str:
    return conversation["messages"][0]["content"]


def parts(conversation) -> list[tuple[str, str]]:
    content = conversation["messages"][1]["content"]
    return [("text", content)] if isinstance(content, str) else [(p["type"], p["text"]) for p in content]


@pytest.fixture
def shards(tmp_path):
    """Two shards of 600 docstrings and some that no question may be made of."""
    uris = []
    for shard in range(2):
        rows = [
            {"name": f"pkg.mod{shard}.f{i}", "text": f"Return the {i}th of {shard} things.\n\nMore about it."}
            for i in range(600)
        ]
        for name in ("pkg._core.g", "pkg.g._h", "pkg.tests.g", "pkg.test_g.g", "pkg.TestG.g", "pkg.mod0.f0"):
            rows.insert(300, {"name": name, "text": f"Must not be seen, shard {shard}."})
        uris.append(str(tmp_path / f"shard_{shard}.parquet"))
        pq.write_table(pa.Table.from_pylist(rows), uris[-1])
    return uris


@pytest.mark.parametrize("task", [arithmetic, spelling])
@pytest.mark.parametrize("split", ["train", "val"])
def test_tool_calls_and_judging(task, split):
    calls = 0
    for conversation in task.conversations(split, 400):
        *_, (_, closing) = steps = parts(conversation)
        assert task.judge(conversation, closing)
        assert not task.judge(conversation, "")
        if len(steps) == 1:
            continue
        calls += 1
        assert [kind for kind, _ in steps] == ["text", "python", "python_output", "text"]
        expression, output = steps[1][1], steps[2][1]
        assert output == calculate(expression)
        assert float(output) == eval(expression)
        assert task.judge(conversation, f"In the end that makes {output}")
        assert not task.judge(conversation, f"{closing} No: {float(output) + 1}")
    assert calls > 150


def test_arithmetic_asks_what_it_computes():
    signs = {"+": r"\+|plus|in all|now\?", "-": r"-|−|minus|left|still", "*": r"\*|×|times|each\.|hold"}
    signs["/"] = r"/|÷|divided|equally|packed into"
    conversations = arithmetic.conversations("train", 1000)
    seen = set()
    for conversation in conversations:
        a, operator, b = re.fullmatch(r"(\d+)(\D)(\d+)", parts(conversation)[1][1]).groups()
        seen.add(operator)
        assert re.findall(r"\d+", question(conversation)) == [a, b]
        assert re.search(signs[operator], question(conversation))
        if not re.search(r"What|Calculate|=|much", question(conversation)):  # a story: nothing negative or broken
            assert float(parts(conversation)[2][1]) >= 1
            assert float(parts(conversation)[2][1]).is_integer()
    assert seen == set("+-*/")
    digits = [len(re.search(r"\d+", question(c))[0]) for c in conversations]
    assert {1, 2, 3, 4} <= set(digits)


def test_spelling_spells_and_counts_the_word_it_asks_for():
    for conversation in spelling.conversations("train", 400):
        steps = parts(conversation)
        word, letters = re.fullmatch(r"Spelling '?([a-z]+)'?: ((?:[a-z] )*[a-z])(?:\. )?", steps[0][1]).groups()
        assert letters == " ".join(word)
        if len(steps) == 1:
            assert spelling.judge(conversation, f"It is a word: {'-'.join(word).upper()}.")
            assert not spelling.judge(conversation, " ".join(word[:-1]))
        else:
            space, counted, letter = re.fullmatch(r'"( ?)([a-z]+)"\.count\("([a-z])"\)', steps[1][1]).groups()
            assert counted == word
            assert steps[2][1] == str(sum(c == letter for c in word))
            assert re.search(rf"\b{letter}\b", question(conversation))
            assert (f"'{word}'" in question(conversation)) != bool(space)
        assert re.search(rf"\b{word}\b", question(conversation))
        assert 3 <= len(word) <= 12


def test_a_call_has_the_tokens_that_its_word_has_in_the_question():
    """Then a model can copy them. The tokenizer knows the words with and without a space before."""
    words = [f" {word} '{word}'" for word in spelling.words("val")]
    tokenizer = train(words, 1500)
    for conversation in spelling.conversations("val", 200):
        if len(steps := parts(conversation)) == 1:
            continue
        word = tokenizer.encode(re.match('"([^"]+)"', steps[1][1])[1])
        for text in (question(conversation), steps[0][1], steps[1][1]):
            tokens = tokenizer.encode(text)
            assert word in [tokens[i : i + len(word)] for i in range(len(tokens))], text


def test_splits_share_no_problem(shards):
    def problems(split):
        sums = [parts(c)[1][1] for c in arithmetic.conversations(split, 2000)]
        flipped = [re.sub(r"(\d+)([*+])(\d+)", r"\3\2\1", s) for s in sums]
        names = [re.search("`(.+)`", question(c))[1] for c in pydocs.conversations(shards, split, 2000)]
        return set(sums) | set(flipped) | asked_words(split) | set(names)

    def asked_words(split):
        asked = [re.match(r"Spelling '?(\w+)", parts(c)[0][1])[1] for c in spelling.conversations(split, 2000)]
        return set(asked) | set(spelling.words(split))

    assert not problems("train") & problems("val")
    assert len(spelling.words("train")) > 5000
    assert len(spelling.words("val")) > 250
    assert asked_words("val") == set(spelling.words("val"))  # none is made up
    assert len(asked_words("train") - set(spelling.words("train"))) > 1000


def test_a_conversation_depends_on_seed_and_index_alone():
    for task in (arithmetic, spelling):
        assert task.conversations("val", 40)[:20] == task.conversations("val", 20)
        assert task.conversations("val", 20) != task.conversations("val", 20, seed=1)
        with pytest.raises(ValueError, match="no split 'test'"):
            task.conversations("test", 1)


def test_pydocs_questions(shards):
    train = pydocs.conversations(shards, "train", 10_000)
    val = pydocs.conversations(shards, "val", 10_000)
    assert len(train) + len(val) == 1200
    assert 0.02 < len(val) / 1200 < 0.09
    assert pydocs.conversations(shards, "train", 7) == train[:7]
    assert sorted(map(str, pydocs.conversations(shards[::-1], "val", 10_000))) == sorted(map(str, val))
    assert len({question(c).split("`")[0] for c in train}) > 3
    for conversation in train + val:
        shard, i = re.search(r"`pkg\.mod(\d)\.f(\d+)`", question(conversation)).groups()
        answer = parts(conversation)[0][1]
        assert answer == f"Return the {i}th of {shard} things."
        assert pydocs.judge(conversation, f"return the {i}th of things")
        assert not pydocs.judge(conversation, "Close the file and flush all that is buffered.")


def test_pydocs_names_what_is_wrong_with_a_shard(tmp_path):
    uri = str(tmp_path / "web.parquet")
    pq.write_table(pa.table({"text": ["a page"]}), uri)
    with pytest.raises(ValueError, match=r"web\.parquet has no column name"):
        pydocs.conversations([uri], "train", 1)


@pytest.mark.parametrize(
    ("docstring", "summary"),
    [
        ("Sort the list in place. Stable.", "Sort the list in place."),
        ("Sort keys, e.g. The names\nof people", "Sort keys, e.g. The names of people."),
        ("\n    Map :class:`~a.b.Cls` to ``int``\n\n    More.", "Map `a.b.Cls` to `int`."),
        ("Join the threads\nArgs:\n    timeout: seconds", "Join the threads."),
        ("argsort(a, axis=-1) sorts things", None),
        ("A title of it\n=============\nText.", None),
        ("One of the following things:\n\n- a", None),
        ("Too short.", None),
        ("Too long " * 40, None),
        ("", None),
    ],
)
def test_pydocs_summary(docstring, summary):
    assert pydocs.summary(docstring) == summary


def test_offline_mixture(shards):
    train = list(offline_mixture("train", shards, 200, 120, 80))
    val = list(offline_mixture("val", shards, 200, 120, 80))
    assert (len(train), len(val)) == (400, 20)
    assert train == list(offline_mixture("train", shards, 200, 120, 80))
    for conversation in train + val:
        assert [m["role"] for m in conversation["messages"]] == ["user", "assistant"]
    assert len({"`" in question(c) for c in train[:20]}) == 2  # mixed, not one task after the other
