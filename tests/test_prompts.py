import torch

from transformers_autogaze.integrations.prompts import fill_placeholders, find_placeholders


def test_a_run_of_placeholders_is_one_video():
    ids = torch.tensor([[9, 9, 1, 9, 2], [1, 2, 9, 9, 9], [1, 2, 3, 4, 5]])
    assert find_placeholders(ids, 9) == [[(0, 2), (3, 4)], [(2, 5)], []]


def test_padding_is_no_placeholder():
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    assert find_placeholders(torch.tensor([[9, 9, 1, 9, 2]]), 9, mask) == [[(3, 4)]]


def test_videos_replace_their_placeholders():
    ids = torch.tensor([[0, 3, 9, 4, 9], [5, 9, 9, 6, 0]])
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    text = ids[..., None].float()
    videos = [torch.tensor([[10.0], [11.0], [12.0]]), torch.zeros(0, 1), torch.tensor([[30.0]])]
    filled = fill_placeholders(ids, text, 9, videos, mask, labels=ids + 100, padding_side="left", pad_token_id=7)
    assert filled["input_ids"].tolist() == [[3, 9, 9, 9, 4], [7, 7, 5, 9, 6]]
    assert filled["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]
    assert filled["labels"].tolist() == [[103, -100, -100, -100, 104], [-100, -100, 105, -100, 106]]
    embeds = filled["inputs_embeds"][..., 0]
    assert embeds[0].tolist() == [3, 10, 11, 12, 4] and embeds[1, 2:].tolist() == [5, 30, 6]


def test_gradients_reach_only_words_and_videos():
    ids = torch.tensor([[3, 9, 4], [5, 6, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    text, video = torch.zeros(2, 3, 2, requires_grad=True), torch.zeros(4, 2, requires_grad=True)
    filled = fill_placeholders(ids, text, 9, [video], mask)
    filled["inputs_embeds"][filled["attention_mask"].bool()].sum().backward()
    assert text.grad[..., 0].tolist() == [[1, 0, 1], [1, 1, 0]] and (video.grad == 1).all()
