"""The driver's side of training: start the workers, show how far they are, and stop them cleanly."""

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import ray
import ray.train
import ray.train.torch
import torch
from ray.actor import ActorHandle
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import PreemptingState, ResizingState
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nanochat_ray import measuring, storage
from nanochat_ray.measuring import PROGRESS_SECONDS
from nanochat_ray.model.gpt import GPTConfig
from nanochat_ray.train import checkpoint, lease, network
from nanochat_ray.train.failing import Failing, Place, described
from nanochat_ray.train.hosts import (
    GoodHosts,
    LostHosts,
    Request,
    Trainer,
    can_grow,
    check_rows,
    fails_again,
    scaling_config,
    wait_for_hosts,
    wanted,
)
from nanochat_ray.train.loop import Learned, Measurement, TrainConfig, Worker, train_loop_per_worker
from nanochat_ray.train.plan import GPU_SHARE, MAX_TOKENS_PER_CPU, gpu_memory, rows_that_fit
from nanochat_ray.versions import pinned

MAX_FAILURES = 3  # in a row without a new step between: then starting workers again would only repeat it
SLOW_SECONDS = 1.0  # a longer wait has a line of its own
AT_ONCE_SECONDS = 1.0  # within which several signals are one
SAVE_PATIENCE_SECONDS = 120.0  # that a resize waits for a checkpoint
# glibc gives large blocks back to the kernel and gets them again, page by page, at every step: let it keep them.
CPU_WORKER_ENV = {
    "GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=68719476736:glibc.malloc.arena_max=1"
}
# A GPU's blocks of memory grow in place rather than leave gaps.
GPU_WORKER_ENV = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
NETWORK_ENV = ("NCCL_", "TORCH_NCCL_", "GLOO_")  # variables of the driver that workers get as they are
# Seconds, unless the driver's environment has others. How long Ray Train waits for room for workers before it counts
# hosts again, how long a worker may not answer until it is taken for dead, and how often each is asked how it is.
PATIENCE = {
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "120",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}


@ray.remote(num_cpus=0)
class Monitor(Failing):
    """Carries progress from the workers to the driver's terminal, and the driver's requests to the workers."""

    def __init__(self, run: str = ""):
        super().__init__()
        self.run = run
        self.latest: dict | None = None
        self.lines: list[str] = []
        self.outcome: dict | None = None
        self.stop, self.save = False, False
        self.failures, self.furthest = 0, -1
        self.errors: dict[int, tuple[str, str | None]] = {}  # of the newest workers by rank: why, and whose fault
        self.places: dict[int, Place] = {}  # of the newest workers, by rank
        self.fatal: set[str] = set()  # nodes on which one of the newest workers failed by what a new start would repeat
        self.ended_group = False
        self.doing: tuple[str, float] | None = None  # its name and when it began: it may take long
        self.begun: Counter = Counter()  # measurements that have not ended, by how often they began
        self.failed_ones: dict[str, dict[int, str]] = {}  # measurements by name: by rank, what is said of it

    def started(self, rank: int, node: str, gpu: str | None = None) -> None:
        if self.ended_group:
            self.places, self.fatal, self.ended_group = {}, set(), False
        self.places[rank] = node, gpu

    def failed(self, rank: int, error: str, may_pass: bool = True, fault: str | None = "host") -> None:
        """may_pass: whether a new start may help. fault: of the "GPU", the "host", or None of either."""
        self.errors[rank] = error, fault
        if not may_pass:
            self.fatal.add(self.places[rank][0])
        if not self.is_fatal():
            self.say(f"worker {rank} failed: {error}")

    def is_fatal(self) -> bool:
        """Whether workers of every host have failed by what a new start would only repeat."""
        return bool(self.fatal) and self.fatal == {node for node, _ in self.places.values()}

    def failed_places(self, dead: list[int]) -> tuple[set[Place], str]:
        """(where the newest workers failed, the run): GPUs of ranks that died or had an error of CUDA, else the host of
        the first to fail; a host for several GPUs of it."""
        ranks = dead or [rank for rank, (_, fault) in self.errors.items() if fault == "GPU"]
        places = [self.places[rank] for rank in ranks if rank in self.places]
        if not places:
            places = [(self.places[rank][0], None) for rank, (_, fault) in [*self.errors.items()][:1] if fault]
        of_node = Counter(node for node, _ in places)
        return {(node, gpu if of_node[node] == 1 else None) for node, gpu in places}, self.run

    def fails_again(self, left_out: set[Place], why: str | None = None) -> bool:
        """Count a failure, after which these are left out. True: the run is over.

        It is when this is one too many and nothing new is left out, or when each host's workers say that a new start
        would only repeat it.
        """
        self.failures += 1
        self.ended_group = True
        first = next((error for error, _ in self.errors.values()), None)
        if self.is_fatal():
            self.outcome = {"step": self.furthest, "error": first}
            return True
        if left_out:
            self.say(f"workers failed twice on {described(left_out)}: the run goes on without if there are others")
        over = self.failures >= MAX_FAILURES and not left_out
        if over:
            why = why or first or "none said why: one may have been killed, or have had too little memory"
            error = f"workers failed {self.failures} times in a row without a new step: {why}"
            self.outcome = {"step": self.furthest, "error": error}
        self.errors = {}
        return over

    def begins(self, what: str | None) -> None:
        """What may take long, or nothing, is done from here on."""
        self.doing = what and (what, time.monotonic())
        if what and what.startswith("measuring "):
            self.begun[what.removeprefix("measuring ")] += 1

    def ended(self) -> None:
        """What was begun last has ended."""
        if self.doing:
            self.begun.pop(self.doing[0].removeprefix("measuring "), None)
        self.doing = None

    def unmeasured(self, name: str, rank: int, line: str) -> None:
        if name not in self.failed_ones:
            self.say(f"warning: {line}")
        self.failed_ones.setdefault(name, {})[rank] = line

    def failed_ranks(self, name: str) -> int:
        return len(self.failed_ones.get(name, {}))

    def left_out(self) -> set[str]:
        """Measurements that new workers leave out: those that failed, and those in which workers were lost twice."""
        for name, times in self.begun.items():
            if times > 1 and name not in self.failed_ones:
                self.unmeasured(name, 0, f"{name} is left out: workers were lost in it {times} times")
        return set(self.failed_ones)

    def stopping(self) -> bool:
        return self.stop

    def update(self, metrics: dict) -> None:
        self.latest, self.doing = metrics, None
        if metrics["step"] > self.furthest:
            self.failures, self.furthest = 0, metrics["step"]
            self.forgive()

    def say(self, line: str) -> None:
        self.lines.append(line)

    def read(self, seen: int) -> tuple[dict | None, list[str], str | None, float]:
        """The newest metrics, the lines said since the first `seen`, and what may take long and for how long it has."""
        what, began = self.doing or (None, time.monotonic())
        return self.latest, self.lines[seen:], what, time.monotonic() - began

    def finish(self, outcome: dict) -> None:
        self.outcome = outcome

    def read_outcome(self) -> dict | None:
        """How the run ended; None when it has not."""
        return self.outcome

    def read_unmeasured(self) -> list[str]:
        """A line for each measurement that failed."""
        return [next(iter(ranks.values())) for ranks in self.failed_ones.values()]

    def request_stop(self) -> None:
        self.stop = True

    def request_save(self) -> None:
        self.save = True

    def saved(self, step: int) -> None:
        self.save = False
        self.say(f"step {step} is saved, as workers are about to be stopped")

    def request(self) -> str | None:
        return "stop" if self.stop else "save" if self.save else None


class SaveFirst(ControllerCallback):
    """Has the workers save before Ray takes them away: to start more of them, or because their node is being drained.

    A developer API of Ray, and the only place that tells of a resize before it happens.
    """

    def __init__(self, monitor):
        self.monitor = monitor

    def after_controller_state_update(self, previous_state, current_state) -> None:
        if isinstance(current_state, PreemptingState) and not isinstance(previous_state, PreemptingState):
            self.monitor.request_save.remote()  # Ray leaves the workers alone until the node's deadline
        if isinstance(current_state, ResizingState):
            self.monitor.request_save.remote()
            patience = time.monotonic() + SAVE_PATIENCE_SECONDS
            while ray.get(self.monitor.request.remote()) == "save" and time.monotonic() < patience:
                time.sleep(0.1)


@dataclass(frozen=True)
class TrainResult:
    run_dir: str
    checkpoint: str  # the final one
    step: int
    val_bpb: float | None  # None when its measurement failed


def refuse_other_inputs(run_dir: str, inputs: dict) -> None:
    """Raises ValueError if the run was begun with other inputs: it never goes on with another model, plan or data."""
    inputs = json.loads(json.dumps(inputs))
    uri = storage.join(run_dir, "config.json")
    if storage.exists(uri):
        theirs = storage.read_json(uri)["inputs"]
        if differing := [key for key in inputs if inputs[key] != theirs.get(key)]:
            was, now = (", ".join(f"{key} {d.get(key)}" for key in differing) for d in (theirs, inputs))
            raise ValueError(f"{run_dir} was begun with {was}, not {now}: take another --run name or delete it")


def provenance() -> dict:
    """What ran where, for comparing runs: the commit of this code, if git knows it, and the cluster's nodes."""
    git = ["git", "-C", os.path.dirname(__file__), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    parts = Counter(_node(node["Resources"]) for node in ray.nodes() if node["Alive"])
    cluster = " + ".join(f"{n} × ({part})" if n > 1 else part for part, n in parts.items())
    return {"commit": commit or None, "cluster": cluster}


def _node(resources: dict) -> str:
    """8 × H100, or 2 CPUs."""
    if gpus := resources.get("GPU"):
        kind = next((key.partition(":")[2] for key in resources if key.startswith("accelerator_type:")), "GPU")
        return f"{gpus:.0f} × {kind}"
    return f"{resources.get('CPU', 0):.0f} CPUs"


def train(
    c: TrainConfig,
    record: dict,
    request: Request,
    measurement: Measurement | None = None,
    report: Callable[[dict], None] | None = None,
    failing: ActorHandle | None = None,
    learn: Callable[[Worker], Learned] | None = None,
) -> TrainResult:
    """Train to the end and measure, unless both are done. A measurement that fails is in measuring.failed.

    record: what config.json keeps; its "inputs" are those of every start of this run.
    report: is given the metrics, which else go to the terminal. For runs of a sweep, which share a cluster: they take
    as many workers as they ask for and not fewer, and the first failure is raised, for the sweep to decide.
    failing: the sweep's actor of Failing.
    learn: what a step learns from, if not from rows; pickled to the workers.

    Ctrl-C and SIGTERM end it cleanly with a checkpoint and raise KeyboardInterrupt here. Raises ValueError, before
    anything is written, when the run was begun with other inputs, when there are more workers than rows in a step,
    when the cluster has no room for workers, when another process holds the run, or when fp8 is asked for without
    torchao; and later when the loss diverged, when the last checkpoint could not be written, or when workers fail by
    what a new start would repeat, or again and again; OSError when they can't be started, as when they don't reach each
    other, and FileNotFoundError when hosts don't see the rows.

    Signals are for this process. Ray ends its workers by SIGTERM itself: one that gets it dies as if it was killed.
    """
    refuse_other_inputs(c.run_dir, record["inputs"])
    if is_finished(c):
        print(f"{c.stage}: nothing to do, {c.run_dir} is finished", flush=True)
        return _result(c)
    if c.fp8 and importlib.util.find_spec("torchao") is None:
        raise ValueError("fp8 needs torchao: pip install 'nanochat-ray[gpu]', or leave --fp8 out")
    rows = c.rows_per_step
    scaling = scaling_config(request.workers, request.use_gpu, report is None, rows, request.beside)
    check_batch(c, scaling)
    if report is None:
        scaling = wait_for_hosts(request, scaling, c.stage)
    if c.rows:
        check_rows(c.rows)
    c = replace(c, device_batch_size=device_batch_size(c, scaling))
    uri, about = storage.join(c.run_dir, "config.json"), record | provenance()
    with lease.hold(c.run_dir) as held:
        storage.write_json(uri, about)
        try:
            return _train(c, scaling, held, measurement, report, failing, learn)
        finally:
            with measuring.measuring(f"writing {uri}"):
                if not storage.exists(uri):  # somebody deleted the folder meanwhile
                    storage.write_json(uri, about)


def _train(
    c: TrainConfig,
    scaling: ray.train.ScalingConfig,
    held: lease.Lease,
    measurement: Measurement | None,
    report: Callable[[dict], None] | None,
    failing: ActorHandle | None,
    learn: Callable[[Worker], Learned] | None,
) -> TrainResult:
    for name, seconds in PATIENCE.items():
        os.environ.setdefault(name, seconds)
    # Nobody drains a machine that is alone: an actor that looks for it would only take time.
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = str(int(can_grow()))
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # It dies with the driver, not with a worker's node.
    monitor = Monitor.options(scheduling_strategy=here).remote(c.run_dir)
    monitor.begins.remote(f"starting {wanted(scaling)}")
    get_or_create_autoscaling_coordinator()  # the controller will wait for it: it starts meanwhile
    failing = failing or monitor
    trainer = Trainer(
        train_loop_per_worker,
        monitor=monitor,
        failing=failing,
        train_loop_config=asdict(c) | {"monitor": monitor, "measurement": measurement, "learn": learn},
        torch_config=network.TorchConfig(),
        scaling_config=scaling,
        # The monitor counts failures, or the sweep does.
        run_config=run_config(
            c.run_dir,
            scaling.use_gpu,
            max_failures=0 if report else -1,
            callbacks=[SaveFirst(monitor), LostHosts(monitor), GoodHosts(monitor, failing)],
        ),
    )
    failure: list[BaseException] = []
    # fit() blocks: it has a thread of its own, and this one shows progress and takes signals.
    thread = threading.Thread(target=_fit, args=[trainer, monitor, failure, report is None], daemon=True)
    with StopOnSignal(monitor) as signals:
        thread.start()
        slow = f"measuring {measurement.name} of" if measurement else None
        show_progress(thread, monitor, c, signals, held, slow, report)
    last = ray.get(monitor.read_outcome.remote())
    if signals.received and thread.is_alive() and not last:
        newest = checkpoint.checkpoints(c.run_dir)
        raise KeyboardInterrupt(stopped(c, checkpoint.read_meta(newest[-1])["step"] if newest else 0))
    measuring.failed.extend(ray.get(monitor.read_unmeasured.remote()))
    if failure:
        if isinstance(failure[0], ray.train.ControllerError) and not report:
            raise OSError(f"workers could not be started: {last_line(failure[0])}") from failure[0]
        if not last:
            raise failure[0]
    if last["error"]:
        raise ValueError(f"{c.run_dir}: {last['error']}")
    if signals.received:
        raise KeyboardInterrupt(stopped(c, last["step"]))
    return _result(c)


def stopped(c: TrainConfig, step: int) -> str:
    return f"{c.stage} stopped at step {step}: the same command goes on from there"


def is_finished(c: TrainConfig) -> bool:
    """Whether it is trained and measured.

    Reads the newest checkpoint's files only when it is the last one: the workers read them else, each a part.
    """
    newest = checkpoint.latest_checkpoint(c.run_dir, read=False, say=lambda line: None)  # the workers say it
    if not newest or checkpoint.read_meta(newest)["step"] != c.num_iterations:
        return False
    if checkpoint.read_meta(newest)["progress"].get("measured", c.num_iterations) != c.num_iterations:
        return False
    return newest == checkpoint.latest_checkpoint(c.run_dir)


def run_config(
    run_dir: str, use_gpu: bool, max_failures: int = 0, callbacks: Sequence[ControllerCallback] = ()
) -> ray.train.RunConfig:
    filesystem, path = storage.filesystem(run_dir)
    ours = GPU_WORKER_ENV if use_gpu else CPU_WORKER_ENV
    theirs = {name: value for name, value in os.environ.items() if name in ours or name.startswith(NETWORK_ENV)}
    return ray.train.RunConfig(
        name="ray",
        storage_path=path,
        storage_filesystem=filesystem,
        failure_config=ray.train.FailureConfig(max_failures=max_failures),
        callbacks=list(callbacks),
        logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        worker_runtime_env={"env_vars": ours | theirs},
    )


def _result(c: TrainConfig) -> TrainResult:
    folder = checkpoint.checkpoints(c.run_dir)[-1]
    meta = checkpoint.read_meta(folder)
    return TrainResult(c.run_dir, folder, meta["step"], meta["val/bpb"])


def check_batch(c: TrainConfig, scaling: ray.train.ScalingConfig) -> None:
    T, workers = c.model["sequence_len"], scaling.max_workers
    rows, left = divmod(c.total_batch_size, T)
    if c.stage == "rl" and rows < workers:
        raise ValueError(f"{rows} questions a step for {workers} workers: more --prompts-per-step, or fewer --workers")
    if left or rows < workers:
        raise ValueError(
            f"a batch of {c.total_batch_size} tokens is not whole rows of {T}, one at least for each of "
            f"{workers} workers"
        )


def device_batch_size(c: TrainConfig, scaling: ray.train.ScalingConfig) -> int:
    """The most rows of one forward pass: those asked for, else on GPUs as many as fit by the memory plan.

    On CPUs it does not depend on the memory, of which there is more or less from one start to the next: a resumed run
    should add up in the same order.
    """
    check_batch(c, scaling)  # more GPUs may have come than were asked for
    T = c.model["sequence_len"]
    if c.device_batch_size:
        return c.device_batch_size
    if not scaling.use_gpu:
        return max(1, MAX_TOKENS_PER_CPU // T)
    dtype = worker_dtype(c.dtype, scaling)
    memory = GPU_SHARE * smallest_gpu()
    most = c.total_batch_size // T // scaling.max_workers
    return rows_that_fit(GPTConfig(**c.model), most, scaling.max_workers, False, dtype, memory, c.recompute)


def worker_dtype(dtype: str | None, scaling: ray.train.ScalingConfig) -> torch.dtype:
    """The compute dtype of workers, asked for on a driver that may have no GPU itself."""
    return torch.bfloat16 if scaling.use_gpu and dtype is None else checkpoint.compute_dtype(dtype, "cpu")


def smallest_gpu() -> float:
    """Bytes of the cluster's smallest GPU: as its nodes say, else by its kind, else inf."""
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
    sizes = []
    for node in nodes:
        kinds = [key.partition(":")[2] for key in node["Resources"] if key.startswith("accelerator_type:")]
        try:
            sizes.append(ray.get(_gpu_bytes.options(**pinned(node)).remote(), timeout=60))
        except (ray.exceptions.RayError, OSError, ValueError, subprocess.SubprocessError):
            sizes += map(gpu_memory, kinds)
    return min(sizes, default=math.inf)


@ray.remote
def _gpu_bytes() -> int:
    """Of this node's smallest GPU, by the driver's tool: a task that takes a GPU would wait until one is free."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    return min(int(line) for line in told.split()) * 2**20


def _fit(trainer: Trainer, monitor, failure: list[BaseException], again: bool) -> None:
    """What happens while workers start, as when a port was taken or a host lost, ends fit(): it is called again."""
    while not failure:
        try:
            trainer.fit()
            return
        except BaseException as error:  # for the main thread to raise
            again = again and isinstance(error, ray.train.ControllerError)
            if not again or fails_again(*trainer.actors, [], last_line(error)):
                failure.append(error)
            else:
                monitor.say.remote(f"workers could not be started, once more: {last_line(error)}")


def last_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1]


class StopOnSignal:
    """Within it, the first SIGINT or SIGTERM asks the workers to stop after their step; a second one is as usual.

    What comes at once after the first is no second one: Slurm tells a process by itself and by srun.
    """

    def __init__(self, monitor):
        self.monitor, self.previous, self.received = monitor, {}, 0.0

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # only it may set handlers
            self.previous = {s: signal.signal(s, self.handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number, frame):
        if not self.received:
            print("\nstopping after this step, with a checkpoint (again to stop at once)", flush=True)
            self.received = time.monotonic()
            self.monitor.request_stop.remote()
        elif time.monotonic() > self.received + AT_ONCE_SECONDS:
            self.__exit__()
            signal.raise_signal(number)


def show_progress(
    thread: threading.Thread,
    monitor,
    c: TrainConfig,
    signals: StopOnSignal,
    held: lease.Lease,
    measuring_saved: str | None,
    report: Callable | None = None,
) -> None:
    """One live line on a terminal; elsewhere a line whenever a twentieth of the run is done and at least one in
    PROGRESS_SECONDS; or what report does.

    Ends with the thread, or when a stop was asked for and nothing is left to save: so it is before the first step, and
    in `measuring_saved`.
    """
    live, shown, next_line, said, announced = sys.stdout.isatty() and not report, 0, 0, 0, None
    began = printed = time.monotonic()
    alive, step = True, 0

    def tell(text: str) -> None:
        nonlocal printed
        print("\r\033[K" * live + text, end="" if live else "\n", flush=True)
        printed = time.monotonic()

    while alive:  # once more after its end, for the last lines
        thread.join(0.5)
        alive = thread.is_alive()
        held.check()
        metrics, lines, doing, seconds = ray.get(monitor.read.remote(said))
        said += len(lines)
        for line in lines:
            print("\r\033[K" * live + f"{c.stage}: {line}", flush=True)
        step = metrics["step"] if metrics else 0
        overdue = time.monotonic() - printed > patience(began)
        if report:
            if step != shown:
                report(metrics)
                shown = step
        elif not alive or (step != shown and step < c.num_iterations and (live or step >= next_line or overdue)):
            if metrics:  # the last step's line waits for its measurements
                tell(progress_line(metrics, c))
                shown, next_line = step, step + max(c.num_iterations // 20, 1)
        elif doing and seconds > SLOW_SECONDS and (live or doing != announced or overdue):
            announced = doing
            tell(f"{c.stage}: {doing}, {seconds:.0f} s so far")
        elif not doing and overdue:
            tell(f"{c.stage}: step {step + 1}, {time.monotonic() - printed:.0f} s so far")
        saved = not metrics or (doing and measuring_saved and doing.startswith(measuring_saved))
        if signals.received and (saved or ray.get(monitor.read_outcome.remote())):
            break
    if live:
        print()


def patience(began: float) -> float:
    """Seconds after which there is a line again: few at the start."""
    return min(PROGRESS_SECONDS, max(5.0, (time.monotonic() - began) / 4))


def progress_line(m: dict, c: TrainConfig) -> str:
    left = (c.num_iterations - m["step"]) * m["train/dt"]
    bpb = f" · val/bpb {m['val/bpb']:.4f}" if m["val/bpb"] is not None else ""
    what = f"reward {m['rl/reward']:.3f}" if "rl/reward" in m else f"loss {m['train/loss']:.4f}"
    return (
        f"{c.stage} {m['step']}/{c.num_iterations} · {what}{bpb} · "
        f"{m['train/tok_per_sec']:,.0f} tok/s · mfu {m['train/mfu']:.1%} · "
        f"{m['train/peak_memory_mb']:,.0f} MB · ETA {int(left) // 60}:{int(left) % 60:02d}"
    )
