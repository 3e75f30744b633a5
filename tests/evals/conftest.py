"""A small Hub: folders of the Hub's layout, with a few rows in each dataset's own columns."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

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


@pytest.fixture(scope="session")
def hub(tmp_path_factory) -> str:
    return write_hub(tmp_path_factory.mktemp("hub"), ROWS)


@pytest.fixture(scope="session")
def offline(tmp_path_factory):
    """Nothing is looked for on the Hub, and what is read is cached in a folder of the tests."""
    import datasets
    import huggingface_hub

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield
