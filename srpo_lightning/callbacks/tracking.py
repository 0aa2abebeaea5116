"""Scores of evaluation samples, under the training reward and under a judge that is never trained against."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from srpo_lightning.batch import Conditions
from srpo_lightning.callbacks.records import Recorder
from srpo_lightning.data.prompts import read_prompts
from srpo_lightning.evaluation.comparison import (
    BASE,
    HELD_OUT,
    LABEL,
    NOT_WON,
    read_header,
    save_table,
    summary,
)
from srpo_lightning.evaluation.metrics import (
    FEW_GROUPS,
    Evaluation,
    SampleTable,
    Table,
    brightness,
    high_frequency,
    is_in_top,
    most_like,
    saturation,
)
from srpo_lightning.files.fingerprint import fingerprint
from srpo_lightning.module import SRPOModule
from srpo_lightning.objectives.reward_forms import RewardForm
from srpo_lightning.rewards.base import Reward
from srpo_lightning.rewards.clip import ClipReward
from srpo_lightning.run_folder import RunFolder

OWN_COLUMNS = ("reward", "judge", "prompt", "saturation", "brightness", "high_frequency", LABEL, HELD_OUT)


class RewardTracking(Recorder):
    """Scores every evaluation sample, for the policy's weights, for their average and for the weights before training.

    Logged under `val/<weights>/` and appended to `<run folder>/metrics.jsonl` (by `validate` and `test` in the folder
    `validation` in it, with a key of all that the numbers depend on), each the mean over the samples:
    `reward` (the objective under the training reward), `judge` (the same under the judge: when the first rises and the
    second falls, the policy is exploiting its reward), `prompt` (the judge's score of image and prompt), each of
    `metrics`, `top<k>` (whether the judge ranks an image's own prompt among the best k of `candidates`), what hacked
    rewards move (`saturation`, `brightness`, `high_frequency`), and of all samples together `share/<label>` (images
    that the judge finds most like each label), where the judge has image features `diversity`, `prompt_diversity` and
    `drift` (CMMD from the base), and `win/<score>` (how often a sample beats the base's from the same noise).

    The numbers of each sample are kept in `<run folder>/tables/`, those of the base once, in `base.safetensors`. Where
    it is not there, or of other prompts, noise or rewards, the evaluation puts the weights before training back in
    place and measures them too. Judge and metrics are in host memory while the policy trains.

    Args:
        judge: a reward model other than the training reward; it must read text.
        labels: texts to tell images apart by, for instance styles.
        candidates: prompt files; each image's own prompt competes against all prompts in them.
        top_k: how many of the candidates count as right.
        metrics: further reward models by the name that their score of image and prompt is logged under.
        held_out: scores by their weight in `held_out`, one number to choose checkpoints by (checkpoint.monitor:
            policy/held_out) and for OverOptimizationGuard; the training reward has no place in it. By default judge and
            prompt count alike: the first alone also rises while subjects fade.
        form: what `reward` and `judge` are of; None: what the objective asks of its reward. One form makes runs with
            several objectives comparable.
    """

    def __init__(
        self,
        judge: Reward,
        labels: Sequence[str] = (),
        candidates: Sequence[str] = (),
        top_k: PositiveInt = 5,
        metrics: dict[str, Reward] | None = None,
        held_out: dict[str, float] | None = None,
        form: RewardForm | None = None,
    ) -> None:
        judge.check_contrast()
        self.judge = judge
        self.form = form
        self.scorers = metrics or {}
        self.labels = list(labels)
        self.candidates = [prompt for path in candidates for prompt in read_prompts(path).prompts]
        self.top_k = top_k
        self.top = f"top{top_k}"
        self.held_out = {"judge": 1.0, "prompt": 1.0} if held_out is None else held_out
        self.base: Table | None = None
        self.tables: dict[str, SampleTable] = {}
        self._start_s = 0.0
        taken = self.scorers.keys() & {*OWN_COLUMNS, self.top, "diversity", "share", "drift", "win", "prompt_diversity"}
        if taken:
            raise ValueError(f"metrics has {', '.join(taken)}, which is logged already: choose another name")
        unknown = self.held_out.keys() - {"judge", "prompt", self.top, *self.scorers}
        if len(labels) == 1 or len(set(labels)) < len(labels):
            raise ValueError(f"labels is {list(labels)}: give two or more, all different, or none")
        if self.candidates and top_k >= len(self.candidates):
            raise ValueError(
                f"top_k is {top_k} of {len(self.candidates)} candidates: every picture would be right; set it below"
            )
        if self.held_out and not any(self.held_out.values()):
            raise ValueError("held_out has weights of 0 alone: give at least one score another, for instance judge: 1")
        if unknown or not self.held_out:
            raise ValueError(
                f"held_out has {', '.join(sorted(unknown)) or 'nothing'}: choose among judge, prompt, {self.top} and "
                f"the names in metrics ({', '.join(self.scorers) or 'there are none'})"
            )

    @staticmethod
    def file(run: RunFolder) -> Path:
        """The numbers of every evaluation."""
        return run.metrics

    @property
    def models(self) -> list[Reward]:
        """The judge and the other metrics."""
        return [self.judge, *self.scorers.values()]

    @property
    def columns(self) -> list[str]:
        """What every sample gets a number of."""
        return [*(name for name in OWN_COLUMNS if name != LABEL or self.labels), self.top, *self.scorers]

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
        for model in self.models:
            model.load()
            model.requires_grad_(False)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask for the base's samples too, if nobody has measured them yet."""
        assert isinstance(pl_module, SRPOModule)
        self._start_s = time.perf_counter()
        pl_module.weight_variants.pop(BASE, None)
        if pl_module.trained_steps:
            self.base = self.base or self._read_base(trainer, pl_module)
            if self.base is None:
                pl_module.weight_variants[BASE] = pl_module.as_pretrained

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
            features = images.new_empty(len(images), 0)
            if isinstance(self.judge, ClipReward):  # has_features
                features = self.judge.image_features(images)
            self.tables[weights].update(batch.indices, scores, features)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the samples of all ranks together, log, and append to the file."""
        assert isinstance(pl_module, SRPOModule)
        tables = {weights: table.table() for weights, table in self.tables.items()}
        step = pl_module.trained_steps
        measured_base = tables.get(BASE) if step else tables.get("policy")
        if measured_base is not None:
            self.base = measured_base
            if (few := len(self.base.groups.unique())) < FEW_GROUPS:
                rank_zero_info(
                    f"{few} evaluation prompts are few: intervals over them are too narrow, and of one prompt there is "
                    f"none, nor does the guard act. Give {FEW_GROUPS} or more (data.evaluation, data.num_eval_prompts)"
                )
            if trainer.is_global_zero:
                self._keep_base(trainer, pl_module, measured_base)
        if self.base is not None:
            tables |= {BASE: self.base}
        pl_module.evaluations = {
            weights: Evaluation(table, summary(table, None if weights == BASE or not step else self.base, self.labels))
            for weights, table in tables.items()
        }
        for weights in (name for name in self.tables if name != BASE):
            warn_of_unknown(weights, tables[weights], step)
            self._record(trainer, pl_module, weights, *pl_module.evaluations[weights])
        seconds = time.perf_counter() - self._start_s
        for logger in trainer.loggers:
            logger.log_metrics({"val/seconds": seconds}, step)
        # A moment of copying at each evaluation, for gigabytes of a device that training may need to the last.
        self._move_models(torch.device("cpu"))

    on_test_start = on_validation_start
    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end  # type: ignore[assignment]  # as above
    on_test_epoch_end = on_validation_epoch_end

    def scores(self, module: SRPOModule, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The numbers of each image, [B], by column."""
        candidates = list(dict.fromkeys([*self.candidates, *prompts]))
        truth = torch.tensor([candidates.index(prompt) for prompt in prompts], device=images.device)
        form = self.form or module.objective
        scores = {
            "reward": form.score(module.reward, images, prompts),
            "judge": form.score(self.judge, images, prompts),
            "prompt": self.judge(images, prompts),
            "saturation": saturation(images),
            "brightness": brightness(images),
            "high_frequency": high_frequency(images),
            self.top: is_in_top(self.judge.compare(images, candidates), truth, self.top_k),
        }
        if self.labels:
            scores[LABEL] = most_like(self.judge.compare(images, self.labels))
        scores |= {name: scorer(images, prompts) for name, scorer in self.scorers.items()}
        return scores | {HELD_OUT: sum(weight * scores[name] for name, weight in self.held_out.items())}

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

    def _read_base(self, trainer: Trainer, module: SRPOModule) -> Table | None:
        key = self.key(trainer, module)
        found = (run.read_base(key) for run in (RunFolder.of(trainer), RunFolder.recording(trainer)))
        return next((table for table in found if table is not None), None)

    def _keep_base(self, trainer: Trainer, module: SRPOModule, base: Table) -> None:
        """In the run folder, unless `validate` would replace the run's own by that of other prompts or settings."""
        key, path = self.key(trainer, module), RunFolder.of(trainer).base_table
        header = read_header(path) if path.is_file() else None
        is_others = header is not None and header["key"] != key
        save_table(RunFolder.recording(trainer).base_table if is_others else path, base, key)

    def _record(
        self, trainer: Trainer, module: SRPOModule, weights: str, table: Table, numbers: dict[str, float]
    ) -> None:
        step, run = module.trained_steps, RunFolder.recording(trainer)
        module.log_dict({f"val/{weights}/{name}": value for name, value in numbers.items()}, logger=False)
        for logger in trainer.loggers:
            logger.log_metrics({f"val/{weights}/{name}": value for name, value in numbers.items()}, step)
            if isinstance(logger, TensorBoardLogger):
                for name in ("reward", "judge", "prompt", *self.scorers):
                    known = table.columns[name][table.columns[name].isfinite()]
                    if len(known):  # TensorBoard has no histogram of nothing
                        logger.experiment.add_histogram(f"distribution/{weights}/{name}", known, step)
        if trainer.is_global_zero:
            own = {} if trainer.state.fn == TrainerFn.FITTING else {"key": self.key(trainer, module)}
            run.append_metrics({"step": step, "weights": weights, **own, **numbers})
            save_table(run.table(step, weights), table, "")

    def _move_models(self, device: torch.device) -> None:
        for model in self.models:
            model.to(device)


def warn_of_unknown(weights: str, table: Table, step: int) -> None:
    """Say how many samples have a score that is not a number, of which every mean is none either."""
    unknown = torch.stack([~column.isfinite() for column in table.columns.values()]).any(0)
    if unknown.any():
        rank_zero_warn(
            f"step {step}: {int(unknown.sum())} of {len(unknown)} samples of {weights} have scores that are not "
            f"numbers, sample {int(table.indices[unknown][0])} the first: look at the pictures; lower the learning "
            "rate, or draw in a wider precision (trainer.precision)"
        )
