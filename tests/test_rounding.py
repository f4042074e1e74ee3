"""Block LDLQ: its factor, that it never does worse than plain rounding, and the degenerate Hessians."""

import pytest
import torch

from glq.codecs import CODECS
from glq.codecs.packing import from_strips, tile_rows, to_strips
from glq.packed import decode_matrix, pack_codes
from glq.rounding import BLOCK, factor, feedback, objective, refit, round_matrix, round_panel, solve


def hessian(n: int, samples: int, seed: int = 0) -> torch.Tensor:
    """Second moments of correlated inputs: what LDLQ has to work with."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, n, generator=generator) @ torch.randn(n, n, generator=generator) / n**0.5
    h = x.T @ x / samples
    return (h + h.T) / 2


@pytest.mark.parametrize("n", [1, 2, 7, 64, 130])
def test_factor_and_feedback(n):
    h = hessian(n, 4 * n)
    m = factor(h, 0.01)
    damped = h.double() + 0.01 * h.double().diagonal().mean() * torch.eye(n)
    torch.testing.assert_close(m @ m.T, damped)
    unit = feedback(m)
    blocks = torch.block_diag(*[torch.ones(min(BLOCK, n - i), min(BLOCK, n - i)) for i in range(0, n, BLOCK)])
    torch.testing.assert_close(unit * blocks, torch.eye(n), rtol=0, atol=1e-6)
    assert unit.tril(-BLOCK).abs().max() < 1e-6
    b = torch.randn(3, n, dtype=torch.float64)
    torch.testing.assert_close(solve(m, b) @ damped, b)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize(("rows", "cols"), [(32, 64), (70, 100)])
def test_ldlq_beats_plain_rounding(name, rows, cols):
    codec = CODECS[name]
    h = hessian(cols, 3 * cols)
    w = torch.randn(rows, cols) * torch.rand(rows, 1).add(0.1)
    rounded = round_matrix(w, h, feedback(factor(h, 0.01)), codec, round_panel)
    values = rounded.values * rounded.scale[:, None]
    scale = w.square().mean(1, keepdim=True).sqrt()
    padded = torch.nn.functional.pad(w / scale, (0, -cols % 64, 0, -rows % tile_rows(codec.group)))
    plain = from_strips(codec.decode(codec.encode(to_strips(padded, codec.group))))[:rows, :cols]
    plain_scale = refit(w, plain, h, scale[:, 0])
    assert objective(w, values, h) < 0.95 * objective(w, plain * plain_scale[:, None], h)


@pytest.mark.parametrize("name", CODECS)
def test_values_are_what_the_codes_decode_to(name):
    h = hessian(100, 300)
    rounded = round_matrix(torch.randn(70, 100), h, feedback(factor(h, 0.01)), CODECS[name], round_panel)
    assert torch.equal(decode_matrix(pack_codes(rounded.codes, name), name, 70, 100), rounded.values)


@pytest.mark.parametrize(("name", "rows"), [("e8-2", 32), ("trellis-3", 64)])
def test_rows_do_not_disturb_each_other_across_tiles(name, rows):
    """Layers that read the same input are rounded stacked; it must be as if each were rounded alone."""
    h = hessian(64, 200)
    n = feedback(factor(h, 0.01))
    a, b = torch.randn(rows, 64), torch.randn(64, 64) * 5
    both = round_matrix(torch.cat([a, b]), h, n, CODECS[name], round_panel)
    alone = round_matrix(a, h, n, CODECS[name], round_panel)
    assert torch.equal(both.codes[:1], alone.codes)
    torch.testing.assert_close(both.scale[:rows], alone.scale)


@pytest.mark.parametrize("kind", ["zero", "nan", "rank one", "dead channel"])
def test_degenerate_hessians_are_handled(kind):
    n = 64
    h = {
        "zero": torch.zeros(n, n),
        "nan": torch.full((n, n), torch.nan),
        "rank one": torch.ones(n, n),
        "dead channel": hessian(n, 200).index_fill_(0, torch.tensor([5]), 0).index_fill_(1, torch.tensor([5]), 0),
    }[kind]
    w = torch.randn(32, n)
    rounded = round_matrix(w, h, feedback(factor(h, 0.01)), CODECS["nested-4"], round_panel)
    values = rounded.values * rounded.scale[:, None]
    assert torch.isfinite(values).all()
    assert ((values - w).square().mean() / w.square().mean()) < (0.5 if kind == "rank one" else 0.02)


def test_a_zero_row_stays_zero():
    w = torch.randn(40, 64)
    w[3] = 0
    h = hessian(64, 200)
    rounded = round_matrix(w, h, feedback(factor(h, 0.01)), CODECS["nested-3"], round_panel)
    assert rounded.scale[3] == 0
    assert torch.isfinite(rounded.scale).all()


def test_refit_is_least_squares():
    h = hessian(16, 100)
    v = torch.randn(5, 16)
    w = v * torch.rand(5, 1).add(0.5) + 0.1 * torch.randn(5, 16)
    scale = refit(w, v, h, torch.ones(5))
    best = objective(w, v * scale[:, None], h)
    for change in (0.99, 1.01):
        assert objective(w, v * (scale * change)[:, None], h) > best


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_rounds_as_well_as_the_cpu():
    from glq.rounding import GraphedPanelRounder

    h, w = hessian(192, 800), torch.randn(96, 192)
    for name, codec in CODECS.items():
        losses = []
        for device, panels in (("cpu", round_panel), ("cuda", GraphedPanelRounder())):
            hd, wd = h.to(device), w.to(device)
            r = round_matrix(wd, hd, feedback(factor(hd, 0.01)), codec, panels)
            losses.append(objective(wd, r.values * r.scale[:, None], hd).item())
            assert torch.equal(decode_matrix(pack_codes(r.codes, name), name, 96, 192), r.values)
        assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.parametrize("codec", ["nested-4", "trellis-2"])
def test_a_layer_in_pieces_of_its_rows_is_the_same(codec, monkeypatch):
    from glq import rounder
    from glq.moments import Moments

    x = torch.randn(300, 64) * torch.linspace(0.1, 3, 64)
    moments = Moments(x.T @ x / 300, torch.zeros(64, 64))
    layer = torch.nn.Linear(64, 150, bias=False).requires_grad_(False)
    how = (CODECS[codec], 0, 0.1, rounder.round_panel, 1, False)
    (whole,), lost = rounder.round_in_pieces([layer], moments, *how, found := [])
    monkeypatch.setattr(rounder, "_PIECE", 64 * 64)
    (joined,), loses = rounder.round_in_pieces([layer], moments, *how, found)
    for name in ("codes", "scale", "signs"):
        assert torch.equal(getattr(joined, name), getattr(whole, name))
    assert (joined.out_features, joined.in_features, joined.block) == (150, 64, whole.block)
    assert loses == pytest.approx(lost, rel=1e-3)
    assert not found
