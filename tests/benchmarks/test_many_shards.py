"""The benchmark of sources of many files, with few."""

from benchmarks import many_shards


def test_it_prepares_the_files_that_it_wrote(ray_session, tmp_path):
    result = many_shards.measure(many_shards.Options(files=40, run=True), tmp_path)
    assert result["files"] == 40 and result["run, s"] > 0
    [manifest] = (tmp_path / "home" / "rows").glob("*/manifest.json")
    assert manifest.parent.name != "plan"
