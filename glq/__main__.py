"""Entry point of the `glq` command."""

import sys


def main() -> None:
    """Run the command line; where its libraries are not installed, say which extra brings them."""
    try:
        from glq.cli import app
    except ImportError as error:
        from glq.errors import how_to_install

        sys.exit(f"glq: the command line needs {error.name}: {how_to_install('hf')}")
    except KeyboardInterrupt:  # while it starts; typer catches a later one
        sys.exit(130)
    app()


if __name__ == "__main__":
    main()
