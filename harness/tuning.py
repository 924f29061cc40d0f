"""The search of ``harness.tune``: what is tried for an editor, in which order, and which setting is taken.

Along coordinates: the starting row, then every layer set with every learning rate at the middle strength,
then every strength at the best of those. The strength is the weight that holds preserved knowledge in place:
covariance_weight (lambda) or ridge.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from editors import EDITORS
from editors.alphaedit import AlphaEditStream
from editors.closed_form import ClosedFormEditor
from editors.sites import sites_for
from editors.targets import TargetConfig
from harness.data import EditCase
from harness.kept_targets import KeptTargets
from harness.metrics import edit_scores, harmonic_mean, resampling_counts, tabulate_cell
from harness.models import LoadedModel, ready_to_edit, weights_in_place
from harness.progress import Stage
from harness.run import answer_fields, batch_queries, statistics_of
from harness.scoring import score
from harness.spec import RunSpec
from reports.record import Score

# Windows as wide as Llama-3-8B's 5 of 32 blocks, at most 5; lowest block as a share of the depth.
WIDTH, OF = 5, 32
START_DEPTH = 4 / 32  # Llama-3-8B: 4-8 of 32; GPT-J begins at 3 of 28, Qwen2.5-7B at 4 of 28
DEPTHS = (START_DEPTH, 1 / 16, 13 / 48, 3 / 8)  # GPT2-XL: 13-17 of 48; one below and one above them
LEARNING_RATES = (0.5, 0.1)
STRENGTHS = {  # field -> what is tried; of an editor that has both, the first
    "covariance_weight": (15000.0, 5000.0, 2000.0, 500.0, 100.0),
    "ridge": (100.0, 10.0, 1.0, 0.1),
}
RULE = (
    "Of the settings whose Score is within one bootstrap standard error of the best, the one with the "
    "largest strength, then the highest locality, then nearest to the starting row."
)
logger = logging.getLogger(__name__)
Row = dict[str, Any]
Tell = Callable[[str, float], None]  # what, share of it done


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One point of the search."""

    editor: str
    layers: tuple[int, ...]
    learning_rate: float
    strength: float  # covariance_weight or ridge

    def config(self, fixed: Mapping[str, Any]) -> TargetConfig:
        """The editor's config, other fields as given; ValueError naming the editor if one is wrong."""
        swept = {
            "layers": self.layers,
            "learning_rate": self.learning_rate,
            strength_field(self.editor): self.strength,
        }
        try:
            config: TargetConfig = EDITORS[self.editor][0](**(dict(fixed) | swept))
        except ValueError as error:
            raise ValueError(f"{self.editor}: {error}") from None
        return config


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is tried for one editor."""

    editor: str
    layers: tuple[tuple[int, ...], ...]
    learning_rates: tuple[float, ...]
    strengths: tuple[float, ...]  # largest first
    start: Setting

    @property
    def middle(self) -> tuple[Setting, ...]:
        """Every layer set with every learning rate at the middle strength (of two, the larger)."""
        strength = self.strengths[(len(self.strengths) - 1) // 2]
        return tuple(
            Setting(editor=self.editor, layers=layers, learning_rate=rate, strength=strength)
            for layers in self.layers
            for rate in self.learning_rates
        )

    def along(self, setting: Setting) -> tuple[Setting, ...]:
        """Every strength at a setting's layers and learning rate."""
        return tuple(replace(setting, strength=strength) for strength in self.strengths)

    @property
    def most(self) -> int:
        """Settings tried at most."""
        return len({self.start, *self.middle}) + len(self.strengths) - 1


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A setting and how the records came out under it."""

    setting: Setting
    scores: Mapping[str, Score]  # by metric; empty where it failed
    deviation: float = math.nan  # bootstrap standard error of the Score
    target_probability: float | None = None  # median over edits that the target values reached
    failure: str | None = None

    def value(self, metric: str) -> float:
        """A score's value."""
        return self.scores[metric].value


def strength_field(editor: str) -> str:
    """The config field of an editor's strength.

    Raises ValueError for an editor that is unknown, has no target values or has neither field.
    """

    def field_of(name: str) -> str | None:
        config, kind = EDITORS[name]
        if not (isinstance(kind, type) and issubclass(kind, ClosedFormEditor)):
            return None
        names = [field.name for field in dataclasses.fields(config)]
        return next((field for field in STRENGTHS if field in names), None)

    found = field_of(editor) if editor in EDITORS else None
    if found is None:
        reason = "has no target values with a covariance_weight or ridge to try"
        raise ValueError(
            f"editor {editor!r} {reason if editor in EDITORS else 'is unknown'}; those that can be tuned: "
            f"{', '.join(name for name in EDITORS if field_of(name))}"
        )
    return found


def layer_sets(editor: str, depth: int) -> list[tuple[int, ...]]:
    """Windows of neighbouring blocks, the starting row's first; of BLUE's editors the ends of each.

    As wide a share of the depth as Llama-3-8B's 5 of 32 blocks, rounded up, at most 5; their lowest blocks
    are at the shares DEPTHS of the depth, rounded half up. Where windows of a shallow model coincide, fewer.
    """
    width = min(WIDTH, math.ceil(WIDTH * depth / OF))
    lowest = [min(math.floor(share * depth + 0.5), depth - width) for share in DEPTHS]
    windows = [tuple(range(first, first + width)) for first in dict.fromkeys(lowest)]
    kind: Any = EDITORS[editor][1]
    if kind.stream.own_targets:
        return list(dict.fromkeys((window[0], window[-1]) for window in windows))
    return windows


def search(grid: Grid, attempt: Callable[[Setting], Trial]) -> list[Trial]:
    """The trials of one editor, each setting once, in the order made."""
    done: dict[Setting, Trial] = {}

    def tried(settings: Sequence[Setting]) -> list[Trial]:
        for setting in settings:
            if setting not in done:
                done[setting] = attempt(setting)
        return [done[setting] for setting in settings]

    tried([grid.start])
    best = choose(tried(grid.middle), grid.start)
    tried(grid.along(best.setting if best else grid.start))
    return list(done.values())


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """The trial of the highest Score, the first of equal ones; None if all failed."""
    usable = [trial for trial in trials if trial.failure is None]
    return max(usable, key=lambda trial: trial.value("score"), default=None)


def choose(trials: Sequence[Trial], start: Setting) -> Trial | None:
    """The trial that RULE names; None if all failed."""
    best = best_of(trials)
    if best is None:
        return None
    least = best.value("score") - best.deviation
    near = [trial for trial in trials if trial.failure is None and trial.value("score") >= least]

    def key(trial: Trial) -> tuple[float, ...]:
        setting = trial.setting
        return (
            -setting.strength,
            -trial.value("locality"),
            abs(setting.layers[0] - start.layers[0]),
            abs(math.log(setting.learning_rate / start.learning_rate)),
        )

    return min(near, key=key)


class Tuner:
    """A model on which settings are tried one after the other, each from the unedited weights."""

    def __init__(
        self,
        spec: RunSpec,
        loaded: LoadedModel,
        cases: Sequence[EditCase],
        *,
        layers: Sequence[int],
        batch_size: int,
    ) -> None:
        self.spec, self.loaded, self.model, self.layers = spec, loaded, loaded.model, layers
        self.sites = sites_for(self.model)
        self.batches = [cases[i : i + batch_size] for i in range(0, len(cases), batch_size)]
        names = [self.sites.weight_name(layer) for layer in layers]
        ready_to_edit(self.model, names)
        self.base = {name: self.model.get_parameter(name).detach().clone() for name in names}
        self.targets = KeptTargets(lambda: self._is_unedited() or None)

    def gather(self, stage: Stage) -> None:
        """The covariances of all layers, in one pass over the corpus."""
        self.statistics = statistics_of(
            self.spec, self.loaded, self.layers, progress=lambda done, total: stage.update(done / total)
        )

    def unedited(self, stage: Stage) -> dict[str, Score]:
        """The scores that the records have before any edit, by metric."""
        rows: list[Row] = []
        for batch in self.batches:
            rows += self._rows(batch, self.base, lambda _, share: stage.update(share))
        return self._scores(rows)[0]

    def attempt(self, setting: Setting, tell: Tell) -> Trial:
        """Edit every batch by itself into the unedited model, and score its records."""
        try:
            rows, probability = self._outcomes(setting, tell)
        except Exception as error:  # whatever it is, the other settings do not depend on it
            logger.info("%s failed", setting, exc_info=error)
            failure = f"{type(error).__name__}: {' '.join(str(error).split())}"
            return Trial(setting=setting, scores={}, failure=failure)
        finally:
            self._restore()
        scores, deviation = self._scores(rows)
        return Trial(setting=setting, scores=scores, deviation=deviation, target_probability=probability)

    def _outcomes(self, setting: Setting, tell: Tell) -> tuple[list[Row], float | None]:
        """Scored prompts of all records, and the median probability that the target values reached."""
        editor: Any = EDITORS[setting.editor][1](setting.config(self.spec.settings[setting.editor]))
        stream = editor.start(
            self.model, self.loaded.tokenizer,
            covariance=self.statistics.covariance, seed=self.spec.seed,
            progress=lambda what, done, total: tell(what, done / total), targets=self.targets,
        )  # fmt: skip
        if isinstance(stream, AlphaEditStream):
            stream.null_space_source = self.statistics.null_space
        fresh = stream.state()
        rows: list[Row] = []
        for batch in self.batches:
            self._restore()
            stream.restore(fresh)
            stream.edit([case.request for case in batch])
            edited = dict(self.base)
            for name in editor.parameters(self.sites):
                edited[name] = self.model.get_parameter(name).detach().clone()
            rows += self._rows(batch, editor.released(self.base, edited)[0], tell)
        return rows, stream.notes().get("median_target_probability")

    def _rows(self, batch: Sequence[EditCase], weights: Mapping[str, Tensor], tell: Tell) -> Iterator[Row]:
        """A batch's prompts scored under some weights, in the model's own precision."""
        queries = list(batch_queries([batch]))
        cast = {name: value.to(self.model.dtype) for name, value in weights.items()}
        with weights_in_place(self.model, cast):
            answers = score(
                self.model, self.loaded.tokenizer, [query for _, query in queries],
                progress=lambda done, total: tell("scoring", done / total),
            )  # fmt: skip
        for (row, _), answer in zip(queries, answers, strict=True):
            yield row | answer_fields(answer)

    def _scores(self, rows: Sequence[Row]) -> tuple[dict[str, Score], float]:
        """The edit metrics by name, and the bootstrap standard error of the Score."""
        outcomes = tabulate_cell(rows)
        records = len(outcomes.success)
        counts = resampling_counts(records, self.spec.seed)
        scores = {found.metric: found for found in edit_scores(outcomes, None, counts)}
        return scores, float(harmonic_mean(counts @ outcomes.success / records).std(ddof=1))

    @torch.no_grad()
    def _restore(self) -> None:
        for name, value in self.base.items():
            self.model.get_parameter(name).copy_(value)

    def _is_unedited(self) -> bool:
        return all(torch.equal(self.model.get_parameter(name), value) for name, value in self.base.items())
