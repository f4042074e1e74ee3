"""Mixed precision: the dynamic program is exact, plans survive JSON and editing, and measured ones are obeyed."""

import itertools
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import glq
from glq import GlqError, Plan, Settings
from glq.allocation import allocate, make_plan
from glq.checkpoint import inspect
from glq.codecs import CODECS, DEFAULT_CODECS
from glq.packed import packed_shapes
from glq.sensitivity import Group

RATES = list(DEFAULT_CODECS.values())


def group(name: str, rows: int, cols: int, sensitivity: float) -> Group:
    return Group((name,), ((rows, cols),), sensitivity)


def loss(groups, codecs) -> float:
    return sum(g.sensitivity * CODECS[c].mse for g, c in zip(groups, codecs, strict=True))


def size(groups, codecs) -> int:
    return sum(
        math.prod(packed_shapes(c, rows, cols)["codes"])
        for g, c in zip(groups, codecs, strict=True)
        for rows, cols in g.shapes
    )


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([64, 128, 192]), st.sampled_from([64, 128, 640]), st.floats(0.001, 100)),
        min_size=1,
        max_size=3,
    ),
    st.floats(1.5, 4),
)
def test_the_allocation_is_the_best_that_fits(shapes, bits):
    groups = [group(str(i), *shape) for i, shape in enumerate(shapes)]
    plan = allocate(groups, bits)
    budget = bits * sum(g.weights for g in groups) / 8
    every = [c for c in itertools.product(RATES, repeat=len(groups)) if size(groups, c) <= budget]
    assert size(groups, plan.codecs) <= budget
    assert loss(groups, plan.codecs) == pytest.approx(min(loss(groups, c) for c in every))


def test_sensitive_groups_get_more_bits():
    groups = [group("a", 64, 640, 1.0), group("b", 64, 640, 100.0), group("c", 64, 640, 1.0)]
    plan = allocate(groups, 2.5)
    bits = [CODECS[c].bits for c in plan.codecs]
    assert bits[1] > max(bits[0], bits[2])
    assert sum(bits) <= 7.5


def test_large_models_are_allocated_in_coarser_units_within_the_budget():
    groups = [group(str(i), 64 * (1 + i % 7), 64 * (5 + i % 11), 1 + i % 13) for i in range(300)]
    plan = allocate(groups, 2.7)
    budget = 2.7 * sum(g.weights for g in groups) / 8
    assert 0.995 * budget < size(groups, plan.codecs) <= budget


def test_plans_survive_json_and_editing(tmp_path):
    plan = allocate([group("a.x", 64, 640, 1.0), group("b.y", 128, 64, 3.0)], 3)
    plan.write(tmp_path / "plan.json")
    assert Plan.read(tmp_path / "plan.json") == plan
    raw = json.loads((tmp_path / "plan.json").read_text())
    raw["groups"][0]["codec"] = "e8-2"
    (tmp_path / "plan.json").write_text(json.dumps(raw))
    assert Plan.read(tmp_path / "plan.json").layers[0] == ("a.x", "e8-2")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not a plan"),
        ("[]", "is not a plan"),
        ('{"bits": 2}', "groups"),
        ('{"bits": 2, "groups": [{}]}', "plan"),
    ],
)
def test_what_is_no_plan_is_refused(content, message, tmp_path):
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(GlqError, match=message):
        Plan.read(tmp_path / "plan.json")


def test_an_unknown_codec_in_a_plan_is_named(tmp_path):
    text = '{"bits": 2, "groups": [{"layers": ["a"], "shapes": [[1, 1]], "sensitivity": 1, "codec": "e9"}]}'
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(GlqError, match="unknown codec 'e9'"):
        Plan.read(tmp_path / "plan.json")


def test_a_measured_plan_is_obeyed_and_kept(tiny_model, text_file, tmp_path):
    settings = Settings(bits=2.7, tokens=512, ctx=64)
    seen = []
    plan = make_plan(
        tiny_model, 2.7, settings, calibration=text_file, device="cpu", progress=lambda p: seen.append(p.stage)
    )
    assert set(seen) == {"measuring"}
    assert len(plan.groups) == 8
    assert {len(g.layers) for g in plan.groups} == {1, 2, 3}
    assert all(g.sensitivity > 0 for g in plan.groups)
    glq.quantize(tiny_model, tmp_path / "out", settings, calibration=text_file, device="cpu", plan=plan)
    modules = inspect(tmp_path / "out").config.modules
    assert {(name, m.codec) for name, m in modules.items()} == set(plan.layers)
    assert Plan.read(tmp_path / "out" / "glq_plan.json") == plan
    automatic = tmp_path / "automatic"
    glq.quantize(tiny_model, automatic, settings, calibration=text_file, device="cpu")
    assert inspect(automatic).config.modules == modules


def test_a_plan_of_another_model_is_refused(tiny_model, text_file, tmp_path):
    plan = allocate([group("model.layers.0.self_attn.q_proj", 64, 64, 1.0)], 2.3)
    with pytest.raises(GlqError, match="the plan does not name|is not named"):
        glq.quantize(
            tiny_model,
            tmp_path / "out",
            Settings(bits=2.3, tokens=512, ctx=64),
            calibration=text_file,
            device="cpu",
            plan=plan,
        )
    assert not (tmp_path / "out").exists()


def test_a_plan_for_another_rate_is_refused(tiny_model, tmp_path):
    plan = allocate([group("a", 64, 64, 1.0)], 2.25)
    with pytest.raises(GlqError, match="the plan is for 2.25 bits, not 3"):
        glq.quantize(tiny_model, tmp_path / "out", Settings(bits=3), device="cpu", plan=plan)
    assert not (tmp_path / "out").exists()


def test_the_plot_is_written(tmp_path):
    from glq.plots import plot_plan

    groups = [group(f"model.layers.{i}.mlp.{n}", 64, 640, 1.0 + i) for i in range(3) for n in ("up", "down")]
    plot_plan(allocate(groups, 2.5), tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes()[1:4] == b"PNG"
