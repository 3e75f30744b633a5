"""Files as people have them: which are data, which column is text, and how they are spelled, packed and broken."""

import bz2
import codecs
import gzip
import json
import lzma
import os
import random
import time
import tracemalloc
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from nanochat_ray.data import files, sources, tables
from nanochat_ray.data.files import Unreadable
from nanochat_ray.data.packing import pack_documents
from nanochat_ray.data.sources import Reading, Shard, read_documents, resolve
from nanochat_ray.data.tokenizer import PIECE_CHARS, Tokenizer, pieces
from nanochat_ray.evals.tasks import own


def read(shards, reading=None):
    return [text for shard in shards for text in read_documents(shard, reading)]


def everything(source):
    return sorted(read(source.train) + read(source.val))


def jsonl(*texts, **columns):
    return "".join(json.dumps({"text": text} | columns) + "\n" for text in texts).encode()


def write(folder, contents):
    """Files by name: bytes, or columns of a parquet file."""
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, dict):
            pq.write_table(pa.table(content), path)
        else:
            path.write_bytes(content)
    return str(folder)


def arrow(columns, new):
    sink = pa.BufferOutputStream()
    table = pa.table(columns)
    with new(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


# Which files


def test_a_hub_repository_gives_its_data_and_not_its_papers(tmp_path, capsys):
    papers = (
        "LICENSE.txt",
        "README.txt",
        "README.md",
        "LICENSE",
        "requirements.txt",
        ".gitattributes",
        "data/_SUCCESS",
    )
    others = dict.fromkeys(papers, b"All rights reserved.\n\nNo training.\n")
    others |= {"dataset_infos.json": b'{\n  "default": {"features": {}}\n}', "uv.lock": b"x", "stats.json": b'{"n": 3}'}
    tables = {f"data/part-{i}.parquet": {"id": [f"i{i}"], "text": [f"t{i}"]} for i in range(3)}
    source = resolve(write(tmp_path, others | tables | {"notes.txt": b"notes", "paper.pdf": b"%PDF"}))
    said = capsys.readouterr().out
    assert (read(source.train), read(source.val)) == (["t0", "t1"], ["t2"])
    assert "2 parquet files of 0.0 MB, column text; validation is the last file, data/part-2.parquet" in said
    for name in ("LICENSE.txt", "requirements.txt", "notes.txt", "paper.pdf", "stats.json", "data/_SUCCESS"):
        assert any(name in line for line in said.splitlines() if "left out" in line), name


def test_every_format_and_packing_is_read(tmp_path):
    columns = {"text": ['a text\nof two lines, and "quotes"'], "n": [1]}
    lines = jsonl(columns["text"][0], n=1)
    kinds = {
        "a.csv": b'n,text\n1,"a text\nof two lines, and ""quotes"""\n',
        "b.tsv": b'n\ttext\n1\t"a text\nof two lines, and ""quotes"""\n',
        "semicolons.csv": b'n;text\n1;"a text\nof two lines, and ""quotes"""\n',
        "c.arrow": arrow(columns, pa.ipc.new_file),
        "d.arrow": arrow(columns, pa.ipc.new_stream),
        "e.feather": arrow(columns, pa.ipc.new_file),
        "f.jsonl.bz2": bz2.compress(lines),
        "g.JSONL.XZ": lzma.compress(lines),
        "h.ndjson": lines.replace(b"\n", b"\r\n\r\n"),
        "i.jsonl.gz": gzip.compress(lines[:20]) + gzip.compress(lines[20:]),
        "j.json": json.dumps([json.loads(lines)], indent=2).encode(),
        "k.json": json.dumps([json.loads(lines)]).encode(),
        "l.json": json.dumps(json.loads(lines), indent=2).encode(),
        "part-00000": lines,
        "part-00001": gzip.compress(lines),
        "part-00002.zst": zstandard.compress(lines),
        "with space, = :: # ? *.jsonl": lines,
    }
    place = write(tmp_path, kinds | {"part-00003": b"", "m.parquet": columns})
    (tmp_path / "part-00003").write_bytes((tmp_path / "m.parquet").read_bytes())
    os.rename(tmp_path / "h.ndjson", os.fsencode(tmp_path) + b"/h\xff.ndjson")
    source = resolve(place)
    assert everything(source) == sorted(columns["text"] * (len(kinds) + 2))
    for name in ("with space, = :: # ? *.jsonl", "part-00001", "c.arrow"):
        alone = files.find(str(tmp_path / name))
        assert [file.name for found in alone for file in found.files] == [name]


def test_books_beside_a_table_about_them_are_asked_about(tmp_path):
    place = write(tmp_path, {"index.csv": b"id,title\n1,One\n", "1.txt": b"one\n\ntwo", "2.txt": b"three"})
    with pytest.raises(
        ValueError, match=r"id \(string\), title \(string\); to read its 2 txt files, name (.*)$"
    ) as caught:
        resolve(place)
    assert everything(resolve(str(caught.value).rpartition("name ")[2])) == ["one", "three", "two"]


def test_links_are_followed_and_nothing_is_read_twice(tmp_path, capsys):
    place = write(
        tmp_path / "d", {"a.jsonl": jsonl("a"), "a.jsonl.gz": gzip.compress(jsonl("a")), "b.jsonl": jsonl("b")}
    )
    write(tmp_path / "elsewhere", {"c.jsonl": jsonl("c"), "b.jsonl.gz": gzip.compress(jsonl("another b"))})
    (tmp_path / "d" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "d" / "loop").symlink_to(tmp_path / "d")
    (tmp_path / "d" / "latest.jsonl").symlink_to(tmp_path / "d" / "b.jsonl")
    (tmp_path / "d" / "gone.jsonl").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "d" / "pipe.jsonl")
    assert everything(resolve(place)) == ["a", "another b", "b", "c"]
    said = capsys.readouterr().out
    assert "the same as a.jsonl: a.jsonl.gz" in said
    assert "a link to another of these files: latest.jsonl" in said
    assert "a broken link: gone.jsonl" in said


@pytest.mark.parametrize(
    ("names", "train", "val"),
    [
        (["train/0.jsonl", "train/1.jsonl", "test/0.jsonl", "validation/0.jsonl"], 2, ["validation/0.jsonl"]),
        (["data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"], 1, ["data/test-00000-of-00001.jsonl"]),
        (["wiki.train.jsonl", "wiki.valid.jsonl", "wiki.test.jsonl"], 1, ["wiki.valid.jsonl"]),
        (
            ["train_sft-00000-of-00001-a09b74b3ef9c3b56.jsonl", "test_sft-00000-of-00001.jsonl"],
            1,
            ["test_sft-00000-of-00001.jsonl"],
        ),
        (["a.jsonl", "b.jsonl", "dev.jsonl"], 2, ["dev.jsonl"]),
        (["train-0.jsonl", "train-1.jsonl", "train-2.jsonl"], 2, ["train-2.jsonl"]),
        (["test_1.jsonl", "test_2.jsonl", "test_3.jsonl"], 2, ["test_3.jsonl"]),
        (["a/train-travel.jsonl", "b/testament.jsonl", "c/0.jsonl"], 2, ["c/0.jsonl"]),
    ],
)
def test_folders_and_names_of_splits_are_used(tmp_path, names, train, val):
    source = resolve(write(tmp_path, {name: jsonl(name) for name in names}))
    assert (len(read(source.train)), read(source.val)) == (train, val)


def test_several_data_sets_side_by_side_are_asked_about(tmp_path):
    names = [f"{language}/{split}-00000-of-00001.jsonl" for language in ("en", "fr") for split in ("train", "test")]
    place = write(tmp_path, {name: jsonl(name) for name in names})
    with pytest.raises(ValueError, match="holds 2 data sets, en, fr: name the folder of one, or several"):
        resolve(place)
    assert read(resolve(f"{place}/en").val) == ["en/test-00000-of-00001.jsonl"]
    for both in (resolve(f"{place}/en,{place}/fr"), resolve(f"{place}/*/*.jsonl")):
        assert [sorted(read(both.train)), sorted(read(both.val))] == [[names[0], names[2]], [names[1], names[3]]]


def test_patterns_and_lists_name_files(tmp_path):
    place = write(tmp_path, {name: jsonl(name) for name in ("a/x1.jsonl", "a/x2.jsonl", "b/c/x3.jsonl", "[y].jsonl")})
    found = {
        pattern: [file.name for part in files.find(f"{place}/{pattern}") for file in part.files]
        for pattern in ("**/*.jsonl", "a/x?.jsonl", "*/x[2-9].jsonl", "[y].jsonl", f"b/c/x3.jsonl,{place}/a/x1.jsonl")
    }
    assert list(map(len, found.values())) == [4, 2, 1, 1, 2]
    with pytest.raises(FileNotFoundError, match=r"z\*\.jsonl holds no \.parquet"):
        files.find(f"{place}/z*.jsonl")


def test_many_small_files_fill_rows_together(tmp_path):
    place = write(tmp_path, {f"{i:03}.json": json.dumps({"text": f"t{i}"}, indent=1).encode() for i in range(300)})
    source = resolve(place)
    assert len(source.train) == 1
    assert everything(source) == sorted(f"t{i}" for i in range(300))
    assert 1 <= len(read(source.val)) <= 30


@pytest.mark.parametrize("sizes", [(100_000, 10), (10, 100_000), (10,) * 200 + (100_000,), (100_000, 100_000, 10)])
def test_a_tiny_or_huge_last_file_is_not_the_validation(tmp_path, capsys, sizes):
    contents = {f"{i:03}.jsonl": jsonl(*[f"{i} {j}" for j in range(n // 10)]) for i, n in enumerate(sizes)}
    source = resolve(write(tmp_path, contents))
    total, val = len(everything(source)), len(read(source.val))
    assert total == sum(n // 10 for n in sizes)
    assert 0.04 < val / total < 0.06
    assert "validation is every 20th document" in capsys.readouterr().out


def test_one_document_in_twenty_is_validation_where_each_file_has_one(tmp_path):
    place = write(tmp_path, {f"{i:02}.jsonl": jsonl(f"{i} " + "x" * (10_000 * (i == 29))) for i in range(30)})
    source = resolve(place)
    assert [text.split()[0] for text in read(source.val)] == ["0", "20"]
    assert len(everything(source)) == 30


# Which column


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (
            {"id": ["a1"], "text": [{"body": "x"}]},
            r"text that is not text \(struct<body: string>\).*; try text\.body",
        ),
        ({"id": ["a1"], "text": [["x", "y"]]}, r"text \(list<.*: string>\); try text\[\]"),
        (
            {"uuid": ["a1"], "messages": [[{"role": "user", "content": "x"}]]},
            r"uuid \(string\), messages .*messages\[\]",
        ),
        ({"url": ["http://x"]}, r"no column text, content, document or body: .*--text-column: url \(string\)$"),
        ({"text": [1, 2]}, r"a column text that is not text \(int64\)"),
    ],
)
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_no_column_is_taken_without_being_named(tmp_path, columns, said, kind):
    rows = pa.table(columns).to_pylist()
    contents = columns if kind == "parquet" else "".join(json.dumps(row) + "\n" for row in rows).encode()
    place = write(tmp_path, {f"{name}.{kind}": contents for name in "ab"})
    with pytest.raises(ValueError, match=said) as caught:
        resolve(place)
    assert place in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("column", "expected"),
    [("body.text", "b"), ("parts[]", "p\n\nq"), ("turns[].said", "s\n\nt"), ("a.b", "dot"), ("id", "i")],
)
def test_a_path_leads_to_text_within_structs_and_lists(tmp_path, column, expected):
    row = {"id": "i", "body": {"text": "b", "n": 1}, "parts": ["p", None, "q"], "a.b": "dot"}
    row |= {"turns": [{"said": "s"}, {"said": "t"}]}
    place = write(
        tmp_path, {"a.parquet": pa.Table.from_pylist([row]).to_pydict(), "b.jsonl": (json.dumps(row) + "\n").encode()}
    )
    assert everything(resolve(place, text_column=column)) == [expected] * 2


def test_the_column_is_one_for_the_whole_data_set(tmp_path, capsys):
    place = write(
        tmp_path, {"a.parquet": {"id": ["i"], "body": ["no"]}, **{f"{n}.jsonl": jsonl(n, id="i") for n in "bcd"}}
    )
    assert everything(resolve(place)) == ["b", "c", "d"]
    assert "1 left out, no text in a column text: a.parquet" in capsys.readouterr().out


def test_other_kinds_of_string_columns_are_text(tmp_path):
    texts = ["one", None, "two"]
    kinds = (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string()))
    place = write(tmp_path, {f"{i}.parquet": {"text": pa.array(texts, kind)} for i, kind in enumerate(kinds)})
    (tmp_path / "9.arrow").write_bytes(arrow({"text": pa.array(texts, kinds[-1])}, pa.ipc.new_stream))
    assert everything(resolve(place)) == ["one"] * 5 + ["two"] * 5


def test_null_columns_give_no_documents_and_are_counted(tmp_path):
    nulls = pa.nulls(3)
    place = write(
        tmp_path, {"a.parquet": {"text": nulls}, "b.jsonl": jsonl(None, None, "b"), "c.parquet": {"text": ["c"]}}
    )
    source, reading = resolve(place), Reading()
    assert (read(source.train, reading), read(source.val)) == (["b"], ["c"])
    assert reading.blank == 5
    only = write(tmp_path / "only", {"a.parquet": {"text": nulls}, "b.parquet": {"text": nulls}})
    with pytest.raises(ValueError, match=r"only has no documents: the text column is empty"):
        resolve(only)


# What is in a file


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_a_byte_order_mark_says_the_encoding_and_is_no_text(tmp_path, encoding):
    mark = codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b""
    texts = ["zwölf 🙂", "dreizehn"]
    contents = {
        "a.jsonl": "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts),
        "b.csv": "text\n" + "\n".join(texts),
        "c.json": json.dumps([{"text": t} for t in texts], ensure_ascii=False),
    }
    place = write(tmp_path / "tables", {name: mark + text.encode(encoding) for name, text in contents.items()})
    assert everything(resolve(place)) == sorted(texts * 3)
    place = write(tmp_path / "txt", {name: mark + "\n\n".join(texts).encode(encoding) for name in ("a.txt", "b.txt")})
    assert everything(resolve(place)) == sorted(texts * 2)


@pytest.mark.parametrize(
    ("encoding", "looks"),
    [("cp1252", "line 3 is not UTF-8: it looks like cp125"), ("utf-16-le", "UTF-16-LE without its mark")],
)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_another_encoding_is_named_with_file_and_line(tmp_path, encoding, looks, name):
    text = '{"text": "fine"}\n\n{"text": "Café à la crème, s\'il vous plaît, déjà très élégant"}\n'.encode(encoding)
    with pytest.raises(Unreadable, match=rf"{name}: .*{looks}"):
        read([Shard(write(tmp_path, {name: text}) + f"/{name}", None if name == "a.txt" else "text")])


@pytest.mark.parametrize("at", [0, 1 << 20, (1 << 20) - 7, 3 << 20])
def test_end_of_text_anywhere_in_the_file_splits_it_and_blank_lines_do_not(tmp_path, at):
    first = ("word\n\n" * (at // 6 + 1))[:at]
    write(tmp_path, {"a.txt": f"{first}<|endoftext|>second\n\nhalf<|endoftext|>".encode()})
    texts = read([Shard(f"{tmp_path}/a.txt", None)])
    assert texts == [text for text in (first.strip(), "second\n\nhalf") if text]


def test_json_is_read_whatever_its_layout(tmp_path):
    rows = [{"text": f"{i} " + "x" * (i % 7) * 100_000, "n": [i, {"a": "]},"}]} for i in range(40)]
    layouts = {
        "a.json": json.dumps(rows),
        "b.json": json.dumps(rows, indent=3),
        "c.json": "\n".join(json.dumps(row, indent=1) for row in rows),
        "d.jsonl": "\ufeff\n" + "\r\n\n".join(json.dumps(row) for row in rows),
    }
    for name, text in layouts.items():
        write(tmp_path, {name: text.encode()})
        assert read([Shard(f"{tmp_path}/{name}", "text")]) == [row["text"] for row in rows]
    for text, line in (
        (layouts["b.json"][:-1], "has no end"),
        (layouts["b.json"].replace('"n"', "n", 1), "4 is not"),
    ):
        write(tmp_path, {"b.json": text.encode()})
        with pytest.raises(Unreadable, match=rf"b\.json: line .*{line}"):
            read([Shard(f"{tmp_path}/b.json", "text")])


def test_odd_characters_and_values_in_json(tmp_path):
    content = b'{"text": "a\\ud800b"}\n{"text": "nul \\u0000"}\n{"text": null}\n{"text": "end"}\n'
    place = write(tmp_path, {"a.jsonl": content, "b.jsonl": jsonl("b")})
    assert everything(resolve(place)) == ["a?b", "b", "end", "nul \0"]
    write(tmp_path, {"a.jsonl": content + b'{"text": 7}\n'})
    with pytest.raises(Unreadable, match=r"a\.jsonl: line 5 has no string 'text'"):
        read(resolve(place).train)


def test_zstd_windows_up_to_two_gib_are_read(tmp_path):
    lines = jsonl(*map(str, range(1000)))
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=31, enable_ldm=False)
    long = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    write(tmp_path, {"a.jsonl.zst": long.compress(lines) + long.flush() + zstandard.compress(jsonl("last"))})
    assert zstandard.get_frame_parameters((tmp_path / "a.jsonl.zst").read_bytes()).window_size == 2**31
    assert read([Shard(f"{tmp_path}/a.jsonl.zst", "text")]) == [*map(str, range(1000)), "last"]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("x.jsonl.gz", lambda lines: gzip.compress(lines)[:-9]),
        ("x.jsonl.bz2", lambda lines: bz2.compress(lines)[:-9]),
        ("x.jsonl.xz", lambda lines: lzma.compress(lines)[:-9]),
        ("x.jsonl.zst", lambda lines: zstandard.compress(lines)[:-9]),
        ("x.jsonl", lambda lines: lines + b'{"text": "cut'),
        ("x.csv", lambda lines: b'text,n\n"a",1\n"b",1,2\n'),
        ("x.csv", lambda lines: b'text,n\n"a",1\n"b'),
    ],
)
def test_a_broken_file_among_many_is_named_and_the_rest_is_read(tmp_path, name, damage):
    lines = jsonl(*(random.Random(i).randbytes(50).hex() for i in range(500)))
    good = {f"{i:03}.jsonl": jsonl(f"g{i}") for i in range(120)}
    place = write(
        tmp_path, good | {name: damage(lines), "empty.jsonl": b"", "empty.parquet": {"text": pa.array([], "str")}}
    )
    source, reading = resolve(place), Reading(unreadable=[])
    texts = read(source.train + source.val, reading)
    assert {f"g{i}" for i in range(120)} <= set(texts)
    (message,) = {*source.unreadable, *reading.unreadable}  # read twice, for training and validation
    assert f"/{name}" in message and "\n" not in message
    assert sorted(source.empty) == ["empty.jsonl", "empty.parquet"]
    sources.check_unreadable(source.files, [message])
    with pytest.raises(ValueError, match=r"2 of 123 files can't be read"):
        sources.check_unreadable(source.files, [message, "another"])


# Long documents


def test_long_documents_are_cut_where_no_token_changes(golden):
    tokenizer = Tokenizer.load(str(golden / "nanochat_d2"))
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefgh", k=generator.randint(1, 9))) for _ in range(500)]
    for between in (" ", "\n", ",", "\r\n\n", "。", "-", "_"):
        text = between.join(generator.choices(words, k=250_000))
        parts = list(pieces(text))
        assert len(parts) > 1 and "".join(parts) == text and max(map(len, parts)) <= PIECE_CHARS
        for left, right in pairwise(parts):
            together = left[-300:] + right[:300]
            assert tokenizer.encode(left[-300:]) + tokenizer.encode(right[:300]) == tokenizer.encode(together)


def test_a_document_of_many_pieces_takes_linear_time():
    def seconds(megabytes):
        text = "a few words of text " * (megabytes * 50_000)
        began = time.process_time()
        assert sum(map(len, pieces(text))) == len(text)
        return time.process_time() - began

    small = min(seconds(10) for _ in range(3))
    assert seconds(80) < 4 * 8 * small + 0.1


def test_a_document_of_a_whole_corpus_fills_rows_to_its_end():
    document = np.arange(1_000_000, dtype=np.uint32)
    rows, counts = pack_documents([document], 65)
    assert counts.used > 0.999 * len(document) and counts.cropped < 65
    assert (rows[:, 0] == 0).all()
    assert np.array_equal(rows[:, 1:].reshape(-1), document[1 : 1 + rows.shape[0] * 64])


def test_a_long_text_file_is_read_in_bounded_memory(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress((b"a paragraph of text " * 50 + b"\n\n") * 20_000, 1))
    tracemalloc.start()
    assert sum(1 for _ in read_documents(Shard(str(path), None))) == 20_000
    assert tracemalloc.get_traced_memory()[1] < 10 << 20  # of 20 MB of text
    tracemalloc.stop()


# Conversations


WHO = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A small model."}]
SHARE = [{"from": "human", "value": "Who are you?"}, {"from": "gpt", "value": "A small model."}]


@pytest.mark.parametrize(
    ("name", "content", "count"),
    [
        ("a.jsonl", f"\ufeff{json.dumps(WHO)}\r\n\r\n{json.dumps({'messages': WHO, 'uuid': 'x'})}".encode(), 2),
        ("a.json", json.dumps([{"messages": WHO}, WHO], indent=1).encode(), 2),
        ("a.json", json.dumps([WHO, WHO]).encode(), 2),
        ("a.json", json.dumps(WHO, indent=1).encode(), 1),
        ("a.json", json.dumps({"messages": WHO}, indent=1).encode(), 1),
        ("a.ndjson.xz", lzma.compress(json.dumps({"conversations": SHARE}).encode()), 1),
        ("a.jsonl", json.dumps(WHO).encode("utf-16"), 1),
        ("a.parquet", {"uuid": ["x", "y"], "messages": [WHO, WHO]}, 2),
        ("a.arrow", arrow({"conversations": [SHARE]}, pa.ipc.new_stream), 1),
    ],
)
def test_conversations_of_ones_own_come_from_any_file(tmp_path, name, content, count):
    found = own.conversations(write(tmp_path, {name: content}) + f"/{name}")
    assert list(found) == [{"messages": WHO}] * count


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "a.parquet",
            {"uuid": ["x"], "prompt": ["y"]},
            r"no column messages or conversations .*uuid \(string\), prompt",
        ),
        ("a.csv", b"messages\nhello\n", "line 2 has no column messages, .*; its columns: messages"),
        ("a.jsonl", b'[{"role": "user"}]\n', "line 1 message 0 has no text"),
        ("a.jsonl", json.dumps(WHO).encode() + b"\n{\n", "1 of 2 .*line 2 is not JSON"),
        ("a.jsonl", b"{\n" + json.dumps(WHO).encode() + b"\n", "1 of 2 .*line 1 is not JSON"),
        ("a.txt", b"Who are you?", "conversations are read from jsonl"),
    ],
)
def test_conversations_that_are_none_are_named(tmp_path, name, content, said):
    with pytest.raises(ValueError, match=rf"{name}.*{said}"):
        list(own.conversations(write(tmp_path, {name: content}) + f"/{name}"))


def test_columns_of_json_have_types(tmp_path):
    write(tmp_path, {"a.jsonl": b'{"a": null, "b": [{"c": 1}]}\n{"a": "x", "b": [{"d": true}]}\n{"e": 1.5}\n'})
    types = {name: str(kind) for name, kind in tables.schema(f"{tmp_path}/a.jsonl").items()}
    assert types.pop("b") == "list<item: struct<c: int64, d: bool>>"
    assert types == {"a": "string", "e": "double"}
