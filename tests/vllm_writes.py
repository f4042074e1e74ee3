"""An extension of vLLM's workers that keeps what a KV cache of glq is given, before it is rounded."""

from pathlib import Path

import torch

from glq.vllm_integration.kv_attention import GlqKvAttention

_written: dict[GlqKvAttention, list[torch.Tensor]] = {}  # in the order of the layers; of this process
_update = GlqKvAttention.do_kv_cache_update


def _keep(self, layer, key, value, kv_cache, slots):
    kept = slots >= 0
    _written.setdefault(self, []).append(torch.stack([key, value])[:, : len(kept)][:, kept].cpu())
    _update(self, layer, key, value, kv_cache, slots)


GlqKvAttention.do_kv_cache_update = _keep


class Writes:
    def save_writes(self, folder: str) -> None:
        """RANK.writes.pt: for each layer [2, tokens, heads, head_dim], keys and values in the order they came."""
        torch.save([torch.cat(parts, 1) for parts in _written.values()], Path(folder) / f"{self.rank}.writes.pt")
