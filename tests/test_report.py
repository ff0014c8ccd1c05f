"""``explain``: what a report says, that it looks only, and that it survives JSON."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx, nn

import mpgraph
from mpgraph import ir
from mpgraph.errors import MPGraphError, PolicyError
from mpgraph.module import state_of
from mpgraph.op_table import Rule
from mpgraph.report.islands import block_of, pattern_of
from mpgraph.report.records import Graph, Node
from mpgraph.report.render import Column, Row, Table, to_text
from mpgraph.report.report import Report


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.relu(self.mlp(self.norm(x)))


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.blocks = nn.ModuleList(Block(8) for _ in range(3))
        self.head = nn.Linear(8, 10)

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        x = self.embed(idx)
        for block in self.blocks:
            x = block(x)
        return self.head(x).softmax(-1)


class Regions(nn.Module):
    """A region of each kind, a cast of its own, and an operator on integers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            quiet = x.float() * 2
        with torch.no_grad():
            fixed = x.abs()
        y = self.linear(x)
        return y.float()[index + 1] + quiet[0] + fixed[0]


TOKENS = torch.zeros(2, 4, dtype=torch.int64)


def converted(precision: str = "bf16", policy: Any = "default", model: Any = None) -> Any:
    model = Tiny() if model is None else model
    return mpgraph.convert(model, precision, policy=policy, example_inputs=(TOKENS,))


@functools.cache
def explained(precision: str = "bf16", policy: Any = "default", model: Any = None) -> Report:
    return mpgraph.explain(converted(precision, policy, model))


@functools.cache
def with_regions() -> Report:
    inputs = (torch.ones(3, 4), torch.zeros(2, dtype=torch.int64))
    return mpgraph.explain(mpgraph.convert(Regions(), "bf16", example_inputs=inputs))


def settled(report: Report) -> Report:
    """The report with the capture's duration and this file's line numbers fixed."""

    def node(record: Node) -> Node:
        return dataclasses.replace(record, line=re.sub(r"^\S+\.py:\d+", "tiny.py:7", record.line))

    graphs = (
        dataclasses.replace(graph, seconds=0.9, nodes=tuple(map(node, graph.nodes)))
        for graph in report.graphs
    )
    return dataclasses.replace(report, graphs=tuple(graphs))


def by_name(report: Report) -> dict[str, Node]:
    return {node.name: node for graph in report.graphs for node in graph.nodes}


def test_the_summary_of_a_small_model(golden: Callable[[str, str], None]) -> None:
    golden("report_summary", str(settled(explained())))


def test_every_node_of_a_small_model(golden: Callable[[str, str], None]) -> None:
    golden("report_verbose", settled(explained()).text(verbose=True))


def test_the_nodes_of_one_module(golden: Callable[[str, str], None]) -> None:
    golden("report_module", settled(explained()).text(module="blocks.1"))


def test_a_node_says_what_it_runs_in_and_why() -> None:
    node = by_name(explained())["layer_norm"]
    assert (node.operator, node.module, node.runs_in, node.rule, node.source) == (
        ("aten.layer_norm.default", "blocks.0.norm", "fp32", "widen", "preset default")
    )
    assert node.takes == ("fp32", "fp32", "fp32")
    assert node.gives == ("fp32",)
    assert "mean" in node.reason
    assert re.fullmatch(r"test_report\.py:\d+: return x \+ torch\.relu.*", node.line)


def test_an_inserted_cast_says_for_whom_and_how_much_it_moves() -> None:
    cast = by_name(explained())["layer_norm_bf16"].cast
    assert cast is not None
    assert (cast.kind, cast.value, cast.source, cast.target) == (
        ("inserted", "layer_norm", "fp32", "bf16")
    )
    assert cast.readers == ("linear",)
    assert cast.bytes == 2 * 4 * 8 * (4 + 2)


def test_hoisted_weights_are_counted_apart() -> None:
    (graph,) = explained().graphs
    assert [node.cast.value for node in graph.weight_casts if node.cast][:2] == (
        ["blocks.0.mlp.weight", "blocks.0.mlp.bias"]
    )
    assert not set(graph.weight_casts) & set(graph.casts)
    assert len(graph.casts) == graph.passes[-1].casts
    assert graph.cast_bytes == graph.passes[-1].cast_bytes


def test_what_promotes_runs_in_the_widest_dtype_among_its_inputs() -> None:
    node = by_name(explained())["add"]
    assert (node.takes, node.runs_in) == (("fp32", "bf16"), "fp32")


def test_regions_of_the_model_are_shown() -> None:
    nodes = {node.operator: node for node in with_regions().nodes}
    assert nodes["aten.mul.Tensor"].region == "autocast off"
    assert nodes["aten.abs.default"].region == "no_grad"
    assert nodes["aten.linear.default"].region == ""


def test_a_cast_that_the_model_wrote_is_its_own() -> None:
    (graph,) = with_regions().graphs
    own = [node for node in graph.casts if node.cast and node.cast.kind == "model"]
    assert [(node.cast.source, node.cast.target) for node in own if node.cast] == [("bf16", "fp32")]
    assert own[0] in graph.operators
    # float() of what is float32 already casts nothing.
    assert [node.cast for node in graph.operators if node.operator == "aten.to.dtype"] == (
        [None, own[0].cast]
    )


def test_integers_run_in_no_dtype_at_all() -> None:
    node = next(n for n in with_regions().nodes if n.gives == ("i64",))
    assert node.runs_in == ""
    assert "no floats" in str(with_regions())


def test_sizes_that_may_vary_are_named() -> None:
    assert explained().graphs[0].dynamic == ("idx[0]", "idx[1]")


def test_islands_lie_between_16_bit_nodes_and_name_their_reason() -> None:
    islands = explained().graphs[0].islands
    assert [island.block for island in islands] == ["blocks.0", "blocks.1", "blocks.2"]
    assert all("mean" in island.why[0] for island in islands)
    # The last operator is float32 too, but nothing in 16 bit follows it.
    assert not any("softmax" in island.nodes for island in islands)


def test_a_float32_model_has_neither_islands_nor_casts() -> None:
    (graph,) = explained("fp32").graphs
    assert graph.islands == ()
    assert graph.casts == ()
    assert "casts: none" in str(explained("fp32"))


def test_repeated_blocks_share_a_row_and_a_changed_one_does_not() -> None:
    assert "blocks.0 … blocks.2" in str(explained())
    text = str(explained(policy=mpgraph.Policy().pin(module="blocks.1.mlp")))
    assert "blocks.0 … blocks.2" not in text
    assert "the policy says fp32; override 1: module=blocks.1.mlp" in text


def test_an_operator_without_a_row_is_pointed_out() -> None:
    node = Node("f", "mylib.f.default", runs_in="bf16", rule="follow", source="no row: follows")
    text = str(Report("Model", graphs=(Graph(nodes=(node,)),)))
    assert "no row in the operator table: f. Say how they run with policy.pin(op=…" in text


def test_explaining_leaves_graph_and_meta_as_they_were() -> None:
    model = converted()
    gm = state_of(model).specialisations()[0].graph_module
    before = (mpgraph.text(model), [dict(node.meta) for node in gm.graph.nodes])
    str(mpgraph.explain(model))
    after = (mpgraph.text(model), [dict(node.meta) for node in gm.graph.nodes])
    assert before[0] == after[0]
    assert [list(meta) for meta in before[1]] == [list(meta) for meta in after[1]]


def test_a_model_that_was_never_called_is_refused() -> None:
    with pytest.raises(MPGraphError, match="no call of it has been captured yet, so"):
        mpgraph.explain(mpgraph.convert(Tiny(), "bf16"))


def test_a_model_that_was_not_converted_is_refused() -> None:
    with pytest.raises(MPGraphError, match=r"Convert it first: model = mpgraph\.convert"):
        mpgraph.explain(Tiny())


def test_a_specialisation_and_a_bare_graph_are_explained_too() -> None:
    model = converted()
    entry = state_of(model).specialisations()[0]
    whole = mpgraph.explain(model)
    assert mpgraph.explain(entry) == whole
    bare = mpgraph.explain(entry.graph_module)
    assert bare.graphs[0].nodes == whole.graphs[0].nodes
    assert "policy" not in str(bare)


def test_every_kind_of_call_has_a_graph() -> None:
    model = converted()
    with torch.no_grad():
        model(TOKENS)
    report = mpgraph.explain(model)
    assert [graph.label.partition(" (")[0] for graph in report.graphs] == (
        ["Tiny train", "Tiny train, no_grad"]
    )
    assert "2 graphs" in str(report)
    assert report.filter(graph=2).graphs == report.graphs[1:]
    with pytest.raises(PolicyError, match="Tiny has no graph 3: it has 2, counted from 1"):
        report.filter(graph=3)


class Chooses(nn.Module):
    """Two ways, chosen by an argument that is not a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, way: str = "a", scale: float = 1.0) -> torch.Tensor:
        return (self.a(x) if way == "a" else self.b(x)) * scale


def test_kinds_of_call_are_told_apart_by_arguments_that_are_no_tensors() -> None:
    model = mpgraph.convert(Chooses(), "bf16")
    x = torch.randn(2, 4)
    model(x), model(x, "b"), model(x, scale=2.0)
    assert [graph.label.partition(" (")[2] for graph in mpgraph.explain(model).graphs] == [
        "x: fp32[2, 4])", "x: fp32[2, 4], way='b')", "x: fp32[2, 4], scale=2.0)",
    ]  # fmt: skip


def test_many_graphs_are_listed_instead_of_described() -> None:
    (graph,) = explained().graphs
    text = str(Report("Tiny", graphs=(graph,) * 5))
    assert "report.filter(graph=1)" in text
    assert len(text.splitlines()) < 10


def test_parts_between_graph_breaks_are_graphs_of_their_own() -> None:
    entry = state_of(converted()).specialisations()[0]
    part = (entry.graph_module, entry.reports)
    broken = SimpleNamespace(
        graphs=[part, part],
        label="Tiny train",
        engine="dynamo",
        seconds=2.0,
        breaks=[SimpleNamespace(reason="print()", line="model.py:3: print(x)"), "data-dependent"],
    )
    report = mpgraph.explain(broken)
    assert [graph.label for graph in report.graphs] == (
        ["Tiny train, part 1 of 2", "Tiny train, part 2 of 2"]
    )
    assert "captured by dynamo in 2.0 s · 2 graphs" in str(report)
    assert "graph break: print(), from model.py:3: print(x)" in str(report)
    assert "graph break: data-dependent" in str(report)


def test_a_call_without_any_graph_still_says_why() -> None:
    entry = SimpleNamespace(
        graphs=[],
        label="Tiny train",
        engine="dynamo",
        reason="forward draws numbers from Python's random module",
        breaks=[SimpleNamespace(reason="numpy call", line="")],
    )
    text = str(mpgraph.explain(entry))
    assert "Tiny · captured by dynamo · 1 graph" in text
    assert "not captured by export: forward draws numbers" in text
    assert "graph break: numpy call" in text


def test_branches_are_reported_as_nodes_of_their_sub_graph() -> None:
    class Branch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.sum() > 0, torch.relu, torch.neg, (x,))

    program = torch.export.export(Branch(), (torch.ones(3),), strict=False)
    bodies = {n.operator: n.body for n in mpgraph.explain(program.graph_module).nodes}
    assert bodies["aten.relu.default"] == "true_graph_0"
    assert bodies["aten.neg.default"] == "false_graph_0"
    assert bodies["cond"] == ""


def test_a_filter_takes_globs_and_combines() -> None:
    report = explained()
    assert {n.module for n in report.filter(module="blocks.*.mlp").nodes} == (
        {f"blocks.{i}.mlp" for i in range(3)}
    )
    assert [n.name for n in report.filter(op="softmax").nodes] == ["softmax"]
    assert {n.runs_in for n in report.filter(dtype="bf16").nodes} == {"bf16"}
    both = report.filter(module="blocks.0", rule="widen")
    assert [n.name for n in both.nodes] == ["layer_norm"]
    assert both.selection == "module=blocks.0, rule=widen"
    assert both == report.filter(module="blocks.0").filter(rule="widen")


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"module": "bloks.0"}, "Tiny has no module 'bloks.0'; close to it: 'blocks.0'"),
        ({"op": "sofmax"}, "Tiny has no op 'sofmax'; close to it: 'softmax'"),
        ({"rule": "widden"}, "Tiny has no rule 'widden'; close to it: 'widen'"),
        ({"dtype": "fp16"}, "Tiny has no dtype 'fp16'; close to it: 'bf16'"),
    ],
    ids=str,
)
def test_a_filter_that_names_nothing_is_refused_with_near_misses(
    selection: dict[str, str], message: str
) -> None:
    with pytest.raises(PolicyError, match=re.escape(message)):
        explained().filter(**selection)  # type: ignore[arg-type]


def test_no_line_is_longer_than_asked() -> None:
    report = explained()
    for width in (80, 100, 140):
        assert max(map(len, report.text(verbose=True, width=width).splitlines())) <= width


def test_the_text_holds_no_path() -> None:
    assert str(Path(__file__).parent) not in explained().to_json()


def test_rich_prints_the_same_text_in_colour() -> None:
    from rich.console import Console

    report = explained()
    console = Console(
        file=io.StringIO(), record=True, width=100, force_terminal=True, color_system="standard"
    )
    console.print(report)
    assert console.export_text(clear=False).rstrip("\n") == str(report)
    assert "\x1b[32m  bf16" in console.export_text(styles=True)  # green


def test_a_report_survives_json(tmp_path: Path) -> None:
    for report in (explained(), with_regions(), explained().filter(op="softmax")):
        assert Report.from_dict(json.loads(report.to_json())) == report
        report.to_json(tmp_path / "report.json")
        assert Report.load(tmp_path / "report.json") == report
        assert str(Report.load(tmp_path / "report.json")) == str(report)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_the_schema_of_a_report() -> None:
    values = explained().to_dict()
    assert list(values) == ["schema", "model", "precision", "policy", "graphs", "selection"]
    (graph,) = values["graphs"]
    assert set(graph) == {"label", "engine", "seconds", "dynamic", "passes", "nodes", "islands"}
    documented = set(re.findall(r'"(\w+)"', Report.to_dict.__doc__ or ""))
    used = {key for node in graph["nodes"] for key in (*node, *node.get("cast", {}))}
    assert used <= documented
    assert {f.name for f in dataclasses.fields(Node)} <= documented


def test_keys_of_a_later_mpgraph_are_ignored_and_another_schema_is_refused() -> None:
    values = explained().to_dict()
    values["graphs"][0]["nodes"][0]["colour"] = "blue"
    assert Report.from_dict(values) == Report.from_dict(explained().to_dict() | values)
    with pytest.raises(MPGraphError, match="expected a report with schema 1, found 2"):
        Report.from_dict({**values, "schema": 2})
    with pytest.raises(MPGraphError, match="not a report"):
        Report.from_dict({"schema": 1})


def test_a_file_that_is_no_report_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(MPGraphError, match=r"cannot load a report from .*x\.json"):
        Report.load(tmp_path / "x.json")


def test_an_interrupted_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("mpgraph.report.report.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        explained().to_json(path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_a_diff_between_policies_names_what_changes(golden: Callable[[str, str], None]) -> None:
    policy = mpgraph.Policy().pin(op="softmax", run="compute").pin(module="blocks.*.norm")
    policy = policy.pin(module="blocks.*.mlp")
    diff = explained().diff(explained(policy=policy))
    assert diff
    golden("report_diff", str(diff))


def test_a_diff_with_itself_is_empty() -> None:
    diff = explained().diff(explained())
    assert not diff
    assert "no difference" in str(diff)


def test_a_diff_compares_graphs_for_the_same_kind_of_call() -> None:
    (train,) = explained().graphs
    other = dataclasses.replace(train, label="Tiny eval", nodes=train.nodes[:5])
    first, second = (Report("Tiny", graphs=graphs) for graphs in ((train, other), (other, train)))
    assert not first.diff(second)
    assert len(first.diff(Report("Tiny", graphs=(other,))).removed) == len(train.operators)


def test_a_diff_works_on_reports_from_files(tmp_path: Path) -> None:
    before, after = explained("bf16"), explained("fp16")
    before.to_json(tmp_path / "a.json")
    after.to_json(tmp_path / "b.json")
    loaded = Report.load(tmp_path / "a.json").diff(Report.load(tmp_path / "b.json"))
    assert loaded == before.diff(after)
    assert {(c.before, c.after) for c in loaded.changed} == {("bf16", "fp16")}
    assert json.loads(json.dumps(loaded.to_dict())) == loaded.to_dict()


def test_a_layer_more_is_one_addition_and_changes_nothing_else() -> None:
    class Wider(Tiny):
        def forward(self, idx: torch.Tensor) -> torch.Tensor:
            # Before all others, so that every later linear has another name in the graph.
            x = self.embed(idx)
            x = x + self.extra(x)
            for block in self.blocks:
                x = block(x)
            return self.head(x).softmax(-1)

        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Linear(8, 8)

    diff = explained().diff(explained(model=Wider()))
    assert [(node.module, node.operator) for node in diff.added] == (
        [("extra", "aten.linear.default"), ("", "aten.add.Tensor")]
    )
    assert not diff.changed
    assert not diff.removed
    assert "2 operators in the second alone:" in str(diff)
    assert "2 operators in the first alone:" in str(explained(model=Wider()).diff(explained()))


def test_blocks_and_patterns_of_module_paths() -> None:
    assert block_of("encoder.layers.3.mlp.fc1") == "encoder.layers.3"
    assert block_of("encoder.norm.scale") == "encoder.norm"
    assert block_of("") == ""
    assert pattern_of("layers.3.mlp2.0") == "layers.*.mlp2.*"


def test_a_table_that_is_too_wide_wraps_or_cuts_its_cells() -> None:
    columns = (Column("a", 4), Column("b", 4, wrap=True), Column("c", 3, keep_end=True))
    table = Table(columns, [Row(("abcdefgh", "one two three", "x.y.zzz"))])
    assert to_text([table], 40) == (
        "  a         b              c\n  abcdefgh  one two three  x.y.zzz"
    )
    assert to_text([table], 20) == (
        "  a      b      c\n  abcd…  one    …zzz\n         two\n         three"
    )


def test_ten_thousand_nodes_are_explained_and_summed_up_in_seconds() -> None:
    gm = _many_blocks(1700)
    started = time.perf_counter()
    text = str(mpgraph.explain(gm))
    assert time.perf_counter() - started < 5
    assert "blocks.0 … blocks.1699" in text
    assert len(text.splitlines()) < 30


def _many_blocks(number: int) -> fx.GraphModule:
    lower = ir.Decision(Rule.LOWER, torch.bfloat16, "products", "preset default")
    widen = ir.Decision(Rule.WIDEN, torch.float32, "sums", "preset default")
    wide = torch.empty(4, 8, device="meta")
    narrow = wide.bfloat16()
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = wide

    def add(block: int, target: Any, *args: Any, **meta: Any) -> fx.Node:
        node = graph.call_function(target, args)
        trace = f'  File "m.py", line {block}\n    y = f(x)\n' * 10
        node.meta = {"stack_trace": trace, "module_path": f"blocks.{block}", **meta}
        return node

    aten = torch.ops.aten
    for block in range(number):
        y = add(block, ir.CAST, x, torch.bfloat16, val=narrow, inserted=True)
        for operator in (aten.relu.default, aten.neg.default, aten.exp.default):
            y = add(block, operator, y, val=narrow, decision=lower)
        y = add(block, aten.add.Tensor, x, y, val=wide, decision=widen)
        x = add(block, aten.softmax.int, y, -1, val=wide, decision=widen)
    graph.output(x)
    return fx.GraphModule(nn.Module(), graph)


def test_the_repr_of_a_report_is_one_line():
    model = mpgraph.convert(nn.Linear(4, 4), "bf16", example_inputs=(torch.ones(2, 4),))
    assert repr(mpgraph.explain(model)) == "<Report on Linear, 1 graphs: print() shows it>"
