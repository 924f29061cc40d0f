"""Refit: the accumulated change, corrected in closed form on the keys of all batches so far.

Right after batch t its keys K_t (d_in, n) were given the response V_t = (M_t - W_0) K_t. Later batches move
that response. With K = [K_1 .. K_t], V = [V_1 .. V_t], D_t = M_t - W_0 and C the uncentered second moment of
the keys to preserve, the smallest correction on preserved keys that gives every batch its response back is

    D = D_t + argmin_E ||E K - (V - D_t K)||^2 + lambda tr(E C E^T)
      = D_t + (V - D_t K) (K^T Y + lambda I)^-1 Y^T,    Y = C^-1 K

Nothing is corrected while little is forgotten: until ||V - D_t K|| / ||V||, over all weights together, has
reached a share. After one batch D is the editor's own change. Where each batch was written as
R_t (K_t^T Y_t + lambda I)^-1 Y_t^T (MEMIT with this lambda), D is what one solve for all batches together
gives, of the responses aimed at:

    D = U (K^T Y + lambda I)^-1 Y^T,    U = [U_1 .. U_t],  U_s = D_(s-1) K_s + R_s

Anchored at the base, the change itself is fitted, D = V (K^T Y + lambda I)^-1 Y^T: the smallest that gives
the responses; lambda then shrinks a second time what the editor's ridge has shrunk.

No training, no statistics beyond C, no data beyond keys that the editor has computed. M~_t = W_0 + s D.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from merging.api import Batch, Keys, Weights, checked_scale, checked_share, finite, full_precision

Anchor = Literal["base", "edited"]


@dataclass(frozen=True, kw_only=True)
class RefitConfig:
    """What the fitted change is held near to, and how strongly."""

    ridge: float = 2000.0  # lambda, of the preserved keys: MEMIT's own, which is 15000 on larger models
    anchor: Anchor = "edited"  # edited: the least correction of the edited weights; base: the smallest change
    scale: float = 1.0  # s, on the whole change
    forgotten: float = 0.4  # share from which edited weights are corrected; 0: always
    repeat: float = 1e-4  # relative distance of keys up to which an edit is taken for one made again

    def __post_init__(self) -> None:
        checked_scale("ridge", self.ridge)
        if self.anchor not in get_args(Anchor):
            raise ValueError(f"unknown anchor {self.anchor!r}; known: {sorted(get_args(Anchor))}")
        checked_scale("scale", self.scale)
        if not 0 <= self.forgotten < float("inf"):
            raise ValueError(f"forgotten is {self.forgotten}; it must be a share, 0 or more")
        checked_share("repeat", self.repeat, zero=False, one=False)


class Refit:
    """Gives forgotten batches their response back, by a ridge regression on what is stored of them."""

    needs_keys: ClassVar[bool] = True

    def __init__(self, config: RefitConfig) -> None:
        self.config = config

    def start(self, base: Weights) -> "RefitStream":
        return RefitStream(self.config, base)


@dataclass(frozen=True)
class _Past:
    """Edits so far at one weight, an edit a row: k, C^-1 k and the response it was given."""

    inputs: Tensor  # (edits, d_in)
    solved: Tensor  # (edits, d_in)
    responses: Tensor  # (edits, d_out)
    transposed: bool  # how the weight is stored

    @staticmethod
    def of(name: str, keys: Keys, change: Tensor) -> "_Past":
        """A batch's edits, on the device of the change (M_t - W_0, float64) that they are given."""
        inputs, solved = (
            finite(name, tensor, "key").to(change.device) for tensor in (keys.inputs, keys.solved)
        )
        return _Past(inputs, solved, responses(inputs, change, keys.transposed), keys.transposed)

    def then(self, later: "_Past", stay: Tensor) -> "_Past":
        """The edits of the mask ``stay``, and later ones behind them."""
        return _Past(
            torch.cat([self.inputs[stay], later.inputs]),
            torch.cat([self.solved[stay], later.solved]),
            torch.cat([self.responses[stay], later.responses]),
            later.transposed,
        )


class RefitStream:
    """Keys and responses of all batches so far, from which the change is fitted after each.

    An edit that a later batch makes again is dropped from the earlier one, so that the later wins: its
    key comes back at some weight. That is the lowest edited layer, where edits do not move keys.
    A parameter without keys, such as a bias, follows the edited weights.
    """

    def __init__(self, config: RefitConfig, base: Weights) -> None:
        self.config, self.base = config, dict(base)
        self._past: dict[str, _Past] = {}

    def step(self, batch: Batch) -> dict[str, Tensor]:
        if batch.delta and not batch.keys:
            raise ValueError("refit was given a batch without its keys; it needs those of every batch")
        names = dict.fromkeys((*self._past, *batch.keys))
        changes = {name: self._change(name, batch.edited[name]) for name in names}
        self._remember({name: _Past.of(name, keys, changes[name]) for name, keys in batch.keys.items()})
        lost = {
            name: past.responses - responses(past.inputs, changes[name], past.transposed)
            for name, past in self._past.items()
        }
        kept = self.config.anchor == "edited" and self._share(lost) < self.config.forgotten
        merged = dict(batch.merged)
        for name in batch.task:
            if name not in lost or (kept and self.config.scale == 1):
                merged[name] = finite(name, batch.edited[name])
                continue
            change = changes[name] if kept else self._fitted(self._past[name], lost[name], changes[name])
            merged[name] = self._released(name, change)
        return merged

    def _fitted(self, past: _Past, lost: Tensor, change: Tensor) -> Tensor:
        """D of one weight, as it is stored; lost: V - D_t K, change: D_t."""
        if self.config.anchor == "base":
            fitted = ridge_fit(past.inputs, past.solved, past.responses, self.config.ridge)
            return fitted.T if past.transposed else fitted
        fitted = ridge_fit(past.inputs, past.solved, lost, self.config.ridge)
        return change + (fitted.T if past.transposed else fitted)

    def _share(self, lost: dict[str, Tensor]) -> float:
        """||V - D_t K|| / ||V|| over all weights."""
        given = sum(float(past.responses.square().sum()) for past in self._past.values())
        moved = sum(float(part.square().sum()) for part in lost.values())
        return (moved / given) ** 0.5 if given else 0.0

    def _change(self, name: str, edited: Tensor) -> Tensor:
        """D_t = M_t - W_0 in float64, as it is stored."""
        return finite(name, edited).double() - self.base[name].to(edited.device).double()

    def _remember(self, later: dict[str, _Past]) -> None:
        """Take up a batch's edits, and drop those they repeat."""
        again = [
            repeated(self._past[name].inputs, past.inputs, self.config.repeat)
            for name, past in later.items()
            if name in self._past
        ]
        stay = ~torch.stack(again).any(dim=0) if again else None
        for name, past in later.items():
            before = self._past.get(name)
            self._past[name] = past if before is None or stay is None else before.then(past, stay)

    def _released(self, name: str, change: Tensor) -> Tensor:
        """M~_t of one weight, in its precision."""
        base = full_precision(self.base[name])
        return (base.double() + self.config.scale * change.to(base.device)).to(base.dtype)


def ridge_fit(inputs: Tensor, solved: Tensor, responses: Tensor, ridge: float) -> Tensor:
    """argmin_D ||D K - V||^2 + lambda tr(D C D^T) = V (K^T Y + lambda I)^-1 Y^T, solved in float64.

    inputs: K^T (n, d_in); solved: Y^T (n, d_in), Y = C^-1 K; responses: V^T (n, d_out).
    returns: D (d_out, d_in), float64. Raises ValueError if the system is singular to rounding.
    """
    inputs, solved = inputs.double(), solved.double()
    gram = inputs @ solved.T
    gram = (gram + gram.T) / 2
    gram.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if failed:
        raise ValueError(
            f"ridge is {ridge}; the keys of {len(inputs)} edits are too alike to be told apart, raise it"
        )
    return torch.cholesky_solve(responses.double(), factor).T @ solved


def repeated(earlier: Tensor, later: Tensor, tolerance: float) -> Tensor:
    """(n,) bool: which earlier keys (n, d_in) some later key (m, d_in) equals up to a relative distance."""
    earlier, later = earlier.double(), later.double()
    squares = earlier.square().sum(dim=1)
    apart = squares[:, None] + later.square().sum(dim=1) - 2 * earlier @ later.T
    return (apart <= (tolerance**2) * squares[:, None]).any(dim=1)


def responses(inputs: Tensor, change: Tensor, transposed: bool) -> Tensor:
    """What a change (d_out, d_in), or transposed, gives to keys (n, d_in): (n, d_out), float64."""
    return inputs.double() @ (change if transposed else change.T)
