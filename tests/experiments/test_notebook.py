"""The notebook runs from top to bottom, on the miniseries beside it and on a grid with known optima."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

from experiments import sweep
from nanochat_ray.model.scaling import plan_run

DOCS = Path(__file__).resolve().parents[2] / "docs"


def execute(**paths) -> subprocess.CompletedProcess:
    """Its code cells in one process, as a kernel would run them, without a display."""
    cells = json.loads((DOCS / "scaling_laws.ipynb").read_text())["cells"]
    code = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    environment = os.environ | {"MPLBACKEND": "Agg", "PYTHONPATH": os.pathsep.join(sys.path)} | paths
    return subprocess.run([sys.executable, "-c", code], cwd=DOCS, env=environment, capture_output=True, text=True)


def test_it_redraws_results(tmp_path):
    """Parabolas in log N, of transformer and head, with their minima at 0.06·√FLOPs."""
    rows = []
    for budget in (1e18, 4e18):
        for depth in range(6, 18, 2):
            plan = plan_run(depth, target_flops=budget)
            row = dict.fromkeys(sweep.COLUMNS, 0) | {f"params_{k}": n for k, n in plan.param_counts.items()}
            row |= {"run": f"{budget:.3g}-d{depth}", "depth": depth, "flops": budget}
            row["tokens_trained"] = budget / plan.flops_per_token
            row["val_bpb"] = 1 + 0.05 * math.log(plan.scaling_params / (0.06 * budget**0.5)) ** 2
            rows.append(row)
    text = ",".join(sweep.COLUMNS) + "\n" + "".join(",".join(str(row[c]) for c in sweep.COLUMNS) + "\n" for row in rows)
    (tmp_path / "results.csv").write_text(text)
    done = execute(SCALING_LAWS=str(tmp_path / "results.csv"))
    assert done.returncode == 0, done.stderr
    for row in sweep.read_results(str(DOCS / "results"), "miniseries.csv"):
        assert f"val_bpb {row['val_bpb']:.4f}" in done.stdout
    assert "N = transformer + lm_head: N ~ FLOPs^0.5 " in done.stdout
    assert "N = transformer + lm_head, 1e+18 FLOPs: N 6e+07 " in done.stdout
