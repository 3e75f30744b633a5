"""The ledger of a campaign: a folder that says of each candidate what it changed and what became of it."""

import re
from dataclasses import asdict, dataclass, field

from nanochat_ray import storage


@dataclass
class Candidate:
    name: str  # of its folder in the ledger: 003-title
    parent: str | None = None  # the accepted candidate whose code it starts from; None for the baseline
    status: str = "proposed"  # then testing; at the end refused, failed, worse, not distinguishable or accepted
    said: str = ""  # why, in words
    level: float = 0.0  # of its test
    checked: bool = False  # lint and tests have passed
    verdicts: dict[str, dict] = field(default_factory=dict)  # by depth
    runs: list[str] = field(default_factory=list)
    seconds: float = 0.0  # wall time of its runs and of the baseline's beside them


class Ledger:
    """The folder ledger/ of a campaign: for each candidate a folder with candidate.patch and candidate.json."""

    def __init__(self, folder: str):
        self.folder = storage.join(folder, "ledger")

    def all(self) -> list[Candidate]:
        names = sorted(storage.listdir(self.folder)) if storage.exists(self.folder) else []
        uris = [storage.join(self.folder, name, "candidate.json") for name in names]
        return [Candidate(**storage.read_json(uri)) for uri in uris if storage.exists(uri)]

    def add(self, title: str, patch: str) -> Candidate:
        words = re.sub(r"[^A-Za-z0-9]+", "-", title).strip("-")[:40]
        candidate = Candidate(f"{len(self.all()) + 1:03d}-{words}")
        storage.write_bytes(storage.join(self.folder, candidate.name, "candidate.patch"), patch.encode())
        self.write(candidate)
        return candidate

    def patch(self, name: str) -> str:
        return storage.read_text(storage.join(self.folder, name, "candidate.patch"))

    def write(self, candidate: Candidate) -> None:
        storage.write_json(storage.join(self.folder, candidate.name, "candidate.json"), asdict(candidate))

    def as_json(self, code: dict[str, str]) -> str:
        """What a proposer reads: the candidates with their patches, and the code that the next patch is applied to."""
        return storage.to_json(
            {"candidates": [asdict(c) | {"patch": self.patch(c.name)} for c in self.all()], "code": code}
        )
