"""Training triplets: each train interaction once an epoch, with a negative item drawn for it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch_geometric.data import HeteroData

from dream_pyg.errors import TrainingError
from dream_pyg.graph.schema import INTERACTS, ITEM, label_name
from dream_pyg.models.base import Batch
from dream_pyg.training.teacher import TaughtItems

_REJECTION_ROUNDS = 32
_BATCH_ROUNDS = 8
"""Of drawing from a batch, before what is left is drawn from all items."""
_LISTED_CANDIDATES = 1 << 22
_PERMUTED_SHARE = 1 / 8
"""Of the interactions, from which on it is no slower to shuffle all of them."""


class TripletSampler:
    """Draws an epoch of shuffled triplets.

    Negatives are uniform over the items that occur in train, without those that the user interacted with in train:
    one per interaction, redrawn each epoch (the protocol of the field's tables). Those of a batch are so over many
    batches.

    A teacher's items are positives of further triplets, of users as often as they have train interactions. They may be
    drawn as negatives all the same, as what train does not have.

    Args:
        graph: The graph whose train pairs are sampled.
        taught: What a teacher would recommend, if there is one.
        batch_size: Draws negatives from the train items of the same batch of so many triplets, by default from all
            items. A batch has an item as often as it is popular, and each mention is the likelier to be drawn the less
            popular its item, so that items are negatives about as often as each other (cf. doi
            10.1145/3298689.3346996).

    Raises:
        TrainingError: If no user has an item left that could be a negative.
    """

    def __init__(self, graph: HeteroData, taught: TaughtItems | None = None, *, batch_size: int | None = None) -> None:
        user, item = graph[INTERACTS][label_name("train")].cpu()
        self._num_items = int(graph[ITEM].num_nodes)
        self._keys = torch.sort(user * self._num_items + item).values
        self._train_items = torch.unique(item)
        self.taught = taught
        self._batch_size = batch_size
        # A user who has every train item has no negative: such pairs still propagate but cannot be ranked.
        can_rank = torch.bincount(user)[user] < len(self._train_items)
        self._user, self._item = user[can_rank], item[can_rank]
        if batch_size is not None:
            self._rarity = torch.bincount(self._item, minlength=self._num_items).float().reciprocal_()
        if len(self._user) == 0:
            raise TrainingError(
                "There is nothing to rank: every user has interacted with every train item. Check the interactions."
            )

    def __len__(self) -> int:
        return len(self._user)

    def epoch(self, generator: torch.Generator, num_triplets: int | None = None) -> Batch:
        """The triplets of one epoch, shuffled; a function of the generator's state alone.

        Args:
            generator: Where chance comes from.
            num_triplets: How many at most; by default one for each interaction, and those that are taught.
        """
        num_own = num_triplets
        if self.taught is not None and num_triplets is not None:
            num_own = max(1, round(num_triplets / (1 + self.taught.share)))
        order = _some_of(len(self), len(self) if num_own is None else num_own, generator)
        user, pos_item = self._user[order], self._item[order]
        if self.taught is not None:
            user, pos_item = self._with_taught(user, pos_item, self.taught, generator)
            user, pos_item = user[:num_triplets], pos_item[:num_triplets]  # both were rounded
        if self._batch_size is None:
            return Batch(user, pos_item, self._draw_negatives(user, generator))
        batches = zip(user.split(self._batch_size), pos_item.split(self._batch_size), strict=True)
        return Batch(user, pos_item, torch.cat([self._draw_from_batch(*batch, generator) for batch in batches]))

    def _with_taught(
        self, user: Tensor, pos_item: Tensor, taught: TaughtItems, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """These pairs and the teacher's, shuffled."""
        drawn = torch.randint(len(self), (round(taught.share * len(user)),), generator=generator)
        learner = self._user[drawn]
        item = taught.draw(learner, generator)
        user, pos_item = torch.cat([user, learner[item >= 0]]), torch.cat([pos_item, item[item >= 0]])
        order = torch.randperm(len(user), generator=generator)
        return user[order], pos_item[order]

    def _draw_from_batch(self, user: Tensor, pos_item: Tensor, generator: torch.Generator) -> Tensor:
        neg_item, pending = torch.empty_like(user), torch.arange(len(user))
        # What a teacher adds is there more often than train has it.
        chance = self._rarity[pos_item].where(self._interacted(user, pos_item), 0.0)
        for _ in range(_BATCH_ROUNDS if chance.any() else 0):
            drawn = torch.multinomial(chance, len(pending), replacement=True, generator=generator)
            neg_item[pending] = pos_item[drawn]
            pending = pending[self._interacted(user[pending], neg_item[pending])]
            if len(pending) == 0:
                return neg_item
        neg_item[pending] = self._draw_negatives(user[pending], generator)
        return neg_item

    def _draw_negatives(self, user: Tensor, generator: torch.Generator) -> Tensor:
        neg_item = torch.empty_like(user)
        pending = torch.arange(len(user))
        for _ in range(_REJECTION_ROUNDS):
            drawn = torch.randint(len(self._train_items), (len(pending),), generator=generator)
            neg_item[pending] = self._train_items[drawn]
            pending = pending[self._interacted(user[pending], neg_item[pending])]
            if len(pending) == 0:
                return neg_item
        # What is left belongs to users with almost everything: their few negatives are listed instead.
        for block in pending.split(max(1, _LISTED_CANDIDATES // len(self._train_items))):
            candidates = self._train_items.expand(len(block), -1)
            is_negative = ~self._interacted(user[block].unsqueeze(1), candidates)
            drawn = torch.multinomial(is_negative.float(), 1, generator=generator)
            neg_item[block] = self._train_items[drawn.squeeze(1)]
        return neg_item

    def _interacted(self, user: Tensor, item: Tensor) -> Tensor:
        key = user * self._num_items + item
        position = torch.searchsorted(self._keys, key).clamp(max=len(self._keys) - 1)
        return self._keys[position] == key


def _some_of(number: int, count: int, generator: torch.Generator) -> Tensor:
    """Some of the first numbers in random order, none twice: at most ``count``, of which all sets are equally likely.

    A small part costs as much as its size, and no permutation of all.
    """
    if count > _PERMUTED_SHARE * number:
        return torch.randperm(number, generator=generator)[:count]
    chosen = torch.empty(0, dtype=torch.long)
    while len(chosen) < count:
        drawn = torch.randint(number, (count - len(chosen),), generator=generator)
        chosen = torch.unique(torch.cat([chosen, drawn]))
    return chosen[torch.randperm(count, generator=generator)]
