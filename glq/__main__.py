"""Entry point of the `glq` command."""

import sys


def main() -> None:
    """Run the command line; where its libraries are not installed, say which extra brings them."""
    try:
        from glq.cli import app
    except ImportError as error:
        sys.exit(f"glq: the command line needs {error.name}: pip install 'glq[hf]'")
    app()


if __name__ == "__main__":
    main()
