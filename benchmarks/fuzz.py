"""Coverage-guided fuzzing of all that decodes bytes from the wire and from disk, by atheris.

    python benchmarks/fuzz.py --runs 1000000                 # each target of fuzz_targets.py
    python benchmarks/fuzz.py --target manifests --runs 5000000 --keep corpus

A target that raises anything but what it promises, hangs, or takes much memory ends with a
traceback and the bytes that did it, in a file. Needs `pip install atheris`.
"""

import argparse
import logging
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

MEMORY_MB = 2000
HANG_S = 20
CHILD = "--child"
SCRATCH = Path("/dev/shm")
"""For files that targets write, in memory; libFuzzer ends a process without clearing up."""


def fuzz(name: str, options: list[str]) -> None:
    """In a process of its own, which libFuzzer ends."""
    import atheris

    logging.disable(logging.WARNING)
    # Only what is imported here is followed: our own code, and the Python that it calls.
    with atheris.instrument_imports(include=["ps", "worker", "model", "asynception", "tarfile"]):
        from fuzz_targets import TARGETS
    target = TARGETS[name]

    def one(data: bytes) -> None:
        target(data)

    atheris.Setup([sys.argv[0], *options], one)
    atheris.Fuzz()


def run(name: str, runs: int, seconds: int, keep: Path) -> str:
    """One target; a line with what was executed and covered, or an exit with what was found."""
    from fuzz_targets import TARGETS

    corpus = keep / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(TARGETS[name].seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)
    limits = [f"-runs={runs}", f"-max_total_time={seconds}", f"-timeout={HANG_S}"]
    limits += [f"-rss_limit_mb={MEMORY_MB}", "-print_final_stats=1", "-verbosity=1"]
    options = [*limits, f"-artifact_prefix={keep}/{name}-", str(corpus)]
    command = [sys.executable, __file__, CHILD, name, *options]
    with tempfile.TemporaryDirectory(dir=SCRATCH if SCRATCH.is_dir() else None) as scratch:
        done = subprocess.run(
            command,
            env={**os.environ, "TMPDIR": scratch},
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    if done.returncode:
        sys.exit(f"{name}: {(done.stdout + done.stderr)[-6000:]}")
    return f"{name}: {summary(done.stdout + done.stderr)}"


def summary(said: str) -> str:
    """From libFuzzer's lines."""
    executed = int(re.findall(r"number_of_executed_units:\s*(\d+)", said)[-1])
    peak_mb = int(re.findall(r"peak_rss_mb:\s*(\d+)", said)[-1])
    progress = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", said)
    first, last = progress[0], progress[-1]
    return (
        f"{executed:,} executions, edges {first[0]} to {last[0]}, features {last[1]}, "
        f"corpus {last[2]}, {peak_mb} MB at most"
    )


def main() -> None:
    """Parse the command line."""
    if sys.argv[1:2] == [CHILD]:
        fuzz(sys.argv[2], sys.argv[3:])
        return
    try:
        import atheris  # noqa: F401
    except ImportError:
        sys.exit("skipped: atheris is not installed (pip install 'asynception[fuzz]')")
    from fuzz_targets import TARGETS

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--target", choices=[*TARGETS, "all"], default="all")
    parser.add_argument("--runs", type=int, default=100_000, help="executions of each target")
    parser.add_argument("--seconds", type=int, default=0, help="at most, for each; 0: no limit")
    parser.add_argument("--keep", type=Path, help="folder for inputs; a new one unless given")
    given = parser.parse_args()
    keep = given.keep or Path(tempfile.mkdtemp(prefix="fuzz-"))
    for name in TARGETS if given.target == "all" else [given.target]:
        print(run(name, given.runs, given.seconds, keep), flush=True)


if __name__ == "__main__":
    main()
