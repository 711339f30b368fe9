"""The memory bank: one video and one audio vector for each training video, and the negatives drawn from it."""

import hashlib

import torch
import torch.nn.functional as F
from torch import nn

from utils.distributed import gather, rank, world_size
from utils.errors import UserError

BUFFERS = {"video": "view1_mem", "audio": "view2_mem"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BLOCK = 1 << 16  # rows drawn at once at initialisation: a shard of a large bank is made without the rest


class MemoryBank(nn.Module):
    """Unit vectors `view1_mem` (video) and `view2_mem` (audio), `(num_instances, embedding_dim)`; initially random.

    All randomness depends only on `seed` and the number of draws made so far. That number is part of the state dict, so
    a resumed run makes the draws of an uninterrupted one; a state dict without it (published checkpoints) loads and
    leaves it unchanged. Draws are made for the whole batch and each rank takes its rows, so W processes with N rows
    each draw the same as one process with W * N rows. Every rank must pass the same N.

    With `dtype` bf16 the bank is half as large. All arithmetic stays in float32. A row is rounded when it is stored,
    each number by at most 1 part in 512 (a cosine with it changes by about 0.0001 at D = 128); an update is lost to
    rounding if the new vector's weight is below about 0.2% (momentum above 0.998).

    Args:
        num_instances: training videos, at least 2.
        embedding_dim: D.
        seed: seed of the initial vectors and of all draws; the same on every rank.
        dtype: storage format of the rows, `fp32` or `bf16`.

    Raises:
        UserError: fewer than 2 instances, or an unknown `dtype`.
    """

    sharded = False

    def __init__(self, num_instances: int, embedding_dim: int, seed: int = 0, dtype: str = "fp32") -> None:
        super().__init__()
        if dtype not in DTYPES:
            raise UserError(f"loss.args.bank_dtype: unknown {dtype!r}; use {', '.join(DTYPES)}")
        if num_instances < 2:
            raise UserError(
                f"memory bank: num_instances: expected at least 2 (a query and a negative), found {num_instances}; "
                "train on more videos"
            )
        self.num_instances = num_instances
        self.seed = seed
        self._draws = {"train": 0, "eval": 0}
        self.start, self.stop = self._range()
        for name in BUFFERS.values():
            self.register_buffer(name, torch.empty(self.stop - self.start, embedding_dim, dtype=DTYPES[dtype]))
        self._begin()
        self.register_load_state_dict_pre_hook(_keep_missing_draws)

    def extra_repr(self) -> str:
        """Text shown by `print`."""
        size = sum(self.rows(name).nbytes for name in BUFFERS) / 1e6
        return f"{self.num_instances} instances, {self.view1_mem.shape[1]} dimensions, {size:.1f} MB on this rank"

    def rows(self, bank: str) -> torch.Tensor:
        """All vectors `(num_instances, D)` of the `'video'` or `'audio'` bank on this rank."""
        return getattr(self, BUFFERS[bank])

    def own_rows(self, index: torch.Tensor) -> dict[str, torch.Tensor]:
        """The `video` and `audio` rows `(N, D)` of the instances `index` (N,)."""
        return {bank: self.rows(bank)[index] for bank in BUFFERS}

    def drawn_rows(self, bank: str, drawn: torch.Tensor) -> torch.Tensor:
        """The rows `(N, K, D)` of instances drawn by `sample_negatives`."""
        return self.rows(bank)[drawn]

    def sample_negatives(self, index: torch.Tensor, k: int) -> torch.Tensor:
        """Draw `(N, k)` instances for the queries `index` (N,): uniform, with replacement, never the query itself."""
        others = self._draw_int(self._generator(), self.num_instances - 1, len(index), k)
        return others + (others >= index[:, None])

    @torch.no_grad()
    def sample_hard_negatives(self, emb: torch.Tensor, index: torch.Tensor, k: int, bank: str) -> torch.Tensor:
        """Indices `(N, k)` of the rows of `bank` nearest to the unit queries `emb` (N, D), nearest first, own excluded.

        Raises:
            UserError: there are fewer than k other rows.
        """
        if k >= self.num_instances:
            raise UserError(
                f"memory bank: expected fewer hard negatives than num_instances = {self.num_instances}, found {k}; "
                "lower loss.args.N_hard"
            )
        rows = self.rows(bank)
        exact = torch.promote_types(rows.dtype, torch.float32)
        similarity = torch.cat([emb.to(exact) @ block.to(exact).T for block in rows.split(BLOCK)], dim=1)
        return similarity.scatter_(1, index[:, None], -torch.inf).topk(k, dim=1).indices

    @torch.no_grad()
    def synthetic_negatives(
        self, emb: torch.Tensor, index: torch.Tensor, bank: str, num_hard: int, s: int, s_prime: int
    ) -> torch.Tensor:
        """Unit vectors `(N, s + s_prime, D)` mixed from each query's `num_hard` nearest rows of `bank`.

        The first `s` mix two of those rows, with a coefficient in [0, 1); the others mix the query, with a weight in
        [0, 0.5), with one of them. No gradient flows through a mix, not even to the query. Kalantidis et al., "Hard
        Negative Mixing for Contrastive Learning" (MoCHi), NeurIPS 2020.
        """
        hard = self.sample_hard_negatives(emb, index, num_hard, bank)
        exact = torch.promote_types(self.rows(bank).dtype, torch.float32)
        rows, generator, n = self.rows(bank)[hard].to(exact), self._generator(), len(index)  # (N, num_hard, D)
        one = self._draw_int(generator, num_hard, n, s)
        step = 1 + self._draw_int(generator, max(1, num_hard - 1), n, s)
        other = (one + step) % num_hard  # two different rows, if there are two
        coefficient = self._draw_uniform(generator, n, s)
        pairs = torch.lerp(_pick(rows, other), _pick(rows, one), coefficient)
        one = self._draw_int(generator, num_hard, n, s_prime)
        share = 0.5 * self._draw_uniform(generator, n, s_prime)
        with_query = torch.lerp(_pick(rows, one), emb[:, None].to(exact), share)
        return F.normalize(torch.cat([pairs, with_query], dim=1), dim=-1)

    @torch.no_grad()
    def update(self, index: torch.Tensor, video_emb: torch.Tensor, audio_emb: torch.Tensor, momentum: float) -> None:
        """Set rows `index` (N,) of all ranks to normalise(momentum * old + (1 - momentum) * new), with new unit (N, D).

        If an instance occurs more than once, its new vectors are averaged first. A row is left unchanged if the new
        vector is not finite or cancels it out. No host syncs.
        """
        index = gather(index)
        place, owned = self._places(index)
        same = (index[:, None] == index).double()  # float64: the average depends neither on the order nor on TF32
        # The entry whose row each entry writes: duplicates write identical bits, so that the order does not matter, and
        # entries not on this rank repeat the first one that is (or, if none is, write back an old row).
        writer = torch.where(owned, same.argmax(dim=1), owned.int().argmax())
        for bank, emb in (("video", video_emb), ("audio", audio_emb)):
            rows = self.rows(bank)
            old = rows[place].to(torch.promote_types(rows.dtype, torch.float32))
            fresh = gather(emb).double()
            broken = ~fresh.isfinite().all(dim=1, keepdim=True)  # left in the product, its 0 * nan would reach all rows
            new = (same @ fresh.masked_fill(broken, 0) / same.sum(dim=1, keepdim=True)).to(old.dtype)
            new = new.masked_fill(same @ broken.double() > 0, torch.nan)
            mixed = F.normalize(momentum * old + (1 - momentum) * new, dim=1)
            good = mixed.isfinite().all(dim=1, keepdim=True) & mixed.any(dim=1, keepdim=True) & owned[:, None]
            rows.index_copy_(0, place[writer], torch.where(good, mixed, old)[writer].to(rows.dtype))

    def get_extra_state(self) -> torch.Tensor:
        """Return the number of draws made in training and in eval mode, for the state dict."""
        return torch.tensor([self._draws["train"], self._draws["eval"]])

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Restore the numbers of draws from a state dict."""
        self._draws["train"], self._draws["eval"] = state.tolist()

    def _range(self) -> tuple[int, int]:
        """The range [start, stop) of instances whose rows are on this rank."""
        return 0, self.num_instances

    def _places(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions of instances `index` in this rank's buffers, and a mask of those that are on this rank."""
        return index, torch.ones_like(index, dtype=torch.bool)

    def _begin(self) -> None:
        """Fill this rank's rows with random unit vectors, drawn on the CPU: the same for any device and rank.

        They are drawn in blocks, so that a rank draws few rows besides its own.
        """
        for low in range(self.start - self.start % BLOCK, self.stop, BLOCK):
            generator = torch.Generator().manual_seed(_seed(self.seed, "block", low) if low else self.seed)
            high = min(low + BLOCK, self.num_instances)
            start, stop = max(low, self.start), min(high, self.stop)
            for bank in BUFFERS:
                rows = F.normalize(torch.randn(high - low, self.rows(bank).shape[1], generator=generator), dim=1)
                self.rows(bank)[start - self.start : stop - self.start] = rows[start - low : stop - low]

    def _generator(self, *more: object) -> torch.Generator:
        """A generator for the next draw, seeded on the host: no sync per step, and the state is one number."""
        mode = "train" if self.training else "eval"
        seed = _seed(self.seed, mode, self._draws[mode], *more)
        self._draws[mode] += 1
        return torch.Generator(self.view1_mem.device).manual_seed(seed)

    def _draw_int(self, generator: torch.Generator, high: int, n: int, k: int) -> torch.Tensor:
        """This rank's (n, k) integers in [0, high), out of those drawn for the whole batch."""
        shape = (world_size() * n, k)
        draws = torch.randint(high, shape, generator=generator, device=generator.device)
        return draws[rank() * n : (rank() + 1) * n]

    def _draw_uniform(self, generator: torch.Generator, n: int, k: int) -> torch.Tensor:
        """This rank's (n, k, 1) numbers in [0, 1), out of those drawn for the whole batch."""
        draws = torch.rand(world_size() * n, k, 1, generator=generator, device=generator.device)
        return draws[rank() * n : (rank() + 1) * n].to(torch.promote_types(self.view1_mem.dtype, torch.float32))


def _pick(rows: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    """Select from rows (N, H, D) those that `which` (N, s) gives for each query, (N, s, D)."""
    return rows.gather(1, which[:, :, None].expand(-1, -1, rows.shape[2]))


def _seed(*words: object) -> int:
    digest = hashlib.blake2b(" ".join(map(str, words)).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


def _keep_missing_draws(bank: MemoryBank, state_dict: dict, prefix: str, *_: object) -> None:
    state_dict.setdefault(f"{prefix}_extra_state", bank.get_extra_state())
