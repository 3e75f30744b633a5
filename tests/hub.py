"""A small Hub: folders of its layout, with a few rows in each dataset's own columns, and a server that plays it.

The server has the API that `datasets` and our downloads ask, and answers late, not at all, or with half a file where a
test says so.
"""

import hashlib
import json
import socket
import struct
import threading
from collections import defaultdict
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

ANIMALS = ["a cat", "a dog", "an eel", "an ox"]


def exam(i: int) -> dict:
    """A question as MMLU has them, answered by the i-th letter."""
    return {"question": f"Which is number {i}?", "subject": "zoology", "choices": ANIMALS, "answer": i}


def science(i: int, labels: str) -> dict:
    choices = {"text": [f"{animal}, {i}" for animal in ANIMALS[: len(labels)]], "label": list(labels)}
    return {"id": f"Q{i}", "question": f"What is {i}?", "choices": choices, "answerKey": labels[i % len(labels)]}


def word_problem(a: int, b: int) -> dict:
    answer = f"Ann has {a}+{b} = <<{a}+{b}={a + b}>>{a + b} eggs.\n#### {a + b}"
    return {"question": f"Ann has {a} and {b} eggs. How many?", "answer": answer}


def function(name: str, body: str, expected: int) -> dict:
    return {
        "task_id": f"HumanEval/{name}",
        "prompt": f'import math\n\n\ndef {name}(x):\n    """ The {name} of x """\n',
        "entry_point": name,
        "canonical_solution": f"    return {body}\n",
        "test": f"\n\nMETADATA = {{}}\n\n\ndef check(candidate):\n    assert candidate(3) == {expected}\n",
    }


def talk(*contents: str, system: str | None = None) -> dict:
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"messages": [{"role": "system", "content": system}] * (system is not None) + turns, "source": "test"}


ROWS = {
    ("allenai/ai2_arc", "ARC-Easy", "test"): [science(i, "ABCD") for i in range(4)],
    ("allenai/ai2_arc", "ARC-Easy", "train"): [science(i, "ABCD") for i in range(4, 10)],
    ("allenai/ai2_arc", "ARC-Challenge", "test"): [science(1, "ABC"), science(2, "1234")],
    ("allenai/ai2_arc", "ARC-Challenge", "train"): [science(4, "ABCD")],
    ("cais/mmlu", "all", "test"): [exam(i) for i in range(4)],
    ("cais/mmlu", "auxiliary_train", "train"): [{"train": exam(i % 4) | {"question": f"No. {i}?"}} for i in range(30)],
    ("openai/gsm8k", "main", "test"): [word_problem(3, 4), word_problem(600, 634)],
    ("openai/gsm8k", "main", "train"): [word_problem(i, 1) for i in range(9)],
    ("openai/openai_humaneval", "openai_humaneval", "test"): [
        function("double", "2 * x", 6),
        function("square", "math.prod([x, x])", 9),
    ],
    ("HuggingFaceTB/smol-smoltalk", "default", "test"): [talk("Hi", "Hello!")],
    ("HuggingFaceTB/smol-smoltalk", "default", "train"): [
        talk("Hi", "Hello!"),
        talk("Hi", "Yes?", "Nothing", "Fine.", system="Be brief."),
        *(talk(f"Say {i}", f"{i}") for i in range(20)),
    ],
}


def write_hub(folder, rows: dict[tuple[str, str, str], list[dict]]) -> str:
    """rows: by dataset, config and split. Each dataset gets its parquet files and the README.md that lists them."""
    for dataset in {name for name, _, _ in rows}:
        listed = {}
        for name, config, split in rows:
            if name == dataset:
                path = folder / name / config / f"{split}-00000-of-00001.parquet"
                path.parent.mkdir(parents=True, exist_ok=True)
                pq.write_table(pa.Table.from_pylist(rows[name, config, split]), path)
                listed.setdefault(config, []).append((split, path.relative_to(folder / name)))
        lines = ["---", "configs:"]
        for config, files in listed.items():
            lines += [f"- config_name: {config}", "  data_files:"]
            lines += [f"  - split: {split}\n    path: {path}" for split, path in files]
        (folder / dataset / "README.md").write_text("\n".join([*lines, "---", ""]))
    return str(folder)


COMMIT = hashlib.sha1(b"the only commit").hexdigest()


class Hub(ThreadingHTTPServer):
    """Serves the datasets below `folder` as the Hub does, and `folder`'s other files as they are.

    faults: by the end of a path, what happens to its next requests, one after the other: a status, with Retry-After for
    429, or "cut", half of the body and then a reset. gated: datasets that only HF_TOKEN `token` may read.
    """

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.url = folder, f"http://127.0.0.1:{self.server_address[1]}"
        self.faults: dict[str, list] = defaultdict(list)
        self.gated: set[str] = set()
        self.token = "hf_right"
        self.requests: list[tuple[str, str]] = []  # method and path
        self.injected: list[tuple[str, object]] = []
        self.lock = threading.Lock()

    def fault(self, path: str):
        with self.lock:
            for end, faults in self.faults.items():
                if path.endswith(end) and faults:
                    self.injected.append((path, faults[0]))
                    return faults.pop(0)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path))
        fault = self.server.fault(path)
        if isinstance(fault, int):
            return self.answer(fault, b"", {"Retry-After": "1"} if fault == 429 else {})
        kind, _, rest = path.removeprefix("/").partition("/")
        if kind == "api":
            owner, name, *rest = rest.removeprefix("datasets/").split("/", 2)
            dataset, found = f"{owner}/{name}", self.api
            arguments = (f"{owner}/{name}", rest[0] if rest else "")
        elif "/resolve/" in rest:
            dataset, _, file = rest.partition("/resolve/")
            found, arguments = self.file, (self.server.folder / dataset / file.partition("/")[2], fault)
        else:
            dataset, found, arguments = "", self.file, (self.server.folder / path.removeprefix("/"), fault)
        if dataset in self.server.gated and self.headers.get("Authorization") != f"Bearer {self.server.token}":
            said = {"X-Error-Code": "GatedRepo", "X-Error-Message": f"Access to dataset {dataset} is restricted."}
            return self.answer(401, b"", said)
        found(*arguments)

    def api(self, dataset: str, what: str):
        folder = self.server.folder / dataset
        if not folder.is_dir():
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        if what.startswith("paths-info"):
            wanted = self.body["paths"]
            files = [path for path in files if str(path.relative_to(folder)) in wanted]
        if what.startswith("tree"):
            below = folder / what.removeprefix("tree").strip("/").partition("/")[2]
            files = [path for path in files if path.is_relative_to(below)]
            if not files:
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        if what.startswith(("tree", "paths-info")):
            return self.json([entry(path, folder) for path in files])
        about = {"id": dataset, "sha": COMMIT, "private": False, "gated": False, "disabled": False, "tags": []}
        self.json(about | {"siblings": [{"rfilename": str(path.relative_to(folder))} for path in files]})

    def file(self, file: Path, fault):
        if not file.is_file():
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        data = file.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        headers["Last-Modified"] = format_datetime(datetime.fromtimestamp(file.stat().st_mtime, UTC), usegmt=True)
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last) + 1 if last else len(data), len(data))
        if start >= len(data):
            return self.answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        if "Range" in self.headers:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        self.answer(206 if "Range" in self.headers else 200, data[start:end], headers, cut=fault == "cut")

    def json(self, value):
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json", "X-Repo-Commit": COMMIT})

    def answer(self, status: int, body: bytes, headers: dict, cut: bool = False):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except (ConnectionError, ValueError):  # the client has left, or a cut closed the connection
            self.close_connection = True


def entry(path: Path, folder: Path) -> dict:
    data = path.read_bytes()
    oid = hashlib.sha1(data).hexdigest()
    return {"type": "file", "oid": oid, "size": len(data), "path": str(path.relative_to(folder))}


@contextmanager
def serving(folder: Path):
    hub = Hub(folder)
    thread = threading.Thread(target=hub.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield hub
    hub.shutdown()
    hub.server_close()
    thread.join()
