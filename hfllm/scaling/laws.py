"""Scaling laws: how loss falls with parameters N, tokens D and compute C, and how to divide C between N and D.

All laws take C = 6 N D in FLOPs (Kaplan et al. 2020, arXiv:2001.08361, section 2.1), D in tokens and N in parameters:
all of them in Hoffmann et al. (Chinchilla), without embeddings in Kaplan et al. Losses are nats per token. They were
fitted on other data and tokenizers than yours: the exponents transfer better than the losses.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hfllm.errors import InputError, refuse_if

FLOPS_A_PARAMETER = 6
TOKENS_A_PARAMETER = 20
PETAFLOP_DAY = 1e15 * 86400


def _positive(name: str, value: float) -> float:
    refuse_if(not (math.isfinite(value) and value > 0), f"{name}={value!r}: expected a finite number above 0")
    return value


@dataclass(frozen=True)
class Allocation:
    """How a compute budget is spent.

    Args:
        parameters: N.
        tokens: D.
    """

    parameters: float
    tokens: float

    @property
    def compute(self) -> float:
        """Return 6 N D, in FLOPs."""
        return FLOPS_A_PARAMETER * self.parameters * self.tokens

    @property
    def tokens_per_parameter(self) -> float:
        return self.tokens / self.parameters


@dataclass(frozen=True)
class ParametricLaw:
    """L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, arXiv:2203.15556, equation 2).

    Args:
        E: loss of an infinite model on infinite data, the entropy of the text.
        A, alpha: loss added by a finite model.
        B, beta: loss added by finite data.

    Raises:
        InputError: for a coefficient of 0 or less.
    """

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "E":
                _positive(name, value)

    def loss(self, parameters: float, tokens: float) -> float:
        """Return the nats per token of a model of `parameters` trained once on `tokens` (numbers or arrays)."""
        return self.E + self.A * parameters**-self.alpha + self.B * tokens**-self.beta

    @property
    def exponents(self) -> tuple[float, float]:
        """Return a and b of N = G (C / 6)^a and D = (C / 6)^b / G, with the lowest loss for a budget (equation 4)."""
        total = self.alpha + self.beta
        return self.beta / total, self.alpha / total

    @property
    def balance(self) -> float:
        """Return G of equation 4."""
        return (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))

    def optimal(self, compute: float) -> Allocation:
        """Return the model size and tokens with the lowest loss for `compute` FLOPs (equation 4)."""
        work, (a, b) = _positive("compute", compute) / FLOPS_A_PARAMETER, self.exponents
        return Allocation(self.balance * work**a, work**b / self.balance)

    def optimal_parameters(self, tokens: float) -> float:
        """Return the model size with `tokens` as its compute-optimal amount of data."""
        a, b = self.exponents
        return self.balance * (_positive("tokens", tokens) * self.balance) ** (a / b)


@dataclass(frozen=True)
class PowerLaw:
    """The compute-optimal model size as a power of compute: N = coefficient * C^exponent, D = C / (6 N).

    Args:
        coefficient: N at one FLOP.
        exponent: a; that of D is 1 - a.
    """

    coefficient: float
    exponent: float

    def optimal(self, compute: float) -> Allocation:
        """Return the model size and tokens for `compute` FLOPs."""
        parameters = self.coefficient * _positive("compute", compute) ** self.exponent
        return Allocation(parameters, compute / (FLOPS_A_PARAMETER * parameters))

    @classmethod
    def through(cls, budgets: Sequence[float], sizes: Sequence[float]) -> "PowerLaw":
        """Fit a line through (C, N) by least squares in logarithms, for at least two different budgets.

        Raises:
            InputError: for fewer budgets, or numbers of 0 or less.
        """
        x = [math.log(_positive("compute", budget)) for budget in budgets]
        y = [math.log(_positive("parameters", size)) for size in sizes]
        refuse_if(len(set(x)) < 2, f"a power law needs at least 2 different compute budgets, got {len(set(x))}")
        middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
        spread = sum((value - middle_x) ** 2 for value in x)
        slope = sum((value - middle_x) * (other - middle_y) for value, other in zip(x, y, strict=True)) / spread
        return cls(math.exp(middle_y - slope * middle_x), slope)


# Hoffmann et al. 2022, section 3.3, coefficients as printed: they are rounded, and rounding alone moves the optimum.
CHINCHILLA = ParametricLaw(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
# Besiroglu et al. 2024, arXiv:2404.10102, section 3: the same runs, fitted to convergence.
EPOCH = ParametricLaw(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)
# Muennighoff et al. 2023, arXiv:2305.16264, appendix A: C4, alpha and beta tied.
C4 = ParametricLaw(E=math.exp(0.6254804), A=math.exp(6.255414), B=math.exp(7.3049974), alpha=0.3526596, beta=0.3526596)

# Hoffmann et al. 2022, table 3 (approach 1) and table A3 (approaches 2 and 3): parameters, FLOPs. The 175B row of
# approach 3 is printed as 1.26e24, which is less than its 67B row and a tenth of 6 N D with its own 12.0T tokens.
CHINCHILLA_TABLES = {
    1: (
        *((400e6, 1.92e19), (1e9, 1.21e20), (10e9, 1.23e22), (67e9, 5.76e23), (175e9, 3.85e24)),
        *((280e9, 9.90e24), (520e9, 3.43e25), (1e12, 1.27e26), (10e12, 1.30e28)),
    ),
    2: (
        *((400e6, 1.84e19), (1e9, 1.20e20), (10e9, 1.32e22), (67e9, 6.88e23), (175e9, 4.54e24)),
        *((280e9, 1.18e25), (520e9, 4.19e25), (1e12, 1.59e26), (10e12, 1.75e28)),
    ),
    3: (
        *((400e6, 2.21e19), (1e9, 1.62e20), (10e9, 2.46e22), (67e9, 1.71e24), (175e9, 1.26e25)),
        *((280e9, 3.52e25), (520e9, 1.36e26), (1e12, 5.65e26), (10e12, 8.55e28)),
    ),
}
# Table 2: exponent of the optimal N, with the 10th and 90th percentile of its bootstrap.
CHINCHILLA_EXPONENTS = {1: (0.50, 0.488, 0.502), 2: (0.49, 0.462, 0.534), 3: (0.46, 0.454, 0.455)}


def optimal_by_ratio(compute: float, tokens_per_parameter: float = TOKENS_A_PARAMETER) -> Allocation:
    """Split `compute` FLOPs at a fixed ratio of tokens to parameters: C = 6 N D with D = 20 N gives N = sqrt(C / 120).

    This is the rule of thumb from Chinchilla's approaches 1 and 2. (Without the ratio, N = D = sqrt(C / 6), a model
    is sqrt(20) = 4.47 times too large.)
    """
    ratio = _positive("tokens_per_parameter", tokens_per_parameter)
    parameters = math.sqrt(_positive("compute", compute) / (FLOPS_A_PARAMETER * ratio))
    return Allocation(parameters, ratio * parameters)


def chinchilla_projection(approach: int) -> PowerLaw:
    """Return the line of extrapolation of one of Chinchilla's three approaches.

    The paper prints exponents to two digits and no coefficients; its projections (`CHINCHILLA_TABLES`) lie on the
    lines themselves, and determine both.

    Args:
        approach: 1, the least loss at each compute over training curves; 2, IsoFLOP parabolas; 3, the parametric fit.

    Raises:
        InputError: for another approach.
    """
    if approach not in CHINCHILLA_TABLES:
        raise InputError(f"approach {approach!r} is not one of 1, 2, 3 (Hoffmann et al. 2022, section 3)")
    sizes, budgets = zip(*CHINCHILLA_TABLES[approach], strict=True)
    return PowerLaw.through(budgets, sizes)


@dataclass(frozen=True)
class KaplanLaw:
    """L(N, D) = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D (Kaplan et al. 2020, arXiv:2001.08361, eq. 1.5).

    N counts no embeddings. The exponent 0.73 of the optimal size comes from small models with one schedule for all
    lengths (Hoffmann et al. 2022, section 2); it is kept for comparison.

    Args:
        N_c, D_c, alpha_N, alpha_D: of table 2.
        optimal_at_petaflop_day, exponent: N = 1.3e9 (C / PF-day)^0.73 (table 6).
    """

    N_c: float = 6.4e13
    D_c: float = 1.8e13
    alpha_N: float = 0.076
    alpha_D: float = 0.103
    optimal_at_petaflop_day: float = 1.3e9
    exponent: float = 0.73

    def loss(self, parameters: float, tokens: float) -> float:
        """Return nats per token of a model of `parameters` (no embeddings) trained on `tokens`, stopped early."""
        return ((self.N_c / parameters) ** (self.alpha_N / self.alpha_D) + self.D_c / tokens) ** self.alpha_D

    def optimal(self, compute: float) -> Allocation:
        """Return the model size for `compute` FLOPs, and the remaining tokens by C = 6 N D."""
        petaflop_days = _positive("compute", compute) / PETAFLOP_DAY
        parameters = self.optimal_at_petaflop_day * petaflop_days**self.exponent
        return Allocation(parameters, compute / (FLOPS_A_PARAMETER * parameters))


KAPLAN = KaplanLaw()


def formula(law: ParametricLaw | KaplanLaw) -> str:
    """Return the law as a formula."""
    if isinstance(law, KaplanLaw):
        power = law.alpha_N / law.alpha_D
        return f"(({law.N_c:.4g} / N)^{power:.4g} + {law.D_c:.4g} / D)^{law.alpha_D:.4g}"
    return f"{law.E:.4g} + {law.A:.4g} / N^{law.alpha:.4g} + {law.B:.4g} / D^{law.beta:.4g}"


@dataclass(frozen=True)
class DataConstrainedLaw:
    """Muennighoff et al. 2023, arXiv:2305.16264, equation 6: repeated tokens and excess parameters are worth less.

    L = E + A / N'^alpha + B / D'^beta, where D' = U + U R (1 - exp(-(D / U - 1) / R)) of U unique tokens, and N'
    likewise of the parameters that U would be compute-optimal for.

    Args:
        law: the law of data seen once.
        tokens_decay: R of tokens: after 15 repetitions most of their value is used up.
        parameters_decay: R of parameters.
    """

    law: ParametricLaw = C4
    tokens_decay: float = 15.387756
    parameters_decay: float = 5.309743

    def effective_tokens(self, tokens: float, unique_tokens: float) -> float:
        """Return D': the equivalent number of unique tokens, when only `unique_tokens` of `tokens` are different."""
        return _effective(_positive("tokens", tokens), _positive("unique_tokens", unique_tokens), self.tokens_decay)

    def effective_parameters(self, parameters: float, unique_tokens: float) -> float:
        """Return N': the equivalent number of parameters with so few tokens."""
        enough = self.law.optimal_parameters(unique_tokens)
        return _effective(_positive("parameters", parameters), enough, self.parameters_decay)

    def loss(self, parameters: float, tokens: float, unique_tokens: float) -> float:
        """Return nats per token of a model of `parameters` trained on `tokens`, `unique_tokens` of them different."""
        unique = min(tokens, unique_tokens)
        return self.law.loss(self.effective_parameters(parameters, unique), self.effective_tokens(tokens, unique))

    def optimal(self, compute: float, unique_tokens: float) -> Allocation:
        """Return the model size and tokens with the lowest loss for `compute` FLOPs and only `unique_tokens`."""
        work = _positive("compute", compute) / FLOPS_A_PARAMETER
        start = math.log(self.law.optimal(compute).parameters)

        def loss_at(log_parameters: float) -> float:
            parameters = math.exp(log_parameters)
            return self.loss(parameters, work / parameters, unique_tokens)

        parameters = math.exp(_minimum(loss_at, start - 5, start + 5))
        return Allocation(parameters, work / parameters)


MUENNIGHOFF = DataConstrainedLaw()


def best_of_n_kl(n: int) -> float:
    """Return the KL divergence, in nats, of the best of n samples from their policy: log n - (n - 1) / n.

    (Stiennon et al. 2020, arXiv:2009.01325, appendix G.3; an upper bound, exact when no two samples tie.)

    Raises:
        InputError: for n below 1.
    """
    refuse_if(n < 1, f"n={n}: the best of n samples needs at least 1")
    return math.log(n) - (n - 1) / n


def _effective(amount: float, unique: float, decay: float) -> float:
    """Return the effective amount, when the part beyond `unique` loses its value exponentially."""
    if amount <= unique:
        return amount
    return unique + unique * decay * -math.expm1((1 - amount / unique) / decay)


def _minimum(function: Callable[[float], float], low: float, high: float, steps: int = 100) -> float:
    """Return the minimum point of a unimodal function, by golden-section search."""
    ratio = (math.sqrt(5) - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = function(left), function(right)
    for _ in range(steps):
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = function(right)
    return (low + high) / 2
