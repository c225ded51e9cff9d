"""Train a trial of a user's function in a process of its own: `python own_worker.py CHANNEL`.

This file imports nothing of this project, so that the user's modules may have any name. The first line of standard
input holds the trial as JSON. Each further line lets the function go on after a report; after the end of a trial of a
study with `reuse`, it holds the next trial. The end of standard input ends the process, because then the study is gone.
Messages go to the file descriptor CHANNEL, as lines of JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import importlib.util
import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

PDEATHSIG = 1  # PR_SET_PDEATHSIG of Linux
GROWN_MB, GROWN_SHARE = 64.0, 1.25  # memory that trials may leave behind before the process is replaced
LONGEST = 500  # letters of a message's reason
ROOT = Path(__file__).resolve().parents[2]  # of this project, which the user's code may import


class Infeasible(Exception):
    """The configuration cannot be trained: raised by the user's function as `trial.Infeasible`."""


class UnknownName(AttributeError):
    """The function reads a name that its trial does not have."""


class Refused(Exception):
    """The function breaks a rule of the protocol."""


class OwnTrial:
    """The argument of the user's function.

    Attributes:
        arm: Name of the arm.
        seed: Seed of the trial, the same for all arms.
        budget: Length of the trial in the study's unit.
        folder: Folder of this trial, for checkpoints and other files. It is removed when the trial has ended.
        test: True if the function has to return the test metric.
        Infeasible: Exception to raise if the configuration cannot be trained.
    """

    Infeasible = Infeasible

    def __init__(self, order: dict[str, Any], tell: Callable[..., None], wait: Callable[[], None]) -> None:
        self.arm, self.seed, self.budget, self.test = order["arm"], order["seed"], order["budget"], order["test"]
        self.folder = Path(order["folder"])
        self._values, self._metric, self._test_metric = order["values"], order["metric"], order["test_metric"]
        self._unit, self._tell, self._wait = order["unit"], tell, wait
        self._read: set[str] = set()
        self._reported, self._resident = 0, 0.0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in self._values:
            self._read.add(name)
            return self._values[name]
        known = [*self._values, "arm", "budget", "folder", "hf_callback", "report", "rng", "seed", "test"]
        near = get_close_matches(name, known, 1)
        hint = f"did you mean trial.{near[0]}? " if near else ""
        raise UnknownName(f"arm {self.arm} has no trial.{name}; {hint}it has {', '.join(known)}")

    def rng(self, name: str) -> Any:
        """Return a numpy Generator whose stream follows from the trial's seed and a name alone."""
        import numpy as np

        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        return np.random.default_rng(int.from_bytes(digest, "big"))

    def report(self, step: int, **metrics: float) -> None:
        """Report metrics after `step` units of the budget, the validation metric among them.

        Raises:
            Refused: The protocol does not allow this report.
            Infeasible: The validation metric is not finite.
        """
        if self._test_metric in metrics:
            raise Refused(
                f"trial.report got {self._test_metric}; the test metric is read once: return it if trial.test is true"
            )
        if self._metric not in metrics:
            raise Refused(f"trial.report got {', '.join(metrics) or 'nothing'}; the study needs {self._metric}")
        if not number("step", step).is_integer() or not self._reported < step <= self.budget:
            raise Refused(
                f"trial.report got step {step} after {self._reported}; a step is a whole number above the last one, "
                f"up to the budget of {self.budget} {self._unit}"
            )
        values = {name: number(name, value) for name, value in metrics.items()}
        if not math.isfinite(values[self._metric]):
            raise Infeasible(f"{self._metric} is {values[self._metric]:g} at step {int(step)}")
        if self._reported < self.budget / 2 <= step:
            self._resident = resident_mb()
        self._reported = int(step)
        self._tell(step=int(step), metrics=values)
        self._wait()

    def hf_callback(self, **names: str) -> Any:
        """Return a callback for transformers' Trainer that reports each of its evaluations.

        Args:
            names: For each metric to report, the Trainer's name of it, such as `val_loss="eval_loss"`.

        Raises:
            Refused: The validation metric is missing, or the Trainer cannot count the unit of the budget.
        """
        from transformers import TrainerCallback

        if self._metric not in names:
            raise Refused(f'hf_callback lacks the study\'s metric, such as hf_callback({self._metric}="eval_loss")')
        if self._unit not in HF_UNITS:
            raise Refused(f"hf_callback counts a budget in {', '.join(HF_UNITS)}; this one is in {self._unit}")
        return type("TrialCallback", (HfReports, TrainerCallback), {})(self, names)


HF_UNITS = ("steps", "epochs", "tokens", "seconds")


class HfReports:
    """Events of transformers' Trainer, as reports of a trial.

    Reported are the evaluations during the training, one per place in the budget. The end of the budget is evaluated
    whatever the Trainer's `eval_strategy` says. Evaluations of step 0, in the middle of an epoch of a budget in epochs,
    and those after the training, such as that of the test data, are no reports.
    """

    def __init__(self, trial: OwnTrial, names: dict[str, str]) -> None:
        self._trial, self._names = trial, names
        self._training, self._began, self._aside = False, 0.0, 0.0
        self._found: dict[str, float] = {}
        self._found_at, self._last_keys = 0, "none"

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Refuse a Trainer of another length than the budget: its learning rates would follow another schedule."""
        budget, unit = self._trial.budget, self._trial._unit
        wanted = "max_steps" if unit == "steps" else "num_train_epochs"
        planned = state.max_steps if unit == "steps" else "max_steps" if args.max_steps > 0 else args.num_train_epochs
        if unit in ("steps", "epochs") and planned != budget:
            raise Refused(
                f"the Trainer's length is {planned} and the budget {budget} {unit}: "
                f"TrainingArguments({wanted}=trial.budget)"
            )
        if unit == "tokens" and args.include_num_input_tokens_seen in (False, "no"):
            raise Refused("the Trainer counts no tokens: TrainingArguments(include_num_input_tokens_seen=True)")
        self._training, self._began, self._aside = True, time.monotonic(), 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """End the training with a budget in tokens or seconds."""
        if self._trial._unit in ("tokens", "seconds") and self._spent(state) >= self._trial.budget:
            control.should_training_stop = True
        if args.eval_strategy != "epoch":
            self._evaluate_the_end(control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Evaluate the end of the training."""
        self._evaluate_the_end(control)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **others: Any) -> None:
        """Report the metrics if all of them are known at this place. Several data sets come one after the other."""
        self._aside += sum(value for name, value in metrics.items() if name.endswith("_runtime"))
        at = self._place(state)
        if not self._training or not at or not state.is_world_process_zero:
            return
        if at != self._found_at:
            self._found, self._found_at = {}, at
        self._last_keys = ", ".join(metrics)
        self._found |= {ours: metrics[theirs] for ours, theirs in self._names.items() if theirs in metrics}
        if len(self._found) == len(self._names) and at > self._trial._reported:
            began = time.monotonic()
            self._trial.report(at, **self._found)
            self._aside += time.monotonic() - began

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Refuse a training without any report."""
        self._training = False
        if not self._trial._reported and state.is_world_process_zero:
            asked = ", ".join(self._names.values())
            raise Refused(
                f"hf_callback: no evaluation of the Trainer had {asked}; the last one had {self._last_keys}; "
                "TrainingArguments(label_names=[...]) names the model's labels, without which it has no eval_loss"
            )

    def _evaluate_the_end(self, control: Any) -> None:
        if control.should_training_stop and self._trial._reported < self._trial.budget:
            control.should_evaluate = True

    def _spent(self, state: Any) -> float:
        """Return the part of the budget that is spent. Evaluations and reports take none of a budget in seconds."""
        if self._trial._unit == "seconds":
            return time.monotonic() - self._began - self._aside
        name = {"steps": "global_step", "epochs": "epoch", "tokens": "num_input_tokens_seen"}[self._trial._unit]
        return float(getattr(state, name))

    def _place(self, state: Any) -> int:
        """Return the place of an evaluation in the budget, as a whole number; 0 if it has none."""
        spent = self._spent(state)
        if self._trial._unit != "epochs":
            return min(int(spent), self._trial.budget)
        of_one_step = state.num_train_epochs / max(state.max_steps, 1)
        return round(spent) if abs(spent - round(spent)) < of_one_step / 2 else 0


def number(name: str, value: Any) -> float:
    """Return a metric as a float. Numbers of numpy and tensors of one element are taken. Raises Refused."""
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise Refused(f"{name} is {value!r}, which is no number") from error


def function_of(file: str, name: str) -> Callable[[OwnTrial], Any]:
    """Load the user's file and return its function. Raises Refused if it has none of that name."""
    sys.path.insert(0, str(Path(file).parent))
    sys.path.append(str(ROOT))
    module_name = Path(file).stem
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    found = getattr(module, name, None)
    if not callable(found):
        near = get_close_matches(name, [key for key, value in vars(module).items() if callable(value)], 1)
        raise Refused(f"{Path(file).name} has no function {name}" + (f"; did you mean {near[0]}?" if near else ""))
    return found


def returned(trial: OwnTrial, found: Any, tested: str) -> dict[str, float]:
    """Return the numbers that the function returned, checked. Raises Refused or Infeasible."""
    if found is not None and not isinstance(found, dict):
        raise Refused(f"the function returned {type(found).__name__}; it returns a dict of metrics, or nothing")
    values = {str(name): number(str(name), value) for name, value in (found or {}).items()}
    if trial._reported != trial.budget:
        raise Refused(
            f"the last report was at step {trial._reported} of {trial.budget} {trial._unit}: report the end of the "
            "whole budget"
        )
    if tested in values and not trial.test:
        raise Refused(f"the function returned {tested} although trial.test is false; the test data is read once")
    if trial.test and tested not in values:
        raise Refused(f"the function did not return {tested} although trial.test is true")
    if trial.test and not math.isfinite(values[tested]):
        raise Infeasible(f"{tested} is {values[tested]:g}")
    return values


def place(error: BaseException, folder: str) -> str:
    """Return the last line of the user's files in a traceback, as `FILE.py, line N`; "" if there is none."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(folder)]
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""


def out_of_memory(error: BaseException) -> bool:
    """Check if an error says that memory is short, of the machine or of a GPU."""
    return isinstance(error, MemoryError) or type(error).__name__ in ("OutOfMemoryError", "XlaRuntimeError")


def end_with_parent() -> None:
    """Ask Linux to kill this process if its parent ends, however it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PDEATHSIG, signal.SIGKILL)


def peak_mb() -> float:
    """Return the peak resident memory of this process in MiB."""
    if sys.platform == "linux":  # getrusage there includes the memory of the process that started this one
        return status_mb("VmHWM")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)


def resident_mb() -> float:
    """Return the resident memory of this process in MiB; 0 if the system does not tell."""
    return status_mb("VmRSS") if sys.platform == "linux" else 0.0


def status_mb(key: str, process: int | str = "self") -> float:
    """Return a size of a process from Linux in MiB. Raises OSError or StopIteration if the process has ended."""
    status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    return next(float(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith(key))


class Worker:
    """A process that trains trials of one function, one after the other."""

    def __init__(self, channel: int) -> None:
        self._channel, self._home = channel, os.getcwd()
        self._function: Callable[[OwnTrial], Any] | None = None
        self._first = 0.0  # resident memory after the first trial, in MiB

    def tell(self, **message: Any) -> None:
        """Send a message to the study."""
        os.write(self._channel, (json.dumps(message) + "\n").encode())

    def serve(self, order: dict[str, Any]) -> bool:
        """Train a trial and tell its end. Return True if this process may train another one."""
        if order["reuse"]:
            _start_anew(order["output"], self._home)
        trial = OwnTrial(order, self.tell, _wait)
        folder = str(Path(order["file"]).parent)
        try:
            self._function = self._function or function_of(order["file"], order["name"])
            values = returned(trial, self._function(trial), order["test_metric"])
            trial._tell = trial._wait = _ended
            grown, peak = max(0.0, resident_mb() - trial._resident), peak_mb()
            again = order["reuse"] and self._is_clean()
            self.tell(returned=values, read=sorted(trial._read), peak=peak, grown=grown, again=again)
            return again
        except Infeasible as error:
            self.tell(infeasible=str(error)[:LONGEST] or "trial.Infeasible was raised")
        except (Refused, UnknownName) as error:
            self.tell(failed=f"{error}{place(error, folder)}"[:LONGEST])
        except BaseException as error:  # noqa: BLE001 (the user's code may raise anything; only its trial fails)
            traceback.print_exc()
            said = f"{type(error).__name__}: {error}".strip().splitlines()[0][:LONGEST] + place(error, folder)
            self.tell(**{"infeasible" if out_of_memory(error) else "failed": said})
        return False

    def _is_clean(self) -> bool:
        """Return True if the trial left no process behind, and memory has not grown since the first one."""
        gc.collect()
        now = resident_mb()
        self._first = self._first or now
        grows = now - self._first > GROWN_MB and now > GROWN_SHARE * self._first
        children = [path for path in Path("/proc/self/task").glob("*/children") if path.read_text().strip()]
        return not grows and not children


def _start_anew(output: str, home: str) -> None:
    """Give a trial its own output file, the working directory, and its own peak of memory."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    file = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    os.chdir(home)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a kernel without it: the peak is that of all trials
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _wait() -> None:
    """Wait until the study lets the trial go on."""
    if not sys.stdin.readline():
        os._exit(1)  # the study is gone


def _ended(**message: Any) -> None:
    raise Refused("trial.report was called after its trial had ended")


def main(channel: int) -> None:
    """Train the trials of standard input, as long as this process may be used again."""
    end_with_parent()
    os.set_inheritable(channel, False)
    worker = Worker(channel)
    while (line := sys.stdin.readline()) and worker.serve(json.loads(line)):
        pass


if __name__ == "__main__":
    main(int(sys.argv[1]))
