"""Scores of evaluation samples, under the training reward and under a judge that is never trained against."""

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from srpo_lightning.batch import Conditions
from srpo_lightning.callbacks.base import as_base, keep_base, keep_prompts, read_base
from srpo_lightning.callbacks.records import Recorder
from srpo_lightning.data.prompts import read_prompts
from srpo_lightning.evaluation.comparison import (
    BASE,
    CONSISTENCY,
    HELD_OUT,
    LABEL,
    NOT_WON,
    save_table,
    summary,
    warn_of_unknown,
)
from srpo_lightning.evaluation.exchange import (
    Evaluation,
    Evaluations,
    OffersWeights,
    ReadsEvaluations,
    Weights,
    callbacks_that,
)
from srpo_lightning.evaluation.metrics import FEW_GROUPS, SampleTable, Table, is_in_top, most_like
from srpo_lightning.files.fingerprint import fingerprint
from srpo_lightning.module import SRPOModule
from srpo_lightning.objectives.reward_forms import RewardForm
from srpo_lightning.picture_statistics import (
    CLIP_STATISTICS,
    PICTURE_STATISTICS,
    SCORED_FRAMES,
    STATISTICS,
    consistency,
    evenly,
    over_frames,
)
from srpo_lightning.rewards.base import Reward, evaluated_by
from srpo_lightning.rewards.clip import ClipReward
from srpo_lightning.run_folder import RunFolder

OF_JUDGE = ("judge", "prompt")
SCORES = ("reward", *OF_JUDGE)
OWN_COLUMNS = (*SCORES, *PICTURE_STATISTICS, LABEL, HELD_OUT)
OF_ALL_SAMPLES = ("diversity", "share", "drift", "win", "prompt_diversity")


class RewardTracking(Recorder, OffersWeights):
    """Scores every evaluation sample, of base, policy and ema.

    Logged under `val/<weights>/` and appended to `<run folder>/metrics.jsonl`. `validate` and `test` write into the
    folder `validation` in it, with a key of all that the numbers depend on. What each number is,
    `srpo_lightning.evaluation.meanings` says, and the page of the run. When `reward` rises and `judge` falls, the
    policy is exploiting its reward.

    The numbers of each sample are kept in `<run folder>/tables/`, those of the base once, in `base.safetensors`. Where
    that is missing, or of other prompts, noise or rewards, the base is put in place again and measured. Judge and
    metrics are in host memory while the policy trains.

    Args:
        judge: Reward model that reads text and is another than the training reward. Without one, null, the training
            reward, the metrics and statistics of the pictures are measured, and nothing says when it is exploited.
        labels: Texts to tell images apart by, for instance styles.
        candidates: Prompt files; each image's own prompt competes against all prompts in them.
        top_k: Number of best candidates among which an image's own prompt counts as right.
        metrics: Further reward models, by the name that their score of image and prompt is logged under.
        held_out: Weights of scores, by their name, in `held_out`: the one number to choose checkpoints by
            (checkpoint.monitor: policy/held_out) and for OverOptimizationGuard. The training reward has no place in it.
            By default judge and prompt count alike: the first alone also rises while subjects fade. Without a judge
            there is none by default.
        form: Reward form that `reward` and `judge` are of; null is what the objective asks of its reward. One form
            makes runs with several objectives comparable.
    """

    def __init__(
        self,
        judge: Reward | None = None,
        labels: Sequence[str] = (),
        candidates: Sequence[str] = (),
        top_k: PositiveInt = 5,
        metrics: dict[str, Reward] | None = None,
        held_out: dict[str, float] | None = None,
        form: RewardForm | None = None,
    ) -> None:
        if judge is not None:
            judge.check_contrast()
        self.judge = judge
        self.form = form
        self.scorers = metrics or {}
        self.labels = list(labels)
        self.candidates = [prompt for path in candidates for prompt in read_prompts(path).prompts]
        self.top_k = top_k
        self.top = f"top{top_k}"
        default = {} if judge is None else dict.fromkeys(OF_JUDGE, 1.0)
        self.held_out = default if held_out is None else held_out
        self._check(is_own=held_out is not None)
        self.base: Table | None = None
        self.evaluations: Evaluations | None = None
        self.tables: dict[str, SampleTable] = {}
        self.has_clips = False
        self.frame_encoder: ClipReward | None = None
        self._needs_base = False
        self._start_s = 0.0

    def _check(self, is_own: bool) -> None:
        """Refuse what cannot be measured, or says nothing.

        Args:
            is_own: Whether `held_out` was given.
        """
        if self.judge is None and (self.labels or self.candidates):
            raise ValueError("labels and candidates are compared by the judge, and there is none: give one, or neither")
        taken = self.scorers.keys() & {*OWN_COLUMNS, *CLIP_STATISTICS, CONSISTENCY, self.top, *OF_ALL_SAMPLES}
        if taken:
            meant = "".join(f" ({STATISTICS[name].meaning})" for name in taken & STATISTICS.keys())
            raise ValueError(f"metrics has {', '.join(taken)}, which is logged already{meant}: choose another name")
        if len(self.labels) == 1 or len(set(self.labels)) < len(self.labels):
            raise ValueError(f"labels is {self.labels}: give two or more, all different, or none")
        if self.candidates and self.top_k >= len(self.candidates):
            of = f"{self.top_k} of {len(self.candidates)} candidates"
            raise ValueError(f"top_k is {of}: every picture would be right; set it below")
        if self.held_out and not any(self.held_out.values()):
            raise ValueError("held_out has weights of 0 alone: give at least one score another, for instance judge: 1")
        of_judge = () if self.judge is None else (*OF_JUDGE, self.top)
        unknown = self.held_out.keys() - {*of_judge, *self.scorers}
        if unknown or (is_own and not self.held_out):
            known = f"{', '.join(of_judge)} and the names" if of_judge else "the names (there is no judge)"
            raise ValueError(
                f"held_out has {', '.join(sorted(unknown)) or 'nothing'}: choose among {known} in metrics "
                f"({', '.join(self.scorers) or 'there are none'})"
            )

    @staticmethod
    def file(run: RunFolder) -> Path:
        """The numbers of every evaluation."""
        return run.metrics

    @property
    def models(self) -> list[Reward]:
        """The judge and the other metrics."""
        return [*([] if self.judge is None else [self.judge]), *self.scorers.values()]

    @property
    def columns(self) -> list[str]:
        """The numbers that every sample gets."""
        missing = set() if self.labels else {LABEL}
        missing |= set() if self.held_out else {HELD_OUT}
        missing |= set(OF_JUDGE) if self.judge is None else set()
        own = [name for name in OWN_COLUMNS if name not in missing]
        of_clips = [*CLIP_STATISTICS, *([CONSISTENCY] if self.frame_encoder else [])] if self.has_clips else []
        return [*own, *of_clips, *([] if self.judge is None else [self.top]), *self.scorers]

    @property
    def has_features(self) -> bool:
        """Whether the judge has features of images, by which diversity and drift are measured."""
        return isinstance(self.judge, ClipReward)

    def numbers(self, samples_per_prompt: int) -> list[str]:
        """The names of what is written of each kind of weights, once it is compared with the base."""
        scores = [name for name in self.columns if name != LABEL]
        features = ["diversity", "drift"] if self.has_features else []
        features += ["prompt_diversity"] if features and samples_per_prompt > 1 else []
        wins = [f"win/{name}" for name in scores if name not in NOT_WON]
        return [*scores, *(f"share/{label}" for label in self.labels), *features, *wins]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the weights of the judge and of the other metrics."""
        assert isinstance(pl_module, SRPOModule)
        num_frames = pl_module.policy.num_frames
        for model in self.models:
            model.check_frames(num_frames)
        self.has_clips = num_frames > 1
        self.frame_encoder = encoder_of_pictures([*self.models, pl_module.reward]) if self.has_clips else None
        for model in self.models:
            model.load()
            model.requires_grad_(False)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look whether the base must be measured too."""
        assert isinstance(pl_module, SRPOModule)
        self._start_s = time.perf_counter()
        if pl_module.trained_steps:
            self.base = self.base or read_base(trainer, self.key(trainer, pl_module))
        self._needs_base = bool(pl_module.trained_steps) and self.base is None

    def offered_weights(self, module: LightningModule) -> dict[str, Weights | None]:
        """The base, where nobody has measured it yet."""
        assert isinstance(module, SRPOModule)
        return {BASE: partial(as_base, module)} if self._needs_base else {}

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting anew."""
        self._move_models(pl_module.device)
        self.tables = {}

    def on_validation_batch_end(  # type: ignore[override]  # the outputs of SRPOModule.validation_step
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: dict[str, Tensor],
        batch: Conditions,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Score the batch."""
        assert isinstance(pl_module, SRPOModule)
        for weights, images in outputs.items():
            if weights not in self.tables:
                table = SampleTable(self.columns, len(trainer.datamodule.eval_prompts))  # type: ignore[attr-defined]
                self.tables[weights] = table.to(pl_module.device)
            images = images.float()
            scores = self.scores(pl_module, images, batch.prompts)
            features, of_clips = self.features(images)
            self.tables[weights].update(batch.indices, scores | of_clips, features)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the samples of all ranks together, log, append to the file, and tell who reads evaluations."""
        assert isinstance(pl_module, SRPOModule)
        self._needs_base = False
        tables = {weights: table.table() for weights, table in self.tables.items()}
        step = pl_module.trained_steps
        measured_base = tables.get(BASE) if step else tables.get("policy")
        if measured_base is not None:
            self._learn_base(trainer, pl_module, measured_base)
        if self.base is not None:
            tables |= {BASE: self.base}
        by_weights = {
            weights: Evaluation(table, summary(table, None if weights == BASE or not step else self.base, self.labels))
            for weights, table in tables.items()
        }
        for weights in (name for name in self.tables if name != BASE):
            warn_of_unknown(weights, tables[weights], step)
            self._record(trainer, pl_module, weights, *by_weights[weights])
        self.evaluations = Evaluations(step, by_weights)
        for reader in callbacks_that(trainer, ReadsEvaluations):
            reader.on_evaluation(trainer, pl_module, self.evaluations)
        seconds = time.perf_counter() - self._start_s
        for logger in trainer.loggers:
            logger.log_metrics({"val/seconds": seconds}, step)
        # A moment of copying at each evaluation, for gigabytes of a device that training may need to the last.
        self._move_models(torch.device("cpu"))

    on_test_start = on_validation_start
    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end  # type: ignore[assignment]  # as above
    on_test_epoch_end = on_validation_epoch_end

    def features(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The judge's features [B, E], of a clip their mean over scored frames; and what those of all frames say."""
        judge, encoder = self.judge, self.frame_encoder
        each = None if encoder is None else torch.stack([encoder.image_features(own) for own in images.unbind(2)])
        of_clips = {} if each is None else {CONSISTENCY: consistency(each)}
        if not isinstance(judge, ClipReward):
            return images.new_empty(len(images), 0), of_clips
        if each is None or judge is not encoder:
            return judge.image_features(images), of_clips
        return each[evenly(SCORED_FRAMES, len(each))].mean(0), of_clips

    def scores(self, module: SRPOModule, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The numbers of each image, [B], by column; of a clip means over its frames, unless a model reads clips."""
        form = self.form or module.objective
        whole = range(module.policy.num_frames)
        measures: dict[str, tuple[Reward, Callable[[Tensor], Tensor]]] = {
            "reward": (module.reward, lambda shown: form.score(module.reward, shown, prompts)),
            **{name: (scorer, scorer.under(prompts)) for name, scorer in self.scorers.items()},
        }
        scores: dict[str, Any] = {
            name: evaluated_by(model, images, module.policy.shown_frames if name == "reward" else whole, measure)
            for name, (model, measure) in measures.items()
        }
        scores |= {name: over_frames(images, own.measure) for name, own in PICTURE_STATISTICS.items()}
        if self.judge is not None:
            by_judge = partial(evaluated_by, self.judge, images, whole)
            scores |= self._judged(self.judge, by_judge, form, prompts)
        if self.has_clips:
            scores |= {name: own.measure(images) for name, own in CLIP_STATISTICS.items()}
        if self.held_out:
            scores[HELD_OUT] = sum(weight * scores[name] for name, weight in self.held_out.items())
        return scores

    def _judged(
        self, judge: Reward, by_judge: Callable[[Callable[[Tensor], Tensor]], Tensor], form: Any, prompts: Sequence[str]
    ) -> dict[str, Tensor]:
        candidates = list(dict.fromkeys([*self.candidates, *prompts]))
        compared = by_judge(lambda shown: judge.compare(shown, candidates))
        truth = torch.tensor([candidates.index(prompt) for prompt in prompts], device=compared.device)
        scores = {
            "judge": by_judge(lambda shown: form.score(judge, shown, prompts)),
            "prompt": by_judge(judge.under(prompts)),
            self.top: is_in_top(compared, truth, self.top_k),
        }
        if self.labels:
            scores[LABEL] = most_like(by_judge(lambda shown: judge.compare(shown, self.labels)))
        return scores

    def key(self, trainer: Trainer, module: SRPOModule) -> str:
        """What the numbers of the base depend on, as a hash."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        prompts = data.evaluation
        what = {
            "drawn by": [module.policy, module.seed, module.num_sample_steps, module.sample_guidance],
            "precision": trainer.precision,
            "prompts": [(prompt.text, prompt.seed, prompt.size) for prompt in prompts],
            "samples": [data.eval_samples_per_prompt, data.sizes, data.cache.description["fingerprint"]],
            "scored by": [module.reward, self.judge, self.scorers],
            "form": self.form or vars(module.objective).get("form", module.objective),
            "columns": [self.columns, self.labels, self.candidates, self.held_out],
        }
        return fingerprint(what)

    def _learn_base(self, trainer: Trainer, module: SRPOModule, base: Table) -> None:
        self.base = base
        if (few := len(base.groups.unique())) < FEW_GROUPS:
            rank_zero_info(
                f"{few} evaluation prompts are few: intervals over them are too narrow, and of one prompt there is "
                f"none, nor does the guard act. Give {FEW_GROUPS} or more (data.evaluation, data.num_eval_prompts)"
            )
        if trainer.is_global_zero:
            keep_base(trainer, self.key(trainer, module), base)

    def _record(
        self, trainer: Trainer, module: SRPOModule, weights: str, table: Table, numbers: dict[str, float]
    ) -> None:
        step, run = module.trained_steps, RunFolder.recording(trainer)
        named = {f"val/{weights}/{name}": value for name, value in numbers.items()}
        module.log_dict(named, logger=False)
        for logger in trainer.loggers:
            logger.log_metrics(named, step)
            if isinstance(logger, TensorBoardLogger):
                for name in [name for name in (*SCORES, *self.scorers) if name in table.columns]:
                    known = table.columns[name][table.columns[name].isfinite()]
                    if len(known):  # TensorBoard has no histogram of nothing
                        logger.experiment.add_histogram(f"distribution/{weights}/{name}", known, step)
        if trainer.is_global_zero:
            own = {} if trainer.state.fn == TrainerFn.FITTING else {"key": self.key(trainer, module)}
            run.append_metrics({"step": step, "weights": weights, **own, **numbers})
            save_table(run.table(step, weights), table, "")
            keep_prompts(trainer)

    def _move_models(self, device: torch.device) -> None:
        for model in self.models:
            model.to(device)


def encoder_of_pictures(models: Iterable[Reward]) -> ClipReward | None:
    """The first model, or term of a sum, that has features of single pictures; None: there is none."""
    found = (own for model in models for own in model.modules() if isinstance(own, ClipReward) and not own.reads_clips)
    return next(found, None)
