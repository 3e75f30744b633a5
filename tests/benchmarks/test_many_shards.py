"""The benchmark of sources of many files, with few."""

import pytest

from benchmarks import many_shards


@pytest.mark.slow
def test_it_prepares_the_files_that_it_wrote(ray_session, nanochat_ray_home, tmp_path):
    result = many_shards.measure(many_shards.Options(files=40, run=True), tmp_path)
    assert result["files"] == 40 and result["run, s"] > 0
    made = {path.parent.name for path in (tmp_path / "home" / "rows").glob("*/manifest.json")}
    assert len(made - {"plan"}) == 1  # the benchmark itself writes a manifest into plan/
