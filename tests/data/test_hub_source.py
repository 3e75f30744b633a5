"""Sources by name from a Hub that a local server plays, mixed with a folder: rows, weights, what goes wrong."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub import serving, write_hub

from nanochat_ray.data import prepare, sources
from nanochat_ray.data.loader import Rows
from nanochat_ray.data.mixture import read_parts, shares
from nanochat_ray.data.prepare import PrepareOptions

pytestmark = pytest.mark.slow  # Ray downloads the files


def documents(word: str, count: int = 60) -> list[dict]:
    return [{"text": f"{word} number {i} " * 12, "id": i} for i in range(count)]


@pytest.fixture
def played(tmp_path, monkeypatch):
    """acme/web: config small with three training files, and other with a validation split and another column."""
    import datasets
    from huggingface_hub import constants

    folder = tmp_path / "hub"
    other = [{"body": line["text"]} for line in documents("other")]
    write_hub(folder, {("acme/web", "other", "train"): other, ("acme/web", "other", "validation"): other[:9]})
    (folder / "acme/web/small").mkdir()
    for i in range(3):
        pq.write_table(pa.Table.from_pylist(documents(f"part{i}")), folder / f"acme/web/small/train-0000{i}.parquet")
    card = folder / "acme/web/README.md"
    listed = "- config_name: small\n  data_files:\n  - split: train\n    path:\n"
    listed += "".join(f"    - small/train-0000{i}.parquet\n" for i in range(3)) + "---\n"
    card.write_text(card.read_text().removesuffix("---\n") + listed)
    with serving(folder) as server:
        for offline in (datasets.config, constants):
            monkeypatch.setattr(offline, "HF_HUB_OFFLINE", False)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.url)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
        yield server


def test_a_data_set_of_the_hub_mixed_with_a_folder(ray_session, played, tmp_path, golden, nanochat_ray_home, capsys):
    played.gated.add("acme/web")
    with pytest.raises(OSError, match=r"^hub:acme/web:small: .*gated.* set HF_TOKEN to a token that may read it$"):
        sources.resolve("hub:acme/web:small")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", played.token)
        source = sources.resolve("hub:acme/web:small", shards=1)
    played.gated.clear()
    assert "source: hub:acme/web:small: using the first 1 of 2 files; --shards sets how many" in capsys.readouterr().out
    assert (source.name, len(source.train), len(source.val), source.most) == ("web-small", 1, 1, 2)
    assert next(iter(sources.read_documents(source.val[0]))).startswith("part2 number 0")  # the split's last file
    assert source.fingerprint == sources.resolve("hub:acme/web:small", shards=1).fingerprint

    (tmp_path / "year=2024").mkdir()
    (tmp_path / "year=2024" / "web-small.jsonl").write_text("\n".join(map(json.dumps, documents("mine", 200))))
    options = {"sequence_len": 32, "tokenizer": str(golden / "nanochat_d2"), "shards": 1}
    hub, mine = "hub:acme/web:small", f"{tmp_path}/year=2024"
    by_weight = prepare.run(PrepareOptions([f"{hub}=0.7", f"{mine}=0.3"], **options))
    parts = read_parts(by_weight.rows)
    assert [(part.name, part.weight) for part in parts] == [("web-small", 0.7), ("year-2024", 0.3)]
    assert [path.name for path in Path(by_weight.rows).iterdir()] == ["manifest.json"]
    sizes = [len(Rows(f"{part.rows}/train")) for part in parts]
    assert sum(sizes) == by_weight.manifest["splits"]["train"]["rows"]
    assert "prepare: a mixture of 70.0% web-small, 30.0% year-2024" in capsys.readouterr().out

    before = {path: path.stat().st_mtime_ns for path in nanochat_ray_home.rglob("*") if path.is_file()}
    requests = len([path for _, path in played.requests if path.endswith(".parquet")])
    by_size = prepare.run(PrepareOptions([hub, mine], **options))
    assert [float(share) for share in shares([part.weight for part in read_parts(by_size.rows)])] == [
        pytest.approx(size / sum(sizes)) for size in sizes
    ]
    new = {path for path in nanochat_ray_home.rglob("*") if path.is_file() and path not in before}
    assert new == {Path(by_size.rows) / "manifest.json"}  # other weights take no new rows
    assert len([path for _, path in played.requests if path.endswith(".parquet")]) == requests
    assert prepare.run(PrepareOptions(mine, **options)).rows == parts[1].rows  # alone it is the same

    capsys.readouterr()
    played.gated.add("acme/web")
    assert sources.resolve(hub, shards=1) == source
    assert "; using the list of files from an earlier run" in capsys.readouterr().out
    played.gated.clear()
    wanted = 3 * 32 * sizes[0]
    more = prepare.run(PrepareOptions([f"{hub}=0.5", f"{mine}=0.5"], tokens=2 * wanted, **options))
    assert f"{wanted:,} are wanted: taking 2 web-small shards" in capsys.readouterr().out
    assert len(read_parts(more.rows)) == 2 and read_parts(more.rows)[0].rows != parts[0].rows


def test_splits_and_columns_are_named(ray_session, played):
    source = sources.resolve("hub:acme/web:other", text_column="body")
    assert (len(source.train), len(source.val), source.name) == (1, 1, "web-other")
    assert len(list(sources.read_documents(source.val[0]))) == 9
    lone = sources.resolve("hub:acme/web:other:validation", text_column="body")
    assert lone.name == "web-other-validation" and lone.train[0].part == "train" and lone.val[0].part == "val"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("hub:acme/none", "hub:acme/none: the Hub has no data set of this name, or it is private"),
        ("hub:acme/web", "hub:acme/web: Config name is missing"),
        ("hub:acme/web:large", "hub:acme/web:large: BuilderConfig 'large' not found"),
        ("hub:acme/web:small:test", "hub:acme/web:small:test: there is no split test, only train"),
        ("hub:acme/web:other", "no column text, content, document or body.*body"),
        ("hub:", "name a data set of the Hub as hub:OWNER/NAME"),
        ("hub:a/b:c:d:e", "name a data set of the Hub as hub:OWNER/NAME"),
    ],
)
def test_what_the_hub_does_not_have_is_one_line(ray_session, played, source, said):
    column = "title" if source.endswith(":other") else None
    said = "no column title.*body" if column else said
    with pytest.raises((OSError, ValueError), match=said) as error:
        sources.resolve(source, text_column=column)
    assert "\n" not in str(error.value)


def test_the_tokenizer_of_a_mixture_does_not_depend_on_its_weights(tmp_path, capsys):
    for word in ("alpha", "omega"):
        text = "\n\n".join(f"{word} {'abc'[i % 3]} {i} of {word}s" for i in range(300))
        (tmp_path / f"{word}.txt").write_text(text)
    first, second = f"{tmp_path}/alpha.txt", f"{tmp_path}/omega.txt"

    def tokenizer(*given):
        options = PrepareOptions(list(given), vocab_size=300)
        return prepare.find_or_train_tokenizer(options, prepare.find_sources(options))

    folder, learned = tokenizer(first, second)
    assert tokenizer(f"{second}=0.9", f"{first}=0.1")[0] == folder
    assert len(learned.encode("alpha")) < 5 and len(learned.encode("omega")) < 5
    assert tokenizer(first)[0] != folder
