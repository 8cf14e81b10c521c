"""A rendered clip for demonstrations: a textured background, moving objects, a pan and a scene cut."""

import numpy as np


def render_demo_clip(num_frames: int = 64, height: int = 288, width: int = 512, seed: int = 0) -> np.ndarray:
    """
    Draws a clip of two scenes: objects that move over a still background, then, after a cut, a slow pan.

    Args:
        num_frames (`int`, *optional*, defaults to 64): number of frames, at least 2.
        height, width (`int`, *optional*, default to 288 and 512): size in pixels, at least 16.
        seed (`int`, *optional*, defaults to 0): seed of the textures.

    Returns:
        `np.ndarray` of shape `(num_frames, height, width, 3)`, uint8.

    Raises:
        ValueError: if a number is too small.

    Example:

    ```python
    >>> from transformers_autogaze.video.demo import render_demo_clip

    >>> render_demo_clip(num_frames=4, height=32, width=48).shape
    (4, 32, 48, 3)

    ```
    """
    for name, value, least in (("num_frames", num_frames, 2), ("height", height, 16), ("width", width, 16)):
        if value < least:
            raise ValueError(f"`{name}` must be at least {least}, got {value}")
    generator = np.random.default_rng(seed)
    cut = num_frames * 5 // 8
    y, x = np.mgrid[:height, :width]
    meadow = _texture(height, width, generator, dark=(16, 44, 24), light=(176, 214, 110))
    sky = np.array([96, 150, 214]) + (y / height)[..., None] * np.array([150, 110, 40])
    meadow = np.where((y < 0.45 * height)[..., None], sky, meadow)
    wall = _texture(height, width + width // 2, generator, dark=(120, 84, 70), light=(226, 190, 158))
    pitch = max(8, height // 6)
    row, col = np.mgrid[:height, : width + width // 2] % pitch
    is_window = (row > 0.25 * pitch) & (row < 0.8 * pitch) & (col > 0.3 * pitch) & (col < 0.75 * pitch)
    wall = np.where(is_window[..., None], np.array([34, 44, 66]), wall)

    frames = np.empty((num_frames, height, width, 3), np.uint8)
    for index in range(num_frames):
        if index < cut:
            time = index / max(1, cut - 1)
            frame = meadow.copy()
            # A ball that bounces, a box that moves to the left, and a small light that appears half-way.
            ball_x, ball_y = width * (0.12 + 0.76 * time), height * (0.75 - 0.5 * abs(np.sin(2.5 * np.pi * time)))
            distance = np.hypot(x - ball_x, y - ball_y) / (0.11 * height)
            shade = np.clip(1.15 - 0.45 * distance, 0, 1)[..., None]
            frame = np.where((distance < 1)[..., None], shade * np.array([235, 90, 50]), frame)
            box_x = width * (0.85 - 0.6 * time)
            is_box = (abs(x - box_x) < 0.09 * width) & (abs(y - 0.86 * height) < 0.07 * height)
            stripes = np.where(((x - box_x).astype(int) // 6) % 2, 1.0, 0.75)[..., None]
            frame = np.where(is_box[..., None], stripes * np.array([60, 110, 220]), frame)
            is_light = (np.hypot(x - 0.8 * width, y - 0.2 * height) < 0.05 * height) & (time > 0.5)
            frame = np.where(is_light[..., None], np.array([255, 245, 170]), frame)
        else:
            shift = (index - cut) * (width // 2) // max(1, num_frames - cut - 1) // 3
            frame = wall[:, shift : shift + width]
        frames[index] = np.clip(frame, 0, 255)
    return frames


def _texture(
    height: int, width: int, generator: np.random.Generator, dark: tuple[int, ...], light: tuple[int, ...]
) -> np.ndarray:
    """Blends two colours by noise of several spatial frequencies."""
    y, x = np.mgrid[:height, :width]
    pattern = np.zeros((height, width))
    for size, weight in ((96, 1.0), (40, 0.6), (16, 0.6), (6, 0.5)):
        rows, cols = height // size + 3, width // size + 3
        knots = generator.standard_normal((rows, cols))
        row, down = np.divmod(y / size, 1)
        col, right = np.divmod(x / size, 1)
        row, col = row.astype(int), col.astype(int)
        # Smoothstep interpolation has no visible edges at the knots.
        down, right = down**2 * (3 - 2 * down), right**2 * (3 - 2 * right)
        top = knots[row, col] * (1 - right) + knots[row, col + 1] * right
        bottom = knots[row + 1, col] * (1 - right) + knots[row + 1, col + 1] * right
        pattern += weight * (top * (1 - down) + bottom * down)
    share = (1 / (1 + np.exp(-2.4 * pattern)))[..., None]
    return np.array(dark) * (1 - share) + np.array(light) * share
