"""What a build's compile_commands.json says of the project's sources."""

import re
from pathlib import Path


def sources_of(file: str) -> list[str]:
    """The .cpp files that a command compiles: the one it names, or those that are compiled as one."""
    if "/Unity/" in file:
        return re.findall(r'^#include "(.*\.cpp)"', Path(file).read_text(), re.MULTILINE)
    return [file] if file.endswith(".cpp") else []
