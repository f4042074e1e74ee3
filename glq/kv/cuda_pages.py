"""What glq.kv.layout does, by CUDA kernels: the Kernels of glq.kv.pages on an NVIDIA GPU."""

from dataclasses import dataclass

import torch
from torch import Tensor

from glq import nvrtc
from glq.kv import cuda_attend, cuda_write
from glq.kv.layout import PageLayout, gather_reference


@dataclass(frozen=True)
class CudaKernels:
    gpu: nvrtc.Launcher

    def write(self, pages: Tensor, layout: PageLayout, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        cuda_write.write(pages, layout, keys, values, slots, self.gpu)

    def gather(
        self, pages: Tensor, layout: PageLayout, page_table_row: Tensor, tokens: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        return gather_reference(pages, layout, page_table_row, tokens, dtype)

    def attend(
        self,
        q: Tensor,
        pages: Tensor,
        layout: PageLayout,
        page_table: Tensor,
        lengths: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        return cuda_attend.attend(q, pages, layout, page_table, lengths, scale, window, softcap, self.gpu)


def takes(layout: PageLayout, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels are for these, whatever the number of queries."""
    return (
        device.type == "cuda"
        and torch.version.cuda is not None
        and nvrtc.available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and not cuda_attend.refusal(layout, layout.heads, dtype)
    )
