"""Rules that the text of device code keeps (tests/cuda_emulation/README.md): the emulation runs only what it knows."""

import re
from pathlib import Path

_WITH_EMULATION = ("cuda/platform.cuh", "cuda/launch.cuh", "cuda/async_copy.cuh", "cuda/exp2.cuh", "cuda/mma.cuh")

# What must not occur, except in the files named.
_RULES = [
    (r"\basm\b", ("cuda/async_copy.cuh", "cuda/exp2.cuh", "cuda/mma.cuh"), "inline assembly"),
    (r"<<<", (), "a launch that does not go through cuda/launch.cuh"),
    (r"\b__shared__\b", ("cuda/platform.cuh",), "shared memory that does not come from an Arena"),
    (r"\bCUDA_EMULATION\b", _WITH_EMULATION, "code that asks for its compiler"),
    (r"\bmem(cpy|set|move)\s*\(", (), "a call that the checked build does not see"),
    (r"#\s*include\s*<(torch|ATen|c10)/", (), "a header of PyTorch"),
]


def _without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", lambda m: "\n" * m.group().count("\n"), text, flags=re.DOTALL)


def problems(root: Path) -> list[str]:
    """One line for each place in a ``.cu`` or ``.cuh`` file that breaks a rule."""
    found = []
    for path in sorted([*root.glob("cuda/**/*.cu*"), *root.glob("tests/cuda_*/*.cu*")]):
        name = path.relative_to(root).as_posix()
        for number, line in enumerate(_without_comments(path.read_text()).splitlines(), 1):
            for pattern, allowed, what in _RULES:
                if re.search(pattern, line) and name not in allowed:
                    found.append(f"{name}:{number}: {what}")
    return found
