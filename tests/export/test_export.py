"""What transformers and nanochat load of an export gives what our own model, engine and tokenizer give."""

import json
import pickle
import random
import sys
import threading
from base64 import b64decode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import torch
from safetensors import safe_open

from nanochat_ray.export import ExportOptions, hf, run
from nanochat_ray.inference.engine import Engine
from nanochat_ray.inference.sampling import SamplingParams
from nanochat_ray.train.checkpoint import import_nanochat, latest_checkpoint, load_model, read_meta

transformers = pytest.importorskip("transformers")
GREEDY = {"do_sample": False, "pad_token_id": 0}
SCRIPTS = [
    "Hello  world!\n\n\tIt's 12345 o'clock; WE'LL see.\r\n",
    "Grüße, naïve café — ¿qué? Ça va… ſ'S K",
    "Привет, мир! Γειά σου Κόσμε. Բարեւ",
    "日本語のテキスト、漢字とかな。你好,世界! 안녕하세요",
    "مرحبا بالعالم ١٢٣٤ שלום עולם नमस्ते दुनिया १२३ สวัสดีชาวโลก ๑๒",
    "🙂👩‍👩‍👧‍👦🇩🇪 e\u0301 \u200b\u00a0\u2028\u3000 x",
    "def f(x):\n        return x**2  # ½ Ⅷ ²\n" + " " * 40 + "\t\t\n\n\n",
    "",
    " ",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!!!!!!!!!!!!!!!!!!!!!-----------========",
]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def idx() -> torch.Tensor:
    """(2, 400) ids: longer than the windows and the context."""
    return torch.randint(4000, (2, 400), generator=torch.Generator().manual_seed(1))


def test_logits_are_ours_and_stay_so_when_saved_again(lively, exported, load, idx, tmp_path):
    expected = lively(idx)
    model = load(exported)
    torch.testing.assert_close(model(idx).logits, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(model(idx, logits_to_keep=1).logits, expected[:, -1:], atol=1e-4, rtol=0)
    model.save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map.keys() == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    torch.testing.assert_close(load(tmp_path)(idx).logits, expected, atol=1e-4, rtol=0)
    base = transformers.AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    torch.testing.assert_close(base(idx).last_hidden_state, lively.hidden(idx), atol=1e-4, rtol=0)


def test_it_gives_nanochats_own_numbers(reference_model, tokenizer, golden, load, tmp_path):
    hf.write(str(tmp_path), reference_model, tokenizer)
    model = load(tmp_path)
    with safe_open(golden / "model.safetensors", "pt") as f:
        logits = model(f.get_tensor("idx")).logits[:, -64:]
        torch.testing.assert_close(logits, f.get_tensor("logits_last64"), atol=1e-4, rtol=0)
    for case in json.loads((golden / "greedy.json").read_text()):
        said = model.generate(torch.tensor([case["prompt"]]), max_new_tokens=len(case["greedy"]), **GREEDY)
        assert said[0, len(case["prompt"]) :].tolist() == case["greedy"]


def test_greedy_answers_are_the_engines_in_a_padded_batch_too(lively, exported, load):
    draw = random.Random(2)
    prompts = [[draw.randrange(4000) for _ in range(length)] for length in (1, 2, 120, 300)]
    completions = Engine(lively).generate(prompts, SamplingParams(max_tokens=40, temperature=0.0))
    expected = [completion.tokens for completion in completions]
    model = load(exported)
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    said = model.generate(ids, attention_mask=mask, max_new_tokens=40, **GREEDY)
    assert said[:, longest:].tolist() == expected
    said = model.generate(torch.tensor(prompts[2:3]), max_new_tokens=40, **GREEDY)
    assert said[0, len(prompts[2]) :].tolist() == expected[2]


def test_padding_on_either_side_changes_nothing(exported, load, idx):
    model = load(exported)
    expected, ids = model(idx[:, :200]).logits, torch.zeros(4, 230, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for rows, columns in ((slice(0, 2), slice(0, 200)), (slice(2, 4), slice(30, 230))):
        ids[rows, columns], mask[rows, columns] = idx[:, :200], 1
    logits = model(ids, attention_mask=mask).logits
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[:2, :200], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits[2:, 30:], expected, atol=1e-4, rtol=0)


def test_the_cache_may_be_read_in_pieces_reordered_and_cropped(exported, load, idx):
    model = load(exported)
    expected = model(idx).logits
    cache = transformers.DynamicCache(config=model.config)
    pieces = [model(part, past_key_values=cache).logits for part in idx.split([300, 1, 2, 50, 47], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, atol=1e-4, rtol=0)
    cache.crop(-60)
    torch.testing.assert_close(model(idx[:, 340:], past_key_values=cache).logits, expected[:, 340:], atol=1e-4, rtol=0)
    beams = [model.generate(idx, max_new_tokens=6, num_beams=3, use_cache=cached, **GREEDY) for cached in (True, False)]
    assert beams[0].tolist() == beams[1].tolist()


def test_a_cache_of_fixed_size_is_refused(exported, load, idx):
    with pytest.raises(ValueError, match="takes a DynamicCache"):
        load(exported).generate(idx, max_new_tokens=2, cache_implementation="static", **GREEDY)


def test_the_vocabulary_may_grow(exported, load, idx, tmp_path):
    model = load(exported)
    expected = model(idx).logits
    model.resize_token_embeddings(4100, mean_resizing=False)
    model.save_pretrained(tmp_path)
    model = load(tmp_path)
    torch.testing.assert_close(model(idx).logits[..., :4096], expected, atol=1e-4, rtol=0)
    assert model(torch.tensor([[4099, 1]])).logits.shape == (1, 2, 4100)


def test_bf16_and_a_device_map(lively, exported, load, idx, run_dir):
    model = load(exported, dtype=torch.bfloat16, device_map={"": "cpu"})
    ours, *_ = load_model(run_dir, dtype="bfloat16")
    exact, expected = lively(idx), ours(idx)
    rounding = (expected - exact).abs().mean()  # of bf16, which differs between kernels
    assert (model(idx).logits - exact).abs().mean() < 1.5 * rounding
    assert (model(idx).logits - expected).abs().mean() < rounding


def test_weights_in_shards_and_in_bf16_to_an_object_store(lively, tokenizer, load, idx, tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "SHARD_BYTES", 2 * 10**6)
    hf.write(str(tmp_path), lively, tokenizer)
    assert len(list(tmp_path.glob("model-0000?-of-0000?.safetensors"))) > 1
    torch.testing.assert_close(load(tmp_path)(idx).logits, lively(idx), atol=1e-4, rtol=0)
    hf.write("memory://bucket/model", lively, tokenizer, torch.bfloat16)
    from nanochat_ray import storage

    assert storage.read_json("memory://bucket/model/config.json")["torch_dtype"] == "bfloat16"
    written = sum(size for name, size in storage.walk("memory://bucket/model") if name.endswith(".safetensors"))
    assert written == pytest.approx(2 * sum(p.numel() for p in lively.parameters()), rel=0.01)


def test_a_pipeline_talks_and_a_trainer_takes_a_step(exported, tmp_path):
    pipeline = transformers.pipeline("text-generation", exported, trust_remote_code=True, device="cpu")
    said = pipeline([{"role": "user", "content": "Hi"}], max_new_tokens=4)[0]["generated_text"]
    assert [message["role"] for message in said] == ["user", "assistant"]
    ids = torch.randint(4000, (64,)).tolist()
    rows = [{"input_ids": ids, "labels": ids}] * 2
    options = transformers.TrainingArguments(
        str(tmp_path), max_steps=1, use_cpu=True, report_to=[], save_strategy="no", gradient_checkpointing=True
    )
    before = pipeline.model.model.smear_lambda.clone()
    with torch.enable_grad():
        result = transformers.Trainer(pipeline.model, options, train_dataset=rows).train()
    assert 0 < result.training_loss < 100
    assert pipeline.model.model.smear_lambda != before


def test_the_loss_is_ours(lively, exported, load, idx):
    labels = idx.clone()
    labels[:, :100] = -100
    ours = lively(idx[:, :-1], labels[:, 1:].where(labels[:, 1:] >= 0, -1))
    torch.testing.assert_close(load(exported)(idx, labels=labels).loss, ours, atol=1e-4, rtol=0)


@pytest.fixture(scope="session")
def fast(exported):
    """Told not to run the model's code, as none is needed."""
    return transformers.AutoTokenizer.from_pretrained(exported, trust_remote_code=False)


def test_the_fast_tokenizer_gives_our_ids(tokenizer, fast, golden):
    draw = random.Random(3)
    alphabet = "".join(SCRIPTS)
    cases = json.loads((golden / "nanochat_d2" / "tokenizer_cases.json").read_text())
    texts = [*SCRIPTS, *(case["text"] for case in cases["encode"])]
    texts += ["".join(draw.choices(alphabet, k=draw.randrange(60))) for _ in range(500)]
    characters = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    texts += ["".join(draw.choices(characters, k=20)) for _ in range(500)]
    for text in texts:
        ids = fast(text, add_special_tokens=False).input_ids
        assert ids == tokenizer.encode(text), repr(text)
        assert fast.decode(ids) == tokenizer.decode(ids)
    assert fast("Hi").input_ids == [tokenizer.bos_id, *tokenizer.encode("Hi")]
    assert fast.eos_token == "<|assistant_end|>" and fast.padding_side == "left"
    assert fast("<|bos|>", add_special_tokens=False, split_special_tokens=True).input_ids == tokenizer.encode("<|bos|>")


def test_the_chat_template_renders_conversations_as_we_do(tokenizer, fast, golden):
    cases = json.loads((golden / "nanochat_d2" / "tokenizer_cases.json").read_text())["conversations"]
    assert any(isinstance(m["content"], list) for case in cases for m in case["conversation"]["messages"])
    for case in cases:
        rendered = fast.apply_chat_template(
            case["conversation"]["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        length = case["max_tokens"]
        assert rendered["input_ids"][:length] == case["ids"]
        assert rendered["assistant_masks"][:length] == case["mask"]
    asked = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Why? "}]}
    ids = fast.apply_chat_template(asked["messages"], add_generation_prompt=True, return_dict=False)
    assert ids == tokenizer.render_for_completion(asked)


def test_the_chat_template_knows_the_services_messages(fast):
    from serving.messages import Message, turns_of

    called = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    conversations = [
        [{"role": "user", "content": "One"}, {"role": "user", "content": "Two"}],
        [{"role": "assistant", "content": "First"}, {"role": "user", "content": "?"}],
        [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Rain?"}]},
            {"role": "assistant", "content": "Let me see. ", "tool_calls": [called]},
            {"role": "tool", "tool_call_id": "1", "content": "sunny"},
            {"role": "assistant", "content": "No."},
            {"role": "assistant", "content": "Take a hat."},
        ],
    ]
    for messages in conversations:
        turns = turns_of(("", Message.model_validate(message)) for message in messages)
        said = [[fast.apply_chat_template(m, tokenize=False)] for m in (messages, turns)]
        assert said[0] == said[1]
    assert 'Let me see. weather({"city": "Rome"})<|assistant_end|><|user_start|>sunny<|user_end|>' in said[0][0]


def test_nanochats_files_come_back_bit_for_bit(run_dir, lively, tokenizer, tmp_path):
    folder = run(ExportOptions(run_dir, str(tmp_path / "base"), format="nanochat"))
    assert folder == str(tmp_path / "base" / "chatsft_checkpoints" / "d4")
    out = import_nanochat(folder, str(tmp_path / "again"), str(tmp_path / "base" / "tokenizer"))
    model, again, meta = load_model(out, dtype="float32")
    for name, weight in lively.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    assert (again.ranks, again.pattern, again.special_tokens) == (
        tokenizer.ranks,
        tokenizer.pattern,
        tokenizer.special_tokens,
    )
    kept = ("model_config", "step", "val/bpb")
    assert [meta[key] for key in kept] == [read_meta(latest_checkpoint(run_dir))[key] for key in kept]
    encoding = pickle.loads((tmp_path / "base" / "tokenizer" / "tokenizer.pkl").read_bytes())  # as nanochat does
    assert encoding.encode_ordinary(SCRIPTS[0]) == tokenizer.encode(SCRIPTS[0])
    token_bytes = torch.load(tmp_path / "base" / "tokenizer" / "token_bytes.pt", weights_only=True)
    assert token_bytes.tolist() == tokenizer.token_bytes().tolist()


def test_nanochats_files_are_those_that_nanochat_wrote(shared, tmp_path):
    theirs = shared / "golden" / "nanochat_d2" / "nanochat"
    imported = import_nanochat(
        str(theirs / "base_checkpoints" / "d2"), str(tmp_path / "ours"), str(theirs / "tokenizer")
    )
    run(ExportOptions(imported, str(tmp_path / "base"), format="nanochat"))
    for name in ("base_checkpoints/d2/model_000600.pt", "tokenizer/token_bytes.pt"):
        mine, original = (torch.load(folder / name, weights_only=True) for folder in (tmp_path / "base", theirs))
        mine, original = (x if isinstance(x, dict) else {"": x} for x in (mine, original))
        assert mine.keys() == original.keys()
        assert all(torch.equal(mine[key], original[key]) and mine[key].dtype == original[key].dtype for key in mine)
    written = tmp_path / "base" / "tokenizer" / "tokenizer.pkl"
    mine, original = (pickle.loads(file.read_bytes()) for file in (written, theirs / "tokenizer" / "tokenizer.pkl"))
    assert mine.__getstate__() == original.__getstate__()


def test_the_card_tells_figures_recipe_and_how_to_run(run_dir, exported):
    with open(f"{exported}/README.md") as f:
        card = f.read()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "A chat model of" in card
    for row in (
        "bits per byte of validation text | 1.3000",
        "ChatCORE | 0.5000",
        "3 | 1.7000",
        "run | d4-lively",
        "data | pydocs-x-T256",
        "tokens a step | 4,096",
        "trained on | 2 CPUs",
    ):
        assert f"| {row} |\n" in card
    assert "| 8 | 1.2000 |" not in card, "that is after the checkpoint"
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert "trust_remote_code=True" in code and '"role": "user"' in code


def test_what_cannot_be_done_is_said_before_anything_is_written(run_dir, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    out = str(tmp_path / "out")
    with pytest.raises(ValueError, match="set HF_TOKEN"):
        run(ExportOptions(run_dir, out, push="me/model"))
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    with pytest.raises(ValueError, match="uploads a local folder"):
        run(ExportOptions(run_dir, "memory://out", push="me/model"))
    with pytest.raises(ValueError, match="format hf"):
        run(ExportOptions(run_dir, out, format="nanochat", push="me/model"))
    assert not (tmp_path / "out").exists()
    folder = latest_checkpoint(run_dir)
    with pytest.raises(ValueError, match="give another folder as OUT"):
        run(ExportOptions(run_dir, folder))
    assert latest_checkpoint(run_dir) == folder


class FakeHub(BaseHTTPRequestHandler):
    """Makes a repository, and takes files in one commit; refuses all but one token."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Authorization"] != "Bearer hf_right":
            return self.answer({"error": "Invalid credentials in Authorization header"}, 401)
        if self.path == "/api/repos/create":
            return self.answer({"url": f"{self.server.url}/{json.loads(body)['organization']}/model"})
        if "/preupload/" in self.path:
            files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
            return self.answer({"files": [file | {"shouldIgnore": False} for file in files]})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = b64decode(line["value"]["content"])
            commit = f"{self.server.url}/me/model/commit/{0:040}"
            return self.answer({"success": True, "commitUrl": commit, "commitOid": f"{0:040}"})
        self.answer({})

    def answer(self, document: dict, status: int = 200):
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_an_export_is_pushed_to_the_hub(run_dir, tmp_path, monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), FakeHub) as server:
        server.files, server.url = {}, f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # an earlier test may have set it
        options = ExportOptions(run_dir, str(tmp_path / "out"), push="me/model")
        try:
            monkeypatch.setenv("HF_TOKEN", "hf_wrong")
            with pytest.raises(OSError, match=r"me/model could not be pushed: .*401"):
                run(options)
            monkeypatch.setenv("HF_TOKEN", "hf_right")
            assert run(options) == f"{server.url}/me/model"
        finally:
            server.shutdown()
    assert server.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert b"# me/model" in server.files["README.md"]


def test_the_modeling_file_needs_torch_and_transformers_alone():
    import ast
    from pathlib import Path

    tree = ast.parse((Path(hf.__file__).parent / f"{hf.MODELING}.py").read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert {module.partition(".")[0] for module in modules} - sys.stdlib_module_names == {"torch", "transformers"}
