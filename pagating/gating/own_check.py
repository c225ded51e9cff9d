"""Check a user's function before it is trained: shape, dtype, each token by itself, nothing random, a whole gradient.

Axes of the inputs: B batch, T tokens, F features.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

import torch
from torch import Tensor, nn

from .gates import Function

WIDTHS = (4, 6)  # a function that needs a certain one would fail in a model of another size
FAR = (0.0, 20.0, -20.0, 100.0, -100.0, 1000.0, -1000.0)  # inputs at which value and gradient must be finite
STEP = 2.0**-8  # of a difference quotient; a second one has a quarter of it
ARGUMENT = "_is_argument"  # marks the input, so that it is not taken for a parameter
MOST_CUT = 0.02  # share of the inputs at which the gradient may differ from the slope: kinks
CUTS = "detach(), .data, .item(), numpy or no_grad()"


@contextmanager
def plain_torch() -> Iterator[None]:
    """Undo the caller's no_grad, inference mode and default device in a `with` block, and keep torch's generator.

    What the user's code prints goes to standard error, because a command's standard output may be JSON.
    """
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.device("cpu"),
        torch.random.fork_rng(devices=[]),
        redirect_stdout(sys.stderr),
    ):
        yield


@contextmanager
def kept_settings(what: str) -> Iterator[None]:
    """Bring torch's settings back after a `with` block. Raise ValueError if the block changed one and did not fail."""
    before = _settings()
    try:
        yield
        after = _settings()
    finally:
        grad, dtype, threads, precision, deterministic = before
        torch.set_grad_enabled(grad)
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(deterministic)
    if after != before:
        raise ValueError(
            f"{what} changes torch's gradient mode, default dtype or threads, or its matmul precision or "
            "deterministic algorithms, on which other code depends"
        )


@contextmanager
def eager() -> Iterator[None]:
    """Run functions of torch.compile as they are written: compiling for each shape of the check takes minutes."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and loading it takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def one_line(error: BaseException) -> str:
    """Return an error's type and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


def check_function(
    what: str, function: Function, width: int, dtype: torch.dtype = torch.float32, far: bool = True
) -> None:
    """Raise ValueError, one line, if a function cannot stand in every MLP of a model that is trained.

    Args:
        what: Start of the message: the key and the value that name the function.
        function: The function of a tensor, or a module, whose parameters are trained.
        width: Features of its input.
        dtype: dtype of its input. A module in float32 may answer in float32.
        far: Whether it must be finite at 0 and from -1000 to 1000 too.
    """
    with plain_torch(), eager():
        torch.manual_seed(20_260)  # a state that the function will not set itself
        shape = (2, 3, width)
        x_BTF = _spread(shape).to(dtype)
        y_BTF = called(what, function, x_BTF)
        dtypes = (dtype, torch.float32) if isinstance(function, nn.Module) else (dtype,)
        if not isinstance(y_BTF, Tensor) or y_BTF.shape != shape or y_BTF.dtype not in dtypes:
            made = f"{tuple(y_BTF.shape)} {y_BTF.dtype}" if isinstance(y_BTF, Tensor) else type(y_BTF).__name__
            raise ValueError(f"{what} makes {made} of {shape} {dtype}; it must keep shape and dtype")
        again = [called(what, function, x_BTF) for _ in range(3)]
        if not all(torch.equal(torch.nan_to_num(y_BTF), torch.nan_to_num(other)) for other in again):
            raise ValueError(f"{what} gives other values for the same input when it is called again")
        if not torch.isfinite(y_BTF).all():
            raise ValueError(f"{what} is not finite between -4 and 4")
        precision = 1e-4 if dtype == torch.float32 else 2e-2
        each = [called(what, function, token_BTF) for token_BTF in x_BTF.reshape(-1, 1, 1, width)]
        if not torch.allclose(torch.cat(each).reshape(shape), y_BTF, rtol=precision, atol=precision / 10):
            raise ValueError(f"{what} mixes tokens: a token alone gives another value")
        _check_parameters(what, function, y_BTF)
        if far:
            _check_far(what, function, width, dtype)
        if dtype == torch.float32:
            _check_gradient(what, function, width)


def _spread(shape: tuple[int, ...]) -> Tensor:
    """Return numbers from -4 to 4, without 0, in a fixed order that is not sorted."""
    count = math.prod(shape)
    x = torch.linspace(-4.0, 4.0, count, dtype=torch.float32)
    return x[torch.arange(count) * 7 % count if count % 7 else torch.arange(count)].reshape(shape)


def called(what: str, function: Function, x: Tensor) -> Tensor:
    """Call a function with an input that has a gradient and may be written to. Raise ValueError if it writes to it."""
    leaf = x.detach().clone().requires_grad_()
    setattr(leaf, ARGUMENT, True)
    given = leaf * 1
    generator = torch.get_rng_state()
    with kept_settings(what):
        try:
            y = function(given)
        except (Exception, SystemExit) as error:  # the user's code may raise any error
            raise ValueError(f"{what} fails on a tensor of shape {tuple(x.shape)}: {one_line(error)}") from error
    if not torch.equal(generator, torch.get_rng_state()):
        raise ValueError(f"{what} draws random numbers or sets torch's seed")
    if not torch.equal(given.detach(), x):
        raise ValueError(f"{what} changes its argument in place; compute a new tensor")
    return y


def _settings() -> tuple[bool, torch.dtype, int, str, bool]:
    return (
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
    )


def _check_parameters(what: str, function: Function, y: Tensor) -> None:
    """Raise ValueError if `y` depends on a parameter that is not trained, or not on one that should be trained."""
    own = dict(function.named_parameters()) if isinstance(function, nn.Module) else {}
    used = {id(leaf) for leaf in _leaves(y)}
    if used - {id(parameter) for parameter in own.values()}:
        raise ValueError(
            f"{what} uses a parameter that would not be trained; make it a parameter of an nn.Module, and name the "
            "module as a unit"
        )
    for name, parameter in own.items():
        if parameter.requires_grad and id(parameter) not in used:
            raise ValueError(f"{what}: its parameter {name!r} gets no gradient, so that it would not be trained")


def _check_far(what: str, function: Function, width: int, dtype: torch.dtype) -> None:
    """Raise ValueError if the value or the gradient at 0 or at large inputs is not finite, which ends a trial."""
    for value in FAR:
        x_BTF = torch.full((1, 1, width), value, dtype=dtype)
        if not torch.isfinite(called(what, function, x_BTF)).all():
            raise ValueError(f"{what} is not finite at x = {value:g} in {dtype}, where a trial would diverge")
        leaf_BTF = x_BTF.requires_grad_()
        y_BTF = function(leaf_BTF * 1)
        if not torch.isfinite(_gradient(what, y_BTF, leaf_BTF, torch.ones_like(y_BTF))).all():
            raise ValueError(f"{what}: its gradient is not finite at x = {value:g} in {dtype}; a trial would diverge")


def _leaves(y: Tensor) -> Iterator[Tensor]:
    """Yield the leaves, other than the function's argument, whose gradient a backward pass from `y` would compute."""
    ahead, seen = [y.grad_fn], set()
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable") and not hasattr(node.variable, ARGUMENT):
            yield node.variable
        ahead += [parent for parent, _ in node.next_functions]


def _gradient(what: str, y: Tensor, leaf: Tensor, way: Tensor) -> Tensor:
    """Return the gradient of `way * y` with respect to `leaf`, zero if there is none. Raise ValueError if it fails."""
    if not y.requires_grad:
        return torch.zeros_like(leaf)
    try:
        (found,) = torch.autograd.grad(y, leaf, way, allow_unused=True)
    except Exception as error:  # the user's code may raise any error
        raise ValueError(f"{what}: its gradient cannot be computed: {one_line(error)}") from error
    return torch.zeros_like(leaf) if found is None else found


def _check_gradient(what: str, function: Function, width: int) -> None:
    """Raise ValueError if autograd's gradient is not the slope of the function.

    Both are taken for each token in one fixed direction. Tokens at a kink or a jump are left out: there two difference
    quotients differ. So a gradient that a function of steps defines for itself is accepted.
    """
    x_BTF = _spread((1, 512, width))
    way_BTF = torch.where(torch.arange(x_BTF.numel()).reshape(x_BTF.shape) % 3 == 0, -1.0, 1.0)
    leaf_BTF = x_BTF.clone().requires_grad_()
    y_BTF = function(leaf_BTF * 1)
    slope_BTF = _gradient(what, y_BTF, leaf_BTF, way_BTF)
    if not torch.isfinite(slope_BTF).all():
        raise ValueError(f"{what}: its gradient is not finite between -4 and 4")
    varies = bool((y_BTF.max() - y_BTF.min()).abs() > 1e-6)
    if varies and not slope_BTF.any():
        raise ValueError(
            f"{what} has no gradient, although its values change: {CUTS}, rounding or a comparison cuts it; write it "
            "in torch operations on its argument that have a gradient"
        )

    def quotient(step: float) -> Tensor:
        with torch.no_grad():
            up, down = x_BTF + step * way_BTF, x_BTF - step * way_BTF
            change = (function(up).double() - function(down).double()) * way_BTF
            return (change / (up - down).double().abs()).sum(-1)

    wide, near, told = quotient(STEP), quotient(STEP / 4), (slope_BTF * way_BTF).double().sum(-1)
    allowed = 0.02 * near.abs() + 2e-3 * near.abs().max() + 2e-4 * y_BTF.detach().abs().max()
    clear = ((wide - near).abs() <= allowed) & (near.abs() > allowed)
    wrong = clear & ((told - near).abs() > 2 * allowed)
    if (share := float(wrong.double().mean())) > MOST_CUT:
        raise ValueError(
            f"{what}: its gradient is not its slope at {share:.0%} of the inputs from -4 to 4: {CUTS} cuts a "
            "part of it, or a backward() of its own is wrong"
        )
