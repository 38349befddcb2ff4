"""Fit the table of `deconv/ops/resolvent.py`: n Newton-Schulz steps as a sum of few poles.

    python scripts/dev/fit_resolvent.py

For each n, the poles s_j and the weights minimize the largest relative error of

    z_n(x) ~ c + m x + sum_j a_j / (x + s_j)        on [0, 1].

For given poles, Lawson's algorithm solves the linear problem of the weights in the maximum norm, by
least squares whose weights grow with the error. Nelder-Mead finds the poles. Each n starts from the
poles of n - 1, divided by 2.25 like the soft floor of the response.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import minimize

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from deconv.ops.inverse_sqrt import MAX_STEPS, newton_schulz_response

STEPS_PER_POLE = 4
NEW_POLE = 0.2  # start of an additional pole
DIGITS = 5


def main() -> None:
    logs = np.array([])
    for n_iter in range(1, MAX_STEPS + 1):
        logs = logs - np.log(2.25)
        while len(logs) < -(-(n_iter - 1) // STEPS_PER_POLE):
            logs = np.append(logs, np.log(NEW_POLE))
        logs = find_poles(n_iter, logs)
        error, weights = fit(n_iter, logs, rounds=300)
        *amplitudes, constant, slope = (float(f"{value:.{DIGITS}g}") for value in weights)
        shifts = [float(f"{value:.{DIGITS}g}") for value in np.exp(logs)]
        poles = tuple(zip(shifts, amplitudes, strict=True))
        print(f"{n_iter}: Terms({constant}, {slope}, {poles}),  # {100 * error:.2f} %", flush=True)


def find_poles(n_iter: int, logs: np.ndarray) -> np.ndarray:
    """Return the logarithms of the best poles in ascending order, from a guess."""
    if not len(logs):
        return logs

    def measure_error(poles: np.ndarray) -> float:
        # The weights of close poles grow and cancel.
        apart = np.diff(np.sort(poles)).min(initial=np.inf) > 0.5
        return fit(n_iter, poles)[0] if apart else 1.0

    options = {"maxfev": 200 * len(logs), "xatol": 1e-4, "fatol": 1e-6}
    return np.sort(minimize(measure_error, logs, method="Nelder-Mead", options=options).x)


def fit(n_iter: int, logs: np.ndarray, rounds: int = 15) -> tuple[float, np.ndarray]:
    """Return the largest relative error, and the weights of poles, constant and slope."""
    x = make_grid(n_iter)
    exact = newton_schulz_response(torch.from_numpy(x), n_iter).numpy()
    terms = [1 / (x + shift) for shift in np.exp(logs)] + [np.ones_like(x), x]
    terms = np.stack(terms, axis=1) / exact[:, None]
    importance, best = np.ones_like(x), (np.inf, np.zeros(terms.shape[1]))
    for _ in range(rounds):
        root = np.sqrt(importance)
        weights = np.linalg.lstsq(terms * root[:, None], root, rcond=None)[0]
        error = np.abs(terms @ weights - 1)
        best = min(best, (error.max(), weights), key=lambda pair: pair[0])
        importance = importance * (error + 1e-9)
        importance /= importance.sum()
    return best


def make_grid(n_iter: int) -> np.ndarray:
    """Return points of [0, 1], dense around the soft floor, where z_n bends."""
    floor = 1.5 ** (-2 * n_iter)
    return np.concatenate([[0], np.geomspace(floor / 1000, 1, 1500), np.linspace(0, 1, 500)[1:]])


if __name__ == "__main__":
    main()
