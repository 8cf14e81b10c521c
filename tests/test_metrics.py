import math

import pytest
import torch

from transformers_autogaze.evaluation.quality import efficiency, l1, psnr, ssim


def make_frames(count=3, height=24, width=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    frames = torch.rand(count, 3, height, width, generator=generator)
    rebuilt = (frames + 0.1 * torch.randn(frames.shape, generator=generator)).clamp(0, 1)
    return rebuilt, frames


def ssim_by_hand(rebuilt, frame):
    """Structural similarity of one frame, window by window."""
    luma = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)[:, None, None]
    x, y = ((image.double() * luma).sum(0) for image in (rebuilt, frame))
    distance = torch.arange(-5, 6, dtype=torch.float64)
    weights = torch.exp(-(distance[:, None] ** 2 + distance**2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            a, b = (image[top : top + 11, left : left + 11] for image in (x, y))
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            var_a, var_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
            cov = (weights * (a - mean_a) * (b - mean_b)).sum()
            luminance = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
            values.append(luminance * (2 * cov + 9e-4) / (var_a + var_b + 9e-4))
    return float(torch.stack(values).mean())


def test_ssim_equals_its_definition_window_by_window():
    rebuilt, frames = make_frames()
    expected = torch.tensor([ssim_by_hand(*pair) for pair in zip(rebuilt, frames, strict=True)])
    torch.testing.assert_close(ssim(rebuilt, frames), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(ssim(frames[None], frames[None]), torch.ones(1, 3))


def test_ssim_needs_frames_as_large_as_its_window():
    with pytest.raises(ValueError, match=r"`frames` must be at least 11 pixels high and wide, got \(24, 10\)"):
        ssim(*make_frames(width=10))


def test_psnr_and_l1_of_known_errors():
    frames = torch.full((2, 3, 12, 12), 0.5)
    rebuilt = frames + torch.tensor([0.1, 0.01])[:, None, None, None]
    torch.testing.assert_close(psnr(rebuilt, frames), torch.tensor([20.0, 40.0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(l1(rebuilt, frames), torch.tensor([0.1, 0.01]))
    assert psnr(frames, frames).tolist() == [100.0, 100.0]


def test_efficiency_is_one_for_greedy_and_zero_for_random():
    assert efficiency(0.1, random_loss=0.9, greedy_loss=0.1) == 1
    assert efficiency(0.9, random_loss=0.9, greedy_loss=0.1) == 0
    assert efficiency(1.3, random_loss=0.9, greedy_loss=0.1) == pytest.approx(-0.5)
    assert math.isnan(efficiency(0.5, random_loss=0.5, greedy_loss=0.5))


@pytest.fixture(scope="module")
def metric(tmp_path_factory):
    evaluate = pytest.importorskip("evaluate")
    from transformers_autogaze.evaluation import metrics

    return evaluate.load(metrics.__file__, cache_dir=str(tmp_path_factory.mktemp("metrics")))


def test_the_metric_returns_means_over_the_frames(metric):
    rebuilt, frames = make_frames()
    result = metric.compute(predictions=rebuilt.numpy(), references=frames.numpy())
    assert result.keys() == {"psnr", "ssim", "l1", "task_loss"}
    for measure in (psnr, ssim, l1):
        assert result[measure.__name__] == pytest.approx(float(measure(rebuilt, frames).mean()), abs=1e-5)
    assert result["task_loss"] == pytest.approx((40 - result["psnr"]) / 20)


def test_the_metric_accepts_batches_of_frames_of_several_sizes(metric):
    pairs = [make_frames(seed=1), make_frames(count=2, height=16, seed=2)]
    for rebuilt, frames in pairs:
        metric.add_batch(predictions=list(rebuilt.numpy()), references=list(frames.numpy()))
    expected = torch.cat([psnr(*pair) for pair in pairs]).mean()
    assert metric.compute()["psnr"] == pytest.approx(float(expected), abs=1e-4)


def test_the_metric_returns_patch_counts_and_efficiency(metric):
    frames = torch.full((4, 3, 12, 12), 0.5)
    rebuilt = frames + torch.tensor([0.1, 0.01, 0.1, 0.01])[:, None, None, None]
    result = metric.compute(
        predictions=rebuilt.numpy(),
        references=frames.numpy(),
        num_patches=[10, 30, 5, 11],
        threshold=0.7,
        predicted_losses=[0.5, 0.2, 0.9],
        measured_losses=[0.6, 0.2, 0.7],
        random_loss=1.25,
        greedy_loss=0.25,
    )
    expected = {
        "task_loss": 0.5,
        "patches_per_frame": 14,
        "reduction_factor": 14,
        "threshold_share": 0.5,
        "predicted_loss_error": 0.1,
        "efficiency": 0.75,
    }
    assert {key: result[key] for key in expected} == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_patches": [1]}, r"`num_patches` must be one number for each of 3 frames, got \[1\]"),
        ({"random_loss": 1.0}, "`random_loss` and `greedy_loss` must be given together"),
        ({"measured_losses": [1.0]}, "`predicted_losses` and `measured_losses` must be given together"),
        (
            {"predicted_losses": [1.0], "measured_losses": [1.0, 2.0]},
            "`predicted_losses` must be as many as `measured_losses`, got 1 and 2",
        ),
    ],
)
def test_invalid_arguments_of_the_metric_are_refused(metric, options, message):
    rebuilt, frames = make_frames()
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=rebuilt.numpy(), references=frames.numpy(), **options)
