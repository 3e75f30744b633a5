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
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import PreemptingState, ResizingState
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nanochat_ray import storage
from nanochat_ray.model.gpt import GPTConfig
from nanochat_ray.train import checkpoint, network
from nanochat_ray.train.hosts import LostHosts, Request, scaling_config, wait_for_hosts
from nanochat_ray.train.loop import Measurement, TrainConfig, train_loop_per_worker
from nanochat_ray.train.plan import GPU_SHARE, MAX_TOKENS_PER_CPU, gpu_memory, rows_that_fit
from nanochat_ray.versions import pinned

MAX_FAILURES = 3  # in a row without a new step between: then starting workers again would only repeat it
SAVE_PATIENCE_SECONDS = 120.0  # that a resize waits for a checkpoint
# glibc gives large blocks back to the kernel and gets them again, page by page, at every step: let it keep them.
CPU_WORKER_ENV = {
    "GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=68719476736:glibc.malloc.arena_max=1"
}
# A GPU's blocks of memory grow in place rather than leave gaps. Not yet run.
GPU_WORKER_ENV = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


@ray.remote(num_cpus=0)
class Monitor:
    """Carries progress from the workers to the driver's terminal, and the driver's requests to the workers."""

    def __init__(self):
        self.latest: dict | None = None
        self.lines: list[str] = []
        self.outcome: dict | None = None
        self.stop, self.save = False, False
        self.starts, self.furthest = 0, -1
        self.failure: str | None = None  # the first of the newest workers': the others fail for want of that one

    def begin(self) -> bool:
        """Called by each group of workers when it starts. False: it need not, the run has failed."""
        self.starts += 1
        if self.starts > MAX_FAILURES:
            why = self.failure or "none said why: one may have been killed, or have had too little memory"
            error = f"workers failed {MAX_FAILURES} times in a row without a new step: {why}"
            self.outcome = {"step": self.furthest, "error": error}
        self.failure = None
        return self.starts <= MAX_FAILURES

    def failed(self, rank: int, error: str) -> None:
        self.failure = self.failure or error
        self.say(f"worker {rank} failed: {error}")

    def update(self, metrics: dict) -> None:
        self.latest = metrics
        if metrics["step"] > self.furthest:
            self.starts, self.furthest = 0, metrics["step"]

    def say(self, line: str) -> None:
        self.lines.append(line)

    def read(self, seen: int) -> tuple[dict | None, list[str]]:
        """The newest metrics, and the lines said since the first `seen`."""
        return self.latest, self.lines[seen:]

    def finish(self, outcome: dict) -> None:
        self.outcome = outcome

    def read_outcome(self) -> dict:
        return self.outcome

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
    val_bpb: float


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
) -> TrainResult:
    """Train to the end, unless the run's newest checkpoint is there already.

    record: what config.json keeps; its "inputs" are those of every start of this run.
    report: is given the metrics, which else go to the terminal. For runs of a sweep, which share a cluster: they take
    as many workers as they ask for and not fewer, and the first failure is raised, for the sweep to decide.

    Ctrl-C and SIGTERM end it cleanly with a checkpoint and raise KeyboardInterrupt here. Raises ValueError, before
    anything is written, when the run was begun with other inputs, when there are more workers than rows in a step,
    when the cluster has no room for workers, or when fp8 is asked for without torchao; and later when the loss
    diverged, when the last checkpoint could not be written, or when workers fail again and again; OSError when they
    can't be started, as when they don't reach each other.

    Signals are for this process. Ray ends its workers by SIGTERM itself: one that gets it dies as if it was killed.
    """
    refuse_other_inputs(c.run_dir, record["inputs"])
    done = checkpoint.latest_checkpoint(c.run_dir)
    if done and checkpoint.read_meta(done)["step"] == c.num_iterations:
        print(f"{c.stage}: nothing to do, {c.run_dir} is finished", flush=True)
        return _result(c)
    if c.fp8 and importlib.util.find_spec("torchao") is None:
        raise ValueError("fp8 needs torchao: pip install 'nanochat-ray[gpu]', or leave --fp8 out")
    rows = c.total_batch_size // c.model["sequence_len"]
    scaling = scaling_config(request.workers, request.use_gpu, elastic=report is None, rows=rows)
    check_batch(c, scaling)
    if report is None:
        scaling = wait_for_hosts(request, scaling, c.stage)
    c = replace(c, device_batch_size=device_batch_size(c, scaling))
    storage.write_json(storage.join(c.run_dir, "config.json"), record | provenance())
    if report is None:  # how long Ray Train waits for room for workers before it counts hosts again, instead of 60 s
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    monitor = Monitor.options(scheduling_strategy=here).remote()  # dies with the driver, not with a worker's node
    trainer = ray.train.torch.TorchTrainer(
        train_loop_per_worker,
        train_loop_config=asdict(c) | {"monitor": monitor, "measurement": measurement},
        torch_config=network.TorchConfig(),
        scaling_config=scaling,
        # The monitor counts failures, or the sweep does.
        run_config=run_config(
            c.run_dir, max_failures=0 if report else -1, callbacks=[SaveFirst(monitor), LostHosts(monitor)]
        ),
    )
    failure: list[BaseException] = []
    # fit() blocks: it has a thread of its own, and this one shows progress and takes signals.
    thread = threading.Thread(target=_fit, args=[trainer, monitor, failure, report is None], daemon=True)
    with StopOnSignal(monitor) as signals:
        thread.start()
        show_progress(thread, monitor, c, report)
    if failure:
        if isinstance(failure[0], ray.train.ControllerError) and not report:
            raise OSError(f"workers could not be started: {last_line(failure[0])}") from failure[0]
        raise failure[0]
    last = ray.get(monitor.read_outcome.remote())
    if last["error"]:
        raise ValueError(f"{c.run_dir}: {last['error']}")
    if signals.received:
        raise KeyboardInterrupt(f"{c.stage} stopped at step {last['step']}: the same command goes on from there")
    return _result(c)


def run_config(run_dir: str, max_failures: int = 0, callbacks: Sequence = ()) -> ray.train.RunConfig:
    filesystem, path = storage.filesystem(run_dir)
    return ray.train.RunConfig(
        name="ray",
        storage_path=path,
        storage_filesystem=filesystem,
        failure_config=ray.train.FailureConfig(max_failures=max_failures),
        callbacks=list(callbacks),
        logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        worker_runtime_env={"env_vars": GPU_WORKER_ENV if ray.cluster_resources().get("GPU") else CPU_WORKER_ENV},
    )


def _result(c: TrainConfig) -> TrainResult:
    folder = checkpoint.checkpoints(c.run_dir)[-1]
    meta = checkpoint.read_meta(folder)
    return TrainResult(c.run_dir, folder, meta["step"], meta["val/bpb"])


def check_batch(c: TrainConfig, scaling: ray.train.ScalingConfig) -> None:
    T, workers = c.model["sequence_len"], scaling.max_workers
    rows, left = divmod(c.total_batch_size, T)
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


def _fit(trainer: ray.train.torch.TorchTrainer, monitor, failure: list[BaseException], again: bool) -> None:
    """A host that is lost while workers start ends fit(), which is called again if there were steps since it was."""
    before = None
    while not failure:
        try:
            trainer.fit()
            return
        except BaseException as error:  # for the main thread to raise
            latest, _ = ray.get(monitor.read.remote(0))
            step = latest and latest["step"]
            if not (again and isinstance(error, ray.train.ControllerError)) or step == before:
                failure.append(error)
            else:
                monitor.say.remote(f"workers could not be started, once more: {last_line(error)}")
            before = step


def last_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1]


class StopOnSignal:
    """Within it, the first SIGINT or SIGTERM asks the workers to stop after their step; a second one is as usual."""

    def __init__(self, monitor):
        self.monitor, self.previous, self.received = monitor, {}, False

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # only it may set handlers
            self.previous = {s: signal.signal(s, self.handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number, frame):
        print("\nstopping after this step, with a checkpoint (again to stop at once)", flush=True)
        self.received = True
        self.monitor.request_stop.remote()
        self.__exit__()


def show_progress(thread: threading.Thread, monitor, c: TrainConfig, report: Callable | None = None) -> None:
    """One live line on a terminal; elsewhere a line whenever a twentieth of the run is done; or what report does."""
    live, shown, next_line, said = sys.stdout.isatty() and not report, None, 0, 0
    alive = True
    while alive:  # once more after its end, for the last lines
        thread.join(0.5)
        alive = thread.is_alive()
        metrics, lines = ray.get(monitor.read.remote(said))
        said += len(lines)
        for line in lines:
            print("\r\033[K" * live + f"{c.stage}: {line}", flush=True)
        if metrics is None or metrics["step"] == shown:
            continue
        shown = metrics["step"]
        if report:
            report(metrics)
        elif live:
            print("\r\033[K" + progress_line(metrics, c), end="", flush=True)
        elif shown >= next_line or shown == c.num_iterations:
            print(progress_line(metrics, c), flush=True)
            next_line = shown + max(c.num_iterations // 20, 1)
    if live and shown is not None:
        print()


def progress_line(m: dict, c: TrainConfig) -> str:
    left = (c.num_iterations - m["step"]) * m["train/dt"]
    bpb = f" · val/bpb {m['val/bpb']:.4f}" if m["val/bpb"] is not None else ""
    return (
        f"{c.stage} {m['step']}/{c.num_iterations} · loss {m['train/loss']:.4f}{bpb} · "
        f"{m['train/tok_per_sec']:,.0f} tok/s · mfu {m['train/mfu']:.1%} · "
        f"{m['train/peak_memory_mb']:,.0f} MB · ETA {int(left) // 60}:{int(left) % 60:02d}"
    )
