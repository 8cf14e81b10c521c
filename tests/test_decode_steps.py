"""What a step on a CPU does its own way must be what the plain way gives."""

import pytest
import torch
from test_generation import assert_same_gaze, thresholds_that_stop_clips_differently

from transformers_autogaze import GazeCache, GazeOutput
from transformers_autogaze import decode_steps_autogaze as decoding
from transformers_autogaze.decode_steps_autogaze import DecodeSteps, choose_ids


@pytest.fixture(scope="module")
def video() -> torch.Tensor:
    return torch.randn(3, 6, 3, 64, 64, generator=torch.Generator().manual_seed(1)).double()


@pytest.fixture
def losses(monkeypatch) -> list[torch.Tensor]:
    """Every predicted loss of the calls to come."""
    proposed, propose = [], DecodeSteps.propose

    def noted(steps, count):
        chosen, losses = propose(steps, count)
        proposed.append(losses.flatten())
        return chosen, losses

    monkeypatch.setattr(DecodeSteps, "propose", noted)
    return proposed


@pytest.mark.parametrize("max_scores", [1, 600, 2**20])  # two heads at once, a few, all of a batch
@pytest.mark.parametrize("with_threshold", [False, True])
def test_matmul_attention_equals_torchs(tiny_model, video, losses, monkeypatch, max_scores, with_threshold):
    thresholds = thresholds_that_stop_clips_differently(tiny_model, video) if with_threshold else None
    call = {"gazing_ratio": 0.9, "task_loss_requirement": thresholds}

    def gaze(uses_matmul: bool) -> tuple[GazeOutput, torch.Tensor]:
        prepare = DecodeSteps.__init__

        def prepared(steps, *args):
            prepare(steps, *args)
            assert steps.uses_matmul_attention
            steps.uses_matmul_attention = uses_matmul

        losses.clear()
        with monkeypatch.context() as patch:
            patch.setattr(DecodeSteps, "__init__", prepared)
            return tiny_model.generate(video, **call), torch.cat(losses)

    monkeypatch.setattr(decoding, "_MAX_CACHED_SCORES", max_scores)
    (uses_matmul, its_losses), (plain, plain_losses) = gaze(True), gaze(False)
    assert_same_gaze(uses_matmul, plain)
    torch.testing.assert_close(its_losses, plain_losses, rtol=0, atol=1e-12)


def test_a_stream_may_change_its_attention(tiny, video):
    model = tiny.model(attn_implementation="eager")
    whole = model.generate(video, gazing_ratio=0.4)
    cache, parts = GazeCache(), []
    for part, implementation in zip(video.split(2, 1), ("sdpa", "eager", "sdpa"), strict=True):
        model.set_attn_implementation(implementation)
        parts.append(model.generate(part, gazing_ratio=0.4, past_key_values=cache, use_cache=True))
    assert_same_gaze(GazeOutput.concatenate(parts), whole)


def test_earlier_proposals_keep_a_patch_that_several_prefer():
    generator = torch.Generator().manual_seed(0)
    favourites = torch.randn(4, 1, 30, generator=generator)
    logits = favourites + 0.1 * torch.randn(4, 7, 30, generator=generator)
    taken = torch.zeros(4, 30)
    taken[:, -1] = -torch.inf
    taken[torch.arange(4), favourites[:, 0, :-1].argmax(-1)] = -torch.inf
    expected, free = [], taken.clone()
    for row in logits.unbind(1):
        best = (row + free).argmax(-1)
        free[torch.arange(4), best] = -torch.inf
        expected.append(best)
    chosen = choose_ids(logits, taken)
    assert torch.equal(chosen, torch.stack(expected, dim=1))
    assert torch.equal(taken, free)
    assert any(len(set(row.argmax(-1).tolist())) < 7 for row in logits)
