"""A task of one's own, as a user would write one."""


class Vowels:
    """The share of the answer's letters that are vowels: a model of any kind can learn it."""

    def __init__(self):
        words = [f"word {i}" for i in range(29)]
        asked = [{"messages": [{"role": "user", "content": w}, {"role": "assistant", "content": ""}]} for w in words]
        self.train, self.val = asked[:21], asked[21:]

    def reward(self, conversation: dict, answer: str) -> float:
        letters = [letter for letter in answer.lower() if letter.isalpha()]
        return sum(letter in "aeiou" for letter in letters) / max(1, len(letters))


class Broken(Vowels):
    def reward(self, conversation: dict, answer: str) -> float:
        return 1 / 0
