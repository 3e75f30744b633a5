"""Runs the commands of the tutorials. Each page gets a clone of this repository's last commit and an empty home.

The blocks of a page that are marked as bash run in their order in one shell, which stops at the first error.

    python docs/run_tutorials.py            # all pages; or name some: python docs/run_tutorials.py idea
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
COMMANDS = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)


def main() -> None:
    pages = {path.stem: path for path in sorted((REPOSITORY / "docs" / "tutorials").glob("*.md"))}
    for name in sys.argv[1:] or pages:
        if name not in pages:
            sys.exit(f"error: no tutorial {name!r}; there are {', '.join(pages)}")
        if commands := COMMANDS.findall(pages[name].read_text()):
            began = time.monotonic()
            run(commands)
            print(f"\n{name}: {time.monotonic() - began:.0f} s", flush=True)


def run(commands: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "--quiet", REPOSITORY, f"{folder}/nanochat-ray"], check=True)
        env = os.environ | {"NANOCHAT_RAY_HOME": f"{folder}/home"}
        script = "set -euo pipefail; set -v\n" + "\n".join(commands)
        done = subprocess.run(["bash", "-c", script], cwd=f"{folder}/nanochat-ray", env=env)
        if done.returncode:
            sys.exit(f"error: the commands ended with exit status {done.returncode}: see above")


if __name__ == "__main__":
    main()
