"""prepare --dry-run: counts of a folder against a count by hand."""

import json
from collections import Counter

import pytest

from nanochat_ray.data import stats
from nanochat_ray.data.prepare import PrepareOptions
from nanochat_ray.data.tokenizer import Tokenizer


def write(path, texts: list[str]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.mark.slow
def test_what_sources_hold(ray_session, tmp_path, golden, capsys, nanochat_ray_home, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")  # of the tables
    short = [f"a note, number {i % 80}, [bold] of mine" for i in range(100)]
    long = [f"page {i} " + "ß" * (20 * i) for i in range(300)]
    write(tmp_path / "notes" / "a.jsonl", [*short, "", "  "])
    write(tmp_path / "pages" / "a.jsonl", long)
    write(tmp_path / "pages" / "b.jsonl", [*long[:30], short[0]])
    notes, pages = str(tmp_path / "notes"), str(tmp_path / "pages")
    options = PrepareOptions([f"{notes}=3", f"{pages}=1"], tokenizer=str(golden / "nanochat_d2"), dry_run=True)
    counted = stats.run(options)
    tokenizer = Tokenizer.load(options.tokenizer)
    for name, texts in ((notes, short), (pages, [*long, *long[:30], short[0]])):
        counts = counted[name]
        assert counts.documents == len(texts)
        assert counts.bytes == sum(len(text.encode()) for text in texts)
        assert len(counts.distinct()) == len(set(texts))
        lengths = Counter((len(text.encode()) - 1).bit_length() for text in texts)
        assert {i: n for i, n in enumerate(counts.lengths) if n} == lengths
        assert {text for _, text in counts.sample} <= set(texts) and len(counts.sample) == min(200, len(set(texts)))
        exact = len(texts) + sum(map(len, tokenizer.encode_batch(texts)))
        assert stats.tokens(counts, tokenizer) == pytest.approx(exact, rel=0.1)
    assert (counted[notes].blank, counted[pages].blank) == (2, 0)
    said = capsys.readouterr().out
    assert "20 (20.0%)" in said and "75.0%" in said and "1 documents are in more than one" in said
    examples = [line for line in said.splitlines() if line.startswith("- ")]
    assert len(examples) == 10 and sum("[bold]" in line for line in examples) >= 5
    assert not [path for path in nanochat_ray_home.rglob("*") if path.is_file()]
    assert stats.count(next(iter(stats.find_sources(options)))).sample == counted[notes].sample


def test_tokens_are_estimated_by_a_tokenizer_of_the_first_characters(tmp_path):
    texts = [f"the {i}th of the words " * 5 for i in range(200)]
    write(tmp_path / "words" / "a.jsonl", texts)
    options = PrepareOptions(str(tmp_path / "words"), vocab_size=300)
    tokenizer, note = stats._tokenizer(options, stats.find_sources(options))
    assert tokenizer.vocab_size == 300 and note.startswith(
        "tokens are an estimate by a tokenizer that was trained on the first "
    )
    options.vocab_size = 50_000
    assert stats._tokenizer(options, stats.find_sources(options))[1].startswith("tokens are not counted: vocab_size")
