"""CORE: nanochat's decisions, one forward a choice as the reference, odd and damaged bundles, any number of actors."""

import io
import json
import math
import os
import random
import re
import signal
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import psutil
import pytest
import ray
import torch
import torch.nn.functional as F

from nanochat_ray.data import download
from nanochat_ray.data.tokenizer import Tokenizer
from nanochat_ray.evals import bundle, core
from nanochat_ray.model.gpt import GPT, GPTConfig
from nanochat_ray.train import hosts
from nanochat_ray.train.checkpoint import import_nanochat, load_model, save_checkpoint

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "12", "1999", "red,", "blue.", "don't", "Ünï", "(", "x=1", "你好"]


def sentence(rng, words):
    return " ".join(rng.choice(WORDS) for _ in range(words))


def write_bundle(folder, tasks):
    """tasks: {name: (kind, shots, delimiter or None, percent by guessing, examples)}"""
    entries, rows = [], ["Eval Task,Task Category,Random baseline"]
    for name, (kind, shots, delimiter, percent, examples) in tasks.items():
        entry = {"label": name, "dataset_uri": f"some/{name}.jsonl", "num_fewshot": [shots], "icl_task_type": kind}
        entries.append(entry | ({} if delimiter is None else {"continuation_delimiter": delimiter}))
        rows.append(f"{name},words,{percent}")
        file = folder / "eval_data" / "some" / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(example) + "\n" for example in examples))
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": entries}))  # JSON is YAML
    (folder / "eval_meta_data.csv").write_text("\n".join([*rows, "not_in_yaml,words,10"]))
    return folder


@pytest.fixture
def odd_tasks():
    """Each kind of task with what may go wrong: prompts far longer than T, choices that are empty, equal or the
    beginning of each other, texts that begin or end with whitespace or are empty, delimiters of all sorts."""
    rng = random.Random(0)

    def choices(n):
        return [sentence(rng, rng.randint(1, 6)) for _ in range(n)]

    plain = [{"query": sentence(rng, 8), "choices": choices(4), "gold": rng.randrange(4)} for _ in range(12)]
    letters = [{"query": sentence(rng, 5), "choices": ["A", "B", "C"], "gold": rng.randrange(3)} for _ in range(9)]
    odd = [
        {"query": "the dog", "choices": ["", "ran", "sat"], "gold": 0},
        {"query": "the dog", "choices": ["ran", "ran", "ran"], "gold": 0},
        {"query": " a cat ", "choices": ["cat cat cat", "dog", "dog", "cat cat cat"], "gold": 3},
        {"query": "", "choices": ["ran", "ran off"], "gold": 1},
        {"query": "\n\n", "choices": ["ran off", "ran"], "gold": 1},
        {"query": "x\r\n", "choices": ["only one"], "gold": 0},
    ]
    contexts = [{"context_options": choices(2), "continuation": sentence(rng, 4), "gold": i % 2} for i in range(10)]
    contexts[3] = {"context_options": ["the cat", "the cat"], "continuation": "sat", "gold": 1}
    contexts[4] = {"context_options": ["cat", "cat cat cat"], "continuation": "cat cat", "gold": 1}
    continued = [{"context": sentence(rng, 9) + "\n ", "continuation": sentence(rng, 2)} for _ in range(10)]
    return {
        "plain": ("multiple_choice", 5, "\nAnswer: ", 25, plain),
        "letters": ("multiple_choice", 10, None, 33.3, letters),
        "odd": ("multiple_choice", 3, None, 50, odd),
        "unseparated": ("multiple_choice", 2, "", 50, odd[:3]),
        "schema": ("schema", 4, None, 50, contexts),
        "no_shots": ("schema", 0, " - ", 50, contexts),
        "continued": ("language_modeling", 7, None, 0, continued),
        "answers": ("language_modeling", 0, "\nA: ", 0, continued),
    }


@pytest.fixture(scope="module")
def tokenizer(golden):
    return Tokenizer.load(str(golden / "nanochat_d2"))


@pytest.fixture(scope="module")
def model(tokenizer):
    """Grouped heads, T 48 (windows 48 and 128), every weight at work."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(48, tokenizer.vocab_size, 3, n_head=4, n_kv_head=2, n_embd=64, window_pattern="LSL"))
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std={"lm_head.weight": 0.4, "transformer.wte.weight": 1.0}.get(name, 0.15))
    return model.eval()


def shared_start(sequences):
    return next((i for i, t in enumerate(zip(*sequences, strict=False)) if len(set(t)) > 1), min(map(len, sequences)))


@torch.no_grad()
def reference(model, tokenizer, kind, shots, delimiter, examples, max_per_task=-1):
    """The definition, word by word: whole prompts, one forward a choice. {correct} and the mean losses of each."""
    delimiter = " " if delimiter is None else delimiter
    examples = list(examples)
    random.Random(1337).shuffle(examples)
    examples = examples[:max_per_task] if max_per_task > 0 else examples
    judged = []
    for i, item in enumerate(examples):
        others = [j for j in range(len(examples)) if j != i]
        prompt = ""
        for shot in [examples[j] for j in random.Random(1234 + i).sample(others, min(shots, len(others)))]:
            if kind == "multiple_choice":
                prompt += shot["query"] + delimiter + shot["choices"][shot["gold"]] + "\n\n"
            elif kind == "schema":
                prompt += shot["context_options"][shot["gold"]] + delimiter + shot["continuation"] + "\n\n"
            else:
                prompt += shot["context"].strip() + delimiter + shot["continuation"] + "\n\n"
        if kind == "multiple_choice":
            texts = [prompt + item["query"] + delimiter + choice for choice in item["choices"]]
        elif kind == "schema":
            texts = [prompt + context + delimiter + item["continuation"] for context in item["context_options"]]
        else:
            texts = [prompt + item["context"].strip() + delimiter + item["continuation"]]
        sequences = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts]
        if kind == "multiple_choice":
            starts = [shared_start(sequences)] * len(sequences)
        elif kind == "schema":
            suffix = shared_start([sequence[::-1] for sequence in sequences])
            starts = [max(1, len(sequence) - suffix) for sequence in sequences]
        else:
            starts = [1 + len(tokenizer.encode((prompt + item["context"].strip() + delimiter).strip()))]
        means, likeliest = [], []
        for sequence, start in zip(sequences, starts, strict=True):
            logits, targets = (
                model(torch.tensor([sequence[:-1]]))[0, start - 1 :],
                torch.tensor(sequence[start:], dtype=torch.long),
            )
            means.append(F.cross_entropy(logits, targets).item())
            likeliest.append(bool((logits.argmax(-1) == targets).all()))
        if kind == "language_modeling":
            judged.append({"correct": likeliest[0], "len": len(sequences[0]), "start": starts[0]})
        else:
            judged.append({"correct": means.index(min(means)) == item["gold"], "mean_losses": means})
    return judged


def assert_same(ours, theirs, atol):
    assert len(ours) == len(theirs)
    for mine, reference in zip(ours, theirs, strict=True):
        losses = reference.get("mean_losses", [])
        assert mine.get("mean_losses", []) == pytest.approx(losses, abs=atol, nan_ok=True)
        ordered = sorted(loss for loss in losses if not math.isnan(loss))
        tied = len(ordered) > 1 and 0 < ordered[1] - ordered[0] < atol
        for key in reference.keys() - {"mean_losses"}:
            assert mine[key] == reference[key] or tied, (mine, reference)


# Decisions


def test_nanochats_decisions(shared, tmp_path):
    """18 tasks, prompts to 4,800 tokens at T 512: every decision, and every mean loss to 1e-4."""
    source = shared / "golden" / "nanochat_d2"
    import_nanochat(str(source / "nanochat/base_checkpoints/d2"), str(tmp_path), str(source / "nanochat/tokenizer"))
    model, tokenizer, _ = load_model(str(tmp_path), "cpu", "float32")
    expected = json.loads((source / "core_decisions.json").read_text())
    result = core.evaluate_core(model, tokenizer, str(shared / "eval_bundle"), expected["max_per_task"])
    assert list(result.examples) == list(expected["tasks"])
    for task, examples in expected["tasks"].items():
        assert_same(result.examples[task], examples, atol=1e-4)
        for mine, theirs in zip(result.examples[task], examples, strict=True):
            assert mine.get("pred") == theirs.get("pred") and mine["correct"] == theirs["correct"]


@pytest.mark.parametrize("budget", [1, 700, 100_000])
def test_same_as_one_forward_a_choice(odd_tasks, model, tokenizer, tmp_path, monkeypatch, budget):
    """Whatever shares a batch, and though most of what is beyond the windows is never run."""
    monkeypatch.setitem(core.FORWARD_TOKENS, "cpu", budget)
    result = core.evaluate_core(model, tokenizer, str(write_bundle(tmp_path, odd_tasks)))
    lengths = []
    for name, (kind, shots, delimiter, percent, examples) in odd_tasks.items():
        theirs = reference(model, tokenizer, kind, shots, delimiter, examples)
        lengths += [example["len"] for example in theirs if "len" in example]
        assert_same(result.examples[name], theirs, atol=1e-4)
        accuracy = sum(example["correct"] for example in theirs) / len(theirs)
        assert result.accuracy[name] == pytest.approx(accuracy)
        assert result.centered[name] == pytest.approx((accuracy - percent / 100) / (1 - percent / 100))
    assert result.core_metric == pytest.approx(sum(result.centered.values()) / len(odd_tasks))
    assert max(lengths) > sum(model.config.window_sizes)


def test_few_examples_of_some_tasks(odd_tasks, model, tokenizer, tmp_path):
    """More shots than other examples: all others are shown. The order of tasks is the one asked for."""
    folder = str(write_bundle(tmp_path, odd_tasks))
    result = core.evaluate_core(model, tokenizer, folder, max_per_task=4, tasks=["continued", "letters"])
    assert list(result.accuracy) == ["continued", "letters"]
    for name in result.examples:
        kind, shots, delimiter, _, examples = odd_tasks[name]
        assert_same(result.examples[name], reference(model, tokenizer, kind, shots, delimiter, examples, 4), atol=1e-4)


def test_a_continuation_is_right_when_each_token_is_the_likeliest(model, tokenizer, tmp_path):
    """Contexts go on with what the model says is next, or with something else."""
    rng, examples = random.Random(1), []
    while len(examples) < 12:
        context = sentence(rng, 6)
        [prompt] = [[tokenizer.bos_id, *tokenizer.encode(context + " ->")]]
        with torch.no_grad():
            greedy = model(torch.tensor([prompt]))[0, -1].argmax().item()
        text = tokenizer.decode([greedy])
        if tokenizer.encode(context + " ->" + text) == [*prompt[1:], greedy] and text.strip() == text:
            examples.append({"context": context, "continuation": text if len(examples) % 3 else "cat"})
    folder = write_bundle(tmp_path, {"said": ("language_modeling", 0, " ->", 0, examples)})
    result = core.evaluate_core(model, tokenizer, str(folder))
    assert result.accuracy["said"] == pytest.approx(8 / 12)


def test_longer_than_the_models_reach(tokenizer, tmp_path, capsys):
    """A prompt of more than 10·T tokens loses its beginning, and only then. A choice that is longer alone is wrong."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(8, tokenizer.vocab_size, n_layer=1, n_head=1, n_kv_head=1, n_embd=32, window_pattern="L"))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    contexts = [{"context": "cat dog " * n, "continuation": "sat"} for n in (30, 39, 41, 200)]
    folder = write_bundle(tmp_path, {"long": ("language_modeling", 0, None, 0, contexts)})
    assert [e["len"] for e in core.evaluate_core(model, tokenizer, str(folder)).examples["long"]]
    choices = [{"query": "a", "choices": ["dog " * n, "cat"], "gold": 1} for n in (1, 200, 2)]
    folder = write_bundle(tmp_path, {"long": ("multiple_choice", 0, None, 0, choices)})
    result = core.evaluate_core(model, tokenizer, str(folder))
    assert [e["correct"] for e in result.examples["long"] if e["pred"] is None] == [False]
    assert "1 of 3 examples longer than the model's reach are counted as wrong" in capsys.readouterr().out
    core.save(result, str(tmp_path))


def test_bf16(odd_tasks, model, tokenizer, tmp_path):
    folder = str(write_bundle(tmp_path, odd_tasks))
    exact = core.evaluate_core(model, tokenizer, folder, tasks=["plain"]).examples["plain"]
    rounded = GPT(model.config)
    rounded.load_state_dict(model.state_dict())
    rounded.set_compute_dtype(torch.bfloat16)
    for a, b in zip(
        exact, core.evaluate_core(rounded, tokenizer, folder, tasks=["plain"]).examples["plain"], strict=True
    ):
        assert a["mean_losses"] == pytest.approx(b["mean_losses"], abs=0.3)
        assert a["mean_losses"] != b["mean_losses"]


def test_parts_have_the_tokens_of_the_whole(tokenizer):
    rng = random.Random(0)
    pieces = [
        "a",
        "Cat",
        " ",
        "\n",
        "\n\n",
        "\r\n",
        "\t",
        "1",
        "999",
        ".",
        "'s",
        "é",
        "\u3000",
        "\x1c",
        "\u4f60",
        "?!",
        "",
    ]
    prompts = [
        ["".join(rng.choices(pieces, k=rng.randint(0, 5))) for _ in range(rng.randint(1, 4))] for _ in range(3000)
    ]
    prompts += [[*(part + rng.choice(["\n\n", "\n"]) for part in parts[:-1]), parts[-1]] for parts in prompts]
    for parts, ids in zip(prompts, core.encode(tokenizer, prompts), strict=True):
        assert ids.tolist() == [tokenizer.bos_id, *tokenizer.encode("".join(parts))], parts
    other = Tokenizer(tokenizer.ranks, r"\s\S+|\S+|\s+", tokenizer.special_tokens)  # one that joins across line ends
    [ids] = core.encode(other, [["a\n\n", "b"]])
    assert ids.tolist() == [other.bos_id, *other.encode("a\n\nb")]


# Files


def test_what_run_writes(odd_tasks, model, tokenizer, tmp_path, capsys):
    checkpoint = save_checkpoint(str(tmp_path / "run"), 7, model, None, tokenizer, {})
    folder = str(write_bundle(tmp_path / "bundle", odd_tasks))
    options = core.CoreOptions(checkpoint, folder, tasks=["odd", "answers"], device="cpu", dtype="float32")
    result = core.run(options)
    with open(os.path.join(checkpoint, "core.csv")) as f:
        header, *rows, last = [line.split(",") for line in f.read().splitlines()]
    assert header == ["task", "examples", "accuracy", "centered"]
    assert [(name, int(n), float(a), float(c)) for name, n, a, c in rows] == [
        (name, len(result.examples[name]), pytest.approx(result.accuracy[name]), pytest.approx(result.centered[name]))
        for name in ("odd", "answers")
    ]
    assert last == ["CORE", "16", "", f"{result.core_metric:.6f}"]
    with open(os.path.join(checkpoint, "core_examples.jsonl")) as f:
        lines = [json.loads(line, parse_constant=pytest.fail) for line in f]  # no NaN, which JSON does not have
    assert [(line["task"], line["index"]) for line in lines] == [("odd", i) for i in range(6)] + [
        ("answers", i) for i in range(10)
    ]
    assert [line["correct"] for line in lines[:6]] == [example["correct"] for example in result.examples["odd"]]
    assert any(None in line["mean_losses"] for line in lines[:6])
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [["core", "odd"], ["core", "answers"]]


DAMAGE = {
    "no core.yaml": ("core.yaml", None, "core.yaml is missing"),
    "core.yaml is no YAML": ("core.yaml", "icl_tasks: [\n", "core.yaml"),
    "core.yaml lists nothing": ("core.yaml", "tasks: []", "core.yaml"),
    "unknown kind": ("core.yaml", None, "core.yaml: task t has icl_task_type 'essay'"),
    "no number of shots": ("core.yaml", None, "core.yaml: task t"),
    "no baselines": ("eval_meta_data.csv", None, "eval_meta_data.csv is missing"),
    "no baseline of the task": ("eval_meta_data.csv", "Eval Task,Random baseline\nu,25\n", "eval_meta_data.csv has no"),
    "baseline is no number": ("eval_meta_data.csv", "Eval Task,Random baseline\nt,?\n", "eval_meta_data.csv has no"),
    "baseline out of range": ("eval_meta_data.csv", "Eval Task,Random baseline\nt,100\n", "eval_meta_data.csv: "),
    "no examples": ("eval_data/some/t.jsonl", "\n\n", "t.jsonl holds no examples"),
    "no file of examples": ("eval_data/some/t.jsonl", None, "t.jsonl is missing"),
    "not JSON": ("eval_data/some/t.jsonl", '\n{"query": "a", "cho', "t.jsonl line 2"),
    "not an object": ("eval_data/some/t.jsonl", "[1]", "t.jsonl line 1"),
    "another kind": ("eval_data/some/t.jsonl", '{"context": "a", "continuation": "b"}', "t.jsonl line 1"),
    "no choices": ("eval_data/some/t.jsonl", '{"query": "a", "choices": [], "gold": 0}', "t.jsonl line 1"),
    "choice is no text": (
        "eval_data/some/t.jsonl",
        '{"query": "a", "choices": ["b", null], "gold": 0}',
        "t.jsonl line 1",
    ),
    "gold out of range": ("eval_data/some/t.jsonl", '{"query": "a", "choices": ["b"], "gold": 1}', "gold is 1 of 1"),
    "not UTF-8": ("eval_data/some/t.jsonl", b"\xff\xfe", "t.jsonl is damaged"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_one_line_naming_the_file(tmp_path, case):
    name, content, message = DAMAGE[case]
    kind = "essay" if case == "unknown kind" else "multiple_choice"
    folder = write_bundle(tmp_path, {"t": (kind, 0, None, 25, [{"query": "a", "choices": ["b", "c"], "gold": 1}])})
    if case == "no number of shots":
        content = (folder / name).read_text().replace('"num_fewshot": [0], ', "")
    if content is not None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    elif case != "unknown kind":
        (folder / name).unlink()
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        bundle.read_tasks(str(folder))
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_task(odd_tasks, tmp_path):
    with pytest.raises(ValueError, match=r"no task essay in .*core\.yaml; there are plain, letters"):
        bundle.read_tasks(str(write_bundle(tmp_path, odd_tasks)), names=["plain", "essay"])


class Server(ThreadingHTTPServer):
    """Serves `content` under any name, from where a Range says; the first answer breaks off after half of it."""

    def __init__(self, content):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.status, self.ranges = content, 200, []


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        content = self.server.content
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.server.ranges.append(start)
        self.send_response(206 if start else self.server.status)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if len(self.server.ranges) == 1 else content[start:])


@pytest.fixture
def server(tmp_path, odd_tasks, monkeypatch):
    folder, archive = write_bundle(tmp_path / "made", odd_tasks), io.BytesIO()
    (folder / "license").write_bytes(random.Random(0).randbytes(300_000))  # so that it arrives in several pieces
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            zipped.write(path, f"eval_bundle/{path.relative_to(folder)}")
            zipped.writestr(f"__MACOSX/eval_bundle/._{path.name}", b"\x00\x05\x16\x07")
        zipped.writestr("eval_bundle/../../outside", b"must not be written")
    server = Server(archive.getvalue())
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    monkeypatch.setattr(bundle, "URL", f"http://127.0.0.1:{server.server_address[1]}/eval_bundle.zip")
    monkeypatch.setattr(download, "FIRST_DELAY", 0.01)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_published_bundle_is_fetched_once(server, odd_tasks, nanochat_ray_home, tmp_path):
    folder = bundle.fetch()
    assert folder == str(nanochat_ray_home / "eval_bundle")
    assert bundle.read_tasks(folder) == bundle.read_tasks(str(tmp_path / "made"))
    files = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_relative_to(tmp_path / "made")]
    assert sorted(str(path.relative_to(folder)) for path in files) == sorted(
        ["core.yaml", "eval_meta_data.csv", "license", *(f"eval_data/some/{name}.jsonl" for name in odd_tasks)]
    )
    assert [start > 0 for start in server.ranges] == [False, True]  # broke off, went on from there
    assert bundle.fetch() == folder
    assert len(server.ranges) == 2


def test_a_damaged_download_is_not_kept(server, nanochat_ray_home):
    whole, middle = server.content, len(server.content) // 3
    server.content = whole[:middle] + bytes(64) + whole[middle + 64 :]
    with pytest.raises(ValueError, match=r"eval_bundle\.zip was damaged .* run again") as caught:
        bundle.fetch()
    assert "\n" not in str(caught.value)
    server.content = whole
    assert len(bundle.read_tasks(bundle.fetch())) == 8
    server.content, server.status = b"", 403
    for path in (nanochat_ray_home / "eval_bundle").rglob("core.yaml"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"eval_bundle\.zip can't be had: .*--bundle"):
        bundle.fetch()


# Spread over the cluster


@pytest.mark.slow
def test_any_number_of_actors_or_ranks(odd_tasks, model, tokenizer, tmp_path, ray_session, monkeypatch):
    monkeypatch.setitem(core.FORWARD_TOKENS, "cpu", 700)  # so that each task has several batches
    arguments = (model, tokenizer, str(write_bundle(tmp_path, odd_tasks)))
    here = core.evaluate_core(*arguments).examples

    @ray.remote(num_cpus=1)
    def on_rank(rank, arguments):
        torch.distributed.init_process_group("gloo", f"file://{tmp_path}/ranks", rank=rank, world_size=2)
        core.FORWARD_TOKENS["cpu"] = 700
        return core.evaluate_core(*arguments).examples

    results = ray.get([on_rank.remote(rank, arguments) for rank in range(2)])
    one, two = [core.evaluate_core(*arguments, actors=actors).examples for actors in (1, 2)]
    assert json.dumps(one) == json.dumps(two)  # to the last bit
    for result in (*results, one):
        for name, examples in here.items():
            assert_same(result[name], examples, atol=1e-5)
    with pytest.raises(ValueError, match="3 actors on 2 CPUs"):
        core.evaluate_core(*arguments, actors=3)


@pytest.mark.slow
def test_actors_that_find_no_room_are_not_waited_for(
    odd_tasks, model, tokenizer, tmp_path, ray_session, monkeypatch, capsys
):
    """One of two CPUs is held."""
    monkeypatch.setattr(hosts, "FIRST_LINE_SECONDS", 0.01)
    [task] = bundle.read_tasks(str(write_bundle(tmp_path, odd_tasks)), names=["plain"])
    items = core.build_items(task, tokenizer, model)
    holder = ray.remote(num_cpus=1)(type("Holder", (), {"hold": lambda self: None})).remote()
    ray.get(holder.hold.remote())
    try:
        scores = list(core.Scorers(model, 2)([[item] for item in items]))
    finally:
        ray.kill(holder)
    assert json.dumps(scores) == json.dumps([core.score(model, [item]) for item in items])
    assert re.match(r"core: waiting for a CPU, [012] of 2 are free, 0 s so far\n", capsys.readouterr().out)


@pytest.mark.slow
def test_a_killed_actor_is_started_again(odd_tasks, model, tokenizer, tmp_path, ray_session):
    [task] = bundle.read_tasks(str(write_bundle(tmp_path, odd_tasks)), names=["plain"])
    items = core.build_items(task, tokenizer, model)
    batches = [[item] for item in items]
    scorers = core.Scorers(model, 1)
    before = list(scorers(batches))
    for process in psutil.Process().children(recursive=True):  # of this session's Ray, and no other
        if "ray::Scorer" in " ".join(process.cmdline()):
            process.send_signal(signal.SIGKILL)
    assert list(scorers(batches)) == before
