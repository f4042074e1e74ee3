"""The packages that glq takes, with those that they take, in the versions that are installed here: NAME==VERSION.

    python tools/requirements.py [EXTRA …]

What an SBOM and an audit are made from (make sbom, make audit); tools of development are not among them.
"""

import sys
from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def needed(name: str, extras: set[str], found: dict[str, str], seen: set[tuple[str, str]]) -> None:
    """Note the versions of all that a package with these extras takes here."""
    for text in distribution(name).requires or []:
        requirement = Requirement(text)
        takes = [
            extra for extra in ("", *extras) if not requirement.marker or requirement.marker.evaluate({"extra": extra})
        ]
        key = canonicalize_name(requirement.name)
        wanted = {(key, extra) for extra in ("", *requirement.extras)} - seen
        if not takes or not wanted:
            continue
        seen |= wanted
        try:
            if key != "glq":
                found[key] = distribution(key).version.partition("+")[0]  # an advisory knows no builds
            needed(key, {extra for _, extra in wanted}, found, seen)
        except PackageNotFoundError:
            sys.exit(f"{name} takes {text}, which is not installed")


if __name__ == "__main__":
    versions: dict[str, str] = {}
    needed("glq", set(sys.argv[1:]), versions, set())
    print("\n".join(f"{name}=={version}" for name, version in sorted(versions.items())))
