"""Services to talk to."""

from collections.abc import Iterator

import pytest
from scripted_service import ScriptedService


@pytest.fixture
def scripted():
    """A service without a model: `scripted.script` says what it answers."""
    with ScriptedService() as service:
        yield service


SUM = [
    {"type": "text", "text": "It is "},
    {"type": "python", "text": "600+34"},
    {"type": "python_output", "text": "634"},
    {"type": "text", "text": "634."},
]
LEARNED = [
    [("Hi", "Hello!"), ("And you?", "Fine.")],
    [("Count", "one two three four five")],
    [("600 and 34?", SUM)],
]


@pytest.fixture(scope="session")
def checkpoints(golden, tmp_path_factory) -> dict[str, str]:
    """Folders of two small models: one knows LEARNED by heart, one says anything, for as long as it may."""
    import torch
    import torch.nn.functional as F

    from nanochat_ray.data.tokenizer import Tokenizer
    from nanochat_ray.model.gpt import GPT, GPTConfig
    from nanochat_ray.train.checkpoint import save_checkpoint

    runs, tokenizer = tmp_path_factory.mktemp("home") / "runs", Tokenizer.load(str(golden / "nanochat_d2"))
    torch.manual_seed(0)
    knowing = GPT(GPTConfig(256, tokenizer.vocab_size, 2, 2, 2, 64, "L"))
    knowing.init_weights()
    conversations = [
        {
            "messages": [
                {"role": r, "content": c} for turn in turns for r, c in zip(("user", "assistant"), turn, strict=True)
            ]
        }
        for turns in LEARNED
    ]
    rendered = [tokenizer.render_conversation(conversation) for conversation in conversations]
    longest = max(len(ids) for ids, _ in rendered)
    idx = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rendered])
    learned = torch.tensor([flags[1:] + [0] * (longest - len(flags)) for _, flags in rendered]) == 1
    optimizer = torch.optim.AdamW(knowing.parameters(), lr=0.02, weight_decay=0)
    for _ in range(1000):
        loss = F.cross_entropy(knowing.logits(knowing.hidden(idx[:, :-1])[learned]), idx[:, 1:][learned])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.01:
            break
    babbling = GPT(GPTConfig(2048, tokenizer.vocab_size, 2, 2, 2, 64, "SL"))
    for parameter in babbling.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    head = torch.nn.init.normal_(babbling.lm_head.weight)  # logits of up to 15, where those of zeros are 0
    head.data[[tokenizer.bos_id, tokenizer.special("<|assistant_end|>")]] = 0
    models = {"knowing": knowing, "babbling": babbling}
    for name, model in models.items():
        save_checkpoint(str(runs / name), 1, model, None, tokenizer, {})
    return {name: str(runs / name) for name in models}


@pytest.fixture(scope="module")  # its engines hold CPUs that other files' tests train on
def service(ray_session, checkpoints) -> Iterator[str]:
    """URL of a service with both models, knowing first."""
    from ray import serve

    from serving.app import ServiceOptions, app
    from serving.start import free_port, start

    port = free_port()
    options = ServiceOptions(checkpoint=list(checkpoints.values()), dtype="float32", compile=False)
    start(app(options), len(checkpoints), "127.0.0.1", port)
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture(scope="module")
def serve_url(ray_session) -> Iterator[str]:
    """URL of Ray Serve, without an application."""
    from ray import serve

    from serving.start import free_port

    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture
def deploy(serve_url):
    """Applications: deploy(name, **options) gives the URL; again with the same name, an update."""
    from ray import serve

    from serving.app import ServiceOptions, app

    names = set()

    def deploy(name: str, **options) -> str:
        names.add(name)
        application = app(ServiceOptions(**{"dtype": "float32", "compile": False} | options))
        serve.run(application, name=name, route_prefix=f"/{name}")
        return f"{serve_url}/{name}"

    yield deploy
    for name in names:
        serve.delete(name)
