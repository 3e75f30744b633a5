"""A small Hub: folders of the Hub's layout, with a few rows in each dataset's own columns."""

import pytest
from hub import ROWS, write_hub


@pytest.fixture(scope="session")
def hub(tmp_path_factory) -> str:
    return write_hub(tmp_path_factory.mktemp("hub"), ROWS)


@pytest.fixture(scope="session")
def offline(tmp_path_factory):
    """Nothing is looked for on the Hub, and what is read is cached in a folder of the tests."""
    import datasets
    import huggingface_hub

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield
