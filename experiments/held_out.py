"""Asks a model held-out questions like those in finetuning, and counts its right answers by kind."""

from nanochat_ray.evals import chat
from nanochat_ray.evals.tasks import arithmetic, pydocs, spelling
from nanochat_ray.inference.chat import CLOSES, OPENS
from nanochat_ray.inference.sampling import SamplingParams
from nanochat_ray.inference.text import KINDS
from nanochat_ray.train import checkpoint

QUESTIONS = 100  # of each kind
JUDGES = {
    "arithmetic": arithmetic.judge,
    "spelling": spelling.judge,
    "counting letters": spelling.judge,
    "docstrings": pydocs.judge,
}


def questions(pydocs_shards: list[str]) -> dict[str, list[dict]]:
    """Conversations by kind. Docstrings are included only if shards of them are given.

    In counting letters, the count is 0, 1 or more in a third of the questions each. Otherwise most counts would be 1,
    and a model that always says 1 would look as if it could count.
    """
    spelled, counted = [], {"0": [], "1": [], "more": []}
    for conversation in spelling.conversations("val", 10 * QUESTIONS):
        answer = conversation["messages"][-1]["content"]
        if isinstance(answer, str):
            spelled.append(conversation)
        else:
            (count,) = (part["text"] for part in answer if part["type"] == "python_output")
            counted[count if count in counted else "more"].append(conversation)
    thirds = [questions[: -(-QUESTIONS // 3)] for questions in counted.values()]
    return {
        "arithmetic": arithmetic.conversations("val", QUESTIONS),
        "spelling": spelled[:QUESTIONS],
        "counting letters": [question for questions in zip(*thirds, strict=True) for question in questions][:QUESTIONS],
    } | ({"docstrings": pydocs.conversations(pydocs_shards, "val", QUESTIONS)} if pydocs_shards else {})


def ask(device: str, folder: str, pydocs_shards: list[str]) -> list[dict]:
    """One dict {kind, right, of, prompt, answer} per kind, with a right greedy answer if there is one."""
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
    """Text for a terminal: the counts, and a question with its answer. Tool calls are in brackets as in a chat."""
    text = answer["answer"]
    for special, kind in KINDS.items():
        text = text.replace(special, OPENS[kind] or CLOSES["python"])
    return f"{answer['kind']}: {answer['right']} of {answer['of']} right\n> {answer['prompt']}\n{text}"
