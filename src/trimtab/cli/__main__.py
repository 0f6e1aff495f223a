"""Entry of the command line: `trimtab` and `python -m trimtab.cli`."""

from __future__ import annotations

import sys

from trimtab.extras import MissingExtraError, require


def main() -> None:
    """Run the command line; without the extra `cli` it ends with status 1 and says how to install it."""
    try:
        for package in ("typer", "rich"):
            require(package, extra="cli")
    except MissingExtraError as error:
        sys.exit(f"trimtab: {error}")
    from trimtab.cli.main import main as run

    sys.exit(run())


if __name__ == "__main__":
    main()
