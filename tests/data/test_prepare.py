"""Prepare with a real Ray: rows end to end, nothing done twice, nothing mixed, killed and run again."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from nanochat_ray.data import prepare, sources
from nanochat_ray.data.loader import Rows, row_files
from nanochat_ray.data.packing import pack_documents
from nanochat_ray.data.prepare import Job, PrepareOptions, run, write_shard
from nanochat_ray.data.tokenizer import SPECIAL_TOKENS, Tokenizer, train


def make_source(folder: Path, shards: int, documents: int, words: int = 40) -> list[str]:
    """Parquet files of random words; all of their texts."""
    folder.mkdir(parents=True, exist_ok=True)
    generator, every = random.Random(0), []
    lexicon = ["".join(generator.choices("etaoinshrdlu", k=generator.randint(2, 9))) for _ in range(500)]
    for i in range(shards):
        texts = [" ".join(generator.choices(lexicon, k=generator.randint(1, 2 * words))) for _ in range(documents)]
        pq.write_table(pa.table({"text": texts}), folder / f"part_{i:03d}.parquet")
        every += texts
    return every


def rows_of(prepared: prepare.Prepared) -> dict[str, bytes]:
    uris = [uri for split in ("train", "val") for uri in row_files(os.path.join(prepared.rows, split))]
    return {uri.rpartition("/rows/")[2]: Path(uri).read_bytes() for uri in uris}


@pytest.mark.slow
def test_end_to_end(ray_session, tmp_path, capsys, nanochat_ray_home):
    texts = make_source(tmp_path / "words", shards=4, documents=60)
    options = PrepareOptions(source=str(tmp_path / "words"), vocab_size=400, sequence_len=32)
    prepared = run(options)
    tokenizer = Tokenizer.load(prepared.tokenizer)
    assert prepared.rows.startswith(f"{nanochat_ray_home}/rows/words-{tokenizer.sha[:8]}-T32-")
    assert json.loads((Path(prepared.rows) / "manifest.json").read_text()) == prepared.manifest
    splits = prepared.manifest["splits"]
    assert [len(splits[split]["files"]) for split in ("train", "val")] == [3, 1]
    total = {key: splits["train"][key] + splits["val"][key] for key in splits["val"] if key != "files"}
    assert total["documents"] == len(texts)
    assert total["bytes"] == sum(len(text.encode()) for text in texts)
    accounted = total["tokens"] + total["cropped_tokens"] + total["dropped_tokens"]
    assert accounted == sum(1 + len(tokenizer.encode(text)) for text in texts)

    joined = "\n".join(texts)
    for split, counts in splits.items():
        rows = Rows(os.path.join(prepared.rows, split))
        tokens = rows[np.arange(len(rows))]
        assert tokens.shape == (counts["rows"], 33) == (sum(counts["files"].values()), 33)
        assert tokens.size == counts["tokens"]
        assert (tokens[:, 0] == tokenizer.bos_id).all()
        for row in tokens.tolist():  # bos-led pieces, each the beginning of a document
            for is_bos, piece in itertools.groupby(row, key=lambda token: token == tokenizer.bos_id):
                assert is_bos or tokenizer.decode(list(piece)) in joined

    before = {path: path.stat().st_mtime_ns for path in nanochat_ray_home.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert run(options) == prepared
    assert "nothing to do" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in nanochat_ray_home.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_runs_share_rows_and_take_none_from_each_other(ray_session, tmp_path, capsys):
    """Two sizes of a folder, then another text in one of its files."""
    folder = tmp_path / "words"
    texts = make_source(folder, shards=5, documents=30)
    train(iter(texts), 300).save(str(tmp_path / "tokenizer"))
    options = PrepareOptions(source=str(folder), tokenizer=str(tmp_path / "tokenizer"), sequence_len=16)
    large = run(options)
    before = rows_of(large)
    (folder / "part_003.parquet").rename(tmp_path / "part_003.parquet")
    small = run(options)
    assert "prepare: 4/4 shards" not in capsys.readouterr().out  # all were there
    assert list(rows_of(small)) == [*list(before)[:3], *list(before)[4:]]
    (tmp_path / "part_003.parquet").rename(folder / "part_003.parquet")
    assert run(options) == large

    pq.write_table(pa.table({"text": texts[::-1]}), folder / "part_001.parquet")
    changed = run(options)
    assert rows_of(large) == before
    assert [uri in before for uri in rows_of(changed)] == [True, False, True, True, True]
    assert (
        len(Rows(changed.rows + "/train"))
        == changed.manifest["splits"]["train"]["rows"]
        > len(Rows(large.rows + "/train"))
    )


@pytest.mark.slow
def test_climbmix_shards_are_as_many_as_give_the_tokens(ray_session, tmp_path, nanochat_ray_home, capsys, monkeypatch):
    """Each size has a tokenizer of its own only while max_chars reach into other shards."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    make_source(tmp_path / "words", shards=7, documents=40)
    place = nanochat_ray_home / "sources" / "climbmix"
    place.mkdir(parents=True)
    for i, path in enumerate(sorted((tmp_path / "words").iterdir())):
        path.rename(place / f"shard_{i if i < 6 else sources.CLIMBMIX_LAST:05d}.parquet")
    size = {"vocab_size": 300, "sequence_len": 16, "max_chars": 5000}
    two = run(PrepareOptions("climbmix", shards=2, **size))
    tokens = 16 * two.manifest["splits"]["train"]["rows"]
    capsys.readouterr()
    five = run(PrepareOptions("climbmix", shards=2, tokens=2 * tokens, **size))
    said = capsys.readouterr().out
    train = five.manifest["splits"]["train"]
    assert f"prepare: there are {tokens:,} tokens, {2 * tokens:,} are wanted: taking 4 climbmix shards" in said
    assert len(train["files"]) in (4, 5)
    assert 2 * tokens <= 16 * train["rows"] < 3 * tokens
    assert list(rows_of(five))[:2] == list(rows_of(two))[:2]
    assert run(PrepareOptions("climbmix", shards=2, tokens=2 * tokens, **size)) == five
    assert five.tokenizer == two.tokenizer == run(PrepareOptions("climbmix", shards=3, **size)).tokenizer
    others = [run(PrepareOptions("climbmix", shards=n, **size | {"max_chars": 10**9})).tokenizer for n in (2, 3)]
    assert len({two.tokenizer, *others}) == 3


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", folder]).returncode:
        pytest.skip("mounting a small disk takes root")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_keeps_nothing_half_written(ray_session, tmp_path, small_disk, monkeypatch):
    monkeypatch.setenv("NANOCHAT_RAY_HOME", str(small_disk / "home"))
    texts = make_source(tmp_path / "words", shards=4, documents=1200)
    train(iter(texts[:500]), 300).save(str(tmp_path / "tokenizer"))
    options = PrepareOptions(source=str(tmp_path / "words"), tokenizer=str(tmp_path / "tokenizer"), sequence_len=64)
    with pytest.raises(ValueError, match=rf"No space left on device: '.*\.arrow' \({small_disk}: 0 of 0 MB free\)$"):
        run(options)
    assert {path.suffix for path in small_disk.rglob("rows_*")} <= {".arrow", ".json"}
    assert not list(small_disk.rglob(".*"))
    subprocess.run(["mount", "-o", "remount,size=10m", small_disk], check=True)
    assert run(options).manifest["splits"]["train"]["rows"]


def test_a_disk_without_room_is_known_before_anything_is_downloaded(nanochat_ray_home, monkeypatch):
    monkeypatch.setattr("nanochat_ray.storage.free_bytes", lambda uri: 30e9)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(OSError, match=r"173 climbmix shards and their rows take 33.0 GB \(.* MB free\): make room"):
        prepare.find_sources(PrepareOptions("climbmix", shards=172))
    with pytest.raises(OSError, match="201 climbmix shards"):
        prepare.find_sources(PrepareOptions("climbmix", tokens=12_000_000_000))


@pytest.mark.slow
def test_what_is_wrong_is_one_line(ray_session, tmp_path):
    folder = tmp_path / "words"
    texts = make_source(folder, shards=3, documents=20)
    train(iter(texts), 300).save(str(tmp_path / "tokenizer"))
    options = PrepareOptions(source=str(folder), tokenizer=str(tmp_path / "tokenizer"), sequence_len=100_000)
    with pytest.raises(ValueError, match=r"train split of words has \d+ tokens, fewer than a row of 100001"):
        run(options)
    damaged = folder / "part_001.parquet"
    content = bytearray(damaged.read_bytes())
    content[4 : len(content) // 2] = bytes(len(content) // 2 - 4)
    damaged.write_bytes(content)
    options.sequence_len = 16
    with pytest.raises(ValueError, match=r"part_001\.parquet") as caught:
        run(options)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "home" / "rows").rglob("manifest.json"))


@pytest.mark.slow
def test_broken_and_empty_files_are_named_at_the_end_and_not_read_again(ray_session, tmp_path, capsys):
    folder = tmp_path / "words"
    texts = make_source(tmp_path / "made", shards=1, documents=300)
    train(iter(texts), 300).save(str(tmp_path / "tokenizer"))
    folder.mkdir()
    for i, text in enumerate(texts[:150]):
        (folder / f"{i:03}.json").write_text(json.dumps({"text": text}, indent=1))
    (folder / "007.json").write_text('{"text": "cut')
    (folder / "008.json").write_text("")
    os.rename(folder / "009.json", os.fsencode(folder) + b"/009\xff.json")
    options = PrepareOptions(source=str(folder), tokenizer=str(tmp_path / "tokenizer"), sequence_len=16)
    prepared = run(options)
    said = capsys.readouterr().out
    assert "prepare: 1 of 150 files are empty: 008.json" in said
    assert "prepare: 1 of 150 files are damaged; what could be read is used:\n  cannot read" in said
    assert "007.json: line 1 is not JSON" in said
    splits = prepared.manifest["splits"]
    assert splits["train"]["documents"] + splits["val"]["documents"] == 148
    assert run(options) == prepared
    assert "nothing to do" in capsys.readouterr().out
    (folder / "010.json").write_text("not JSON")
    with pytest.raises(ValueError, match=r"007\.json: .*; .*010\.json: .* \(2 of 150 files can't be read\)"):
        run(options)


@pytest.mark.parametrize("num_threads", [1, 4])
def test_rows_are_the_packed_documents(tmp_path, monkeypatch, num_threads):
    texts = make_source(tmp_path / "words", shards=1, documents=300)
    texts += [f"{texts[0]} {SPECIAL_TOKENS[0]} is plain text", "Zürich 北京 🙂", " " * 1000 + "x", texts[1] * 3000, "a"]
    pq.write_table(pa.table({"text": texts}), tmp_path / "words.parquet")
    tokenizer = train(texts[:300], 300)
    monkeypatch.setattr(prepare, "CHUNK_CHARS", 3_000)  # many chunks, which must not change places
    job = Job(sources.Shard(str(tmp_path / "words.parquet"), "text"), "train", str(tmp_path / "rows_00000.arrow"))
    counts = write_shard(job, tokenizer=tokenizer, row_len=65, num_threads=num_threads)

    documents = [np.array([tokenizer.bos_id, *tokenizer.encode(text)], dtype=np.uint16) for text in texts]
    expected, tokens = pack_documents(documents, 65)
    rows = Rows(str(tmp_path))
    assert rows.tokens[0].dtype == np.uint16
    assert (rows.tokens[0] == expected).all()
    assert json.loads(Path(job.counts_uri).read_text()) == counts
    assert counts == {
        "rows": len(expected),
        "tokens": tokens.used,
        "cropped_tokens": tokens.cropped,
        "dropped_tokens": tokens.dropped,
        "documents": len(texts),
        "bytes": sum(len(text.encode()) for text in texts),
    }


DRIVER = """
import sys, ray
from nanochat_ray.data.prepare import PrepareOptions, run
ray.init(address=sys.argv[1], log_to_driver=False)
run(PrepareOptions(source=sys.argv[2], tokenizer=sys.argv[3], sequence_len=64))
"""


@pytest.mark.slow
def test_killed_half_way(ray_session, tmp_path, monkeypatch):
    texts = make_source(tmp_path / "words", shards=8, documents=2500)
    train(iter(texts[:500]), 300).save(str(tmp_path / "tokenizer"))
    options = PrepareOptions(source=str(tmp_path / "words"), tokenizer=str(tmp_path / "tokenizer"), sequence_len=64)
    whole = rows_of(run(options))

    monkeypatch.setenv("NANOCHAT_RAY_HOME", str(tmp_path / "killed"))
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-c", DRIVER, address, *options.source, options.tokenizer]
    with subprocess.Popen(command, env={**os.environ, "RAY_AUTH_MODE": "token"}) as driver:
        deadline = time.monotonic() + 120
        while len(finished := list((tmp_path / "killed").rglob("rows_*.json"))) < 2:
            assert driver.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        driver.send_signal(signal.SIGKILL)
    time.sleep(2)  # Ray stops the tasks of a driver that died
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("rows_*.json")}
    assert 2 <= len(finished) < 8
    assert not list((tmp_path / "killed").rglob("manifest.json"))

    prepared = run(options)
    again = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("rows_*.json")}
    assert len(again) == 8
    assert {path: again[path] for path in finished} == finished
    assert rows_of(prepared) == whole
