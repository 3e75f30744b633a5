"""Arithmetic with the calculator: bare expressions and one-step word problems, + − × ÷ of one to five digits."""

from random import Random

from nanochat_ray.evals.tasks.common import in_split, same_number, tool_conversation

BARE = ["What is {a} {sign} {b}?", "Calculate {a} {sign} {b}.", "{a} {sign} {b} = ?", "How much is {a} {word} {b}?"]
SIGNS = {"+": ["+"], "-": ["-", "−"], "*": ["*", "×"], "/": ["/", "÷"]}
WORDS = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}
STORIES = {
    "+": [
        "{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?",
        "There are {a} {things} in one room and {b} in another. How many {things} are there in all?",
    ],
    "-": [
        "{name} had {a} {things} and gave away {b}. How many {things} are left?",
        "A shop had {a} {things} and sold {b} of them. How many {things} does it still have?",
    ],
    "*": [
        "{name} packs {a} boxes with {b} {things} each. How many {things} is that?",
        "A shelf holds {a} {things}. How many {things} do {b} shelves hold?",
    ],
    "/": [
        "{name} shares {a} {things} equally among {b} friends. How many {things} does each get?",
        "{a} {things} are packed into boxes of {b}. How many boxes are there?",
    ],
}
NAMES = ["Ada", "Ben", "Chen", "Dina", "Emil", "Fatima", "Grace", "Hugo", "Ines", "Jamal", "Kofi", "Lena"]
THINGS = ["apples", "books", "cards", "coins", "eggs", "marbles", "oranges", "pencils", "shells", "stamps", "tickets"]
ROUND_DIVISORS = [2, 4, 5, 8, 10, 20, 25]  # their quotients are short decimals


def conversations(split: str, size: int, seed: int = 0) -> list[dict]:
    """Return `size` conversations. The i-th depends only on split, seed and i.

    A problem with the same operation and operands is in one split only, however it is worded.
    """
    return [_conversation(split, Random(f"arithmetic {split} {seed} {i}")) for i in range(size)]


def judge(conversation: dict, answer_text: str) -> bool:
    """Return whether the answer, without its tool calls, ends with the right number."""
    return same_number(conversation, answer_text)


def _conversation(split: str, rng: Random) -> dict:
    while True:
        operator, story = rng.choice("+-*/"), rng.random() < 0.5
        a, b = _operands(operator, story, rng)
        if in_split(split, operator, *(sorted((a, b)) if operator in "+*" else (a, b))):
            break
    template = rng.choice(STORIES[operator] if story else BARE)
    question = template.format(
        a=a,
        b=b,
        sign=rng.choice(SIGNS[operator]),
        word=WORDS[operator],
        name=rng.choice(NAMES),
        things=rng.choice(THINGS),
    )
    return tool_conversation(question, "Let me calculate. ", f"{a}{operator}{b}", "The answer is {result}.")


def _operands(operator: str, story: bool, rng: Random) -> tuple[int, int]:
    """Draw operands. A story counts things: nothing is negative or fractional, and there are at least two of each."""
    a, b = (rng.randrange(2, 10 ** rng.randint(1, 4)) for _ in range(2))
    if operator == "-" and story:
        return max(a, b) + 1, min(a, b)
    if operator == "/" and (story or rng.random() < 0.5):
        b = rng.randrange(2, 100)
        return b * rng.randrange(2, 1000), b
    if operator == "/":
        return a, rng.choice(ROUND_DIVISORS)
    return a, b
