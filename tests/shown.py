"""Commands that README and docs show: on lines of their own, in blocks of code."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
GENERATED = {
    ROOT / "docs" / "reference" / "commands.md",
    ROOT / "docs" / "reference" / "settings.md",
}
OURS = ("asynception", "make", "python", "pytest")
OTHERS = ["apt-get", "aws", "cp", "docker", "export", "gcloud", "kubectl", "pip", "ray", "sbatch"]
STAND_INS = re.compile(r"\[--section\.key value \.\.\.\]")
"""Where a page shows that anything may follow."""

_START = re.compile(
    rf"^(?:\$ )?(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?({'|'.join([*OURS, *OTHERS])})(?= )", re.MULTILINE
)


@dataclass(frozen=True)
class Shown:
    """One command, without its comment, variables of the environment, and what it is piped into."""

    page: str
    words: tuple[str, ...]
    """Of another program than ours: its name and the rest as one word, which may hold commands."""

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words)}"

    @property
    def text(self) -> str:
        """As a shell takes it."""
        is_ours = self.words[0] in OURS
        return shlex.join(self.words) if is_ours else " ".join(self.words)


def shown_on(page: Path) -> Iterator[Shown]:
    text = page.read_text().replace("\\\n", " ")
    for line in blocks(text):
        line = STAND_INS.sub("", line.strip())
        if found := _START.match(line):
            yield Shown(str(page.relative_to(ROOT)), _words(found[1], line[found.start(1) :]))


def _words(program: str, line: str) -> tuple[str, ...]:
    if program not in OURS:
        return program, " ".join(line.removeprefix(program).split())
    return tuple(shlex.split(line.split(" | ")[0].replace("…", ""), comments=True))


def blocks(text: str) -> Iterator[str]:
    """Lines of fenced or indented code."""
    fenced = False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield line


COMMANDS = [shown for page in PAGES if page not in GENERATED for shown in shown_on(page)]
