"""Each divergence against its definition, chunks against the whole, and what the top k can and cannot see."""

import itertools

import pytest
import torch
from scipy.special import logsumexp, rel_entr

from hfllm.trainers.distillation import losses
from hfllm.trainers.distillation.losses import (
    LossSettings,
    TeacherHead,
    TeacherLogits,
    TopK,
    combined,
    divergence,
    linear_distillation,
    token_losses,
)

N, E, V = 11, 6, 17
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    head, teacher_head = torch.nn.Linear(E, V, bias=False), torch.nn.Linear(E + 3, V, bias=False)
    head.weight.data, teacher_head.weight.data = draw(V, E), draw(V, E + 3)
    return {
        "hidden": draw(N, E).requires_grad_(),
        "head": head,
        "targets": torch.randint(0, V, (N,), generator=generator),
        "teacher": TeacherHead(draw(N, E + 3), teacher_head, scale=0.7),
    }


def naive(student, teacher, beta, temperature):
    """The definition, in double precision and by another library."""

    def probabilities(logits):
        logits = logits.detach().double().numpy() / temperature
        return torch.tensor(logits - logsumexp(logits, axis=-1, keepdims=True)).exp().numpy()

    p, q = probabilities(teacher), probabilities(student)
    if beta in (0, 1):
        return (rel_entr(p, q) if beta == 0 else rel_entr(q, p)).sum(-1)
    m = beta * p + (1 - beta) * q
    return beta * rel_entr(p, m).sum(-1) + (1 - beta) * rel_entr(q, m).sum(-1)


def gradients(loss, case):
    case["hidden"].grad = case["head"].weight.grad = None
    loss.backward()
    return case["hidden"].grad.clone(), case["head"].weight.grad.clone()


def plain(case, settings, k=None):
    teacher = case["teacher"].take(slice(None))
    teacher = teacher if k is None else TopK.of(teacher, settings.temperature, k)
    return combined(*token_losses(case["head"](case["hidden"]), case["targets"], teacher, settings), settings)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("beta", BETAS)
def test_divergences_are_their_definitions(case, beta, temperature):
    student, teacher = case["head"](case["hidden"]), case["teacher"].take(slice(None))
    soft, hard = token_losses(student, case["targets"], teacher, LossSettings(temperature, beta))
    assert soft.item() == pytest.approx(naive(student, teacher, beta, temperature).sum(), rel=1e-5)
    expected = -student.log_softmax(-1)[torch.arange(N), case["targets"]].sum()
    torch.testing.assert_close(hard, expected)


@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("k", [None, 1, 5, V])
@pytest.mark.parametrize("beta", BETAS)
def test_chunks_are_the_whole(case, beta, k, chunk):
    settings = LossSettings(beta=beta)
    expected = plain(case, settings, k)
    teacher = case["teacher"]
    teacher = teacher if k is None else TopK.of(teacher.take(slice(None)), settings.temperature, k)
    loss, soft, hard = linear_distillation(
        case["hidden"], case["head"], case["targets"], teacher, settings, chunk_size=chunk
    )
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, combined(soft, hard, settings))
    torch.testing.assert_close(gradients(3 * loss, case), gradients(3 * expected, case), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beta", BETAS)
def test_gradients_are_differences(beta):
    generator = torch.Generator().manual_seed(1)
    hidden, weight, other = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((3, 4), (7, 4), (3, 7))
    )
    log_p = other.log_softmax(-1)

    def of_logits(logits):
        return divergence(log_p, (logits / 2).log_softmax(-1), beta)

    logits = (hidden @ weight.t()).requires_grad_()
    assert torch.autograd.gradcheck(of_logits, (logits,))


@pytest.mark.parametrize("beta", BETAS)
def test_the_top_k_is_a_bound_that_grows_to_the_whole(case, beta):
    settings = LossSettings(beta=beta, hard_weight=0.0)
    whole = plain(case, settings)
    bounds = [plain(case, settings, k).item() for k in range(1, V + 1)]
    assert all(one <= other + 1e-5 for one, other in itertools.pairwise(bounds))
    assert bounds[0] < whole.item() * 0.99
    assert bounds[-1] == pytest.approx(whole.item(), rel=1e-5)
    torch.testing.assert_close(gradients(plain(case, settings, V), case), gradients(whole, case), rtol=1e-4, atol=1e-5)


def test_the_rest_is_what_is_missing_from_one(case):
    kept = TopK.of(case["teacher"].take(slice(None)), 2.0, 4)
    torch.testing.assert_close(kept.log_probs.exp().sum(1) + kept.rest.exp(), torch.ones(N))
    assert kept.outcomes(V).shape == (N, 5)
    assert TopK.of(case["teacher"].take(slice(None)), 2.0, 99).outcomes(V).shape == (N, V)


def test_a_squared_temperature_keeps_the_size_of_the_gradient(case):
    """With small logits it tends to (student - teacher) / V at any temperature (Hinton et al. 2015, equation 4)."""
    small = {**case, "hidden": (case["hidden"].detach() * 1e-2).requires_grad_()}
    small["teacher"] = TeacherHead(case["teacher"].hidden * 1e-2, case["teacher"].head, 0.7)
    results = [
        gradients(plain(small, LossSettings(temperature, hard_weight=0.0, soft_weight=1.0)), small)[0]
        for temperature in (1.0, 3.0, 30.0)
    ]
    student, teacher = small["head"](small["hidden"]).detach(), small["teacher"].take(slice(None))
    centered = (student - student.mean(1, True)) - (teacher - teacher.mean(1, True))
    limit = centered @ small["head"].weight.detach() / V
    torch.testing.assert_close(results[2], limit, rtol=1e-2, atol=1e-6)
    for result in results[:2]:
        assert (result - limit).norm() < 0.1 * limit.norm()


def test_a_wrapped_head_is_called_as_a_module(case):
    class Wrapped(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.weight, self.calls = inner, inner.weight, 0

        def forward(self, hidden):
            self.calls += 1
            return self.inner(hidden)

    settings, wrapped = LossSettings(beta=0.5), Wrapped(case["head"])
    loss, *_ = linear_distillation(case["hidden"], wrapped, case["targets"], case["teacher"], settings, 4)
    assert wrapped.calls == 3
    torch.testing.assert_close(gradients(loss, case), gradients(plain(case, settings), case), rtol=1e-4, atol=1e-5)


def test_a_frozen_head_no_gradient_and_no_tokens(case):
    settings, arguments = LossSettings(), (case["targets"], case["teacher"])
    expected = gradients(plain(case, settings), case)[0]
    case["head"].requires_grad_(False)
    loss, *_ = linear_distillation(case["hidden"], case["head"], *arguments, settings, 4)
    case["hidden"].grad = None
    loss.backward()
    torch.testing.assert_close(case["hidden"].grad, expected, rtol=1e-4, atol=1e-5)
    case["head"].requires_grad_(True)
    nothing = TeacherLogits(torch.zeros(0, V))
    loss, *_ = linear_distillation(case["hidden"][:0], case["head"], case["targets"][:0], nothing, settings, 4)
    assert loss.item() == 0
    assert not any(gradient.any() for gradient in gradients(loss, case))


def test_without_a_gradient_none_is_made(case, monkeypatch):
    arguments, asked = (case["hidden"], case["head"], case["targets"], case["teacher"], LossSettings(), 4), []
    expected = linear_distillation(*arguments)
    original = losses._losses_and_gradient

    def asking(*args):
        asked.append(args[-1])
        return original(*args)

    monkeypatch.setattr(losses, "_losses_and_gradient", asking)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(linear_distillation(*arguments), tuple(value.detach() for value in expected))
    assert asked and not any(asked)
    # Recomputed, the states have a gradient after a first pass without one.
    loss, *_ = torch.utils.checkpoint.checkpoint(linear_distillation, *arguments, use_reentrant=True)
    plain_loss = plain(case, LossSettings())
    torch.testing.assert_close(gradients(loss, case), gradients(plain_loss, case), rtol=1e-4, atol=1e-5)


def test_it_is_differentiated_once(case):
    loss, *_ = linear_distillation(
        case["hidden"], case["head"], case["targets"], case["teacher"], LossSettings(), chunk_size=4
    )
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()


def test_no_matrix_of_all_logits_is_made(case):
    """Largest tensor that any operation returns, with chunks of two tokens: a chunk of logits or the head."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for value in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(value, torch.Tensor):
                    self.size = max(self.size, value.numel())
            return result

    with Largest() as seen:
        loss, *_ = linear_distillation(
            case["hidden"], case["head"], case["targets"], case["teacher"], LossSettings(beta=0.5), chunk_size=2
        )
        loss.backward()
    assert seen.size <= max(V * (E + 3), 2 * V, N * (E + 3)) < N * V


@pytest.mark.parametrize("k", [None, 5])
def test_in_bf16_it_is_close(case, k):
    settings = LossSettings(beta=0.5)
    expected = plain(case, settings, k)
    gradient = gradients(expected, case)
    teacher = case["teacher"]
    teacher = teacher if k is None else TopK.of(teacher.take(slice(None)), settings.temperature, k)
    with torch.autocast("cpu", torch.bfloat16):
        loss, *_ = linear_distillation(case["hidden"], case["head"], case["targets"], teacher, settings, 4)
    assert loss.item() == pytest.approx(expected.item(), rel=2e-2)
    for one, other in zip(gradients(loss, case), gradient, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).norm() < 0.05 * other.norm()
