"""The CORE bundle (DCLM, arXiv:2406.11794): downloads it once, and reads its tasks.

A bundle is a folder. core.yaml lists the tasks, eval_meta_data.csv has the accuracy of guessing in each of them, and
eval_data/ has a jsonl file per task with one example per line.
"""

import csv
import io
import json
import random
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import PurePosixPath

import yaml

from nanochat_ray import storage
from nanochat_ray.data import download
from nanochat_ray.node_cache import localize

URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
SHUFFLE_SEED = 1337


@dataclass(frozen=True)
class Example:
    """One question. texts has its full text with each of the choices; texts[gold] has the right one.

    In language_modeling there is one text. opening is its part before the continuation, with the delimiter.
    """

    texts: list[str]
    gold: int
    opening: str | None = None


@dataclass(frozen=True)
class Task:
    name: str
    kind: str  # multiple_choice, schema or language_modeling
    shots: int
    baseline: float  # the accuracy of guessing, from 0 to 1
    examples: list[Example]  # shuffled, and cut to max_per_task


def fetch() -> str:
    """Return the folder of the published bundle under NANOCHAT_RAY_HOME. The first call downloads and unpacks it.

    Raises OSError if the download fails, and a later call resumes it. Raises ValueError if the archive is damaged.
    """
    folder = storage.join(storage.home(), "eval_bundle")
    if storage.exists(storage.join(folder, "core.yaml")):
        return folder
    archive = folder + ".zip"
    print(f"downloading {URL}", flush=True)
    try:
        download.fetch(URL, archive)
    except (FileNotFoundError, PermissionError) as error:
        if error.errno:  # an error of the local disk; the server's errors have no errno
            raise
        raise FileNotFoundError(f"{URL} can't be had: give the folder of a bundle with --bundle") from None
    try:
        _unpack(localize(archive), folder)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        storage.remove(archive)
        raise ValueError(f"{archive} was damaged ({error}) and is deleted: run again to download it") from None
    storage.remove(archive)
    return folder


def _unpack(archive, folder: str) -> None:
    """Write the archive's bundle to the folder, and check each file against its CRC.

    core.yaml is written last, so a folder that has it is complete.
    """
    with zipfile.ZipFile(archive) as zipped:
        names = [name for name in zipped.namelist() if not name.endswith("/")]
        roots = [PurePosixPath(name).parent for name in names if PurePosixPath(name).name == "core.yaml"]
        if not roots:
            raise zipfile.BadZipFile("it holds no core.yaml")
        root = min(roots, key=lambda path: len(path.parts))
        inside = [name for name in names if PurePosixPath(name).is_relative_to(root) and ".." not in name.split("/")]
        for name in sorted(inside, key=lambda name: name == str(root / "core.yaml")):
            storage.write_bytes(storage.join(folder, str(PurePosixPath(name).relative_to(root))), zipped.read(name))


def read_tasks(bundle_dir: str, max_per_task: int = -1, names: list[str] | None = None) -> list[Task]:
    """Return all tasks in the order of core.yaml, or those in `names` in that order.

    max_per_task limits the examples of each task; -1 takes all. Raises FileNotFoundError or ValueError with the file,
    and with the line if there is one.
    """
    uri = storage.join(bundle_dir, "core.yaml")
    try:
        entries = {entry["label"]: entry for entry in yaml.safe_load(_read(uri))["icl_tasks"]}
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise ValueError(f"{uri} does not list icl_tasks with a label each ({_one_line(error)})") from None
    if unknown := [name for name in names or [] if name not in entries]:
        raise ValueError(f"no task {', '.join(unknown)} in {uri}; there are {', '.join(entries)}")
    baselines = _read_baselines(storage.join(bundle_dir, "eval_meta_data.csv"), names or list(entries))
    tasks = []
    for name, baseline in baselines.items():
        entry = entries[name]
        try:
            kind, shots = entry["icl_task_type"], int(entry["num_fewshot"][0])
            data, delimiter = str(entry["dataset_uri"]), entry.get("continuation_delimiter", " ")
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ValueError(f"{uri}: task {name} has a missing or invalid field ({_one_line(error)})") from None
        if kind not in PARSERS:
            raise ValueError(f"{uri}: task {name} has icl_task_type {kind!r}, not one of {', '.join(PARSERS)}")
        data_uri = storage.join(bundle_dir, "eval_data", data)
        examples = _read_examples(data_uri, PARSERS[kind], delimiter, max_per_task)
        tasks.append(Task(name, kind, shots, baseline, examples))
    return tasks


def _read_baselines(uri: str, names: list[str]) -> dict[str, float]:
    rows = csv.DictReader(io.StringIO(_read(uri)))
    percent: dict = {row.get("Eval Task"): row.get("Random baseline") for row in rows}
    baselines = {}
    for name in names:
        try:
            baselines[name] = float(percent[name]) / 100
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{uri} has no Random baseline for the Eval Task {name}") from None
        if not 0 <= baselines[name] < 1:
            raise ValueError(f"{uri}: the Random baseline of {name} is {percent[name]}, not within 0 to 100 percent")
    return baselines


def _read_examples(uri: str, parse, delimiter: str, max_per_task: int) -> list[Example]:
    lines = [(number, line) for number, line in enumerate(_read(uri).split("\n"), 1) if line.strip()]
    random.Random(SHUFFLE_SEED).shuffle(lines)
    examples = []
    for number, line in lines[:max_per_task] if max_per_task > 0 else lines:
        try:
            examples.append(parse(json.loads(line), delimiter))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"{uri} line {number} is not an example of its task ({_one_line(error)})") from None
    if not examples:
        raise ValueError(f"{uri} holds no examples")
    return examples


def _multiple_choice(fields: dict, delimiter: str) -> Example:
    texts = [fields["query"] + delimiter + choice for choice in fields["choices"]]
    return Example(texts, _gold(fields, texts))


def _schema(fields: dict, delimiter: str) -> Example:
    texts = [context + delimiter + fields["continuation"] for context in fields["context_options"]]
    return Example(texts, _gold(fields, texts))


def _language_modeling(fields: dict, delimiter: str) -> Example:
    opening = fields["context"].strip() + delimiter
    return Example([opening + fields["continuation"]], 0, opening)


PARSERS = {"multiple_choice": _multiple_choice, "schema": _schema, "language_modeling": _language_modeling}


def _gold(fields: dict, texts: list[str]) -> int:
    if not isinstance(fields["gold"], int) or not 0 <= fields["gold"] < len(texts):
        raise ValueError(f"gold is {fields['gold']!r} of {len(texts)} choices")
    return fields["gold"]


def _read(uri: str) -> str:
    try:
        return storage.read_text(uri)
    except FileNotFoundError:
        raise FileNotFoundError(f"{uri} is missing: is its folder a CORE bundle?") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{uri} is damaged: {error}") from None


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
