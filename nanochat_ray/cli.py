"""nanochat-ray: every stage as a command. `nanochat-ray STAGE --help` lists a stage's options."""

import atexit
import gc
import inspect
import os
import sys
from dataclasses import dataclass
from typing import Annotated, Any

import tyro
from tyro.conf import Positional, subcommand

from nanochat_ray import measuring
from nanochat_ray.session import bpb, check_once, connect, one_line_errors, start_ray


def prepare(args: list[str]) -> None:
    """text -> tokenizer and packed token rows"""
    from nanochat_ray.data.prepare import PrepareOptions, find_sources, parse_sources, run
    from nanochat_ray.data.sources import is_named

    check_once("--source", args)
    options = parse("prepare", PrepareOptions, args)
    texts, _ = parse_sources(options)
    found = None if any(map(is_named, texts)) else find_sources(options)  # fail before starting Ray if one is missing
    start_ray()
    if options.dry_run:
        from nanochat_ray.data import stats

        stats.run(options, found)
        return
    prepared = run(options, found)
    print(f"rows       {prepared.rows}\ntokenizer  {prepared.tokenizer}")


def pretrain(args: list[str]) -> None:
    """rows -> a base model"""
    from nanochat_ray.evals.core import CoreInTraining, in_training
    from nanochat_ray.train.pretrain import PretrainOptions, find_rows, run

    @dataclass
    class Options(CoreInTraining, PretrainOptions):
        pass

    options = parse("pretrain", Options, args)
    measurement = in_training(options)
    find_rows(options)  # fail before starting Ray if there are no rows
    start_ray()
    result = run(options, measurement)
    print(f"val/bpb    {bpb(result.val_bpb)}\ncheckpoint {result.checkpoint}")


def sft(args: list[str]) -> None:
    """a base model and conversations -> a chat model"""
    from nanochat_ray.data.conversations import prepare_conversations
    from nanochat_ray.data.tokenizer import Tokenizer
    from nanochat_ray.evals.chat import ChatCoreInTraining, in_training
    from nanochat_ray.evals.tasks import MixtureOptions, sft_conversations
    from nanochat_ray.train.checkpoint import read_meta, resolve_checkpoint
    from nanochat_ray.train.sft import SftOptions, run

    @dataclass
    class Options(ChatCoreInTraining, MixtureOptions, SftOptions):
        pass

    options = parse("sft", Options, args)
    base = resolve_checkpoint(options.checkpoint)  # fail before downloading anything if the checkpoint is wrong
    measurement = in_training(options, options.datasets_dir)
    if options.needs_ray:
        start_ray()
        conversations = sft_conversations(options)
    else:  # fail before starting Ray if the data can't be downloaded
        conversations = sft_conversations(options)
        start_ray()
    sequence_len = read_meta(base)["model_config"]["sequence_len"]
    rows = prepare_conversations(conversations, Tokenizer.load(base), sequence_len)
    result = run(options, rows, measurement)
    print(f"val/bpb    {bpb(result.val_bpb)} over the assistant's tokens\ncheckpoint {result.checkpoint}")


def rl(args: list[str]) -> None:
    """a chat model and a task -> a model that is better at the task, by reinforcement learning"""
    from nanochat_ray.evals.tasks.rewarded import TaskOptions, load_task
    from nanochat_ray.train.checkpoint import resolve_checkpoint
    from nanochat_ray.train.rl import RlOptions, run

    @dataclass
    class Options(TaskOptions, RlOptions):
        pass

    options = parse("rl", Options, args)
    resolve_checkpoint(options.checkpoint)  # fail before downloading anything if the checkpoint is wrong
    task = None if options.task == "docstrings" else load_task(options)  # making docstrings needs Ray
    start_ray()
    result = run(options, task or load_task(options))
    print(f"checkpoint {result.checkpoint}")


def evaluate(args: list[str]) -> None:
    """a checkpoint -> its bits per byte (eval bpb), CORE score (eval core), or ChatCORE score (eval chat)"""
    from nanochat_ray.evals import bpb, chat, core

    kinds = (
        Annotated[bpb.BpbOptions, subcommand("bpb", description="bits per byte of validation text")]
        | Annotated[core.CoreOptions, subcommand("core", description="accuracy over few-shot tasks")]
        | Annotated[chat.ChatCoreOptions, subcommand("chat", description="accuracy of a chat model's answers")]
    )
    options = parse("eval", kinds, args)
    if isinstance(options, bpb.BpbOptions):
        with measuring.patiently("eval bpb"):
            measured = bpb.run(options)
        for name, value in measured.items():
            print(f"{name:<10} {value:.6f}")
        return
    if isinstance(options, chat.ChatCoreOptions):
        with measuring.patiently("eval chat"):
            result = chat.run(options)
        print(result.table())
        return
    if options.actors:
        start_ray()
    print(f"CORE       {core.run(options).core_metric:.6f}")


def plan(args: list[str]) -> None:
    """what a depth implies: sizes, memory, time, cost"""
    from nanochat_ray.train.plan import PlanOptions, run

    run(parse("plan", PlanOptions, args))


def doctor(args: list[str]) -> None:
    """checks a cluster's hosts before training: versions, GPUs, disks, storage, network

    It checks every host and prints a line per finding: ok, warning or FAIL, what was found, and the remedy. The exit
    code is 1 if a check fails. The checks send 64 MB between neighbouring hosts and write small files to
    NANOCHAT_RAY_HOME, which takes some seconds. They take no CPUs or GPUs from running jobs.
    """
    from nanochat_ray.doctor import DoctorOptions, run

    options = parse("doctor", DoctorOptions, args)
    if options.address:
        os.environ["RAY_ADDRESS"] = options.address
    connect()
    sys.exit(0 if run(options) else 1)


def chat(args: list[str]) -> None:
    """talk to a checkpoint"""
    from nanochat_ray.inference.chat import ChatOptions
    from nanochat_ray.inference.chat import chat as talk
    from nanochat_ray.train.checkpoint import load_model

    options = parse("chat", ChatOptions, args)
    model, tokenizer, _ = load_model(options.checkpoint, options.device, options.dtype)
    talk(model, tokenizer, options)


def leaderboard(args: list[str]) -> None:
    """runs that reached a CORE score or a val/bpb, by training time"""
    from experiments.leaderboard import LeaderboardOptions, run

    run(parse("leaderboard", LeaderboardOptions, args))


# Settings of Ray Serve for `nanochat-ray serve`. Replicas have one event loop each, answer HTTP themselves and use gRPC
# among each other. They don't wait for a load balancer when they stop, and a new replica may reuse a port at once.
# Serve's controller polls twice a second instead of ten times, which saves 3 % of a CPU. Replicas run at normal
# priority, not at the low one of Ray's workers.
FAST_SERVE = {
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    "RAY_SERVE_PORT_QUARANTINE_S": "0",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serving.connections:limit_connections",
    "RAY_worker_niceness": "0",
    "grpc_proxy": "",  # without it, gRPC would use http_proxy
}


def serve(args: list[str]) -> None:
    """a checkpoint -> a chat service over HTTP, with OpenAI's API and a page"""
    import ray

    own_ray = "RAY_ADDRESS" not in os.environ
    if own_ray:  # set these before Ray Serve is imported; a cluster's processes have their own settings
        os.environ |= FAST_SERVE
    from serving.app import ServiceOptions, app
    from serving.start import address, check_port, free_port, start, watch

    class Options(ServiceOptions):
        host: str = "127.0.0.1"
        """Address to listen on. 0.0.0.0 listens on all addresses of this machine."""
        port: int = 8000
        """Port to listen on. 0 takes any free port."""

    options = parse("serve", Options, args)
    options.port = options.port or free_port()
    application = app(options)  # fail before starting Ray if a checkpoint is wrong
    check_port(options.host, options.port)
    proxy_port = options.port
    if own_ray:  # ChatService takes the public port. Serve's proxy is unused but must run, so it gets a free port.
        proxy_port = free_port()
        os.environ["RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT"] = str(options.port)
        os.environ["RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT"] = str(options.port + 1)
    start_ray()
    start(application, options.replicas * max(1, len(options.checkpoint)), options.host, proxy_port, not own_ray)
    local = options.host in ("127.0.0.1", "::1", "localhost")
    reach = "only from this machine; --host 0.0.0.0 opens it to others" if local else "from all machines that reach it"
    print(f"serving    http://{address(options.host, options.port)} ({reach}); Ctrl-C stops it", flush=True)
    try:
        watch(options.host, options.port)
    finally:
        ray.shutdown()


@dataclass
class ImportOptions:
    src: Positional[str]
    """nanochat's checkpoint folder, with files such as model_000600.pt and meta_000600.json."""
    out: Positional[str]
    """Folder to write the checkpoint to."""
    tokenizer: str
    """Folder of the tokenizer: nanochat's tokenizer.pkl, or tokenizer.tiktoken and tokenizer.json."""
    step: int | None = None
    """Step to import. Default: the newest."""


def import_(args: list[str]) -> None:
    """a nanochat checkpoint -> ours"""
    options = parse("import", ImportOptions, args)
    from nanochat_ray.train.checkpoint import import_nanochat

    print(import_nanochat(options.src, options.out, options.tokenizer, options.step))


def export(args: list[str]) -> None:
    """a checkpoint -> the format of another program: Hugging Face's transformers, nanochat"""
    from nanochat_ray.export import ExportOptions, run

    print(run(parse("export", ExportOptions, args)))


STAGES = {
    "prepare": prepare,
    "pretrain": pretrain,
    "sft": sft,
    "rl": rl,
    "eval": evaluate,
    "chat": chat,
    "serve": serve,
    "plan": plan,
    "doctor": doctor,
    "leaderboard": leaderboard,
    "import": import_,
    "export": export,
}


def parse(stage: str, options: Any, args: list[str]):
    return tyro.cli(options, args=args, prog=f"nanochat-ray {stage}", description=inspect.getdoc(STAGES[stage]))


def usage() -> str:
    lines = [f"  {name:<11} {str(stage.__doc__).splitlines()[0]}" for name, stage in STAGES.items()]
    return "\n".join(["usage: nanochat-ray STAGE [options]   (STAGE --help lists them)", "", *lines])


@one_line_errors
def main() -> None:
    # Importing torch and Ray makes half a million objects. With Python's default threshold, the garbage collector
    # traverses them repeatedly, which takes a second of each start, and again at exit.
    gc.set_threshold(50_000)
    atexit.register(gc.freeze)
    stage, *args = sys.argv[1:] or ["--help"]
    if stage in ("-h", "--help"):
        print(usage())
    elif stage in STAGES:
        STAGES[stage](args)
    else:
        raise ValueError(f"no stage {stage!r}; there are {', '.join(STAGES)}")


if __name__ == "__main__":
    main()
