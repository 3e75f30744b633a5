"""Storage on S3: a real API over HTTP, and the faults that it has."""

import json
import math
import os
import pickle
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import boto3
import pyarrow as pa
import pytest
import s3
import torch

from nanochat_ray import object_store, storage
from nanochat_ray.data.loader import Rows, write_rows
from nanochat_ray.data.sources import read_documents, resolve
from nanochat_ray.data.tokenizer import Tokenizer
from nanochat_ray.model.gpt import GPT, GPTConfig
from nanochat_ray.node_cache import localize
from nanochat_ray.train import checkpoint

BUCKET = "bucket"
PART = 10 * 2**20  # pyarrow's
CONTENT = os.urandom(3 * PART)


@pytest.fixture(scope="module")
def proxy():
    process, port = s3.start_moto()
    yield s3.Proxy(port)
    process.kill()
    process.wait()


@pytest.fixture
def store(proxy, monkeypatch, tmp_path):
    """A client of an empty bucket. The code under test has the proxy as its endpoint."""
    for key, value in environment(proxy).items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    proxy.faults.reset()
    client = boto3.client("s3", region_name="us-east-1", endpoint_url=f"http://127.0.0.1:{proxy.upstream}")
    client.create_bucket(Bucket=BUCKET)
    yield client
    proxy.faults.reset()
    for key in keys(client):
        client.delete_object(Bucket=BUCKET, Key=key)


@pytest.fixture
def few_attempts(monkeypatch):
    """Give up early, as these tests are about how."""
    monkeypatch.setattr(object_store, "ATTEMPTS", 2)
    monkeypatch.setattr(object_store, "REQUEST_SECONDS", 1.0)
    object_store._store.cache_clear()
    yield
    object_store._store.cache_clear()


def environment(proxy) -> dict[str, str]:
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true"}
    return keys | {"AWS_ENDPOINT_URL": proxy.url}


def keys(client) -> list[str]:
    return [entry["Key"] for entry in client.list_objects_v2(Bucket=BUCKET).get("Contents", [])]


def write(uri: str, content: bytes = CONTENT) -> None:
    with storage.writing(uri) as f:
        f.write(content)


def test_paths_and_uris():
    assert storage.join("s3://b/x?region=r&scheme=http", "y", "z.json") == "s3://b/x/y/z.json?region=r&scheme=http"
    assert storage.join("/a/b?c", "d") == "/a/b?c/d"
    assert storage.parent("s3://b/x/y?region=r") == "s3://b/x?region=r"
    assert storage.name("s3://b/x/y.txt.gz/?region=r") == "y.txt.gz"
    assert storage.absolute("s3://b/x/?region=r") == "s3://b/x?region=r"
    assert checkpoint.run_name("s3://b/runs/d4/checkpoints/step_000001?region=r") == "d4"
    with pytest.raises(ValueError, match="unknown endpoint in the query"):
        storage.filesystem("s3://b/x?endpoint=1")


def test_files_and_folders(store, proxy):
    home = f"s3://{BUCKET}/home"
    assert not storage.exists(home) and storage.listdir(home) == []
    storage.write_json(storage.join(home, "runs", "a b", "meta.json"), {"step": 1})
    storage.write_bytes(storage.join(home, "ü#%41.txt"), b"text")
    write(storage.join(home, "runs", "large"))
    assert keys(store) == ["home/runs/a b/meta.json", "home/runs/large", "home/ü#%41.txt"]
    assert storage.listdir(home) == ["runs", "ü#%41.txt"] and ("ü#%41.txt", 4) in storage.walk(home)
    assert storage.exists(home) and storage.exists(storage.join(home, "runs", "a b"))
    assert not storage.exists(storage.join(home, "run"))  # the beginning of a name is no folder
    assert storage.read_json(storage.join(home, "runs", "a b", "meta.json")) == {"step": 1}
    assert storage.read_text(storage.join(home, "ü#%41.txt")) == "text"
    large = storage.join(home, "runs", "large")
    assert storage.read_bytes(large) == CONTENT and storage.size(large) == len(CONTENT)
    assert abs(storage.modified(large).timestamp() - time.time()) < 60
    storage.remove(storage.join(home, "runs", "a b", "meta.json"))
    assert not storage.exists(storage.join(home, "runs", "a b"))
    for function in (storage.remove, storage.size, storage.modified, storage.read_bytes, localize):
        with pytest.raises(FileNotFoundError, match="s3://bucket/home/none does not exist"):
            function(storage.join(home, "none"))
    storage.remove(home)
    assert keys(store) == []


def test_the_query_names_the_endpoint(store, proxy, monkeypatch):
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    query = f"?endpoint_override={proxy.url.removeprefix('http://')}&scheme=http&region=us-east-1"
    uri = storage.join(f"s3://{BUCKET}/home{query}", "x.json")
    storage.write_json(uri, 1)
    assert keys(store) == ["home/x.json"] and storage.read_json(uri) == 1
    assert localize(uri).read_text() == "1\n"


def test_ray_is_given_the_same_place(store, proxy):
    filesystem, path = storage.filesystem(f"s3://{BUCKET}/runs/d4")
    pickled = pickle.loads(pickle.dumps(filesystem))
    assert pickled is filesystem  # with its retries, which pyarrow's own pickle forgets
    filesystem.create_dir(path)
    assert path == f"{BUCKET}/runs/d4" and keys(store) == []


def test_an_error_in_the_block_leaves_what_was_there(store, proxy):
    uri = f"s3://{BUCKET}/file"
    storage.write_bytes(uri, b"before")
    proxy.faults.reset()
    with pytest.raises(TypeError), storage.writing(uri) as f:
        f.writelines([CONTENT, None])
    assert storage.read_bytes(uri) == b"before"
    assert set(proxy.faults.requests) <= {"HEAD", "GET"}  # no upload was begun
    assert not store.list_multipart_uploads(Bucket=BUCKET).get("Uploads")


def test_an_upload_cut_short_is_not_seen(store, proxy, few_attempts):
    uri = f"s3://{BUCKET}/file"
    storage.write_bytes(uri, b"before")
    proxy.faults.decide = lambda method, path: s3.CUT if "partNumber=2" in path else None
    with pytest.raises(ConnectionError, match=uri):
        write(uri)
    proxy.faults.reset()
    assert storage.read_bytes(uri) == b"before"

    def half():
        yield CONTENT
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        object_store.upload(half(), uri)
    time.sleep(0.5)
    assert storage.read_bytes(uri) == b"before"


FAULTS = {
    "10 % of the requests fail": (s3.share(0.1, s3.SLOW_DOWN), 0.0),
    "10 % of the connections are cut": (s3.share(0.1, s3.CUT), 0.0),
    "a burst of SlowDown": (s3.burst(2, 6, s3.SLOW_DOWN), 0.0),
    "connections cut in the middle of a part": (s3.burst(1, 3, s3.CUT), 0.0),
    "200 ms of latency": (s3.burst(0, -1, None), 0.2),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_survived(store, proxy, fault):
    proxy.faults.decide, proxy.faults.latency = FAULTS[fault]
    uri = f"s3://{BUCKET}/home/{len(fault)}"
    start = time.monotonic()
    write(uri)
    assert storage.read_bytes(uri) == CONTENT
    assert localize(uri).read_bytes() == CONTENT
    number = 4 if proxy.faults.latency else 20
    for i in range(number):
        storage.write_json(storage.join(uri + "-small", f"{i:02d}.json"), i)
    assert [storage.read_json(storage.join(uri + "-small", n)) for n in storage.listdir(uri + "-small")] == [
        *range(number)
    ]
    survived = sum(proxy.faults.counts.values())
    print(f"{fault}: {survived} of {proxy.faults.requests.total()} requests, {time.monotonic() - start:.1f} s")
    assert survived >= 3 or proxy.faults.latency


ERRORS = {
    "expired": (lambda *_: s3.EXPIRED, PermissionError, "expired or wrong: renew"),
    "denied": (lambda *_: s3.DENIED, PermissionError, "no permission: allow"),
    "overloaded": (lambda *_: s3.SLOW_DOWN, ConnectionError, "is overloaded or broken: run again later"),
    "silent": (lambda *_: s3.SILENT, ConnectionError, "the endpoint can't be reached: check"),
}


@pytest.mark.parametrize("error", ERRORS)
def test_errors_are_one_line_with_the_remedy(store, proxy, few_attempts, error):
    uri = f"s3://{BUCKET}/home/x"
    proxy.faults.decide, kind, remedy = ERRORS[error]
    calls = [lambda: storage.exists(uri), lambda: storage.listdir(uri)]
    if error != "silent":
        calls += [lambda: storage.read_json(uri), lambda: storage.write_json(uri, 1), lambda: storage.remove(uri)]
    for call in calls:
        start = time.monotonic()
        with pytest.raises(kind) as raised:
            call()
        assert str(raised.value).startswith(f"{uri}: ") and remedy in str(raised.value)
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 400
        assert time.monotonic() - start < 10


def test_no_bucket_and_no_endpoint(store, proxy, few_attempts, monkeypatch):
    with pytest.raises(FileNotFoundError, match="s3://nowhere/x: no such bucket: create it"):
        storage.write_json("s3://nowhere/x", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match=r"s3://bucket/x: the endpoint can't be reached.*the endpoint"):
        storage.write_json(f"s3://{BUCKET}/x", 1)


def test_a_call_never_waits_longer_than_its_bound(store, proxy, monkeypatch):
    monkeypatch.setattr(object_store, "CALL_SECONDS", 1.0)
    proxy.faults.latency = 4.0
    start = time.monotonic()
    with pytest.raises(ConnectionError, match="no answer in 1 s"):
        storage.exists(f"s3://{BUCKET}/x")
    assert time.monotonic() - start < 3


def test_the_cache_of_a_node_is_bounded(store, proxy, monkeypatch):
    monkeypatch.setenv("NANOCHAT_RAY_CACHE_GB", str(25 * 2**20 / 2**30))
    uris = [f"s3://{BUCKET}/file{i}" for i in range(4)]
    for uri in uris:
        storage.write_bytes(uri, uri.encode() * (PART // len(uri)))
    copies = [localize(uri) for uri in uris[:2]]
    for age, copy in ((3000, copies[0]), (2000, copies[1])):
        os.utime(copy, (time.time() - age,) * 2)
    mapped = pa.memory_map(str(copies[0]))
    copies.append(localize(uris[2]))
    assert [copy.exists() for copy in copies] == [True, False, True]  # the oldest is mapped
    copies.append(localize(uris[3]))
    assert [copy.exists() for copy in copies] == [True, False, True, True]  # one may be about to be opened
    mapped.close()
    os.utime(copies[3], (time.time() - 1000,) * 2)
    assert localize(uris[1]) == copies[1]
    assert [copy.exists() for copy in copies] == [False, True, True, False]
    proxy.faults.reset()
    localize(uris[1])
    assert proxy.faults.requests == {"HEAD": 1}  # a look whether the file has changed
    storage.write_bytes(uris[1], b"new")
    assert localize(uris[1]).read_bytes() == b"new"


def test_of_several_that_want_a_file_one_downloads_it(store, proxy):
    """As the ranks of a node do at the start. Each has a file of its own open, so threads lock as processes do."""
    uri = f"s3://{BUCKET}/rows"
    write(uri)
    proxy.faults.reset()
    proxy.faults.latency = 0.1
    with ThreadPoolExecutor(4) as pool:
        copies = list(pool.map(localize, [uri] * 4))
    assert proxy.faults.requests["GET"] == math.ceil(len(CONTENT) / object_store.PIECE_BYTES)
    assert len(set(copies)) == 1 and copies[0].read_bytes() == CONTENT


def test_sources_and_rows(store, proxy, tmp_path):
    folder = f"s3://{BUCKET}/text/"
    for name, texts in (("a.jsonl", ["a", "b"]), ("b.jsonl", ["c"])):
        storage.write_bytes(storage.join(folder, name), "".join(json.dumps({"text": t}) + "\n" for t in texts).encode())
    source = resolve(folder)
    assert [list(read_documents(shard)) for shard in source.train + source.val] == [["a", "b"], ["c"]]
    assert resolve(folder).fingerprint == source.fingerprint
    storage.write_bytes(storage.join(folder, "b.jsonl"), b'{"text": "d"}\n')
    assert resolve(folder).fingerprint != source.fingerprint
    write_rows(tmp_path / "rows.arrow", torch.arange(50).reshape(5, 10).numpy())
    storage.publish(tmp_path / "rows.arrow", f"s3://{BUCKET}/rows/train/rows_00000.arrow")
    assert Rows(f"s3://{BUCKET}/rows/train")[[4]].tolist() == [[*range(40, 50)]]


@pytest.fixture(scope="module")
def model(golden):
    tokenizer = Tokenizer.load(str(golden / "nanochat_d2"))
    model = GPT(GPTConfig(64, tokenizer.vocab_size, n_layer=2, n_head=2, n_kv_head=2, n_embd=64))
    model.init_weights()
    return model, tokenizer


def test_checkpoints(store, proxy, model, capsys):
    run_dir = f"s3://{BUCKET}/runs/d2"
    proxy.faults.decide = s3.share(0.1, s3.SLOW_DOWN)
    for step in (1, 2, 3, 4):
        saved = checkpoint.save_checkpoint(run_dir, step, model[0], None, model[1], {"val/bpb": float(step)})
    assert [storage.name(folder) for folder in checkpoint.checkpoints(run_dir)] == [
        f"step_00000{step}" for step in (1, 3, 4)
    ]
    assert checkpoint.latest_checkpoint(run_dir) == saved
    loaded, tokenizer, meta = checkpoint.load_model(run_dir, dtype="float32")
    assert meta["step"] == 4 and tokenizer.sha == model[1].sha
    for name, p in model[0].named_parameters():
        assert torch.equal(p, loaded.get_parameter(name)), name
    weights = storage.join(saved, "model.safetensors")
    storage.write_bytes(weights, storage.read_bytes(weights)[:-1])
    assert checkpoint.load_model(run_dir)[2]["step"] == 3
    assert "model.safetensors is damaged" in capsys.readouterr().out


def test_a_save_that_fails_is_not_a_checkpoint(store, proxy, model, few_attempts):
    run_dir = f"s3://{BUCKET}/runs/d2"
    good = checkpoint.save_checkpoint(run_dir, 1, model[0], None, model[1], {"val/bpb": 1.0})
    proxy.faults.decide = lambda method, path: s3.CUT if method == "PUT" and "model.safetensors" in path else None
    with pytest.raises(OSError, match=r"step_000002/model\.safetensors"):
        checkpoint.save_checkpoint(run_dir, 2, model[0], None, model[1], {"val/bpb": 1.0})
    proxy.faults.reset()
    assert checkpoint.latest_checkpoint(run_dir) == good
    assert storage.listdir(storage.join(run_dir, "checkpoints")) == ["step_000001"]


def test_training_goes_on_while_a_checkpoint_is_uploaded(store, proxy, model):
    proxy.faults.latency = 0.2
    writer = checkpoint.Writer(f"s3://{BUCKET}/runs/d2", model[1])
    start = time.monotonic()
    writer.start(1, model[0], None, {})
    waited = time.monotonic() - start
    while not writer.written():
        time.sleep(0.01)
    written = time.monotonic() - start
    assert writer.finish() is None
    writer.close()
    print(f"the loop waits {waited:.3f} s for the start of an upload of {written:.1f} s")
    assert waited < 0.2 < 0.8 < written
