"""Tests of output projection and loss in chunks, against torch's own."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pagating.model import fused_loss
from pagating.model.fused_loss import chunk_rows, linear_nll, linear_nll_each


def case(n=50, c=7, v=31, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, c, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(v, c, generator=generator, dtype=dtype).requires_grad_()
    return x, weight, torch.randint(0, v, (n,), generator=generator)


@pytest.mark.parametrize(("rows", "more"), [(1, 0), (16, 0), (17, 0), (50, 0), (64, 0), (17, 33), (64, 1)])
def test_linear_nll_is_cross_entropy_in_values_and_gradients(monkeypatch, rows, more):
    monkeypatch.setattr(fused_loss, "padding", lambda vocab_size, device: more)  # as on a GPU
    monkeypatch.setattr(fused_loss, "LEAST_ROWS", rows)
    monkeypatch.setattr(fused_loss, "CHUNK", 1)
    x, weight, targets = case()
    expected = F.cross_entropy(x @ weight.T, targets)
    wanted = torch.autograd.grad(3.0 * expected, (x, weight))
    got = linear_nll(x, weight, targets)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)
    for own, reference in zip(torch.autograd.grad(3.0 * got, (x, weight)), wanted, strict=True):
        torch.testing.assert_close(own, reference, rtol=1e-12, atol=1e-15)
    each = F.cross_entropy(x @ weight.T, targets, reduction="none")
    torch.testing.assert_close(linear_nll_each(x, weight, targets), each, rtol=1e-13, atol=1e-15)


def test_a_gpu_gets_rows_that_start_at_round_addresses():
    assert [fused_loss.padding(size, "cuda") for size in (50_257, 50_304, 1024, 1)] == [47, 0, 0, 63]
    assert fused_loss.padding(50_257, "cpu") == 0


@pytest.mark.parametrize("more", [0, 33])
def test_linear_nll_in_float32_and_bfloat16(monkeypatch, more):
    monkeypatch.setattr(fused_loss, "padding", lambda vocab_size, device: more)
    x, weight, targets = case(dtype=torch.float32)
    expected = F.cross_entropy((x @ weight.T).double(), targets)
    wanted = torch.autograd.grad(expected, (x, weight))
    for precise, tolerance in ((True, 2e-6), (False, 2e-2)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not precise):
            got = linear_nll(x, weight, targets)
        assert got.dtype == torch.float32
        assert got.item() == pytest.approx(expected.item(), rel=tolerance)
        for own, reference in zip(torch.autograd.grad(got, (x, weight)), wanted, strict=True):
            assert own.dtype == torch.float32
            torch.testing.assert_close(own, reference, rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (64, 4097), (2, 3, 17)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_softmax_takes_the_place_of_the_logits_bit_for_bit(shape, dtype):
    logits = 30 * torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    expected, place = torch.softmax(logits, -1), logits.data_ptr()
    got = fused_loss._softmax_(logits)
    assert torch.equal(got, expected)
    assert got.data_ptr() == place


def test_linear_nll_at_the_limits():
    x, weight, _ = case(n=4, v=1)
    assert linear_nll(x, weight, torch.zeros(4, dtype=torch.long)).item() == 0.0  # one word: nothing to predict
    x, weight, targets = case(n=1)
    assert linear_nll(x, weight, targets).item() == pytest.approx(F.cross_entropy(x @ weight.T, targets).item())
    x, weight, targets = case(dtype=torch.float32)
    got = linear_nll(1e4 * x, weight, targets)  # an exponential of these logits overflows
    assert got.item() == pytest.approx(F.cross_entropy(1e4 * x @ weight.T, targets).item(), rel=1e-6)
    assert math.isnan(linear_nll(torch.full_like(x, math.nan), weight, targets).item())
    frozen = linear_nll(x, weight.detach(), targets)
    frozen.backward()
    assert weight.grad is None
    assert x.grad is not None


def test_linear_nll_refuses_what_it_cannot_do():
    x, weight, targets = case()
    with pytest.raises(ValueError, match=r"shapes \(50, 7\), \(31, 7\), \(49,\) are not \(N, C\), \(V, C\), \(N,\)"):
        linear_nll(x, weight, targets[1:])
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        linear_nll(x, weight, targets + 31)
    loss = linear_nll(x, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward was called a second time"):
        loss.backward()


class Largest(TorchDispatchMode):
    """Record the number of elements of the largest tensor that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_tensor_is_larger_than_a_chunk_or_the_weight(monkeypatch):
    monkeypatch.setattr(fused_loss, "CHUNK", 4096)
    monkeypatch.setattr(fused_loss, "LEAST_ROWS", 2)
    x, weight, targets = case(n=512, c=4, v=256, dtype=torch.float32)
    assert chunk_rows(512, 256) == 16
    with Largest() as chunked:
        linear_nll(x, weight, targets).backward()
        linear_nll_each(x, weight, targets)
    assert chunked.elements == 16 * 256
    with Largest() as whole:
        F.cross_entropy(x @ weight.T, targets).backward()
    assert whole.elements == 512 * 256
