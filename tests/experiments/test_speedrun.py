"""The main job, from docstrings to a chat answer, on a model that is too small to be right."""

import json
import sysconfig
from dataclasses import replace

import pytest

from experiments import held_out, preflight, speedrun
from nanochat_ray import measuring
from nanochat_ray.inference.engine import Engine
from nanochat_ray.inference.sampling import SamplingParams
from nanochat_ray.train.checkpoint import load_model
from nanochat_ray.train.metrics import read_metrics


@pytest.mark.slow
def test_a_speedrun_talks_and_a_second_one_has_nothing_to_do(
    ray_session, nanochat_ray_home, capsys, monkeypatch, tmp_path
):
    """With the docstrings of the standard library alone, as those of all packages take a minute."""
    library = sysconfig.get_path("stdlib")
    monkeypatch.setattr(sysconfig, "get_path", lambda name, *scheme, **more: library)
    who = tmp_path / "me.jsonl"
    who.write_text(json.dumps([{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]) + "\n")
    options = speedrun.SpeedrunOptions(depth=1, minutes=0.05, run="quick", identity=str(who))
    report = speedrun.run(options)
    shown = capsys.readouterr().out
    runs = nanochat_ray_home / "runs"
    stages = json.loads((runs / "quick" / "stages.json").read_text())
    data = ["source", "tokenizer", "rows", "sft data", "rl data"]
    assert [s["stage"] for s in stages] == [*data, "pretrain", "sft", "rl", "chat"]
    val_bpb, reinforced = stages[5]["result"]["val/bpb"], stages[7]["result"]
    assert {*reinforced} == {"checkpoint", "steps", "pass@1 before", "pass@4 before", "pass@1", "pass@4"}
    assert 1 < val_bpb < 4
    assert f"{who}: 1 in OpenAI's format" in shown
    rates = [*(f"\n{kind}: " for kind in held_out.JUDGES), " of 100 right\n> "]
    for expected in (report, f"{val_bpb:.4f}", *rates, "=== samples", "nanochat-ray chat --checkpoint"):
        assert expected in shown, expected
    assert "<svg" in (runs / "quick" / "report.html").read_text()
    assert read_metrics(str(runs / "quick-sft"))[-1]["val/bpb"] > 0
    assert "reward" in (runs / "quick-rl" / "samples.md").read_text()

    model, tokenizer, meta = load_model(str(runs / "quick-sft"))
    base = load_model(str(runs / "quick"))[2]
    assert meta["stage"] == "sft"
    assert (base["total_batch_size"], meta["total_batch_size"]) == (4096, 2048)
    assert meta["lrs"] == {name: pytest.approx(0.8 * lr / 2**0.5) for name, lr in base["lrs"].items()}
    prompt = tokenizer.render_for_completion({"messages": [{"role": "user", "content": "Spell cat."}]})
    (completion,) = Engine(model, tokenizer).generate([prompt], SamplingParams(max_tokens=4, temperature=0.0))
    assert completion.tokens or completion.finish_reason == "stop"

    before = {path: path.stat().st_mtime_ns for path in runs.rglob("step_*/*")}
    assert speedrun.run(options) == report
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("step_*/*")} == before


def test_finetuning_has_a_row_for_each_worker(ray_session):
    """Its batches are smaller than those of pretraining, which may have had more workers."""
    job = speedrun.find_job(speedrun.SpeedrunOptions(preset="cpu", depth=1, rehearse=True))
    assert speedrun.sft_options(job, "base", rows=100).workers is None
    crowded = replace(job, scaling=replace(job.scaling, num_workers=8))
    assert crowded.scaling.max_workers == 8
    assert speedrun.sft_options(crowded, "base", rows=100).workers == 4


def test_the_gpu_preset_is_refused_without_gpus_and_an_object_store_is_not_measured(ray_session, monkeypatch):
    with pytest.raises(ValueError, match="no GPU"):
        speedrun.find_job(speedrun.SpeedrunOptions(preset="gpu"))
    job = speedrun.find_job(speedrun.SpeedrunOptions(preset="gpu", use_gpu=False))
    assert (job.plan.depth, job.plan.num_iterations, job.shards) == (24, 5568, 172)
    assert job.after == {"core", "sft", "chatcore", "rl"} and job.mixture.mixture == "hub"
    with pytest.raises(ValueError, match="take a smaller --depth"):
        preflight.memory(job.plan, job.scaling)
    assert speedrun.find_job(speedrun.SpeedrunOptions(preset="gpu", use_gpu=False, skip=["sft"])).after == {"core"}
    monkeypatch.setenv("NANOCHAT_RAY_HOME", "s3://bucket/home")
    assert "rows 1.0 GB = 1.0 GB in s3://bucket/home" in preflight.disk({"rows": 1e9})


def test_a_stage_that_only_measures_may_fail_and_is_measured_by_the_next_start(tmp_path):
    measuring.failed.clear()
    stages = speedrun.Stages(str(tmp_path))
    stages.run("pretrain", lambda: 3, lambda steps: {"steps": steps})
    assert stages.measure("core", (tmp_path / "core.yaml").read_text, dict) is None
    assert len(measuring.failed) == 1 and measuring.failed[0].startswith("core failed: FileNotFoundError: ")
    again = speedrun.Stages(str(tmp_path))
    assert again.result("pretrain") == {"steps": 3} and again.result("core") == {}
    assert again.measure("core", lambda: {"core_metric": 0.1}, dict) == {"core_metric": 0.1}
    measuring.failed.clear()


def test_a_full_disk_costs_the_times_of_stages_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(speedrun.storage, "write_json", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    measuring.failed.clear()
    assert speedrun.Stages(str(tmp_path)).run("pretrain", lambda: 3, lambda steps: {}) == 3
    assert measuring.failed == ["writing stages.json failed: OSError: [Errno 28] No space left"]
    measuring.failed.clear()
