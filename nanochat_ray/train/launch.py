"""The driver's side of training: starts the workers, shows their progress, and stops them cleanly.

Ray Train's controller restarts workers after a failure. The Monitor actor counts failures and ends the run if they
repeat. The driver's thread shows progress and handles signals, while fit() blocks in another thread.
"""

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

MAX_FAILURES = 3  # in a row without a new step; then another start would fail, too
SLOW_SECONDS = 1.0  # a longer wait gets its own line of progress
SAME_SIGNAL_SECONDS = 1.0  # several signals within this time count as one
SAVE_SECONDS = 120.0  # a resize waits at most so long for a checkpoint
# glibc returns large blocks to the kernel and requests them again at every step. Let it keep them.
CPU_WORKER_ENV = {
    "GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=68719476736:glibc.malloc.arena_max=1"
}
# Let blocks of GPU memory grow in place, so that no gaps are left.
GPU_WORKER_ENV = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
NETWORK_ENV = ("NCCL_", "TORCH_NCCL_", "GLOO_")  # the driver's variables with these prefixes are passed to workers
# Ray Train's timeouts in seconds, unless the driver's environment sets others: to wait for room for workers before
# counting hosts again, to wait for a worker's answer before it counts as dead, and between health checks.
TIMEOUTS = {
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "120",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}


@ray.remote(num_cpus=0)
class Monitor(Failing):
    """Passes progress from the workers to the driver, and the driver's requests to the workers. Counts failures."""

    def __init__(self, run: str = ""):
        super().__init__()
        self.run = run
        self.latest: dict | None = None
        self.lines: list[str] = []
        self.outcome: dict | None = None
        self.stop, self.save = False, False
        self.failures, self.furthest = 0, -1
        # The next three are about the newest group of workers.
        self.errors: dict[int, tuple[str, str | None]] = {}  # {rank: (error, "GPU", "host" or None)}
        self.places: dict[int, Place] = {}  # by rank
        self.fatal: set[str] = set()  # nodes with an error that would repeat after a new start
        self.ended_group = False
        self.doing: tuple[str, float] | None = None  # (name, start time) of work that may take long
        self.begun: Counter = Counter()  # {measurement: starts without an end}
        self.failed_ones: dict[str, dict[int, str]] = {}  # {measurement: {rank: message}}

    def started(self, rank: int, node: str, gpu: str | None = None) -> None:
        if self.ended_group:
            self.places, self.fatal, self.ended_group = {}, set(), False
        self.places[rank] = node, gpu

    def failed(self, rank: int, error: str, may_pass: bool = True, fault: str | None = "host") -> None:
        """Note a worker's error. may_pass: a new start may help. fault: what may be broken, "GPU", "host" or None."""
        self.errors[rank] = error, fault
        if not may_pass:
            self.fatal.add(self.places[rank][0])
        if not self.is_fatal():
            self.say(f"worker {rank} failed: {error}")

    def is_fatal(self) -> bool:
        """Whether workers of every host have failed with an error that would repeat after a new start."""
        return bool(self.fatal) and self.fatal == {node for node, _ in self.places.values()}

    def failed_places(self, dead: list[int]) -> tuple[set[Place], str]:
        """(places where the newest workers failed, run). These are GPUs of ranks that died or had a CUDA error, else
        the host of the first failure. Several GPUs of one host count as the host."""
        ranks = dead or [rank for rank, (_, fault) in self.errors.items() if fault == "GPU"]
        places = [self.places[rank] for rank in ranks if rank in self.places]
        if not places:
            places = [(self.places[rank][0], None) for rank, (_, fault) in [*self.errors.items()][:1] if fault]
        of_node = Counter(node for node, _ in places)
        return {(node, gpu if of_node[node] == 1 else None) for node, gpu in places}, self.run

    def fails_again(self, left_out: set[Place], why: str | None = None) -> bool:
        """Count a failure, after which the places in left_out are avoided. Returns True if the run is over.

        It is over after MAX_FAILURES if no new place is avoided, or if the error would repeat on every host.
        """
        self.failures += 1
        self.ended_group = True
        first = next((error for error, _ in self.errors.values()), None)
        if self.is_fatal():
            self.outcome = {"step": self.furthest, "error": first}
            return True
        if left_out:
            self.say(f"workers failed twice on {described(left_out)}: the run avoids them if there are others")
        over = self.failures >= MAX_FAILURES and not left_out
        if over:
            why = why or first or "no worker reported an error; one may have been killed or run out of memory"
            error = f"workers failed {self.failures} times in a row without a new step: {why}"
            self.outcome = {"step": self.furthest, "error": error}
        self.errors = {}
        return over

    def begins(self, what: str | None) -> None:
        """Note that work starts that may take long, or with None that it has ended."""
        self.doing = (what, time.monotonic()) if what else None
        if what and what.startswith("measuring "):
            self.begun[what.removeprefix("measuring ")] += 1

    def ended(self) -> None:
        """Note that the last work or measurement has ended."""
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
        """Measurements that new workers skip: those that failed, and those during which workers were lost twice."""
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
        """(newest metrics, lines after the first `seen`, name of work in progress, its seconds so far)."""
        what, began = self.doing or (None, time.monotonic())
        return self.latest, self.lines[seen:], what, time.monotonic() - began

    def finish(self, outcome: dict) -> None:
        self.outcome = outcome

    def read_outcome(self) -> dict | None:
        """How the run ended; None if it has not ended."""
        return self.outcome

    def read_unmeasured(self) -> list[str]:
        """One message per failed measurement."""
        return [next(iter(ranks.values())) for ranks in self.failed_ones.values()]

    def request_stop(self) -> None:
        self.stop = True

    def request_save(self) -> None:
        self.save = True

    def saved(self, step: int) -> None:
        self.save = False
        self.say(f"step {step} is saved, because workers are about to be stopped")

    def request(self) -> str | None:
        return "stop" if self.stop else "save" if self.save else None


class SaveFirst(ControllerCallback):
    """Makes the workers save before Ray stops them, to resize the group or because their node is being drained.

    This uses a developer API of Ray, because only that announces a resize before it happens.
    """

    def __init__(self, monitor):
        self.monitor = monitor

    def after_controller_state_update(self, previous_state, current_state) -> None:
        if isinstance(current_state, PreemptingState) and not isinstance(previous_state, PreemptingState):
            self.monitor.request_save.remote()  # Ray lets the workers run until the node's deadline
        if isinstance(current_state, ResizingState):
            self.monitor.request_save.remote()
            deadline = time.monotonic() + SAVE_SECONDS
            while ray.get(self.monitor.request.remote()) == "save" and time.monotonic() < deadline:
                time.sleep(0.1)


@dataclass(frozen=True)
class TrainResult:
    run_dir: str
    checkpoint: str  # the final one
    step: int
    val_bpb: float | None  # None if its measurement failed


def refuse_other_inputs(run_dir: str, inputs: dict) -> None:
    """Raises ValueError if the run was started with other inputs: another model, plan or data."""
    inputs = json.loads(json.dumps(inputs))
    uri = storage.join(run_dir, "config.json")
    if storage.exists(uri):
        theirs = storage.read_json(uri)["inputs"]
        if differing := [key for key in inputs if inputs[key] != theirs.get(key)]:
            was, now = (", ".join(f"{key} {d.get(key)}" for key in differing) for d in (theirs, inputs))
            raise ValueError(f"{run_dir} was started with {was}, not {now}: take another --run name or delete it")


def provenance() -> dict:
    """{"commit": of this code or None, "cluster": its nodes}, to compare runs later."""
    git = ["git", "-C", os.path.dirname(__file__), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    parts = Counter(_node(node["Resources"]) for node in ray.nodes() if node["Alive"])
    cluster = " + ".join(f"{n} × ({part})" if n > 1 else part for part, n in parts.items())
    return {"commit": commit or None, "cluster": cluster}


def _node(resources: dict) -> str:
    """A node's resources as text: "8 × H100" or "2 CPUs"."""
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
    """Train to the end and measure, unless both are done. Failed measurements are added to measuring.failed.

    record: the content of config.json. Its "inputs" must be the same at every start of this run.
    report: gets the metrics in place of the terminal. It is for runs of a sweep, which share a cluster: these take
    exactly the workers that they request, and raise the first failure, so that the sweep decides.
    failing: the sweep's actor of Failing.
    learn: the function that makes a step's gradients; by default from rows. It is pickled to the workers.

    Ctrl-C and SIGTERM stop training with a checkpoint and raise KeyboardInterrupt here.
    Raises ValueError before anything is written: if the run was started with other inputs, if there are more workers
    than rows in a step, if the cluster has no room for workers, if another process holds the run, or if fp8 is set
    without torchao. Raises ValueError later: if the loss diverges, if the last checkpoint can't be written, or if
    workers fail repeatedly or with an error that would repeat. Raises OSError if workers can't be started or don't
    reach each other, and FileNotFoundError if hosts don't see the rows.

    Send signals only to this process. A worker that gets SIGTERM dies at once, because Ray uses it to end workers.
    """
    refuse_other_inputs(c.run_dir, record["inputs"])
    if is_finished(c):
        print(f"{c.stage}: nothing to do, {c.run_dir} is finished", flush=True)
        return _result(c)
    if c.fp8 and importlib.util.find_spec("torchao") is None:
        raise ValueError("--fp8 needs torchao: pip install 'nanochat-ray[gpu]', or omit --fp8")
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
                if not storage.exists(uri):  # someone has deleted the folder
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
    for name, seconds in TIMEOUTS.items():
        os.environ.setdefault(name, seconds)
    # A single machine is never drained, so don't start the actor that watches for it.
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = str(int(can_grow()))
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # Place the monitor on the driver's node, so that it survives the loss of a worker's node.
    monitor = Monitor.options(scheduling_strategy=here).remote(c.run_dir)
    monitor.begins.remote(f"starting {wanted(scaling)}")
    get_or_create_autoscaling_coordinator()  # start it now, because the controller waits for it
    failing = failing or monitor
    trainer = Trainer(
        train_loop_per_worker,
        monitor=monitor,
        failing=failing,
        train_loop_config=asdict(c) | {"monitor": monitor, "measurement": measurement, "learn": learn},
        torch_config=network.TorchConfig(),
        scaling_config=scaling,
        # Ray Train doesn't count failures, because the monitor or the sweep does.
        run_config=run_config(
            c.run_dir,
            scaling.use_gpu,
            max_failures=0 if report else -1,
            callbacks=[SaveFirst(monitor), LostHosts(monitor), GoodHosts(monitor, failing)],
        ),
    )
    failure: list[BaseException] = []
    # fit() blocks, so it runs in a thread. This thread shows progress and handles signals.
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
    return f"{c.stage} stopped at step {step}: run the same command again to continue"


def is_finished(c: TrainConfig) -> bool:
    """Whether the run is trained and measured.

    Verifies the newest checkpoint's files only if it is the last one. Otherwise workers verify them, each a part.
    """
    newest = checkpoint.latest_checkpoint(c.run_dir, read=False, say=lambda line: None)  # workers print its messages
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
        raise ValueError(
            f"{rows} questions per step are too few for {workers} workers: raise --prompts-per-step or lower --workers"
        )
    if left or rows < workers:
        raise ValueError(
            f"--total-batch-size {c.total_batch_size}: give a multiple of {T} tokens, and at least {T} for each "
            f"of {workers} workers"
        )


def device_batch_size(c: TrainConfig, scaling: ray.train.ScalingConfig) -> int:
    """The most rows in a forward pass: those of the options, else on GPUs as many as the memory plan allows.

    On CPUs it does not depend on the memory, which may change between starts: a resumed run must sum in the same order.
    """
    check_batch(c, scaling)  # again, because more GPUs may have joined than were requested
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
    """The compute dtype of the workers. The driver that asks may have no GPU itself."""
    return torch.bfloat16 if scaling.use_gpu and dtype is None else checkpoint.compute_dtype(dtype, "cpu")


def smallest_gpu() -> float:
    """Bytes of the cluster's smallest GPU, as nodes report it, else by its type, else inf."""
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
    """Bytes of this node's smallest GPU, by nvidia-smi, because a task that takes a GPU would wait for a free one."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    return min(int(line) for line in told.split()) * 2**20


def _fit(trainer: Trainer, monitor, failure: list[BaseException], again: bool) -> None:
    """Run fit(), again if it fails while workers start, for example because a port was taken or a host was lost."""
    while not failure:
        try:
            trainer.fit()
            return
        except BaseException as error:  # the main thread raises it
            again = again and isinstance(error, ray.train.ControllerError)
            if not again or fails_again(*trainer.actors, [], last_line(error)):
                failure.append(error)
            else:
                monitor.say.remote(f"workers could not be started, trying again: {last_line(error)}")


def last_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1]


class StopOnSignal:
    """Within it, the first SIGINT or SIGTERM asks the workers to stop after their step. A second one acts as usual.

    Signals right after the first are ignored, because Slurm sends one to the process and srun sends another.
    """

    def __init__(self, monitor):
        self.monitor, self.previous, self.received = monitor, {}, 0.0

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # only the main thread may set handlers
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
        elif time.monotonic() > self.received + SAME_SIGNAL_SECONDS:
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
    """Show progress: one live line on a terminal; else a line per twentieth of the run and at least one per
    PROGRESS_SECONDS; or call report.

    Returns when the thread ends, or when a stop is requested and there is nothing to save. That is so before the first
    step, and during the measurement that `measuring_saved` begins with, which follows a checkpoint.
    """
    live, shown, next_line, said, announced = sys.stdout.isatty() and not report, 0, 0, 0, None
    began = printed = time.monotonic()
    alive, step = True, 0

    def tell(text: str) -> None:
        nonlocal printed
        print("\r\033[K" * live + text, end="" if live else "\n", flush=True)
        printed = time.monotonic()

    while alive:  # one more round after the thread's end prints the last lines
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
            if metrics:  # the line of the last step is printed after its measurements
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
    """Seconds between two lines of progress; shorter at the start."""
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
