"""The speedrun with the gpu preset, made so small that a CPU does its steps; started by test_rehearsal.py."""

import os
from dataclasses import replace

from experiments import speedrun
from nanochat_ray.evals import bundle

speedrun.PRESETS["gpu"] = replace(speedrun.PRESETS["gpu"], vocab_size=512, total_batch_size=2 * 2048)
bundle.URL = f"{os.environ['HF_ENDPOINT']}/eval_bundle.zip"

if __name__ == "__main__":
    speedrun.main()
