"""A memory bank sharded over the ranks, for more videos than one device holds."""

from typing import Any

import torch
import torch.distributed as dist

from criterions.memory_bank import BLOCK, BUFFERS, MemoryBank
from utils.distributed import all_to_all, gather, rank, world_size
from utils.errors import UserError


class ShardedMemoryBank(MemoryBank):
    """Each rank holds consecutive rows, `start` to `stop`, in `view1_mem` and `view2_mem`; shards are near equal.

    Positives are exact: they come from the rank that owns them, by one all-to-all of fixed size, so that no sizes are
    exchanged and no host waits. Negatives are drawn uniformly from the rank's own rows, never the query itself, and
    need no communication. An epoch's clips are assigned to ranks at random, so over an epoch every other row is as
    likely a negative as in an unsharded bank, up to 1 / (rows of a shard). Rows are updated on their owner, from the
    batch gathered over all ranks. Initial vectors are the unsharded bank's; draws depend on rank and world size.

    The state dict is the whole bank's: a run can resume with another number of ranks, and an unsharded bank loads it.
    Every rank must call `state_dict()` to build it: rank 0 gets all rows on the CPU, block by block; the others get
    placeholders on the meta device. Loading takes the whole bank on every rank and keeps the rank's rows.

    Raises:
        UserError: there are fewer than two rows per rank.
    """

    sharded = True

    def __init__(self, num_instances: int, embedding_dim: int, seed: int = 0, dtype: str = "fp32") -> None:
        if num_instances < 2 * world_size():
            raise UserError(
                f"loss.args.bank_shards: {num_instances} instances on {world_size()} ranks: expected at least two a "
                "rank (a row and a negative); set bank_shards: false"
            )
        super().__init__(num_instances, embedding_dim, seed, dtype)

    def extra_repr(self) -> str:
        """Text shown by `print`."""
        return f"{super().extra_repr()} (rows {self.start} to {self.stop - 1} of rank {rank()})"

    def own_rows(self, index: torch.Tensor) -> dict[str, torch.Tensor]:
        """The `video` and `audio` rows `(N, D)` of this rank's queries `index` (N,), from the ranks that own them."""
        place, _ = self._places(gather(index))
        both = torch.stack([self.rows(bank)[place] for bank in BUFFERS], dim=1)
        # Every rank offers a row for every query; only the owner's is used.
        offered = all_to_all(both.view(world_size(), len(index), *both.shape[1:]))
        mine = offered[self._owner(index), torch.arange(len(index), device=index.device)]
        return dict(zip(BUFFERS, mine.unbind(1), strict=True))

    def sample_negatives(self, index: torch.Tensor, k: int) -> torch.Tensor:
        """Draw `(N, k)` of this rank's instances for the queries `index` (N,): uniform, never the query itself."""
        generator, here = self._generator("rank", rank(), "of", world_size()), self.stop - self.start
        place, owned = self._places(index)
        shape, options = (len(index), k), {"generator": generator, "device": generator.device}
        any_row, others = torch.randint(here, shape, **options), torch.randint(here - 1, shape, **options)
        others = others + (others >= place[:, None])
        return self.start + torch.where(owned[:, None], others, any_row)

    def drawn_rows(self, bank: str, drawn: torch.Tensor) -> torch.Tensor:
        """The rows `(N, K, D)` of instances drawn by `sample_negatives` on this rank."""
        return self.rows(bank)[drawn - self.start]

    def sample_hard_negatives(self, emb: torch.Tensor, index: torch.Tensor, k: int, bank: str) -> torch.Tensor:
        """Not supported with shards.

        Raises:
            UserError: always.
        """
        raise UserError("loss.args.bank_shards: hard negatives need the whole bank on a rank; set bank_shards: false")

    def _range(self) -> tuple[int, int]:
        base, longer = divmod(self.num_instances, world_size())
        start = rank() * base + min(rank(), longer)
        return start, start + base + (rank() < longer)

    def _owner(self, index: torch.Tensor) -> torch.Tensor:
        """The ranks that own instances `index`."""
        base, longer = divmod(self.num_instances, world_size())
        border = longer * (base + 1)
        return torch.where(index < border, index // (base + 1), longer + (index - border) // base)

    def _places(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        owned = (index >= self.start) & (index < self.stop)
        return (index - self.start).clamp(0, self.stop - self.start - 1), owned

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for bank, name in BUFFERS.items():
            destination[prefix + name] = self._whole(self.rows(bank))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest: Any) -> None:
        for name in BUFFERS.values():
            whole = state_dict.get(prefix + name)
            if whole is not None and len(whole) == self.num_instances:
                state_dict[prefix + name] = whole[self.start : self.stop]
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _whole(self, rows: torch.Tensor) -> torch.Tensor:
        """All ranks' rows `(num_instances, D)`, on rank 0, on the CPU; a placeholder without data on the others."""
        if world_size() == 1:
            return rows
        shape = (self.num_instances, rows.shape[1])
        if rank():
            for block in rows.split(BLOCK):
                dist.send(block.cpu().view(torch.uint8), dst=0)  # as bytes, from CPU to CPU
            return torch.empty(shape, dtype=rows.dtype, device="meta")
        whole = torch.empty(shape, dtype=rows.dtype)
        whole[: self.stop] = rows.cpu()
        base, longer = divmod(self.num_instances, world_size())
        sizes = [base + (other < longer) for other in range(world_size())]
        for other, part in enumerate(whole.split(sizes)):
            for block in part.split(BLOCK) if other else ():
                dist.recv(block.view(torch.uint8), src=other)
        return whole
