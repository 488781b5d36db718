"""Shows that the tests have power: single wrong changes of the package, each of which they catch.

The changes stand in `mutations/*.toml`. Each is made in a copy of the checkout, and the tests that
it names are run: caught, if one fails. Exits with 1 if a change is not caught.

    OMP_NUM_THREADS=1 .venv/bin/python .ci/mutate.py [influence layers …]
"""

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
CHANGES = Path(__file__).parent / "mutations"


def caught(change: dict[str, object], copy: Path) -> bool:
    """Whether the tests fail after a change; those that fail without it show nothing."""
    path = copy / "curvlinops_diffusion" / str(change["file"])
    text, old = path.read_text(), str(change["old"])
    if text.count(old) != 1:
        raise SystemExit(f"{path}: {text.count(old)} places, not one, have {old!r}.")
    path.write_text(text.replace(old, str(change["new"])))
    command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", *change["tests"]]
    # before an editable install, for the processes that tests start as well
    env = {**os.environ, "PYTHONPATH": str(copy)}
    done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True)
    path.write_text(text)
    if done.returncode not in (0, 1):  # neither passed nor failed: the tests did not run
        raise SystemExit(f"{change['tests']}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 1


def main() -> None:
    """Make every change of the named files, or of all."""
    names = sys.argv[1:] or sorted(path.stem for path in CHANGES.glob("*.toml"))
    changes = [
        change
        for name in names
        for change in tomllib.loads((CHANGES / f"{name}.toml").read_text())["change"]
    ]
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "checkout"
        tracked = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
        for name in tracked.rstrip("\0").split("\0"):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
        for change in changes:
            found = caught(change, copy)
            missed += not found
            print("caught" if found else "MISSED", change["file"], change["says"], flush=True)
    print(f"{len(changes) - missed} of {len(changes)} caught")
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
