"""What goes between the host, which keeps the texts, and the device, which has the models: one read a round."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

# Told the rows, among those it was asked about, that something is wrong with; it raises.
Complaint = Callable[[Sequence[int]], None]


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small tensor on `device`, for which nobody waits."""
    return tensor if tensor.device == device else tensor.to(device, non_blocking=True)


def judge(wrong: torch.Tensor, complain: Complaint) -> None:
    """Look at `wrong`, bool [b], at once."""
    rows = wrong.nonzero().flatten().tolist()
    if rows:
        complain(rows)


class Host:
    """The host's side of a call: what it sends to the device, and what it reads from there.

    Texts, their lengths, and who sits where are the host's; logits and what is computed from them are the device's. To
    look at a value on a GPU is to wait for all that was asked of it, so that the host does so once a round, for all it
    wants to know. What is wrong with values is found out then, too.

    Args:
        device: where the models are. On a CPU nothing is moved, and everything may be looked at at once.

    Attributes:
        device: as given.
        remote: whether it is another one than the host's.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.remote = device.type != "cpu"
        self._expected: list[tuple[torch.Tensor, Complaint]] = []

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        """A small tensor where the models are."""
        return send(tensor, self.device)

    def expect(self, wrong: torch.Tensor, complain: Complaint) -> None:
        """Have `complain` raise if any of `wrong`, bool [b], is true: at once, or with the next `read`."""
        if self.remote:
            self._expected.append((wrong, complain))
        else:
            judge(wrong, complain)

    def read(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Whole numbers or flags of the device on the CPU, in one transfer, with all that was expected so far.

        Raises:
            PersonafastError: what some `expect` says.
        """
        if not self.remote:
            return list(tensors)
        expected, self._expected = self._expected, []
        wanted = [*tensors, *(wrong for wrong, _ in expected)]
        whole = torch.cat([tensor.reshape(-1).long() for tensor in wanted]).to("cpu")
        parts = whole.split([tensor.numel() for tensor in wanted])
        found = [part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, wanted, strict=True)]
        for wrong, (_, complain) in zip(found[len(tensors) :], expected, strict=True):
            judge(wrong, complain)
        return found[: len(tensors)]
