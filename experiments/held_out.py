"""Questions like those of finetuning that it has not seen: how many of each kind the model answers right."""

from nanochat_ray.evals import chat
from nanochat_ray.evals.tasks import arithmetic, pydocs, spelling
from nanochat_ray.inference.chat import CLOSES, OPENS
from nanochat_ray.inference.sampling import SamplingParams
from nanochat_ray.inference.text import KINDS
from nanochat_ray.train import checkpoint

EACH = 100  # questions of a kind
JUDGES = {
    "arithmetic": arithmetic.judge,
    "spelling": spelling.judge,
    "counting letters": spelling.judge,
    "docstrings": pydocs.judge,
}


def questions(pydocs_shards: list[str]) -> dict[str, list[dict]]:
    """Conversations by kind; docstrings only of the shards, if there are any.

    A letter is in the word not at all, once, or more often in a third of the questions each: most often it is once,
    and a model that always says so would look as if it could count.
    """
    spelled, counted = [], {"0": [], "1": [], "more": []}
    for conversation in spelling.conversations("val", 10 * EACH):
        answer = conversation["messages"][-1]["content"]
        if isinstance(answer, str):
            spelled.append(conversation)
        else:
            (count,) = (part["text"] for part in answer if part["type"] == "python_output")
            counted[count if count in counted else "more"].append(conversation)
    thirds = [questions[: -(-EACH // 3)] for questions in counted.values()]
    return {
        "arithmetic": arithmetic.conversations("val", EACH),
        "spelling": spelled[:EACH],
        "counting letters": [question for questions in zip(*thirds, strict=True) for question in questions][:EACH],
    } | ({"docstrings": pydocs.conversations(pydocs_shards, "val", EACH)} if pydocs_shards else {})


def ask(device: str, folder: str, pydocs_shards: list[str]) -> list[dict]:
    """A dict {kind, right, of, prompt, answer} a kind: of its greedy answers one that is right, if there is any."""
    model, tokenizer, _ = checkpoint.load_model(folder, device)
    answers = []
    for kind, conversations in questions(pydocs_shards).items():
        texts = chat.generate(model, tokenizer, conversations, SamplingParams(max_tokens=64, temperature=0.0), 32)
        right = [JUDGES[kind](c, text or "") for c, text in zip(conversations, texts, strict=True)]
        shown = right.index(True) if any(right) else 0
        counts = {"kind": kind, "right": sum(right), "of": len(right)}
        prompt = conversations[shown]["messages"][0]["content"]
        answers.append(counts | {"prompt": prompt, "answer": texts[shown] or ""})
    return answers


def shown(answer: dict) -> str:
    """For a terminal: the rate, and a question with its answer, tool calls in brackets as in a chat."""
    text = answer["answer"]
    for special, kind in KINDS.items():
        text = text.replace(special, OPENS[kind] or CLOSES["python"])
    return f"{answer['kind']}: {answer['right']} of {answer['of']} right\n> {answer['prompt']}\n{text}"
