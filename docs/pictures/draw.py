"""Draws the pictures of the site as SVG: `python docs/pictures/draw.py` writes them beside this file."""

from html import escape
from pathlib import Path

HERE = Path(__file__).parent
CHAR, LINE, PAD, GAP = 7.0, 18, 12, 44  # pixels: a letter, a line of text, a box's border, an arrow
INK, PAPER, FILL, ACCENT = "#1f2933", "#ffffff", "#e8eefc", "#3451b2"

# Each picture is a row of boxes with arrows between them. A box has a title and lines of text. A screen
# reader says the string before the boxes.
FLOWS = {
    "prepare": (
        "prepare reads documents, encodes them, packs them and writes row files",
        [
            ("documents", ["files, Hub,", "docstrings"]),
            ("encode", ["bos first,", "a Ray task", "for each shard"]),
            ("pack", ["best fit into", "rows of T+1"]),
            ("row files", ["Arrow, train/", "and val/,", "manifest.json"]),
        ],
    ),
    "step": (
        "a training step takes rows, computes the loss, reduces gradients, updates, and gathers weights",
        [
            ("rows", ["the next B/T,", "a slice for", "each rank"]),
            ("forward", ["micro-batches,", "sum of losses"]),
            ("backward", ["gradients leave", "as soon as they", "are there"]),
            ("update", ["each rank", "updates what", "it owns"]),
            ("gather", ["weights travel", "in the next", "forward"]),
        ],
    ),
    "workers": (
        "the driver starts Ray Train, which starts workers; the monitor carries progress and requests between them",
        [
            ("driver", ["the command:", "progress lines,", "Ctrl-C"]),
            ("monitor", ["an actor: metrics,", "failures, requests", "to save or stop"]),
            ("Ray Train", ["controller: starts", "workers, again", "after a failure"]),
            ("workers", ["the loop, one", "a GPU or host"]),
        ],
    ),
    "sft": (
        "finetuning renders conversations with a mask, packs them, and trains by the same loop",
        [
            ("conversations", ["mixture, or", "your own files"]),
            ("render", ["ids, and a mask:", "1 = learned"]),
            ("pack", ["rows of T+1", "with the mask"]),
            ("loop", ["targets where", "the mask is 1"]),
            ("chat model", ["a checkpoint"]),
        ],
    ),
    "rl": (
        "reinforcement learning asks questions, judges the answers, and makes the better ones likelier",
        [
            ("questions", ["16 of the task"]),
            ("engine", ["16 answers each,", "by the newest", "weights"]),
            ("reward", ["the task", "judges each"]),
            ("advantage", ["reward − mean", "of its question"]),
            ("loss", ["−A · log π, over", "sampled tokens"]),
        ],
    ),
    "serve": (
        "a request goes from the client to a ChatService, which tokenizes it, to an engine server, and streams back",
        [
            ("client", ["OpenAI's API,", "or the page"]),
            ("ChatService", ["on each host: checks,", "keys, tokens,", "chooses an engine"]),
            ("EngineServer", ["a thread steps", "the engine"]),
            ("Engine", ["scheduler, paged", "cache, sampling"]),
        ],
    ),
    "checkpoint": (
        "a checkpoint is copied to host memory, written by a thread of each rank, and ended by meta.json",
        [
            ("copy", ["state to host", "memory"]),
            ("write", ["a thread of each", "rank, while", "training goes on"]),
            ("all written?", ["ranks agree", "after a step"]),
            ("meta.json", ["last: sizes and", "sha256 of all"]),
            ("prune", ["older ones go"]),
        ],
    ),
    "cache": (
        "two sequences share the blocks of their common prefix; each has further blocks of its own",
        [
            ("block 0", ["tokens 0 … 31", "shared"]),
            ("block 1", ["tokens 32 … 63", "shared"]),
            ("block 2 of A", ["full: can be", "found later"]),
            ("block 3 of A", ["7 tokens of 32:", "grows in place"]),
        ],
    ),
}


def flow(about: str, boxes: list[tuple[str, list[str]]]) -> str:
    """A row of boxes, each as wide as its text, joined by arrows."""
    widths = [max(len(line) * CHAR for line in [title, *lines]) + 2 * PAD for title, lines in boxes]
    height = (max(len(lines) for _, lines in boxes) + 1) * LINE + 2 * PAD
    total = sum(widths) + GAP * (len(boxes) - 1) + 2 * PAD
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total:.0f} {height + 2 * PAD}" role="img">',
        f"<title>{escape(about)}</title>",
        f'<rect width="100%" height="100%" fill="{PAPER}"/>',
        f'<g font-family="sans-serif" font-size="13" fill="{INK}" text-anchor="middle">',
    ]
    x = float(PAD)
    for i, ((title, lines), width) in enumerate(zip(boxes, widths, strict=True)):
        middle = x + width / 2
        frame = f'x="{x:.0f}" y="{PAD}" width="{width:.0f}" height="{height}" rx="6"'
        parts.append(f'<rect {frame} fill="{FILL}" stroke="{ACCENT}"/>')
        heading = f'x="{middle:.0f}" y="{2 * PAD + 10}" font-weight="bold" fill="{ACCENT}"'
        parts.append(f"<text {heading}>{escape(title)}</text>")
        for n, line in enumerate(lines, 1):
            parts.append(f'<text x="{middle:.0f}" y="{2 * PAD + 10 + n * LINE}">{escape(line)}</text>')
        x += width
        if i + 1 < len(boxes):
            y, tip = PAD + height / 2, x + GAP - 4
            parts.append(f'<path d="M{x + 4:.0f} {y:.0f}H{tip:.0f}m-7 -5l7 5l-7 5" fill="none" stroke="{INK}"/>')
        x += GAP
    return "\n".join([*parts, "</g>", "</svg>", ""])


def pictures() -> dict[str, str]:
    return {f"{name}.svg": flow(*picture) for name, picture in FLOWS.items()}


if __name__ == "__main__":
    for name, svg in pictures().items():
        (HERE / name).write_text(svg)
