"""Uploads a folder to the Hugging Face Hub."""

import os

from huggingface_hub import HfApi

from nanochat_ray import storage


def check(folder: str, format: str) -> None:
    """Raise ValueError if a folder of this format can't be pushed."""
    if format != "hf":
        raise ValueError(f"--push uploads the format hf, not {format}: leave one of them out")
    if not os.environ.get("HF_TOKEN"):
        raise ValueError("--push needs a token of the Hugging Face Hub that may write: set HF_TOKEN")
    if storage.is_remote(folder):
        raise ValueError(f"--push uploads a local folder, and {folder} is not one: give a local folder as OUT")


def push(folder: str, repository: str) -> str:
    """Upload a folder's files as the model USER/NAME, and return its address. A missing repository is created.

    Raises OSError if the Hub refuses it or can't be reached.
    """
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=os.environ["HF_TOKEN"])
    try:
        address = api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export from nanochat-ray")
    except Exception as error:  # errors of the Hub, HTTP and the network have no common class
        raise OSError(f"{repository} could not be pushed: {' '.join(str(error).split())}") from None
    return str(address)
