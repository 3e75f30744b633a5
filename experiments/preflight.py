"""Checks in the first seconds of a job what it will need hours later: data, disk, memory, packages.

A check is a function that returns a text, or raises OSError, ValueError or ImportError with the remedy.
"""

import importlib.util
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import ray
import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from nanochat_ray import storage
from nanochat_ray.data import sources
from nanochat_ray.evals import bundle, chat
from nanochat_ray.evals.tasks import own
from nanochat_ray.evals.tasks.common import from_hub
from nanochat_ray.model.scaling import RunPlan
from nanochat_ray.train import checkpoint, launch
from nanochat_ray.train.plan import GPU_SHARE, predict_memory, rows_that_fit

Checks = dict[str, Callable[[], str]]

TIMEOUT = 10  # seconds to connect, and seconds to wait for a byte
# A server that is busy for a moment is not a failure. urllib3 waits as long as Retry-After says.
RETRIES = Retry(
    total=5, connect=2, backoff_factor=0.5, status_forcelist=(429, 500, 502, 503, 504), raise_on_status=False
)
# Checkpoints on disk at most: the last two, the best and a new one. Finetuning needs fewer because it has few steps.
PRETRAIN_CHECKPOINTS, SFT_CHECKPOINTS = 4, 2

SMOLTALK, MMLU = "HuggingFaceTB/smol-smoltalk", "cais/mmlu"
GSM8K, ARC, HUMANEVAL = "openai/gsm8k", "allenai/ai2_arc", "openai/openai_humaneval"
# (dataset, config, split) of the Hub's mixture, of RL and of ChatCORE, as evals/tasks loads them
SFT_DATASETS = {
    (SMOLTALK, None, "train"),
    (SMOLTALK, None, "test"),
    (MMLU, "auxiliary_train", "train"),
    (MMLU, "all", "test"),
    (GSM8K, "main", "train"),
    (GSM8K, "main", "test"),
}
RL_DATASETS = {(GSM8K, "main", "train"), (GSM8K, "main", "test")}
CHATCORE_DATASETS = {
    (ARC, "ARC-Easy", "test"),
    (ARC, "ARC-Challenge", "test"),
    (MMLU, "all", "test"),
    (GSM8K, "main", "test"),
    (HUMANEVAL, "openai_humaneval", "test"),
}


def run(checks: Checks) -> None:
    """Run all checks in parallel and print a line for each. Raises ValueError if one fails."""
    began, failed = time.monotonic(), 0
    with ThreadPoolExecutor(len(checks)) as pool:
        results = {name: pool.submit(check) for name, check in checks.items()}
        for name, result in results.items():
            try:
                print(f"  ok    {name}: {result.result()}", flush=True)
            except (OSError, ValueError, ImportError) as error:
                failed += 1
                print(f"  FAIL  {name}: {error}", flush=True)
    print(f"  {len(checks)} checks in {time.monotonic() - began:.1f} s", flush=True)
    if failed:
        raise ValueError(f"{failed} of {len(checks)} checks failed: fix them, or --skip the stages that need them")


# Data


def climbmix(shards: int) -> str:
    """Check the first and the last missing training shard and the validation shard."""
    _, _, missing = sources.climbmix_files(shards)
    looked_at, token = {*missing[:1], *missing[-2:]}, os.environ.get("HF_TOKEN")
    sizes = [first_bytes(sources.climbmix_url(name), token) for name in looked_at]
    return f"{len(missing)} files to download, {gb(len(missing) * max(sizes, default=0))}"


def datasets(wanted: set[tuple[str, str | None, str]], datasets_dir: str | None) -> Checks:
    if not wanted:
        return {}
    import datasets as library  # it takes a second, and several threads must not import it at once

    splits = defaultdict(set)
    for name, config, split in sorted(wanted, key=str):
        splits[name, config].add(split)
    look = partial(dataset, library.load_dataset_builder, datasets_dir)
    return {" ".join(filter(None, key)): partial(look, *key, needed) for key, needed in splits.items()}


def dataset(builder: Callable, datasets_dir: str | None, name: str, config: str | None, splits: set[str]) -> str:
    """Check that the dataset has the splits and, on the Hub, read the first bytes of each file."""
    from huggingface_hub import HfFileSystem, get_token, hf_hub_url

    files = from_hub(builder, name, config, datasets_dir).config.data_files
    if lacking := splits - set(files):
        raise ValueError(f"it has no split {', '.join(sorted(lacking))}, only {', '.join(map(str, files))}")
    size, uris = 0, [str(uri) for of_split in files.values() for uri in of_split]
    for uri in uris:
        if uri.startswith("hf://"):
            found = HfFileSystem().resolve_path(uri)
            url = hf_hub_url(found.repo_id, found.path_in_repo, repo_type=found.repo_type, revision=found.revision)  # ty: ignore[missing-union-attribute]
            size += first_bytes(url, get_token())
    return f"{len(uris)} file{'s' * (len(uris) > 1)}" + f", {gb(size)}" * (size > 0)


def core_bundle(folder: str | None) -> str:
    folder = folder or storage.join(storage.home(), "eval_bundle")
    if storage.exists(storage.join(folder, "core.yaml")):
        return f"{len(bundle.read_tasks(folder, 1))} tasks in {folder}"
    return f"{bundle.URL}, {gb(first_bytes(bundle.URL))}"


def first_bytes(url: str, token: str | None = None) -> int:
    """Read four bytes of a file and return its size in bytes. Raises OSError with the reason if that fails."""
    headers = {"Range": "bytes=0-3"} | ({"Authorization": f"Bearer {token}"} if token else {})
    with requests.Session() as session:
        for scheme in ("https://", "http://"):
            session.mount(scheme, HTTPAdapter(max_retries=RETRIES))
        try:
            with session.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
                if response.status_code in (401, 403):
                    raise PermissionError(
                        f"{url} is not allowed ({response.status_code}): set HF_TOKEN to a token that may read it, and "
                        "accept the dataset's terms on the Hub"
                    )
                response.raise_for_status()
                response.raw.read(4)
                total = response.headers.get("Content-Range", "").rpartition("/")[2]
                return int(total if total.isdigit() else response.headers.get("Content-Length", 0))
        except requests.RequestException as error:
            raise OSError(f"{url} can't be downloaded: {' '.join(str(error).split())}") from None


def sandbox() -> str:
    chat.check_sandbox()
    return "ordinary programs run in it"


# Machine


def disk(parts: dict[str, float]) -> str:
    """Compare the bytes needed, by purpose, with the free space in the home. Object stores don't report theirs."""
    wanted = " + ".join(f"{name} {gb(size)}" for name, size in parts.items() if size) or "nothing"
    wanted, home = f"{wanted} = {gb(sum(parts.values()))}", storage.home()
    if (free := storage.free_bytes(home)) is None:
        return f"{wanted} in {home}, and copies of the rows on each node that trains"
    if sum(parts.values()) > free:
        raise OSError(f"{wanted}, but {gb(free)} free in {home}: make room, or set NANOCHAT_RAY_HOME to a larger disk")
    return f"{wanted}, {gb(free)} free in {home}"


def disk_parts(plan: RunPlan, run_dir: str, shards: int | None, have_rows: bool, finetunes: bool) -> dict[str, float]:
    """{purpose: bytes still to be written}. shards: of climbmix; None for another source."""
    parts = {}
    if shards is not None:
        _, _, missing = sources.climbmix_files(shards)
        parts["text"] = sources.CLIMBMIX_TEXT_BYTES * len(missing)
        parts["rows"] = 0 if have_rows else sources.CLIMBMIX_ROW_BYTES * (shards + 1)
    counts = plan.param_counts
    # fp32: weights, and AdamW's two moments or, for matrices, Muon's one momentum.
    size = 12 * counts["total"] - 4 * counts["transformer_matrices"]
    kept = {run_dir: PRETRAIN_CHECKPOINTS} | ({f"{run_dir}-sft": SFT_CHECKPOINTS} if finetunes else {})
    left = sum(max(0, count - len(checkpoint.checkpoints(run))) for run, count in kept.items())
    return parts | {"checkpoints": size * left}


def memory(plan: RunPlan, scaling: ray.train.ScalingConfig) -> str:
    """Compare the memory plan of a worker with the smallest GPU's memory, or the smallest node's on CPUs."""
    on_cpu, workers = not scaling.use_gpu, scaling.max_workers
    if on_cpu:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        room = min(node.get("memory", 0) + node.get("object_store_memory", 0) for node in nodes)
    else:
        room = GPU_SHARE * launch.smallest_gpu()
    dtype = launch.worker_dtype(None, scaling)
    most = plan.total_batch_size // plan.config.sequence_len // workers
    rows = rows_that_fit(plan.config, max(1, most), workers, on_cpu, dtype, math.inf if on_cpu else room, False)
    needed = sum(predict_memory(plan.config, workers, rows, on_cpu, dtype).values())
    where = "node" if on_cpu else "GPU"
    said = f"{gb(needed)} per worker, with {rows} rows of {plan.config.sequence_len:,} tokens in a forward pass"
    if room == math.inf:
        return said + "; the GPUs' memory is not known yet"
    if needed > room:
        raise ValueError(f"{said}, but a {where} has only {gb(room)}: take a smaller --depth, or more workers")
    return f"{said}, of {gb(room)} on the smallest {where}"


def packages(fp8: bool, use_gpu: bool) -> str:
    if fp8 and not installed("torchao"):
        raise ImportError("--fp8 needs torchao: pip install 'nanochat-ray[gpu]', or omit --fp8")
    optional = {"torchao": "fp8", "kernels": "FlashAttention", "triton": "the engine's kernels"} if use_gpu else {}
    found = [f"{name} {'installed' if installed(name) else 'missing'} ({what})" for name, what in optional.items()]
    return ", ".join(found) or "all that are needed are installed"


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def identity(file: str) -> str:
    return f"{sum(1 for _ in own.conversations(file)):,} conversations in {file}"


def gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 5e7 else f"{size / 1e6:,.1f} MB"
