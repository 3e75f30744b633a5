"""Storage on Google's and Azure's APIs over HTTP: emulators of both. Skipped where one is not installed.

Azurite is a package of npm: `npm install -g azurite`. What all stores share is tested on S3, in test_storage.py.
"""

import importlib.util
import multiprocessing
import os
import pickle
import shutil
import sys
import tempfile
import threading
import time

import pytest
import s3
from pyarrow import fs as pafs

from nanochat_ray import object_store, storage
from nanochat_ray.data.tokenizer import Tokenizer
from nanochat_ray.model.gpt import GPT, GPTConfig
from nanochat_ray.node_cache import localize
from nanochat_ray.train import checkpoint

CONTENT = os.urandom(20 * 2**20)
# The emulator answers one request at a time else, and one file is read by several at once.
GOOGLE = """
import http.server, sys
http.server.HTTPServer = http.server.ThreadingHTTPServer
from gcp_storage_emulator.__main__ import main
main(["start", "--in-memory", "--host=127.0.0.1", "--default-bucket=bucket", *sys.argv[1:]])
"""
ACCOUNT = "devstoreaccount1"  # Azurite's, and the key that it is documented with
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
AZURE = "DefaultEndpointsProtocol=http;AccountName={account};AccountKey={key};BlobEndpoint={url}/{account};"


def start_google() -> tuple:
    if not importlib.util.find_spec("gcp_storage_emulator"):
        pytest.skip("gcp-storage-emulator is not installed")
    return s3.start_server(sys.executable, "-c", GOOGLE, "--port")


def start_azure() -> tuple:
    if not shutil.which("azurite-blob"):
        pytest.skip("azurite is not installed")
    options = ["--inMemoryPersistence", "--disableTelemetry", "--skipApiVersionCheck", "--blobHost=127.0.0.1"]
    return s3.start_server("azurite-blob", *options, "--blobPort")


STORES = {
    "gs": (start_google, "gs://{}", lambda url: {"STORAGE_EMULATOR_HOST": url}),
    "abfss": (
        start_azure,
        f"abfss://{{}}@{ACCOUNT}.dfs.core.windows.net",
        lambda url: {"AZURE_STORAGE_CONNECTION_STRING": AZURE.format(account=ACCOUNT, key=KEY, url=url)},
    ),
}


@pytest.fixture(scope="module", params=STORES)
def server(request):
    """(port, URI of a bucket, the store's environment for an endpoint)"""
    start, uri, environment = STORES[request.param]
    process, port = start()
    if request.param == "abfss":
        options = {f"{kind}_storage_authority": f"127.0.0.1:{port}" for kind in ("blob", "dfs")}
        options |= {f"{kind}_storage_scheme": "http" for kind in ("blob", "dfs")}
        pafs.AzureFileSystem(ACCOUNT, account_key=KEY, **options).create_dir("bucket")
    yield port, uri, environment
    process.kill()
    process.wait()


@pytest.fixture
def home(server, monkeypatch, tmp_path) -> str:
    port, uri, environment = server
    for name, value in environment(f"http://127.0.0.1:{port}").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    bucket = uri.format("bucket")
    yield f"{bucket}/home"
    monkeypatch.undo()
    for name, value in environment(f"http://127.0.0.1:{port}").items():
        monkeypatch.setenv(name, value)
    if storage.exists(f"{bucket}/home"):
        storage.remove(f"{bucket}/home")
    assert storage.listdir(bucket) == []


@pytest.fixture
def faults(server, monkeypatch):
    """A function that has requests go through a proxy, which treats them as `decide` says, and is given back.

    It is a process of its own: pyarrow keeps Python's lock in the first request after it has opened a file of Google's.
    """
    port, _, environment = server
    children = []

    def begin(decide):
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()

        def serve() -> None:
            proxy = s3.Proxy(port)
            proxy.faults.decide = decide
            theirs.send(proxy.url)
            theirs.recv()
            theirs.send(proxy.faults.counts.total())

        children.append(context.Process(target=serve, daemon=True))
        children[-1].start()
        for name, value in environment(ours.recv()).items():
            monkeypatch.setenv(name, value)

        def counted() -> int:
            ours.send("end")
            return ours.recv()

        return counted

    yield begin
    for child in children:
        child.kill()
        child.join()


def test_files_and_folders(home):
    assert not storage.exists(home) and storage.listdir(home) == []
    meta, text, large = (storage.join(home, path) for path in ("runs/a b/x.json", "ü#%41.txt", "runs/large"))
    storage.write_json(meta, {"step": 1})
    storage.write_bytes(text, b"text")
    with storage.writing(large) as f:
        f.write(CONTENT)
    assert storage.listdir(home) == ["runs", "ü#%41.txt"] and ("ü#%41.txt", 4) in storage.walk(home)
    assert storage.listdir(storage.join(home, "runs")) == ["a b", "large"]
    assert storage.exists(storage.parent(meta)) and not storage.exists(storage.join(home, "run"))
    assert storage.read_json(meta) == {"step": 1} and storage.read_text(text) == "text"
    assert storage.size(large) == len(CONTENT) and storage.read_bytes(large) == CONTENT
    assert localize(large).read_bytes() == CONTENT
    assert abs(storage.modified(large).timestamp() - time.time()) < 60
    before = storage.version(text)
    storage.write_bytes(text, b"tuxt")
    assert storage.version(text) != before and localize(text).read_text() == "tuxt"
    filesystem = storage.filesystem(home)[0]
    assert pickle.loads(pickle.dumps(filesystem)) is filesystem
    storage.remove(meta)
    assert not storage.exists(storage.parent(meta))
    for function in (storage.remove, storage.size, storage.modified, storage.read_bytes, localize):
        with pytest.raises(FileNotFoundError, match=f"{home}/none does not exist"):
            function(storage.join(home, "none"))


def test_a_file_is_seen_whole_or_not_at_all(home, monkeypatch):
    uri = storage.join(home, "file")
    monkeypatch.setattr(object_store, "UNSENT_BYTES", 2**20)
    seen, stop = [], threading.Event()

    def pieces():
        for i in range(0, len(CONTENT), 2**20):
            seen.append(storage.size(uri) if storage.exists(uri) else None)
            if stop.is_set() and i:
                raise KeyboardInterrupt
            yield CONTENT[i : i + 2**20]

    object_store.upload(pieces(), uri)
    assert set(seen) == {None} and storage.read_bytes(uri) == CONTENT
    stop.set()
    with pytest.raises(KeyboardInterrupt):
        object_store.upload(pieces(), uri)
    assert storage.read_bytes(uri) == CONTENT and storage.listdir(home) == ["file"]


@pytest.mark.parametrize("fault", [s3.SLOW_DOWN, s3.CUT], ids=["slow down", "cut"])
def test_faults_are_survived(home, faults, fault):
    if fault == s3.CUT and home.startswith("abfss"):
        pytest.skip("pyarrow waits on a cut connection to Azure: the call ends at its bound, with an error")
    counted = faults(s3.share(0.1, fault))
    for i in range(6):
        storage.write_json(storage.join(home, f"{i:02d}.json"), i)
    assert [storage.read_json(storage.join(home, name)) for name in storage.listdir(home)] == [*range(6)]
    storage.write_bytes(storage.join(home, "large"), CONTENT)
    assert localize(storage.join(home, "large")).read_bytes() == CONTENT
    assert counted() > 0


ERRORS = {401: (PermissionError, "missing, expired or wrong: renew"), 403: (PermissionError, "no permission: allow")}


@pytest.mark.parametrize("status", ERRORS)
def test_errors_are_one_line_with_the_remedy(home, faults, status, monkeypatch):
    if home.startswith("gs"):
        faults(lambda *_: (status, "Error", "said so"))
    elif status == 401:
        said = os.environ["AZURE_STORAGE_CONNECTION_STRING"]
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", said.replace(KEY, KEY[::-1].strip("=") + "=="))
    else:
        pytest.skip("Azurite knows no keys without permission")
    uri = storage.join(home, "x")
    kind, remedy = ERRORS[status]
    for call in (storage.exists, storage.listdir, storage.read_bytes, lambda uri: storage.write_json(uri, 1)):
        with pytest.raises(kind) as raised:
            call(uri)
        assert str(raised.value).startswith(f"{uri}: ") and remedy in str(raised.value), raised.value
        assert "\n" not in str(raised.value)


def test_no_bucket_and_no_endpoint(home, server, monkeypatch):
    _, uri, environment = server
    nowhere = storage.join(uri.format("nowhere"), "x")
    with pytest.raises(FileNotFoundError, match=f"{nowhere}: no such bucket: create it"):
        storage.write_json(nowhere, 1)
    for name, value in environment("http://127.0.0.1:9").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(object_store, "CALL_SECONDS", 4.0)
    object_store._store.cache_clear()
    with pytest.raises(ConnectionError, match="the endpoint can't be reached"):
        storage.write_json(storage.join(home, "x"), 1)


def test_checkpoints(home, golden):
    run_dir = storage.join(home, "runs", "d1")
    tokenizer = Tokenizer.load(str(golden / "nanochat_d2"))
    model = GPT(GPTConfig(64, tokenizer.vocab_size, n_layer=1, n_head=1, n_kv_head=1, n_embd=64))
    model.init_weights()
    for step in (1, 2, 3, 4):
        saved = checkpoint.save_checkpoint(run_dir, step, model, None, tokenizer, {"val/bpb": float(step)})
    names = [storage.name(folder) for folder in checkpoint.checkpoints(run_dir)]
    assert names == ["step_000001", "step_000003", "step_000004"]
    assert checkpoint.latest_checkpoint(run_dir) == saved
    assert checkpoint.load_model(run_dir, dtype="float32")[2]["step"] == 4
