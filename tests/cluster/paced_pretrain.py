"""Pretrains as the command does, but each step takes as many seconds as the file `pace` of the home says.

A test can so disturb a run at a certain step, and let it end when it is done, without keeping the CPUs busy meanwhile.
Takes the options of the run as JSON.
"""

import json
import os
import sys
import time
from pathlib import Path

from nanochat_ray.session import one_line_errors, start_ray
from nanochat_ray.train import pretrain
from nanochat_ray.train.loop import Measurement


@one_line_errors
def main() -> None:
    options = pretrain.PretrainOptions(**json.loads(sys.argv[1]))
    pace = Path(os.environ["NANOCHAT_RAY_HOME"]) / "pace"

    def wait(model, tokenizer) -> dict:
        time.sleep(float(pace.read_text()))
        return {}

    start_ray()
    pretrain.run(options, Measurement(1, wait))


if __name__ == "__main__":
    main()
