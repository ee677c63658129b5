"""Logistic regression for many regularisation strengths at once: an L-BFGS of problems in one batch.

Data flow: features -> centred, rotated to principal axes -> `minimize` on batches of problems -> weights on
the features as they came. `fit_logistic`: one label a row, a problem for each l2, coarse ones first, each
later one starting between its solved neighbours. `fit_binary`: any number of labels a row, a problem for each
class and l2.

Methods: Nocedal and Wright 2006, Numerical optimization, algorithm 7.4; its two loops run on inner products
of the stored vectors (Chen, Wang and Zhou 2014, Large-scale L-BFGS using MapReduce), so that an iteration
reads these twice, not 4 m times.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# points (A, P), their problems (A,) -> values (A,), gradients (A, P)
Objective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

HISTORY = 10  # pairs of step and gradient change that are kept; 20 saved under 2 % of the evaluations
ARMIJO = 1e-4  # a step must lower the value by this share of what the slope predicts
MAX_TRIALS = 12  # step lengths a problem may try in one iteration
# nats; the tolerance is relative to the mean loss, and to this where the loss is smaller
FLOOR = 1e-2
# an eigendecomposition of this size takes half a minute on a CPU; wider features are only scaled
MAX_ROTATED = 4096
STATE_ELEMENTS = 2**29  # numbers of history held at once: 2 GiB in float32
# logits held at once: as many as fit a CPU's cache, enough to occupy a GPU
CPU_ELEMENTS, GPU_ELEMENTS = 2**20, 2**26


@dataclass(frozen=True)
class Minima:
    """Where each of H problems ended.

    Attributes:
        points: (H, P).
        values: (H,) float64.
        num_steps: (H,) int64, iterations taken.
        converged: (H,) bool; False: it ran out of iterations.
    """

    points: Tensor
    values: Tensor
    num_steps: Tensor
    converged: Tensor


def minimize(
    objective: Objective, start: Tensor, *, max_iter: int, tolerance: float, floor: float = 0.0
) -> Minima:
    """Minimises H smooth convex functions of P variables at once.

    Each problem has its own history, step length and end; one that has ended is no longer evaluated.

    Args:
        objective: called as `objective(points, problems)` with those problems (A,) that want a value;
            values are float64.
        start: (H, P), float32 or float64; best scaled so that the Hessians are near the identity.
        max_iter: iterations for each problem.
        tolerance: a problem ends when the last step lowered its value, and by the quadratic model the
            next would, by less than this share of it (of `floor`, if larger); or when rounding hides it.
    """
    num_problems, m, device = len(start), HISTORY, start.device
    minima = Minima(
        start.clone(),
        torch.zeros(num_problems, dtype=torch.float64, device=device),
        torch.zeros(num_problems, dtype=torch.int64, device=device),
        torch.zeros(num_problems, dtype=torch.bool, device=device),
    )
    problems, point = torch.arange(num_problems, device=device), start  # those not ended: (A,), (A, P)
    value, gradient = objective(point, problems)
    # rows of the basis: m steps, m gradient changes, the gradient
    basis = start.new_zeros(num_problems, 2 * m + 1, start.shape[1])
    basis[:, -1] = gradient
    gram = torch.zeros(num_problems, 2 * m + 1, 2 * m + 1, dtype=torch.float64, device=device)
    _refresh(gram, basis, [2 * m])
    for step in range(max_iter):
        coefficients = _two_loops(gram, [i % m for i in range(max(0, step - m), step)])  # (A, 2 m + 1)
        direction = torch.bmm(-coefficients.to(basis.dtype).unsqueeze(1), basis).squeeze(1)  # (A, P)
        slope = -(coefficients * gram[:, -1]).sum(1)  # (A,) along it

        length, new_value, new_gradient = _line_search(
            objective, problems, point, value, gradient, direction, slope
        )
        move, slot = length.to(point.dtype).unsqueeze(1) * direction, step % m
        basis[:, slot], basis[:, m + slot], basis[:, -1] = move, new_gradient - gradient, new_gradient
        _refresh(gram, basis, [slot, m + slot, 2 * m])
        lowered = value - new_value
        point, value, gradient = point + move, new_value, new_gradient
        minima.points[problems], minima.values[problems], minima.num_steps[problems] = point, value, step + 1

        limit = tolerance * value.abs().clamp_min(floor)
        # not in the first step, which has no quadratic model yet
        ended = ((-slope / 2 <= limit) & (lowered <= limit) & (step > 0)) | (length == 0)
        minima.converged[problems[ended]] = True
        if ended.all():
            break
        if ended.any():
            problems, point, value = problems[~ended], point[~ended], value[~ended]
            gradient, basis, gram = gradient[~ended], basis[~ended], gram[~ended]
    return minima


def _line_search(
    objective: Objective,
    problems: Tensor,
    point: Tensor,
    value: Tensor,
    gradient: Tensor,
    direction: Tensor,
    slope: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Step lengths (A,) that lower the values, by backtracking; values and gradients there.

    A length is 0, and its value and gradient are those at hand, where MAX_TRIALS do not lower it.
    """
    rounding = 8 * torch.finfo(point.dtype).eps
    length, new_value, new_gradient = torch.ones_like(value), value.clone(), gradient.clone()
    trying = torch.arange(len(point), device=point.device)
    for _ in range(MAX_TRIALS):
        trial = point[trying] + length[trying].to(point.dtype).unsqueeze(1) * direction[trying]
        tried, tried_gradient = objective(trial, problems[trying])
        previous, promise = value[trying], length[trying] * slope[trying]
        accepted = tried <= previous + ARMIJO * promise + rounding * previous.abs()
        new_value[trying[accepted]] = tried[accepted]
        new_gradient[trying[accepted]] = tried_gradient[accepted]
        # minimum of the parabola through value, slope and trial; NaN: the step was far too long
        shrink = (-promise / (2 * (tried - previous - promise))).nan_to_num(0.1).clamp(0.1, 0.5)
        length[trying[~accepted]] *= shrink[~accepted]
        trying = trying[~accepted]
        if not len(trying):
            break
    length[trying] = 0
    return length, new_value, new_gradient


def _refresh(gram: Tensor, basis: Tensor, rows: list[int]) -> None:
    """Recomputes the inner products (A, 2 m + 1, 2 m + 1) of these rows of the basis with all of them."""
    products = torch.bmm(basis, basis[:, rows].transpose(1, 2)).double()  # (A, 2 m + 1, R)
    gram[:, :, rows] = products
    gram[:, rows] = products.transpose(1, 2)


def _two_loops(gram: Tensor, slots: list[int]) -> Tensor:
    """Inverse Hessian times gradient in coefficients (A, 2 m + 1) of the basis; `slots`, oldest first."""
    m = gram.shape[1] // 2
    length, change = gram.diagonal(0, 1, 2)[:, :m], gram.diagonal(0, 1, 2)[:, m:-1]
    curvature = gram.diagonal(m, 1, 2)[:, :m]
    usable = curvature > 1e-8 * (length * change).sqrt()
    inverse = torch.where(usable, 1 / curvature, 0)  # 0 leaves the pair out
    coefficients = torch.zeros_like(gram[:, 0])
    coefficients[:, -1] = 1
    alpha, scale = torch.zeros_like(inverse), torch.ones_like(inverse[:, 0])
    for slot in reversed(slots):
        alpha[:, slot] = inverse[:, slot] * (coefficients * gram[:, slot]).sum(1)
        coefficients[:, m + slot] -= alpha[:, slot]
    for slot in slots:  # ends as that of the newest usable pair
        scale = torch.where(usable[:, slot], curvature[:, slot] / change[:, slot], scale)
    coefficients *= scale.unsqueeze(1)
    for slot in slots:
        coefficients[:, slot] += alpha[:, slot] - inverse[:, slot] * (coefficients * gram[:, m + slot]).sum(1)
    return coefficients


# ---- logistic regression


@dataclass(frozen=True)
class Classifiers:
    """H linear classifiers: logits (x - center) W^T + b.

    Attributes:
        weight: (H, C, D).
        bias: (H, C).
        center: (D,), the mean of the rows they were fitted to.
        loss: (H,) float64, mean cross-entropy (nats) plus penalty / N.
        num_steps: (H,) int64 L-BFGS iterations.
        converged: (H,) bool.
    """

    weight: Tensor
    bias: Tensor
    center: Tensor
    loss: Tensor
    num_steps: Tensor
    converged: Tensor

    def predict(self, x: Tensor) -> Tensor:
        """Classes (H, N) int64 of rows (N, D), the lowest of equally likely ones."""
        x = x - self.center
        heads = zip(self.weight, self.bias, strict=True)
        return torch.stack([torch.addmm(bias, x, weight.T).argmax(1) for weight, bias in heads])


def fit_logistic(
    x: Tensor,
    y: Tensor,
    num_classes: int,
    l2: Sequence[float],
    *,
    standardize: bool,
    max_iter: int,
    tolerance: float,
    start: tuple[Tensor, Tensor] | None = None,
) -> Classifiers:
    """Minimises sum of cross-entropies + l2 / 2 ||W||^2 for every value of `l2`; the bias is free.

    l2 is 1 / C of scikit-learn's LogisticRegression (with two classes 2 / C: it then has one weight vector,
    half of W's difference). The solutions do not depend on the order of `l2`.

    Args:
        x: (N, D) float32 or float64, which is the precision of the fit; on the device where it runs.
        y: (N,) int64 in 0..num_classes - 1.
        l2: H values > 0, each once.
        standardize: W weighs columns of standard deviation 1, in place of the columns as they are.
        max_iter: L-BFGS iterations for each value.
        tolerance: of the mean objective; see `minimize`, `FLOOR`.
        start: weight (C, D) and bias (C,) of a `Classifiers` near the solutions; default 0.
    """
    center, scale, axes, variance, rows = _coordinates(x, standardize)
    problem = _Logistic(rows, y, num_classes, l2, variance)

    # (H, C, R + 1): weights on the axes, the bias
    points = x.new_zeros(len(l2), num_classes, len(variance) + 1)
    if start is not None:
        weight = torch.where(scale > 0, start[0] / scale, 0)
        points[:, :, :-1], points[:, :, -1] = weight if axes is None else weight @ axes, start[1]
    loss, num_steps, converged = (
        torch.zeros(len(l2), dtype=dtype, device=x.device)
        for dtype in (torch.float64, torch.int64, torch.bool)
    )
    logs = torch.tensor(l2, dtype=torch.float64).log()
    by_strength = logs.argsort().tolist()
    most = max(1, STATE_ELEMENTS // ((2 * HISTORY + 1) * points[0].numel()))
    solved: list[int] = []
    stride = 2 ** max(0, (len(l2) // 4).bit_length() - 1)  # the coarsest grid has at least four values
    while stride:
        level = [h for h in by_strength[::stride] if h not in solved]
        if solved:  # start between solved neighbours: most then need one or two iterations
            points[level] = _interpolate(logs, points, solved, level)
        for batch in (level[begin : begin + most] for begin in range(0, len(level), most)):
            rows = torch.tensor(batch, device=x.device)
            scaling = problem.scaling[rows].unsqueeze(1)  # (A, 1, R + 1)
            begin_at = torch.where(scaling > 0, points[rows] / scaling, 0).flatten(1)
            minima = minimize(
                problem.objective(rows), begin_at, max_iter=max_iter, tolerance=tolerance, floor=FLOOR
            )
            points[rows] = minima.points.view(len(rows), num_classes, -1) * scaling
            loss[rows], num_steps[rows], converged[rows] = minima.values, minima.num_steps, minima.converged
        solved += level
        stride //= 2
    weight = points[:, :, :-1] if axes is None else points[:, :, :-1] @ axes.T
    return Classifiers(weight * scale, points[:, :, -1], center, loss, num_steps, converged)


class _Logistic:
    """Mean cross-entropy + l2 / (2 N) ||W||^2 of H classifiers, each on coordinates of its own scaling.

    At W = 0 the Hessian is variance / C + l2 / N along each axis, but for the classes' mean: its root scales.
    """

    def __init__(self, x: Tensor, y: Tensor, num_classes: int, l2: Sequence[float], variance: Tensor) -> None:
        self.num_classes, self.num_rows = num_classes, len(x)
        strength = torch.tensor(l2, dtype=torch.float64, device=x.device).unsqueeze(1) / len(x)  # (H, 1)
        self.penalty = (strength * torch.ones_like(variance)).to(x.dtype)  # (H, R)
        # (H, R + 1): the bias is free
        self.penalty = torch.cat([self.penalty, self.penalty.new_zeros(len(l2), 1)], dim=1)
        variance = torch.cat([variance, variance.new_ones(1)])
        scaling = (variance / num_classes + self.penalty).rsqrt()
        # an axis without variance has only rounding for a gradient
        self.scaling = torch.where(variance > 1e-12 * variance[:-1].max(), scaling, 0)  # (H, R + 1)
        elements = GPU_ELEMENTS if x.is_cuda else CPU_ELEMENTS
        # after the first level a batch has at most half of the problems
        num_rows = max(64, elements // (num_classes * -(-len(l2) // 2)))
        columns = torch.cat([x, x.new_ones(len(x), 1)], dim=1).T  # (R + 1, N)
        self.chunks = [
            (part.contiguous(), labels)
            for part, labels in zip(columns.split(num_rows, 1), y.split(num_rows), strict=True)
        ]

    def objective(self, rows: Tensor) -> Objective:
        """Of the problems `rows` (A,) only."""
        return lambda points, problems: self._evaluate(points, rows[problems])

    def _evaluate(self, points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(A,) float64 values and (A, C (R + 1)) gradients at `points` of the problems `rows` (A,)."""
        num, scaling, penalty = len(rows), self.scaling[rows].unsqueeze(1), self.penalty[rows].unsqueeze(1)
        weight = points.view(num, self.num_classes, -1) * scaling  # (A, C, R + 1)
        flat = weight.flatten(0, 1)  # (A C, R + 1): one matrix product for all problems
        gradient = torch.zeros_like(flat)
        loss = torch.zeros(num, dtype=torch.float64, device=points.device)
        for x, y in self.chunks:  # (R + 1, n), (n,)
            label = y.expand(num, 1, -1)  # (A, 1, n)
            # (A, C, n): the classes are summed over full vectors of rows
            logits = (flat @ x).view(num, self.num_classes, -1)
            logits -= logits.amax(1, keepdim=True)
            of_label = logits.gather(1, label)
            odds = logits.exp_()
            total = odds.sum(1, keepdim=True)
            loss += (total.log() - of_label).sum((1, 2), dtype=torch.float64)
            residual = odds.div_(total)
            residual.scatter_add_(1, label, residual.new_tensor(-1).expand(label.shape))
            gradient.addmm_(residual.flatten(0, 1), x.T)
        pull = penalty * weight
        value = loss / self.num_rows + (pull * weight).sum((1, 2), dtype=torch.float64) / 2
        return value, ((gradient.view_as(weight) / self.num_rows + pull) * scaling).flatten(1)


def _interpolate(logs: Tensor, points: Tensor, solved: list[int], wanted: list[int]) -> Tensor:
    """Points at l2 values `wanted`: the polynomial in log l2 through the (up to) four nearest `solved`."""
    answers = []
    for target in wanted:
        near = sorted(solved, key=lambda other: abs(float(logs[other] - logs[target])))[:4]
        weights = [
            math.prod(float((logs[target] - logs[b]) / (logs[a] - logs[b])) for b in near if b != a)
            for a in near
        ]
        answers.append(sum(weight * points[a] for weight, a in zip(weights, near, strict=True)))
    return torch.stack(answers)  # type: ignore[arg-type]  # sum() of tensors is typed Tensor | int


# ---- several labels a row


@dataclass(frozen=True)
class BinaryClassifiers:
    """P linear classifiers of one class against the rest: logits (x - center) W^T + b.

    Attributes:
        weight: (P, D).
        bias: (P,).
        center: (D,), the mean of the rows they were fitted to.
        loss: (P,) float64, mean over the rows that count (nats) plus penalty / their number.
        num_steps: (P,) int64 L-BFGS iterations.
        converged: (P,) bool.
    """

    weight: Tensor
    bias: Tensor
    center: Tensor
    loss: Tensor
    num_steps: Tensor
    converged: Tensor

    def scores(self, x: Tensor) -> Tensor:
        """(N, P) logits of rows (N, D)."""
        return torch.addmm(self.bias, x - self.center, self.weight.T)


def fit_binary(
    x: Tensor, y: Tensor, classes: Tensor, l2: Tensor, *, standardize: bool, max_iter: int, tolerance: float
) -> BinaryClassifiers:
    """Minimises sum of log(1 + exp(-s z)) + l2 / 2 ||w||^2 for P pairs of class and l2; s is 1 for a row that
    has the class, else -1.

    l2 is 1 / C of scikit-learn's LogisticRegression on the rows that count. The bias is free. No pair depends
    on another.

    Args:
        x: (N, D) float32 or float64, which is the precision of the fit; on the device where it runs.
        y: (N, C) 1 present, 0 absent, -1 not counted for that class; every class of `classes` has a 1 and
            a 0.
        classes: (P,) int64, columns of y.
        l2: (P,) > 0.
        standardize: w weighs columns of standard deviation 1 over all N rows, in place of the columns as
            they are.
        max_iter, tolerance: as for `fit_logistic`.
    """
    center, scale, axes, variance, rows = _coordinates(x, standardize)
    most = max(1, STATE_ELEMENTS // ((2 * HISTORY + 1) * (len(variance) + 1)))
    points, loss, num_steps, converged = [], [], [], []
    for part in torch.arange(len(classes), device=x.device).split(most):
        problem = _Binary(rows, y, classes[part], l2[part], variance)
        minima = minimize(
            problem.evaluate, problem.start(), max_iter=max_iter, tolerance=tolerance, floor=FLOOR
        )
        points.append(minima.points * problem.scaling)
        loss.append(minima.values)
        num_steps.append(minima.num_steps)
        converged.append(minima.converged)
    weight, bias = (found := torch.cat(points))[:, :-1], found[:, -1]
    weight = (weight if axes is None else weight @ axes.T) * scale
    return BinaryClassifiers(
        weight, bias, center, torch.cat(loss), torch.cat(num_steps), torch.cat(converged)
    )


class _Binary:
    """Mean of log(1 + exp(-s z)) over the N rows that count + l2 / (2 N) ||w||^2, of P pairs (class, l2).

    With only a bias, the Hessian at its optimum is p (1 - p) variance + l2 / N along each axis, p the share
    of rows that have the class: its square root scales.
    """

    def __init__(self, x: Tensor, y: Tensor, classes: Tensor, l2: Tensor, variance: Tensor) -> None:
        # (K,) columns of y, (P,) index into them
        self.columns, self.of_problem = classes.unique(return_inverse=True)
        # (K, N), 0: does not count
        signs = torch.where(y[:, self.columns] < 0, 0, 2 * y[:, self.columns] - 1).to(x.dtype).T
        self.num_rows = signs.abs().sum(1).double()[self.of_problem]  # (P,)
        share = ((signs > 0).sum(1)[self.of_problem] / self.num_rows).unsqueeze(1)  # (P, 1) float64
        self.prior = (share / (1 - share)).log().squeeze(1)
        # (P, R)
        self.penalty = ((l2.double() / self.num_rows).unsqueeze(1) * torch.ones_like(variance)).to(x.dtype)
        # (P, R + 1): the bias is free
        self.penalty = torch.cat([self.penalty, self.penalty.new_zeros(len(l2), 1)], dim=1)
        variance = torch.cat([variance, variance.new_ones(1)])
        scaling = ((share * (1 - share)).to(x.dtype) * variance + self.penalty).rsqrt()
        # an axis without variance has only rounding for a gradient
        self.scaling = torch.where(variance > 1e-12 * variance[:-1].max(), scaling, 0)  # (P, R + 1)
        num_rows = max(64, (GPU_ELEMENTS if x.is_cuda else CPU_ELEMENTS) // len(l2))
        columns = torch.cat([x, x.new_ones(len(x), 1)], dim=1).T  # (R + 1, N)
        self.chunks = [
            (part.contiguous(), sign)
            for part, sign in zip(columns.split(num_rows, 1), signs.split(num_rows, 1), strict=True)
        ]

    def start(self) -> Tensor:
        """(P, R + 1): weights 0, the bias that fits the share of rows with the class."""
        points = torch.zeros_like(self.scaling)
        points[:, -1] = self.prior.to(points.dtype) / self.scaling[:, -1]
        return points

    def evaluate(self, points: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
        """(A,) float64 values and (A, R + 1) gradients at `points` (A, R + 1) of `problems` (A,)."""
        scaling, penalty, num_rows = self.scaling[problems], self.penalty[problems], self.num_rows[problems]
        weight = points * scaling
        gradient = torch.zeros_like(weight)
        loss = torch.zeros(len(problems), dtype=torch.float64, device=points.device)
        for x, signs in self.chunks:  # (R + 1, n), (K, n)
            sign = signs[self.of_problem[problems]]  # (A, n)
            margin = (weight @ x).mul_(sign)
            loss += (torch.nn.functional.softplus(-margin) * sign.abs()).sum(1, dtype=torch.float64)
            gradient.addmm_(margin.neg_().sigmoid_().mul_(sign), x.T, alpha=-1)
        pull = penalty * weight
        value = loss / num_rows + (pull * weight).sum(1, dtype=torch.float64) / 2
        return value, (gradient / num_rows.to(gradient.dtype).unsqueeze(1) + pull) * scaling


# ---- small parts


def _coordinates(x: Tensor, standardize: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Rows (N, D) for a fit: center, scale (D,), axes (D, R) or None, variances (R,), rows on them (N, R)."""
    std, center = torch.std_mean(x, dim=0, correction=0)
    # A "constant" column's std is rounding noise of its mean; dividing by it would blow up other rows.
    varies = std > 1e-6 * center.abs()
    scale = torch.where(varies, 1 / std if standardize else 1, 0).to(x.dtype)
    scaled = (x - center) * scale
    axes, variance = _principal_axes(scaled)
    return center, scale, axes, variance, scaled if axes is None else scaled @ axes


def _principal_axes(x: Tensor) -> tuple[Tensor | None, Tensor]:
    """Uncorrelated orthonormal axes (D, R) of centred rows (N, D), R <= N; their variances (R,).

    On these axes a diagonal scaling makes the Hessians nearly the identity; ||W|| stays. None: too wide.
    """
    num, dim = x.shape
    if min(num, dim) > MAX_ROTATED:
        return None, x.square().mean(0)
    # fewer rows than columns: the solution lies in the span of the rows
    span = torch.linalg.qr(x.double().T).Q if num < dim else None
    inner = x if span is None else x.double() @ span
    variance, vectors = torch.linalg.eigh((inner.T @ inner).double() / num)
    return (vectors if span is None else span @ vectors).to(x.dtype), variance.clamp_min(0).to(x.dtype)
