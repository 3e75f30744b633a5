"""Fixtures every test may use: the golden numbers, the data beside the repository, one Ray for the session."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported: its kernels then run on CPU tensors

REPOSITORY = Path(__file__).resolve().parents[1]
TIMEOUT = 30_000  # milliseconds of an action in the browser, for busy machines
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")


def pytest_collection_modifyitems(items):
    """Files with the most slow tests first, so that two processes have enough to share at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    """A test that takes it runs on a CPU, and again on a GPU. Matmuls in fp32 don't use TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield torch.device(request.param)
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def kernel_device(device):
    """Where Triton's kernels run: on the GPU, or where there is none on CPU tensors, in Triton's interpreter."""
    pytest.importorskip("triton")
    if device.type == "cpu" and torch.cuda.is_available():
        pytest.skip("the kernels run on the GPU itself")
    return device


@pytest.fixture(scope="session")
def golden() -> Path:
    return REPOSITORY / "tests" / "golden"


@pytest.fixture
def reference_model(golden):
    """A GPT with the weights that the reference numbers were computed with."""
    from safetensors import safe_open

    from nanochat_ray.model.gpt import GPT, GPTConfig

    with safe_open(golden / "model.safetensors", "pt") as f:
        model = GPT(GPTConfig(**json.loads(f.metadata()["config"])))
        model.load_state_dict({name: f.get_tensor(f"weights.{name}") for name in model.state_dict()})
    return model


@pytest.fixture(scope="session")
def shared() -> Path:
    """Data and large references kept beside the repository; a user's machine has none, so those tests skip."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no ../shared folder beside the repository")
    return folder


@pytest.fixture(autouse=True)
def nanochat_ray_home(tmp_path, monkeypatch):
    """Every test writes to a home of its own."""
    monkeypatch.setenv("NANOCHAT_RAY_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="session")
def ray_session():
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")  # before Ray starts, as its workers inherit it
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.fixture(scope="session")
def rows(tmp_path_factory, golden, ray_session):
    """Rows of 65 tokens from the standard library's help texts, with nanochat's reference tokenizer."""
    import pydoc_data.topics

    from nanochat_ray.data import prepare

    folder = tmp_path_factory.mktemp("text")
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    texts = [paragraph for text in topics for paragraph in text.split("\n\n") if len(paragraph) > 80]
    for i, part in enumerate((texts[::3], texts[1::3], texts[2::9])):
        (folder / f"part_{i}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_RAY_HOME", str(tmp_path_factory.mktemp("home")))
        options = prepare.PrepareOptions(str(folder), sequence_len=64, tokenizer=str(golden / "nanochat_d2"))
        return prepare.run(options).rows


@pytest.fixture(scope="module")
def browser():
    """Chromium, as long as its tests run: no other event loop can start in this thread meanwhile."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, CHROMIUMS)), None)
    if path is None:
        pytest.skip(f"no browser on this machine: none of {', '.join(CHROMIUMS)}")
    playwright.expect.set_options(timeout=TIMEOUT)
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def context(browser):
    """A browser's profile. Any uncaught error in a page, or breach of its content security policy, fails the test."""
    errors = []
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    context.set_default_timeout(TIMEOUT)
    context.on("weberror", lambda error: errors.append(str(error.error)))
    context.on("console", lambda message: "Security Policy" in message.text and errors.append(message.text))
    yield context
    context.close()
    assert errors == []


@pytest.fixture
def page(context):
    return context.new_page()
