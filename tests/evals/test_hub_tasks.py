"""The Hub's tasks: rows, prompts, tokens and masks as written out by hand, and judges that are exact."""

import re
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pyarrow.parquet as pq
import pytest
from hub import ROWS, talk, write_hub

from nanochat_ray.data.tokenizer import Tokenizer
from nanochat_ray.evals.tasks import MixtureOptions, arc, gsm8k, hub_mixture, humaneval, mmlu, smoltalk
from nanochat_ray.evals.tasks.common import hub_rows, multiple_choice
from nanochat_ray.inference.tools import calculate

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture(scope="module")
def tokenizer(golden):
    return Tokenizer.load(str(golden / "nanochat_d2"))


def rendered(tokenizer, conversation) -> list[tuple[str, int]]:
    """The conversation's tokens as text, joined where neighbours have the same mask."""
    ids, mask = tokenizer.render_conversation(conversation)
    cuts = [0, *(np.flatnonzero(np.diff(mask)) + 1), len(ids)]
    return [(tokenizer.decode(ids[a:b]), mask[a]) for a, b in pairwise(cuts)]


def user(text: str) -> str:
    return f"<|bos|><|user_start|>{text}<|user_end|><|assistant_start|>"


def test_multiple_choice_is_rendered_as_nanochat_does(tokenizer):
    conversation = multiple_choice("Which one barks?", ["a cat", "a dog", "an eel"], ["A", "B", "C"], "B")
    prompt = "Multiple Choice question: Which one barks?\n- a cat=A\n- a dog=B\n- an eel=C\n\n"
    prompt += "Respond only with the letter of the correct answer."
    assert conversation == {
        "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": "B"}],
        "letters": ["A", "B", "C"],
    }
    assert rendered(tokenizer, conversation) == [(user(prompt), 0), ("B<|assistant_end|>", 1)]
    ids, _ = tokenizer.render_conversation(conversation)
    assert ids[-2:] == [ord("B"), tokenizer.special("<|assistant_end|>")]
    assert ids[:2] == [tokenizer.special("<|bos|>"), tokenizer.special("<|user_start|>")]
    for judge in (arc.judge, mmlu.judge):
        assert [judge(conversation, text) for text in ("B", " B\n", "A", "", "b", "B.")] == [True, True] + [False] * 4


@pytest.mark.parametrize(("letters", "answer"), [("ABCD", "E"), ("ABC", "A"), ("ABCD", "")])
def test_a_question_without_its_answer_is_refused(letters, answer):
    with pytest.raises(ValueError, match="Which"):
        multiple_choice("Which?", ["a", "b", "c", "d"], list(letters), answer)


def test_rows_come_in_the_order_of_seed_42(hub, shared):
    table = pq.read_table(shared / "datasets/openai/gsm8k/main/test-00000-of-00001.parquet").to_pylist()
    order = np.random.default_rng(42).permutation(len(table))
    rows = list(hub_rows("openai/gsm8k", "main", "test", str(shared / "datasets")))
    assert rows == [table[i] for i in order]
    assert list(hub_rows("openai/gsm8k", "main", "test", str(shared / "datasets"), 7)) == rows[:7]
    assert len(list(hub_rows("openai/gsm8k", "main", "test", hub, 100))) == 2  # of another folder with the same name


def test_arc_keeps_the_letters_of_each_question(hub, shared):
    by_letters = {"".join(c["letters"]): c for c in arc.conversations("ARC-Challenge", "test", hub)}
    assert set(by_letters) == {"ABC", "1234"}
    question, answer = by_letters["1234"]["messages"]
    assert question["content"] == (
        "Multiple Choice question: What is 2?\n- a cat, 2=1\n- a dog, 2=2\n- an eel, 2=3\n- an ox, 2=4\n\n"
        "Respond only with the letter of the correct answer."
    )
    assert answer["content"] == "3"
    assert len(arc.conversations("ARC-Easy", "test", str(shared / "datasets"))) == 2376
    first = arc.conversations("ARC-Challenge", "test", str(shared / "datasets"), 1)[0]
    assert first["messages"][0]["content"].startswith("Multiple Choice question: ")
    assert first["messages"][1]["content"] in first["letters"]


def test_mmlu_counts_its_answers_from_zero(hub):
    for conversation in mmlu.conversations("all", "test", hub):
        question, answer = (message["content"] for message in conversation["messages"])
        assert question.startswith(f"Multiple Choice question: Which is number {'ABCD'.index(answer)}?\n- a cat=A\n")
    auxiliary = list(mmlu.conversations("auxiliary_train", "train", hub))  # nested in a column of its own
    assert len(auxiliary) == 30
    assert auxiliary[0]["messages"][0]["content"].startswith("Multiple Choice question: No. ")


ANSWER = "He ate 1,200/4 = <<1200/4=300>>300 and <<7-10=-3>>then\nleft $<<0.5*3=1.5>>1.5.\n#### 1,234"


def test_gsm8k_marks_are_tool_calls(tokenizer):
    parts = gsm8k.answer_parts(ANSWER)
    assert [(part["type"], part["text"]) for part in parts] == [
        ("text", "He ate 1,200/4 = "),
        ("python", "1200/4"),
        ("python_output", "300"),
        ("text", "300 and "),
        ("python", "7-10"),
        ("python_output", "-3"),
        ("text", "then\nleft $"),
        ("python", "0.5*3"),
        ("python_output", "1.5"),
        ("text", "1.5.\n#### 1,234"),
    ]
    assert gsm8k.answer_parts("<<1+1=2>><<2+2=4>>\n#### 4")[:2] == [
        {"type": "python", "text": "1+1"},
        {"type": "python_output", "text": "2"},
    ]
    conversation = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": parts[:4]}]}
    assert rendered(tokenizer, conversation) == [
        (user("?"), 0),
        ("He ate 1,200/4 = <|python_start|>1200/4<|python_end|>", 1),
        ("<|output_start|>300<|output_end|>", 0),
        ("300 and <|assistant_end|>", 1),
    ]


@pytest.mark.parametrize(
    ("gold", "right", "wrong"),
    [
        (
            "1,234",
            ["#### 1234", "so\n#### 1,234.00\nBye", "#### 1234."],
            ["#### 1", "1234", "#### 12345", "#### -1234"],
        ),
        ("-3", ["#### -3", "#### −3", "#### -3.0"], ["#### 3", "#### - 3", "#### -30"]),
        ("0.5", ["#### 0.5", "#### .5", "#### 0.50"], ["#### 5", "#### 0.55", "#### 0"]),
        ("18", ["#### 18", "####\n#### 18", "#### 18 #### 19"], ["", "####", "#### ", "#### 19 #### 18", "#### x18"]),
        ("10000000000000000001", ["#### 10000000000000000001"], ["#### 10000000000000000000"]),
    ],
)
def test_gsm8k_judge(gold, right, wrong):
    parts = [{"type": "text", "text": f"It is that.\n#### {gold}"}]
    conversation = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": parts}]}
    assert [text for text in right if not gsm8k.judge(conversation, text)] == []
    assert [text for text in wrong if gsm8k.judge(conversation, text)] == []


def test_gsm8k_gold_answers_and_their_calculations(shared, tokenizer):
    calls = agreeing = 0
    for conversation in gsm8k.conversations("test", str(shared / "datasets"), 200):
        parts = conversation["messages"][1]["content"]
        text = "".join(part["text"] for part in parts if part["type"] != "python_output")
        assert gsm8k.judge(conversation, text)
        assert not gsm8k.judge(conversation, text.replace("#### ", "#### 1"))
        ids, _ = tokenizer.render_conversation(conversation, max_tokens=None)
        assert "<<" not in text
        assert [part["type"] for part in parts].count("python") == ids.count(tokenizer.special("<|python_start|>"))
        for call, output in pairwise(parts):
            if call["type"] == "python":
                assert output["type"] == "python_output"
                calls += 1
                result = calculate(call["text"])
                agreeing += result is not None and abs(float(result) - float(output["text"].replace(",", ""))) < 1e-9
    assert calls > 500
    assert agreeing / calls >= 0.98


def test_humaneval_prompts_and_programs(hub):
    (conversation,) = (c for c in humaneval.conversations(hub) if c["entry_point"] == "square")
    prompt = 'import math\n\n\ndef square(x):\n    """ The square of x """\n'
    assert [message["content"] for message in conversation["messages"]] == [
        prompt,
        prompt + "    return math.prod([x, x])\n",
    ]
    assert humaneval.program(conversation, "def square(x): return x * x") == (
        "import math\n\ndef square(x): return x * x\n\n\n\nMETADATA = {}\n\n\n"
        "def check(candidate):\n    assert candidate(3) == 9\n\n\ncheck(square)\n"
    )


@pytest.mark.parametrize(
    ("answer", "passes"),
    [
        ("def square(x):\n    return x * x", True),
        ("def square(x): return math.prod([x, x])", True),  # with the prompt's imports
        ("Sure.\n```python\ndef square(x):\n    return x * x\n```\nThis squares it.", True),
        ("```\ndef square(x): return x * x\n```\n```python\n1/0\n```", True),  # the first block
        ("```python\ndef square(x):\n    return x * x", True),  # cut off
        ("Sure.\ndef square(x): return x * x", False),
        ("def square(x): return x + x", False),
        ("def squares(x): return x * x", False),
        ("    return x * x", False),
        ("```python\n```", False),
        ("", False),
        ("raise SystemExit(0)", False),
        ("import os; os._exit(0)", False),
        ("\x00", False),
        ("def square(x): return x * x\n# \udc80 é 🙂", True),
    ],
)
def test_humaneval_judge(hub, answer, passes):
    (conversation,) = (c for c in humaneval.conversations(hub) if c["entry_point"] == "square")
    assert humaneval.judge(conversation, answer) == passes


HELPER = """import math

FACTOR = 2


def poly(xs: list, x: float):
    # two lines
    return sum(coeff * math.pow(x, i) for i, coeff in enumerate(xs)) * FACTOR


def find_zero(xs: list):
    \"\"\" The zero. \"\"\"
"""


@pytest.mark.parametrize(
    ("answer", "passes"),
    [
        ("def find_zero(xs): return poly(xs, 1)", True),
        ("from __future__ import annotations\nimport math\ndef find_zero(xs): return poly(xs, 1) * FACTOR / 2", True),
        ("def poly(xs, x): return 0\ndef find_zero(xs): return poly(xs, 1)", False),  # the answer's own comes later
        ("FACTOR = 1", False),
        ("def find_zero(xs): return poly(xs, 1)\nif __name__ == '__main__':\n    while True: input()", True),
    ],
)
def test_humaneval_prompts_definitions_are_there_for_the_answer(answer, passes):
    problem = {
        "messages": [{"role": "user", "content": HELPER}],
        "entry_point": "find_zero",
        "test": "def check(candidate):\n    assert candidate([1, 2]) == 6",
    }
    assert humaneval.judge(problem, answer) == passes


def test_all_canonical_solutions_pass_and_none_without_its_body(shared):
    problems = humaneval.conversations(str(shared / "datasets"))
    assert len(problems) == 164
    with ThreadPoolExecutor(8) as pool:  # to start in a jail is mostly to wait
        passed = list(pool.map(lambda c: humaneval.judge(c, c["messages"][1]["content"]), problems))
        assert [c["entry_point"] for c, ok in zip(problems, passed, strict=True) if not ok] == []
        passed = list(pool.map(lambda c: humaneval.judge(c, c["messages"][0]["content"] + "    pass\n"), problems))
        assert [c["entry_point"] for c, ok in zip(problems, passed, strict=True) if ok] == []


def test_smoltalk_turns_and_system_messages(hub, shared, tokenizer):
    conversations = list(smoltalk.conversations("train", hub))
    assert len(conversations) == 22
    (with_system,) = (c for c in conversations if len(c["messages"]) > 2)
    assert rendered(tokenizer, with_system) == [
        (user("Be brief.\n\nHi"), 0),
        ("Yes?<|assistant_end|>", 1),
        ("<|user_start|>Nothing<|user_end|><|assistant_start|>", 0),
        ("Fine.<|assistant_end|>", 1),
    ]
    assert len(list(smoltalk.conversations("train", str(shared / "datasets")))) == 450
    assert len(list(smoltalk.conversations("test", str(shared / "datasets"), 7))) == 7


@pytest.mark.parametrize(
    "row",
    [
        talk("Hi"),
        talk("Hi", "Yes?", "Oh"),
        talk(system="Be brief."),
        {"messages": [{"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Hi"}], "source": "test"},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None}], "source": "test"},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "system", "content": "Hi"}], "source": "test"},
    ],
)
def test_smoltalk_turns_out_of_order_are_named(row, tmp_path):
    folder = write_hub(tmp_path, {("HuggingFaceTB/smol-smoltalk", "default", "train"): [row]})
    with pytest.raises(ValueError, match="HuggingFaceTB/smol-smoltalk train, shuffled row 0: "):
        list(smoltalk.conversations("train", folder))


def kinds(conversations) -> dict[str, int]:
    """How many conversations are of each dataset, told by their questions."""
    counts = dict.fromkeys(("mmlu", "arc", "gsm8k", "spelling", "smoltalk"), 0)
    for conversation in conversations:
        question = conversation["messages"][0]["content"]
        of_exam = "mmlu" if "No." in question or "number" in question else "arc"
        of_talk = "smoltalk" if re.match("Hi|Be brief|Say", question) else "spelling"
        kind = of_exam if "Multiple" in question else "gsm8k" if "eggs" in question else of_talk
        counts[kind] += 1
    return counts


def test_hub_mixture_has_each_dataset_as_often_as_asked(hub):
    train = hub_mixture("train", MixtureOptions(datasets_dir=hub, spelling=100))
    assert kinds(train) == {"smoltalk": 22, "mmlu": 3 * 30, "gsm8k": 4 * 9, "arc": 0, "spelling": 100}
    assert list(train) == list(hub_mixture("train", MixtureOptions(datasets_dir=hub, spelling=100)))
    assert min(kinds(train[:60])[name] for name in ("smoltalk", "mmlu", "gsm8k", "spelling")) > 0  # mixed
    options = MixtureOptions(
        datasets_dir=hub, smoltalk_epochs=0, mmlu_epochs=1, gsm8k_epochs=2, arc_epochs=2, spelling=0, max_rows=5
    )
    expected = {"smoltalk": 0, "mmlu": 5, "gsm8k": 10, "arc": 10 + 2, "spelling": 0}
    assert kinds(hub_mixture("train", options)) == expected
    val = hub_mixture("val", MixtureOptions(datasets_dir=hub, max_rows=60))
    assert kinds(val) == {"smoltalk": 1, "mmlu": 3, "gsm8k": 2, "arc": 0, "spelling": 3}
    everything = {"mmlu": 4, "spelling": 4000}
    assert kinds(hub_mixture("val", MixtureOptions(datasets_dir=hub))) == kinds(val) | everything


@pytest.mark.parametrize(
    ("load", "named"),
    [
        (lambda hub: hub_rows("cais/mmlu", "all", "test"), "cais/mmlu all test: .*reach.*--datasets-dir"),
        (lambda hub: hub_rows("openai/gpt", "main", "test", hub), "openai/gpt is not in .*--datasets-dir"),
        (lambda hub: hub_rows("openai/gsm8k", "main", "val", hub), 'openai/gsm8k main val: Unknown split "val"'),
        (lambda hub: hub_rows("openai/gsm8k", "socratic", "test", hub), "openai/gsm8k socratic test: .*socratic"),
        (lambda hub: hub_mixture("train", MixtureOptions()), "smol-smoltalk train: .*--mixture offline"),
        (lambda hub: arc.conversations("ARC-Hard", "test", hub), "allenai/ai2_arc ARC-Hard test: "),
    ],
)
def test_what_cannot_be_had_is_named(hub, load, named):
    with pytest.raises(OSError, match=named) as raised:
        load(hub)
    assert "\n" not in str(raised.value)


def test_the_small_hub_has_the_columns_of_the_real_datasets(shared):
    for path in (shared / "datasets").glob("[!w]*/*/*/test-*.parquet"):
        key = (f"{path.parts[-4]}/{path.parts[-3]}", path.parts[-2], "test")
        assert set(ROWS[key][0]) == set(pq.read_schema(path).names)
