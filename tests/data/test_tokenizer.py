"""Tokenizer: nanochat's ids and masks, round trips, files that can't be trusted, training."""

import inspect
import json
import pickle
import random

import numpy as np
import pytest
import tiktoken
import tiktoken_ext.openai_public

from nanochat_ray.data.tokenizer import PIECE_CHARS, PUBLISHED, SPECIAL_TOKENS, Tokenizer, compression, train


@pytest.fixture(scope="module")
def tokenizer(golden) -> Tokenizer:
    return Tokenizer.load(str(golden / "nanochat_d2"))


@pytest.fixture(scope="module")
def cases(golden) -> dict:
    return json.loads((golden / "nanochat_d2" / "tokenizer_cases.json").read_text())


def words(seed: int, count: int) -> list[str]:
    generator = random.Random(seed)
    lexicon = ["".join(generator.choices("etaoinshrdlu", k=generator.randint(2, 9))) for _ in range(800)]
    return [" ".join(generator.choices(lexicon, k=60)) + f", {generator.randint(0, 9999)}.\n" for _ in range(count)]


def test_encodes_as_nanochat(tokenizer, cases):
    texts = [case["text"] for case in cases["encode"]]
    expected = [case["ids"] for case in cases["encode"]]
    assert [tokenizer.encode(text) for text in texts] == expected
    assert tokenizer.encode_batch(texts, num_threads=1) == tokenizer.encode_batch(texts, num_threads=3) == expected
    assert tokenizer.vocab_size == 4096
    assert [tokenizer.special(token) for token in SPECIAL_TOKENS] == list(range(4087, 4096))


def test_renders_conversations_as_nanochat(tokenizer, cases):
    for case in cases["conversations"]:
        rendered = tokenizer.render_conversation(case["conversation"], max_tokens=case["max_tokens"])
        assert rendered == (case["ids"], case["mask"])


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\r\n\t ",
        "naïve — 日本語 🙂 👩‍👩‍👧 \u200d",
        "\x00\x7f\ufffd\ufeff",
        "a" * 5000,
        "1234567",
        "e\u0301\u0327",
        *SPECIAL_TOKENS,
    ],
)
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert not set(ids) & set(tokenizer.special_tokens.values())  # special tokens in text are plain text


def test_invalid_text_is_replaced_not_raised(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode("🙂")[:-1]) == "\ufffd"


def test_very_long_texts(tokenizer):
    text = "".join(words(0, 3000))
    assert len(text) > 2 * PIECE_CHARS
    encoding = tiktoken.Encoding("whole", pat_str=tokenizer.pattern, mergeable_ranks=tokenizer.ranks, special_tokens={})
    assert tokenizer.encode(text) == encoding.encode_ordinary(text)
    blank = "x" + " " * 2_000_000 + "x"  # overflows the stack of tiktoken's regex engine when encoded whole
    assert tokenizer.decode(tokenizer.encode_batch([blank])[0]) == blank


def test_token_bytes_of_special_tokens_are_zero(tokenizer):
    counts = tokenizer.token_bytes()
    assert counts.dtype == np.int32
    assert counts.shape == (4096,)
    assert not counts[4087:].any()
    assert counts[:4087].all()


def test_survives_pickling(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("Hello there") == tokenizer.encode("Hello there")
    assert copy.sha == tokenizer.sha


def test_train_save_load(tmp_path):
    texts = words(1, 400)
    trained = train(iter(texts), 600)
    trained.save(str(tmp_path / "t"))
    loaded = Tokenizer.load(str(tmp_path / "t"))
    assert trained.vocab_size == loaded.vocab_size == 600
    assert list(loaded.special_tokens) == list(SPECIAL_TOKENS)
    assert loaded.encode_batch(texts) == trained.encode_batch(texts)
    assert [loaded.decode(ids) for ids in loaded.encode_batch(texts)] == texts
    assert sum(map(len, loaded.encode_batch(texts))) < 0.6 * sum(map(len, texts))  # it did learn merges
    assert train(iter(texts), 600).sha == loaded.sha
    # nothing on disk is a pickle: one file of text lines, one of JSON
    assert sorted(path.name for path in (tmp_path / "t").iterdir()) == ["tokenizer.json", "tokenizer.tiktoken"]
    assert len((tmp_path / "t" / "tokenizer.tiktoken").read_text("ascii").splitlines()) == 600 - len(SPECIAL_TOKENS)
    assert json.loads((tmp_path / "t" / "tokenizer.json").read_text())["sha256"] == loaded.sha


def test_train_survives_odd_text():
    trained = train(iter([*words(2, 200), "a\ud800b", " " * 2_000_000, ""]), 400)
    assert trained.vocab_size == 400


def test_train_refuses_impossible_sizes():
    with pytest.raises(ValueError, match="vocab_size 200 is too small"):
        train(iter(["hello"]), 200)
    with pytest.raises(ValueError, match="vocab_size 5000 is too large: this text gives only 269 tokens"):
        train(iter(["hello"]), 5000)


def test_damaged_files(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer in"):
        Tokenizer.load(str(tmp_path))
    tokenizer.save(str(tmp_path))
    path, meta_path = tmp_path / "tokenizer.tiktoken", tmp_path / "tokenizer.json"
    content, meta = path.read_bytes(), json.loads(meta_path.read_text())
    path.write_bytes(content[:-20])
    with pytest.raises(ValueError, match="sha256"):
        Tokenizer.load(str(tmp_path))
    del meta["sha256"]
    meta_path.write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=r"tokenizer: ids are not|expected a base64"):
        Tokenizer.load(str(tmp_path))
    meta_path.write_text("{")
    with pytest.raises(ValueError, match="expected JSON with pattern"):
        Tokenizer.load(str(tmp_path))


USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "no user message"),
        ([{"role": "system", "content": "Be kind."}], "no user message"),
        ([ASSISTANT], "message 0 has role 'assistant', expected 'user'"),
        ([USER, USER], "message 1 has role 'user', expected 'assistant'"),
        ([USER, {"role": "system", "content": "x"}], "message 1 has role 'system'"),
        ([USER, {"role": "assistant", "content": [{"type": "image", "text": "x"}]}], "part of type 'image'"),
        ([{"role": "user", "content": [{"type": "python", "text": "1"}]}], "part of type 'python'"),
        ([USER, {"role": "assistant", "content": None}], "message 1 needs a string"),
        ([USER, {"role": "assistant", "content": [{"type": "text"}]}], "message 1 needs a string"),
        ("Hi", "expected {"),
    ],
)
def test_malformed_conversations(tokenizer, messages, complaint):
    with pytest.raises(ValueError, match=complaint) as caught:
        tokenizer.render_conversation({"messages": messages})
    assert "\n" not in str(caught.value)


def test_render_for_completion(tokenizer):
    system = {"role": "system", "content": "Be brief."}
    messages = [system, USER, ASSISTANT, {"role": "user", "content": "word " * 3000}]
    ids = tokenizer.render_for_completion({"messages": messages})
    whole, _ = tokenizer.render_conversation({"messages": [*messages, ASSISTANT]}, max_tokens=None)
    assert ids == whole[: len(ids)]
    assert ids[-1] == tokenizer.special("<|assistant_start|>")
    assert whole[len(ids) :] == [*tokenizer.encode("Hello"), tokenizer.special("<|assistant_end|>")]
    assert messages[1] == USER == {"role": "user", "content": "Hi"}  # the caller's conversation is not changed
    with pytest.raises(ValueError, match="last message has role 'assistant'"):
        tokenizer.render_for_completion({"messages": [USER, ASSISTANT]})


def test_compression_without_a_cache(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    text = "The quick brown fox — naïve"
    assert compression(tokenizer, [text, text]) == {"ours": len(text.encode()) / len(tokenizer.encode(text))}
    # the names under which tiktoken caches follow from the addresses it downloads from
    published = inspect.getsource(tiktoken_ext.openai_public)
    assert all(f'"{url}"' in published for urls in PUBLISHED.values() for url in urls)
