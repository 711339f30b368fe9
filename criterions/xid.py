"""Cross-modal instance discrimination with a memory bank.

Morgado, Vasconcelos and Misra, "Audio-Visual Instance Discrimination with Cross-Modal Agreement", CVPR 2021, with RINCE
in place of its NCE loss and, optionally, the hard negatives of MoCHi.
"""

import torch
import torch.nn.functional as F
from torch import nn

from criterions.memory_bank import MemoryBank
from criterions.rince import RINCE
from criterions.sharded_bank import ShardedMemoryBank
from criterions.stats import spread_and_dims
from utils.distributed import gather, gather_with_grad, is_main, world_size
from utils.errors import UserError

HIGHEST_EXPONENT = 40.0  # float32 holds exp(88), and the square of a gradient, for its norm, of exp(44)


def q_schedule(epoch: int, num_epochs: int, q0: float, q_max: float) -> float:
    """RINCE's q in `epoch` (from 0 on): linear from `q0` in the first epoch to `q_max` in the last."""
    return q0 + epoch * (q_max - q0) / max(1, num_epochs - 1)


class xID(nn.Module):  # noqa: N801 (the name in the YAML)
    """Mean of two losses: video embeddings against the audio bank, and audio embeddings against the video bank.

    The positive is the instance's own row; the negatives are `num_negatives` random other rows, the same for both
    directions. In training mode, after scoring, the rows of the batch over all ranks are updated with the new
    embeddings. Computed in float32 regardless of autocast; float64 stays float64.

    Each call sets `stats`, 0-dim tensors on the device: `pos_cos` and `neg_cos`, the mean cosine of queries with
    positive and with random negative rows (both directions); for the batch over all ranks `video_spread` and
    `audio_spread` (0 collapsed, 1 uniform on the sphere), `video_dims` and `audio_dims` (number of directions used);
    and `q`. Without random negatives `neg_cos` is the mean over the live ones.

    Args:
        num_instances: rows of the bank, one per training video.
        embedding_dim: D.
        num_negatives: random negatives per query; 0, only with `live_targets`: none, the loss is that of the batch.
        q: RINCE's q; its initial value if `num_epochs` is given.
        lam: RINCE's lambda.
        momentum: weight of the old vector in a row's update.
        hard_neg_epoch: the first epoch with hard negatives.
        N_hard: nearest rows from which hard negatives are mixed; None or 0: no hard negatives, whatever `s`, `s_prime`.
        s: hard negatives per query that mix two of these rows.
        s_prime: hard negatives per query that mix the query with one of them.
        temperature: divisor of the cosines.
        q_max: q of the last epoch; used only with `num_epochs`.
        num_epochs: epochs of the run; None: q is constant.
        seed: seed of the bank's initial vectors and of the negatives; the same on every rank.
        live_targets: True: the positive is the clip's own embedding of the other modality instead of its bank row, and
            those of other videos' clips in the batch over all ranks join the negatives, so that gradients reach both
            networks. Without random and hard negatives nothing then reads the bank; it is updated and saved all the
            same.
        bank_dtype: storage format of the bank's rows, `fp32` or `bf16`; all arithmetic is in float32.
        bank_shards: True: each rank holds a shard of the bank and draws its negatives from it (`ShardedMemoryBank`).

    Raises:
        UserError: fewer than 2 instances, `N_hard` not below `num_instances`, `q` or `lam` out of range, `q` over
            `temperature` too large for float32, an unknown `bank_dtype`, `bank_shards` with hard negatives or fewer
            than two rows per rank, or no negatives at all.
    """

    def __init__(
        self,
        num_instances: int,
        embedding_dim: int,
        num_negatives: int = 1024,
        q: float = 0.001,
        lam: float = 0.01,
        momentum: float = 0.5,
        hard_neg_epoch: int = 10,
        N_hard: int | None = None,
        s: int = 512,
        s_prime: int = 128,
        temperature: float = 0.07,
        q_max: float = 0.4,
        num_epochs: int | None = None,
        seed: int = 0,
        live_targets: bool = False,
        bank_dtype: str = "fp32",
        bank_shards: bool = False,
    ) -> None:
        super().__init__()
        if N_hard and N_hard >= num_instances:
            raise UserError(
                f"xID: N_hard: expected fewer than num_instances = {num_instances}, found {N_hard}; "
                "lower loss.args.N_hard"
            )
        if not num_negatives and not live_targets:
            raise UserError(
                "loss.args.num_negatives: 0 leaves a query no negatives; raise it, or set live_targets: true, which "
                "takes them from the batch"
            )
        highest = q if num_epochs is None else max(q, q_max)
        if highest > HIGHEST_EXPONENT * temperature:
            raise UserError(
                f"loss.args.temperature: {temperature:g}, with q up to {highest:g}: exp(q / temperature) and its "
                f"gradient overflow in float32; expected q / temperature of at most {HIGHEST_EXPONENT:g}"
            )
        self.num_negatives = num_negatives
        self.momentum = momentum
        self.hard_neg_epoch = hard_neg_epoch
        self.hard = (N_hard, s, s_prime) if N_hard and s + s_prime > 0 else None
        if self.hard is not None and bank_shards:
            raise UserError(
                f"loss.args.bank_shards: true does not go with N_hard: {N_hard}: the nearest rows would have to be "
                "searched for on every rank; set N_hard: null, or bank_shards: false"
            )
        self.temperature = temperature
        self.q_max = q_max
        self.num_epochs = num_epochs
        self.live_targets = live_targets
        self.rince = RINCE(q, lam)
        bank = ShardedMemoryBank if bank_shards else MemoryBank
        self.nce_average = bank(num_instances, embedding_dim, seed, bank_dtype)  # the name in published checkpoints
        self.stats: dict[str, torch.Tensor] = {}

    def extra_repr(self) -> str:
        """What the log says of it: positives, negatives, temperature, and q over the run."""
        positive = "the clip's other embedding" if self.live_targets else "its row"
        kinds = [f"{self.num_negatives} random rows"] if self.num_negatives else []
        kinds += ["the batch"] if self.live_targets else []
        if self.hard is not None:
            nearest, *mixed = self.hard
            kinds.append(f"from epoch {self.hard_neg_epoch + 1} on {sum(mixed)} mixed from the {nearest} nearest rows")
        last = self.q_at((self.num_epochs or 1) - 1)
        return (
            f"positive: {positive}; negatives: {' and '.join(kinds)}; temperature {self.temperature:g}; "
            f"q {self.rince.q:g} to {last:g}"
        )

    def q_at(self, epoch: int) -> float:
        """RINCE's q in `epoch`: the schedule's if `num_epochs` is given, else the constructor's."""
        q0 = self.rince.q
        return q0 if self.num_epochs is None else q_schedule(epoch, self.num_epochs, q0, self.q_max)

    def forward(
        self,
        video_emb: torch.Tensor,
        audio_emb: torch.Tensor,
        index: torch.Tensor,
        epoch: int = 0,
        q: float | None = None,
    ) -> torch.Tensor:
        """Return the rank's scalar loss; its mean over ranks, and that of its gradients, are the whole batch's.

        Args:
            video_emb, audio_emb: (N, D), of any length.
            index: (N,) integers, the instances' rows in the bank, on the embeddings' device.
            epoch: from 0 on; determines whether hard negatives are used, and q if it is not given.
            q: RINCE's q for this call.

        Raises:
            UserError: the batch has one clip over all ranks, and there are no negatives from the bank.
        """
        q = self.q_at(epoch) if q is None else q
        index = index.long()
        if not self.num_negatives and len(index) * world_size() < 2:
            raise UserError(
                "loss.args.num_negatives: 0, and a batch, or its part, of one clip: there are no negatives; raise it, "
                "or dataset.batch_size, or lower accumulate"
            )
        bank = self.nce_average
        dtype = torch.promote_types(torch.promote_types(video_emb.dtype, bank.view1_mem.dtype), torch.float32)
        with torch.autocast(video_emb.device.type, enabled=False):
            video, audio = F.normalize(video_emb.to(dtype), dim=1), F.normalize(audio_emb.to(dtype), dim=1)
            negatives, own = bank.sample_negatives(index, self.num_negatives), bank.own_rows(index)
            v2a = self._bank_cosines(video, index, own["audio"], negatives, "audio", epoch)
            a2v = self._bank_cosines(audio, index, own["video"], negatives, "video", epoch)
            if self.live_targets:
                v2a, a2v = _with_live(video, audio, index, v2a[1]), _with_live(audio, video, index, a2v[1])
            self.stats = _measure(v2a, a2v) | spread_and_dims(gather(video), gather(audio))
            self.stats["q"] = video.new_full((), q, dtype=torch.float64)
            if self.training:
                bank.update(index, video, audio, self.momentum)
            return (self._rince_of(*v2a, q) + self._rince_of(*a2v, q)) / 2

    def assemble(self) -> None:
        """Send the shards of a sharded bank to rank 0; every rank must call this before rank 0 saves."""
        if self.nce_average.sharded and not is_main():
            self.state_dict()

    def _bank_cosines(
        self,
        query: torch.Tensor,
        index: torch.Tensor,
        own: torch.Tensor,
        drawn: torch.Tensor,
        target: str,
        epoch: int,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Cosines of unit queries (N, D) with rows of the bank `target`: positives (N, 1), negatives (N, K) by kind.

        Args:
            index: (N,) the queries' instances; `own`: (N, D) their rows; `drawn`: (N, K) random other instances.
        """
        negatives = {}
        if self.num_negatives:
            negatives["random"] = _dot(query, self.nce_average.drawn_rows(target, drawn))
        if self.hard is not None and epoch >= self.hard_neg_epoch:
            mixed = self.nce_average.synthetic_negatives(query, index, target, *self.hard)
            negatives["hard"] = _dot(query, mixed)
        return _dot(query, own[:, None]), negatives

    def _rince_of(self, positive: torch.Tensor, negatives: dict[str, torch.Tensor], q: float) -> torch.Tensor:
        negative = torch.cat(list(negatives.values()), dim=1)
        return self.rince(positive / self.temperature, negative / self.temperature, q)


def _with_live(
    query: torch.Tensor, target: torch.Tensor, index: torch.Tensor, negatives: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Cosines with the clips' own live targets (N, 1) as positives; those of other instances join the negatives."""
    same = index[:, None] == gather(index)
    live = _dot(query, gather_with_grad(target)[None]).masked_fill(same, -torch.inf)
    return _dot(query, target[:, None]), negatives | {"live": live}


@torch.no_grad()
def _measure(v2a: tuple, a2v: tuple) -> dict[str, torch.Tensor]:
    """Mean cosines, over both directions, of positives and of random negatives (of live ones if there are none)."""
    kind = "random" if "random" in v2a[1] else "live"
    negatives = torch.stack([v2a[1][kind], a2v[1][kind]])
    there = negatives > -torch.inf  # excludes a clip's own among the live ones
    return {
        "pos_cos": (v2a[0].mean() + a2v[0].mean()) / 2,
        "neg_cos": negatives.where(there, 0).sum() / there.sum().clamp_min(1),
    }


def _dot(query: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Products (N, K) of (N, D) and (N, K, D). No matmul: it might be rounded to TF32 and depend on the batch size."""
    return (query[:, None] * rows).sum(dim=-1)
