"""The door of the command `kdunet`: says in one sentence what to install where the training extra is missing."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command, or exit with 1 and the sentence."""
    try:
        from kdunet.cli import main as command
    except ModuleNotFoundError as exc:
        if (exc.name or "").startswith("kdunet"):
            raise  # a mistake of ours, not a missing package
        sys.exit(f"Error: the command kdunet needs {exc.name!r}: pip install 'kdunet[train,cpu]'.")
    command(prog_name="kdunet")


if __name__ == "__main__":
    main()
