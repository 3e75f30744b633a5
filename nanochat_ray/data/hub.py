"""Data sets of the Hugging Face Hub: lists the files of their splits and downloads them.

Environment: HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE.
"""

import logging
import posixpath
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from nanochat_ray import storage
from nanochat_ray.data.download import fetch_all

CONNECTION_ATTEMPTS = 4  # per request to the Hub
URI = re.compile(r"hf://datasets/[^@]+@([^/]+)/(.+)", re.S)


@dataclass(frozen=True)
class HubFile:
    path: str  # in its repository
    url: str
    size: int  # bytes
    blob: str  # hash of the content

    def copy(self, repository: str) -> str:
        """URI of the local copy. It depends on the content, so commits that don't change the file share the copy."""
        return storage.join(folder(repository), f"{self.blob[:12]}-{posixpath.basename(self.path)}")


def folder(repository: str) -> str:
    return storage.join(storage.home(), "sources", "hub", *repository.split("/"))


def ask(what: str, hint: str, function: Callable, *arguments, **options):
    """Call a function of the Hub's libraries. Raises OSError with one line that begins with `what` if it fails.

    The libraries retry when the server is busy, but not when a connection breaks off: that is retried here."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns six times about retries before each error
    for left in reversed(range(CONNECTION_ATTEMPTS)):
        try:
            return function(*arguments, **options)
        except Exception as error:
            # A broken connection is an error of the HTTP library, which is neither OSError nor ValueError.
            if left and not isinstance(error, OSError | ValueError):
                time.sleep(1)
                continue
            lines = (str(error).strip() or type(error).__name__).splitlines()
            listed = 2 if "Config name is missing" in lines[0] else 1  # the second line names the configs
            reason = " ".join(lines[:listed]).rstrip(".")
            if type(error).__name__ == "RepositoryNotFoundError" or "doesn't exist on the Hub or" in reason:
                reason = "the Hub has no data set of this name, or it is private: correct the name, or set HF_TOKEN"
            if "gated" in reason:
                reason += ": accept its terms on the Hub and set HF_TOKEN to a token that may read it"
            raise OSError(f"{what}: {reason}{hint}") from None


def splits(repository: str, config: str | None) -> dict[str, list[HubFile]]:
    """The files of each split, in order. If the Hub can't be reached, those of the last listing.

    Raises OSError with one line if the data set can't be listed."""
    listing = storage.join(folder(repository), f"{config or 'default'}.json")
    try:
        found = _ask_for_splits(repository, config)
    except OSError as error:
        if not storage.exists(listing):
            raise
        print(f"source: {error}; using the list of files from an earlier run", flush=True)
        return {split: [HubFile(**file) for file in of_split] for split, of_split in storage.read_json(listing).items()}
    storage.write_json(listing, {split: list(map(asdict, of_split)) for split, of_split in found.items()})
    return found


def _ask_for_splits(repository: str, config: str | None) -> dict[str, list[HubFile]]:
    import datasets  # takes a second
    from huggingface_hub import HfApi, hf_hub_url

    what = ":".join(filter(None, ("hub", repository, config)))
    builder = ask(what, "", datasets.load_dataset_builder, repository, config)
    found: dict[str, list] = {
        str(split): [URI.fullmatch(str(uri)) for uri in uris] for split, uris in builder.config.data_files.items()
    }
    if not any(found.values()):
        raise OSError(f"{what}: it has no data files")
    if None in (matches := [match for of_split in found.values() for match in of_split]):
        raise OSError(f"{what}: a local folder {repository} hides the data set: name that folder, or run elsewhere")
    revision, paths = matches[0][1], [match[2] for match in matches]
    below = posixpath.commonpath([posixpath.dirname(path) for path in paths]) or None

    def tree() -> dict:
        listed = HfApi().list_repo_tree(repository, below, recursive=True, revision=revision, repo_type="dataset")
        return {entry.path: entry for entry in listed}

    entries = ask(what, "", tree)

    def hub_file(path: str) -> HubFile:
        url = hf_hub_url(repository, path, repo_type="dataset", revision=revision)
        return HubFile(path, url, entries[path].size, entries[path].blob_id)

    return {split: [hub_file(match[2]) for match in of_split] for split, of_split in found.items()}


def download(repository: str, wanted: list[HubFile]) -> None:
    """Download the files that have no local copy. Raises OSError if the disk has too little space."""
    from huggingface_hub import get_token

    place = folder(repository)
    present = set(storage.listdir(place))
    missing = [file for file in wanted if storage.name(file.copy(repository)) not in present]
    needed, free = sum(file.size for file in missing), storage.free_bytes(place)
    if free is not None and needed > free:
        raise OSError(
            f"{len(missing)} files of {repository} take {needed / 1e9:.1f} GB ({storage.disk(place)}): make room, set "
            "NANOCHAT_RAY_HOME to a folder of another disk, or take fewer --shards"
        )
    if missing:
        print(f"source: {repository}: {len(missing):,} files to download, {needed / 1e6:,.1f} MB", flush=True)
        fetch_all([(file.url, file.copy(repository)) for file in missing], get_token())
