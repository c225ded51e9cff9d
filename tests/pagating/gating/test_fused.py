"""Tests of the unit at the limits of numbers and under torch's transforms, and of fused against composed form."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.activations import XIELUActivation

import pagating
from pagating.gating import fused
from pagating.gating.gates import GATES
from pagating.gating.learned import _XIELU, XIELU
from pagating.gating.learned import composed as composed_xielu
from pagating.gating.units import BASES, PaGLU, pointwise

torch.set_num_threads(1)
CASES = [(gate, base) for gate in fused.GATED for base in BASES]


def sample(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).to(dtype)


def composed(x: Tensor, alpha: float | Tensor, gate: str, base: str) -> Tensor:
    return alpha * x * GATES[gate].gate(x) + (1 - alpha) * BASES[base](x)


def saved_bytes(function: Callable[[], Tensor]) -> int:
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = function()
    assert result.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize(("gate", "base"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_input_is_kept_for_the_backward_pass(gate: str, base: str, dtype: torch.dtype) -> None:
    x = sample(64, 96, dtype=dtype).requires_grad_()
    gelu = saved_bytes(lambda: F.gelu(x, approximate="tanh"))
    assert gelu == x.numel() * x.element_size()
    assert saved_bytes(lambda: pointwise(x, 0.5, gate, base)) == gelu
    alpha = torch.nn.Parameter(torch.tensor(0.5))
    assert saved_bytes(lambda: pointwise(x, alpha, gate, base)) == gelu + 4
    assert saved_bytes(lambda: composed(x, 0.5, gate, base)) > gelu or gate == "step"


@pytest.mark.parametrize(("gate", "base"), CASES)
@pytest.mark.parametrize("shape", [(), (4,), (3, 1), (2, 1, 4)])
def test_gradcheck_and_second_derivatives(gate: str, base: str, shape: tuple[int, ...]) -> None:
    x = (sample(2, 3, 4) + 0.01).requires_grad_()
    alpha = torch.full(shape, 0.7, dtype=torch.float64, requires_grad=True)

    def unit(x: Tensor, alpha: Tensor) -> Tensor:
        return fused.fused_pointwise(x, alpha, gate, base)

    assert fused.applies(x, alpha, gate, base)
    assert torch.autograd.gradcheck(unit, (x, alpha))
    assert torch.autograd.gradgradcheck(unit, (x, alpha))


@pytest.mark.parametrize(("gate", "base"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_as_close_as_the_composed_formulas(gate: str, base: str, dtype: torch.dtype) -> None:
    x64, grad64 = 3 * sample(4096), sample(2, 4096)[1]
    x64, grad64 = x64.to(dtype).double(), grad64.to(dtype).double()
    alpha64 = torch.tensor(0.75, dtype=torch.float64, requires_grad=True)
    x64.requires_grad_()
    composed(x64, alpha64, gate, base).backward(grad64)
    x = x64.detach().to(dtype).requires_grad_()
    alpha = torch.tensor(0.75, requires_grad=True)
    pointwise(x, alpha, gate, base).backward(grad64.to(dtype))
    eps = torch.finfo(dtype).eps
    terms = grad64.abs() * (1 + x64.detach().abs())
    assert ((x.grad.double() - x64.grad).abs() / terms).max().item() <= 4 * eps
    # the sum of n rounded products: each within 4 units of its size, in both directions
    products = (grad64 * (GATES[gate].gated(x64) - BASES[base](x64))).abs().sum()
    assert (alpha.grad.double() - alpha64.grad).abs() <= 4 * eps * products


def test_other_arguments_fall_back_to_the_composed_formula() -> None:
    x = sample(3, 4)
    assert not fused.applies(x, 0.5, "tanh", "identity")
    assert not fused.applies(x, 0.5, "sigmoid", F.relu)
    wider = torch.full((2, 3, 4), 0.5, dtype=torch.float64)
    assert not fused.applies(x, wider, "sigmoid", "identity")
    torch.testing.assert_close(pointwise(x, wider)[1], pointwise(x, 0.5))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("base", BASES)
def test_functional_transforms(gate: str, base: str) -> None:
    x, alpha = sample(5, 4), torch.linspace(0.1, 1.9, 5, dtype=torch.float64)

    def unit(x: Tensor, alpha: Tensor) -> Tensor:
        return pointwise(x, alpha, gate, base)

    rows = torch.stack([unit(x[i], alpha[i]) for i in range(5)])
    torch.testing.assert_close(torch.vmap(unit)(x, alpha), rows)
    torch.testing.assert_close(torch.vmap(unit, in_dims=(1, None), out_dims=1)(x, alpha[0]), unit(x, alpha[0]))
    each = torch.stack([unit(x[0], a) for a in alpha])
    torch.testing.assert_close(torch.vmap(unit, in_dims=(None, 0))(x[0], alpha), each)

    y, a = x.clone().requires_grad_(), alpha[2].clone().requires_grad_()
    expected = torch.autograd.grad(unit(y, a).sum(), (y, a))
    found = torch.func.grad(lambda x, a: unit(x, a).sum(), argnums=(0, 1))(x, alpha[2])
    torch.testing.assert_close(found, expected)
    functions = {"x": lambda x: unit(x, alpha[2]).sum(), "alpha": lambda a: (unit(x, a) * x).sum()}
    for function, at in ((functions["x"], x[0]), (functions["alpha"], alpha[2])):
        reverse = torch.func.jacrev(function)
        torch.testing.assert_close(torch.func.jacfwd(function)(at), reverse(at))
        for forward in (torch.func.hessian(function), torch.func.jacfwd(torch.func.jacfwd(function))):
            torch.testing.assert_close(forward(at), torch.func.jacrev(reverse)(at))
    per_row = torch.vmap(torch.func.grad(lambda x, a: unit(x, a).sum()), in_dims=(0, None))(x, alpha[2])
    torch.testing.assert_close(per_row, expected[0])


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_limits_of_numbers(gate: str, base: str, dtype: torch.dtype) -> None:
    for alpha in (0.0, 0.5, 1.0, torch.tensor(0.5)):
        unit = PaGLU(0.5, gate, base) if isinstance(alpha, Tensor) else PaGLU(alpha, gate, base)
        assert unit(torch.tensor([math.nan], dtype=dtype)).isnan().all()
        at_infinity = unit(torch.tensor([math.inf], dtype=dtype)).item()
        assert at_infinity == math.inf if alpha in (0.0, 1.0) else not math.isfinite(at_infinity)
        assert not unit(torch.tensor([-math.inf], dtype=dtype)).isfinite().any() or gate in ("relu", "step")
        assert unit(torch.zeros(3, dtype=dtype)).tolist() == [0.0] * 3
        for shape in [(0,), (0, 4), (2, 0, 4), ()]:
            empty = torch.zeros(shape, dtype=dtype, requires_grad=True)
            result = pointwise(empty, alpha, gate, base)
            assert (result.shape, result.dtype) == (empty.shape, dtype)
            result.sum().backward()
            assert empty.grad.shape == empty.shape
        tiny = torch.tensor([torch.finfo(dtype).smallest_normal / 4], dtype=dtype)  # a denormal
        assert 0 <= pointwise(tiny, alpha, gate, base).item() <= tiny.item()


def test_a_symbolic_trace_holds_the_composed_formula() -> None:
    x = sample(3, 4)
    for gate, base in CASES:
        unit = PaGLU(0.7, gate, base)
        torch.testing.assert_close(torch.fx.symbolic_trace(unit)(x), unit(x))


@pytest.mark.parametrize("memory", ["transposed", "strided", "expanded"])
def test_any_layout_of_memory(memory: str) -> None:
    x = sample(6, 8)
    x = {"transposed": x.T, "strided": x[:, ::2], "expanded": x[:1].expand(6, 8)}[memory].requires_grad_()
    y = x.detach().clone().contiguous().requires_grad_()
    before = x.detach().clone()
    pointwise(x, 0.7).square().sum().backward()
    composed(y, 0.7, "sigmoid", "identity").square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-12, atol=1e-12)
    assert torch.equal(x, before)


def test_autocast_gives_the_dtype_of_the_input() -> None:
    linear, unit = torch.nn.Linear(4, 4), PaGLU("learnable")
    with torch.autocast("cpu", torch.bfloat16):
        y = unit(linear(torch.randn(2, 4)))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert unit.alpha_logit.grad.dtype == torch.float32


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    "alpha", [0.5, "learnable", {"learnable": {"per": "channel"}}, {"token": {}}, {"schedule": {"from": 0.5}}]
)
def test_compiles_without_a_break_and_gives_the_same(base: str, alpha: object) -> None:
    unit = PaGLU(alpha, base=base, width=8)
    compiled = torch.compile(unit, fullgraph=True)
    x, y = sample(4, 8, dtype=torch.float32).requires_grad_(), sample(4, 8, dtype=torch.float32).requires_grad_()
    grads = []
    for function, z in ((unit, x), (compiled, y)):
        unit.zero_grad()
        result = function(z)
        result.square().sum().backward()
        grads.append([z.grad, *[p.grad.clone() for p in unit.parameters()]])
    torch.testing.assert_close(unit(x), compiled(y))
    torch.testing.assert_close(grads[0], grads[1])
    pagating.set_progress(unit, 0.5)
    torch.testing.assert_close(unit(x), compiled(y))


@pytest.mark.slow
@pytest.mark.parametrize("gate", GATES)
def test_every_gate_compiles(gate: str) -> None:
    x = sample(64, dtype=torch.float32)
    compiled = torch.compile(pointwise, fullgraph=True)
    torch.testing.assert_close(compiled(x, 0.5, gate), pointwise(x, 0.5, gate))


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
def test_a_compiled_model_gives_every_alpha_its_gradient(base: str) -> None:
    config = GPT2Config(vocab_size=37, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    pagating.patch(model, alpha="learnable", base=base)
    ids = torch.randint(0, 37, (2, 16), generator=torch.Generator().manual_seed(1))
    (alpha,) = pagating.alpha_parameters(model)
    grads = []
    for run in (model, torch.compile(model)):
        model.zero_grad()
        run(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        grads.append(alpha.parameter.grad.item())
    assert grads[0] != 0
    assert grads[1] == pytest.approx(grads[0], rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_xielu_is_that_of_transformers(dtype: torch.dtype) -> None:
    own, theirs = XIELU(), XIELUActivation(dtype=torch.float32)
    assert {name: t.tolist() for name, t in own.state_dict().items()} == {
        name: t.tolist() for name, t in theirs.state_dict().items()
    }
    own.double(), theirs.double()
    theirs.load_state_dict({**own.state_dict(), "alpha_p": torch.tensor([0.3]), "alpha_n": torch.tensor([-1.2])})
    own.load_state_dict(theirs.state_dict())
    x = torch.cat([4 * sample(4096), torch.tensor([0.0, -1e-7, -30.0], dtype=torch.float64)]).to(dtype)
    grad = sample(2, 4099)[1].to(dtype)
    ours, reference = x.clone().requires_grad_(), x.double().requires_grad_()
    y, expected = own(ours), theirs(reference)
    y.backward(grad)
    expected.backward(grad.double())
    eps = torch.finfo(dtype).eps
    assert y.dtype == ours.grad.dtype == dtype
    assert ((y.double() - expected).abs() <= 4 * eps * (1 + x.double().square()) + 2e-6).all()
    away = (x > 0) | (x < -1e-6)  # near 0 the slopes differ, see the docstring of XIELU
    bound = 6 * eps * grad.double().abs() * (1 + x.double().abs())
    assert ((ours.grad.double() - reference.grad).abs() <= bound)[away].all()
    assert ours.grad[4096] == 0.5 * grad[4096]
    for name in ("alpha_p", "alpha_n"):
        assert own.get_parameter(name).grad.item() == pytest.approx(
            theirs.get_parameter(name).grad.item(), rel=40 * eps, abs=2e-6
        )


def test_xielu_gradients_by_differences_and_composed() -> None:
    x = (sample(3, 5) + 0.01).requires_grad_()
    module = XIELU().double()
    strengths = [torch.full(shape, 0.7, dtype=torch.float64, requires_grad=True) for shape in ((1,), (3, 1))]
    assert torch.autograd.gradcheck(_XIELU.apply, (x, *strengths))
    torch.testing.assert_close(
        module(x), composed_xielu(x, F.softplus(module.alpha_p), 0.5 + F.softplus(module.alpha_n))
    )
    assert saved_bytes(lambda: module(x)) == x.numel() * 8 + 32
