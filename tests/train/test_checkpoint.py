import json
import pickle
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nanochat_ray.data.tokenizer import Tokenizer
from nanochat_ray.inference.engine import Engine
from nanochat_ray.inference.sampling import SamplingParams
from nanochat_ray.model.gpt import GPT, GPTConfig
from nanochat_ray.model.optim import build_optimizer
from nanochat_ray.train import checkpoint
from nanochat_ray.train.metrics import bits_per_byte


@pytest.fixture
def trained(golden):
    """A tiny model, its optimizer after a step, and a tokenizer."""
    return train_a_step(Tokenizer.load(str(golden / "nanochat_d2")), "cpu")


def train_a_step(tokenizer, device):
    with torch.device(device):  # as where a run begins: rotary tables that a CPU computed differ in their last bits
        model = GPT(GPTConfig(32, tokenizer.vocab_size, 2, 2, 2, 64, "SL"))
    torch.manual_seed(0)
    model.init_weights()
    optimizer = build(model)
    step(model, optimizer)
    return model, optimizer, tokenizer


def build(model):
    return build_optimizer(
        model, unembedding_lr=0.01, embedding_lr=0.1, matrix_lr=0.02, scalar_lr=0.1, weight_decay=0.1
    )


def step(model, optimizer):
    idx = torch.arange(64, device=model.cos.device).view(2, 32) ** 2 % model.config.vocab_size
    model(idx, idx.roll(-1, 1)).backward()
    optimizer.step()
    optimizer.zero_grad()


def save(run_dir, step, trained, bpb=None):
    return checkpoint.save_checkpoint(str(run_dir), step, *trained, {"val/bpb": bpb, "progress": {}})


@pytest.mark.parametrize("root", ["local", "memory://bucket"])
def test_what_is_saved_is_loaded(trained, tmp_path, root):
    run_dir = str(tmp_path / root) if root == "local" else f"{root}/{tmp_path.name}"
    folder = save(run_dir, 7, trained, bpb=1.5)
    model, tokenizer, meta = checkpoint.load_model(run_dir, "cpu", torch.float32)
    assert folder == checkpoint.latest_checkpoint(run_dir)
    assert meta["step"] == 7
    assert tokenizer.encode("naïve café") == trained[2].encode("naïve café")
    for name, p in trained[0].named_parameters():
        assert torch.equal(p, model.get_parameter(name)), name
    optimizer = build(model)
    checkpoint.load_optimizer(optimizer, folder)
    mine, theirs = optimizer.shard_state(), trained[1].shard_state()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key][1], theirs[key][1]) for key in mine)


def test_a_resumed_run_makes_the_same_step(golden, tmp_path, device):
    """To the last bit, in fp32: AdamW's first steps make as much of a tiny gradient as of a large one."""
    trained = train_a_step(Tokenizer.load(str(golden / "nanochat_d2")), device)
    folder = save(tmp_path, 1, trained)
    model, _, _ = checkpoint.load_model(folder, device, torch.float32)
    optimizer = build(model)
    checkpoint.load_optimizer(optimizer, folder)
    before = {name: p.clone() for name, p in model.named_parameters()}
    step(model, optimizer)
    step(*trained[:2])
    for name, p in trained[0].named_parameters():
        assert p.device.type == model.get_parameter(name).device.type == device.type
        assert not torch.equal(p, before[name]), name
        assert torch.equal(model.get_parameter(name), p), name


@pytest.mark.parametrize("damage", ["truncated", "missing", "flipped", "left over", "no meta", "torn meta"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(trained, tmp_path, capsys, damage):
    good, bad = save(tmp_path, 1, trained), tmp_path / "checkpoints" / "step_000002"
    save(tmp_path, 2, trained)
    file = bad / ("meta.json" if "meta" in damage else "optimizer_00000.safetensors")
    content = file.read_bytes()
    if damage in ("missing", "no meta"):
        file.unlink()
    elif damage == "flipped":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "left over":  # by a worker of an earlier attempt, which was elsewhere
        step(*trained[:2])
        other = save(tmp_path / "other", 2, trained)
        file.write_bytes((Path(other) / file.name).read_bytes())
    else:
        file.write_bytes(content[: len(content) // 2])
    assert checkpoint.latest_checkpoint(str(tmp_path)) == good
    if damage != "no meta":
        assert file.name in capsys.readouterr().out


def test_the_last_two_and_the_best_are_kept(trained, tmp_path):
    for step, bpb in enumerate([3.0, 1.0, 2.0, 2.5, 2.2], 1):
        save(tmp_path, step, trained, bpb)
    checkpoint.prune(str(tmp_path))
    kept = [folder.rpartition("_")[2] for folder in checkpoint.checkpoints(str(tmp_path))]
    assert kept == ["000002", "000004", "000005"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_are_refused_with_the_tensors_name(trained, tmp_path, value):
    model, _, tokenizer = trained
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[3, 5] = value
    folder = checkpoint.save_checkpoint(str(tmp_path), 1, model, None, tokenizer, {})
    with pytest.raises(ValueError, match=r"step_000001: transformer\.h\.1\.mlp\.c_fc\.weight holds NaN or Infinity"):
        checkpoint.load_model(folder)


def test_no_checkpoint_is_one_clear_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*nowhere"):
        checkpoint.load_model(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="float8"):
        checkpoint.compute_dtype("float8", "cpu")


@pytest.fixture
def imported(shared, tmp_path, device):
    source = shared / "golden" / "nanochat_d2" / "nanochat"
    folder = str(tmp_path / "imported")
    command = [sys.executable, "-m", "nanochat_ray.cli", "import", str(source / "base_checkpoints" / "d2"), folder]
    subprocess.run([*command, "--tokenizer", str(source / "tokenizer")], check=True, capture_output=True)
    return checkpoint.load_model(folder, device, torch.float32)


def test_a_nanochat_checkpoint_gives_its_bits_per_byte_and_text(imported, shared):
    model, tokenizer, meta = imported
    reference = shared / "golden" / "nanochat_d2"
    expected = json.loads((reference / "expected.json").read_text())
    rows = load_file(reference / "rows.safetensors")["rows"].long()
    batches = [(part[:, :-1], part[:, 1:]) for part in rows.split(16)]
    assert bits_per_byte(model, batches, tokenizer.token_bytes()) == pytest.approx(expected["bpb"], abs=1e-3)
    assert meta["step"] == 600
    for case in expected["greedy"]:
        assert [tokenizer.bos_id, *tokenizer.encode(case["prompt"])] == case["ids"]
        params = SamplingParams(max_tokens=len(case["greedy"]), temperature=0.0)
        (completion,) = Engine(model, tokenizer).generate([case["ids"]], params)
        assert completion.tokens == case["greedy"]
        assert tokenizer.decode(completion.tokens) == case["text"]


def test_an_older_nanochat_checkpoint_has_the_fields_of_its_time(golden, tmp_path, capsys):
    """It had no windows: today's default of SSSL would make another model of it."""
    sizes = {"sequence_len": 64, "vocab_size": 4096, "n_layer": 4, "n_head": 2, "n_embd": 64}
    model = GPT(GPTConfig(**sizes, n_kv_head=2))
    torch.save(model.state_dict(), tmp_path / "model_000007.pt")
    (tmp_path / "meta_000007.json").write_text(json.dumps({"model_config": sizes}))
    tokenizer = str(golden / "nanochat_d2")
    out = checkpoint.import_nanochat(str(tmp_path), str(tmp_path / "out"), tokenizer)
    assert checkpoint.read_meta(out)["model_config"] == sizes | {"n_kv_head": 2, "window_pattern": "L"}
    assert "gets their values of that time: n_kv_head 2, window_pattern L" in capsys.readouterr().out
    (tmp_path / "meta_000007.json").write_text(json.dumps({"model_config": sizes | {"window_pattern": "SL"}}))
    checkpoint.import_nanochat(str(tmp_path), str(tmp_path / "out"), tokenizer)
    assert checkpoint.read_meta(out)["model_config"]["window_pattern"] == "SL"
    del sizes["n_embd"]
    (tmp_path / "meta_000007.json").write_text(json.dumps({"model_config": sizes}))
    with pytest.raises(ValueError, match="model_config lacks n_embd"):
        checkpoint.import_nanochat(str(tmp_path), str(tmp_path / "out"), tokenizer)


def test_a_pickle_that_asks_for_more_than_data_is_refused(tmp_path):
    class Malice:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(Malice()))
    with pytest.raises(ValueError, match="refused"):
        checkpoint._nanochat_tokenizer(str(tmp_path))
    assert not (tmp_path / "owned").exists()


def test_importing_from_an_empty_folder_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model_000005\.pt in .*steps found: none"):
        checkpoint.import_nanochat(str(tmp_path), str(tmp_path / "out"), str(tmp_path), step=5)
    assert not (tmp_path / "out").exists()


def test_files_that_an_unfinished_save_left_are_not_read(trained, tmp_path):
    folder = save(tmp_path, 3, trained)
    stray = tmp_path / "checkpoints" / "step_000003" / "optimizer_00001.safetensors"
    stray.write_bytes((stray.parent / "optimizer_00000.safetensors").read_bytes())
    optimizer = trained[1]
    before = {key: value.clone() for key, (_, value) in optimizer.shard_state().items()}
    checkpoint.load_optimizer(optimizer, folder)
    assert all(torch.equal(before[key], value) for key, (_, value) in optimizer.shard_state().items())


class OnGpu(torch.Tensor):
    """A CPU's tensor that says it is a GPU's."""

    is_cuda = property(lambda self: True)


@pytest.fixture
def gpu_calls(monkeypatch):
    """The calls of streams and events, in order, without a GPU."""
    calls = []

    class Stream:
        def __init__(self, device):
            self.device = device

        def wait_stream(self, other):
            calls.append("copies wait for the step before")

        def wait_event(self, event):
            calls.append("training waits for the copies")

    class Event:
        def __init__(self, blocking):
            assert blocking  # the thread that writes sleeps meanwhile

        def record(self):
            calls.append("copied")

        def synchronize(self):
            calls.append("writing begins")

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, dtype, pin_memory: empty(*shape, dtype=dtype))
    for name, fake in {"Stream": Stream, "Event": Event, "current_stream": Stream, "stream": nullcontext}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return calls


def test_copies_from_a_gpu_are_waited_for_by_who_writes_and_by_the_optimizer(gpu_calls):
    table = torch.randn(4, 8).bfloat16().as_subclass(OnGpu)
    step = torch.zeros(1)  # AdamW keeps its step count on the CPU
    copies = checkpoint.HostCopies()
    files, arrived = copies.take({"a": {"table": table, "step": step}})
    arrived()
    copies.hold()
    copies.hold()  # only the first update after a save has to wait
    assert gpu_calls == [
        "copies wait for the step before", "copied", "writing begins", "training waits for the copies"
    ]  # fmt: skip
    assert torch.equal(files["a"]["table"], table) and files["a"]["table"].dtype == torch.bfloat16
    addresses = [t.data_ptr() for t in files["a"].values()]
    table.mul_(2)
    again, _ = copies.take({"a": {"table": table, "step": step + 1}})
    assert [t.data_ptr() for t in again["a"].values()] == addresses  # page-locking is slow: once is enough
    assert torch.equal(again["a"]["table"], table) and again["a"]["step"] == 1


def test_tables_in_bf16_are_written_in_fp32(tmp_path):
    table, matrix = torch.randn(4, 8).bfloat16(), torch.randn(8, 4).T
    checkpoint._write_tensors(str(tmp_path / "x.safetensors"), {"table": table, "matrix": matrix}, {"format": "pt"})
    written = load_file(tmp_path / "x.safetensors")
    assert written["table"].dtype == torch.float32
    assert torch.equal(written["table"], table.float()) and torch.equal(written["matrix"], matrix)
