"""Backend that uses Ray Tune, on this machine or on a cluster.

One experiment of Ray Tune serves all stages, so that actors start only once. Its search algorithm returns the cells of
the stages. Its scheduler asks the stages which trials to stop. Ray's own state is never read again, because the ledger
is the source of truth.
"""

from __future__ import annotations

import functools
import inspect
import logging
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

from pagating.hardware import usable_cores
from tune.backend.cluster import WAIT_SECONDS, Capacity, ask_for, driver_node
from tune.backend.preflight import check_granted, check_limits, check_loopback, local_slots
from tune.backend.ray_private import kill_processes
from tune.backend.ray_start import started
from tune.backend.ray_watch import OWN_UNREACHED_SECONDS, UNREACHED_SECONDS, OwnRay, RayWatch, Reach, Waiting
from tune.errors import StudyStopped
from tune.run.study_run import StudyRun
from tune.study.addresses import ADDRESS
from tune.study.sizes import side_by_side
from tune.study.study import Study
from tune.subject.function import Function
from tune.subject.gpt2 import Gpt2

LOCAL_WAIT_SECONDS = 600.0  # longest wait for a worker of this machine's Ray


class RayBackend:
    """Backend that trains cells as trials of Ray Tune.

    Args:
        slots: Number of trials that run in parallel. None means as many as fit on the cores.
        address: Address of a running Ray cluster, see `tune.backend.cluster`. None starts Ray on this machine.
        trainable: Tune trainable that trains a cell. None means `tune.backend.ray_trial.CellTrainable`. A simulated
            one serves to measure the cost of everything else.
        warn: Called with each warning for the user, one line each.
        say: Called with each line on a wait that lasts, and at its end.
        again: Called if Ray is lost, with the reason and the run. It may replace this process by one that continues the
            study. None, or a return, ends the study.
    """

    def __init__(
        self,
        slots: int | None = None,
        address: str | None = None,
        trainable: Any = None,
        warn: Callable[[str], None] | None = None,
        say: Callable[[str], None] | None = None,
        again: Callable[[str, StudyRun], None] | None = None,
    ) -> None:
        self._slots, self._address, self._trainable, self._again = slots, address, trainable, again
        self._warn, self._say = warn or (lambda line: None), say or (lambda line: None)
        self._until = ExitStack()
        self._started = False

    @property
    def slots(self) -> int:
        """Number of trials that run in parallel, as far as it is known before the start."""
        return self._slots or max(1, int(usable_cores()))

    def check(self, study: Study) -> None:
        """Check that this machine can run Ray and the study's trials. A cluster is checked when it is joined.

        Raises:
            StudyError: A trial asks for more than this machine has.
            StudyStopped: A limit of this machine keeps Ray from starting.
        """
        import ray

        if not self._address and not ray.is_initialized():
            check_granted(study, self._slots)
            check_limits(self._slots or local_slots(study))
            check_loopback()

    def start(self, study: Study, beside: Callable[[], None] = lambda: None) -> None:
        """Start Ray or join the cluster, and call `beside` meanwhile. A second call does nothing.

        Args:
            study: The study.
            beside: Function that takes seconds too, such as counting parameters. Its errors are raised here.

        Raises:
            StudyStopped: Ray did not start.
            StudyError: The cluster cannot be used.
        """
        if not self._started:
            self.check(study)
            self._started = True
            loads = self._trainable is None

            def meanwhile() -> None:
                beside()
                import ray.tune  # noqa: F401 (takes a second, which `train` then need not wait for)

            ray = started(self._slots, study, self._address, self._warn, self._say, meanwhile, loads)
            self._until.enter_context(ray)

    def stop(self) -> None:
        """Stop the Ray that was started, or leave the cluster."""
        self._until.close()

    def train(self, run: StudyRun) -> None:
        """Train every missing cell. Return if none is left or if interrupted.

        Raises:
            StudyStopped: The study cannot continue.
        """
        import ray
        from ray import tune as ray_tune

        from tune.backend.ray_adapters import Cells, Records, Session, StopWithinArm, WhenAsked
        from tune.backend.ray_private import REMOTE, stage_files_in
        from tune.backend.ray_trial import CellTrainable

        logs = run.folder / "logs"
        logs.mkdir(exist_ok=True)
        _log_to(logs / "ray.log", "ray")
        resources, address = run.study.resources, self._address
        with tempfile.TemporaryDirectory(prefix="pagating-ray-") as scratch:
            if address and not driver_node():
                stage_files_in(scratch)
            slots = Capacity(self._slots, resources.cpus, resources.gpus, ray.nodes)
            own = self._trainable is None
            run.begin(slots(), sees_models=own and (not address or bool(run.study.storage)))
            watch = RayWatch(self._ended(), functools.partial(self._lost, run))
            session = Session(
                run,
                slots,
                Waiting(WAIT_SECONDS if address else LOCAL_WAIT_SECONDS, self._say),
                functools.partial(_request_slots, run.study, self._slots) if address else None,
                idle=0 if address else run.slots,  # an idle node of a cluster may be released
            )
            trainable = self._trainable or CellTrainable
            trainable = _delivered(trainable, run) if address else trainable
            needs = {"cpu": resources.cpus, **({"gpu": resources.gpus} if resources.gpus else {})}
            with run.interruption.orderly() if run.interruption else nullcontext(), watch:
                try:
                    ray_tune.run(
                        trainable,
                        name="ray",
                        resources_per_trial=needs,
                        search_alg=Cells(session),
                        scheduler=StopWithinArm(session),
                        num_samples=-1,
                        reuse_actors=True,
                        trial_dirname_creator=lambda trial: trial.trial_id,
                        storage_path=scratch,  # Ray's own state is never read
                        verbose=0,
                        callbacks=[Records(session)],
                        stop=WhenAsked(session),
                        log_to_file=False,
                        checkpoint_config=ray_tune.CheckpointConfig(checkpoint_at_end=False),
                        raise_on_failed_trial=False,
                        **REMOTE,
                    )
                except Exception as error:
                    if run.fatal is None and not watch.look():
                        logging.getLogger("ray").exception("Ray Tune stopped with an error")
                        cause = (str(error).strip() or type(error).__name__).splitlines()[-1]
                        raise StudyStopped(f"Ray Tune stopped with an error: {cause}; see {logs}") from error
        run.raise_if_fatal()

    def _ended(self) -> Callable[[], list[str]]:
        """Return the function that tells what of Ray has ended: its processes, or a cluster's server."""
        import ray

        if not self._address:
            own = OwnRay()
            server = Reach("Ray's server (gcs_server)", ray.get_runtime_context().gcs_address, OWN_UNREACHED_SECONDS)
            return lambda: own() or server()
        match = ADDRESS.fullmatch(self._address)
        place = f"{match['host']}:{match['port']}" if match and match["host"] else ray.get_runtime_context().gcs_address
        return Reach(f"the cluster at '{self._address}'", place, UNREACHED_SECONDS)

    def _lost(self, run: StudyRun, reason: str) -> None:
        """End or restart a study whose Ray is lost. Called in the watcher's thread."""
        if run.stopping:
            return
        kill_processes()
        if self._again and not self._address:
            self._again(reason, run)
        error = StudyStopped(f"{reason}; what has ended is kept, and the same command continues from there")
        run.warn(str(error))  # the main thread may be blocked
        run.give_up(error)


def _log_to(path: Path, library: str) -> None:
    """Send a library's log to a file instead of the terminal."""
    logger = logging.getLogger(library)
    logger.handlers = [logging.FileHandler(path)]
    logger.propagate = False


def _request_slots(study: Study, slots: int | None, stage: str) -> None:
    """Request as many slots as the stage can use from the cluster, at most `slots`."""
    most = side_by_side(study, stage)
    ask_for(study, min(slots, most) if slots else most)


def _delivered(trainable: Any, run: StudyRun) -> Any:
    """Return the trainable with a parcel of the study's inputs. One that takes no parcel is returned unchanged."""
    from ray import tune as ray_tune

    from tune.backend.delivery import OwnParcel, Parcel, pack, pack_own

    if "parcel" not in inspect.signature(trainable.setup).parameters:
        return trainable
    storage = Path(run.study.storage) if run.study.storage else None
    parcel: Parcel | OwnParcel
    if isinstance(run.subject, Gpt2):
        parcel = pack(run.subject.inputs, storage, driver_node())
    elif isinstance(run.subject, Function):
        parcel = pack_own(run.subject, storage, driver_node())
    else:
        return trainable
    return ray_tune.with_parameters(trainable, parcel=parcel)
