"""Scores of evaluation samples, under the training reward and under a judge that is never trained against."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torchmetrics import MeanMetric, Metric

from srpo_lightning.batch import Conditions
from srpo_lightning.callbacks import records
from srpo_lightning.callbacks.records import Record, Recorder
from srpo_lightning.data.prompts import read_prompts
from srpo_lightning.metrics import Diversity, LabelShare, is_in_top, saturation
from srpo_lightning.module import SRPOModule
from srpo_lightning.rewards.base import Reward
from srpo_lightning.rewards.clip import ClipReward

FILE = "metrics.jsonl"


class RewardTracking(Recorder):
    """Scores every validation sample, for the policy's weights and for their average.

    Logged under `val/<weights>/` and appended to `<run folder>/metrics.jsonl`:
    `reward` (the objective under the training reward), `judge` (the same under the judge: when the first rises and the
    second falls, the policy is exploiting its reward), `prompt` (the judge's score of image and prompt),
    `share/<label>` (images that the judge finds most like each label), `top<k>` (images whose own prompt the judge
    ranks among the best k of `candidates`), `saturation`, and `diversity` (mean distance of the judge's image features,
    where it has any), and the mean score of image and prompt under each of `metrics`. The judge and the
    metrics are in host memory while the policy trains.

    Args:
        judge: a reward model other than the training reward; it must read text.
        labels: texts to tell images apart by, for instance styles.
        candidates: prompt files; each image's own prompt competes against all prompts in them.
        top_k: how many of the candidates count as right.
        metrics: further reward models by the name that their mean score of image and prompt is logged under.
    """

    file = FILE

    def __init__(
        self,
        judge: Reward,
        labels: Sequence[str] = (),
        candidates: Sequence[str] = (),
        top_k: PositiveInt = 5,
        metrics: dict[str, Reward] | None = None,
    ) -> None:
        judge.check_contrast()
        self.judge = judge
        self.scorers = metrics or {}
        self.labels = list(labels)
        self.candidates = [prompt for path in candidates for prompt in read_prompts(path).prompts]
        self.top_k = top_k
        self._metrics: dict[str, dict[str, Metric]] = {}
        taken = self.scorers.keys() & {"reward", "judge", "prompt", f"top{top_k}", "saturation", "diversity", "share"}
        if taken:
            raise ValueError(f"metrics has {', '.join(taken)}, which is logged already: choose another name")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the weights of the judge and of the other metrics."""
        for model in self.models:
            model.load()
            model.requires_grad_(False)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting anew."""
        self._move_models(pl_module.device)
        self._metrics = {}

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
            if weights not in self._metrics:
                self._metrics[weights] = self._new_metrics(pl_module.device)
            self._update(self._metrics[weights], pl_module, images.float(), batch.prompts)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log and append to the file."""
        assert isinstance(pl_module, SRPOModule)
        step = pl_module.trained_steps
        for weights, metrics in self._metrics.items():
            values = self._compute(metrics)
            pl_module.log_dict({f"val/{weights}/{name}": value for name, value in values.items()}, logger=False)
            for logger in trainer.loggers:
                logger.log_metrics({f"val/{weights}/{k}": v for k, v in values.items()}, step)
            if trainer.is_global_zero:
                append_record(trainer.default_root_dir, {"step": step, "weights": weights, **values})
        # A moment of copying at each evaluation, for gigabytes of a device that training may need to the last.
        self._move_models(torch.device("cpu"))

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end  # type: ignore[assignment]  # as above
    on_test_epoch_end = on_validation_epoch_end

    @property
    def models(self) -> list[Reward]:
        """The judge and the other metrics."""
        return [self.judge, *self.scorers.values()]

    def _move_models(self, device: torch.device) -> None:
        for model in self.models:
            model.to(device)

    def _new_metrics(self, device: torch.device) -> dict[str, Metric]:
        means = ("reward", "judge", "prompt", f"top{self.top_k}", "saturation", *self.scorers)
        metrics: dict[str, Metric] = {name: MeanMetric() for name in means}
        if self.labels:
            metrics["share"] = LabelShare(len(self.labels))
        if isinstance(self.judge, ClipReward):
            metrics["diversity"] = Diversity(self.judge.num_features)
        return {name: metric.to(device) for name, metric in metrics.items()}

    def _update(self, metrics: dict[str, Metric], module: SRPOModule, images: Tensor, prompts: Sequence[str]) -> None:
        metrics["reward"].update(module.objective.score(module.reward, images, prompts))
        metrics["judge"].update(module.objective.score(self.judge, images, prompts))
        metrics["prompt"].update(self.judge(images, prompts))
        metrics["saturation"].update(saturation(images))
        for name, scorer in self.scorers.items():
            metrics[name].update(scorer(images, prompts))
        if self.labels:
            metrics["share"].update(self.judge.compare(images, self.labels))
        candidates = list(dict.fromkeys([*self.candidates, *prompts]))
        truth = torch.tensor([candidates.index(prompt) for prompt in prompts], device=images.device)
        hits = is_in_top(self.judge.compare(images, candidates), truth, self.top_k)
        metrics[f"top{self.top_k}"].update(hits.float())
        if isinstance(self.judge, ClipReward):
            metrics["diversity"].update(self.judge.image_features(images))

    def _compute(self, metrics: dict[str, Metric]) -> dict[str, float]:
        values: dict[str, float] = {}
        for name, metric in metrics.items():
            result = metric.compute()
            if name == "share":
                values |= {f"share/{label}": float(share) for label, share in zip(self.labels, result, strict=True)}
            else:
                values[name] = float(result)
        return values


def append_record(run_folder: str | Path, record: Record) -> None:
    """Add a line to the run's metrics file."""
    records.append(Path(run_folder) / FILE, record)


def read_records(run_folder: str | Path) -> list[Record]:
    """All lines of the run's metrics file, oldest first."""
    return records.read(Path(run_folder) / FILE)
