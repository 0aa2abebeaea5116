"""Scores of evaluation samples, under the training reward and under a judge that is never trained against."""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from srpo_lightning.batch import Conditions
from srpo_lightning.callbacks.base import as_base, keep_base, keep_prompts, read_base
from srpo_lightning.callbacks.measures import SCORES, VERSION, Measures
from srpo_lightning.callbacks.records import Recorder
from srpo_lightning.evaluation.comparison import BASE, save_table, summary, warn_of_unknown
from srpo_lightning.evaluation.exchange import (
    Evaluation,
    Evaluations,
    OffersWeights,
    ReadsEvaluations,
    Weights,
    callbacks_that,
)
from srpo_lightning.evaluation.metrics import FEW_GROUPS, SampleTable, Table
from srpo_lightning.files.fingerprint import fingerprint
from srpo_lightning.module import SRPOModule
from srpo_lightning.objectives.reward_forms import RewardForm
from srpo_lightning.rewards.base import Reward
from srpo_lightning.run_folder import RunFolder


class RewardTracking(Measures, Recorder, OffersWeights):
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
        super().__init__(judge, labels, candidates, top_k, metrics, held_out, form)
        self.base: Table | None = None
        self.evaluations: Evaluations | None = None
        self.tables: dict[str, SampleTable] = {}
        self._needs_base = False
        self._key = ""
        self._start_s = 0.0

    @staticmethod
    def file(run: RunFolder) -> Path:
        """The numbers of every evaluation."""
        return run.metrics

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the weights of the judge and of the other metrics."""
        assert isinstance(pl_module, SRPOModule)
        self.base = None  # it may be of other prompts and settings
        self.load(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look whether the base must be measured too."""
        assert isinstance(pl_module, SRPOModule)
        self._start_s = time.perf_counter()
        self._key = self.key(trainer, pl_module)
        if pl_module.trained_steps:
            self.base = self.base or read_base(trainer, self._key)
        self._needs_base = bool(pl_module.trained_steps) and self.base is None

    def offered_weights(self, module: LightningModule) -> dict[str, Weights | None]:
        """The base, where nobody has measured it yet."""
        assert isinstance(module, SRPOModule)
        return {BASE: partial(as_base, module)} if self._needs_base else {}

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting anew."""
        self.move_models(pl_module.device)
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
            if trainer.is_global_zero and trainer.state.fn != TrainerFn.FITTING:  # `validation` is read alone
                path = RunFolder.recording(trainer).base_table
                save_table(path, self.base, self._key)
        by_weights = {
            weights: Evaluation(table, summary(table, None if weights == BASE or not step else self.base, self.labels))
            for weights, table in tables.items()
        }
        for weights in (name for name in self.tables if name != BASE):
            warn_of_unknown(weights, tables[weights], step)
            self._record(trainer, pl_module, weights, *by_weights[weights])
        self.evaluations = Evaluations(step, by_weights, self._key)
        for reader in callbacks_that(trainer, ReadsEvaluations):
            reader.on_evaluation(trainer, pl_module, self.evaluations)
        seconds = time.perf_counter() - self._start_s
        for logger in trainer.loggers:
            logger.log_metrics({"val/seconds": seconds}, step)
        # A moment of copying at each evaluation, for gigabytes of a device that training may need to the last.
        self.move_models(torch.device("cpu"))

    on_test_start = on_validation_start
    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end  # type: ignore[assignment]  # as above
    on_test_epoch_end = on_validation_epoch_end

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
            "version": VERSION,
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
            keep_base(trainer, self._key, base)

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
            own = {} if trainer.state.fn == TrainerFn.FITTING else {"key": self._key}
            run.append_metrics({"step": step, "weights": weights, **own, **numbers})
            save_table(run.table(step, weights), table, "")
            keep_prompts(trainer)
