"""Monitoring of pre-training: held-out retrieval and nearest neighbours, measured during the run."""

from collections.abc import Callable, Iterable

from torch import nn

from utils.distributed import is_main
from utils.errors import Preempted
from utils.logger import MetricsWriter, log, percentages
from utils.precision import Precision
from utils.retrieval import embed, held_out_figures


class Monitor:
    """Measures a run on its held-out videos (`held_out_figures`) on rank 0, while the other ranks continue or wait.

    Args:
        cfg: the run's configuration; `monitor_every` is the number of epochs between measurements, 0: never.
        model, prepare: see `embed`.
        held_out: makes the loader of the held-out videos.
        precision: the run's precision, for the forward passes.
    """

    def __init__(
        self,
        cfg: dict,
        model: nn.Module,
        prepare: Callable,
        held_out: Callable[[], Iterable[dict]],
        precision: Precision,
    ) -> None:
        self.cfg, self.model, self.prepare = cfg, model, prepare
        self.held_out, self.precision = held_out, precision

    def measure(self, epoch: int) -> dict[str, float]:
        """Log and return the figures after `epoch` epochs, in percent; empty on ranks other than 0."""
        if not is_main():
            return {}
        embeddings = embed(self.model, self.held_out(), self.prepare, self.precision.autocast)
        figures = held_out_figures(embeddings)
        videos = len(embeddings["index"])
        told = f"{percentages(figures)} (of {videos} videos; chance R@10 {100 * min(1.0, 10 / videos):.1f})"
        log.info("held out, after %d epochs: %s", epoch, told)
        return figures

    def record(self, writer: MetricsWriter, epoch: int, step: int) -> None:
        """Measure after `epoch` epochs (`step` steps) if due and not yet in the metrics.

        If the run is asked to stop meanwhile, the measurement is skipped and made when the run resumes.
        """
        every = self.cfg["monitor_every"]
        due = every and (epoch % every == 0 or epoch == self.cfg["optimizer"]["num_epochs"])
        if due and not writer.wrote("retrieval", step):
            try:
                figures = self.measure(epoch)
            except Preempted as error:
                log.warning("held out, after %d epochs: left out, %s", epoch, error)
                return
            writer.write("retrieval", step, {"epoch": epoch, **figures})
