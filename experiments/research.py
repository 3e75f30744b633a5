"""A campaign over many changes of the code: each is tested against the newest accepted code, and accepted ones stack.

    python -m experiments.research --candidates PATCHES --preset cpu --depths 1 2 3
    python -m experiments.research --proposer idea.py --most 50 --depths 12 16 20
    python -m experiments.research --proposer "my-client --model M" --network True --most 50

A candidate is a patch of nanochat_ray's model/, train/ or data/. It stops at the first of these stages that it fails:
it applies, changes nothing that measures, and passes lint and fast tests; a run of 30 seconds; the smallest depth;
two more depths; all other depths. At each depth its pairs of runs are looked at after so many seeds, by a sequential
test of the time to a target val/bpb. Candidates of a whole campaign are falsely accepted with a probability of 5 % at
most. At the end each accepted candidate is taken away once, to see what the others do without it.

The same command goes on after a stop. What became of each candidate is in the campaign's folder, under ledger/.
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean

import numpy as np
import tyro
from ray import tune
from scipy import optimize

from experiments import compare, paired, patches, sequential, sweep
from experiments.leaderboard import crossing
from experiments.ledger import Candidate, Ledger
from experiments.report import conclude
from nanochat_ray import storage
from nanochat_ray.data.mixture import read_parts
from nanochat_ray.session import one_line_errors
from nanochat_ray.train.metrics import read_metrics

CAMPAIGN_LEVEL = 0.05  # probability of any false accept in a campaign
LOOKS = [4, 8, 12]  # seeds
SMOKE_SECONDS = 30.0
HANGS, HANGS_SECONDS = 5.0, 60.0  # a run is stopped after so many times the baseline's wall time, plus these seconds
LEAKS = 2.0  # a run is stopped at so many times the baseline's peak memory
TINY_SECONDS = 1e-3  # a run's first ten steps count as no time
LONGEST = 4.0  # times its own length that a run which misses the target may be extrapolated to
BESIDE = {"loss at equal time": "total_training_time", "loss at equal FLOPs": "total_training_flops"}


@dataclass
class ResearchOptions(sweep.SweepOptions):
    baseline: str = "HEAD"
    """The code that the campaign starts from: a git revision, or a folder with a checkout."""
    candidates: str | None = None
    """Folder of patches, tested in the order of their names."""
    proposer: str | None = None
    """A program that reads the ledger as JSON on stdin and prints a patch, or nothing when it has no more ideas. It is
    a Python file that runs in the sandbox, or with --network any command."""
    network: bool = False
    """Run the proposer as an ordinary process, with the network."""
    most: int = 20
    """Most candidates of a proposer. The level of 5 % is shared among them."""
    depths: list[int] | None = None
    """The smallest is tested first, then two more, then the others. The default is compare's."""
    looks: list[int] = field(default_factory=lambda: LOOKS)
    """Seeds after which the runs of a depth are looked at."""
    targets: list[float] | None = None
    """val/bpb that runs are timed to, one for each depth; the default is what the baseline ends at."""
    tests: list[str] = field(default_factory=lambda: ["tests/model", "tests/train", "tests/data"])
    """Fast tests that a candidate has to pass."""
    parallel: int = 1
    """Candidates that are tested at once. If several are found better, the best is accepted and the others are tested
    again on top of it."""
    both: list[str] = field(default_factory=list)
    """NAME=VALUE of pretraining's options, for all runs."""


def run(options: ResearchOptions) -> str:
    """Test all candidates; returns the uri of the report. Raises ValueError for options that can't be, and what
    run_trials raises."""
    if bool(options.candidates) == bool(options.proposer):
        raise ValueError("give either --candidates or --proposer")
    campaign = Campaign(options)
    campaign.pilot()
    while batch := campaign.next_batch():
        campaign.test(batch)
    campaign.ablate()
    return conclude(campaign.folder, "Research")


class Campaign:
    """Its state is what its folder holds: every decision follows from the ledger and from finished runs."""

    def __init__(self, options: ResearchOptions):
        preset = sweep.preset_of(options)
        if preset.name == "cpu" and options.ratio is None:
            options = replace(options, ratio=compare.CPU_RATIO)
        self.depths = sorted(options.depths or compare.DEPTHS[preset.name])
        if options.targets and len(options.targets) != len(self.depths):
            raise ValueError(f"--targets gives {len(options.targets)} numbers for {len(self.depths)} depths")
        self.looks = tuple(sorted(options.looks))
        self.baseline, commit = compare.archive(options.baseline)
        most_tokens = (options.ratio or preset.ratio) * sweep.scaling_params(preset, self.depths[-1])
        self.rows = sweep.shared_rows(options, preset, most_tokens)
        self.options = options
        files = sorted(Path(options.candidates).glob("*.patch")) if options.candidates else []
        inputs: dict = {"code": storage.fingerprint(self.baseline.hex()), "rows": self.rows}
        inputs |= {"validation": validation_hash(self.rows)}
        inputs |= {"depths": self.depths, "looks": self.looks, "both": options.both, "ratio": options.ratio}
        inputs |= {"targets": options.targets, "most": options.most if options.proposer else len(files)}
        self.name, self.folder = sweep.begin(
            "research", options, inputs, baseline=compare.describe(options.baseline, commit)
        )
        self.most, self.validation = inputs["most"], inputs["validation"]
        self.ledger, self.trials, self.results = Ledger(self.folder), [], []
        if not self.ledger.all():
            for path in files:
                self.ledger.add(path.stem, path.read_text())

    # Runs

    def pairs(self, label: str, sides: dict[str, bytes], depths: list[int], seeds, limits=None, **more) -> list[dict]:
        """Trials of a comparison, in turns. sides: the code of "baseline" and "candidate", or of one alone."""
        given = compare.CompareOptions(
            **{key: getattr(self.options, key) for key in sweep.SweepOptions.__dataclass_fields__},
            both=[*self.options.both, *(f"{key}={value}" for key, value in more.items())],
            depths=depths,
            seeds=list(seeds),
        )
        _, trials, _ = compare.pretraining(replace(given, rows=self.rows))
        trials = [trial for trial in trials if trial["columns"]["side"] in sides]
        for trial in trials:
            side = trial["columns"]["side"]
            trial["name"] = f"{label}-{trial['name']}"
            trial["options"]["run"] = f"{self.name}/{trial['name']}"
            trial["code"] = self.put(sides[side])
            trial["columns"] |= {"candidate": label, "commit": None, "wall_sec": None}
            trial["limits"] = limits[trial["options"]["depth"]] if limits and side == "candidate" else {}
        return trials

    def put(self, code: bytes) -> str:
        """Where runs find a version of the code."""
        uri = storage.join(self.folder, "code", f"{storage.fingerprint(code.hex())}.zip")
        if not storage.exists(uri):
            storage.write_bytes(uri, code)
        return uri

    def train(self, trials: list[dict]) -> list[dict]:
        """Run what is not finished of these trials; returns their lines, with those that tests are made of."""
        known = {trial["name"] for trial in self.trials}
        self.trials += [trial for trial in trials if trial["name"] not in known]
        wanted = {trial["name"] for trial in trials}
        trainable = tune.with_parameters(compare.train_version, task=None)
        self.results = sweep.run_trials(self.folder, self.trials, trainable)
        return [row for row in self.results if row["run"] in wanted]

    def pilot(self) -> None:
        """Two runs of the baseline at each depth decide the targets, and what counts as hanging or leaking memory."""
        rows = self.train(self.pairs("pilot", {"baseline": self.baseline}, self.depths, [1001, 1002]))
        of_depth = {depth: [row for row in rows if row["depth"] == depth] for depth in self.depths}
        if lost := [row["run"] for row in rows if row["val_bpb"] is None]:
            raise ValueError(f"the baseline diverges: {', '.join(lost)}")
        targets = self.options.targets or [mean(row["val_bpb"] for row in of_depth[d]) for d in self.depths]
        self.targets = dict(zip(self.depths, targets, strict=True))
        self.limits = {
            depth: {
                "seconds": HANGS * max(row["wall_sec"] for row in found) + HANGS_SECONDS,
                "memory_mb": LEAKS * max(row["peak_memory_mb"] for row in found),
            }
            for depth, found in of_depth.items()
        }
        first = of_depth[self.depths[0]][0]
        steps = int(SMOKE_SECONDS * first["tok_per_sec"] / first["total_batch_size"])
        self.smoke_steps = max(2, min(first["num_iterations"], steps))

    # Candidates

    def next_batch(self) -> list[Candidate]:
        """The candidates to test now: those of the ledger first, then of the proposer. Each is given its level."""
        everything = self.ledger.all()
        begun = [c for c in everything if c.status == "testing"]
        waiting = [c for c in everything if c.status == "proposed"]
        while self.options.proposer and len(begun + waiting) < self.options.parallel and len(everything) < self.most:
            proposed = self.propose()
            if not proposed.strip():
                break
            waiting.append(self.ledger.add("proposed", proposed))
            everything.append(waiting[-1])
        coming = len(waiting) + (self.most - len(everything) if self.options.proposer else 0)
        for candidate in waiting[: max(0, self.options.parallel - len(begun))]:
            left = CAMPAIGN_LEVEL - sum(c.level for c in everything)
            again = 2 if self.options.parallel > 1 else 1  # tests: of those better at once all but one are tested again
            candidate.level = left / (coming * again)  # levels add up to CAMPAIGN_LEVEL at most: the union bound
            coming -= 1
            accepted = self.accepted()
            candidate.parent, candidate.status = accepted[-1] if accepted else None, "testing"
            self.ledger.write(candidate)
            begun.append(candidate)
        return begun

    def propose(self) -> str:
        assert self.options.proposer
        known = self.ledger.as_json(patches.changeable(self.code()))
        return patches.propose(self.options.proposer, known, self.options.network)

    def accepted(self) -> list[str]:
        """In the order in which they were stacked."""
        found = [c for c in self.ledger.all() if c.status == "accepted"]
        order, parent = [], None
        while follower := next((c.name for c in found if c.parent == parent), None):
            order.append(follower)
            parent = follower
        return order

    def code(self, without: str | None = None) -> bytes:
        """The baseline with the accepted patches, but one."""
        code = self.baseline
        for name in self.accepted():
            if name != without:
                code = patches.apply(code, self.ledger.patch(name))
        return code

    def test(self, batch: list[Candidate]) -> None:
        """Take candidates of one parent through all stages, side by side, and accept one at most."""
        parent = self.code()
        codes = {c.name: code for c in batch if (code := self.admit(c, parent))}
        live = [c for c in batch if c.name in codes]
        smoke = []
        for c in live:
            steps = {"num_iterations": self.smoke_steps}
            smoke += self.pairs(
                f"{c.name}-smoke", {"candidate": codes[c.name]}, self.depths[:1], [1000], self.limits, **steps
            )
        for row in self.train(smoke) if smoke else []:
            if row["val_bpb"] is None:
                candidate = next(c for c in live if row["candidate"] == f"{c.name}-smoke")
                candidate.level = 0.0  # it was never tested, so its level goes to the others
                self.end(candidate, "failed", f"in a run of {self.smoke_steps} steps: {row['notes']}")
        for stage in (self.depths[:1], self.depths[1:3], self.depths[3:]):
            live = [c for c in live if c.status == "testing"]
            self.measure(live, stage, {c.name: {"baseline": parent, "candidate": codes[c.name]} for c in live})
        better = [c for c in live if c.status == "testing"]
        better.sort(key=lambda c: sum(verdict["change"] for verdict in c.verdicts.values()))
        for c in better[1:]:  # tested anew on top of the one that is accepted
            self.ledger.add(c.name, self.ledger.patch(c.name))
            self.end(c, "not distinguishable", f"better, as {better[0].name} is, which gains more: tested again on it")
        if better:
            said = ", ".join(f"depth {depth}: {verdict['said']}" for depth, verdict in better[0].verdicts.items())
            self.end(better[0], "accepted", said)

    def admit(self, candidate: Candidate, parent: bytes) -> bytes | None:
        """The candidate's code, when it applies, changes nothing that measures, and passes lint and tests."""
        try:
            code = patches.apply(parent, self.ledger.patch(candidate.name))
            if not candidate.checked:
                patches.check(code, self.options.tests)
                candidate.checked = True
                self.ledger.write(candidate)
            return code
        except ValueError as error:
            candidate.level = 0.0
            self.end(candidate, "refused", str(error))
            return None

    def measure(self, live: list[Candidate], depths: list[int], sides: dict[str, dict[str, bytes]]) -> None:
        """Train pairs of more and more seeds at these depths, until the test of each candidate has decided."""
        for n in self.looks if depths else ():
            open_ = [c for c in live if c.status == "testing" and not all(decided(c, d) for d in depths)]
            trials = []
            for c in open_:
                left = [depth for depth in depths if not decided(c, depth)]
                trials += self.pairs(c.name, sides[c.name], left, range(1, n + 1), self.limits)
            rows = self.train(trials) if trials else []
            if validation_hash(self.rows) != self.validation:
                raise ValueError(f"the validation rows in {self.rows} have changed since the campaign began")
            for c in open_:
                self.judge(c, [row for row in rows if row["candidate"] == c.name], n)

    def judge(self, candidate: Candidate, rows: list[dict], n: int) -> None:
        """Write down what the runs of a candidate say after a look."""
        for depth in sorted({row["depth"] for row in rows}):
            own = [row for row in rows if row["depth"] == depth]
            if lost := [row for row in own if row["val_bpb"] is None and row["side"] == "candidate"]:
                return self.end(candidate, "failed", f"depth {depth}: {lost[0]['notes']}")
            changes, beside = self.changes(own, depth)
            decision = sequential.decide(changes, self.looks, candidate.level)
            candidate.verdicts[str(depth)] = {
                "decision": decision,
                "change": mean(changes) if changes else 0.0,
                "said": summary(changes, beside),
            }
            if decision in ("worse", "not distinguishable"):
                return self.end(candidate, decision, f"depth {depth}: {candidate.verdicts[str(depth)]['said']}")
        self.ledger.write(candidate)

    def changes(self, rows: list[dict], depth: int) -> tuple[list[float], dict[str, list[float]]]:
        """By seed, (the logarithms of the ratios of times to the target, relative differences of loss beside them)."""
        changes, beside = [], {name: [] for name in ("loss at equal steps", *BESIDE)}
        for _, seed in sorted(paired.pairs(rows, "val_bpb", depth)):
            runs = {row["side"]: row["run"] for row in rows if row["seed"] == seed}
            lines = [read_metrics(storage.join(self.folder, runs[side])) for side in ("baseline", "candidate")]
            lines = [[line for line in curve if line.get("val/bpb") is not None] for curve in lines]
            times = [time_to(curve, self.targets[depth]) for curve in lines]
            changes.append(math.log(times[1] / times[0]))
            beside["loss at equal steps"].append(lines[1][-1]["val/bpb"] / lines[0][-1]["val/bpb"] - 1)
            for name, key in BESIDE.items():
                losses = loss_at_equal(lines, key)
                beside[name].append(losses[1] / losses[0] - 1)
        return changes, beside

    def end(self, candidate: Candidate, status: str, said: str) -> None:
        """The candidate's last state, with its runs and those of the baseline beside them."""
        own = [row for row in self.results if row["candidate"] in (candidate.name, f"{candidate.name}-smoke")]
        candidate.status, candidate.said = status, said
        candidate.runs = [row["run"] for row in own]
        candidate.seconds = sum(row["wall_sec"] or 0 for row in own)
        self.ledger.write(candidate)
        print(f"{candidate.name}: {status}, {said}", flush=True)

    def ablate(self) -> None:
        """Each accepted candidate is taken away once, with seeds that decided nothing: how much longer is the time?"""
        full, found, first = self.code(), {}, 501
        for name in self.accepted():
            try:
                sides = {"baseline": full, "candidate": self.code(without=name)}
            except ValueError as error:
                found[name] = f"others build on it: {error}"
                continue
            rows = self.train(self.pairs(f"without-{name}", sides, self.depths, range(first, first + self.looks[0])))
            changes = {depth: self.changes([r for r in rows if r["depth"] == depth], depth) for depth in self.depths}
            found[name] = "; ".join(f"depth {depth}, {summary(*changed)}" for depth, changed in changes.items())
        storage.write_json(storage.join(self.folder, "ablation.json"), found)


def decided(candidate: Candidate, depth: int) -> bool:
    return candidate.verdicts.get(str(depth), {}).get("decision") == "better"


def validation_hash(rows: str) -> str:
    """Of the files that val/bpb is measured on."""
    parts = [storage.join(part.rows, "val") for part in read_parts(rows)]
    files = [storage.join(part, name) for part in parts for name in sorted(storage.listdir(part))]
    return storage.fingerprint(*(storage.read_bytes(file).hex() for file in files))


def time_to(curve: list[dict], target: float) -> float:
    """Seconds of training until val/bpb is at the target, as on the leaderboard.

    A run that ends above it has the time that it would take if the loss went on falling as between its last two
    measurements, in the logarithm of time, but at most LONGEST times its own. So no pair is without a number.
    """
    if reached := crossing(curve, target):
        return max(reached["total_training_time"], TINY_SECONDS)
    values = optimize.isotonic_regression([line["val/bpb"] for line in curve], increasing=False).x
    times = [max(line["total_training_time"], TINY_SECONDS) for line in curve]
    longer = LONGEST
    if len(curve) > 1 and times[-2] < times[-1] and values[-2] > values[-1]:
        slope = (values[-2] - values[-1]) / math.log(times[-1] / times[-2])
        longer = math.exp(min(math.log(LONGEST), max(0.0, values[-1] - target) / slope))
    return times[-1] * longer


def loss_at_equal(curves: list[list[dict]], key: str) -> list[float]:
    """val/bpb of two runs at the largest time, or number of FLOPs, that both have measured."""
    x = min(curve[-1][key] for curve in curves)
    return [float(np.interp(x, [line[key] for line in c], [line["val/bpb"] for line in c])) for c in curves]


def summary(changes: list[float], beside: dict[str, list[float]]) -> str:
    """The change of the time to the target with its 95 % interval, and the changes of loss beside it."""
    if len(changes) < 2:
        return "one pair or none: no interval"
    low, high = (math.expm1(end) for end in paired.interval(changes))
    said = f"time to the target {math.expm1(mean(changes)):+.1%} [{low:+.1%}, {high:+.1%}], {len(changes)} seeds"
    return "; ".join([said, *(f"{name} {mean(values):+.2%}" for name, values in beside.items())])


@one_line_errors
def main() -> None:
    options = tyro.cli(ResearchOptions, prog="python -m experiments.research", description=__doc__)
    with compare.ray_started_elsewhere():
        run(options)


if __name__ == "__main__":
    main()
