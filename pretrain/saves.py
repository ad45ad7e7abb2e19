"""The checkpoints of one life of a run: begun after an update, committed when every rank has written its share."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from pretrain import distributed
from pretrain.checkpoints.patience import Patience
from pretrain.checkpoints.saver import Saver
from pretrain.errors import ParlanceError, Requeue
from pretrain.loop import Progress
from pretrain.runs import Events
from pretrain.watch.console import Meter


class Saves:
    """What `saver` does, told in events.jsonl. Every rank has one; all but `writing` is collective.

    Args:
        reached: what the newest commit holds. background: write while training goes on.

    Attributes:
        meter: what updates have taken since the last save.
    """

    def __init__(self, saver: Saver, events: Events, reached: Progress, background: bool) -> None:
        self.saver, self.events, self.reached, self.background = saver, events, reached, background
        self.meter = Meter()
        self._begun = reached, self.meter  # what goes with the save that is not committed yet

    @property
    def writing(self) -> bool:
        """Whether this rank is not done with a save; where no rank says so, `commit` waits for nobody."""
        return self.saver.writing

    def begin(self, progress: Progress, content: dict[str, Any]) -> None:
        """Begins a checkpoint when the one before is committed; without `background` ends it, too.

        content: what the run wants back besides `progress`.
        """
        self.commit()
        self.saver.start(progress.step, {**progress.to_json(), **content})
        self._begun, self.meter = (progress, self.meter), Meter()
        if not self.background:
            self.commit()

    def commit(self) -> None:
        """Commits what was begun, if anything, and deletes what `train.keep` no longer covers."""
        saved = self.saver.finish()
        if saved is None:
            return
        self.reached, spent = self._begun
        times = {
            "seconds": spent.seconds,
            "wait_seconds": spent.wait_seconds,
            "save_seconds": saved.seconds,
            "write_seconds": saved.write_seconds,
            **({"paused_seconds": saved.paused_seconds} if saved.paused_seconds else {}),
        }
        told = {name: round(value, 3) for name, value in times.items()}
        self.saver.patience(lambda: distributed.rank_zero(lambda: self.events.add("save", saved.step, **told)))

    def back_to(self, reached: Progress) -> None:
        """Training goes on from the newest commit: what came after it counts no more."""
        self.reached, self.meter = reached, Meter()

    @contextmanager
    def patient(self, seconds: float, say: Callable[[str], None], stopped: Callable[[], bool]) -> Iterator[None]:
        """Inside, a full disk is waited for, and what was begun is committed where all ranks end together.

        say: prints a line, on rank 0. stopped: whether a signal has asked this rank to end.
        """

        def tell(line: str, paused: bool) -> None:
            if self.saver.world.rank == 0:
                with suppress(OSError):  # the console may be a file on that disk
                    say(line)
                with suppress(ParlanceError):
                    if paused:
                        self.events.add("pause", self.reached.step, message=line)

        self.saver.patience = Patience(seconds, tell, stopped)
        try:
            yield
        except Requeue:
            self.commit()
            raise
        except ParlanceError as error:
            if error.shared:
                self.saver.patience = Patience()
                with suppress(ParlanceError):  # the first error is told
                    self.commit()
            raise
