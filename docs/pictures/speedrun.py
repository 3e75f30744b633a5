"""Makes README's pictures from a finished speedrun: its curves, and its chat page in Chromium.

python docs/pictures/speedrun.py ~/.cache/nanochat_ray/runs/NAME
"""

import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from matplotlib.figure import Figure
from playwright.sync_api import sync_playwright

from nanochat_ray.train.metrics import read_metrics

HERE = Path(__file__).parent
INK, PAPER, ACCENT = "#1f2933", "#ffffff", "#3451b2"
CURVES = [
    ("", "train/loss", "pretraining: loss, nats per token"),
    ("-sft", "train/loss", "finetuning: loss, nats per token"),
    ("-rl", "rl/reward", "reinforcement learning: reward"),
]
SMOOTHING = 0.9  # of rewards, which differ much from step to step
PORT, START_SECONDS = 8642, 180
QUESTION = "Fatima had 45 shells and gave away 30. How many shells are left?"


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} FOLDER_OF_A_SPEEDRUN")
    run = sys.argv[1].rstrip("/")
    draw_curves(run)
    photograph(run)


def draw_curves(run: str) -> None:
    figure = Figure(figsize=(10.5, 2.6), facecolor=PAPER, layout="constrained")
    for axes, (suffix, name, title) in zip(figure.subplots(1, 3), CURVES, strict=True):
        lines = [line for line in read_metrics(run + suffix) if name in line]
        if not lines:
            sys.exit(f"error: {run + suffix} has no {name}: give the folder of a finished speedrun")
        values = [line[name] for line in lines]
        if name == "rl/reward":
            values = smooth(values)
        axes.plot([line["step"] for line in lines], values, color=ACCENT, linewidth=1.6)
        axes.set_title(title, color=INK, fontsize=10, loc="left")
        axes.set_xlabel("step", color=INK, fontsize=9)
        axes.tick_params(colors=INK, labelsize=9)
        axes.grid(color="#e1e5ea", linewidth=0.8)
        axes.spines[:].set_visible(False)
    figure.savefig(HERE / "curves.png", dpi=110)


def smooth(values: list[float]) -> list[float]:
    """The exponential mean of the values so far, corrected for its start as in Adam."""
    smoothed, mean = [], 0.0
    for count, value in enumerate(values, 1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        smoothed.append(mean / (1 - SMOOTHING**count))
    return smoothed


def photograph(run: str) -> None:
    """Serve the run's last model, ask it a question on its page, and save what a reader sees."""
    command = [shutil.which("nanochat-ray"), "serve", "--checkpoint", f"{run}-rl", "--port", str(PORT), "--no-compile"]
    service = subprocess.Popen(command)
    try:
        wait_until_healthy(service)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 900, "height": 560})
            page.goto(f"http://127.0.0.1:{PORT}")
            page.fill("#question", QUESTION)
            page.click("#send")
            page.wait_for_selector("#send:visible:not([disabled])", timeout=60_000)
            page.wait_for_timeout(1000)
            page.screenshot(path=HERE / "chat.png")
            browser.close()
    finally:
        service.terminate()
        service.wait(60)


def wait_until_healthy(service: subprocess.Popen) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and service.poll() is None:
        try:
            with urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5):
                return
        except (URLError, OSError):
            time.sleep(1)
    sys.exit("error: the service did not start: see above")


if __name__ == "__main__":
    main()
