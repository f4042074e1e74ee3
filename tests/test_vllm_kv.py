"""The E8 KV cache in real vLLM on the CPU: what transformers with GlqCache gives, however pages are used."""

from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model, make_tokenizer
from kv_reference import PromptsInFull, differences
from test_kv_pages import plain_attention
from test_vllm import pytestmark, tokenized, vllm  # noqa: F401
from transformers import DynamicCache

import glq
from glq import GlqCache, GlqError
from glq.config import GlqConfig
from glq.hf_integration import load
from glq.kv.codec import kv_codec
from glq.upstream.format import UpstreamConfig

E8 = {"attention_backend": "CUSTOM", "additional_config": {"glq_kv_bits": 4}}
REPEATABLE = {"attention_backend": "CUSTOM", "additional_config": {"glq_kv_bits": 4, "glq_kv_repeatable": True}}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Heads of 128 channels, weights large enough that the cache's rounding is seen."""
    return make_model(tmp_path_factory.mktemp("llama") / "model", head_dim=128, initializer_range=0.1)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """Heads of 64 channels, four of them large in keys and small in queries; a window of 24 tokens on one layer."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    folder = tmp_path_factory.mktemp("gemma") / "model"
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=320, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, sliding_window=24, layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=256, bos_token_id=0, eos_token_id=None, pad_token_id=1, initializer_range=0.1,
        query_pre_attn_scalar=16,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config)
    for i, layer in enumerate(model.model.layers):  # gains of 1 + weight
        some = [5, 37, 20 + i, 52 + i]  # rotary pairs
        layer.self_attn.k_norm.weight.data[some], layer.self_attn.q_norm.weight.data[some] = 19.0, -0.9
    model.to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def shared_prompts(*lengths):
    """Random tokens, of which the first 32 are the same."""
    ids = torch.randint(2, 302, (len(lengths) + 1, max(lengths))).tolist()
    return [(ids[0][:32] + own)[:length] for own, length in zip(ids[1:], lengths, strict=True)]


def test_chunks_shared_pages_and_preemption_change_nothing(llama, vllm):  # noqa: F811
    """32 tokens a step, and 15 pages of 16 tokens for 8 sequences of 4 to 6."""
    prompts = shared_prompts(40, 50, 60, 70, 45, 55, 65, 75)
    options = REPEATABLE | {"max_num_batched_tokens": 32, "block_size": 16, "max_model_len": 112}
    answer = vllm(llama, prompts, 24, num_gpu_blocks_override=16, disable_log_stats=False, writes=True, **options)
    model = load(llama, device="cpu")
    apart, behind = differences(answer, model, prompts, lambda: GlqCache(4, model=model, centre=False))
    assert apart.max() < 1e-4
    assert behind.max() < 1e-4
    assert answer["metrics"]["vllm:num_preemptions"] > 0
    assert answer["metrics"]["vllm:prefix_cache_hits"] > 0
    assert differences(answer, model, prompts, DynamicCache)[0].max() > 0.1  # what would be found with 16 bits


def test_two_ranks_a_window_and_prompts_in_full(gemma, vllm):  # noqa: F811
    """As `vllm serve` has it without glq_kv_repeatable."""
    prompts = shared_prompts(40, 50, 33, 70)
    options = E8 | {"tensor_parallel_size": 2, "block_size": 16, "enable_prefix_caching": False}
    answer = vllm(gemma, prompts, 40, writes=True, **options)
    model = load(gemma, device="cpu")
    apart, behind = differences(answer, model, prompts, lambda: PromptsInFull(4, model=model, centre=False))
    assert apart.max() < 1e-4
    assert behind.max() < 1e-4
    assert differences(answer, model, prompts, DynamicCache)[0].max() > 0.1


def test_pages_are_small(llama):
    """3.88 times the tokens of 16-bit pages at 128 channels, whatever a page holds."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    from glq.vllm_integration.kv_backend import backend

    for kind, window in ((FullAttentionSpec, {}), (SlidingWindowSpec, {"sliding_window": 100})):
        for tokens in (1, 16, 128):
            spec = kind(block_size=tokens, num_kv_heads=8, head_size=128, dtype=torch.bfloat16, **window)
            assert spec.page_size_bytes / backend(4, 4).customize_spec(spec).page_size_bytes == pytest.approx(512 / 132)
            assert spec.page_size_bytes / backend(3, 2).customize_spec(spec).page_size_bytes == pytest.approx(512 / 84)


@pytest.mark.slow
def test_a_checkpoint_of_glq(llama, text_file, vllm, tmp_path):  # noqa: F811
    """Compiled, too, with keys in more bits than values."""
    glq.quantize(llama, tmp_path / "out", glq.Settings(4, tokens=512, ctx=64), calibration=text_file, device="cpu")
    prompts, model = shared_prompts(40, 50), load(tmp_path / "out", device="cpu")
    given = {"glq_kv_key_bits": 4, "glq_kv_value_bits": 3, "glq_kv_repeatable": True}
    options = E8 | {"additional_config": given, "enforce_eager": False}
    answer = vllm(tmp_path / "out", prompts, 24, writes=True, **options)
    make = partial(GlqCache, key_bits=4, value_bits=3, config=model.config, centre=False)
    apart, behind = differences(answer, model, prompts, make)
    assert apart.max() < 1e-4
    assert behind.max() < 1e-4
    page = 16 * 2 * (128 // 8 * (4 + 3) + 4)  # 16 tokens of two heads; two layers have 1 GiB
    assert answer["kv_tokens"] == pytest.approx(2**30 / 2 / page * 16, rel=0.001)


@pytest.mark.slow
def test_smollm2(smollm2, vllm):  # noqa: F811
    assert_real(smollm2, vllm, GlqCache, **REPEATABLE)


@pytest.mark.slow
def test_gemma3_on_two_ranks(vllm):  # noqa: F811
    """Gemma-3-270M, where demo/gemma3-270m has it."""
    model = Path(__file__).parent.parent / "demo" / "gemma3-270m"
    if not (model / "config.json").is_file():
        pytest.skip("needs demo/gemma3-270m")
    assert_real(model, vllm, PromptsInFull, tensor_parallel_size=2, enable_prefix_caching=False, **E8)


def assert_real(folder, vllm, cache, **options):  # noqa: F811
    """Sums in another order decide some roundings otherwise, many layers make more of it: medians are compared."""
    prompts, model = tokenized(folder)[:4], load(folder, device="cpu")
    answer = vllm(folder, prompts, 16, **options)
    apart, behind = differences(answer, model, prompts, lambda: cache(4, model=model, centre=False))
    full, _ = differences(answer, model, prompts, DynamicCache)
    print(f"log-probs: {apart.median()}, {apart.max()} at most; in 16 bits {full.median()}, {full.max()}")
    assert apart.median() < 0.3 * full.median()
    assert behind.median() == 0


def test_vllm_finds_the_class_by_its_name():
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from glq.vllm_integration.kv_backend import backend

    for bits in ((4, 4), (3, 2)):
        assert resolve_obj_by_qualname(".".join(backend(*bits).full_cls_name())) is backend(*bits)
    with pytest.raises(AttributeError):
        resolve_obj_by_qualname("glq.vllm_integration.kv_backend.GlqKvBackendOfAnother")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({}, None),
        ({"has_sliding_window": True}, None),
        ({"has_sink": True}, "attention sinks"),
        ({"use_mla": True}, "MLA"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype"),
        ({"attn_type": "encoder_only"}, "encoder_only"),
        ({"head_size": 60}, "head_size"),
        ({"device": (7, 5)}, "compute capability"),
    ],
    ids=str,
)
def test_what_vllm_asks_on_a_gpu(changes, match):
    from vllm.platforms.interface import DeviceCapability
    from vllm.v1.attention.selector import AttentionSelectorConfig

    from glq.vllm_integration.kv_backend import backend

    capability = DeviceCapability(*changes.pop("device", (9, 0)))
    asked = {"head_size": 128, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": None} | changes
    config = AttentionSelectorConfig(**asked)._asdict()
    if match is None:
        assert backend(4, 4).validate_configuration(device_capability=capability, **config) == []
        return
    with pytest.raises(GlqError, match=match) as info:
        backend(4, 4).validate_configuration(device_capability=capability, **config)
    assert "\n" not in str(info.value)


def config(given, backend="CUSTOM", **changes):
    """What of a VllmConfig is read."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    settings = {"cache_dtype": "auto", "kv_cache_dtype_skip_layers": [], "use_mla": False, "speculative_config": None}
    settings |= {
        "kv_transfer_config": None,
        "dtype": torch.float32,
        "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1,
    }
    all_of_them = SimpleNamespace(**settings | {"max_model_len": 256} | changes, additional_config=given)
    all_of_them.attention_config = SimpleNamespace(backend=backend and AttentionBackendEnum[backend])
    all_of_them.compilation_config = SimpleNamespace(static_forward_context={})
    all_of_them.cache_config = all_of_them.parallel_config = all_of_them.model_config = all_of_them
    return all_of_them


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"glq_kv_bits": 3}, (3, 3, False)),
        ({"glq_kv_key_bits": 4, "glq_kv_value_bits": 2, "other": 1}, (4, 2, False)),
        ({"glq_kv_bits": 4, "glq_kv_value_bits": 2, "glq_kv_repeatable": True}, (4, 2, True)),
    ],
)
def test_options(given, expected):
    from glq.vllm_integration.kv import KvOptions, wanted

    assert KvOptions.of(config(given)) == KvOptions(*expected)
    assert wanted(config(given))


@pytest.mark.parametrize("given", [{}, {"other": 1}])
def test_nothing_is_asked_for(given):
    from glq.vllm_integration.kv import wanted

    assert not wanted(config(given, None))


@pytest.mark.parametrize(
    ("given", "changes", "match"),
    [
        ({}, {}, "needs its bits"),
        ({"glq_kv_key_bits": 4}, {}, "needs its bits"),
        ({"glq_kv_bits": 5}, {}, "4, 3 or 2 bits, found 5"),
        ({"glq_kv_bit": 4}, {}, "unknown keys glq_kv_bit"),
        ({"glq_kv_bits": 4}, {"cache_dtype": "fp8"}, "does not go with --kv-cache-dtype fp8"),
        ({"glq_kv_bits": 4}, {"use_mla": True}, "does not go with MLA"),
        ({"glq_kv_bits": 4}, {"speculative_config": 1}, "does not go with speculative decoding"),
        ({"glq_kv_bits": 4}, {"backend": None}, "--attention-backend does not"),
    ],
    ids=str,
)
def test_what_it_does_not_do_is_one_line(given, changes, match):
    from glq.vllm_integration.kv import KvOptions, wanted

    asked = config(given, **changes)
    with pytest.raises(GlqError, match=match) as info:
        KvOptions.of(asked) if wanted(asked) else None
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("given", "changes", "match"),
    [
        ({"glq_kv_bits": 4}, {"backend": None}, "--attention-backend does not"),
        ({"glq_kv_bits": 4}, {"use_mla": True}, "does not go with MLA"),
        ({"glq_kv": 4}, {}, "unknown keys glq_kv:"),
        ({"glq_kv_bits": 4}, {}, None),
        ({}, {}, None),
    ],
    ids=str,
)
@pytest.mark.parametrize("upstream", [False, True])
def test_a_checkpoint_of_glq_checks_options_ahead_of_its_weights(upstream, given, changes, match, monkeypatch):
    from glq.vllm_integration import passes
    from glq.vllm_integration.config import GlqVllmConfig
    from glq.vllm_integration.upstream import UpstreamVllmConfig

    monkeypatch.setattr("vllm.config.get_current_vllm_config_or_none", lambda: config(given, **changes))
    monkeypatch.setattr(passes, "install", lambda _: None)
    ours = GlqVllmConfig(GlqConfig({}, 4.0, glq.__version__))
    if upstream:
        ours = UpstreamVllmConfig(UpstreamConfig("e8p", "", {}))
        ours.checkpoint = object()
    with pytest.raises(GlqError, match=match) if match else nullcontext():
        assert ours.get_quant_method(torch.nn.Identity(), "model.layers.0.self_attn.attn") is None


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"alibi_slopes": [1.0]}, "ALiBi"),
        ({"attn_type": "encoder_only"}, "attention of type encoder_only"),
        ({"attn_type": "encoder_decoder"}, "attention of type encoder_decoder"),
        ({"sinks": torch.ones(2)}, "sinks"),
        ({"kv_cache_dtype": "fp8"}, "a fp8 KV cache"),
        ({"head_size": 60}, "head_dim must be a multiple of 8, found 60"),
    ],
    ids=str,
)
def test_layers_that_it_is_not_for(options, match, attention):
    with pytest.raises(GlqError, match=match) as info:
        attention({"glq_kv_bits": 4}, **options)
    assert "\n" not in str(info.value)


@pytest.fixture
def attention(monkeypatch):
    """Makes a layer's attention, of 4 heads on 2, outside of an engine."""
    from glq.vllm_integration.kv_attention import GlqKvAttention

    def make(given, **options):
        monkeypatch.setattr("glq.vllm_integration.kv_attention.get_current_vllm_config", lambda: config(given))
        return GlqKvAttention(**{"num_heads": 4, "head_size": 64, "scale": 0.2, "num_kv_heads": 2} | options)

    return make


@pytest.mark.parametrize("repeatable", [False, True, "shared"])
@pytest.mark.parametrize(
    "options", [{}, {"sliding_window": 20}, {"logits_soft_cap": 2.0}, {"sliding_window": 9, "logits_soft_cap": 2.0}]
)
def test_decodes_and_prompts_in_one_step(repeatable, options, attention):
    """Two decodes, three new prompts, and one with 40 earlier tokens between them; two rows of padding at the end.

    "shared": the layer reads pages that another has written, and has no keys and values.
    """
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from glq.vllm_integration.kv_metadata import KvMetadataBuilder

    given = {"glq_kv_bits": 4, "glq_kv_repeatable": repeatable is True}
    options = options | ({"kv_sharing_target_layer_name": "other"} if repeatable == "shared" else {})
    layer, earlier, new = attention(given, **options), [29, 6, 0, 0, 40, 0], [1, 1, 5, 9, 12, 3]
    lengths = [a + b for a, b in zip(earlier, new, strict=True)]
    table = 1 + torch.randperm(6 * 4).view(6, 4).int()
    states = [torch.randn(2, n, 2, 64) for n in lengths]
    slots = [table[i, torch.arange(n) // 16].long() * 16 + torch.arange(n) % 16 for i, n in enumerate(lengths)]
    kv_cache = torch.full((25, 2, 16, 68), 255, dtype=torch.uint8)
    for n, (keys, values), places in zip(earlier, states, slots, strict=True):
        layer.do_kv_cache_update(None, keys[:n], values[:n], kv_cache, places[:n])
    keys, values = (torch.cat([s[i, n:] for n, s in zip(earlier, states, strict=True)]) for i in (0, 1))
    padded = [torch.cat([x, torch.full((2, 2, 64), torch.nan)]) for x in (keys, values)]
    places = torch.cat([p[n:] for n, p in zip(earlier, slots, strict=True)] + [torch.full((2,), -1)])
    layer.do_kv_cache_update(None, *padded, kv_cache, places)

    starts = torch.tensor([0, *new]).cumsum(0).int()
    used, spec = config(given), SimpleNamespace(num_kv_heads=2, head_size=64, block_size=16)
    used.compilation_config.static_forward_context["layer"] = SimpleNamespace(impl=layer, num_heads=4)
    builder = KvMetadataBuilder(spec, ["layer"], used, torch.device("cpu"))
    after = torch.tensor(lengths).int()
    batch = CommonAttentionMetadata(starts, starts, after, len(new), sum(new), max(new), max(lengths), table, places)
    step = builder.build(0, batch.replace(seq_lens_cpu_upper_bound=after))
    assert step.decodes == 2
    q = torch.randn(sum(new) + 2, 4, 64)
    own = (None, None) if repeatable == "shared" else padded
    out = layer.forward(None, q, *own, kv_cache, step, torch.full_like(q, torch.nan))
    for i, (start, end) in enumerate(pairwise(starts.tolist())):
        seen = [kv_codec(4).decode(*kv_codec(4).encode(x)) for x in states[i]]
        if new[i] > 1 and not repeatable:
            seen = [torch.cat([old[: earlier[i]], own[earlier[i] :]]) for old, own in zip(seen, states[i], strict=True)]
        for token in range(start, end):
            known = earlier[i] + token - start + 1
            window, softcap = options.get("sliding_window"), options.get("logits_soft_cap")
            expected = plain_attention(q[token], *(x[:known] for x in seen), window, softcap)
            assert (out[token] - expected).norm() / expected.norm() < 1e-5
