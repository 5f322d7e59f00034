"""The training loop: epochs of steps, saving and sampling as asked, and once at the end."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping

from hunyuan_model.runtime.compilation import CompileWatch
from hunyuan_model.runtime.memory_report import advice, explain_batch_out_of_memory
from networks.network_module import call_if_there
from networks.training.data import StepBatches
from networks.training.dry_step import dry_step, wants_dry_step
from networks.training.logging.loss_log import LossLog
from networks.training.optim.optimizers import learning_rates, set_optimizer_mode
from networks.training.pause import paused_training
from networks.training.report.record import Status
from networks.training.requests import Request, TrainingRequests
from networks.training.run import (
    Training,
    TrainingBroken,
    end_report,
    require_finite_weights,
    rotate,
    save,
    save_for_error,
    save_for_signal,
    save_model,
    save_training_state,
    say_how_to_go_on,
    write_report,
)
from networks.training.saving.files import epoch_name, final_name, step_name
from networks.training.step import Step, require_some_made, train_step
from utils.errors import ANOTHER_ENDED, STATUS_FAILED, STATUS_INTERRUPTED, first_line
from utils.free_memory import SpillWatch
from utils.output import show
from utils.processes.launcher import says_that_another_ended
from utils.processes.watchdog import OTHERS, STEP
from utils.progress import ProgressBar

logger = logging.getLogger("train")


def run_training(training: Training) -> int:
    """Train to the end, or until asked to stop; say how to go on. Returns the exit status.

    Raises:
        UserError: memory, a cache file or the disk does not suffice.
    """
    try:
        status = train(training)
    except TrainingBroken as error:
        end_report(training, Status.FAILED, str(error))
        say_how_to_go_on(training)
        show(f"error: {error}", error=True)
        return STATUS_FAILED
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | SystemExit)
        end_report(training, *((Status.STOPPED, "A signal ended it at once.") if stopped else (Status.FAILED, first_line(error))))
        say_how_to_go_on(training)
        raise
    end_report(training, *_ending(training, status))
    if training.uploads is not None:
        with training.watchdog, training.watchdog.during("uploading"):
            training.uploads.finish()
    say_how_to_go_on(training)
    return status


def _ending(training: Training, status: int) -> tuple[Status, str]:
    """How a training ended that returned ``status``, and why."""
    if status == 0 and training.progress.step >= training.plan.steps:
        return Status.FINISHED, ""
    reasons = {0: "The file save_and_stop in the output folder stopped it.", STATUS_INTERRUPTED: "Ctrl-C (SIGINT) stopped it."}
    return Status.STOPPED, reasons.get(status, "SIGTERM or SIGHUP stopped it, as a cluster or a closed terminal sends them.")


def train(training: Training) -> int:
    """The loop itself. What was trained is saved also where it fails."""
    settings, progress = training.settings, training.progress
    training.network.train()
    set_optimizer_mode(training.optimizer, training=True)
    loss_log = LossLog(settings.logs.loss_log if training.accelerator.is_main_process else None, progress.step)
    requests, spilling = TrainingRequests(settings.saving.folder, training.accelerator), SpillWatch(training.accelerator.device)
    shown = training.accelerator.is_local_main_process
    bar = ProgressBar(total=training.plan.steps, initial=progress.step, desc="training", unit="step", disable=not shown)
    with loss_log, requests, bar, training.watchdog:
        try:
            return train_steps(training, requests, loss_log, bar, spilling)
        except Exception as error:
            save_for_error(training, error)
            if requests.answered or not requests.signalled:
                raise
            reason = ANOTHER_ENDED if says_that_another_ended(error) else first_line(error)
            logger.warning("%s", reason)  # such as of processes that read: the signal reached them, too
            return requests.received.status
        finally:
            training.data.reader.close()  # while signals wait


def train_steps(training: Training, requests: TrainingRequests, loss_log: LossLog, bar: ProgressBar, spilling: SpillWatch) -> int:
    """Every step, and what is saved at the end."""
    settings, progress = training.settings, training.progress
    training.first_step = progress.step
    training.keep_place()
    write_report(training)
    if wants_dry_step(settings.loop.dry_step, training.accelerator.device):
        compiling = CompileWatch()
        dry_step(training, training.data.largest.load())
        compiling.report("the dry step")
    if progress.step == 0:
        make_samples(training, requests, progress.epoch)
    while progress.step < training.plan.steps:
        request = train_epoch(training, requests, loss_log, bar, spilling)
        if request.stops:
            if training.accelerator.is_main_process:
                logger.info("stopped after step %d of %d", progress.step, training.plan.steps)
            return request.status
    require_finite_weights(training)
    require_some_made(training, None)
    if settings.saving.state_at_end:  # before the model, whose presence says that everything is done
        save_training_state(training, final_name(training.name))
    save_model(training, final_name(training.name), progress.epoch, at_end=True)
    make_samples(training, requests, progress.epoch, epoch_ended=progress.batches == len(training.data.reader))
    return 0


def train_epoch(
    training: Training, requests: TrainingRequests, loss_log: LossLog, bar: ProgressBar, spilling: SpillWatch
) -> Request:
    """The rest of the current epoch, up to the last step of the training; returns early with a request to stop."""
    progress, saving, name = training.progress, training.settings.saving, training.name
    epoch = progress.epoch
    if progress.batches == 0:
        training.flow_matching.timesteps.begin_epoch()
        progress.batches_per_step = training.data.reader.batches_per_step
    call_if_there(training.network, "on_epoch_start", None, training.transformer)
    steps = training.data.reader.epoch(epoch - 1, progress.batches, progress.batches_per_step)
    started = time.monotonic()
    for batches in watched(training, steps):
        rates = learning_rates(training.optimizer, training.group_names)  # of this step: the schedule moves on within it
        compiling = CompileWatch()
        watch = training.watchdog.during(STEP, lambda: str(progress.step + 1))
        with watch, explain_batch_out_of_memory(training.plan.memory, [*batches.own.values()], "training on"):
            step = train_step(training, batches)
        seconds = time.monotonic() - started
        progress.step, progress.batches = progress.step + 1, progress.batches + len(batches.shapes)
        progress.skipped = 0 if step.skipped is None else progress.skipped + 1
        if step.skipped is None:
            progress.losses = [*progress.losses, step.loss][-training.data.steps_per_epoch :]
        training.keep_place()
        compiling.report(f"step {progress.step}")
        if slow := spilling.after_step(seconds, tuple(batch["latents"].shape for batch in batches.own.values())):
            logger.warning("step %d: %s. Close other programs, or %s.", progress.step, slow, advice(training.plan.memory))
        require_some_made(training, step.skipped)
        log_step(training, step, rates, seconds, loss_log, bar)
        if progress.step == training.plan.steps:
            return Request.NOTHING
        request, due = poll(training, requests), saving.due_after_step(progress.step)
        if due or request in (Request.SAVE, Request.SAVE_AND_STOP):
            asked = request is not Request.NOTHING
            save(training, step_name(name, progress.step), epoch, saving.save_state or asked)
            if due:
                rotate(training, step=progress.step)
        elif request.is_signal:
            save_for_signal(training, step_name(name, progress.step), epoch)
        if request.stops:
            return request
        if progress.batches < len(training.data.reader):
            make_samples(training, requests, epoch)
        started = time.monotonic()
    progress.epoch, progress.batches = epoch + 1, 0
    if saving.due_after_epoch(epoch):
        save(training, epoch_name(name, epoch), epoch, saving.save_state)
        rotate(training, epoch=epoch)
    make_samples(training, requests, epoch, epoch_ended=True)
    return Request.NOTHING


def watched(training: Training, steps: Iterator[StepBatches]) -> Iterator[StepBatches]:
    """The same steps; the watchdog knows which batch is waited for."""
    while True:
        with training.watchdog.during("reading", training.data.reader.due):
            batches = next(steps, None)
        if batches is None:
            return
        yield batches


def log_step(
    training: Training, step: Step, rates: Mapping[str, float], seconds: float, loss_log: LossLog, bar: ProgressBar
) -> None:
    """Show and log the step that was just made, with the validation loss where it is due."""
    progress = training.progress
    average = sum(progress.losses) / max(1, len(progress.losses))
    bar.set_postfix(loss=f"{step.loss:.4f}", average=f"{average:.4f}")
    bar.update()
    validation_loss = measure_validation_loss(training)
    if validation_loss is not None:
        logger.info("step %d: validation loss %.6g", progress.step, validation_loss)
    loss_log.write(progress.step, progress.epoch, step.loss, average, next(iter(rates.values()), None), validation_loss)
    training.logs.step(
        progress.step,
        loss=step.loss,
        average=average,
        rates=rates,
        gradient_norm=step.gradient_norm,
        seconds=seconds,
        validation_loss=validation_loss,
    )


def measure_validation_loss(training: Training) -> float | None:
    """The loss on what was held out, where it is due after the step that was just made; the training stays as it is."""
    progress, every = training.progress, training.settings.loop.validate_every_n_steps
    due = progress.step % every == 0 if every else progress.batches == len(training.data.reader)
    if not training.data.held_out or not (due or progress.step == training.plan.steps):
        return None
    paused = paused_training(training.transformer, training.network, training.optimizer, training.accelerator.device)
    with paused, training.watchdog.during("measuring the validation loss"):
        return training.flow_matching.validation_loss(
            training.data.held_out, together=training.plan.memory.runtime.sharding is not None
        )


def poll(training: Training, requests: TrainingRequests) -> Request:
    """What is asked of all processes."""
    with training.watchdog.during(OTHERS):
        return requests.poll()


def make_samples(training: Training, requests: TrainingRequests, epoch: int, epoch_ended: bool = False) -> None:
    """Make samples if they are due after this step; a signal to stop gives them up."""

    def stop() -> bool:
        training.watchdog.progress()
        return requests.signalled

    with training.watchdog.during("making samples"):
        saved = training.samples.sample_if_due(
            training.transformer,
            training.network,
            training.optimizer,
            training.plan.model.precision.base,
            step=training.progress.step,
            epoch=epoch,
            epoch_ended=epoch_ended,
            stop=stop,
        )
        training.logs.samples(saved, training.progress.step)
    if saved:
        write_report(training)
