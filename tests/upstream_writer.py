"""Checkpoints as upstream glq writes them, with random codes, and the weights that these mean.

Written from the format's description for the tests alone, value by value: nothing here is shared with glq's reader but
the tables, which tests hold to the digests of the description.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from glq.upstream import codebooks

CPU = torch.device("cpu")
WEIGHTS = {2: "inv_resid_scale", 3: "inv_resid_scale2", 4: "inv_resid_scale3"}


def rotation(size: int) -> np.ndarray:
    """B of a size, dense."""
    b, first = np.zeros((size, size)), 0
    for bit in reversed(range(size.bit_length())):
        width = 1 << bit
        if size & width:
            for i in range(width):
                for j in range(width):
                    b[first + i, first + j] = (-1) ** bin(i & j).count("1") / math.sqrt(width)
            first += width
    return b


def signs(size: int, rng) -> np.ndarray:
    return rng.choice([-1.0, 1.0], size)


def table(name: str) -> np.ndarray:
    return getattr(codebooks, f"{name}_table")().on(CPU).double().numpy()


def shell_stage(rows: int, columns: int, rng, values: np.ndarray):
    """A tensor of codes and the matrix that it means."""
    codes = rng.integers(0, len(values), (rows, -(-columns // 8)))
    decoded = values[codes].reshape(rows, -1)[:, :columns]
    return torch.from_numpy(codes.astype(np.uint16).view(np.int16)), decoded


def e8p_stage(rows: int, columns: int, rng):
    codes = rng.integers(0, 65536, (rows, columns // 8))
    packed = np.zeros((rows // 16, columns // 64, 8, 4), dtype=np.uint64)
    for index in np.ndindex(packed.shape):
        a, b, r, c = index
        row, group = 16 * a + 2 * r, 2 * (4 * b + c)
        words = [codes[row, group], codes[row + 1, group], codes[row, group + 1], codes[row + 1, group + 1]]
        value = sum((int(w) >> 8) << 8 * i for i, w in enumerate(words))
        value |= sum((int(w) >> j & 1) << 32 + 4 * j + i for i, w in enumerate(words) for j in range(8))
        packed[index] = value
    return torch.from_numpy(packed.view(np.int64)), table("e8p")[codes].reshape(rows, columns)


def e81b_stage(rows: int, columns: int, rng):
    codes = rng.integers(0, 256, (rows, columns // 8)).astype(np.uint8)
    return torch.from_numpy(codes.view(np.int64)), table("e81b")[codes].reshape(rows, columns)


def trellis_value(state: int, tlut) -> list[float]:
    if tlut is not None:
        h = state * (state + 1)
        u, v = tlut[h >> 6 & 511]
        return [-u if h >> 15 & 1 else u, v]
    h = (state * 89226354 + 64248484) % 2**32
    r = (h & 0x8FFF8FFF) ^ 0x3B603B60
    halves = np.array([r >> 16, r & 0xFFFF], dtype=np.uint16).view(np.float16)
    return [float(halves[0] + halves[1])]


def trellis_stage(rows: int, columns: int, k: int, rng, tlut=None):
    packed = np.zeros((rows // 32, columns // 32, 32, 2, 2, k), dtype=np.uint8)
    decoded = np.zeros((rows, columns))
    per_step = 1 if tlut is None else 2
    for tile_row, tile_column in np.ndindex(rows // 16, columns // 16):
        bits = rng.integers(0, 2, 256 * k)
        for g in range(32):
            number = int("".join(map(str, bits[8 * k * g : 8 * k * (g + 1)])), 2)
            packed[tile_row // 2, tile_column // 2, g, tile_column % 2, tile_row % 2] = list(
                number.to_bytes(k, "little")
            )
        for t in range(256 // per_step):
            window = [bits[(t * k * per_step + i) % len(bits)] for i in range(16)]
            for v, value in enumerate(trellis_value(int("".join(map(str, window)), 2), tlut)):
                p = per_step * t + v
                row = 8 * (p >> 1 & 1) + (p >> 5)
                column = 8 * (p >> 2 & 1) + 2 * (p >> 3 & 3) + (p & 1)
                decoded[16 * tile_row + row, 16 * tile_column + column] = value
    return torch.from_numpy(packed.reshape(-1, 32 * k).view(np.int16)), decoded


def power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


class Writer:
    """Random matrices of one codec.

    codec: e8_shell, e8_relaxed, e8p, 3inst or hyb. bits: 2 … 8. legacy: powers of two, and an empty second stage.
    """

    def __init__(self, codec: str, bits: int, *, legacy: bool = False, values: np.ndarray | None = None) -> None:
        self.codec, self.bits, self.legacy = codec, bits, legacy
        self.rng = np.random.default_rng(7)
        self.values = values
        self.tlut = self.rng.normal(size=(512, 2)).astype(np.float16) if codec == "hyb" else None

    @property
    def config(self) -> dict:
        config = {"quant_method": "glq", "codesz": 8, "bpw": self.bits, "layer_bpw": {"model.other.name": 3}}
        if self.codec in ("hyb", "3inst"):
            return config | {"codebook": "trellis", "variant": self.codec, "trellis_layout": "kernel"}
        return config | {"codebook": self.codec}

    def padded(self, rows: int, columns: int) -> tuple[int, int]:
        if self.legacy:
            return power_of_two(rows), power_of_two(columns)
        return (-(-rows // 16) * 16, -(-columns // 64) * 64) if self.codec == "e8p" else (rows, columns)

    def stages(self, rows: int, columns: int):
        """Names of codes and weights, and (codes, decoded) of each stage."""
        if self.codec in ("hyb", "3inst"):
            first = min(self.bits, 4)
            yield "trellis_packed", None, trellis_stage(rows, columns, first, self.rng, self.tlut)
            if self.bits > 4:
                made = trellis_stage(rows, columns, self.bits - 4, self.rng, self.tlut)
                yield "trellis_packed2", "inv_resid_scale2", made
            return
        for stage in range(1, (self.bits + 1) // 2 + 1):
            number, small = "" if stage == 1 else str(stage), 2 * stage > self.bits
            if self.codec == "e8p":
                made = (e81b_stage if small else e8p_stage)(rows, columns, self.rng)
                yield f"Qidxs{number}_{'e81b' if small else 'e8p'}", WEIGHTS.get(stage), made
            else:
                values = self.values
                if values is None:
                    values = table("shell" if self.codec == "e8_shell" else "relaxed")
                made = shell_stage(rows, columns, self.rng, values[:256] if small else values)
                yield f"Qidxs{number}", WEIGHTS.get(stage), made

    def matrix(self, rows: int, columns: int):
        """Tensors by the endings of their names, and the weight [rows, columns] fp64 that they mean."""
        m, n = self.padded(rows, columns)
        su, sv = signs(m, np.random.default_rng(1)), signs(n, self.rng if self.legacy else np.random.default_rng(2))
        scale = np.float32(self.rng.uniform(0.01, 0.03))
        tensors = {"SU": torch.from_numpy(su).half(), "SV": torch.from_numpy(sv).half(), "Wscale": torch.tensor(scale)}
        total = np.zeros((m, n))
        for stage, (name, weight, (codes, decoded)) in enumerate(self.stages(m, n)):
            tensors[name] = codes
            factor = np.float32(0.31**stage)
            if weight is not None:
                tensors[weight] = torch.tensor(factor)
            total += factor * decoded
        if self.legacy and self.bits == 2:
            tensors |= {"Qidxs2": torch.zeros_like(tensors["Qidxs"]), "inv_resid_scale": torch.tensor(0.0)}
        if self.tlut is not None:
            tensors["tlut"] = torch.from_numpy(self.tlut)
        dense = su[:, None] * (rotation(m) @ (scale * total) @ rotation(n)) * sv
        return tensors, torch.from_numpy(dense[:rows, :columns])


def halved(tensors: dict, names=("SU", "Qidxs", "Qidxs2", "Qidxs_e8p", "Qidxs2_e8p", "Qidxs2_e81b", "trellis_packed")):
    """The tensors of a matrix that is cut in two by its rows."""
    parts = [dict(tensors), dict(tensors)]
    for name in names:
        if name in tensors:
            for part, half in zip(parts, tensors[name].chunk(2), strict=True):
                part[name] = half.contiguous()
    return parts


def write(path: Path, config: dict, tensors: dict) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path / "model.safetensors")
    return path


def write_model(path: Path, model, writer: Writer, skip=("lm_head",)):
    """A transformers model whose linear layers are replaced; the weights that they have then, by name."""
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(skip)}
    if not model.config.tie_word_embeddings:
        state["lm_head.weight"] = model.lm_head.weight.data
    expected = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.startswith(skip):
            tensors, weight = writer.matrix(*module.weight.shape)
            state.pop(f"{name}.weight")
            state.pop(f"{name}.bias", None)
            state |= {f"{name}.{ending}": tensor for ending, tensor in tensors.items()}
            expected[name] = weight
    config = model.config.to_dict() | {"quantization_config": writer.config, "architectures": [type(model).__name__]}
    return write(path, config, state), expected


def llama(**changes) -> LlamaForCausalLM:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 120, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True, "dtype": "float32"}
    return LlamaForCausalLM(LlamaConfig(**sizes | heads | changes)).float()


def save_table(path: Path, rows: torch.Tensor, **more) -> None:
    torch.save({"codebook": rows, "opt_scale": 1.0, "resid_scale": 3.0} | more, path / "e8_codebook.pt")


def with_weights(model, weights):
    """A plain model with these weights."""
    for name, weight in weights.items():
        layer = model.get_submodule(name)
        layer.weight.data = weight.to(layer.weight.dtype)
        if getattr(layer, "bias", None) is not None:
            layer.bias.data.zero_()
    return model.eval()


def moe(**changes):
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 64, "num_experts": 3, "head_dim": 32}
    more = {"vocab_size": 120, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    rest = {"num_experts_per_tok": 2, "tie_word_embeddings": True, "dtype": "float32", "initializer_range": 0.2}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes | more | rest | changes)).float()


def write_moe(path: Path, writer: Writer, joint: bool):
    """A mixture of 3 experts, stored one by one; joint: gate and up of each as one matrix that was cut in two."""
    model = moe()
    _, expected = write_model(path, model, writer)
    tensors, name = load_file(path / "model.safetensors"), "model.layers.0.mlp.experts"
    for key in ("gate_up_proj", "down_proj"):
        tensors.pop(f"{name}.{key}")
    experts = model.model.layers[0].mlp.experts
    for e in range(3):
        if joint:
            made, gate_up = writer.matrix(64, 64)
            before, made["SU"] = made["SU"], torch.from_numpy(signs(64, np.random.default_rng(5))).half()
            experts.gate_up_proj.data[e] = (gate_up * (made["SU"] * before)[:, None]).float()
            parts = dict(zip(("gate_proj", "up_proj"), halved(made), strict=True))
        else:
            both = [writer.matrix(32, 64) for _ in range(2)]
            parts = {"gate_proj": both[0][0], "up_proj": both[1][0]}
            experts.gate_up_proj.data[e] = torch.cat([both[0][1], both[1][1]]).float()
        parts["down_proj"], down = writer.matrix(64, 32)
        experts.down_proj.data[e] = down.float()
        tensors |= {f"{name}.{e}.{part}.{key}": t for part, of in parts.items() for key, t in of.items()}
    save_file({key: t.contiguous().clone() for key, t in tensors.items()}, path / "model.safetensors")
    return path, with_weights(model, expected)
