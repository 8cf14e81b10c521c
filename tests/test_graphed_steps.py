"""Decoding at fixed sizes must give what decoding at true sizes gives, on a CPU, where nothing is captured, and on CUDA."""

import copy
import gc

import pytest
import torch
from test_generation import assert_same_gaze, thresholds_that_stop_clips_differently
from torch._subclasses.fake_tensor import FakeTensorMode

from transformers_autogaze import AutoGazeConfig, AutoGazeModel, GazeCache, GazeOutput
from transformers_autogaze import graphed_steps_autogaze as graphed
from transformers_autogaze.cuda_graphs_autogaze import ReplayedCall
from transformers_autogaze.fused_decoder_autogaze import FusedDecoder
from transformers_autogaze.graphed_steps_autogaze import GraphedSteps


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.fixture
def video() -> torch.Tensor:
    return torch.randn(3, 6, 3, 64, 64, generator=torch.Generator().manual_seed(1)).double()


@pytest.fixture
def fixed(monkeypatch):
    """Runs a call with graphed steps and tells that they did it."""
    began = []
    attach = GraphedSteps.attach

    def noted(steps, *args):
        began.append(steps)
        return attach(steps, *args)

    monkeypatch.setattr(GraphedSteps, "attach", noted)

    def run(model, *args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(AutoGazeModel, "_replays_steps", lambda self: True)
            number = len(began)
            gaze = model.generate(*args, **kwargs)
            assert len(began) == number + 1
        return gaze

    return run


@pytest.mark.parametrize("positions", ["frame_tail", "sequential"])
@pytest.mark.parametrize("ratio", [0.04, 0.3, 1.0, [1.0, 0.1, 0.5, 0.04, 0.9, 0.2]])
def test_budgets_give_the_same_gaze(tiny, video, fixed, positions, ratio):
    model = tiny.model()
    model.config.decoding_positions = positions
    assert_same_gaze(fixed(model, video, gazing_ratio=ratio), model.generate(video, gazing_ratio=ratio))


def test_thresholds_that_end_clips_at_different_steps_give_the_same_gaze(tiny_model, video, fixed):
    call = {"gazing_ratio": 0.9, "task_loss_requirement": thresholds_that_stop_clips_differently(tiny_model, video)}
    plain = tiny_model.generate(video, **call)
    assert (plain.clip_num_gazing_each_frame.amax(0) != plain.clip_num_gazing_each_frame.amin(0)).any()
    assert_same_gaze(fixed(tiny_model, video, **call), plain)


def test_tiles_and_further_calls_use_the_same_memory(tiny, tiny_model, video, fixed):
    call = tiny.call("tiles_2x2_loss")
    assert_same_gaze(
        fixed(tiny_model, tiny.video("tiles_2x2"), **call), tiny_model.generate(tiny.video("tiles_2x2"), **call)
    )
    for clips in (video, video[:1], video.flip(0)):
        assert_same_gaze(fixed(tiny_model, clips, gazing_ratio=0.5), tiny_model.generate(clips, gazing_ratio=0.5))


@pytest.mark.parametrize("threshold", [None, -0.3])
def test_streams_may_change_between_both_ways(tiny_model, fixed, threshold):
    video = torch.randn(2, 20, 3, 64, 64, generator=torch.Generator().manual_seed(2)).double()
    call = {"gazing_ratio": 0.5, "task_loss_requirement": threshold}
    cache, parts = GazeCache(), []
    for number, part in enumerate(video.split([1, 1, 5, 4, 9], 1)):
        parts.append(
            tiny_model.generate(part, **call, past_key_values=cache)
            if number == 2
            else fixed(tiny_model, part, **call, past_key_values=cache)
        )
    assert cache.num_frames == 20
    assert_same_gaze(GazeOutput.concatenate(parts), tiny_model.generate(video, **call))


def test_memory_grows_with_the_clip_and_small_parts_of_it_are_looked_at(tiny_model, video, fixed, monkeypatch):
    monkeypatch.setattr(graphed, "_CAPACITY_STEP", 16)
    for frames in (1, 6, 2):
        gaze = fixed(tiny_model, video[:, :frames], gazing_ratio=0.5)
        assert_same_gaze(gaze, tiny_model.generate(video[:, :frames], gazing_ratio=0.5))
    (workspace,) = (part for part in [graphed._WORKSPACES[tiny_model]])
    assert len({capacity for _, capacity in workspace.steps[3].calls}) > 2


def test_changed_weights_are_noticed(tiny, video, fixed):
    model = tiny.model()
    fixed(model, video, gazing_ratio=0.3)
    with torch.no_grad():
        model.gaze_decoder.lm_head.weight.neg_()
    assert_same_gaze(fixed(model, video, gazing_ratio=0.3), model.generate(video, gazing_ratio=0.3))


def test_a_model_can_be_copied_and_leaves_nothing_behind(tiny, video, fixed):
    model = tiny.model()
    fixed(model, video, gazing_ratio=0.3)
    twin = copy.deepcopy(model)
    assert_same_gaze(fixed(twin, video, gazing_ratio=0.3), model.generate(video, gazing_ratio=0.3))
    count = len(graphed._WORKSPACES)
    del model, twin
    gc.collect()
    assert len(graphed._WORKSPACES) == count - 2


def test_another_thread_gets_none(tiny_model):
    with graphed.graphed_steps(tiny_model, 2) as first, graphed.graphed_steps(tiny_model, 2) as second:
        assert isinstance(first, GraphedSteps) and second is None


def test_adapted_weights_are_not_graphed(tiny):
    class Adapted(torch.nn.Linear):
        pass

    model = tiny.model()
    query = model.gaze_decoder.model.layers[0].self_attn.q_proj
    model.gaze_decoder.model.layers[0].self_attn.q_proj = Adapted(query.in_features, query.out_features, bias=False)
    with graphed.graphed_steps(model, 2) as steps:
        assert steps is None


def test_a_call_that_cannot_be_captured_still_runs(monkeypatch):
    class Graph:
        pass

    def refuse(*args, **kwargs):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", refuse)
    count = torch.zeros(())
    step = ReplayedCall(lambda: count.add_(1), torch.device("cuda"))
    for _ in range(3):
        step()
    assert count == 3 and not step.can_capture


@pytest.mark.skipif(torch.version.cuda is None, reason="needs a torch that was built for CUDA, though no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_on_cuda_neither_wait_nor_mix_devices(tiny, monkeypatch, dtype):
    model = tiny.model(dtype=dtype)
    cache, unread = model._prepare_cache(None, 3), [3, 1, 2]
    with FakeTensorMode(), torch.no_grad():  # tensors without content: reading any of it raises

        def on_cuda(tensor: torch.Tensor) -> torch.Tensor:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")

        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                tensors.update({name: on_cuda(tensor) for name, tensor in tensors.items() if tensor is not None})
        cache.keys, cache.values, cache.unread_ids = map(on_cuda, (cache.keys, cache.values, cache.unread_ids))
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
        steps = GraphedSteps(FusedDecoder(model.gaze_decoder, "sdpa"), 3, "frame_tail")
        monkeypatch.setattr(ReplayedCall, "__call__", lambda call: call.function())
        steps.attach(cache, 100, True)
        for _ in range(2):
            steps.begin_frame(
                torch.empty(3, 16, model.gaze_decoder.model.config.hidden_size, dtype=dtype, device="cuda")
            )
            steps.read_chosen([0, 1, 2])
            steps.read_chosen([0, 2])
            ids, losses = steps.propose(2)
            assert ids.shape == losses.shape == (2, 2) and ids.device.type == losses.device.type == "cuda"
            cache.num_unread = unread
        steps.finish()
        assert cache.keys.device.type == "cuda"


@needs_cuda
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_cuda_gives_the_ids_of_the_cpu(threshold, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    model = AutoGazeModel(AutoGazeConfig(initializer_range=0.1)).eval()
    clips = torch.randn(3, 16, 3, 224, 224)
    call = {"gazing_ratio": 0.3, "task_loss_requirement": threshold}
    expected = model.generate(clips, **call)
    model.to("cuda")
    for _ in range(3):  # as it is, captured, replayed
        gaze = model.generate(clips.to("cuda"), **call)
        kept = [torch.cat(each.gazing_mask, -1).cpu() for each in (gaze, expected)]
        assert (kept[0] == kept[1]).float().mean() >= 0.999
    (steps,) = graphed._WORKSPACES[model].steps.values()
    assert any(step.graph is not None for step in steps.calls.values())


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cuda_in_half_precision_gives_what_single_operations_give(dtype, monkeypatch):
    torch.manual_seed(0)
    model = AutoGazeModel(AutoGazeConfig(initializer_range=0.1)).eval().to("cuda", dtype)
    clips = torch.randn(2, 4, 3, 224, 224, device="cuda", dtype=dtype)
    replayed = [model.generate(clips, gazing_ratio=0.2) for _ in range(3)][-1]
    monkeypatch.setattr(AutoGazeModel, "_replays_steps", lambda self: False)
    plain = model.generate(clips, gazing_ratio=0.2)
    kept = [torch.cat(each.gazing_mask, -1) for each in (replayed, plain)]
    assert (kept[0] == kept[1]).float().mean() >= 0.97
