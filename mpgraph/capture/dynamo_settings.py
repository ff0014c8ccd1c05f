"""How Dynamo is set while it runs a converted model, and what is kept from the user."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch._dynamo import config as dynamo_config
from torch._dynamo import convert_frame, exc, external_utils, symbolic_convert
from torch._dynamo import utils as dynamo_utils
from torch._dynamo.guards import GuardBuilder
from torch._dynamo.variables import (
    AutogradFunctionContextVariable,
    ConstantVariable,
    TensorVariable,
    TorchInGraphFunctionVariable,
    builder,
    functions,
    higher_order_ops,
    tensor,
)

from mpgraph.capture import kept
from mpgraph.capture.replaced import replaced
from mpgraph.capture.saved import hidden_from_saved_tensors_hooks
from mpgraph.weights import is_trainable_leaf


@contextlib.contextmanager
def configured(device: str, limit: int, count: int) -> Iterator[None]:
    """Dynamo as the engine needs it, while a call runs.

    A model has ``count`` graphs so far, and at most ``limit``.
    """
    with (
        dynamo_config.patch(
            suppress_errors=False,
            # Dynamo would turn numpy into torch, and numpy's random numbers into torch's.
            trace_numpy=False,
            # A counter on a module would otherwise compile the model anew at every call.
            allow_unspec_int_on_nn_module=True,
            # A hook that is added between calls is seen.
            skip_nnmodule_hook_guards=False,
            # A float is a constant, as in eager mode; one that goes on changing becomes an input,
            # which Dynamo cannot hand to a checkpoint or a hook.
            specialize_float=count < limit // 4,
            allow_rnn=True,  # otherwise every torch.nn.LSTM is left to eager mode
            # An assert on data stays one, with its own exception, which forward may catch.
            rewrite_assert_with_torch_assert=False,
            fail_on_recompile_limit_hit=True,
            # Graphs are counted per model in _compile; Dynamo counts per function of the
            # user's source, whichever model runs it.
            recompile_limit=16 * limit,
            accumulated_recompile_limit=64 * limit,
        ),
        _without_autocast_in_backward(device),
        _breaks_where_tracing_fails(),
        _hooks_in_python(),
        _numpy_numbers_as_pythons(),
        _breaks_at_torchscript(),
        _breaks_at_absent_gradients(),
        _guards_leaves(),
        _breaks_at_forbidden_calls(),
        _compiled_unseen(),
        _says_eager(),
        _quiet(),
    ):
        yield


@contextlib.contextmanager
def _without_autocast_in_backward(device: str) -> Iterator[None]:
    """Let Dynamo trace what runs in the backward pass as it runs: outside of autocast.

    Where a release has no such method, the dtypes are still checked when the graph is lowered.
    """
    with contextlib.ExitStack() as stack:
        for owner, name in _BACKWARD_TRACERS:
            if hasattr(owner, name):
                stack.enter_context(_outside_autocast(owner, name, device))
        yield


_BACKWARD_TRACERS: tuple[tuple[Any, str], ...] = (
    (higher_order_ops.AutogradFunctionApplyVariable, "trace_backward_graph"),
    (TensorVariable, "_method_register_hook"),
)


@contextlib.contextmanager
def _hooks_in_python() -> Iterator[None]:
    """Break the graph at a hook on a value, where a release has no operator for it.

    It would make a custom Function of the hook, which sees gradients as its graph has them: in
    fp16 multiplied by the loss scale.
    """
    if kept.HOOK is not None:
        yield
        return
    owner: Any = TensorVariable
    original = owner._method_register_hook

    def trace(self: Any, tx: Any, name: str, hook: Any) -> Any:
        if self.source:
            return original(self, tx, name, hook)
        exc.unimplemented(
            gb_type="a hook on a value",
            context=name,
            explanation="this release of torch runs it in Python",
            hints=[],
        )

    with replaced(owner, "_method_register_hook", trace):
        yield


@contextlib.contextmanager
def _outside_autocast(owner: Any, name: str, device: str) -> Iterator[None]:
    original = getattr(owner, name)

    def trace(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device, enabled=False):
            return original(*args, **kwargs)

    with replaced(owner, name, trace):
        yield


@contextlib.contextmanager
def _breaks_where_tracing_fails() -> Iterator[None]:
    """Leave an operator that fails on fake tensors to eager mode, as Dynamo does with others.

    Dynamo itself gives up on the whole model. If the operator fails in eager mode too, the error
    is the model's own.
    """
    original = dynamo_utils.get_fake_value

    def get_fake_value(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except exc.TorchRuntimeError as error:
            reason = "an operator fails while it is traced"
            exc.unimplemented(gb_type=reason, context=str(error), explanation="", hints=[])

    with (
        replaced(builder, "get_fake_value", get_fake_value),
        replaced(tensor, "get_fake_value", get_fake_value),
    ):
        yield


@contextlib.contextmanager
def _numpy_numbers_as_pythons() -> Iterator[None]:
    """Take a number of numpy's for a constant, as torch's operators do in eager mode.

    Dynamo would take it for an array: a tensor of no dimensions and of the number's own dtype,
    which other scalars are promoted to and which an operator that wants a number refuses. One
    that goes on changing is left to Dynamo.
    """
    numpy = sys.modules.get("numpy")
    if numpy is None:
        yield
        return
    owner: Any = builder.VariableBuilder
    original = owner._wrap

    def _wrap(self: Any, value: Any) -> Any:
        is_number = isinstance(value, (numpy.integer, numpy.floating)) and value == value
        # A longdouble is no number of Python's.
        number = value.item() if is_number and dynamo_config.specialize_float else None
        if not isinstance(number, (int, float)):
            return original(self, value)
        self.install_guards(GuardBuilder.EQUALS_MATCH)
        return ConstantVariable.create(number, source=self.source)

    with replaced(owner, "_wrap", _wrap):
        yield


@contextlib.contextmanager
def _breaks_at_torchscript() -> Iterator[None]:
    """Leave TorchScript to its own runtime, which casts by rules of its own, call by call.

    Dynamo would trace the Python that a scripted function was made from, as if nobody had; and
    leave all of a function that calls a scripted module to eager mode.
    """

    def wrap(self: Any, value: Any) -> Any:
        self.install_guards(GuardBuilder.TYPE_MATCH)
        reason = f"{type(value).__name__} runs in the TorchScript runtime"
        return functions.SkipFunctionVariable(value, reason, source=self.source)

    owner = builder.VariableBuilder
    wrap_module = owner.wrap_module

    def wrap_any_module(self: Any, value: Any) -> Any:
        is_script = isinstance(value, torch.jit.ScriptModule)
        return wrap(self, value) if is_script else wrap_module(self, value)

    with (
        replaced(owner, "wrap_jit_function", wrap),
        replaced(owner, "wrap_module", wrap_any_module),
    ):
        yield


@contextlib.contextmanager
def _breaks_at_absent_gradients() -> Iterator[None]:
    """Leave a custom Function to Python that asks for ``None`` where there is no gradient.

    In Dynamo's graph its backward gets zeros there, and goes another way.
    """
    owner: Any = AutogradFunctionContextVariable
    original = owner.call_method

    def call_method(self: Any, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
        if name == "__setattr__" and args[0].as_python_constant() == "materialize_grads":
            exc.unimplemented(
                gb_type="set_materialize_grads in a custom Function",
                context=str(self),
                explanation="its backward is to get None where there is no gradient",
                hints=[],
            )
        return original(self, tx, name, args, kwargs)

    with replaced(owner, "call_method", call_method):
        yield


@contextlib.contextmanager
def _breaks_at_forbidden_calls() -> Iterator[None]:
    """Leave to Python what Dynamo must not trace, such as ``mark_static_address``.

    A model calls it only where it is told that it runs eagerly; Dynamo would give up on the model.
    """
    owner: Any = symbolic_convert
    original = owner.is_forbidden

    def is_forbidden(function: Any) -> bool:
        if original(function):
            exc.unimplemented(
                gb_type="a call that Dynamo must not trace",
                context=getattr(function, "__name__", str(function)),
                explanation="it is for Python alone",
                hints=[],
            )
        return False

    with replaced(owner, "is_forbidden", is_forbidden):
        yield


@contextlib.contextmanager
def _guards_leaves() -> Iterator[None]:
    """Compile anew where a tensor is a leaf now and was none, or the other way round.

    torch.autocast keeps one 16-bit copy of a leaf, in which the gradients of all its uses meet.
    """
    owner: Any = builder.VariableBuilder
    original = owner.wrap_tensor

    def wrap_tensor(self: Any, value: torch.Tensor) -> Any:
        if value.requires_grad and not isinstance(value, nn.Parameter):
            self.install_guards(_leaf_match)
        return original(self, value)

    with replaced(owner, "wrap_tensor", wrap_tensor):
        yield


def _leaf_match(guards: Any, guard: Any) -> None:
    expected = is_trainable_leaf(guards.get(guard))
    guards.get_guard_manager(guard).add_lambda_guard(
        lambda value: is_trainable_leaf(value) is expected,
        [f"is_trainable_leaf({guard.name}) is {expected}"],
        guard.user_stack,
    )


@contextlib.contextmanager
def _compiled_unseen() -> Iterator[None]:
    """Compile, which may happen at any call, out of sight of hooks around the call."""
    original = convert_frame._compile

    def compile_frame(*args: Any, **kwargs: Any) -> Any:
        with hidden_from_saved_tensors_hooks():
            return original(*args, **kwargs)

    with replaced(convert_frame, "_compile", compile_frame):
        yield


@contextlib.contextmanager
def _says_eager() -> Iterator[None]:
    """Tell a model that asks whether it is compiled that it is not, as export does first.

    Such a model leaves out what depends on data, and computes the same thing another way, with
    other roundings or dtypes. Here what depends on data breaks the graph. torch's own code and
    mpgraph's go on to be told what is so.
    """
    with (
        _answered(TorchInGraphFunctionVariable),
        _answered(functions.SkipFunctionVariable),
    ):
        yield


def _answered(owner: Any) -> contextlib.AbstractContextManager[None]:
    original = owner.call_function

    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        is_asked = not args and not kwargs
        if is_asked and any(self.value is asked for asked in _CAPTURING):
            return ConstantVariable.create(False)  # or there would be nothing to compile
        if is_asked and any(self.value is asked for asked in _COMPILING):
            package = str(tx.f_globals.get("__name__", "")).partition(".")[0]
            if package not in ("torch", "mpgraph"):
                return ConstantVariable.create(False)
        return original(self, tx, args, kwargs)

    return replaced(owner, "call_function", call_function)


_COMPILING = (
    torch.compiler.is_compiling,
    torch.compiler.is_dynamo_compiling,
    torch._utils.is_compiling,
    external_utils.is_compiling,
)
_CAPTURING = (torch.cuda.is_current_stream_capturing, torch.xpu.is_current_stream_capturing)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Dynamo's own notices from the user: explain lists the breaks, errors are raised."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    disabled = [noisy.disabled for noisy in loggers]
    warn_once = dynamo_utils.warn_once
    dynamo_utils.warn_once = lambda *_, **__: None
    for noisy in loggers:
        noisy.disabled = True
    try:
        yield
    finally:
        dynamo_utils.warn_once = warn_once
        for noisy, before in zip(loggers, disabled, strict=True):
            noisy.disabled = before


_LOGGERS = ("torch._subclasses.fake_tensor", "torch._dynamo.variables.tensor")
