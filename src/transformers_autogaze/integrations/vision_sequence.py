"""The kept patches of a batch, and the packed sequence of tokens that a vision tower encodes."""

from dataclasses import dataclass

import torch


@dataclass
class KeptTokens:
    """
    The kept patches of a batch, frame by frame; frames are tubelets for a tower with tubelets.

    Args:
        clip, frame, ids (`torch.LongTensor` of shape `(patches,)`): clip, frame and id of each patch.
        num_each_frame (`torch.LongTensor` of shape `(batch, frames)`): number of kept patches of each frame.
    """

    clip: torch.Tensor
    frame: torch.Tensor
    ids: torch.Tensor
    num_each_frame: torch.Tensor

    def pack(self, num_prefix: int) -> "PackedSequence":
        """Returns the packed sequence, in which prefix tokens precede the patches of each frame with kept patches."""
        is_kept = self.num_each_frame.flatten() > 0
        num_tokens = (self.num_each_frame.flatten() + num_prefix) * is_kept
        starts = num_tokens.cumsum(0) - num_tokens
        device = self.ids.device
        prefix_index = starts[is_kept, None] + torch.arange(num_prefix, device=device)
        is_patch = torch.ones(int(num_tokens.sum()), dtype=torch.bool, device=device)
        is_patch[prefix_index.flatten()] = False
        return PackedSequence(is_patch.nonzero().squeeze(1), prefix_index, num_tokens.view_as(self.num_each_frame))


@dataclass
class PackedSequence:
    """
    Indices of tokens in the packed sequence.

    Args:
        patch_index (`torch.LongTensor` of shape `(patches,)`): indices of the patches.
        prefix_index (`torch.LongTensor` of shape `(kept frames, prefix)`): indices of prefix tokens.
        num_tokens (`torch.LongTensor` of shape `(batch, frames)`): number of tokens of each frame.
    """

    patch_index: torch.Tensor
    prefix_index: torch.Tensor
    num_tokens: torch.Tensor

    def select_patches(self, states: torch.Tensor) -> torch.Tensor:
        """Returns the states of patches, `(patches, hidden)`, out of `(1, tokens, hidden)`."""
        return states[0].to(self.patch_index.device)[self.patch_index]

    def select_prefix(self, states: torch.Tensor) -> torch.Tensor:
        """Returns the states of prefix tokens, `(batch, frames, prefix, hidden)`, zeros for frames without patches."""
        num_frames, num_prefix, device = self.num_tokens.numel(), self.prefix_index.shape[1], self.prefix_index.device
        prefix = states.new_zeros(num_frames, num_prefix, states.shape[-1], device=device)
        prefix[self.num_tokens.flatten() > 0] = states[0].to(device)[self.prefix_index]
        return prefix.unflatten(0, tuple(self.num_tokens.shape))
