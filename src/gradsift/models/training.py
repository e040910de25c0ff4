"""Training of LoRA adapters with AdamW through the HF Trainer: warm-up, fine-tuning, the demo."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from accelerate.data_loader import prepare_data_loader
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from gradsift.data.encoding import Encoded
from gradsift.errors import NumericsError
from gradsift.models.batches import device_of, group_examples, lengths_of, make_batches
from gradsift.models.devices import PlacedArguments, kept_in_place
from gradsift.models.losses import label_logits, token_losses
from gradsift.models.micro_batches import MicroBatches
from gradsift.models.tracking import NOWHERE, Trackers
from gradsift.progress import track

logger = logging.getLogger(__name__)

# of losses in float16: from PyTorch's own, 65,536, a short training would skip every step
_FIRST_SCALE = 1024.0
_USUALLY_SKIPPED = 0.1  # of a training's steps, until that scale is right


@runtime_checkable
class TrainingSettings(Protocol):
    """What a training needs to know, in whichever section of the settings it stands."""

    learning_rate: float
    batch_size: int
    micro_batch_tokens: int | Literal["auto"]
    gradient_checkpointing: bool | Literal["auto"]
    warmup_ratio: float
    weight_decay: float


def steps_per_epoch(num_examples: int, settings: TrainingSettings) -> int:
    """Return the optimizer steps in which every example is seen once."""
    return math.ceil(num_examples / settings.batch_size)


def train(  # noqa: PLR0913
    model: nn.Module,
    examples: Sequence[Encoded],
    settings: TrainingSettings,
    *,
    steps: int,
    seed: int,
    on_epoch: Callable[[int, float, torch.optim.Optimizer], None] = lambda *_: None,
    label: str = "warm-up",
    progress: bool = True,
    trackers: Trackers = NOWHERE,
) -> list[dict[str, int | float]]:
    """Train what requires a gradient with AdamW, linear warm-up and cosine decay; return the log.

    For `steps` optimizer steps; the examples are shuffled anew whenever all have been seen.
    `on_epoch` gets the number of each finished epoch, its mean learning rate and the optimizer.
    Of processes that train together each takes its share of every optimizer step's examples, and
    calls `on_epoch` for itself. `trackers`: where losses and rates are logged besides.

    Raises:
        ModelError: If one example does not fit in memory, or the model has been moved to another
            device.
        NumericsError: If the loss or its gradient stops being finite, or every step was skipped.
    """
    tracked = track(label, steps, "steps") if progress else nullcontext(lambda done: None)
    with tempfile.TemporaryDirectory() as scratch, tracked as advance, kept_in_place(model):
        watcher = _Watcher(on_epoch, advance, label)
        trainer = _Trainer(
            model=model,  # type: ignore[arg-type]
            args=_arguments(settings, model, steps, seed, trackers.arguments(scratch)),
            train_dataset=list(examples),  # type: ignore[arg-type]
            data_collator=lambda batch: {"examples": batch},
            callbacks=[watcher],
        )
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        if (scaler := trainer.accelerator.scaler) is not None:
            scaler.load_state_dict(scaler.state_dict() | {"scale": _FIRST_SCALE})
        fitting = settings.micro_batch_tokens, settings.gradient_checkpointing
        with MicroBatches(model, *fitting, trainer.accelerator.num_processes) as fits:
            trainer.micro_batches = fits
            trainer.train()
        trackers.finish()
        # mixed precision is wrapped around the forward pass; measuring is to be without
        trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    if trainer.args.fp16:
        _check_skipped(trainer.optimizer, steps, label)  # type: ignore[arg-type]
    return watcher.log


def _check_skipped(optimizer: torch.optim.Optimizer, steps: int, label: str) -> None:
    """Tell how much of a training in float16 was lost; a few steps at its start always may be."""
    # AdamW's own count: accelerate's `step_was_skipped` knows nothing of the fused one
    made = max((int(state["step"]) for state in optimizer.state.values()), default=0)
    if made == steps:
        return
    found = (
        f"{label}: {steps - made} of {steps} optimizer steps were skipped, as their gradients were "
        "not finite in float16"
    )
    advice = "use model.dtype=bfloat16 or float32"
    if made == 0:
        raise NumericsError(f"{found}: nothing was learned; {advice}, or more steps")
    level = logging.WARNING if steps - made > _USUALLY_SKIPPED * steps else logging.INFO
    logger.log(level, "%s; %s", found, advice)


def _arguments(
    settings: TrainingSettings, model: nn.Module, steps: int, seed: int, tracked: dict[str, Any]
) -> PlacedArguments:
    device = device_of(model)
    dtype = next(p for p in model.parameters() if p.is_floating_point()).dtype
    return PlacedArguments(
        device,
        per_device_train_batch_size=settings.batch_size,
        max_steps=steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        # rounded down: as a ratio it is rounded up, and a warm-up of one step learns nothing
        warmup_steps=int(settings.warmup_ratio * steps),
        weight_decay=settings.weight_decay,
        bf16=device.type == "cuda" and dtype == torch.bfloat16,
        fp16=device.type == "cuda" and dtype == torch.float16,
        use_cpu=device.type == "cpu",
        seed=seed,
        save_strategy="no",
        logging_steps=1,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,  # every block has its part in every loss
        disable_tqdm=True,
        **tracked,
    )


class _Trainer(Trainer):
    """The HF Trainer, but for how an optimizer step's examples go through the model.

    Examples of like length share a forward pass, and logits are formed only where there is a label.
    Of processes that train together each has all examples of a step and takes an equal share.
    The loss is what it always is: the mean over all supervised tokens of the step.
    """

    micro_batches: MicroBatches

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the whole batches of optimizer steps, in the order that a single process has."""
        loader = DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_size=self._train_batch_size,
            sampler=self._get_train_sampler(),
            collate_fn=self.data_collator,
        )
        return prepare_data_loader(
            loader, num_processes=1, process_index=0, use_seedable_sampler=True
        )

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Backpropagate the loss of one optimizer step and return it."""
        model.train()
        examples: list[Encoded] = inputs["examples"]
        num_labels = sum(int(example.supervised.sum()) for example in examples)
        # gradients and losses are averaged over the processes
        weight = self.accelerator.num_processes / num_labels
        own = examples[self.accelerator.process_index :: self.accelerator.num_processes]
        if not own:  # it takes part all the same: the others wait for its gradients
            own, weight = examples[:1], 0.0
        if self.micro_batches.untried:
            self._try_worst(model)
        return self.micro_batches.fit(
            lambda max_tokens: self._backpropagate(model, own, weight, max_tokens), lengths_of(own)
        )

    def _try_worst(self, model: nn.Module) -> None:
        """Find out what fits, each process for itself: the model without what joins them."""
        alone = getattr(model, "module", model)
        examples: Sequence[Encoded] = self.train_dataset  # type: ignore[assignment]
        self.micro_batches.try_worst(
            lambda worst, max_tokens: self._backpropagate(alone, worst, 0.0, max_tokens),
            int(lengths_of(examples).max()),
            math.ceil(self._train_batch_size / self.accelerator.num_processes),
        )

    def _backpropagate(
        self, model: nn.Module, examples: Sequence[Encoded], weight: float, max_tokens: int
    ) -> Tensor:
        """Add up the gradients of these examples, their labels weighted; return the loss."""
        device = device_of(model)
        groups = group_examples(model, examples, max_tokens)
        total = torch.zeros((), device=device)
        with closing(make_batches(model, examples, groups)) as batches:
            for number, batch in enumerate(batches, start=1):
                last = number == len(groups)
                with nullcontext() if last else self.accelerator.no_sync(model):
                    with self.compute_loss_context_manager():
                        logits = label_logits(model, batch)
                        loss = token_losses(logits, batch.labels).sum() * weight
                    self.accelerator.backward(loss)
                total += loss.detach()
        return total


class _Watcher(TrainerCallback):
    """Follow the Trainer: progress, learning rates, finite losses, the end of each epoch."""

    def __init__(
        self,
        on_epoch: Callable[[int, float, torch.optim.Optimizer], None],
        advance: Callable[[int], None],
        label: str,
    ) -> None:
        self._label = label
        self._on_epoch = on_epoch
        self._advance = advance
        self._rates: list[float] = []
        self._epoch = 0
        self.log: list[dict[str, int | float]] = []

    def on_step_begin(self, *_: Any, lr_scheduler: Any, **__: Any) -> None:
        self._rates.append(lr_scheduler.get_last_lr()[0])

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._advance(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" not in logs:
            return
        # in float16 the scaler skips steps whose gradient overflows, until its scale is right
        for name in ("loss",) if args.fp16 else ("loss", "grad_norm"):
            if not math.isfinite(float(logs.get(name, 0))):
                raise NumericsError(
                    f"the {name.replace('_', ' ')} of the {self._label} is {logs[name]} at step "
                    f"{state.global_step}; lower its learning_rate, or use model.dtype=float32"
                )
        entry = {"step": state.global_step, "loss": float(logs["loss"])}
        self.log.append(entry | {"learning_rate": self._rates[-1]})

    def on_epoch_end(self, *_: Any, optimizer: Any, **__: Any) -> None:
        self._epoch += 1
        mean = sum(self._rates) / len(self._rates)
        self._rates = []
        self._on_epoch(self._epoch, mean, getattr(optimizer, "optimizer", optimizer))


def optimizer_state(
    model: PreTrainedModel | nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Return Adam's moments by parameter: `NAME.exp_avg`, `NAME.exp_avg_sq`, `NAME.step`.

    Names are those of the tensors in the adapter's own file.
    """
    names: dict[Tensor, str] = {
        p: name.replace(".default.", ".") for name, p in model.named_parameters()
    }
    return {
        f"{names[parameter]}.{key}": torch.as_tensor(value).detach().cpu().contiguous()
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }
