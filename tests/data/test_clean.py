"""Rules that drop documents, near duplicates, and the job that applies them to a source."""

import json
import random
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from nanochat_ray import storage
from nanochat_ray.data import clean, cleaning, prepare, sources
from nanochat_ray.data.prepare import PrepareOptions

VOCABULARY = [f"{a}{b}" for a in ("al", "be", "cor", "du", "es", "far") for b in ("ing", "ous", "et", "ra", "lo", "um")]


def prose(seed: int, num_words: int = 120) -> str:
    """Sentences that all rules leave."""
    draw = random.Random(seed)
    words = [draw.choice([*VOCABULARY, "the", "of", "and"]) + str(draw.randrange(50)) * (draw.random() < 0.3)
             for _ in range(num_words)]  # fmt: skip
    sentences = [" ".join(["The", *words[i : i + 10], "of", "it"]) + "." for i in range(0, num_words, 10)]
    return "\n".join(" ".join(sentences[i : i + 3]) for i in range(0, len(sentences), 3))


def changed(text: str, share: float, seed: int) -> str:
    """With that share of its words replaced, in runs, as near duplicates on the web differ."""
    draw, words = random.Random(seed), text.split(" ")
    at, count = draw.randrange(len(words)), max(1, round(share * len(words)))
    return " ".join("other" + str(draw.randrange(10**6)) if 0 <= i - at < count else w for i, w in enumerate(words))


@pytest.mark.parametrize(
    ("rule", "text", "why"),
    [
        ("gopher", prose(1, 30), "fewer than 50 words"),
        ("gopher", prose(1) + " Z" * 300, "on average"),
        ("gopher", prose(1) + " #" * 40, "# or …"),
        ("gopher", "\n".join(f"- {line}" for line in prose(1).splitlines()), "begin with a bullet"),
        ("gopher", prose(1).replace(".\n", "...\n"), "end with …"),
        ("gopher", prose(1) + " 123" * 60, "have a letter"),
        ("gopher", " ".join(random.Random(1).choices(VOCABULARY, k=100)), "fewer than two of"),
        ("repetition", prose(1) + "\n" + "\n".join(prose(1).splitlines()[:3]), "lines came before"),
        ("repetition", prose(1) + " spam eggs" * 40, "most frequent 2 words"),
        ("repetition", prose(1) + " " + " ".join(prose(1).split()[:40]), "repeated"),
        ("c4", prose(1) + " Lorem ipsum dolor.", "lorem ipsum"),
        ("c4", prose(1) + " {", "curly"),
        ("c4", "One. Two. Three.", "fewer than 5 sentences"),
        ("fineweb", prose(1).replace(".", ""), "end a sentence"),
        ("fineweb", prose(1).replace(" ", ".\n"), "fewer than 30"),
    ],
)
def test_what_a_rule_drops(rule, text, why):
    good = prose(7)
    assert clean.RULES[rule]([good, text, good])[::2] == [None, None]
    assert why in clean.RULES[rule]([good, text, good])[1]


def test_all_rules_read_what_python_finds_hard():
    texts = ["", "\n\n", "\ud800 half a surrogate pair", "这是一个没有空格的句子。" * 20, "a" * 100_000, "one"]
    for rule in clean.RULES.values():
        assert len(rule(texts)) == len(texts)
    assert clean.bands(texts).shape == (len(texts), clean.BANDS)
    assert clean.contaminated(texts, clean.ngrams_of_tests([prose(1)])).tolist() == [False] * len(texts)


def test_words_are_those_of_any_script_in_lower_case():
    texts = ["Größe, ÄRGER!", "größe ärger", "हिन्दी भाषा", "x2 y", "", "größe"]
    words = clean.words(texts)
    assert np.diff(words.ends, prepend=0).tolist() == [2, 2, 2, 2, 0, 1]
    assert words.values[:2].tolist() == words.values[2:4].tolist() and words.values[0] == words.values[-1]
    assert len(set(words.values.tolist())) == 6


def shingles(text: str) -> set[tuple[str, ...]]:
    words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
    return set(zip(*(words[i:] for i in range(clean.SHINGLE_WORDS)), strict=False))


def test_the_signature_estimates_jaccards_similarity():
    pairs = [(text, changed(text, share, i)) for i in range(60) for share in (0.02, 0.1, 0.3) for text in [prose(i)]]
    signature = clean.minhash(clean.words([text for pair in pairs for text in pair]).ngrams(clean.SHINGLE_WORDS))
    estimated = (signature[::2] == signature[1::2]).mean(axis=1)
    true = np.array([len(a & b) / len(a | b) for pair in pairs for a, b in [tuple(map(shingles, pair))]])
    assert abs((estimated - true).mean()) < 0.01
    assert (estimated - true).std() == pytest.approx(np.sqrt((true * (1 - true)).mean() / 112), rel=0.2)


def test_planted_near_duplicates_are_found_and_no_others():
    texts = [prose(i) for i in range(1500)]
    planted = {1500 + i: i for i in range(300)}
    texts += [changed(texts[i], 0.05, i) for i in planted.values()]
    again = clean.duplicates([clean.pairs(kind) for kind in clean.bands(texts).T], len(texts))
    found = set(np.flatnonzero(again).tolist())
    assert len(found & planted.keys()) >= 0.98 * len(planted)
    assert len(found & planted.keys()) >= 0.99 * len(found)


def test_duplicates_of_duplicates_are_one_group_of_which_the_first_stays():
    kinds = [np.array(kind, np.uint64) for kind in ([1, 2, 1, 0, 0, 4], [7, 8, 9, 8, 5, 9])]
    again = clean.duplicates([clean.pairs(kind) for kind in kinds], 6)
    assert again.tolist() == [False, False, True, True, False, True]


def test_a_text_that_quotes_a_test_is_found():
    of_tests = clean.ngrams_of_tests([prose(1), "short one"])
    quote = " ".join(prose(1).split()[20:33])
    texts = [prose(2), prose(3) + " " + quote.upper(), prose(4) + " " + " ".join(quote.split()[:-1]), "short one"]
    assert clean.contaminated(texts, of_tests).tolist() == [False, True, False, False]


SENTENCES = {
    "en": "The council met on Tuesday evening to discuss the new bridge over the river, which the town has needed.",
    "de": "Der Stadtrat traf sich am Dienstagabend, um über die neue Brücke zu sprechen, die die Stadt lange braucht.",
    "fr": "Le conseil municipal s'est réuni mardi soir pour parler du nouveau pont dont la ville a besoin.",
    "ru": "Во вторник вечером городской совет обсудил новый мост через реку, который давно нужен городу.",
    "zh": "市议会星期二晚上开会讨论了横跨河流的新桥，这座城市早就需要它。",
}


def test_a_text_in_another_language_is_dropped_with_its_code():
    others = clean.other_language([*SENTENCES.values(), ""], {"en", "zh"})
    assert others[:5] == [None, "is de", "is fr", "is ru", None]
    assert set(SENTENCES) < set(clean.known_languages())


def test_the_job_keeps_the_languages_that_it_is_given(tmp_path):
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in SENTENCES.values()))
    shard = sources.resolve(str(tmp_path)).train[0]  # the first document is for validation
    counts = cleaning.write_kept(shard, str(tmp_path / "out"), ["language"], np.zeros(0, np.uint64), ["de", "ru"])
    assert counts["kept"] == 2 and counts["dropped"] == {"language": {"is fr": 1, "is zh": 1}}


@pytest.fixture
def source(tmp_path) -> sources.Source:
    folder = tmp_path / "text"
    folder.mkdir()
    bad = prose(50) + " {"
    val = [prose(i) for i in range(40, 45)]
    files = [
        [prose(i) for i in range(20)] + [bad],
        [*map(prose, range(20, 40)), prose(3), changed(val[0], 0.03, 1)],
        val,
    ]
    for i, texts in enumerate(files):
        (folder / f"part_{i}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return sources.resolve(str(folder))


@pytest.mark.slow
def test_the_job_leaves_each_document_once_and_says_what_it_dropped(source, ray_session, tmp_path, monkeypatch, capsys):
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "task.jsonl").write_text(json.dumps({"query": prose(5), "choices": ["a", "b"]}) + "\n")
    steps = ["near", "exact", "c4", "decontaminate"]
    made = cleaning.cleaned(source, steps, str(tmp_path / "bundle"))
    train = [text for shard in made.train for text in sources.read_documents(shard)]
    numbers = {prose(i): i for i in range(50)}
    assert [numbers.get(text, text) for text in train] == [
        i for i in range(40) if i != 5
    ]  # not those of validation again, nor of the tests
    assert [text for shard in made.val for text in sources.read_documents(shard)] == [prose(i) for i in range(40, 45)]
    folder = storage.parent(made.train[0].uri)
    manifest = storage.read_json(storage.join(folder, "manifest.json"))
    assert {step: sum(why.values()) for step, why in manifest["dropped"].items()} == {
        "c4": 1, "decontaminate": 1, "duplicates": 2
    }  # fmt: skip
    assert manifest["samples"]["decontaminate"] == [prose(5)[: cleaning.SAMPLE_CHARS]]
    assert (manifest["documents"], manifest["kept"]) == (48, 44)
    assert sorted(name for name in storage.listdir(folder) if name.endswith(".parquet")) == [
        "train_00001.parquet", "train_00002.parquet", "val_00000.parquet"
    ]  # fmt: skip
    assert not storage.exists(storage.join(folder, "first"))
    assert "clean: text: c4 dropped 1\nclean:   1 a curly bracket\n" in capsys.readouterr().out
    monkeypatch.setattr(cleaning, "_run", None)  # a second time there is nothing to do
    assert cleaning.cleaned(source, steps, str(tmp_path / "bundle")) == made


@pytest.mark.slow
def test_prepare_makes_rows_of_what_is_left(source, ray_session, golden, tmp_path):
    options = PrepareOptions([str(tmp_path / "text")], sequence_len=64, tokenizer=str(golden / "nanochat_d2"))
    whole, left = (prepare.run(replace(options, clean=steps)).manifest for steps in ([], ["near", "c4"]))
    assert (whole["source"], left["source"]) == ("text", "text-clean")
    documents = [manifest["splits"]["train"]["documents"] for manifest in (whole, left)]
    assert documents == [43, 40]


def test_a_shard_of_which_nothing_is_left_has_signatures_too(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "{"}) + "\n")
    (tmp_path / "b.jsonl").write_text("\n")
    uris = [str(tmp_path / f"{name}.parquet") for name in "ab"]
    for name, uri in zip("ab", uris, strict=True):
        shard = sources.Shard(str(tmp_path / f"{name}.jsonl"), "text")
        assert cleaning.write_kept(shard, uri, ["c4", "exact", "near"], np.zeros(0, np.uint64))["kept"] == 0
    for uri in uris:
        assert np.load(f"{uri}.exact.npy").shape == (0, 1) and np.load(f"{uri}.near.npy").shape == (0, clean.BANDS)
        assert cleaning.write_without(uri, f"{uri}.out", np.packbits(np.zeros(0, bool)))["kept"] == 0


@pytest.mark.slow
def test_a_file_that_can_not_be_read_is_named(source, ray_session, tmp_path):
    (tmp_path / "text" / "part_1.jsonl").write_text("no json\n")
    with pytest.raises(ValueError, match=r"part_1\.jsonl.*1 of 3 files can't be read"):
        cleaning.cleaned(source, ["c4"])


def test_a_shard_that_is_written_is_not_done_again(source, tmp_path, monkeypatch):
    uri = str(tmp_path / "kept.parquet")
    counts = cleaning.write_kept(source.train[0], uri, ["c4", "exact"], np.zeros(0, np.uint64))
    assert pq.read_table(uri).column("text").to_pylist() == [prose(i) for i in range(20)]
    monkeypatch.setattr(sources, "read_documents", None)
    assert cleaning.write_kept(source.train[0], uri, ["c4", "exact"], np.zeros(0, np.uint64)) == json.loads(
        json.dumps(counts)
    )


def test_what_can_not_be_is_one_line(source, tmp_path):
    with pytest.raises(ValueError, match="--clean has no step 'gofer'; there are gopher, repetition"):
        cleaning.cleaned(source, ["gofer"])
    with pytest.raises(ValueError, match="name both or neither"):
        cleaning.cleaned(source, ["decontaminate"])
    with pytest.raises(ValueError, match="--clean language needs --languages"):
        cleaning.cleaned(source, ["language"])
    with pytest.raises(ValueError, match=r"--languages: 'english' is not known; there are .*, en, "):
        cleaning.cleaned(source, ["language"], languages=["de", "english"])
    (tmp_path / "bundle").mkdir()
    with pytest.raises(FileNotFoundError, match="has no jsonl files"):
        cleaning.cleaned(source, ["decontaminate"], str(tmp_path / "bundle"))
