"""Sources: files that are hard to read, a server that is hard to download from, packages never imported."""

import bz2
import email.utils
import gzip
import hashlib
import json
import lzma
import random
import re
import socket
import struct
import subprocess
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from nanochat_ray.data import docstrings, download, sources
from nanochat_ray.data.sources import read_documents, resolve

PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress, ".XZ": lzma.compress}


def documents(shards):
    return [text for shard in shards for text in read_documents(shard)]


def jsonl(texts):
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


def write_parquet(path, columns):
    pq.write_table(pa.table(columns), path, row_group_size=2)


# A folder of files


@pytest.mark.parametrize("pack", PACK)
def test_folder_of_every_format(tmp_path, pack):
    tables, txt = tmp_path / "tables", tmp_path / "txt"
    tables.mkdir()
    txt.mkdir()
    write_parquet(tables / "a.parquet", {"text": ["p0", "", None, "p1"], "title": ["x"] * 4})
    # two members one after the other, as parallel compressors write them
    (tables / f"b.jsonl{pack}").write_bytes(PACK[pack](jsonl(["j0", "", "jé\ud800"])) + PACK[pack](jsonl(["j2"])))
    (tables / f"c.CSV{pack}").write_bytes(PACK[pack](b'id,text\r\n1,"a ""quoted"", \r\n\r\nfield"\r\n2,\r\n'))
    (tables / f"d.tsv{pack}").write_bytes(PACK[pack](b"text\tid\nd0, d1\t1\n"))
    (tables / f"e.json{pack}").write_bytes(PACK[pack](b'{"text": "held out"}\n\n{"text": null}'))
    (tables / ".hidden.jsonl").write_text("not JSON")
    (tables / "README.md").write_text("not data")
    (tables / "sub.parquet").mkdir()
    (txt / f"a.txt{pack}").write_bytes(PACK[pack](b"one\nline\n\n \ntwo\r\n\r\n"))
    (txt / f"b.TXT{pack}").write_bytes(PACK[pack](b"x\n\ny<|endoftext|>z\n<|endoftext|>"))
    (txt / f"c.txt{pack}").write_bytes(PACK[pack](b"held out"))
    source = resolve(str(tables))
    table_documents = ["p0", "p1", "j0", "jé?", "j2", 'a "quoted", \r\n\r\nfield', "d0, d1"]
    assert documents(source.train) == table_documents
    assert documents(source.val) == documents(resolve(str(txt)).val) == ["held out"]
    assert documents(resolve(str(txt)).train) == ["one\nline", "two", "x\n\ny", "z"]
    assert re.fullmatch(r"[\w.-]+", source.name)


def test_published_parquet_folder(shared):
    source = resolve(str(shared / "datasets" / "wiki_vital"))
    assert (source.name, len(source.train), len(source.val)) == ("wiki_vital", 3, 1)
    assert len(documents(source.train + source.val)) == 10_033


def test_lone_file_is_split_one_in_twenty(tmp_path):
    path = tmp_path / "my data.v2.jsonl.gz"
    texts = [f"document {i}" for i in range(45)]
    path.write_bytes(gzip.compress(jsonl(texts)))
    source = resolve(str(path))
    assert source.name == "my-data.v2"
    assert documents(source.val) == texts[::20]
    assert sorted(documents(source.train + source.val)) == sorted(texts)


def test_uri(tmp_path):
    for name, texts in (("a.jsonl", ["a"]), ("b.jsonl.gz", ["b"])):
        with fsspec.open(f"memory://corpus/{name}", "wb") as f:
            f.write((gzip.compress if name.endswith("gz") else bytes)(jsonl(texts)))
    source = resolve("memory://corpus/")
    assert (documents(source.train), documents(source.val), source.name) == (["a"], ["b"], "corpus")


def test_fingerprint_follows_names_content_and_column(tmp_path):
    for name in ("a", "b"):
        write_parquet(tmp_path / f"{name}.parquet", {"text": ["one", "two"], "title": ["x", "y"]})
    prints = [resolve(str(tmp_path)).fingerprint, resolve(str(tmp_path), text_column="title").fingerprint]
    write_parquet(tmp_path / "a.parquet", {"text": ["uno", "two"], "title": ["x", "y"]})
    prints.append(resolve(str(tmp_path)).fingerprint)
    (tmp_path / "a.parquet").rename(tmp_path / "0.parquet")
    prints.append(resolve(str(tmp_path)).fingerprint)
    assert len(set(prints)) == 4
    assert resolve(str(tmp_path)).fingerprint == prints[-1]


GOOD = jsonl(["first", "second"])
NOISE = jsonl(hashlib.sha256(bytes([i])).hexdigest() for i in range(200))
BAD = {
    "missing": (None, None, "does not exist"),
    "nothing usable": ("notes.md", b"x", "holds no .parquet, .jsonl"),
    "wrong suffix": ("notes.md", b"x", "holds no .parquet, .jsonl"),
    "empty": ("x.jsonl", b"", "are empty"),
    "only blank lines": ("x.jsonl", b"\n\n", "has no documents"),
    "empty gz": ("x.txt.gz", gzip.compress(b""), "has no documents"),
    "not parquet": ("x.parquet", b"PAR1 but not really", "cannot read"),
    "bad JSON": ("x.jsonl", GOOD + b'{"text": "cut\n', "line 3 is not JSON"),
    "JSON array": ("x.json", b'["text"]\n', "line 1 is not a JSON object"),
    "no text in a line": ("x.jsonl", GOOD + b'{"txt": "?"}\n', "line 3 has no string 'text'"),
    "number for text": ("x.jsonl", GOOD + b'{"text": 7}\n', "line 3 has no string 'text'"),
    "no text column": (
        "x.jsonl",
        b'{"a": "?", "b": "?", "n": 1}\n',
        "--text-column: a (string), b (string), n (int64)",
    ),
    "not UTF-8": ("x.txt", b"fine\ncaf\xe9\n", "line 2 is not UTF-8"),
    "cut gz": ("x.jsonl.gz", gzip.compress(NOISE)[:-9], "cannot read"),
    "cut zst": ("x.jsonl.zst", zstandard.compress(NOISE)[:-9], "cannot read"),
    "not gz": ("x.jsonl.gz", NOISE, "cannot read"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_with_the_files_name(tmp_path, case):
    name, content, message = BAD[case]
    path = tmp_path if case == "nothing usable" else tmp_path / (name or "absent")
    if name:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        documents(resolve(str(path)).train)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_parquet_is_named(tmp_path):
    path = tmp_path / "x.parquet"
    write_parquet(path, {"a": ["?"], "n": [1], "b": ["?"]})
    for column, said in ((None, "no column text, content"), ("c", "no column c"), ("n", "a column n that is not text")):
        with pytest.raises(
            ValueError, match=rf"x\.parquet has {said}.*-column: a \(string\), n \(int64\), b \(string\)$"
        ):
            resolve(str(path), text_column=column)
    write_parquet(path, {"text": pa.array([], pa.string())})
    with pytest.raises(ValueError, match=r"x\.parquet has no documents"):
        resolve(str(path))
    write_parquet(path, {"text": ["one document"]})
    with pytest.raises(ValueError, match=r"x\.parquet has only one document"):
        resolve(str(path))
    write_parquet(path, {"text": [hashlib.sha256(bytes([i])).hexdigest() for i in range(200)]})
    content = bytearray(path.read_bytes())
    content[200:2000] = bytes(1800)  # pages, not the footer
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read .*x\.parquet: .+") as caught:
        documents(resolve(str(path)).train)
    assert "\n" not in str(caught.value)


def test_reading_streams(tmp_path):
    """What is before a bad line is read before the line is met."""
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"not JSON\n")
    (tmp_path / "b.jsonl").write_bytes(GOOD)
    reading = read_documents(resolve(str(tmp_path)).train[0])
    assert [next(reading), next(reading)] == ["first", "second"]
    with pytest.raises(ValueError, match="line 3"):
        next(reading)


# Downloads


class NastyServer(ThreadingHTTPServer):
    """Serves `files` by base name after a redirect, as the Hub does; `faults` (by name) come first, one a request."""

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), NastyHandler)
        self.files, self.faults, self.requests = files, defaultdict(list), []
        self.ranges, self.sha256, self.transfer = True, True, "length"
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class NastyHandler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server, name = self.server, self.path.rsplit("/", 1)[-1]
        data = server.files.get(name)
        if data is None:
            return self.answer(404, {})
        if not self.path.startswith("/cdn/"):
            digest = hashlib.sha256(data).hexdigest() if server.sha256 is True else server.sha256
            tag = {"X-Linked-ETag": f'"{digest}"'} if digest else {}
            return self.answer(302, {"Location": f"{server.url}/cdn/{name}", **tag})
        fault = server.faults[name].pop(0) if server.faults[name] else ""
        server.requests.append((name, self.headers.get("Range"), self.headers.get("Authorization")))
        if fault[:3].isdigit():  # "503", or with a header "503 Retry-After: 1"
            status, _, header = fault.partition(" ")
            return self.answer(int(status), dict([header.split(": ")]) if header else {})
        start = int(self.headers.get("Range", "bytes=0-")[6:-1]) if server.ranges else 0
        if start >= len(data):
            return self.answer(416, {"Content-Range": f"bytes */{len(data)}"})
        body = data[start:]
        headers = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        if server.transfer.startswith("gzip"):
            body, headers = gzip.compress(body, 1), headers | {"Content-Encoding": "gzip"}
        chunked = server.transfer.endswith("chunked")
        if chunked:
            self.protocol_version, self.close_connection = "HTTP/1.1", True
            headers["Transfer-Encoding"] = "chunked"
        self.answer(206 if start else 200, headers, len(body) if server.transfer in ("length", "gzip") else None)
        sent = body[: len(body) // 2] if fault else body
        self.wfile.write(b"%x\r\n%b\r\n" % (len(sent), sent) + (b"" if fault else b"0\r\n\r\n") if chunked else sent)
        self.wfile.flush()
        if fault == "stall":
            time.sleep(1.5)
        if fault == "drop":  # a reset instead of an orderly end, once the client has read something
            time.sleep(0.1)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def answer(self, status, headers, length=0):
        self.send_response(status)
        for key, value in (headers | ({} if length is None else {"Content-Length": str(length)})).items():
            self.send_header(key, value)
        self.end_headers()

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except (ConnectionError, ValueError):  # the client has left, or `drop` closed the connection
            self.close_connection = True


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    files, path = {}, tmp_path_factory.mktemp("shards") / "made.parquet"
    for i in (0, 1, 2, 6542):
        write_parquet(path, {"text": [random.Random(f"{i} {j}").randbytes(4096).hex() for j in range(250)]})
        files[f"shard_{i:05d}.parquet"] = path.read_bytes()
    return files


@pytest.fixture
def server(shards):
    server = NastyServer(shards)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(download, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(download, "LONGEST_DELAY", 0.1)
    monkeypatch.setattr(download, "TIMEOUT", (5, 0.4))


NAME = "shard_00000.parquet"


@pytest.mark.parametrize(
    "faults", [["503", "429", "500"], ["drop"], ["short"], ["stall"], ["drop", "503", "short", "stall", "drop"]]
)
def test_fetch_survives(server, impatient, tmp_path, faults):
    server.faults[NAME] = list(faults)
    target = tmp_path / "out" / NAME
    download.fetch(f"{server.url}/x/{NAME}", str(target))
    assert target.read_bytes() == server.files[NAME]
    assert [path.name for path in target.parent.iterdir()] == [NAME]
    assert len(server.requests) == len(faults) + 1
    broke_off = [fault for fault in faults if not fault.isdigit()]
    assert bool(server.requests[-1][1]) == bool(broke_off)  # asked only for the rest


def test_fetch_gives_up_and_a_later_call_resumes(server, impatient, tmp_path):
    server.faults[NAME] = ["drop"] + ["503"] * 50
    target = tmp_path / NAME
    with pytest.raises(ConnectionError, match=f"cannot download .*{NAME}: .*503.* run again") as caught:
        download.fetch(f"{server.url}/x/{NAME}", str(target))
    assert "\n" not in str(caught.value)
    assert not target.exists()
    assert len(server.requests) == download.ATTEMPTS
    arrived = download._partial_path(str(target)).stat().st_size
    assert 0 < arrived <= len(server.files[NAME]) // 2
    server.faults.clear()
    server.requests.clear()
    download.fetch(f"{server.url}/x/{NAME}", str(target))
    assert target.read_bytes() == server.files[NAME]
    assert [span for _, span, _ in server.requests] == [f"bytes={arrived}-"]


@pytest.mark.parametrize("left_over", ["of a longer file", "of another file"])
def test_fetch_drops_a_left_over_that_does_not_fit(server, impatient, tmp_path, left_over):
    target = tmp_path / NAME
    size = len(server.files[NAME])
    server.sha256 = left_over == "of another file"  # a size alone can't tell
    download._partial_path(str(target)).write_bytes(bytes(size + 5 if left_over == "of a longer file" else size // 3))
    download.fetch(f"{server.url}/x/{NAME}", str(target))
    assert target.read_bytes() == server.files[NAME]


def test_fetch_waits_as_long_as_the_server_asks(server, impatient, tmp_path, capsys):
    """However often: it counts as no failure. Transfers that share a pause wait together."""
    soon = email.utils.formatdate(time.time() + 2, usegmt=True)
    asks = ["429 Retry-After: 1", '429 RateLimit: "api";r=0;t=1', f"503 Retry-After: {soon}"]
    server.faults[NAME] = asks + ["429 Retry-After: 0"] * download.ATTEMPTS
    pause, other, began = download.Pause(print), "shard_00001.parquet", time.monotonic()
    with ThreadPoolExecutor() as pool:
        first = pool.submit(download.fetch, f"{server.url}/x/{NAME}", str(tmp_path / NAME), None, pause)
        while not pause.until:
            time.sleep(0.01)
        second = pool.submit(download.fetch, f"{server.url}/x/{other}", str(tmp_path / other), None, pause)
        assert first.result() is second.result() is None
    assert time.monotonic() - began > 2
    assert all((tmp_path / name).read_bytes() == server.files[name] for name in (NAME, other))
    assert "429 Too Many Requests and asks to wait 1 s" in capsys.readouterr().out


def test_fetch_does_not_wait_for_hours(server, tmp_path):
    server.faults[NAME] = ["429 Retry-After: 86400"]
    with pytest.raises(ConnectionError, match=r"429 .* asks to wait 86,400 s \(tried 1 time; run again later\)"):
        download.fetch(f"{server.url}/x/{NAME}", str(tmp_path / NAME))
    assert not list(tmp_path.glob(".*"))


def test_fetch_tries_a_wrong_checksum_twice(server, impatient, tmp_path):
    server.sha256 = "0" * 64
    with pytest.raises(ConnectionError, match=r"sha256 is .*, the server says 0+ \(tried 2 times; run again later\)"):
        download.fetch(f"{server.url}/x/{NAME}", str(tmp_path / NAME))
    assert len(server.requests) == 2
    assert not list(tmp_path.glob(".*"))


def test_a_download_fills_the_disk(server, tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", folder]).returncode:
        pytest.skip("mounting a small disk takes root")
    try:
        with pytest.raises(OSError, match=rf"No space left on device \({folder}: .* MB free\); run again.*{NAME}'$"):
            download.fetch(f"{server.url}/x/{NAME}", str(folder / NAME))
        assert download._partial_path(str(folder / NAME)).stat().st_size > 0
        subprocess.run(["mount", "-o", "remount,size=10m", folder], check=True)
        download.fetch(f"{server.url}/x/{NAME}", str(folder / NAME))
        assert (folder / NAME).read_bytes() == server.files[NAME]
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_fetch_without_ranges(server, impatient, tmp_path):
    server.ranges = server.sha256 = False
    server.faults[NAME] = ["drop", "short"]
    download.fetch(f"{server.url}/x/{NAME}", str(tmp_path / NAME))
    assert (tmp_path / NAME).read_bytes() == server.files[NAME]
    assert len(server.requests) == 3


@pytest.mark.parametrize("transfer", ["close", "chunked", "gzip", "gzip chunked", "gzip close"])
@pytest.mark.parametrize("sha256", [True, False])
def test_fetch_without_a_length_or_compressed_on_the_way(server, impatient, tmp_path, transfer, sha256, monkeypatch):
    """Whole by checksum, by the end of the stream or by how a parquet file ends; one that breaks off is noticed."""
    monkeypatch.setattr(download, "TIMEOUT", (5, 20))
    server.transfer, server.sha256, server.ranges = transfer, sha256, False
    server.faults[NAME] = ["short"]
    download.fetch(f"{server.url}/x/{NAME}", str(tmp_path / NAME))
    assert (tmp_path / NAME).read_bytes() == server.files[NAME]
    assert len(server.requests) == 2


@pytest.mark.parametrize("transfer", ["close", "chunked", "gzip"])
def test_fetch_asks_twice_at_most_for_what_it_cannot_resume(server, impatient, tmp_path, transfer, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", (5, 20))
    server.transfer, server.ranges = transfer, False
    server.faults[NAME] = ["drop"] * 20
    with pytest.raises(ConnectionError, match=rf"cannot download .*{NAME}: .*\(tried \d times?; ") as caught:
        download.fetch(f"{server.url}/x/{NAME}", str(tmp_path / NAME))
    assert len(server.requests) == 2
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("status", "error"), [("401", PermissionError), ("403", PermissionError), ("400", ValueError)])
def test_fetch_does_not_repeat_what_cannot_succeed(server, tmp_path, status, error):
    server.faults[NAME] = [status]
    with pytest.raises(error, match=f"{NAME}.*{status}"):
        download.fetch(f"{server.url}/x/{NAME}", str(tmp_path / NAME))
    assert len(server.requests) == 1
    assert not (tmp_path / NAME).exists()


def test_a_node_has_few_transfers_at_once(server, tmp_path, monkeypatch):
    """However many files and CPUs there are: a server limits how much one address asks."""
    fetch_rest, running, most, lock = download._fetch_rest, 0, 0, threading.Lock()

    def counted(*args):  # by the client: a server still counts a request that its client has ended
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        fetch_rest(*args)
        with lock:
            running -= 1

    monkeypatch.setattr(download, "_fetch_rest", counted)
    server.files |= {f"{i}": b"text" for i in range(40)}
    files = [(f"{server.url}/x/{i}", str(tmp_path / f"{i}")) for i in range(40)]
    events = list(download._fetch_share._function(files, None))
    assert events == [(i, None, None) for i in range(1, 41)]
    assert 1 < most <= download.TRANSFERS


@pytest.mark.slow
def test_climbmix(server, ray_session, nanochat_ray_home, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
    monkeypatch.setenv("HF_TOKEN", "a-token")
    server.faults.update({NAME: ["503"], "shard_06542.parquet": ["drop"]})
    source = resolve("climbmix", shards=2)
    folder = nanochat_ray_home / "sources" / "climbmix"
    names = ["shard_00000.parquet", "shard_00001.parquet", "shard_06542.parquet"]
    assert [shard.uri for shard in source.train + source.val] == [str(folder / name) for name in names]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert all((folder / name).read_bytes() == server.files[name] for name in names)
    assert len(documents(source.val)) == 250
    assert {token for _, _, token in server.requests} == {"Bearer a-token"}

    server.requests.clear()
    assert resolve("climbmix", shards=2) == source
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve("climbmix", shards=2) == source
    with pytest.raises(FileNotFoundError, match=r"shard_00002.parquet is missing and HF_HUB_OFFLINE"):
        resolve("climbmix", shards=3)
    assert server.requests == []

    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(FileNotFoundError, match=r"shard_00003.parquet does not exist \(404\)") as caught:
        resolve("climbmix", shards=4)
    assert "\n" not in str(caught.value)
    assert not (folder / "shard_00003.parquet").exists()
    with pytest.raises(ValueError, match="not 0"):
        resolve("climbmix", shards=0)


# Docstrings


def long_text(subject):
    return f"{subject}. " + " ".join(f"Sentence {i} about {subject}." for i in range(12))


@pytest.fixture
def packages(tmp_path):
    """Two folders as of installed packages: re-exports, nested definitions, duplicates, broken files, a booby trap."""
    first, second = tmp_path / "lib", tmp_path / "site-packages"
    trap = tmp_path / "imported"
    files = {
        first / "plain.py": f'"""{long_text("plain")}"""\n',
        first / "site-packages" / "other.py": f'"""{long_text("must not be seen")}"""\n',
        second / "numbers_" / "__init__.py": "from ._core import api\nfrom ._core.api import *\nimport os\n",
        second / "numbers_" / "_core" / "__init__.py": "",
        second / "numbers_" / "_core" / "api.py": "from .impl import argsort, Thing\n",
        second / "numbers_" / "_core" / "impl.py": f'''
if True:
    def argsort():
        """
        {long_text("argsort")}

            indented
        """
class Thing:
    \'\'\'{long_text("Thing")}\'\'\'
    async def method(self):
        r"""{long_text("method")}"""
        try:
            pass
        except ValueError:
            def nested():
                """{long_text("nested")} \\ud800"""
def hidden():
    """{long_text("hidden")}"""
''',
        second / "numbers_" / "copy.py": f'def duplicate():\n    """{long_text("hidden")}"""\n',
        second / "numbers_" / "short.py": '"""' + "x" * 199 + '"""\ndef f():\n    """' + "y" * 200 + '"""\n',
        second / "numbers_" / "python2.py": f'"""{long_text("python2")}"""\nprint "no"\n',
        second / "numbers_" / "null.py": f'"""{long_text("null")}\0"""\n',
        second / "trap.py": f'"""{long_text("trap")}"""\nopen({str(trap)!r}, "w")\n',
        second / "many.py": "".join(f'def f{i}():\n    """{long_text(f"many {i}")}"""\n' for i in range(40)),
    }
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    metadata = second / "many-1.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: many\nVersion: 1.0\n")
    return [str(first), str(second)], trap, metadata


@pytest.mark.slow
def test_pydocs(packages, ray_session, tmp_path, monkeypatch):
    roots, trap, metadata = packages
    source = sources.pydocs(roots)
    files = [shard.uri for shard in source.train + source.val]
    assert (len(source.train), len(source.val)) == (8, 1)
    table = pa.concat_tables([pq.read_table(file) for file in files]).to_pydict()
    by_name = dict(zip(table["name"], table["text"], strict=True))
    assert set(by_name) == {
        *("plain", "trap", "numbers_.argsort", "numbers_.Thing", "numbers_.Thing.method"),
        *("numbers_.Thing.method.nested", "numbers_.copy.duplicate", "numbers_.short.f"),
        *(f"many.f{i}" for i in range(40)),
    }
    assert by_name["numbers_.argsort"] == long_text("argsort") + "\n\n    indented"
    assert not trap.exists()
    assert len(set(table["text"])) == len(table["text"]) == len(documents(source.train + source.val))
    order = [name for name in table["name"] if name.startswith("many")]
    assert order != sorted(order, key=lambda name: int(name[6:]))

    def fail(*args):
        raise AssertionError("made again")

    with monkeypatch.context() as patch:
        patch.setattr(docstrings, "write_docstrings", fail)
        assert sources.pydocs(roots) == source
        metadata.write_text(metadata.read_text().replace("1.0", "2.0"))
        with pytest.raises(AssertionError, match="made again"):
            sources.pydocs(roots)

    # One file a task, in another order, elsewhere: the same bytes.
    monkeypatch.setattr(docstrings, "CHUNK_BYTES", 1)
    monkeypatch.setenv("NANOCHAT_RAY_HOME", str(tmp_path / "other"))
    again = sources.pydocs(roots[::-1])
    assert again.fingerprint != source.fingerprint
    for ours, theirs in zip(again.train + again.val, files, strict=True):
        assert fsspec.open(ours.uri).open().read() == fsspec.open(theirs).open().read()
