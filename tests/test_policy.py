"""Policies: what an override reaches, which one wins, how policies are written and read."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpgraph.errors import PolicyError
from mpgraph.op_table import PRESETS, Rule
from mpgraph.policy import Override, Policy, RuleChoice
from mpgraph.policy_glob import matches_op, module_glob

LINEAR = "aten.linear.default"
SOFTMAX = "aten.softmax.int"
ADD = "aten.add.Tensor"
VIEW = "aten.view.default"
CAST = "aten.to.dtype"
UNKNOWN = "my_library.my_op.default"


def choose(policy: Policy, op: str = LINEAR, module: str = "net", node: str = "n") -> RuleChoice:
    return policy.choose(op, module, node)


# --- the preset ----------------------------------------------------------------------------


def test_without_overrides_the_preset_decides() -> None:
    choice = choose(Policy(), LINEAR)
    row = PRESETS["default"][LINEAR]
    assert choice == RuleChoice(row.rule, row.reason, "preset default")


def test_a_choice_carries_the_rows_dtype_flags() -> None:
    assert choose(Policy(), SOFTMAX).set_dtype
    assert choose(Policy(), "aten.norm.Scalar").append_dtype


def test_an_operator_without_a_row_follows_its_inputs() -> None:
    choice = choose(Policy(), UNKNOWN)
    assert (choice.rule, choice.source) == (Rule.FOLLOW, "no row: follows its inputs")


def test_an_operator_without_a_row_can_be_widened() -> None:
    assert choose(Policy(on_unknown="fp32"), UNKNOWN).rule is Rule.WIDEN


def test_an_operator_without_a_row_can_be_an_error_that_says_what_to_do() -> None:
    with pytest.raises(PolicyError) as error:
        Policy(on_unknown="error").choose(UNKNOWN, "net.0", "my_op_1")
    for words in (UNKNOWN, "'my_op_1'", "'net.0'", "'default'", "policy.pin(op="):
        assert words in str(error.value)


def test_an_override_answers_for_an_operator_without_a_row() -> None:
    policy = Policy(on_unknown="error").pin(op="my_library.my_op", run="compute")
    assert choose(policy, UNKNOWN).rule is Rule.LOWER


# --- overrides -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "op", "rule", "dtype"),
    [
        ("fp32", LINEAR, Rule.WIDEN, None),
        ("compute", SOFTMAX, Rule.LOWER, None),
        ("bf16", SOFTMAX, Rule.LOWER, "bf16"),
        ("fp16", SOFTMAX, Rule.LOWER, "fp16"),
        ("follow", SOFTMAX, Rule.FOLLOW, None),
        ("follow", LINEAR, Rule.PROMOTE, None),  # torch.linear does not promote by itself
        ("follow", "aten.cat.default", Rule.PROMOTE, None),
        ("fp32", UNKNOWN, Rule.WIDEN, None),
    ],
)
def test_what_run_means(run: str, op: str, rule: Rule, dtype: str | None) -> None:
    choice = choose(Policy().pin(op=op, run=run), op)
    assert (choice.rule, choice.dtype) == (rule, dtype)


def test_the_last_override_that_matches_wins_and_is_named() -> None:
    policy = Policy().pin(module="net", run="compute").pin(op="softmax").pin(op="exp")
    choice = choose(policy, SOFTMAX)
    assert choice.rule is Rule.WIDEN
    assert choice.source == "override 2: op=softmax"
    assert choose(policy, ADD).source == "override 1: module=net"


def test_all_selectors_of_an_override_must_match() -> None:
    policy = Policy().pin(op="linear", module="net.head", node="linear_*")
    assert choose(policy, LINEAR, "net.head", "linear_1").rule is Rule.WIDEN
    assert choose(policy, ADD, "net.head", "linear_1").rule is Rule.FOLLOW
    assert choose(policy, LINEAR, "net.body", "linear_1").rule is Rule.LOWER
    assert choose(policy, LINEAR, "net.head", "matmul").rule is Rule.LOWER


def test_node_overrides_tell_nodes_of_one_operator_and_module_apart() -> None:
    policy = Policy().pin(module="net", run="compute").pin(node="soft_2").pin(node="soft_3")
    assert choose(policy, SOFTMAX, node="soft_1").source == "override 1: module=net"
    assert choose(policy, SOFTMAX, node="soft_2").source == "override 2: node=soft_2"
    assert choose(policy, SOFTMAX, node="soft_3").source == "override 3: node=soft_3"


@pytest.mark.parametrize("op", [LINEAR, ADD, SOFTMAX, UNKNOWN])
def test_a_module_override_reaches_what_computes(op: str) -> None:
    assert choose(Policy().pin(module="net"), op).rule is Rule.WIDEN


@pytest.mark.parametrize(
    "op", [VIEW, CAST, "aten.zeros.default", "aten.add_.Tensor", "aten.contiguous.default"]
)
def test_a_module_override_leaves_views_casts_factories_and_in_place_operators_alone(
    op: str,
) -> None:
    assert choose(Policy().pin(module="net"), op) == choose(Policy(), op)


@pytest.mark.parametrize("op", [VIEW, CAST])
def test_an_override_by_op_or_node_reaches_even_those(op: str) -> None:
    assert choose(Policy().pin(op=op), op).rule is Rule.WIDEN
    assert choose(Policy().pin(node="n", module="net"), op).rule is Rule.WIDEN


def test_a_refused_operator_can_be_pinned() -> None:
    op = "aten.binary_cross_entropy.default"
    policy = Policy("autocast-cuda")
    assert choose(policy, op).rule is Rule.REFUSE
    assert choose(policy.pin(op="binary_cross_entropy"), op).rule is Rule.WIDEN


def test_only_a_pin_to_fp32_keeps_the_rows_dtype_argument() -> None:
    assert choose(Policy().pin(op="softmax"), SOFTMAX).set_dtype
    assert not choose(Policy().pin(op="softmax", run="compute"), SOFTMAX).set_dtype
    norm = "aten.norm.Scalar"
    assert choose(Policy().pin(op="norm"), norm).append_dtype
    assert not choose(Policy().pin(op="norm", run="bf16"), norm).append_dtype


def test_pin_leaves_the_policy_it_was_called_on_as_it_was() -> None:
    policy = Policy()
    policy.pin(op="softmax")
    assert policy == Policy()


def test_choosing_does_not_change_what_a_policy_equals_hashes_or_pickles_to() -> None:
    policy, fresh = Policy().pin(node="a*"), Policy().pin(node="a*")
    choose(policy)
    assert policy == fresh
    assert hash(policy) == hash(fresh)
    assert pickle.loads(pickle.dumps(policy)) == fresh


def test_a_choice_is_made_once_for_each_operator_and_module() -> None:
    policy = Policy().pin(module="net")
    assert choose(policy, node="a") is choose(policy, node="b")


# --- globs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern", ["aten.softmax.int", "aten.softmax", "softmax", "softmax.int", "*soft*", "aten.*"]
)
def test_an_op_glob_matches_with_or_without_namespace_and_overload(pattern: str) -> None:
    assert matches_op(pattern, SOFTMAX)


@pytest.mark.parametrize("pattern", ["soft", "int", "log_softmax", "softmax.default"])
def test_an_op_glob_matches_whole_names_only(pattern: str) -> None:
    assert not matches_op(pattern, SOFTMAX)


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("a.b", "a.b"),
        ("a.b", "a.b.c.d"),
        ("a.*.mlp", "a.0.mlp"),
        ("a.*.mlp", "a.0.mlp.fc"),
        ("**.mlp", "mlp"),
        ("**.mlp", "a.0.mlp"),
        ("a.**.fc", "a.fc"),
        ("a.**.fc", "a.0.1.fc"),
        ("**", ""),
        ("**", "a.b"),
        ("a.**", "a.b.c"),
        ("layer?", "layer1"),
        ("layers.[0-2]", "layers.1.mlp"),
        ("layers.[!0]", "layers.1"),
        ("layers.[^0]", "layers.^"),
        ("a[", "a["),
        ("a+b", "a+b"),
    ],
)
def test_a_module_glob_matches(pattern: str, path: str) -> None:
    assert module_glob(pattern).fullmatch(path)


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("a.b", "a.bc"),
        ("a.b", "a"),
        ("a.b", "x.a.b"),
        ("a.*.mlp", "a.0.1.mlp"),
        ("a.*", "a"),
        ("a?b", "a.b"),
        ("layers.[^0]", "layers.1"),
        ("**.mlp", "a.xmlp"),
        ("layers.[0-2]", "layers.3"),
        ("layers.[!0]", "layers.0"),
        ("", "a"),
        ("a.b", "a-b"),
    ],
)
def test_a_module_glob_does_not_match(pattern: str, path: str) -> None:
    assert not module_glob(pattern).fullmatch(path)


# --- overrides that match nothing ----------------------------------------------------------

NODES = [
    (LINEAR, "decoder.layers.0.mlp", "linear"),
    (SOFTMAX, "decoder.layers.0.attention", "softmax"),
]


def test_overrides_that_match_something_pass_the_check() -> None:
    Policy().pin(op="softmax").pin(module="decoder.layers.*").pin(node="lin*").check_overrides(
        NODES
    )
    Policy().check_overrides([])


@pytest.mark.parametrize(
    ("selector", "near", "advice"),
    [
        ({"module": "decoder.layer.*.mlp"}, "'decoder.layers.0.mlp'", "model.named_modules()"),
        ({"op": "sofmax"}, "'softmax'", "convert the model without the override"),
        ({"node": "linaer"}, "'linear'", "convert the model without the override"),
        ({"module": "decoder", "op": "liner"}, "'linear'", "model.named_modules()"),
        ({"module": "zzz"}, "there are 'decoder', ", "model.named_modules()"),
        ({"op": "zzz"}, "there are 'linear', ", "convert the model without the override"),
    ],
)
def test_an_override_that_matches_nothing_is_an_error_with_near_misses(
    selector: dict[str, str], near: str, advice: str
) -> None:
    with pytest.raises(PolicyError, match=r"override 1 .* matches nothing: there is no") as error:
        Policy().pin(**selector).check_overrides(NODES)
    assert near in str(error.value)
    assert advice in str(error.value)


def test_near_misses_come_from_the_whole_module_tree() -> None:
    policy = Policy().pin(module="encoder.layer.0")
    with pytest.raises(PolicyError, match=r"close to it: 'encoder\.layers\.0'"):
        policy.check_overrides(NODES, ["encoder", "encoder.layers.0", "decoder"])


def test_a_module_that_computes_nothing_is_told_apart_from_one_that_is_not_there() -> None:
    policy = Policy().pin(module="decoder.drop")
    with pytest.raises(PolicyError, match=r"module 'decoder\.drop' computes nothing in this call"):
        policy.check_overrides(NODES, ["decoder", "decoder.drop"])


def test_selectors_that_only_match_apart_are_told_so() -> None:
    policy = Policy().pin(op="softmax", module="decoder.layers.0.mlp")
    with pytest.raises(PolicyError, match="no node matches all of them"):
        policy.check_overrides(NODES)


def test_every_override_that_matches_nothing_is_listed() -> None:
    policy = Policy().pin(op="conv2d").pin(op="softmax").pin(node="zzz")
    with pytest.raises(PolicyError) as error:
        policy.check_overrides(NODES)
    assert re.findall(r"override (\d)", str(error.value)) == ["1", "3"]


# --- malformed policies --------------------------------------------------------------------


def any_value(value: Any) -> Any:
    """Hide a wrong type from the type checker."""
    return value


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Policy("autocast_cpu"), "preset must be one of .*close to it: 'autocast-cpu'"),
        (lambda: Policy(on_unknown="folow"), "on_unknown must be one of .*'follow'"),
        (lambda: Policy(overrides=any_value(("softmax",))), "overrides must be mpgraph.Override"),
        (lambda: Policy().pin(op="softmax", run="float32"), "run must be one of fp32, compute"),
        (lambda: Override(), "needs a selector"),
        (lambda: Override(op=""), "op must be a glob"),
        (lambda: Override(module=any_value(3)), "module must be a glob"),
        (lambda: Override(module="layers.[9-0]"), "is not a glob"),
        (lambda: Policy.from_dict({"presets": "lean"}), "unknown key 'presets'.*'preset'"),
        (lambda: Policy.from_dict({"overrides": "softmax"}), "overrides must be a list"),
        (lambda: Policy.from_dict({"overrides": ["softmax"]}), "an override must be a table"),
        (
            lambda: Policy.from_dict({"overrides": [{"modul": "a"}]}),
            "unknown key 'modul'.*'module'",
        ),
        (lambda: Policy.from_toml("preset = "), "not valid TOML"),
        (lambda: Policy.parse("lean; op=softmax op=exp"), "'op' is given twice"),
        (lambda: Policy.parse("lean; op="), "cannot read 'op' in the policy"),
        (lambda: Policy.parse("lean; ="), "cannot read the policy"),
        (lambda: Policy.parse("default; head fp32"), "cannot read 'head' .* 'default; module=head"),
        (lambda: Policy.parse("default head"), "cannot read 'head' .* 'default; module=head"),
        (lambda: Policy.parse('lean; op="\\x"'), "cannot read the quoted text"),
        (lambda: Policy.parse("on_unknown=fp32"), "must start with the name of a preset"),
        (lambda: Policy.coerce("defualt"), "preset must be one of .*close to it: 'default'"),
        (lambda: Policy.coerce("no-such-file.toml"), "cannot load a policy from 'no-such-file"),
        (lambda: Policy.coerce(any_value(3)), "expected a Policy, a preset .*found int"),
    ],
)
def test_a_malformed_policy_says_what_was_expected(make: Any, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        make()


# --- as text -------------------------------------------------------------------------------

globs = st.text("aB0.*?_-! ;=#'\"\\\n\t\x00\x7f\x85\u2028é漢😀", min_size=1, max_size=8)
overrides = (
    st.fixed_dictionaries(
        {"run": st.sampled_from(["fp32", "compute", "bf16", "fp16", "follow"])},
        optional={"op": globs, "module": globs, "node": globs},
    )
    .filter(lambda o: len(o) > 1)
    .map(lambda o: Override(**o))
)
policies = st.builds(
    Policy,
    preset=st.sampled_from(sorted(PRESETS)),
    overrides=st.lists(overrides, max_size=3).map(tuple),
    on_unknown=st.sampled_from(["follow", "fp32", "error"]),
)


@given(policies)
def test_a_policy_survives_toml(policy: Policy) -> None:
    assert Policy.from_toml(policy.to_toml()) == policy


@given(policies)
def test_a_policy_survives_being_printed_as_one_line(policy: Policy) -> None:
    assert len(str(policy).split("\n")) == 1
    assert Policy.parse(str(policy)) == policy


@given(policies)
def test_a_policy_survives_a_dictionary(policy: Policy) -> None:
    assert Policy.from_dict(policy.to_dict()) == policy


def test_the_toml_is_what_one_would_write_by_hand() -> None:
    policy = Policy("lean", on_unknown="fp32").pin(module="decoder.*", op="linear", run="bf16")
    assert policy.to_toml() == (
        'preset = "lean"\n'
        'on_unknown = "fp32"\n'
        "\n"
        "[[overrides]]\n"
        'op = "linear"\n'
        'module = "decoder.*"\n'
        'run = "bf16"\n'
    )


def test_the_line_is_what_one_would_write_by_hand() -> None:
    policy = Policy("lean", on_unknown="fp32").pin(module="a b", run="bf16").pin(op="exp")
    assert str(policy) == 'lean on_unknown=fp32; module="a b" run=bf16; op=exp run=fp32'
    assert str(Policy()) == "default"


def test_run_may_be_left_out_and_means_fp32() -> None:
    assert Policy.parse("default; op=softmax") == Policy().pin(op="softmax")
    assert Policy.from_toml('[[overrides]]\nop = "softmax"') == Policy().pin(op="softmax")


def test_save_and_load_leave_one_file_and_lose_nothing(tmp_path: Path) -> None:
    policy = Policy("lean").pin(module="décodeur.*")
    path = tmp_path / "policy.toml"
    policy.save(path)
    assert Policy.load(path) == policy
    assert Policy.coerce(path) == Policy.coerce(str(path)) == policy
    assert list(tmp_path.iterdir()) == [path]


def test_a_save_that_fails_leaves_the_old_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "policy.toml"
    Policy("lean").save(path)

    def fail(source: Any, target: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        Policy().save(path)
    assert Policy.load(path) == Policy("lean")
    assert list(tmp_path.iterdir()) == [path]


def test_coerce_takes_every_way_to_write_a_policy() -> None:
    policy = Policy("lean").pin(op="softmax")
    assert Policy.coerce(policy) is policy
    assert Policy.coerce("lean") == Policy("lean")
    assert Policy.coerce("lean; op=softmax") == policy
    assert Policy.coerce(policy.to_dict()) == policy
    assert Policy.coerce("lean; node=x.toml") == Policy("lean").pin(node="x.toml")


# --- diff ----------------------------------------------------------------------------------


def test_equal_policies_have_no_difference() -> None:
    assert Policy().pin(op="exp").diff(Policy().pin(op="exp")) == []


def test_diff_names_values_overrides_and_operators() -> None:
    lines = Policy("default", on_unknown="fp32").pin(op="exp").diff(Policy("lean").pin(op="log"))
    assert lines[:4] == [
        "preset: default -> lean",
        "on_unknown: fp32 -> follow",
        "- override op=exp run=fp32",
        "+ override op=log run=fp32",
    ]
    assert "aten.softmax.int: widen by dtype= -> follow" in lines
    assert "aten.embedding.default: follow -> lower" in lines
    assert not any("aten.linear.default" in line for line in lines)


def test_diff_names_operators_that_only_one_preset_has() -> None:
    lines = Policy("autocast-cpu").diff(Policy("autocast-cuda"))
    assert "aten.einsum.default: no row -> lower" in lines


def test_diff_sees_a_change_of_order() -> None:
    one, two = Policy().pin(op="exp").pin(op="log"), Policy().pin(op="log").pin(op="exp")
    assert one.diff(two) == ["the overrides are in another order, or repeated"]
