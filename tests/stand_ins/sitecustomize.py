"""Lets torchvision as PyPI has it, built for CUDA, be imported beside a torch for CPUs: no test shows a model an image.

On a PYTHONPATH, Python runs this when it starts: vLLM looks at models in processes of its own.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    without_operators = "+cpu" not in version("torchvision")
except PackageNotFoundError:
    without_operators = False
if without_operators:
    import torch

    if torch.version.cuda is None:
        operators = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
